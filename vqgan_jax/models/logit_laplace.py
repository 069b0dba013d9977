"""Pixels as the mean of a logit-Laplace distribution, which a decoder predicts with its scale.

Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", appendix A.3. The decoder gives `(B, H, W,
2 C)`: the location of each value, in front of the sigmoid, then the logarithm of its scale. The
density is infinite at 0 and 1, so values are mapped to [0.1, 0.9] first.
"""

import jax
import jax.numpy as jnp

EPSILON = 0.1


def to_interval(images: jax.Array) -> jax.Array:
    """Images in [-1, 1] -> [EPSILON, 1 - EPSILON]."""
    return (1.0 - 2.0 * EPSILON) * (images + 1.0) / 2.0 + EPSILON


def split(output: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A decoder's output `(B, H, W, 2 C)` -> location and logarithm of the scale."""
    location, log_scale = jnp.split(output, 2, axis=-1)
    return location, log_scale


def to_images(output: jax.Array) -> jax.Array:
    """A decoder's output `(B, H, W, 2 C)` -> images `(B, H, W, C)`, not clipped.

    The sigmoid of the location, mapped back; up to 1.25 in absolute value.
    """
    location, _ = split(output)
    unit = (jax.nn.sigmoid(location) - EPSILON) / (1.0 - 2.0 * EPSILON)
    return 2.0 * unit - 1.0
