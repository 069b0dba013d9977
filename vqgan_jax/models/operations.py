"""The operations whose best form depends on the backend, chosen here and nowhere else.

On the CPU they are those of `cpu.py`; elsewhere the plain ones, which XLA fuses well.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models import cpu


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding) -> jax.Array:
    """Cross-correlation of `(B, H, W, I)` with `(k, k, I, O)`, zeros around as `padding` says."""
    if kernel.shape[:2] == (1, 1) and stride == 1:
        flat = x.reshape(-1, x.shape[-1])  # a 3-D operand makes the backward pass slow
        return jnp.dot(flat, kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])
    if _on_cpu() and stride == 1 and x.shape[1] * x.shape[2] >= cpu.LARGE_MAP:
        return cpu.convolve_large(x, kernel, padding)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`x + bias` for `(B, H, W, C)` and `(C,)`."""
    return cpu.add_bias(x, bias) if _on_cpu() else x + bias


def normalize_groups(
    x: jax.Array, scale: jax.Array, bias: jax.Array, num_groups: int, epsilon: float
) -> jax.Array:
    """`(B, H, W, C)` with mean 0 and variance 1 in each group of channels, then scale and bias.

    "Group Normalization" (Wu and He 2018). `x` is float32 or wider; scale and bias are `(C,)`.
    """
    if _on_cpu():
        return cpu.normalize_groups(x, scale, bias, num_groups, epsilon)
    mean = cpu.group_mean(x.mean(axis=(1, 2)), num_groups)
    squares = jnp.square(x - mean[:, None, None])
    variance = cpu.group_mean(squares.mean(axis=(1, 2)), num_groups)
    factor = scale * jax.lax.rsqrt(variance + epsilon)
    shift = bias - mean * factor
    return x * factor[:, None, None] + shift[:, None, None]


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum of 2x2 squares at stride 2; an odd last row or column is left out."""
    if _on_cpu():
        height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
        return cpu.max_pool(x[:, :height, :width])
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def causal_mask(length: int, num_unmasked: int = 0) -> jax.Array:
    """`(T, T)`: whether token i sees token j; the first `num_unmasked` all see each other."""
    first = jnp.arange(length) < num_unmasked
    return jnp.tril(jnp.ones((length, length), bool)) | (first[:, None] & first)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, num_unmasked: int = 0) -> jax.Array:
    """Attention of `(B, T, heads, head_dim)` by `causal_mask`; fused where the backend can.

    Keys and values may have fewer heads than queries.
    """
    mask = causal_mask(query.shape[1], num_unmasked)[None, None] if num_unmasked else None
    fused = jax.default_backend() == "gpu" and query.dtype.itemsize == 2 and mask is None
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=mask is None,
        implementation="cudnn" if fused else "xla",
    )
