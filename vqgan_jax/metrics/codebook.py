"""How a tokenizer uses its codebook: share of codes used and perplexity.

Both figures depend on how many codes were counted: a batch cannot use more codes than it has
tokens. They are therefore taken over the whole evaluation split (the sum of `code_counts` of its
batches and processes), and compare only with publications that do the same. Figures taken per
batch or over a moving window of tokens are other figures under the same name.

Where a position has several codes, each step or group counts by itself, also where they share one
codebook: `usage` is the mean of theirs, and `perplexity` is exp of the mean entropy, so that both
compare with those of one code and depth x log2(perplexity) bits are the most that a position tells.
"""

import jax
import jax.numpy as jnp
import numpy as np


def code_counts(
    codes: jax.Array, codebook_size: int, mask: jax.Array | None = None, depth: int = 1
) -> jax.Array:
    """Counts how often each code occurs in a batch.

    Args:
        codes: (B, ...) integers in [0, codebook_size), such as (B, h, w); (B, ..., depth) where
            there are several codes a position.
        codebook_size: K.
        mask: (B,) bool; images where it is False (padding of the last batch) are not counted.
        depth: codes a position.

    Returns:
        (K,) int32; (depth, K) where depth is above 1. Sum over batches on the host in int64
        (`np.asarray(counts, np.int64)`), as a large split has more tokens than int32 holds.
    """
    shape = (codebook_size,) if depth == 1 else (depth, codebook_size)
    indices = codes.astype(jnp.int32)
    if depth > 1:
        indices += codebook_size * jnp.arange(depth)
    counts = jnp.zeros(depth * codebook_size, jnp.int32)
    if mask is not None:
        mask = mask.reshape(mask.shape + (1,) * (codes.ndim - 1))
        indices = jnp.where(mask, indices, counts.size)  # out of bounds, hence dropped
    return counts.at[indices.reshape(-1)].add(1, mode="drop").reshape(shape)


def usage(counts: np.ndarray | jax.Array) -> jax.Array:
    """The share of codes that occur at least once, in [0, 1].

    Give it the counts of the whole evaluation split: the share grows with the number of tokens.

    Args:
        counts: occurrences of each code, as of `code_counts`.
    """
    return jnp.mean(counts > 0)


def perplexity(counts: np.ndarray | jax.Array) -> jax.Array:
    """exp(entropy) of the codes' distribution: how many codes are in use, in effect.

    1 where one code is always taken, K where all are equally frequent; NaN where nothing was
    counted. Give it the counts of the whole evaluation split: on fewer tokens it is biased
    downwards, and the mean of the batches' perplexities is not the perplexity of the split.

    Args:
        counts: occurrences of each code, as of `code_counts`.
    """
    frequencies = counts / counts.sum(axis=-1, keepdims=True)
    entropies = jnp.sum(jax.scipy.special.entr(frequencies), axis=-1)
    return jnp.exp(jnp.mean(entropies))
