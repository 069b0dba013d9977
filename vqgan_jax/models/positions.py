"""Rotary positions in two dimensions.

"RoFormer" (Su et al. 2021) turns pairs of channels by angles that grow with the position; on an
image grid, half of a head's channels turn with the row and half with the column.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.models.layers import at_least_float32

BASE = 10_000.0


def rotary_angles(grid: tuple[int, int], num_conditions: int, head_dim: int) -> np.ndarray:
    """The angles of all tokens of a sequence, conditions first.

    Rows and columns count from 1; condition tokens stand at 0 and are not turned.

    Args:
        grid: rows and columns of codes.
        num_conditions: tokens in front of the codes.
        head_dim: channels of a head, a multiple of 4.

    Returns:
        `(num_conditions + rows * columns, head_dim / 2)` float32, in radians.

    Raises:
        ValueError: 4 does not divide `head_dim`.
    """
    if head_dim % 4:
        raise ValueError(f"Rotary positions need heads of a multiple of 4 channels, not {head_dim}")
    frequencies = BASE ** (-np.arange(head_dim // 4) / (head_dim // 4))
    rows, columns = np.meshgrid(*(np.arange(1, size + 1) for size in grid), indexing="ij")
    angles = np.concatenate(
        [axis.reshape(-1, 1) * frequencies for axis in (rows, columns)], axis=-1
    )
    conditions = np.zeros((num_conditions, head_dim // 2))
    return np.concatenate([conditions, angles]).astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns channel pairs (i, i + head_dim / 2) of `(B, T, heads, head_dim)` by `(T, head_dim/2)`.

    In float32 or wider; the result has the type of `x`.
    """
    first, second = jnp.split(at_least_float32(x), 2, axis=-1)
    cosine, sine = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
