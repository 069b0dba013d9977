"""Several codes a position, each for what those before it left."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.layers import at_least_float32
from vqgan_jax.models.quantizers.nearest import NearestQuantizer
from vqgan_jax.models.quantizers.quantized import Quantized, with_gradient


class ResidualQuantizer(nn.Module):
    """r_1 = z; k_d = argmin_k |r_d - e_k|, r_{d+1} = r_d - e_{k_d}; z becomes the sum of e_{k_d}.

    Lee et al. 2022, "Autoregressive Image Generation using Residual Quantization". Steps have
    codebooks of their own or, with `shared_codebook`, all the same one. `latents` and `vectors`
    are the r_d and e_{k_d} of all steps, `(B, h, w, depth, D)`: |r_d - e_{k_d}| is
    |z - sum of the first d vectors|, so that the loss between them is the paper's, with the mean
    over steps for the sum. Earlier vectors count as constants in a later r_d.
    """

    codebook_size: int
    code_dim: int
    depth: int
    shared_codebook: bool = False
    kmeans_init: bool = False
    gradient: str = "straight_through"

    def setup(self):
        def make():
            return NearestQuantizer(self.codebook_size, self.code_dim, kmeans_init=self.kmeans_init)

        self.codebooks = [make() for _ in range(1 if self.shared_codebook else self.depth)]

    def __call__(self, latents, train: bool = False, temperature=None) -> Quantized:
        latents = at_least_float32(latents)
        residual, steps = latents, []
        for quantizer in self._of_steps():
            step = quantizer(residual, train)
            residual = residual - jax.lax.stop_gradient(step.vectors)
            steps.append(step)
        codes = jnp.stack([step.codes for step in steps], axis=-1)
        residuals = jnp.stack([step.latents for step in steps], axis=-2)
        vectors = jnp.stack([step.vectors for step in steps], axis=-2)
        quantized = with_gradient(self.gradient, latents, vectors.sum(axis=-2))
        return Quantized(quantized, codes, residuals, vectors)

    def lookup(self, codes):
        """Codes `(B, h, w, depth)` -> sums of code vectors `(B, h, w, D)`."""
        vectors = [quantizer.lookup(codes[..., d]) for d, quantizer in enumerate(self._of_steps())]
        return jnp.stack(vectors, axis=-2).sum(axis=-2)

    def _of_steps(self):
        return self.codebooks * self.depth if self.shared_codebook else self.codebooks
