"""Decoded images of any mode to uint8 colour, in bands of rows.

A copy of the whole image in another mode would need as much memory again as the image itself.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

_BAND_PIXELS = 2**20
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Parts of an image from its top to its bottom, each with the rows that it consists of."""
    width, height = image.size
    count = max(1, _BAND_PIXELS // width)
    for top in range(0, height, count):
        bottom = min(top + count, height)
        yield slice(top, bottom), image.crop((0, top, width, bottom))


def colours(image: Image.Image) -> np.ndarray:
    """An image of at most 8 bits a channel as RGB, composed on white where it is transparent.

    Returns:
      uint8 (H, W, 3).
    """
    result = np.empty((image.height, image.width, 3), np.uint8)
    transparent = image.has_transparency_data
    for rows, band in bands(image):
        if transparent:
            white = Image.new("RGBA", band.size, "white")
            white.alpha_composite(band.convert("RGBA"))
            band = white
        result[rows] = np.asarray(band.convert("RGB"))
    return result


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grey with more than 8 bits."""
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def deep_values(image: Image.Image) -> np.ndarray:
    """The values of a grey image of more than 8 bits: uint16, int32 or float32 (H, W)."""
    kinds = {"I": np.int32, "F": np.float32}
    result = np.empty((image.height, image.width), kinds.get(image.mode, np.uint16))
    for rows, band in bands(image):
        result[rows] = np.asarray(band)
    return result


def deep_grey(image: Image.Image, grey_range: tuple[float, float]) -> np.ndarray:
    """A grey image of more than 8 bits as the picture that it shows.

    Up to 16 bits are scaled by the largest value of their number of bits: 16 are divided by 257,
    and rounded, so that 257 v is v. The 32 bits of integers and floats are scaled from
    `grey_range`, where (0, 0) is 0 to 65535 for integers and 0 to 1 for floats.

    Returns:
      uint8 (H, W, 3).

    Raises:
      ValueError: values of 32 bits are outside of the range, or are not numbers.
    """
    if image.mode.startswith("I;16"):
        low, high = 0.0, _largest(image)
        table = _levels(np.arange(2**16), low, high)
    else:
        low, high = _checked_range(image, grey_range)
        table = None
    transparent = transparent_value(image)
    inverted = getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO
    result = np.empty((image.height, image.width, 3), np.uint8)
    for rows, band in bands(image):
        values = np.asarray(band)
        levels = _levels(values, low, high) if table is None else table[values]
        if inverted:  # which Pillow does for 8 bits alone
            levels = 255 - levels
        if transparent is not None:
            levels[values == transparent] = 255
        result[rows] = levels[..., None]
    return result


def transparent_value(image: Image.Image) -> int | None:
    """The value of a grey image of more than 8 bits that is transparent, None where none is."""
    value = image.info.get("transparency")
    return value if isinstance(value, int) else None


def _largest(image: Image.Image) -> float:
    """Of the image's number of bits, which only TIFF has less than 16 of."""
    bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS) or (16,)
    return 2.0 ** bits[0] - 1 if 8 < bits[0] < 16 else 65535.0


def _checked_range(image: Image.Image, grey_range: tuple[float, float]) -> tuple[float, float]:
    low, high = grey_range
    if low == high:
        low, high = (0.0, 65535.0) if image.mode == "I" else (0.0, 1.0)
    extremes = [(values.min(), values.max()) for values in _arrays(image)]
    smallest, largest = np.min(extremes), np.max(extremes)
    if not low <= smallest <= largest <= high:  # nor where one is not a number
        raise ValueError(
            f"values from {smallest} to {largest}, and config.data.grey_range is {low:g} to "
            f"{high:g}: set it to what is black and white"
        )
    return low, high


def _arrays(image: Image.Image) -> Iterator[np.ndarray]:
    for _, band in bands(image):
        yield np.asarray(band)


def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = (values.astype(np.float64) - low) * (255.0 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
