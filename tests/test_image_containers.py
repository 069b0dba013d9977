"""Image files beside their pixels: sizes, metadata, grey of 9 to 16 bits, long images."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, WebPImagePlugin

from vqgan_jax.data import image_containers
from vqgan_jax.data.decoding import DecodeOptions, decode_alpha, decode_image, open_image
from vqgan_jax.data.resampling import pillow_scales_rows_first, resized_part
from vqgan_jax.data.transforms import Transform
from vqgan_jax.errors import UnreadableImage

COLOURS = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)).resize((36, 24))
)
PICTURE = Image.fromarray(COLOURS)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def replaced(content, place, new):
    return content[:place] + new + content[place + len(new) :]


def chunk(kind, content):
    """Of a PNG file."""
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def large_headers():
    """Files of a few hundred bytes that say 20000 x 20000 pixels."""
    two = {"save_all": True, "append_images": [Image.new("RGB", (36, 24))], "lossless": True}
    webp = encoded(PICTURE, "WEBP", **two)
    place = webp.index(b"VP8X") + 12
    yield "webp", replaced(webp, place, (19_999).to_bytes(3, "little") * 2)
    gif = encoded(PICTURE, "GIF")
    size = struct.pack("<HH", 20_000, 20_000)
    yield "gif, screen", replaced(gif, 6, size)
    yield "gif, frame", replaced(gif, gif.index(b"\x2c\0\0\0\0") + 5, size)
    size = struct.pack(">II", 20_000, 20_000)
    jp2 = encoded(PICTURE, "JPEG2000")
    yield "jp2", replaced(jp2, jp2.index(b"ihdr") + 4, size)
    place = jp2.index(b"\xff\x4f\xff\x51")
    yield "j2k", replaced(jp2, place + 8, size)[place:]
    yield "ppm", b"P6 20000 20000 255\n"
    jpeg = encoded(PICTURE, "JPEG")
    yield "jpeg", replaced(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", 20_000, 20_000))


def test_the_limit_of_pixels_holds_before_a_decoder_begins(monkeypatch):
    for name, content in large_headers():
        with pytest.raises(UnreadableImage) as error:
            decode_image(content)
        assert "20000 x 20000 pixels; config.data.max_pixels" in str(error.value), name
    for lossless in (False, True):  # VP8 and VP8L
        content = encoded(PICTURE, "WEBP", lossless=lossless)
        with monkeypatch.context() as patch:
            patch.setattr(WebPImagePlugin._webp, "WebPAnimDecoder", None)  # which has canvases
            with pytest.raises(UnreadableImage, match="36 x 24 pixels; config.data.max_pixels"):
                decode_image(content, DecodeOptions(max_pixels=863))
        assert decode_image(content, DecodeOptions(max_pixels=864)).shape == (24, 36, 3)


def test_metadata_hides_no_picture():
    """Texts that inflate above Pillow's limit, too many texts, and comments of many blocks."""
    png, bomb = encoded(PICTURE, "PNG"), zlib.compress(bytes(3 * 2**20))
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        for place in (33, len(png) - 12):  # in front of the pixels and behind them
            content = png[:place] + chunk(kind, head + bomb) + png[place:]
            np.testing.assert_array_equal(decode_image(content), COLOURS)
    texts = chunk(b"tEXt", b"a\0" + bytes(2**20 - 10)) * 65
    np.testing.assert_array_equal(decode_image(png[:33] + texts + png[33:]), COLOURS)
    gif = encoded(PICTURE, "GIF")
    place = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    comment = b"\x21\xfe" + (b"\xff" + b"c" * 255) * 20_000 + b"\0"
    expected = decode_image(gif)
    np.testing.assert_array_equal(decode_image(gif[:place] + comment + gif[place:]), expected)
    jpeg = encoded(PICTURE, "JPEG")
    blocks = (b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65_527)) * 500
    expected = decode_image(jpeg)
    np.testing.assert_array_equal(decode_image(jpeg[:2] + blocks + jpeg[2:]), expected)


def test_pixels_are_compared_with_their_checksum_where_they_are_decoded():
    png = bytearray(encoded(PICTURE, "PNG", compress_level=0))
    png[png.index(b"IDAT") + 40] ^= 16
    with pytest.raises(UnreadableImage, match="the checksum of its pixels is wrong"):
        decode_image(bytes(png))
    with open_image(bytes(png)) as image:  # the header alone, however large the file is
        assert image.size == PICTURE.size


