"""Encoder and decoder of the convolutional VQGAN ("Taming Transformers", appendix A, table 7).

Both are fully convolutional: `resolution` is only the nominal size that `attention_resolutions`
refer to, as in the reference.
"""

from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from vqgan_jax.models.layers import (
    AttentionBlock,
    Conv,
    Downsample,
    GroupNorm,
    ResidualBlock,
    Upsample,
    at_least_float32,
    make_norm,
)
from vqgan_jax.models.recomputation import recomputed


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it.

    `resample` ("downsample", "upsample" or "") leads on to the next level.
    """

    features: int
    num_blocks: int
    attention: bool
    resample: str = ""
    norm: Callable[..., nn.Module] = GroupNorm
    dropout: float = 0.0
    remat: bool = False
    remat_keeps: str = "nothing"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        block = ResidualBlock
        if self.remat:
            block = recomputed(ResidualBlock, self.remat_keeps, static_argnums=(2,))
        for i in range(self.num_blocks):
            x = block(self.features, self.norm, self.dropout, self.dtype, name=f"block_{i}")(
                x, train
            )
            if self.attention:
                x = AttentionBlock(self.norm, self.dtype, name=f"attention_{i}")(x)
        if self.resample == "downsample":
            x = Downsample(self.dtype, name="downsample")(x)
        elif self.resample == "upsample":
            x = Upsample(self.dtype, name="upsample")(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    attention: bool = True
    norm: Callable[..., nn.Module] = GroupNorm
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        block = (x.shape[-1], self.norm, self.dropout, self.dtype)
        x = ResidualBlock(*block, name="block_1")(x, train)
        if self.attention:
            x = AttentionBlock(self.norm, self.dtype, name="attention_1")(x)
        return ResidualBlock(*block, name="block_2")(x, train)


class Encoder(nn.Module):
    """Images `(B, H, W, C)` -> `(B, H/f, W/f, latent_channels)`, f = 2^(levels - 1).

    `down_0` is the highest resolution.
    """

    resolution: int
    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    latent_channels: int
    middle_attention: bool = True
    norm: str = "group"  # or "layer"; see `make_norm`
    num_groups: int = 32
    dropout: float = 0.0
    remat: bool = False
    remat_keeps: str = "nothing"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        norm = make_norm(self.norm, self.num_groups)
        lowest = len(self.channel_multipliers) - 1
        self.conv_in = Conv(self.channels, dtype=self.dtype)
        self.down = [
            Level(
                features=self.channels * multiplier,
                num_blocks=self.num_res_blocks,
                attention=self.resolution >> i in self.attention_resolutions,
                resample="downsample" if i < lowest else "",
                norm=norm,
                dropout=self.dropout,
                remat=self.remat,
                remat_keeps=self.remat_keeps,
                dtype=self.dtype,
            )
            for i, multiplier in enumerate(self.channel_multipliers)
        ]
        self.mid = Middle(self.middle_attention, norm, self.dropout, self.dtype)
        self.norm_out = norm(dtype=self.dtype)
        self.conv_out = Conv(self.latent_channels, dtype=self.dtype)

    def tail(self, x, train: bool = False):
        """What stands behind the levels: the middle and the projection to the latents."""
        return self.conv_out(nn.swish(self.norm_out(self.mid(x, train))))

    def __call__(self, images, train: bool = False):
        x = self.conv_in(images)
        for level in self.down:
            x = level(x, train)
        return self.tail(x, train)


class Decoder(nn.Module):
    """`(B, h, w, latent_channels)` -> images `(B, f h, f w, out_channels)`, not clipped.

    In two parts, since the adaptive adversarial weight needs the last convolution by itself:
    `features` ends in front of it, `head` is it. `up_0` is the highest resolution.
    """

    resolution: int
    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    out_channels: int
    middle_attention: bool = True
    norm: str = "group"  # or "layer"; see `make_norm`
    num_groups: int = 32
    dropout: float = 0.0
    remat: bool = False
    remat_keeps: str = "nothing"
    dtype: jnp.dtype = jnp.float32

    LAST_LAYER: ClassVar[str] = "conv_out"

    def setup(self):
        norm = make_norm(self.norm, self.num_groups)
        width = self.channels * self.channel_multipliers[-1]
        self.conv_in = Conv(width, dtype=self.dtype)
        self.mid = Middle(self.middle_attention, norm, self.dropout, self.dtype)
        self.up = [
            Level(
                features=self.channels * multiplier,
                num_blocks=self.num_res_blocks + 1,
                attention=self.resolution >> i in self.attention_resolutions,
                resample="upsample" if i > 0 else "",
                norm=norm,
                dropout=self.dropout,
                remat=self.remat,
                remat_keeps=self.remat_keeps,
                dtype=self.dtype,
            )
            for i, multiplier in enumerate(self.channel_multipliers)
        ]
        self.norm_out = norm(dtype=self.dtype)
        self.conv_out = Conv(self.out_channels, dtype=self.dtype)

    def features(self, latents, train: bool = False):
        """What the last convolution sees: `(B, f h, f w, channels)`."""
        x = self.mid(self.conv_in(latents), train)
        for level in reversed(self.up):
            x = level(x, train)
        return nn.swish(self.norm_out(x))

    def head(self, features):
        """The last convolution; its output is float32."""
        return at_least_float32(self.conv_out(features))

    def __call__(self, latents, train: bool = False):
        return self.head(self.features(latents, train))
