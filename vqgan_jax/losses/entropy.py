"""The entropy loss E[H(p(k|z))] - H(E[p(k|z)]): sure of each latent, and all codes in use.

p(k|z) = softmax_k(-|z - e_k|^2 / T); means are over all latents of the global batch, or, where
gradients are accumulated, of each part of it; entropies in nats. Jansen et al. 2019, "Coincidence,
Categorization, and Consolidation"; for image tokenizers Chang et al. 2022, "MaskGIT" (its program),
and Yu et al. 2023, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation".
"""

import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.models.nearest import codebook_blocks, squared_distances

SMALLEST = 1e-30  # probability: its logarithm is finite, and so is the gradient there
FARTHEST = -1e30  # logit of what is no code


def codebook_entropy(latents: jax.Array, codebook: jax.Array, temperature: float) -> jax.Array:
    """The loss for latents `(..., D)` and a codebook `(K, D)`; gradients reach both.

    The codebook goes in blocks, forwards and backwards, so that memory is flat in K: once for the
    softmax's denominators, and once for the entropies.
    """
    points = latents.reshape(-1, latents.shape[-1])
    blocks = codebook_blocks(codebook, points.shape[0])

    def logits_of(block):
        rows, exists = block
        return jnp.where(exists, -squared_distances(points, rows) / temperature, FARTHEST)

    def add_exponentials(total, block):
        own = jax.scipy.special.logsumexp(logits_of(block), axis=-1)
        return jnp.logaddexp(total, own), None

    def add_entropies(entropies, block):
        log_p = logits_of(block) - denominators[:, None]
        p = jnp.exp(log_p)
        return entropies - jnp.sum(p * log_p, axis=-1), jnp.mean(p, axis=0)

    zeros = jnp.zeros_like(points[:, 0])
    denominators, _ = _scan(add_exponentials, zeros + FARTHEST, blocks)
    entropies, frequencies = _scan(add_entropies, zeros, blocks)
    return jnp.mean(entropies) - _entropy(frequencies)


def sign_entropy(latents: jax.Array, temperature: float, group_bits: int) -> jax.Array:
    """The loss for latents `(..., D)` and the implied codebook {-1, 1}^D.

    -|z - e|^2 is sum_i 2 z_i e_i and what is equal for all codes, so that under p(k|z) bits are
    independent, +1 with probability sigmoid(4 z_i / T). Therefore H(p(k|z)) is the sum of the
    bits' entropies, and p(k|z) for half of the bits times that for the other half is p(k|z) for
    all: E[p] is a product of two `(N, 2^(D/2))` matrices.

    Args:
        latents: in front of their signs.
        temperature: T.
        group_bits: so many bits are taken together in H(E[p]), with all their 2^n combinations.
            More than that are cut into equal groups whose entropies are added, which is above the
            entropy of all together by how much the groups tell of each other.
    """
    logits = 4.0 / temperature * latents.reshape(-1, latents.shape[-1])
    magnitudes = jnp.abs(logits)
    of_bits = jax.nn.softplus(-magnitudes) + magnitudes * jax.nn.sigmoid(-magnitudes)
    of_latents = jnp.mean(jnp.sum(of_bits, axis=-1))

    positive = jax.nn.sigmoid(logits)
    count = -(-logits.shape[-1] // group_bits)
    of_batch = jnp.zeros(())
    for bits in np.array_split(np.arange(logits.shape[-1]), count):
        half = len(bits) // 2
        low, high = (_combinations(positive[:, part]) for part in (bits[:half], bits[half:]))
        together = jnp.einsum("n a, n b -> a b", high, low, precision=jax.lax.Precision.HIGHEST)
        of_batch += _entropy(together / logits.shape[0])
    return of_latents - of_batch


def _combinations(positive: jax.Array) -> jax.Array:
    """Probabilities `(N, 2^n)` of all combinations of n bits that are set by `positive` `(N, n)`.

    Bit i of a combination's number is that of column i.
    """
    combinations = jnp.ones((positive.shape[0], 1), positive.dtype)
    for i in range(positive.shape[1]):
        p = positive[:, i : i + 1]
        combinations = jnp.concatenate([combinations * (1 - p), combinations * p], axis=-1)
    return combinations


def _entropy(frequencies: jax.Array) -> jax.Array:
    return -jnp.sum(frequencies * jnp.log(jnp.maximum(frequencies, SMALLEST)))


def _scan(step, start, blocks):
    """A scan that keeps no block's logits for its gradient, but computes them again."""
    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), start, blocks)
