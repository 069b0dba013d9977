"""Image files to uint8 arrays, whatever their format and mode; nothing in them executes."""

import contextlib
import ctypes
import dataclasses
import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vqgan_jax.conditions.derived import depth_picture
from vqgan_jax.configuration.documents import first_line
from vqgan_jax.data.image_containers import pixels_only, webp_canvas
from vqgan_jax.data.pixels import colours, deep_grey, deep_values, is_deep, transparent_value
from vqgan_jax.errors import DataError, UnreadableImage

# Formats that Pillow decodes by itself. Others it hands to other programs (EPS to Ghostscript), or
# reads in part. TGA has no mark at its start, so only the suffix tells it.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")
TGA = ".tga"
SUFFIXES = (
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
    + (".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm")
    + (TGA,)
)
MAX_PIXELS = 300_000_000  # of an image, unless the config says another number
MAX_SIDE = 1_000_000  # Pillow has a pointer for each row
_WHOLE_BYTES = 2**29
_SMALL_BYTES = 2**24
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Its own limit is a warning, and an error at twice as many pixels; ours is an option.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata
# libtiff prints its own lines of damaged files, besides Pillow's exception.
with contextlib.suppress(OSError, AttributeError):  # where it is no library of its own
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """What is read and how.

    Attributes:
      max_pixels: images of more are refused by their header.
      grey_range: of pictures in 32-bit integers or floats, what becomes black and white; (0, 0) is
        0 to 65535 for integers and 0 to 1 for floats.
    """

    max_pixels: int = MAX_PIXELS
    grey_range: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def from_config(cls, data: ConfigDict) -> "DecodeOptions":
        """Those of `config.data`."""
        return cls(data.max_pixels, tuple(data.grey_range))


DEFAULT_OPTIONS = DecodeOptions()


@contextlib.contextmanager
def open_image(
    source: bytes | str | os.PathLike,
    options: DecodeOptions = DEFAULT_OPTIONS,
    for_pixels: bool = False,
) -> Iterator[Image.Image]:
    """An image whose header is read: its size and mode are known, its pixels are not decoded yet.

    Args:
      source: a file's path, or its content.
      options: uses `max_pixels`.
      for_pixels: the pixels will be decoded: a small file is read at once, and pixels are compared
        with their checksum where the format has one.

    Raises:
      UnreadableImage: it is no regular file, no image of `FORMATS`, damaged, or too large.
    """
    with contextlib.ExitStack() as stack:
        with _guarded(source):
            file = stack.enter_context(_open_file(source, for_pixels))
            contents = pixels_only(file)
            _check_whole_file(contents.file, source, options)
            formats = FORMATS
            if not isinstance(source, bytes) and os.fspath(source).lower().endswith(TGA):
                formats = ("TGA",)
            image = Image.open(contents.file, formats=formats)
            _check_size(*image.size, source, options)
            if for_pixels:
                contents.check_pixels()
            if contents.exif:
                image.info["exif"] = contents.exif
            if contents.xmp:
                image.info["xmp"] = contents.xmp
        yield image


