"""Layers shared by the networks: convolution, normalisation, resampling, the two blocks.

Sources: "Taming Transformers" (Esser et al. 2021), whose autoencoder follows "Denoising Diffusion
Probabilistic Models" (Ho et al. 2020); "Group Normalization" (Wu and He 2018); "Layer
Normalization" (Ba et al. 2016).
"""

import functools
import math
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.operations import add_bias, convolve, normalize_groups, normalize_tokens

Padding = tuple[tuple[int, int], tuple[int, int]]

# Attention over more positions goes in blocks of queries that have so many logits together. Up to
# there, which is all that training meets, everything at once is faster and takes no more memory.
LARGE_GRID = 64 * 64
BLOCK_LOGITS = 2**24
BLOCK_QUERIES = 64  # or more: products of fewer rows leave an accelerator idle


def torch_uniform(fan_in: int) -> Callable:
    """PyTorch's default for weights and biases alike: uniform in +-1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, or as it is where it is wider: what statistics and distances are taken in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Conv(nn.Module):
    """Convolution of `(B, H, W, C)` with a square kernel `(k, k, C, features)` in HWIO order.

    A 1x1 kernel is a matrix product over the channels. `padding` is ((top, bottom), (left, right))
    zeros; None keeps the size at stride 1 and odd kernels.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: Padding | None = None
    use_bias: bool = True
    kernel_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        size, channels = self.kernel_size, x.shape[-1]
        default_init = torch_uniform(size * size * channels)
        kernel = self.param(
            "kernel", self.kernel_init or default_init, (size, size, channels, self.features)
        )
        half = size // 2
        padding = self.padding or ((half, half), (half, half))
        x = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, padding)
        if self.use_bias:
            bias = self.param("bias", default_init, (self.features,))
            x = add_bias(x, bias.astype(self.dtype))
        return x


class GroupNorm(nn.Module):
    """Group normalisation of `(B, H, W, C)`, statistics in float32, epsilon 1e-6.

    A group of one channel loses that channel's mean: images of one colour come out grey where the
    last norm has as many groups as channels.
    """

    num_groups: int = 32
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = normalize_groups(at_least_float32(x), scale, bias, self.num_groups, self.epsilon)
        return x.astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, statistics in float32 or wider, epsilon 1e-5."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return normalize_tokens(at_least_float32(x), scale, bias, 1e-5).astype(self.dtype)


def make_norm(kind: str, num_groups: int) -> Callable[..., nn.Module]:
    """What makes the norms of a network: "group", over the whole image, or "layer"."""
    return LayerNorm if kind == "layer" else functools.partial(GroupNorm, num_groups)


class ResidualBlock(nn.Module):
    """Norm, swish, conv, norm, swish, dropout, conv; plus the input (1x1 conv to new channels).

    `norm` makes a norm, here and in the other modules; see `make_norm`.
    """

    features: int
    norm: Callable[..., nn.Module] = GroupNorm
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        h = nn.swish(self.norm(dtype=self.dtype, name="norm1")(x))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        h = nn.swish(self.norm(dtype=self.dtype, name="norm2")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel_size=1, dtype=self.dtype, name="shortcut")(x)
        return x + h


def attend_to_all(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention with one head among all positions, `(B, N, C)` each; softmax in float32.

    Above `LARGE_GRID` positions it goes by blocks of queries, and memory grows with N, not N^2.
    """
    batch, positions, channels = query.shape

    def attend(query):
        logits = jnp.einsum(
            "b q c, b k c -> b q k",
            query,
            key,
            preferred_element_type=jnp.promote_types(query.dtype, jnp.float32),
        )
        weights = jax.nn.softmax(logits * channels**-0.5, axis=-1).astype(query.dtype)
        return jnp.einsum("b q k, b k c -> b q c", weights, value)

    if positions <= LARGE_GRID:
        return attend(query)
    blocks = math.ceil(batch * positions**2 / BLOCK_LOGITS)
    size = max(BLOCK_QUERIES, math.ceil(positions / blocks))
    blocks = math.ceil(positions / size)
    query = jnp.pad(query, ((0, 0), (0, blocks * size - positions), (0, 0)))
    query = einops.rearrange(query, "b (n q) c -> n b q c", n=blocks)
    # Without the checkpoint, the backward pass would hold all blocks' weights together.
    attended = jax.lax.map(jax.checkpoint(attend), query)
    return einops.rearrange(attended, "n b q c -> b (n q) c")[:, :positions]


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions of `(B, h, w, C)`; plus the input."""

    norm: Callable[..., nn.Module] = GroupNorm
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        _, height, width, channels = x.shape
        h = self.norm(dtype=self.dtype, name="norm")(x)

        def project(name):
            y = Conv(channels, kernel_size=1, dtype=self.dtype, name=name)(h)
            return einops.rearrange(y, "b h w c -> b (h w) c")

        query, key, value = project("query"), project("key"), project("value")
        h = attend_to_all(query, key, value)
        h = einops.rearrange(h, "b (h w) c -> b h w c", h=height, w=width)
        return x + Conv(channels, kernel_size=1, dtype=self.dtype, name="out")(h)


class Downsample(nn.Module):
    """Halves height and width (odd sizes round down): a stride-2 convolution.

    The reference pads one row below and one column to the right only.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        return Conv(x.shape[-1], stride=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name="conv")(
            x
        )


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = einops.repeat(x, "b h w c -> b (h 2) (w 2) c")
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x)
