"""Grids of inputs beside reconstructions, compared pixel by pixel."""

import jax.numpy as jnp
import numpy as np
import pytest
from skimage import color

from vqgan_jax.training.pictures import label_colors, side_by_side


def test_each_reconstruction_lies_right_of_its_image():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (5, 6, 4, 3))
    reconstructions = generator.integers(0, 256, (5, 6, 4, 3))
    grid = side_by_side(images / 127.5 - 1, reconstructions / 127.5 - 1, columns=3)
    assert grid.dtype == np.uint8 and grid.shape == (2 * 6 + 2, 3 * 8 + 2 * 2, 3)
    for index in range(5):
        top, left = index // 3 * 8, index % 3 * 10
        np.testing.assert_array_equal(grid[top : top + 6, left : left + 4], images[index])
        right = grid[top : top + 6, left + 4 : left + 8]
        np.testing.assert_array_equal(right, reconstructions[index])
    assert np.all(grid[6:8] == 255) and np.all(grid[:, 8:10] == 255)
    assert np.all(grid[8:, 20:] == 255)  # the sixth pair, which does not exist


def test_a_few_images_make_a_narrow_grid():
    images = np.zeros((2, 4, 4, 3))
    assert side_by_side(images, images, columns=8).shape == (4, 8 + 2 + 8, 3)


def test_values_are_clipped_and_bfloat16_works():
    images = jnp.array([-1.5, -1.0, 0.5, 1.0, 1.5], jnp.bfloat16).reshape(1, 1, 5, 1)
    grid = side_by_side(images, images)
    np.testing.assert_array_equal(grid[0, :5, 0], [0, 0, 191, 255, 255])


def test_one_channel_is_gray():
    images = np.linspace(-1, 1, 16).reshape(1, 4, 4, 1)
    grid = side_by_side(images, -images)
    np.testing.assert_array_equal(grid[:, :4, 0].ravel(), np.arange(0, 256, 17))
    np.testing.assert_array_equal(grid[:, 4:], 255 - grid[:, :4])
    np.testing.assert_array_equal(grid, np.repeat(grid[..., :1], 3, axis=-1))


@pytest.mark.parametrize("num_labels", [1, 2, 3, 183])
def test_label_maps_have_their_colors(num_labels):
    generator = np.random.default_rng(1)
    labels = generator.integers(0, num_labels, (2, 8, 8))
    predicted = generator.integers(0, num_labels, (2, 8, 8))
    logits = generator.normal(size=(2, 8, 8, num_labels)) + 20 * np.eye(num_labels)[predicted]
    grid = side_by_side(np.eye(num_labels)[labels], logits, columns=1, label_maps=True)
    colors = label_colors(num_labels)
    np.testing.assert_array_equal(grid[10:, :8], colors[labels[1]])
    np.testing.assert_array_equal(grid[10:, 8:], colors[predicted[1]])


def test_label_colors_are_distinct_and_stay():
    colors = label_colors(256)
    assert colors.dtype == np.uint8 and colors.shape == (256, 3)
    np.testing.assert_array_equal(label_colors(20), colors[:20])
    np.testing.assert_array_equal(label_colors(1), [[0, 0, 0]])
    for count, least in ((20, 20.0), (256, 5.0)):  # CIELAB: about 2.3 is just noticeable
        lab = color.rgb2lab(colors[None, :count])[0]
        distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
        assert np.min(distances[~np.eye(count, dtype=bool)]) > least


@pytest.mark.parametrize("n", [0, 4097])
def test_label_colors_name_their_range(n):
    with pytest.raises(ValueError, match=f"1 to 4096 labels, not for {n}"):
        label_colors(n)


def test_bad_grids_are_errors():
    images = np.zeros((2, 4, 4, 3))
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 3\) and \(1, 4, 4, 3\)"):
        side_by_side(images, images[:1])
    with pytest.raises(ValueError, match="B > 0"):
        side_by_side(images[:0], images[:0])
    with pytest.raises(ValueError, match="at least one column"):
        side_by_side(images, images, columns=0)
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        side_by_side(images[..., :2], images[..., :2])
