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
    return jnp.where(_among_largest(logits, k), logits, -jnp.inf)


def _among_largest(x: jax.Array, k: int) -> jax.Array:
    """Whether a value is at least the k-th largest of its row, `(B, K)` bool.

    The bits of floats, negative ones inverted, have the order of the numbers. The k-th largest is
    found bit by bit from the highest, by counting: some thirty passes, where a sort needs hundreds.
    """
    bits = jax.lax.bitcast_convert_type(x + 0.0, f"uint{8 * x.dtype.itemsize}")  # -0 becomes 0
    one, highest = jnp.ones((), bits.dtype), 8 * x.dtype.itemsize - 1
    ordered = jnp.where(bits >> highest == one, ~bits, bits | (one << highest))

    def add_bit(i, threshold):
        larger = threshold | (one << (highest - i).astype(bits.dtype))
        enough = jnp.sum(ordered >= larger, axis=-1, keepdims=True) >= k
        return jnp.where(enough, larger, threshold)

    start = jnp.zeros((*x.shape[:-1], 1), bits.dtype)
    return ordered >= jax.lax.fori_loop(0, highest + 1, add_bit, start)


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
