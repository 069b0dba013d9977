import pathlib

import numpy as np
import pytest

from vqgan_jax.conditions.coordinates import coordinate_tokens, draw_coordinates

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "taming_coordinates.npz"


def test_tokens_equal_those_of_the_reference():
    with np.load(GOLDEN) as file:
        golden = {key: file[key] for key in file.files}
    factor, intervals = int(golden["down_factor"]), int(golden["n_embed"])

    whole = coordinate_tokens(256, 256, factor, intervals)
    assert whole.dtype == np.int32
    np.testing.assert_array_equal(whole, golden["full_indices"])
    assert (whole.min(), whole.max()) == (30, 994)

    (top, bottom), (left, right) = golden["crop_rows"], golden["crop_columns"]
    crop = (top, left, bottom - top, right - left)
    tokens = coordinate_tokens(256, 256, factor, intervals, crop)
    np.testing.assert_array_equal(tokens, golden["crop_indices"])


def test_rounding_equals_that_of_the_reference_next_to_halves():
    """Here averages in double precision give other tokens (94, 194, 226, 459, 526, 660, 693)."""
    tokens = coordinate_tokens(300, 450, 10, 1000, crop=(3, 13, 220, 290))
    rows, columns = [2, 5, 6, 13, 15, 19, 20], [23, 23, 5, 14, 5, 14, 23]
    assert tokens[rows, columns].tolist() == [93, 193, 225, 460, 525, 659, 694]
    assert (tokens.shape, tokens.sum(), tokens.min(), tokens.max()) == ((22, 29), 239998, 25, 727)


def test_halves_go_to_the_even_token_and_the_last_token_is_the_number_of_intervals():
    tokens = coordinate_tokens(256, 256, 1, 1024)
    assert tokens[0, [31, 32, 33, 95, 96, 97, 160]].tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert coordinate_tokens(64, 64, 1, 16).max() == 16


def test_a_crop_along_the_tokens_is_a_window_of_the_whole():
    whole = coordinate_tokens(192, 320, 16, 512)
    crop = coordinate_tokens(192, 320, 16, 512, crop=(32, 48, 128, 256))
    np.testing.assert_array_equal(crop, whole[2:10, 3:19])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 64, 16, 256, (0, 32, 64, 48)), "inside the image of 64 x 64"),
        ((64, 64, 16, 256, (-16, 0, 64, 64)), "inside the image of 64 x 64"),
        ((64, 72, 16, 256), "16 does not divide 64 x 72"),
        ((64, 64, 16, 256, (0, 0, 24, 32)), "16 does not divide 24 x 32"),
        ((64, 64, 0, 256), "at least 1"),
    ],
)
def test_impossible_sizes_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        coordinate_tokens(*arguments)


def test_picture_goes_from_black_to_white():
    picture = draw_coordinates(np.array([[0, 8], [12, 16]]), factor=3, intervals=16)
    assert (picture.shape, picture.dtype) == ((6, 6, 3), np.uint8)
    assert picture[::3, ::3, 0].tolist() == [[0, 128], [191, 255]]
    assert (picture[3:, :3] == 191).all()
