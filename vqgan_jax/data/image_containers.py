"""Image files without their metadata, which can be damaged or huge while the pixels are sound.

A PNG, JPEG, GIF or TIFF file is shown to its decoder with nothing but the parts that pixels are
made of. Pillow reads all metadata when it opens a file, and an entry of a wrong type, a compressed
text or a comment of 100 MB would fail, fill the memory or take hours. What says how an image is to
be turned is handed on apart. Of several frames only the first is left.
"""

import bisect
import dataclasses
import io
import re
import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO

METADATA_BYTES = 2**20  # of one entry that may say how an image is to be turned
MAX_CHUNKS = 2**20  # of a PNG file
MAX_JUNK = 2**20  # bytes between the parts of a file
MAX_SCANS = 500  # of a JPEG file, with their tables; about ten are usual, each over all pixels
MAX_STRIPS = 2**21  # of a TIFF file; each takes some 300 bytes in Pillow
_PNG_PARTS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_JPEG_COLOURS = {0xE0: (b"JFIF\0", 14), 0xEE: (b"Adobe", 12)}  # shorter ones do not count
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # within pixels, but for restarts
_PNG_XMP, _PNG_EXIF = b"XML:com.adobe.xmp", b"Raw profile type exif"
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_TIFF_SIZES |= {16: 8, 17: 8, 18: 8}
# Size, kind and place of the pixels, the colours, JPEG's tables; and the orientation.
_TIFF_TAGS = {256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320}
_TIFF_TAGS |= {322, 323, 324, 325, 332, 338, 339, 347, 512, 513, 514, 515, 519, 520, 521}
_TIFF_TAGS |= {529, 530, 531, 532}
_TIFF_SIDES = (256, 257, 322, 323)  # of the image and of a tile, width and height
_TIFF_ORIENTATION, _TIFF_XMP = 274, 700


@dataclasses.dataclass
class Contents:
    """What of a file is decoded.

    Attributes:
      file: the file without metadata.
      exif: the EXIF block, or nothing.
      xmp: the XMP packet, or nothing.
      check_pixels: raises `ValueError` where the pixels have another checksum than is stored, or
        take too long to decode; it reads them all, so headers are read without it.
    """

    file: BinaryIO
    exif: bytes = b""
    xmp: bytes = b""
    check_pixels: Callable[[], None] = lambda: None


class _Parts(io.RawIOBase):
    """A file that consists of ranges of another file and of bytes, which are not copied."""

    def __init__(self, file: BinaryIO, has_descriptor: bool = False):
        """Starts empty; with a descriptor, `fileno` is that of the other file."""
        self._file, self._has_descriptor = file, has_descriptor
        self._parts: list[bytes | tuple[int, int]] = []
        self._starts, self._length, self._position = [], 0, 0

    def add(self, part: bytes | tuple[int, int]) -> None:
        """Appends bytes, or the range from the first offset to the second."""
        size = len(part) if isinstance(part, bytes) else part[1] - part[0]
        if size <= 0:
            return
        last = self._parts[-1] if self._parts else b""
        if isinstance(part, tuple) and isinstance(last, tuple) and last[1] == part[0]:
            self._parts[-1] = last[0], part[1]
        else:
            self._parts.append(part)
            self._starts.append(self._length)
        self._length += size

    def buffered(self) -> BinaryIO:
        """For reading in small pieces."""
        return io.BufferedReader(self, 2**16)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        if not self._has_descriptor:
            raise io.UnsupportedOperation("no descriptor")
        return self._file.fileno()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"negative seek position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        if self._position >= self._length:
            return 0
        number = bisect.bisect_right(self._starts, self._position) - 1
        part, offset = self._parts[number], self._position - self._starts[number]
        if isinstance(part, bytes):
            found = part[offset : offset + len(buffer)]
        else:
            self._file.seek(part[0] + offset)
            found = self._file.read(min(len(buffer), part[1] - part[0] - offset))
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


def pixels_only(file: BinaryIO) -> Contents:
    """The parts of an image file that its pixels are made of.

    A file of another format than PNG, JPEG, GIF and TIFF stays as it is.

    Raises:
      ValueError: it is damaged.
    """
    prefix = file.read(12)
    for magic, strip in _STRIP.items():
        if prefix.startswith(magic):
            return strip(file)
    file.seek(0)
    return Contents(file)


