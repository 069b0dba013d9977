"""Several codes a position, each for a part of its channels."""

import einops
import flax.linen as nn
import jax.numpy as jnp

from vqgan_jax.models.quantizers.nearest import NearestQuantizer
from vqgan_jax.models.quantizers.quantized import Quantized


class ProductQuantizer(nn.Module):
    """Latents are cut into `depth` groups of D / depth channels, each with its nearest code.

    Jegou et al. 2011, "Product Quantization for Nearest Neighbor Search"; as the codes of
    images, Ma et al. 2025, "UniTok". The joint codebook has K^depth rows. Groups have
    codebooks of their own or, with `shared_codebook`, all the same one. With `l2_normalize`, each
    group has unit length.
    """

    codebook_size: int
    code_dim: int
    depth: int
    shared_codebook: bool = False
    l2_normalize: bool = False
    kmeans_init: bool = False
    gradient: str = "straight_through"

    def setup(self):
        def make():
            return NearestQuantizer(
                self.codebook_size,
                self.code_dim // self.depth,
                self.l2_normalize,
                self.kmeans_init,
                self.gradient,
            )

        self.codebooks = [make() for _ in range(1 if self.shared_codebook else self.depth)]

    def __call__(self, latents, train: bool = False, temperature=None) -> Quantized:
        groups = einops.rearrange(latents, "b h w (g d) -> b h w g d", g=self.depth)
        if self.shared_codebook:
            found = self.codebooks[0](groups, train)
            arrays = found.quantized, found.latents, found.vectors
            codes = found.codes
        else:
            parts = [own(groups[..., g, :], train) for g, own in enumerate(self.codebooks)]
            codes = jnp.stack([part.codes for part in parts], axis=-1)
            arrays = (
                jnp.stack([part.quantized for part in parts], axis=-2),
                jnp.stack([part.latents for part in parts], axis=-2),
                jnp.stack([part.vectors for part in parts], axis=-2),
            )
        quantized, latents, vectors = (_joined(array) for array in arrays)
        return Quantized(quantized, codes, latents, vectors)

    def lookup(self, codes):
        """Codes `(B, h, w, depth)` -> code vectors of all groups `(B, h, w, D)`."""
        if self.shared_codebook:
            return _joined(self.codebooks[0].lookup(codes))
        vectors = [own.lookup(codes[..., g]) for g, own in enumerate(self.codebooks)]
        return _joined(jnp.stack(vectors, axis=-2))


def _joined(groups):
    return einops.rearrange(groups, "b h w g d -> b h w (g d)")
