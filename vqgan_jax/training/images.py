"""What comes from the data, as the networks take it."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vqgan_jax.data.images import to_float, to_grey


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
