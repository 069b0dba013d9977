"""Image files of people: many formats, damaged ones, hostile ones."""

import io
import os
import pathlib
import struct
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import programs
from vqgan_jax.data.decoding import (
    SUFFIXES,
    DecodeOptions,
    decode_depth,
    decode_image,
    decode_label_map,
)
from vqgan_jax.data.resampling import resized_part
from vqgan_jax.data.transforms import Transform, resize_shorter_side
from vqgan_jax.errors import DataError, UnreadableImage

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
LOSSLESS = {
    ".png": {},
    ".webp": {"lossless": True},
    ".bmp": {},
    ".tif": {},
    ".tiff": {"compression": "tiff_deflate"},
    ".ppm": {},
    ".tga": {},
    ".jp2": {"irreversible": False},
    ".j2k": {"irreversible": False},
}


def save(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_formats(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", Image.fromarray(PIXELS), **LOSSLESS[suffix])
    np.testing.assert_array_equal(decode_image(path), PIXELS)
    assert suffix in SUFFIXES


@pytest.mark.parametrize("suffix", [".jpg", ".jfif", ".avif"])
def test_lossy_formats(tmp_path, suffix):
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    path = save(tmp_path / f"a{suffix}", Image.fromarray(flat), quality=95)
    assert np.abs(decode_image(path).astype(int) - flat).max() < 8


def test_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for suffix in (".gif", ".png", ".webp", ".tiff"):
        path = tmp_path / f"a{suffix}"
        options = {"lossless": True} if suffix == ".webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert (decode_image(path) == (255, 0, 0)).all()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
HOSTILE = {
    "eps": EPS,
    "eps in binary": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + bytes(18) + EPS,
    "pdf": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n%%EOF\n",
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "pickle": b"\x80\x04cos\nsystem\n.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_is_started(tmp_path, monkeypatch, kind):
    """Pillow would hand EPS to the first `gs` in PATH."""
    programs_folder = tmp_path / "bin"
    programs_folder.mkdir()
    for name in ("gs", "gswin64c", "convert", "djpeg"):
        (programs_folder / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (programs_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs_folder}{os.pathsep}{os.environ['PATH']}")
    for suffix in (".png", ".jpg", ".tga", ".eps"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(HOSTILE[kind])
        with pytest.raises(UnreadableImage, match=path.name):
            decode_image(path)
    assert not (tmp_path / "started").exists()


def png(width, height):
    """A PNG with a header and next to no pixels."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1, 100_000_000), (100_000_000, 1), (20_000, 20_000)])
def test_too_many_pixels(size):
    with pytest.raises(UnreadableImage) as error:
        decode_image(png(*size))
    assert f"{size[0]} x {size[1]} pixels; config.data.max_pixels allows" in str(error.value)
    with pytest.raises(UnreadableImage, match="config.data.max_pixels allows 50"):
        decode_image(png(10, 10), DecodeOptions(max_pixels=50))


def test_pipes_and_folders_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path, tmp_path / "missing.png", pathlib.Path("/dev/zero")):
        with pytest.raises(UnreadableImage, match="is no regular file|does not exist"):
            decode_image(path)


def test_sixteen_bits_are_those_of_their_eight_bit_twin(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    twin = Image.fromarray(grey.astype(np.uint16) * 257)
    for name in ("a.png", "a.tif", "a.pgm", "a.jp2"):
        options = {"irreversible": False} if name.endswith("jp2") else {}
        decoded = decode_image(save(tmp_path / name, twin, **options))
        np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, axis=-1))
    between = Image.fromarray(np.array([[128, 129, 385, 65535]], np.uint16))
    assert decode_image(save(tmp_path / "b.png", between))[0, :, 0].tolist() == [0, 1, 1, 255]


def test_the_range_of_32_bits(tmp_path):
    integers = save(tmp_path / "i.tif", Image.fromarray(np.array([[0, 32896, 65535]], np.int32)))
    floats = save(tmp_path / "f.tif", Image.fromarray(np.array([[0, 0.5, 1]], np.float32)))
    assert decode_image(integers)[0, :, 0].tolist() == [0, 128, 255]
    assert decode_image(floats)[0, :, 0].tolist() == [0, 128, 255]
    options = DecodeOptions(grey_range=(-1.0, 1.0))
    assert decode_image(floats, options)[0, :, 0].tolist() == [128, 191, 255]
    for value in (2.0, np.nan, np.inf):
        path = save(tmp_path / "x.tif", Image.fromarray(np.array([[0, value]], np.float32)))
        with pytest.raises(DataError, match="config.data.grey_range is 0 to 1"):
            decode_image(path)
    path = save(tmp_path / "d.png", Image.fromarray(np.array([[7, 9]], np.uint16)))
    assert decode_depth(path)[0, :, 0].tolist() == [0, 255]


def exif(tag, kind, count, order="<"):
    """A directory with the entry, and the orientation 6."""
    entries = struct.pack(f"{order}HHII", tag, kind, count, 2**31 if count > 1 else 65)
    entries += struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 6, 0)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return b"Exif\0\0" + start + struct.pack(f"{order}H", 2) + entries + bytes(4)


def test_a_damaged_exif_entry_hides_no_picture():
    """Any tag, type and number of values in front of the orientation."""
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, 8:] = 255
    image, turned = Image.fromarray(upright), np.rot90(upright, -1)
    for tag in (0x0100, 0x011A, 0x0110, 0x8769, 0x8825, 0x9286, 0x0001):
        for kind in range(15):
            for count in (0, 1, 2, 2**31):
                for order in "<>":
                    file = io.BytesIO()
                    image.save(file, "JPEG", quality=100, exif=exif(tag, kind, count, order))
                    decoded = decode_image(file.getvalue()).astype(int)
                    assert np.abs(decoded - turned).max() < 8, (tag, kind, count, order)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_an_error_or_a_picture(data):
    """Bytes that are changed, cut or doubled anywhere, of each format."""
    file = io.BytesIO()
    suffix = data.draw(st.sampled_from(sorted(LOSSLESS)))
    name = Image.registered_extensions()[suffix]
    Image.fromarray(PIXELS).save(file, name, **LOSSLESS[suffix])
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(1, len(content)))])
    for decode in (decode_image, decode_label_map, decode_depth):
        try:
            assert decode(content).dtype == np.uint8
        except DataError as error:
            assert "\n" not in str(error)


def test_crops_of_enlarged_images_have_equal_pixels():
    random = np.random.default_rng(0)
    for height, width, size in ((1, 40, 9), (40, 1, 9), (2, 30, 25), (7, 7, 40), (3, 11, 3)):
        shape = (max(size, round(height * size / min(height, width))),
                 max(size, round(width * size / min(height, width))))  # fmt: skip
        for channels in ((3,), ()):
            image = random.integers(0, 256, (height, width, *channels)).astype(np.uint8)
            whole = resize_shorter_side(image, size)
            top, left = (int(random.integers(side - size + 1)) for side in shape)
            part = resized_part(image, shape, top, left, size, size)
            np.testing.assert_array_equal(part, whole[top : top + size, left : left + size])


MEMORY = """
import resource, sys, numpy as np
from PIL import Image
from vqgan_jax.data.decoding import decode_image
from vqgan_jax.data.transforms import Transform
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = decode_image(sys.argv[1])
assert Transform(256, 256)(image).shape == (256, 256, 3)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_divider_of_3000_pixels_needs_little_memory(tmp_path):
    path = save(tmp_path / "divider.png", Image.new("RGB", (3000, 1), "grey"))
    done = programs.run([sys.executable, "-c", MEMORY, str(path)], timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # MiB; scaling it whole would need 1,800


def test_enlargements_are_bounded():
    with pytest.raises(DataError, match="would become 768000 x 256"):
        resize_shorter_side(np.zeros((1, 3000, 3), np.uint8), 256, max_pixels=10**8)
    crop = Transform(16, 16).place(1, 3000)
    assert crop.whole == (16, 48000) and crop.left == (48000 - 16) // 2
