"""Encoder and decoder of ViT-VQGAN: vision transformers over patches.

Source: "Vector-quantized Image Modeling with Improved VQGAN" (Yu et al. 2022), section 3.1 and
table 1. The width of the two-layer heads is not given there; that of the blocks' feed-forward, 4 x
width, gives its Base model of 91 million parameters.
"""

from typing import ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.attention import Linear, apply_linear
from vqgan_jax.models.layers import LARGE_GRID, at_least_float32, attend_to_all
from vqgan_jax.models.operations import attend
from vqgan_jax.models.recomputation import recomputed
from vqgan_jax.models.transformer import FeedForward, LayerNorm

EXPANSION = 4  # hidden channels of a feed-forward, in widths


def attend_among_all(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of `(B, N, heads, head_dim)` in which every token sees every other.

    Above `LARGE_GRID` tokens it goes by blocks of queries, and memory grows with N, not N^2.
    """
    batch, tokens = query.shape[:2]
    if tokens <= LARGE_GRID:
        return attend(query, key, value, num_unmasked=tokens)
    by_heads = (einops.rearrange(x, "b n a c -> (b a) n c") for x in (query, key, value))
    return einops.rearrange(attend_to_all(*by_heads), "(b a) n c -> b n a c", b=batch)


class Attention(nn.Module):
    """Multi-head self-attention without a mask, over `(B, N, D)`."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        layers = [Linear(width, dtype=self.dtype, name=name) for name in ("query", "key", "value")]
        heads = (
            einops.rearrange(y, "b n (a c) -> b n a c", a=self.num_heads)
            for y in apply_linear(layers, x)
        )
        y = attend_among_all(*heads).reshape(x.shape)
        return Linear(width, dtype=self.dtype, name="out")(y)


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised sum of what was before.

    Hands on a pair, of which the second is nothing, as a loop over layers wants it.
    """

    num_heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        h = LayerNorm(self.dtype, name="attention_norm")(x)
        x = x + dropout(Attention(self.num_heads, self.dtype, name="attention")(h))
        h = LayerNorm(self.dtype, name="feed_forward_norm")(x)
        h = FeedForward(EXPANSION * x.shape[-1], dtype=self.dtype, name="feed_forward")(h)
        return x + dropout(h), None


def resize_positions(positions: jax.Array, rows: int, columns: int) -> jax.Array:
    """Learned positions `(side, side, D)` for another grid, `(rows, columns, D)`.

    They are interpolated bicubically, as places in the image ("An Image is Worth 16x16 Words",
    Dosovitskiy et al. 2021, 3.2); for the grid that they were learned for they are as they are.
    """
    if positions.shape[:2] == (rows, columns):
        return positions
    return jax.image.resize(positions, (rows, columns, positions.shape[-1]), "bicubic")


class Trunk(nn.Module):
    """Learned positions, blocks and the last norm: `(B, h, w, width)` to the same.

    Attributes:
        side: rows and columns of tokens in training; other grids get positions in between.
        layers: blocks.
        heads: of attention, which divide the width.
        width: channels of a token.
        dropout: after attention and feed-forward.
        unroll: blocks of the loop over layers that are compiled one after the other; more compile
            longer.
        remat: recompute blocks in the backward pass: less memory, more time.
        remat_keeps: one of `recomputation.POLICIES`.
        dtype: of the computation; parameters are float32.
    """

    side: int
    layers: int
    heads: int
    width: int
    dropout: float = 0.0
    unroll: int = 1
    remat: bool = False
    remat_keeps: str = "nothing"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        batch, *grid, _ = x.shape
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (self.side, self.side, self.width)
        )
        x = x + resize_positions(positions, *grid).astype(self.dtype)
        x = einops.rearrange(x, "b h w d -> b (h w) d")
        block = Block
        if self.remat:
            block = recomputed(Block, self.remat_keeps, static_argnums=(2,), prevent_cse=False)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,),
            length=self.layers,
            unroll=min(self.unroll, self.layers),
        )
        x, _ = blocks(self.heads, self.dropout, self.dtype, name="blocks")(x, train)
        x = LayerNorm(self.dtype, name="norm_out")(x)
        return x.reshape(batch, *grid, self.width)


class Head(nn.Module):
    """Two linear layers with tanh between them."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        h = nn.tanh(Linear(EXPANSION * width, dtype=self.dtype, name="hidden")(x))
        return Linear(width, dtype=self.dtype, name="out")(h)


class ViTEncoder(nn.Module):
    """Images `(B, H, W, C)` -> `(B, H/patch, W/patch, width)`.

    Each patch becomes a token by one linear layer.
    """

    patch: int
    trunk: Trunk

    @nn.compact
    def __call__(self, images, train: bool = False):
        dtype = self.trunk.dtype
        patches = einops.rearrange(
            images, "b (h p) (w q) c -> b h w (p q c)", p=self.patch, q=self.patch
        )
        x = Linear(self.trunk.width, dtype=dtype, name="embedding")(patches)
        return Head(dtype, name="head_out")(self.trunk(x, train))


class ViTDecoder(nn.Module):
    """`(B, h, w, width)` -> images `(B, patch h, patch w, out_channels)`, not clipped.

    In two parts, as the convolutional `Decoder`: `features` ends behind the tanh of the head at the
    output, `head` is its second layer, which gives the pixels of each patch.
    """

    patch: int
    out_channels: int
    trunk: Trunk

    LAST_LAYER: ClassVar[str] = "pixels"

    def setup(self):
        dtype = self.trunk.dtype
        self.head_in = Head(dtype)
        self.hidden = Linear(EXPANSION * self.trunk.width, dtype=dtype)
        self.pixels = Linear(self.patch**2 * self.out_channels, dtype=dtype)

    def features(self, latents, train: bool = False):
        """What the last linear layer sees: `(B, h, w, 4 width)`."""
        return nn.tanh(self.hidden(self.trunk(self.head_in(latents), train)))

    def head(self, features):
        """The last linear layer; its output is float32."""
        patches = at_least_float32(self.pixels(features))
        return einops.rearrange(
            patches, "b h w (p q c) -> b (h p) (w q) c", p=self.patch, q=self.patch
        )

    def __call__(self, latents, train: bool = False):
        return self.head(self.features(latents, train))
