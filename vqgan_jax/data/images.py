"""Between uint8 on disk and float in [-1, 1] in the models."""

import jax
import jax.numpy as jnp
import numpy as np


def to_float(images: jax.Array | np.ndarray) -> jax.Array:
    """uint8 (..., C) to float32 in [-1, 1]: x / 127.5 - 1."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def to_uint8(images: jax.Array | np.ndarray) -> np.ndarray:
    """Float (..., C) in [-1, 1] to uint8, rounded; values outside the range are clipped."""
    scaled = (np.asarray(images, np.float32) + 1) * 127.5
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)
