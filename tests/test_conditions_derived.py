import numpy as np
import pytest

from vqgan_jax.conditions.derived import canny_edges, depth_picture, low_resolution
from vqgan_jax.conditions.skeletons import LIMBS, draw_skeleton


def step(contrast, height=64, width=64):
    image = np.full((height, width, 3), 100, np.uint8)
    image[:, width // 2 :] += np.uint8(contrast)
    image[:, width // 2] -= np.uint8(contrast // 2)  # the edge is in the middle of a pixel
    return image


def test_an_edge_is_one_white_line_where_the_step_is():
    edges = canny_edges(step(80))
    assert (edges.shape, edges.dtype) == ((64, 64, 3), np.uint8)
    assert set(np.unique(edges)) == {0, 255}
    assert (edges == edges[..., :1]).all()
    inner = edges[8:-8, :, 0]
    assert inner[:, 32].all() and np.count_nonzero(inner) == len(inner)
    np.testing.assert_array_equal(canny_edges(step(80)), edges)


@pytest.mark.parametrize(("contrast", "seen"), [(14, False), (18, True)])
def test_an_edge_shows_from_a_contrast_of_sixteen_levels(contrast, seen):
    """A step of A blurred by sigma has the slope A / (sigma sqrt(2 pi)), and Sobel's filter gives
    eight times the slope: 0.2 is reached at A = 0.125 in [-1, 1], which is 16 of 255 levels."""
    assert canny_edges(step(contrast)).any() == seen


def test_a_wider_blur_sees_fewer_edges():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    counts = [np.count_nonzero(canny_edges(noise, sigma)) for sigma in (1.0, 2.0, 4.0)]
    assert counts[0] > counts[1] > counts[2]


def bicubic_matrix(size, new_size):
    """Rows of weights of Keys' cubic (a = -1/2), stretched when scaling down, normalised."""
    scale = max(size / new_size, 1.0)
    centres = (np.arange(new_size)[:, None] + 0.5) * size / new_size
    x = np.abs((np.arange(size) + 0.5 - centres) / scale)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def scaled(image, height, width):
    """First along rows, then along columns, each time to whole levels."""
    columns, rows = bicubic_matrix(image.shape[1], width), bicubic_matrix(image.shape[0], height)
    narrow = np.clip(np.rint(np.einsum("jw,hwc->hjc", columns, image)), 0, 255)
    return np.clip(np.rint(np.einsum("ih,hjc->ijc", rows, narrow)), 0, 255)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_low_resolution_is_bicubic_down_and_up(factor):
    image = np.random.default_rng(1).integers(0, 256, (24, 41, 3), dtype=np.uint8)
    result = low_resolution(image, factor)
    assert (result.shape, result.dtype) == (image.shape, np.uint8)
    small = scaled(image, 24 // factor, 41 // factor)
    difference = np.abs(result - scaled(small, 24, 41))
    assert difference.max() <= 1 and difference.mean() < 0.01  # where a level lies next to a half
    assert np.abs(result - image.astype(float)).mean() > 20


def test_low_resolution_by_one_changes_nothing():
    image = np.random.default_rng(2).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(low_resolution(image, 1), image)


def test_depth_uses_all_levels():
    picture = depth_picture(np.array([[3.0, 5.0, 13.0], [3.5, 4.0, 8.0]], np.float32))
    assert (picture.shape, picture.dtype) == ((2, 3, 3), np.uint8)
    assert picture[..., 0].tolist() == [[0, 51, 255], [13, 26, 128]]
    assert (picture == picture[..., :1]).all()
    assert not depth_picture(np.full((4, 4), 7.0)).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: canny_edges(np.zeros((8, 8), np.uint8)), r"uint8 \(H, W, 3\)"),
        (lambda: canny_edges(np.zeros((8, 8, 3), np.uint8), 0), "must be positive"),
        (lambda: low_resolution(np.zeros((8, 8, 3), np.float32), 2), "float32"),
        (lambda: low_resolution(np.zeros((8, 4, 3), np.uint8), 5), "1 to 4"),
        (lambda: depth_picture(np.zeros((8, 8, 1))), r"\(8, 8, 1\)"),
        (lambda: depth_picture(np.array([[0.0, np.nan], [np.inf, 1]])), "2 values"),
    ],
)
def test_other_arrays_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# A cross: 0 above, 1 below, 2 left, 3 right of the centre of a picture of 41 pixels.
CROSS = np.array([[20, 5, 1], [20, 35, 1], [5, 20, 1], [35, 20, 1]], np.float64)


def test_limbs_have_their_colours_and_visible_keypoints_are_white():
    picture = draw_skeleton(CROSS, [(0, 1), (2, 3)], 41, 41, thickness=3)
    assert (picture.shape, picture.dtype) == ((41, 41, 3), np.uint8)
    red, cyan, black, white = [255, 0, 0], [0, 255, 255], [0, 0, 0], [255, 255, 255]
    assert picture[12, 20].tolist() == picture[28, 20].tolist() == red
    assert picture[20, [12, 20, 28]].tolist() == [cyan] * 3  # also in the middle: drawn later
    assert picture[[5, 35, 20, 20], [20, 20, 5, 35]].tolist() == [white] * 4
    assert picture[12, 25].tolist() == picture[0, 0].tolist() == black
    assert (picture[12] == red).all(axis=-1).sum() == 3  # pixels across


def test_a_limb_with_a_hidden_end_is_not_drawn():
    hidden = CROSS.copy()
    hidden[1] = (np.nan, np.nan, 0)
    picture = draw_skeleton(hidden, [(0, 1), (2, 3)], 41, 41)
    assert not picture[12, 20].any() and not picture[35, 20].any()
    assert picture[20, 12].tolist() == [0, 255, 255]
    assert picture[5, 20].tolist() == [255, 255, 255]


def test_what_leaves_the_picture_is_cut_off():
    whole = draw_skeleton(CROSS, [(0, 1), (2, 3)], 41, 41, thickness=2)
    crop = draw_skeleton(CROSS - [10, 3, 0], [(0, 1), (2, 3)], 30, 20, thickness=2)
    np.testing.assert_array_equal(crop, whole[3:33, 10:30])


@pytest.mark.parametrize(("name", "keypoints"), [("coco", 17), ("openpose", 18)])
def test_limbs_connect_all_keypoints(name, keypoints):
    reached = {0}
    for _ in range(keypoints):
        reached |= {end for limb in LIMBS[name] if reached & set(limb) for end in limb}
    assert reached == set(range(keypoints))
    assert len({frozenset(limb) for limb in LIMBS[name]}) == len(LIMBS[name])


@pytest.mark.parametrize(
    ("keypoints", "limbs", "message"),
    [
        (CROSS[:, :2], [], r"\(N, 3\)"),
        (CROSS, [(0, 4)], "outside of 0 to 3"),
        (np.array([[np.nan, 2, 1]]), [], "Keypoint 0 is visible"),
    ],
)
def test_impossible_skeletons_are_errors(keypoints, limbs, message):
    with pytest.raises(ValueError, match=message):
        draw_skeleton(keypoints, limbs, 8, 8)
