"""Coordinate tokens: where a code lies in its image, for transformers that see crops of images.

A model of crops that knows where each crop lies can later paint a large image window by window, as
Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (2021), do for faces.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Where in the whole image each code lies: one token a code.

    There is one token more than intervals, see `coordinate_tokens`.
    """

    shape: tuple[int, ...]
    intervals: int
    name: str = "coordinates"

    @property
    def vocabulary(self) -> int:
        """Both ends of the intervals have a token."""
        return self.intervals + 1

    def tokens(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Those of `coordinate_tokens`, `(B, ...)`, as `(B, n)`."""
        tokens = jnp.asarray(batch[self.name], jnp.int32)
        return tokens.reshape(len(tokens), -1)

    def picture(self, tokens: np.ndarray, height: int, width: int) -> np.ndarray:
        """Tokens `(n,)` -> from black to white, uint8 `(height, width, 3)`."""
        del width
        return draw_coordinates(tokens.reshape(self.shape), height // self.shape[0], self.intervals)


def coordinate_tokens(
    height: int,
    width: int,
    factor: int,
    intervals: int,
    crop: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Tokens of an image's coordinates, or of those of a crop of it.

    The coordinate c of a pixel is its row-major number / (height * width), in [0, 1). It is
    averaged over squares of `factor` pixels, clamped to [0, 1], and its token is
    round(intervals * c), half to even. Tokens are therefore 0 to `intervals` **inclusive**:
    `intervals + 1` values. The upper end occurs only where a token covers few pixels; 16x16 tokens
    of 256x256 pixels are 30 to 994 with 1,024 intervals.

    Sums are float32 in row-major order, one pixel after the other, because this decides about the
    tokens that lie next to a half: they equal those of PyTorch on a CPU, bit for bit.

    Args:
        height, width: of the whole image, in pixels.
        factor: pixels per token along an axis.
        intervals: into how many [0, 1] is divided; in the reference the size of the codebook.
        crop: top, left, height and width of the part to describe, in pixels; None is all.

    Returns:
        int32 (h, w), the height and width of the crop divided by the factor.

    Raises:
        ValueError: the crop is not inside the image, the factor does not divide its sides, or a
            size is below 1.
    """
    top, left, rows, columns = crop or (0, 0, height, width)
    if min(height, width, factor, intervals, rows, columns) < 1:
        raise ValueError(
            f"Coordinates need sizes of at least 1: the image is {height} x {width} pixels, the "
            f"crop {rows} x {columns}, the factor {factor}, the intervals {intervals}."
        )
    if min(top, left) < 0 or top + rows > height or left + columns > width:
        raise ValueError(
            f"The crop of {rows} x {columns} pixels at row {top}, column {left} does not lie "
            f"inside the image of {height} x {width} pixels."
        )
    if rows % factor or columns % factor:
        raise ValueError(
            f"The factor {factor} does not divide {rows} x {columns} pixels (height x width)."
        )
    numbers = np.arange(top, top + rows)[:, None] * width + np.arange(left, left + columns)
    coordinates = (numbers / (height * width)).astype(np.float32)
    h, w = rows // factor, columns // factor
    squares = coordinates.reshape(h, factor, w, factor).transpose(1, 3, 0, 2).reshape(-1, h, w)
    sums = np.add.accumulate(squares, dtype=np.float32)[-1]  # a reduction may add in pairs
    means = sums / np.float32(factor) / np.float32(factor)
    return np.rint(np.float32(intervals) * np.clip(means, 0, 1)).astype(np.int32)


def draw_coordinates(tokens: np.ndarray, factor: int, intervals: int) -> np.ndarray:
    """A picture of coordinate tokens, from black (0) to white (`intervals`).

    Args:
        tokens: integers (h, w), 0 to `intervals`.
        factor: pixels per token along an axis.
        intervals: as in `coordinate_tokens`.

    Returns:
        uint8 (h * factor, w * factor, 3), grey.
    """
    levels = np.rint(np.asarray(tokens) * (255 / intervals)).astype(np.uint8)
    pixels = levels.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.repeat(pixels[..., None], 3, axis=-1)
