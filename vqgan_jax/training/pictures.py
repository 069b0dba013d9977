"""Grids of pictures, for people to look at: inputs beside reconstructions, and samples."""

import functools

import numpy as np
from numpy.typing import ArrayLike

_SEPARATOR = 2  # pixels between pairs; the two of a pair touch, so that a shift shows at once
_BACKGROUND = 255


def side_by_side(
    images: ArrayLike,
    reconstructions: ArrayLike,
    columns: int = 4,
    enlarge: int = 1,
    label_maps: bool = False,
) -> np.ndarray:
    """A grid of pairs, each an input with its reconstruction to the right of it.

    Args:
        images: (B, H, W, C): gray or RGB in [-1, 1], where values outside are clipped, or one-hot.
        reconstructions: the same shape; of label maps the logits or probabilities.
        columns: pairs in a row.
        enlarge: each pixel becomes a square of so many, since small images are hard to see.
        label_maps: channels are labels, drawn in `label_colors`.

    Returns:
        (rows * (H + 2) - 2, columns * (2 * W + 2) - 2, 3) uint8, white where there is no pair; H
        and W are those of the enlarged images.

    Raises:
        ValueError: the shapes differ or are not (B, H, W, C), B is 0, columns below 1, or images
            are neither gray nor RGB.
    """
    images, reconstructions = np.asarray(images), np.asarray(reconstructions)
    if images.ndim != 4 or images.shape != reconstructions.shape or len(images) == 0:
        raise ValueError(
            "images and reconstructions must have one shape (B, H, W, C) with B > 0; they have "
            f"{images.shape} and {reconstructions.shape}."
        )
    if columns < 1:
        raise ValueError(f"A grid needs at least one column of pairs, not {columns}.")

    if not label_maps and images.shape[-1] not in (1, 3):
        raise ValueError(f"Images have 1 or 3 channels, not {images.shape[-1]}.")

    to_rgb = _labels_to_rgb if label_maps else intensities_to_rgb
    pairs = np.concatenate([to_rgb(images), to_rgb(reconstructions)], axis=2)
    return tiled(pairs, columns, enlarge)


def tiled(images: np.ndarray, columns: int, enlarge: int = 1) -> np.ndarray:
    """Images `(B, H, W, 3)` uint8 in rows, each pixel a square of `enlarge`, with white between."""
    images = images.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    row_step, column_step = height + _SEPARATOR, width + _SEPARATOR
    shape = (rows * row_step - _SEPARATOR, columns * column_step - _SEPARATOR, 3)
    grid = np.full(shape, _BACKGROUND, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * row_step, index % columns * column_step
        grid[top : top + height, left : left + width] = image
    return grid


@functools.lru_cache(maxsize=8)
def label_colors(n: int) -> np.ndarray:
    """Colours for label maps, each as far from those before it as can be.

    Greedy farthest-point choice among the 4,096 colours with 16 levels a channel, by distance in
    Oklab (Ottosson 2020), where equal distances look equally different. The choice is
    deterministic, and the colours of fewer labels are the first of those of more. Label 0 is black.

    Args:
        n: number of labels, 1 to 4,096.

    Returns:
        (n, 3) uint8, all distinct, read-only.

    Raises:
        ValueError: n is out of range.
    """
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    if not 1 <= n <= len(candidates):
        raise ValueError(f"There are colours for 1 to {len(candidates)} labels, not for {n}.")
    points = _oklab(candidates)
    chosen = [0]
    distances = np.sum((points - points[0]) ** 2, axis=-1)
    while len(chosen) < n:
        chosen.append(int(np.argmax(distances)))
        distances = np.minimum(distances, np.sum((points - points[chosen[-1]]) ** 2, axis=-1))
    colors = candidates[chosen]
    colors.flags.writeable = False  # the cache hands out one array to all callers
    return colors


def _labels_to_rgb(scores: np.ndarray) -> np.ndarray:
    """(B, H, W, C) scores of labels -> (B, H, W, 3) uint8."""
    return label_colors(scores.shape[-1])[np.argmax(scores, axis=-1)]


def intensities_to_rgb(images: np.ndarray) -> np.ndarray:
    """(B, H, W, 1 or 3) in [-1, 1] -> (B, H, W, 3) uint8."""
    levels = np.round((np.clip(images.astype(np.float32), -1.0, 1.0) + 1.0) * 127.5)
    return np.broadcast_to(levels.astype(np.uint8), (*images.shape[:3], 3))


def _oklab(colors: np.ndarray) -> np.ndarray:
    """(..., 3) 8-bit sRGB -> (..., 3) lightness and two opponent axes (Ottosson 2020)."""
    encoded = colors / 255.0
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
