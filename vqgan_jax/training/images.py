"""What comes from the data, as the networks take it."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vqgan_jax.data.images import to_float


def prepare_images(data: ConfigDict, images: jax.Array) -> jax.Array:
    """Raw images or label maps -> float `(B, H, W, C)`.

    uint8 images go to [-1, 1], integer label maps `(B, H, W)` become one-hot; float arrays are
    taken as they are.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    if data.num_labels > 0:
        return jax.nn.one_hot(images, data.num_labels)
    return to_float(images)
