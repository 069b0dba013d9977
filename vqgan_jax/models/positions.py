"""Positions in two dimensions: rotary ones, and learned ones of rows and columns.

"RoFormer" (Su et al. 2021) turns pairs of channels by angles that grow with the position; on an
image grid, half of a head's channels turn with the row and half with the column. The transformers
of "Vector-quantized Image Modeling with Improved VQGAN" (Yu et al. 2022) learn a vector for each
row and one for each column, and add both to what stands there.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.models.layers import at_least_float32

BASE = 10_000.0


def rotary_angles(
    grid: tuple[int, int], condition_shapes: Sequence[tuple[int, ...]], head_dim: int
) -> np.ndarray:
    """The angles of all tokens of a sequence, conditions first.

    Rows and columns count from 1. Condition tokens that lie over the image stand where they lie in
    it; the others stand in row 0, their columns counting from 0: a single one is not turned.

    Args:
        grid: rows and columns of codes.
        condition_shapes: of the conditions in front of the codes: `(n,)`, or `(rows, columns)`
            over the image.
        head_dim: channels of a head, a multiple of 4.

    Returns:
        `(tokens of the conditions + rows * columns, head_dim / 2)` float32, in radians.

    Raises:
        ValueError: 4 does not divide `head_dim`.
    """
    if head_dim % 4:
        raise ValueError(f"Rotary positions need heads of a multiple of 4 channels, not {head_dim}")
    frequencies = BASE ** (-np.arange(head_dim // 4) / (head_dim // 4))
    places = np.concatenate([_places(shape, grid) for shape in (*condition_shapes, grid)], axis=1)
    angles = [axis[:, None] * frequencies for axis in places]
    return np.concatenate(angles, axis=-1).astype(np.float32)


def _places(shape: tuple[int, ...], grid: tuple[int, int]) -> np.ndarray:
    """Rows and columns of tokens, `(2, n)`, in units of the grid of codes."""
    if len(shape) == 1:
        return np.stack([np.zeros(shape), np.arange(*shape)])
    axes = [
        (np.arange(size) + 0.5) * (whole / size) + 0.5
        for size, whole in zip(shape, grid, strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij")).reshape(2, -1)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns channel pairs (i, i + head_dim / 2) of `(B, T, heads, head_dim)` by `(T, head_dim/2)`.

    In float32 or wider; the result has the type of `x`.
    """
    first, second = jnp.split(at_least_float32(x), 2, axis=-1)
    cosine, sine = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class GridPositions(nn.Module):
    """Learned positions: a code's is its row's vector plus its column's; conditions have their own.

    They begin at zero, as the learned positions of a sequence do.
    """

    grid: tuple[int, int]
    num_conditions: int
    width: int

    def setup(self):
        def table(name, size):
            return self.param(name, nn.initializers.zeros, (size, self.width))

        rows, columns = self.grid
        self.conditions = table("conditions", self.num_conditions)
        self.rows, self.columns = table("rows", rows), table("columns", columns)

    def of_conditions(self):
        """`(num_conditions, width)`."""
        return self.conditions

    def of_codes(self, places):
        """Places row by row `(n,)` int -> `(n, width)`."""
        return self.rows[places // self.grid[1]] + self.columns[places % self.grid[1]]
