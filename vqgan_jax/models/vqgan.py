"""The tokenizer of "Taming Transformers": encoder, quantiser and decoder together."""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.autoencoder import Decoder, Encoder
from vqgan_jax.models.layers import Conv, GroupNorm, LayerNorm
from vqgan_jax.models.quantizers import Quantized, make_quantizer


class VQGAN(nn.Module):
    """Images `(B, H, W, C)` in [-1, 1] to codes `(B, H/f, W/f)` and back.

    The field names are those of a config's `model`; `quantizer` holds the arguments of
    `make_quantizer`. `code_dim` below `latent_channels` makes the two 1x1 convolutions around the
    quantiser a low-dimensional projection.
    """

    resolution: int
    in_channels: int
    out_channels: int
    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    latent_channels: int
    quantizer: Mapping
    middle_attention: bool = True
    norm: str = "group"
    num_groups: int = 32
    dropout: float = 0.0
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        group_norm = functools.partial(GroupNorm, self.num_groups)
        shared = dict(
            resolution=self.resolution,
            channels=self.channels,
            channel_multipliers=tuple(self.channel_multipliers),
            num_res_blocks=self.num_res_blocks,
            attention_resolutions=tuple(self.attention_resolutions),
            middle_attention=self.middle_attention,
            norm=LayerNorm if self.norm == "layer" else group_norm,
            dropout=self.dropout,
            remat=self.remat,
            dtype=self.dtype,
        )
        self.encoder = Encoder(latent_channels=self.latent_channels, **shared)
        self.quant_conv = Conv(self.quantizer["code_dim"], kernel_size=1, dtype=self.dtype)
        self.quantize = make_quantizer(**self.quantizer)
        self.post_quant_conv = Conv(self.latent_channels, kernel_size=1, dtype=self.dtype)
        self.decoder = Decoder(out_channels=self.out_channels, **shared)

    def latents(self, images, train: bool = False):
        """Images -> latents `(B, h, w, code_dim)` in front of the quantiser."""
        return self.quant_conv(self.encoder(images, train))

    def features(self, images, train: bool = False, temperature=1.0) -> tuple[jax.Array, Quantized]:
        """Everything in front of the last convolution: its input, and what was quantised."""
        quantized = self.quantize(self.latents(images, train), train, temperature)
        latents = self.post_quant_conv(quantized.quantized)
        return self.decoder.features(latents, train), quantized

    def head(self, features):
        """The last convolution: features -> images."""
        return self.decoder.head(features)

    @staticmethod
    def last_layer(params) -> Mapping:
        """The parameters of `head` (`kernel`, `bias`), where the adaptive weight looks."""
        return params["decoder"]["conv_out"]

    @staticmethod
    def only_last_layer(layer) -> dict:
        """Parameters that are enough to apply `head`."""
        return {"decoder": {"conv_out": layer}}

    @staticmethod
    def with_last_layer(params, layer) -> dict:
        """`params` with the parameters of `head` replaced."""
        return params | {"decoder": params["decoder"] | {"conv_out": layer}}

    def __call__(self, images, train: bool = False, temperature=1.0):
        """Images -> reconstructions of the same shape (not clipped), and what was quantised."""
        features, quantized = self.features(images, train, temperature)
        return self.head(features), quantized

    def encode(self, images):
        """Images -> codes `(B, h, w)` int32."""
        return self.quantize(self.latents(images)).codes

    def decode(self, codes):
        """Codes `(B, h, w)` -> images, not clipped."""
        return self.decoder(self.post_quant_conv(self.quantize.lookup(codes)))
