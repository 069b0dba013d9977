"""Trained tokenizers for other programs: `vqgan_jax.load(path)`."""

import functools
import os

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vqgan_jax.configuration import downsampling_factor
from vqgan_jax.training.checkpoints import read_variables
from vqgan_jax.training.game import make_vqgan


class Tokenizer:
    """A trained tokenizer. Functions are compiled once for each shape of their input.

    Attributes:
        config: the config it was trained with.
        variables: its parameters and, for an EMA quantiser, its codebook.
        factor: pixels a code in each direction.
        codebook_size: number of codes.
    """

    def __init__(self, config: ConfigDict, variables):
        self.config = config
        self.variables = variables
        self.module = make_vqgan(config.model)
        self.factor = downsampling_factor(config.model)
        self.codebook_size = config.model.quantizer.codebook_size

    def encode(self, images) -> jax.Array:
        """Images `(B, H, W, C)` in [-1, 1] -> codes `(B, H/f, W/f)` int32.

        Label-map tokenizers take one-hot maps.

        Raises:
            ValueError: the factor does not divide height and width, or channels are wrong.
        """
        images = jnp.asarray(images)
        channels = self.config.model.in_channels
        if images.ndim != 4 or images.shape[-1] != channels:
            raise ValueError(
                f"images have shape {images.shape}; this tokenizer takes (B, H, W, {channels})."
            )
        height, width = images.shape[1:3]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images are {height}x{width}, which the factor {self.factor} does not divide; "
                "crop or resize them."
            )
        return self._encode(self.variables, images)

    def decode(self, codes) -> jax.Array:
        """Codes `(B, h, w)` -> images `(B, f h, f w, C)` in [-1, 1]; logits for label maps.

        Raises:
            ValueError: codes are not three-dimensional integers.
        """
        codes = jnp.asarray(codes)
        if codes.ndim != 3 or not jnp.issubdtype(codes.dtype, jnp.integer):
            raise ValueError(
                f"codes have shape {codes.shape} and type {codes.dtype}; they must be integers "
                "(B, h, w)."
            )
        return self._decode(self.variables, codes)

    @functools.cached_property
    def _encode(self):
        return jax.jit(functools.partial(self.module.apply, method="encode"))

    @functools.cached_property
    def _decode(self):
        label_map = self.config.data.num_labels > 0

        def decode(variables, codes):
            images = self.module.apply(variables, codes, method="decode")
            return images if label_map else jnp.clip(images, -1.0, 1.0)

        return jax.jit(decode)


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a run directory (its newest checkpoint), a checkpoint or an export.

    Where the run kept a moving average of the parameters, it is taken.

    Raises:
        CheckpointError: there is none at `path`, or it is damaged.
    """
    config, variables, _ = read_variables(path)
    return Tokenizer(config, variables)
