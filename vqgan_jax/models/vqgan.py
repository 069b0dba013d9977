"""The tokenizers: encoder, quantiser and decoder together, convolutional or of vision transformers.

Sources: "Taming Transformers" (Esser et al. 2021); "Vector-quantized Image Modeling with Improved
VQGAN" (Yu et al. 2022).
"""

from collections.abc import Mapping
from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models import logit_laplace
from vqgan_jax.models.autoencoder import Decoder, Encoder
from vqgan_jax.models.layers import Conv
from vqgan_jax.models.quantizers import Quantized, make_quantizer
from vqgan_jax.models.vit import Trunk, ViTDecoder, ViTEncoder


class VQGAN(nn.Module):
    """Images `(B, H, W, C)` in [-1, 1] to codes `(B, H/f, W/f)` and back.

    Two 1x1 convolutions, which are linear layers, lead from the encoder to the quantiser and from
    it to the decoder. With a `code_dim` below the networks' channels they are a low-dimensional
    projection: the factorised codes of Yu et al., section 3.2.

    Attributes:
        encoder: images -> `(B, H/f, W/f, channels)`.
        decoder: `(B, h, w, latent_channels)` -> images, in two parts: `features`, and `head`, which
            is its layer `LAST_LAYER` alone.
        latent_channels: that the decoder takes.
        quantizer: the arguments of `make_quantizer`.
        logit_laplace: whether the decoder gives a location and a scale for every value, from which
            images are made as in `models.logit_laplace`; otherwise it gives images.
        dtype: of the computation; parameters are float32.
        frozen: of "encoder" and "quantizer", those that are in training as they are without it: no
            dropout, no noise, no statistics that move.
    """

    encoder: nn.Module
    decoder: nn.Module
    latent_channels: int
    quantizer: Mapping
    logit_laplace: bool = False
    dtype: jnp.dtype = jnp.float32
    frozen: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, model: Mapping, dtype: jnp.dtype) -> Self:
        """The tokenizer that a config's `model` describes, computing in `dtype`."""
        make = _vision_transformers if model["architecture"] == "vit" else _convolutional
        return cls(
            **make(model, dtype),
            quantizer=model["quantizer"],
            logit_laplace=model["logit_laplace"],
            dtype=dtype,
        )

    def setup(self):
        self.quant_conv = Conv(self.quantizer["code_dim"], kernel_size=1, dtype=self.dtype)
        self.quantize = make_quantizer(**self.quantizer)
        self.post_quant_conv = Conv(self.latent_channels, kernel_size=1, dtype=self.dtype)

    def latents(self, images, train: bool = False):
        """Images -> latents `(B, h, w, code_dim)` in front of the quantiser."""
        return self.quant_conv(self.encoder(images, train))

    def features(self, images, train: bool = False, temperature=1.0) -> tuple[jax.Array, Quantized]:
        """Everything in front of the last layer: its input, and what was quantised."""
        latents = self.latents(images, train and "encoder" not in self.frozen)
        quantized = self.quantize(latents, train and "quantizer" not in self.frozen, temperature)
        latents = self.post_quant_conv(quantized.quantized)
        return self.decoder.features(latents, train), quantized

    def output(self, features):
        """The last layer: features -> what `to_images` makes images of."""
        return self.decoder.head(features)

    def to_images(self, output):
        """Images of the last layer's output: itself, or the means where it is a distribution."""
        return logit_laplace.to_images(output) if self.logit_laplace else output

    def head(self, features):
        """Features -> images, by the last layer."""
        return self.to_images(self.output(features))

    def predict(self, images, train: bool = False, temperature=1.0):
        """Images -> the last layer's output, and what was quantised."""
        features, quantized = self.features(images, train, temperature)
        return self.output(features), quantized

    def last_layer(self, params) -> Mapping:
        """The parameters of `head` (`kernel`, `bias`), where the adaptive weight looks."""
        return params["decoder"][self.decoder.LAST_LAYER]

    def only_last_layer(self, layer) -> dict:
        """Parameters that are enough to apply `head`."""
        return {"decoder": {self.decoder.LAST_LAYER: layer}}

    def with_last_layer(self, params, layer) -> dict:
        """`params` with the parameters of `head` replaced."""
        return params | {"decoder": params["decoder"] | {self.decoder.LAST_LAYER: layer}}

    def __call__(self, images, train: bool = False, temperature=1.0):
        """Images -> reconstructions of the same shape (not clipped), and what was quantised."""
        output, quantized = self.predict(images, train, temperature)
        return self.to_images(output), quantized

    def encode(self, images):
        """Images -> codes `(B, h, w)` int32."""
        return self.quantize(self.latents(images)).codes

    def decode(self, codes):
        """Codes `(B, h, w)` -> images, not clipped."""
        latents = self.post_quant_conv(self.quantize.lookup(codes))
        return self.head(self.decoder.features(latents))


# ---- The networks that a config's `model` describes, as fields of `VQGAN`.


def _convolutional(model: Mapping, dtype: jnp.dtype) -> dict:
    names = ("resolution", "channels", "num_res_blocks", "middle_attention", "norm", "num_groups")
    shared = {name: model[name] for name in (*names, "dropout", "remat", "remat_keeps")} | dict(
        channel_multipliers=tuple(model["channel_multipliers"]),
        attention_resolutions=tuple(model["attention_resolutions"]),
        dtype=dtype,
    )
    channels = model["latent_channels"]
    return dict(
        encoder=Encoder(latent_channels=channels, **shared),
        decoder=Decoder(out_channels=_output_channels(model), **shared),
        latent_channels=channels,
    )


def _vision_transformers(model: Mapping, dtype: jnp.dtype) -> dict:
    vit = model["vit"]
    patch = vit["patch"]
    shared = dict(
        side=model["resolution"] // patch,
        dropout=model["dropout"],
        unroll=vit["unroll"],
        remat=model["remat"],
        remat_keeps=model["remat_keeps"],
        dtype=dtype,
    )
    return dict(
        encoder=ViTEncoder(patch, Trunk(**vit["encoder"], **shared)),
        decoder=ViTDecoder(patch, _output_channels(model), Trunk(**vit["decoder"], **shared)),
        latent_channels=vit["decoder"]["width"],
    )


def _output_channels(model: Mapping) -> int:
    return model["out_channels"] * (2 if model["logit_laplace"] else 1)
