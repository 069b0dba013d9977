"""How likely given codes are."""

import jax
import jax.numpy as jnp

from vqgan_jax.models.transformer import Transformer


def log_likelihood(transformer: Transformer, params, conditions, codes) -> jax.Array:
    """The logarithm of each code's probability given those before it in the model's order.

    Args:
        transformer: the module.
        params: its parameters.
        conditions: `(B, num_conditions)` int.
        codes: `(B, N)` int, row by row.

    Returns:
        `(B, N)` float32 or wider, in nats, row by row; the sum over N is the sequence's.
    """
    logits = transformer.apply({"params": params}, conditions, codes)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], axis=-1)
    return chosen[..., 0]
