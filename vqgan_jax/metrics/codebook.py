"""How a tokenizer uses its codebook: share of codes used and perplexity.

Both figures depend on how many codes were counted: a batch cannot use more codes than it has
tokens. They are therefore taken over the whole evaluation split (the sum of `code_counts` of its
batches and processes), and compare only with publications that do the same. Figures taken per
batch or over a moving window of tokens are other figures under the same name.
"""

import jax
import jax.numpy as jnp
import numpy as np


def code_counts(codes: jax.Array, codebook_size: int, mask: jax.Array | None = None) -> jax.Array:
    """Counts how often each code occurs in a batch.

    Args:
        codes: (B, ...) integers in [0, codebook_size), such as (B, h, w).
        codebook_size: K.
        mask: (B,) bool; images where it is False (padding of the last batch) are not counted.

    Returns:
        (K,) int32. Sum over batches on the host in int64 (`np.asarray(counts, np.int64)`), as
        a large split has more tokens than int32 holds.
    """
    indices = codes.astype(jnp.int32)
    if mask is not None:
        mask = mask.reshape(mask.shape + (1,) * (codes.ndim - 1))
        indices = jnp.where(mask, indices, codebook_size)  # out of bounds, hence dropped
    return jnp.zeros(codebook_size, jnp.int32).at[indices.reshape(-1)].add(1, mode="drop")


def usage(counts: np.ndarray | jax.Array) -> jax.Array:
    """The share of codes that occur at least once, in [0, 1].

    Give it the counts of the whole evaluation split: the share grows with the number of tokens.

    Args:
        counts: (K,) occurrences of each code.
    """
    return jnp.mean(counts > 0)


def perplexity(counts: np.ndarray | jax.Array) -> jax.Array:
    """exp(entropy) of the codes' distribution: how many codes are in use, in effect.

    1 where one code is always taken, K where all are equally frequent; NaN where nothing was
    counted. Give it the counts of the whole evaluation split: on fewer tokens it is biased
    downwards, and the mean of the batches' perplexities is not the perplexity of the split.

    Args:
        counts: (K,) occurrences of each code.
    """
    frequencies = counts / counts.sum()
    return jnp.exp(jnp.sum(jax.scipy.special.entr(frequencies)))
