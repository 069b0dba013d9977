"""Gradient accumulation: one update from several micro-batches, in one compiled loop."""

from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp


def accumulate(
    micro_batch: Callable[[Any, Any, Any], tuple], carry: Any, params: Any, batch: Any, count: int
):
    """Mean gradients and metrics over `count` micro-batches of `batch`.

    Args:
        micro_batch: `(carry, inputs, index) -> (carry, gradients, metrics, outputs)`.
        carry: what goes from one micro-batch to the next, such as running statistics.
        params: a tree like the gradients.
        batch: a tree of arrays `(B, ...)`; micro-batch j has the rows j, j + count, ..., so that
            every device keeps its own rows.
        count: number of micro-batches; it divides B.

    Returns:
        What `micro_batch` returns, for the whole batch.
    """
    if count == 1:
        return micro_batch(carry, batch, 0)

    def body(state, inputs):
        carry, total = state
        carry, gradients, metrics, outputs = micro_batch(carry, *inputs)
        return (carry, jax.tree.map(jnp.add, total, gradients)), (metrics, outputs)

    micro_batches = jax.tree.map(
        lambda x: einops.rearrange(x, "(rows count) ... -> count rows ...", count=count), batch
    )
    (carry, total), (metrics, outputs) = jax.lax.scan(
        body, (carry, jax.tree.map(jnp.zeros_like, params)), (micro_batches, jnp.arange(count))
    )
    outputs = jax.tree.map(
        lambda x: einops.rearrange(x, "count rows ... -> (rows count) ..."), outputs
    )
    mean = jax.tree.map(lambda x: x / count, total)
    return carry, mean, jax.tree.map(lambda x: x.mean(axis=0), metrics), outputs
