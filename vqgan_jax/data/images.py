"""Between what is on disk, uint8 and label maps, and float arrays in the models."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict


def to_float(images: jax.Array | np.ndarray) -> jax.Array:
    """uint8 (..., C) to float32 in [-1, 1]: x / 127.5 - 1."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def to_grey(images: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """uint8 (..., 3) to (..., 1): the luma of ITU-R BT.601, rounded as Pillow does.

    What is grey already stays exactly as it is.
    """
    red, green, blue = (images[..., i : i + 1].astype(np.int32) for i in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)


def to_uint8(images: jax.Array | np.ndarray) -> np.ndarray:
    """Float (..., C) in [-1, 1] to uint8, rounded; values outside the range are clipped."""
    scaled = (np.asarray(images, np.float32) + 1) * 127.5
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def prepare_images(config: ConfigDict, images: jax.Array) -> jax.Array:
    """Raw images or label maps -> float `(B, H, W, C)` for a tokenizer, whose config it is.

    uint8 images go to [-1, 1], in grey where the tokenizer has one channel; integer label maps
    `(B, H, W)` become one-hot; float arrays are taken as they are.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    if config.data.num_labels > 0:
        return jax.nn.one_hot(images, config.data.num_labels)
    if config.model.in_channels == 1 and images.shape[-1] == 3:
        images = to_grey(images)
    return to_float(images)
