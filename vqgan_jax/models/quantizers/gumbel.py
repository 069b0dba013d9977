"""Codes drawn at random, with gradients by a relaxation of the draw."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.layers import Conv, at_least_float32
from vqgan_jax.models.quantizers.quantized import Quantized, straight_through


class GumbelQuantizer(nn.Module):
    """Codes drawn by the Gumbel-softmax with straight-through samples (Jang et al. 2017).

    `temperature` (a scalar) sharpens the relaxed sample. In training, noise comes from the random
    stream "gumbel"; at evaluation the code is the most probable one and nothing is drawn.
    """

    codebook_size: int
    code_dim: int

    @nn.compact
    def __call__(self, latents, train: bool = False, temperature=1.0) -> Quantized:
        latents = at_least_float32(latents)
        logits = Conv(self.codebook_size, kernel_size=1, dtype=latents.dtype, name="projection")(
            latents
        )
        codebook = self.param(
            "codebook", nn.initializers.normal(1.0), (self.codebook_size, self.code_dim)
        )
        if not train:
            codes = jnp.argmax(logits, axis=-1)
            vectors = jnp.take(codebook, codes, axis=0)
            return Quantized(vectors, codes, latents, vectors, logits)
        noise = jax.random.gumbel(self.make_rng("gumbel"), logits.shape)
        relaxed = jax.nn.softmax((logits + noise) / temperature, axis=-1)
        codes = jnp.argmax(relaxed, axis=-1)
        sample = straight_through(relaxed, jax.nn.one_hot(codes, self.codebook_size))
        vectors = jnp.einsum("b h w k, k d -> b h w d", sample, codebook)
        return Quantized(vectors, codes, latents, vectors, logits)

    def lookup(self, codes):
        """Codes `(B, h, w)` -> code vectors `(B, h, w, D)`."""
        return jnp.take(self.get_variable("params", "codebook"), codes, axis=0)
