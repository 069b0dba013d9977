"""The nearest code of a codebook that learns by its gradient; what other quantizers build on."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.layers import at_least_float32
from vqgan_jax.models.nearest import kmeans, l2_normalize, nearest_codes
from vqgan_jax.models.quantizers.quantized import Quantized, with_gradient


def uniform_codebook(key, shape, dtype=jnp.float32):
    """Uniform in +-1/K, the start of the reference's codebook."""
    return jax.random.uniform(key, shape, dtype, -1.0 / shape[0], 1.0 / shape[0])


class NearestQuantizer(nn.Module):
    """The nearest code by Euclidean distance, argmin_k |z - e_k| ("Taming Transformers", eq. 2).

    With `l2_normalize`, latents and codes are compared and handed on at unit length, so that the
    distance is the cosine's; the codebook then starts normal, at that length, and else uniform (Yu
    et al. 2022, "Vector-quantized Image Modeling with Improved VQGAN", 3.2).
    With `kmeans_init`, the codebook starts at the k-means centres of the latents that `init` sees.
    `gradient` names the way of gradients past the step: "straight_through" or "rotation".
    """

    codebook_size: int
    code_dim: int
    l2_normalize: bool = False
    kmeans_init: bool = False
    gradient: str = "straight_through"

    @nn.compact
    def __call__(self, latents, train: bool = False, temperature=None) -> Quantized:
        latents = self._compared(at_least_float32(latents))
        codebook = self._compared(self._codebook(latents))
        codes = nearest_codes(latents, codebook)
        vectors = jnp.take(codebook, codes, axis=0)
        if train and not self.is_initializing():
            self._update(latents, codes)
        quantized = with_gradient(self.gradient, latents, vectors)
        return Quantized(quantized, codes, latents, vectors, codebook=codebook)

    def lookup(self, codes):
        """Codes `(B, h, w)` -> code vectors `(B, h, w, D)`."""
        return jnp.take(self._compared(self._stored_codebook()), codes, axis=0)

    def _compared(self, vectors):
        return l2_normalize(vectors) if self.l2_normalize else vectors

    def _initial_codebook(self, key, latents):
        shape = (self.codebook_size, self.code_dim)
        if self.kmeans_init:
            points = latents.reshape(-1, self.code_dim)
            return self._compared(kmeans(key, points, self.codebook_size))
        if self.l2_normalize:  # of length 1: an update of Adam turns longer ones by less
            return l2_normalize(jax.random.normal(key, shape))
        return uniform_codebook(key, shape)

    def _codebook(self, latents):
        return self.param("codebook", self._initial_codebook, latents)

    def _stored_codebook(self):
        return self.get_variable("params", "codebook")

    def _update(self, latents, codes):
        """The codebook learns by its gradient; nothing to do in the forward pass."""