def webp_canvas(head: bytes) -> tuple[int, int] | None:
    """Width and height that the first 30 bytes of a WebP file declare, None where none are."""
    kind = head[12:16]
    if len(head) < 30:
        return None
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    if kind == b"VP8 ":
        return tuple(value & 0x3FFF for value in struct.unpack_from("<HH", head, 26))
    return None


def _size_of(file: BinaryIO) -> int:
    return file.seek(0, io.SEEK_END)


def _png(file: BinaryIO) -> Contents:
    size, parts, exif, xmp = _size_of(file), _Parts(file), b"", b""
    parts.add((0, 8))
    position, pixels = 8, []
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        header = file.read(8)
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        end = position + 12 + length
        if len(header) < 8 or end > size or not kind.isalpha():  # the decoder says what it misses
            parts.add((position, min(size, end)))
            break
        if kind in _PNG_PARTS:
            parts.add((position, end))
            if kind == b"IDAT":  # Pillow checks the others
                pixels.append((position + 8, length))
        elif length <= METADATA_BYTES and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            content = file.read(length)
            keyword, _, text = content.partition(b"\0")
            if kind == b"eXIf":
                exif = content
            elif kind == b"iTXt" and keyword == _PNG_XMP and len(text) > 2:
                packet = text[2:].split(b"\0", 2)[-1]
                xmp = _inflated(packet) if text[0] else packet
            elif keyword == _PNG_EXIF and kind != b"iTXt" and not exif:
                exif = _from_hex(_inflated(text[1:]) if kind == b"zTXt" else text)
        if kind == b"IEND":
            break
        position = end
    else:
        raise ValueError(f"it has more than {MAX_CHUNKS} chunks")
    return Contents(parts.buffered(), exif, xmp, lambda: _check_crcs(file, pixels))


def _check_crcs(file: BinaryIO, pixels: list[tuple[int, int]]) -> None:
    """Raises `ValueError` unless each part, of a place and a length, has the CRC-32 behind it."""
    for position, length in pixels:
        file.seek(position)
        crc = zlib.crc32(b"IDAT")
        while length > 0 and (block := file.read(min(length, 2**20))):
            crc, length = zlib.crc32(block, crc), length - len(block)
        if crc != int.from_bytes(file.read(4), "big"):
            raise ValueError("the checksum of its pixels is wrong")