def test_scans_of_a_jpeg_are_bounded():
    """Each scan is some bytes and passes over all pixels: thousands would take hours."""
    jpeg = encoded(PICTURE, "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    usual = jpeg.count(b"\xff\xda") + jpeg[jpeg.index(b"\xff\xda") :].count(b"\xff\xc4")
    assert usual < image_containers.MAX_SCANS / 10
    expected = decode_image(jpeg)
    film = b"\xff\xda\0\2" * 1000  # behind the end, as telephones put it
    np.testing.assert_array_equal(decode_image(jpeg + film), expected)
    for repeated in (jpeg[last:-2], b"\xff\xfe\0\4\xff\xd9" + jpeg[last:-2]):
        few, many = (jpeg[:last] + repeated * count + jpeg[-2:] for count in (100, 1000))
        assert decode_image(few).shape == expected.shape
        with pytest.raises(UnreadableImage, match="more than 500 scans"):
            decode_image(many)


def test_sparse_files_end(tmp_path):
    """8 GB of zeros behind a header are neither read to the end nor into memory."""
    for format in ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF", "JPEG2000"):
        path = tmp_path / format
        path.write_bytes(encoded(PICTURE, format)[:14])
        os.truncate(path, 2**33)
        with pytest.raises(UnreadableImage) as error:
            decode_image(path)
        assert "\n" not in str(error.value) and format in str(error.value)


def test_strips_of_a_tiff_are_bounded():
    tiff = bytearray(encoded(PICTURE, "TIFF"))
    entry = tiff.index(struct.pack("<HH", 273, 4))
    tiff[entry + 4 : entry + 8] = struct.pack("<I", 20_000_000)
    with pytest.raises(UnreadableImage, match="its entry 273 has 20000000 values"):
        decode_image(bytes(tiff))


def test_libtiff_prints_nothing(capfd):
    for compression in ("tiff_deflate", "tiff_lzw", "jpeg", "group4"):
        mode = "1" if compression == "group4" else "RGB"
        tiff = bytearray(encoded(PICTURE.convert(mode), "TIFF", compression=compression))
        for place in range(8, len(tiff), max(1, len(tiff) // 25)):
            damaged = bytes(tiff[:place]) + b"\xff\x5a\0" + bytes(tiff[place + 3 :])
            try:
                decode_image(damaged)
            except UnreadableImage as error:
                assert "\n" not in str(error)
    assert capfd.readouterr() == ("", "")


# ---- Grey of 9 to 16 bits.


def tiff_of_grey(values, bits, photometric):
    """One uncompressed strip; 12 bits are packed, two values in three bytes."""
    height, width = values.shape
    data = values.astype("<u2").tobytes()
    if bits == 12:
        first, second = values.reshape(-1, 2).astype(int).T
        three = (first >> 4, (first & 15) << 4 | second >> 8, second & 255)
        data = np.stack(three, -1).astype(np.uint8).tobytes()
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 122}
    entries |= {277: 1, 278: height, 279: len(data)}
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + data


def test_grey_of_tiff_files():
    levels = np.arange(256).reshape(16, 16)
    grey = np.repeat(levels[..., None], 3, axis=-1)
    wide = levels * 257
    np.testing.assert_array_equal(decode_image(tiff_of_grey(wide, 16, 1)), grey)
    np.testing.assert_array_equal(decode_image(tiff_of_grey(wide, 16, 0)), 255 - grey)
    twelve = np.rint(levels * 4095 / 255).astype(int)
    np.testing.assert_array_equal(decode_image(tiff_of_grey(twelve, 12, 1)), grey)


def test_a_transparent_value_of_16_bits():
    values = np.array([[1000, 1001], [1000, 65535]], np.uint16)
    png = encoded(Image.fromarray(values), "PNG")
    png = png[:33] + chunk(b"tRNS", struct.pack(">H", 1000)) + png[33:]
    assert decode_image(png)[..., 0].tolist() == [[255, 4], [255, 255]]
    assert decode_alpha(png).tolist() == [[0, 255], [0, 255]]


# ---- Crops of images that shrink.


def test_parts_of_scaled_images_have_pillows_pixels():
    random = np.random.default_rng(0)
    for height, width, *shape in (
        (300, 40, 30, 20), (300, 21, 30, 20), (40, 300, 20, 30), (200, 90, 64, 50),
        (200, 10, 50, 40), (90, 90, 31, 31), (500, 3, 170, 1), (64, 64, 64, 9),
    ):  # fmt: skip
        for channels in ((3,), ()):
            image = random.integers(0, 256, (height, width, *channels), np.uint8)
            kind = Image.Resampling.BICUBIC if channels else Image.Resampling.NEAREST
            whole = np.asarray(Image.fromarray(image).resize(shape[::-1], kind))
            rows, columns = (int(random.integers(1, side + 1)) for side in shape)
            top, left = shape[0] - rows, (shape[1] - columns) // 2
            part = resized_part(image, tuple(shape), top, left, rows, columns)
            np.testing.assert_array_equal(part, whole[top:, left : left + columns])


def test_which_axis_is_first_decides_about_the_last_bit():
    """By one axis after the other in Pillow, which both of its versions agree on."""
    image = np.random.default_rng(0).integers(0, 256, (300, 40, 3), np.uint8)
    picture = Image.fromarray(image)
    bicubic = Image.Resampling.BICUBIC
    rows_first = np.asarray(picture.resize((40, 30), bicubic).resize((20, 30), bicubic))
    columns_first = np.asarray(picture.resize((20, 300), bicubic).resize((20, 30), bicubic))
    assert (rows_first != columns_first).any()
    for first, expected in ((True, rows_first), (False, columns_first)):
        part = resized_part(image, (30, 20), 0, 0, 30, 20, rows_can_be_first=first)
        np.testing.assert_array_equal(part, expected)
    chosen = rows_first if pillow_scales_rows_first() else columns_first
    np.testing.assert_array_equal(np.asarray(picture.resize((20, 30), bicubic)), chosen)


def test_a_long_image_that_shrinks_is_cropped_first(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (40, 100_000, 3), np.uint8)
    expected = Transform(32, 32)(image)
    monkeypatch.setattr("vqgan_jax.data.transforms._LARGE_PIXELS", 10_000)
    with monkeypatch.context() as patch:
        patch.setattr("vqgan_jax.data.transforms._resized", None)  # which scales the whole
        np.testing.assert_array_equal(Transform(32, 32)(image), expected)
