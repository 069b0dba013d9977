"""Finite scalar quantization: every dimension is rounded to a few levels of its own."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vqgan_jax.models.layers import at_least_float32
from vqgan_jax.models.quantizers.quantized import Quantized, straight_through

MARGIN = 1e-3  # what bounded latents stay away from the next rounding


class FSQQuantizer(nn.Module):
    """Rounds bounded latents; the codebook is the grid of all levels, and nothing is learned.

    Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", appendix A.1.
    With L levels in a dimension, z becomes round(f(z)) / floor(L / 2), where
    f(z) = (L - 1)(1 - 1e-3) / 2 tanh(z + s) - o, and o is 1/2 for even L (s centres it), else 0.
    A code is the number whose digits are the levels, the first dimension's counting least.
    Gradients pass the rounding straight through. There is no loss.
    """

    levels: tuple[int, ...]

    @nn.compact
    def __call__(self, latents, train: bool = False, temperature=None) -> Quantized:
        bounded = self._bounded(at_least_float32(latents))
        rounded = jnp.round(bounded)
        half, basis = self._half_width, self._basis
        codes = jnp.sum((rounded.astype(jnp.int32) + half) * basis, axis=-1, dtype=jnp.int32)
        quantized = straight_through(bounded, rounded) / half
        return Quantized(quantized, codes, bounded / half, rounded / half)

    def lookup(self, codes):
        """Codes `(B, h, w)` -> code vectors `(B, h, w, D)` in [-1, 1]."""
        digits = codes[..., None] // self._basis % np.array(self.levels, np.int32)
        return at_least_float32((digits - self._half_width) / self._half_width)

    def _bounded(self, latents):
        levels = np.array(self.levels)
        half = (levels - 1) * (1 - MARGIN) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        # The paper's program has the tangent here, where the inverse of tanh would centre exactly.
        shift = np.tan(offset / half)
        half, offset, shift = (jnp.asarray(x, latents.dtype) for x in (half, offset, shift))
        return jnp.tanh(latents + shift) * half - offset

    @property
    def _half_width(self) -> np.ndarray:
        return np.array(self.levels, np.int32) // 2

    @property
    def _basis(self) -> np.ndarray:
        """How much one level of each dimension counts in a code."""
        sizes = [math.prod(self.levels[:i]) for i in range(len(self.levels))]
        return np.array(sizes, np.int32)
