"""Which codes may be drawn, and the draw itself.

"Hierarchical Neural Story Generation" (Fan et al. 2018) for top-k, "The Curious Case of Neural Text
Degeneration" (Holtzman et al. 2020) for top-p.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Filters:
    """How codes are drawn; changing temperature or top_p compiles nothing anew, top_k does.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely code.
        top_p: the most likely codes that together reach this probability; None for all.
        top_k: so many most likely codes, and those as likely as the last of them; 0 for all.
    """

    temperature: float | jax.Array = 1.0
    top_p: float | jax.Array | None = None
    top_k: int = flax.struct.field(pytree_node=False, default=0)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """`(B, K)` with -inf below the k-th largest of a row; ties stay, as in the reference."""
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """`(B, K)` with -inf outside the fewest codes whose probabilities exceed `p`; ties stay."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    smallest = jnp.where(before <= p, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def draw(logits: jax.Array, filters: Filters, keys: jax.Array) -> jax.Array:
    """One code of each row.

    By the largest sum of logit and Gumbel noise, which is a draw from the softmax (Gumbel 1954).

    Args:
        logits: `(B, K)` float32 or wider.
        filters: temperature first, then top-k, then top-p.
        keys: `(B,)` random keys, one a row, so that a row's noise is that of no other.

    Returns:
        `(B,)` int32.
    """
    temperature = jnp.asarray(filters.temperature, logits.dtype)
    greedy = temperature == 0
    logits = keep_top_k(logits / jnp.where(greedy, 1.0, temperature), filters.top_k)
    if filters.top_p is not None:
        logits = keep_top_p(logits, filters.top_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], logits.dtype))(keys)
    scores = logits + jnp.where(greedy, 0.0, noise)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)
