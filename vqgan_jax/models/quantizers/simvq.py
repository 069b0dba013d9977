"""A frozen random codebook seen through a learned linear map."""

import jax
import jax.numpy as jnp

from vqgan_jax.models.layers import torch_uniform
from vqgan_jax.models.quantizers.nearest import NearestQuantizer


class SimVQQuantizer(NearestQuantizer):
    """The nearest row of C W: C `(K, D)` is random and stays, W `(D, D)` learns.

    Zhu et al. 2024, "Addressing Representation Collapse in Vector Quantized Models with One Linear
    Layer": each step moves W, and with it every code, used or not. C is normal with
    variance 1/D and lies in the collection "codebook" (`embedding`), which no optimizer touches;
    W is the parameter `map`.
    """

    def _codebook(self, latents):
        def initial():
            shape = (self.codebook_size, self.code_dim)
            return jax.random.normal(self.make_rng("params"), shape) * self.code_dim**-0.5

        frozen = self.variable("codebook", "embedding", initial)
        shape = (self.code_dim, self.code_dim)
        return _mapped(frozen.value, self.param("map", torch_uniform(self.code_dim), shape))

    def _stored_codebook(self):
        return _mapped(
            self.get_variable("codebook", "embedding"), self.get_variable("params", "map")
        )


def _mapped(codebook, matrix):
    # Rounding that differs between programs would move codes that are almost as near.
    return jnp.matmul(codebook, matrix, precision=jax.lax.Precision.HIGHEST)
