"""Lookup-free quantization: every dimension gives one bit of the code, its sign."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vqgan_jax.models.layers import at_least_float32
from vqgan_jax.models.quantizers.quantized import Quantized, straight_through


class LFQQuantizer(nn.Module):
    """q = sign(z) with sign(0) = -1; the codebook is {-1, 1}^D, of 2^D codes.

    Yu et al. 2023, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation",
    equations 3 and 4: code = sum_i 2^i [z_i > 0], i from 0. Gradients pass straight through.
    Latents are kept at their codes by the commitment loss, and codes in use by the entropy loss
    (`losses/entropy.py`).
    """

    code_dim: int

    @nn.compact
    def __call__(self, latents, train: bool = False, temperature=None) -> Quantized:
        latents = at_least_float32(latents)
        bits = latents > 0
        codes = jnp.sum(bits * self._weights, axis=-1, dtype=jnp.int32)
        vectors = _signs(bits, latents.dtype)
        return Quantized(straight_through(latents, vectors), codes, latents, vectors)

    def lookup(self, codes):
        """Codes `(B, h, w)` -> code vectors `(B, h, w, D)` of -1 and 1."""
        return _signs(codes[..., None] // self._weights % 2 == 1, jnp.float32)

    @property
    def _weights(self) -> np.ndarray:
        return 2 ** np.arange(self.code_dim, dtype=np.int32)


def _signs(bits, dtype):
    return jnp.where(bits, 1, -1).astype(dtype)
