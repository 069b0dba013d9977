"""Orders in which a transformer predicts the codes of a grid.

Esser et al. (2021) compare them in section 4.1 and appendix B: row by row is the best.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

ROW_MAJOR = "row_major"


class Permutation(NamedTuple):
    """An order of the codes of a grid and its inverse.

    Attributes:
        forward: int32 (h * w,), the row-major numbers of the codes in the order that the
            transformer sees them: `sequence = codes[forward]`.
        inverse: int32 (h * w,), the way back: `codes = sequence[inverse]`.
    """

    forward: np.ndarray
    inverse: np.ndarray


def permutation(name: str, height: int, width: int) -> Permutation:
    """The order of that name for a grid of codes.

    Args:
        name: a key of `ORDERS`.
        height, width: of the grid, in codes.

    Raises:
        ValueError: there is no order of this name, or it does not exist for this grid.
    """
    if name not in ORDERS:
        raise ValueError(f"There is no order {name!r} of codes; there are {', '.join(ORDERS)}.")
    if min(height, width) < 1:
        raise ValueError(f"A grid has at least one row and one column, not {height} x {width}.")
    forward = ORDERS[name](height, width).astype(np.int32)
    return Permutation(forward, np.argsort(forward).astype(np.int32))


def _row_major(height: int, width: int) -> np.ndarray:
    return np.arange(height * width)


def _alternate(height: int, width: int) -> np.ndarray:
    """Every second row from right to left, so that neighbours in the order are in the grid too."""
    grid = np.arange(height * width).reshape(height, width)
    grid[1::2] = grid[1::2, ::-1].copy()
    return grid.ravel()


def _subsample(height: int, width: int) -> np.ndarray:
    """A coarse grid of codes first, then its shifts by one: quarter by quarter, recursively."""
    if height != width or not _is_power_of_two(height):
        raise ValueError(
            f"The order 'subsample' needs a square grid with a power of two as its side, not "
            f"{height} x {width}."
        )
    rows, columns = np.indices((height, width))
    keys = np.zeros((height, width), np.int64)
    for bit in range(height.bit_length() - 1):  # the lowest bits are the outermost quarters
        keys = 4 * keys + 2 * (rows >> bit & 1) + (columns >> bit & 1)
    return np.argsort(keys, axis=None)


def _z_curve(height: int, width: int) -> np.ndarray:
    """Block by block, recursively (Morton 1966)."""
    if not _is_power_of_two(height) or width not in (height, 2 * height):
        raise ValueError(
            "The order 'z_curve' needs a grid whose height is a power of two and whose width is "
            f"the same or twice as much, not {height} x {width}."
        )
    rows, columns = np.indices((height, width))
    keys = np.zeros((height, width), np.int64)
    for bit in range(width.bit_length()):
        keys += (columns >> bit & 1) << 2 * bit
        keys += (rows >> bit & 1) << 2 * bit + 1
    return np.argsort(keys, axis=None)


def _spiral_out(height: int, width: int) -> np.ndarray:
    """From the centre clockwise outwards, up first; it ends in the lower right corner."""
    if height != width or height % 2:
        raise ValueError(f"A spiral needs a square grid with an even side, not {height} x {width}.")
    lengths = [*np.repeat(np.arange(1, height), 2), height - 1]
    directions = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # up, right, down, left
    steps = np.repeat(np.resize(directions, (len(lengths), 2)), lengths, axis=0)
    start = (height // 2, width // 2 - 1)
    rows, columns = np.cumsum([start, *steps], axis=0).T
    return rows * width + columns


def _spiral_in(height: int, width: int) -> np.ndarray:
    return _spiral_out(height, width)[::-1]


def _random(height: int, width: int) -> np.ndarray:
    """One fixed shuffle; NumPy guarantees that this legacy generator's numbers never change."""
    return np.random.RandomState(1).permutation(height * width)


def _is_power_of_two(number: int) -> bool:
    return number.bit_count() == 1


# The reference calls them Identity, AlternateParsing, Subsample, ZCurve, SpiralOut, SpiralIn and
# Random; all are equal to its.
ORDERS: dict[str, Callable[[int, int], np.ndarray]] = {
    ROW_MAJOR: _row_major,
    "alternate": _alternate,
    "subsample": _subsample,
    "z_curve": _z_curve,
    "spiral_out": _spiral_out,
    "spiral_in": _spiral_in,
    "random": _random,
}
