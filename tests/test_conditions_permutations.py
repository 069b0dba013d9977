import hashlib

import numpy as np
import pytest

from vqgan_jax.conditions.permutations import ORDERS, permutation

# The reference's permuters on a grid of 4x4, as it prints them.
FOUR_BY_FOUR = {
    "row_major": "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
    "alternate": "0 1 2 3 7 6 5 4 8 9 10 11 15 14 13 12",
    "subsample": "0 2 8 10 1 3 9 11 4 6 12 14 5 7 13 15",
    "z_curve": "0 1 4 5 2 3 6 7 8 9 12 13 10 11 14 15",
    "spiral_out": "9 5 6 10 14 13 12 8 4 0 1 2 3 7 11 15",
    "spiral_in": "15 11 7 3 2 1 0 4 8 12 13 14 10 6 5 9",
    "random": "3 13 7 2 6 10 4 1 14 0 15 9 8 12 11 5",
}
# SHA-256 of the reference's int32 orders on larger grids.
DIGESTS = {
    ("alternate", 16, 16): "445b85d8f0e9",
    ("subsample", 16, 16): "2587b03d5501",
    ("z_curve", 16, 16): "822b22c8c0d5",
    ("spiral_out", 16, 16): "dcbc9d243462",
    ("spiral_in", 16, 16): "c1287eae40f5",
    ("random", 16, 16): "a9a9ad31a9a2",
    ("alternate", 4, 8): "b2b4bf7a0128",
    ("z_curve", 4, 8): "bcc30954aa30",
    ("random", 4, 8): "d1b7a88c46a3",
}


def test_every_order_is_tested():
    assert FOUR_BY_FOUR.keys() == ORDERS.keys()


@pytest.mark.parametrize("name", FOUR_BY_FOUR)
def test_small_orders_equal_those_of_the_reference(name):
    forward = permutation(name, 4, 4).forward
    assert " ".join(map(str, forward)) == FOUR_BY_FOUR[name]


@pytest.mark.parametrize(("name", "height", "width"), DIGESTS)
def test_large_orders_equal_those_of_the_reference(name, height, width):
    forward = permutation(name, height, width).forward
    assert forward.dtype == np.int32
    digest = hashlib.sha256(forward.astype("<i4").tobytes()).hexdigest()
    assert digest[:12] == DIGESTS[name, height, width]


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [
        *((name, 8, 8) for name in ORDERS),
        ("row_major", 3, 5),
        ("alternate", 3, 5),
        ("random", 3, 5),
        ("z_curve", 1, 2),
        ("spiral_out", 2, 2),
        ("spiral_in", 6, 6),
        ("subsample", 1, 1),
    ],
)
def test_the_inverse_undoes_the_order(name, height, width):
    forward, inverse = permutation(name, height, width)
    codes = np.random.default_rng(0).integers(1000, size=height * width)
    np.testing.assert_array_equal(codes[forward][inverse], codes)


@pytest.mark.parametrize(
    ("name", "height", "width", "message"),
    [
        ("subsample", 6, 6, "power of two"),
        ("subsample", 4, 8, "square"),
        ("z_curve", 3, 3, "power of two"),
        ("z_curve", 4, 2, "not 4 x 2"),
        ("z_curve", 2, 8, "not 2 x 8"),
        ("spiral_out", 5, 5, "even side"),
        ("spiral_in", 4, 8, "square grid"),
        ("row_major", 0, 4, "at least one row"),
        ("hilbert", 4, 4, "there are row_major, alternate"),
    ],
)
def test_orders_that_do_not_exist_are_errors(name, height, width, message):
    with pytest.raises(ValueError, match=message):
        permutation(name, height, width)