def _open_file(source: bytes | str | os.PathLike, whole: bool) -> BinaryIO:
    """The file, which is a regular one: a pipe or a device would not end."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UnreadableImage(f"{_name(source)} does not exist.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableImage(f"{_name(source)} is no regular file.")
    file = os.fdopen(descriptor, "rb")
    if not whole or os.fstat(descriptor).st_size > _SMALL_BYTES:
        return file
    with file:  # many small reads of Pillow's are faster in memory
        return io.BytesIO(file.read(_SMALL_BYTES))


def _check_whole_file(
    file: BinaryIO, source: bytes | str | os.PathLike, options: DecodeOptions
) -> None:
    """Refuses what would fill the memory when Pillow opens it, before its size can be asked for.

    WebP and AVIF files are read whole, and WebP's decoder begins with two canvases.
    """
    head = file.read(30)
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    if is_webp and (canvas := webp_canvas(head)):
        _check_size(*canvas, source, options)
    if is_webp or head[4:8] == b"ftyp":
        size = file.seek(0, io.SEEK_END)
        if size > _WHOLE_BYTES:
            raise UnreadableImage(
                f"{_name(source)} has {size} bytes; a WebP or AVIF file has at most {_WHOLE_BYTES}."
            )
    file.seek(0)


def _check_size(
    width: int, height: int, source: bytes | str | os.PathLike, options: DecodeOptions
) -> None:
    if width * height > options.max_pixels or max(width, height) > MAX_SIDE:
        raise UnreadableImage(
            f"{_name(source)} has {width} x {height} pixels; config.data.max_pixels allows "
            f"{options.max_pixels} in all, and a side has at most {MAX_SIDE}."
        )
    if min(width, height) < 1:
        raise UnreadableImage(f"{_name(source)} has {width} x {height} pixels.")


def decode_image(
    source: bytes | str | os.PathLike, options: DecodeOptions = DEFAULT_OPTIONS
) -> np.ndarray:
    """Decodes an encoded image or an image file to colour, the first frame of several.

    The EXIF orientation is applied, transparency is composed on white, and every other mode is
    converted to RGB; for grey of more than 8 bits see `deep_grey`.

    Returns:
      uint8 (H, W, 3).

    Raises:
      UnreadableImage: when it cannot be decoded; the message has a file's path.
      DataError: grey values are outside of the range.
    """
    image = _decoded(source, options)
    if not is_deep(image):
        with _guarded(source):
            return colours(image)
    try:
        return deep_grey(image, options.grey_range)
    except ValueError as error:
        raise DataError(f"{_name(source)} has {error}.") from error


def decode_depth(
    source: bytes | str | os.PathLike, options: DecodeOptions = DEFAULT_OPTIONS
) -> np.ndarray:
    """Decodes a map of depth or another quantity of any unit, each scaled to its own range.

    Grey of more than 8 bits fills the range: its smallest value in the image becomes 0 and its
    largest 255, as the reference scales depth. Other images are as of `decode_image`.

    Returns:
      uint8 (H, W, 3).

    Raises:
      UnreadableImage: when it cannot be decoded; the message has a file's path.
    """
    image = _decoded(source, options)
    if not is_deep(image):
        with _guarded(source):
            return colours(image)
    values = deep_values(image)
    del image
    try:
        return depth_picture(values)
    except ValueError as error:
        raise UnreadableImage(f"{_name(source)} cannot be used: {error}") from error


def decode_label_map(
    source: bytes | str | os.PathLike, options: DecodeOptions = DEFAULT_OPTIONS
) -> np.ndarray:
    """Decodes a map of labels: a grey or palette image whose pixel values are the labels.

    Returns:
      uint8 (H, W).

    Raises:
      UnreadableImage: when it cannot be decoded.
      DataError: when it is a colour picture, or has more bits than uint8.
    """
    image = _decoded(source, options)
    if image.mode not in ("1", "L", "P"):
        raise DataError(
            f"{_name(source)} is no label map: its mode is {image.mode}, and a label map is grey "
            "or palette with 8 bits. Pictures are for tokenizers with config.data.num_labels=0."
        )
    return np.asarray(image).astype(np.uint8)


def decode_alpha(
    source: bytes | str | os.PathLike, options: DecodeOptions = DEFAULT_OPTIONS
) -> np.ndarray | None:
    """How opaque each pixel of an image is, uint8 (H, W); None where it has no transparency.

    Raises:
      UnreadableImage: when it cannot be decoded.
    """
    image = _decoded(source, options)
    if not image.has_transparency_data:
        return None
    if is_deep(image):
        opaque = deep_values(image) != transparent_value(image)
        return np.where(opaque, np.uint8(255), np.uint8(0))
    with _guarded(source):
        return np.asarray(image.convert("RGBA").getchannel("A"))


def _decoded(source: bytes | str | os.PathLike, options: DecodeOptions) -> Image.Image:
    """The decoded first frame, upright."""
    with open_image(source, options, for_pixels=True) as image, _guarded(source):
        image.load()
        turn = None
        if image.format != "TIFF":  # which Pillow turns as it is decoded
            turn = _TURNS.get(_orientation(image))
        return image if turn is None else image.transpose(turn)


@contextlib.contextmanager
def _guarded(source: bytes | str | os.PathLike) -> Iterator[None]:
    """Whatever Pillow's plugins raise is a damaged image."""
    try:
        yield
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(f"{_name(source)} cannot be decoded: it is not an image.") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UnreadableImage(
            f"{_name(source)} cannot be decoded: {reason[:200].rstrip('.')}."
        ) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none that can be read."""
    content = image.info.get("exif")
    if isinstance(content, bytes):
        found = _exif_orientation(content.removeprefix(b"Exif\x00\x00"))
        if found is not None:
            return found
    try:
        found = image.getexif().get(_ORIENTATION, 1)  # of XMP too
    except Exception:  # a damaged entry must not hide a good picture
        return 1
    return found if isinstance(found, int) else 1


def _exif_orientation(content: bytes) -> int | None:
    """The entry of the first directory of an EXIF block, whatever its other entries hold."""
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    try:
        (start,) = struct.unpack_from(f"{order}I", content, 4)
        (count,) = struct.unpack_from(f"{order}H", content, start)
        for i in range(count):
            tag, kind, values = struct.unpack_from(f"{order}HHI", content, start + 2 + 12 * i)
            if tag == _ORIENTATION and values == 1:
                form = {1: "B", 3: "H", 4: "I"}.get(kind, "H")
                return struct.unpack_from(f"{order}{form}", content, start + 10 + 12 * i)[0]
    except struct.error:
        pass
    return None


def _name(source: bytes | str | os.PathLike) -> str:
    return "The image" if isinstance(source, bytes) else os.fspath(source)
