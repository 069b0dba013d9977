import io

import numpy as np
import pytest
from PIL import Image

from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.data.decoding import decode_depth, decode_image, decode_label_map
from vqgan_jax.data.images import to_float, to_uint8
from vqgan_jax.data.transforms import (
    Transform,
    evaluation_transform,
    resize_shorter_side,
    training_transform,
)
from vqgan_jax.errors import DataError, UnreadableImage

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} | options))
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA"])
def test_decodes_every_mode_of_png(mode):
    image = Image.fromarray(COLOURS).convert(mode)
    np.testing.assert_array_equal(decode_image(encoded(image)), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_keeps_its_colour():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red ink
    decoded = decode_image(encoded(image, format="JPEG", quality=100)).astype(int)
    assert np.abs(decoded - (255, 0, 0)).max() <= 4


def test_webp_and_path(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.webp", lossless=True)
    np.testing.assert_array_equal(decode_image(tmp_path / "a.webp"), COLOURS)


@pytest.mark.parametrize("dtype", [np.uint16, ">u2", np.int32, np.float32])
def test_depth_of_more_than_eight_bits_fills_the_range(dtype):
    """Each image by itself: a depth of 800 to 4880 millimetres, say."""
    depth = np.array([[800, 816, 2848, 4880]], dtype)
    decoded = decode_depth(encoded(Image.fromarray(depth), format="TIFF"))
    assert decoded[0].tolist() == [[level] * 3 for level in (0, 1, 128, 255)]
    if depth.dtype == np.uint16:
        np.testing.assert_array_equal(decode_depth(encoded(Image.fromarray(depth))), decoded)


def test_transparency_shows_white():
    pixels = np.array([[[200, 100, 0, 0], [200, 100, 0, 255], [200, 100, 0, 51]]], np.uint8)
    decoded = decode_image(encoded(Image.fromarray(pixels)))
    blended = 255 + (np.array([200, 100, 0]) - 255) * 51 / 255
    np.testing.assert_allclose(decoded[0], [[255] * 3, [200, 100, 0], blended], atol=1)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    decoded = decode_image(encoded(palette, transparency=1))
    assert decoded[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    decoded = decode_image(encoded(Image.fromarray(COLOURS), exif=exif))
    np.testing.assert_array_equal(decoded, np.rot90(COLOURS, -1))


def test_damage_is_named(tmp_path):
    whole = encoded(Image.fromarray(COLOURS))
    for name, content in {"cut.png": whole[:60], "text.png": b"hello", "none.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImage, match=name):
            decode_image(tmp_path / name)
    floats = Image.fromarray(np.full((4, 4), np.nan, np.float32))
    with pytest.raises(UnreadableImage, match="16 values that are not finite"):
        decode_depth(encoded(floats, format="TIFF"))


def test_label_map_keeps_palette_indices():
    labels = np.array([[0, 3], [16, 1]], np.uint8)
    image = Image.fromarray(labels, "P")
    image.putpalette(list(range(200, 200 + 51)))
    np.testing.assert_array_equal(decode_label_map(encoded(image)), labels)
    np.testing.assert_array_equal(decode_label_map(encoded(Image.fromarray(labels))), labels)
    with pytest.raises(DataError, match="mode is RGB.*num_labels=0"):
        decode_label_map(encoded(Image.fromarray(COLOURS)))


@pytest.mark.parametrize(
    ("shape", "expected"), [((40, 90), (16, 36)), ((90, 40), (36, 16)), ((5, 10), (16, 32))]
)
def test_resizes_the_shorter_side(shape, expected):
    # A ramp stays a ramp under any good filter, whatever the scale.
    ramp = np.linspace(20, 220, shape[1])[None, :, None] * np.ones((shape[0], 1, 3))
    resized = resize_shorter_side(ramp.round().astype(np.uint8), 16)
    assert resized.shape == (*expected, 3)
    step = 200 / (shape[1] - 1) * shape[1] / expected[1]
    inner = resized[:, 4:-4, 0].astype(float)
    np.testing.assert_allclose(np.diff(inner, axis=1), step, atol=2)


def test_downscaling_averages_and_label_maps_do_not():
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    colour = resize_shorter_side(np.repeat(checkers[..., None], 3, -1), 8)
    assert colour.min() > 120 and colour.max() < 135  # aliasing would leave 0 or 255
    assert set(np.unique(resize_shorter_side(checkers, 8))) <= {0, 255}


def test_random_crops_reach_every_offset_and_the_centre_is_the_centre():
    places = np.stack(np.meshgrid(np.arange(7), np.arange(9), indexing="ij"), -1).astype(np.uint8)
    rng = np.random.default_rng(0)
    anywhere = Transform(5, -1, random_crop=True)
    corners = {tuple(anywhere(places, rng)[0, 0]) for _ in range(500)}
    assert corners == {(y, x) for y in range(3) for x in range(5)}
    assert Transform(5, -1)(places)[0, 0].tolist() == [1, 2]
    flipping = Transform(5, -1, random_flip=True)
    mirrored = [flipping(places, rng)[0, 0, 1] == 6 for _ in range(400)]
    assert 150 < sum(mirrored) < 250


def test_random_numbers_are_drawn_in_the_order_that_runs_began_with():
    image = np.arange(19 * 23 * 3).reshape(19, 23, 3).astype(np.uint8)
    ours, theirs = np.random.default_rng(5), np.random.default_rng(5)
    transform = Transform(7, -1, random_crop=True, random_flip=True)
    for _ in range(20):
        top, left = theirs.integers(13), theirs.integers(17)
        expected = image[top : top + 7, left : left + 7]
        if theirs.random() < 0.5:
            expected = expected[:, ::-1]
        np.testing.assert_array_equal(transform(image, ours), expected)


def test_config_chooses_the_transform():
    config = tokenizer_config()
    image = np.random.default_rng(0).integers(0, 256, (96, 120, 3)).astype(np.uint8)
    native = evaluation_transform(config, 64)(image)  # the default is earth: no resizing
    np.testing.assert_array_equal(native, image[16:80, 28:92])
    config.data.name = "folder:somewhere"
    expected = Image.fromarray(image).resize((80, 64), Image.Resampling.BICUBIC)
    resized = evaluation_transform(config, 64)(image)
    np.testing.assert_array_equal(resized, np.asarray(expected)[:, 8:72])
    config.data.resize = 80
    assert training_transform(config, 64)(image, np.random.default_rng(0)).shape == (64, 64, 3)
    config.data.resize = 32
    with pytest.raises(DataError, match="config.data.resize is 32, smaller than the resolution 64"):
        training_transform(config, 64)
    config.data.resize = -1
    with pytest.raises(DataError, match="120 x 96 pixels are too few for a crop of 128.*resize=0"):
        evaluation_transform(config, 128)(image)


def test_uint8_and_float_are_inverse():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    floats = to_float(values)
    assert floats.dtype == np.float32 and floats.min() == -1 and floats.max() == 1
    np.testing.assert_array_equal(to_uint8(floats), values)
    assert to_uint8(np.array([-3.0, 3.0, 0.001])).tolist() == [0, 255, 128]