def _inflated(content: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(content, METADATA_BYTES)
    except zlib.error:
        return b""


def _from_hex(text: bytes) -> bytes:
    """ImageMagick's form: an empty line, a name, a length, then digits in lines."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _jpeg(file: BinaryIO) -> Contents:
    size, parts, exif, xmp = _size_of(file), _Parts(file), b"", b""
    parts.add((0, 2))
    file.seek(2)
    junk = pixels = 0
    while junk < MAX_JUNK:
        byte = file.read(1)
        while byte and byte != b"\xff" and junk < MAX_JUNK:  # decoders pass over it too
            byte = file.read(1)
            junk += 1
        while byte == b"\xff":
            byte = file.read(1)
        if not byte:
            break
        marker, start = byte[0], file.tell() - 2
        if marker == 0 or marker == 1 or 0xD0 <= marker <= 0xD8:
            continue
        length = int.from_bytes(file.read(2), "big")
        if marker in (0xD9, 0xDA) or length < 2:  # pixels, to the end of the file
            parts.add((start, size))
            pixels = start
            break
        end = start + 2 + length
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            content = file.read(length - 2)
            name, least = _JPEG_COLOURS.get(marker, (b"", 2**16))
            if content.startswith(name) and len(content) >= least:
                parts.add((start, min(end, size)))
            elif marker == 0xE1 and content.startswith(b"Exif\0\0"):
                if len(exif) < METADATA_BYTES:
                    exif += content[6:]
            elif marker == 0xE1 and content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                xmp = content.partition(b"\0")[2]
        else:
            parts.add((start, min(end, size)))
        file.seek(end)
    return Contents(parts.buffered(), exif, xmp, lambda: _check_scans(file, pixels))


def _check_scans(file: BinaryIO, position: int) -> None:
    """Raises `ValueError` where a JPEG file has more than `MAX_SCANS` scans from a place on."""
    found = 0
    while found <= MAX_SCANS:
        file.seek(position)
        block = file.read(2**16)
        marker = _JPEG_MARKER.search(block)
        if marker:
            if marker.group() == b"\xff\xd9":  # the end; what follows is no part of the image
                return
            position += marker.end()
            position += max(int.from_bytes(_read_at(file, position, 2), "big"), 2)
            found += 1
        elif len(block) < 2:
            return
        else:
            position += len(block) - 1
    raise ValueError(f"it has more than {MAX_SCANS} scans and tables")


def _read_at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


def _gif(file: BinaryIO) -> Contents:
    size, parts = _size_of(file), _Parts(file)
    file.seek(0)
    header = file.read(13)
    position = 13 + _gif_colours(header[-3:-2])
    parts.add((0, min(position, size)))
    junk = 0
    while position < size and junk < MAX_JUNK:
        file.seek(position)
        introducer = file.read(1)
        if introducer == b"\x21":
            label = file.read(1)
            end = _skip_blocks(file)
            if label == b"\xf9":  # delay and transparency
                parts.add((position, min(end, size)))
        elif introducer == b"\x2c":
            descriptor = file.read(9)
            file.seek(_gif_colours(descriptor[-1:]) + 1, io.SEEK_CUR)  # and the size of the codes
            parts.add((position, min(_skip_blocks(file), size)))
            parts.add(b";")
            break
        else:
            end = position + 1  # Pillow passes over what it does not know
            junk += 1
            if introducer == b";":
                break
        position = end
    return Contents(parts.buffered())


def _gif_colours(flags: bytes) -> int:
    """Bytes of the table of colours that the flags announce."""
    return 3 * 2 ** ((flags[0] & 7) + 1) if flags and flags[0] & 128 else 0


def _skip_blocks(file: BinaryIO) -> int:
    """Where a sequence of blocks ends."""
    while length := file.read(1):
        if length == b"\0":
            break
        file.seek(length[0], io.SEEK_CUR)
    return file.tell()


def _tiff(file: BinaryIO) -> Contents:
    """The directory of the first image with all other entries made ones of an unknown type.

    Raises:
      ValueError: it cannot be read, or has more strips or larger tiles than any image needs.
    """
    size, parts = _size_of(file), _Parts(file, _has_descriptor(file))
    file.seek(0)
    header = file.read(16)
    order = "<" if header[:2] == b"II" else ">"
    try:
        if struct.unpack_from(order + "H", header, 2)[0] == 43:
            (start,) = struct.unpack_from(order + "Q", header, 8)
            head, entry_form = "Q", "HHQ"
        else:
            (start,) = struct.unpack_from(order + "L", header, 4)
            head, entry_form = "H", "HHL"
        entry_size = 20 if head == "Q" else 12
        file.seek(start)
        first = start + struct.calcsize(order + head)
        (count,) = struct.unpack(order + head, file.read(first - start))
        entries = file.read(min(count, 2**16) * entry_size)
        position, numbers = 0, {}
        for number in range(min(count, len(entries) // entry_size)):
            tag, kind, values = struct.unpack_from(order + entry_form, entries, number * entry_size)
            kept = tag in _TIFF_TAGS or (tag == _TIFF_XMP and values <= METADATA_BYTES)
            if tag == _TIFF_ORIENTATION and (kind not in (3, 4) or values != 1):
                kept = False
            if kept and values * _TIFF_SIZES.get(kind, 1) > 8 * MAX_STRIPS:
                raise ValueError(f"its entry {tag} has {values} values")
            if tag in _TIFF_SIDES and kind in (3, 4) and values == 1:
                place = (number + 1) * entry_size - (8 if head == "Q" else 4)
                (numbers[tag],) = struct.unpack_from(order + "?HL"[kind - 2], entries, place)
            if not kept:
                place = first + number * entry_size + 2
                parts.add((position, place))
                parts.add(b"\0\0")
                position = place + 2
    except (struct.error, OverflowError, OSError) as error:
        raise ValueError(f"its directory cannot be read: {error}") from error
    width, height, tile_width, tile_height = (numbers.get(tag, 0) for tag in _TIFF_SIDES)
    if tile_width * tile_height > 4 * width * height + MAX_STRIPS:
        raise ValueError(f"its tiles have {tile_width} x {tile_height} pixels")
    parts.add((position, size))
    return Contents(parts.buffered())


def _has_descriptor(file: BinaryIO) -> bool:
    try:
        return file.fileno() >= 0
    except (OSError, AttributeError):
        return False


_STRIP: dict[bytes, Callable[[BinaryIO], Contents]] = {
    b"\x89PNG\r\n\x1a\n": _png,
    b"\xff\xd8\xff": _jpeg,
    b"GIF8": _gif,
    b"II*\0": _tiff,
    b"MM\0*": _tiff,
    b"II+\0": _tiff,
    b"MM\0+": _tiff,
}
