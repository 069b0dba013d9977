"""A part of a scaled image, without the rest of it: the very pixels of Pillow's `resize`.

For images of extreme shapes, such as one of 3000 x 1 pixels whose shorter side becomes 256. Pillow
scales in two passes of fixed-point sums, one along each axis; so does this, for the pixels that are
asked for.
"""

import functools

import numpy as np
from PIL import Image

_CHUNK = 2**20  # steps at once
_BITS = 22  # of the fractions of Pillow's coefficients
_SUPPORT, _A = 2.0, -0.5  # of the bicubic filter


def resized_part(
    image: np.ndarray,
    shape: tuple[int, int],
    top: int,
    left: int,
    height: int,
    width: int,
    rows_can_be_first: bool | None = None,
) -> np.ndarray:
    """Rows and columns of `image` scaled to `shape`.

    Args:
      image: uint8 (H, W, 3), resampled with the bicubic filter, or (H, W), to the nearest pixel.
      shape: height and width of the whole scaled image.
      top: first row that is wanted.
      left: first column.
      height: number of rows.
      width: number of columns.
      rows_can_be_first: as `pillow_scales_rows_first`, which is the default.

    Returns:
      uint8 (height, width, ...).
    """
    rows, columns = (top, height), (left, width)
    if image.ndim == 2:
        y = _nearest(image.shape[0], shape[0], *rows)
        x = _nearest(image.shape[1], shape[1], *columns)
        return image[np.ix_(y, x)]
    y0, down = _coefficients(image.shape[0], shape[0], *rows)
    x0, across = _coefficients(image.shape[1], shape[1], *columns)
    used = image[y0.min() : (y0 + len(down[0])).max(), x0.min() : (x0 + len(across[0])).max()]
    y0, x0 = y0 - y0.min(), x0 - x0.min()
    if rows_can_be_first is None:
        rows_can_be_first = pillow_scales_rows_first()
    fewer_rows, fewer_columns = image.shape[0] - shape[0], image.shape[1] - shape[1]
    if rows_can_be_first and fewer_rows > 2 * max(fewer_columns, 0):
        return _across(_sums(used, y0, down), x0, across)
    return _sums(_across(used, x0, across), y0, down)


@functools.cache
def pillow_scales_rows_first() -> bool:
    """Whether Pillow scales the rows first where mostly their number shrinks, as from version 13.

    It is found by the last bits of a small image, which the order decides about.
    """
    image = np.random.default_rng(0).integers(0, 256, (64, 8, 3), np.uint8)
    scaled = np.asarray(Image.fromarray(image).resize((6, 7), Image.Resampling.BICUBIC))
    return np.array_equal(scaled, resized_part(image, (7, 6), 0, 0, 7, 6, True))


def _across(lines: np.ndarray, starts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`_sums` along the second axis."""
    return _sums(lines.swapaxes(0, 1), starts, weights).swapaxes(0, 1)


def _sums(lines: np.ndarray, starts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of lines (N, M, C), rounded: (len(starts), M, C) uint8."""
    result = np.empty((len(starts), *lines.shape[1:]), np.uint8)
    for row, start, own in zip(result, starts, weights, strict=True):
        used = lines[start : start + len(own)].astype(np.int64)
        total = np.tensordot(own[: len(used)], used, 1) + (1 << (_BITS - 1))
        row[:] = np.clip(total >> _BITS, 0, 255)
    return result


def _coefficients(old: int, new: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the sum of each pixel begins, (count,), and its weights, (count, K) int64."""
    scale = old / new
    width = max(scale, 1.0)
    support = _SUPPORT * width
    centers = (np.arange(first, first + count) + 0.5) * scale
    starts = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    ends = np.minimum((centers + support + 0.5).astype(np.int64), old)
    places = starts[:, None] + np.arange((ends - starts).max())
    weights = _bicubic((places - centers[:, None] + 0.5) * (1.0 / width))
    weights[places >= ends[:, None]] = 0.0
    total = np.zeros(count)
    for column in weights.T:  # in Pillow's order, which rounding depends on
        total += column
    weights /= total[:, None]
    return starts, np.trunc(weights * (1 << _BITS) + np.copysign(0.5, weights)).astype(np.int64)


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _nearest(old: int, new: int, first: int, count: int) -> np.ndarray:
    """The pixel that each takes; Pillow adds up the steps from the first one on."""
    scale = old / new
    place, done = scale * 0.5, 0
    while first - done > _CHUNK:  # one after the other, as rounding depends on it
        place = np.cumsum(np.append(place, np.full(_CHUNK, scale)))[-1]
        done += _CHUNK
    steps = np.full(first - done + count, scale)
    steps[0] = place
    places = np.cumsum(steps)[first - done :].astype(np.int64)
    return np.minimum(places, old - 1)
