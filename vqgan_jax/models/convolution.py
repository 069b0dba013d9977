"""The one convolution that every network calls, so that a backend's needs are met in one place."""

import jax
import jax.numpy as jnp


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding) -> jax.Array:
    """Cross-correlation of `(B, H, W, I)` with `(k, k, I, O)`, zeros around as `padding` says."""
    if kernel.shape[:2] == (1, 1) and stride == 1:
        flat = x.reshape(-1, x.shape[-1])  # a 3-D operand makes the backward pass slow
        return jnp.dot(flat, kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
