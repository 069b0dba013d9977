"""The operations whose best form depends on the backend, chosen here and nowhere else.

On the CPU they are those of `cpu.py` and `cpu_tokens.py`; elsewhere the plain ones, which XLA fuses
well.
"""

import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models import cpu, cpu_tokens
from vqgan_jax.models.target import backend, keep_rows


def _on_cpu() -> bool:
    return backend() == "cpu"


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding) -> jax.Array:
    """Cross-correlation of `(B, H, W, I)` with `(k, k, I, O)`, zeros around as `padding` says."""
    if kernel.shape[:2] == (1, 1) and stride == 1:
        return project(x, [kernel[0, 0]])[0]
    if _on_cpu() and stride == 1 and x.shape[1] * x.shape[2] >= cpu.LARGE_MAP:
        return keep_rows(cpu.convolve_large(x, kernel, padding))
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return keep_rows(y)


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


def sum_positions(x: jax.Array) -> jax.Array:
    """`(B, H, W, C)`, float32 or wider -> `(B, C)`."""
    return cpu.sum_positions(x) if _on_cpu() else x.sum(axis=(1, 2))


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


def normalize_tokens(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """`(..., D)` with mean 0 and variance 1 over the last axis, then scale and bias `(D,)`.

    "Layer Normalization" (Ba et al. 2016). `x` is float32 or wider.
    """
    if _on_cpu():
        return cpu_tokens.normalize_tokens(x, scale, bias, epsilon)
    centered = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centered).mean(axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + epsilon) * scale + bias


def project(x: jax.Array, kernels: Sequence[jax.Array]) -> list[jax.Array]:
    """`x @ kernel` for each kernel, of `(B, ..., D)`; on the CPU as one product of two matrices.

    Elsewhere apart: kernels that are split over devices would be gathered to be put together, and
    rows of pixels that are split would be gathered to be one dimension with the batch.
    """
    if not _on_cpu():
        return [keep_rows(x @ kernel) for kernel in kernels]
    flat = x.reshape(-1, x.shape[-1])  # a 3-D operand makes the backward pass slow
    if len(kernels) == 1:
        products = [flat @ kernels[0]]
    else:
        ends = list(itertools.accumulate(kernel.shape[1] for kernel in kernels))
        products = jnp.split(flat @ jnp.concatenate(kernels, axis=1), ends[:-1], axis=1)
    return [keep_rows(y.reshape(*x.shape[:-1], -1)) for y in products]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, num_unmasked: int = 0) -> jax.Array:
    """Attention of `(B, T, heads, head_dim)` by `causal_mask`; fused where the backend can.

    With `num_unmasked` of T or more, every token sees every other. Keys and values may have fewer
    heads than queries.
    """
    if _on_cpu():
        return cpu_tokens.attend(query, key, value, num_unmasked)
    length = query.shape[1]
    mask = causal_mask(length, num_unmasked)[None, None] if 0 < num_unmasked < length else None
    fused = backend() == "gpu" and query.dtype.itemsize == 2 and mask is None
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=num_unmasked == 0,
        implementation="cudnn" if fused else "xla",
    )
