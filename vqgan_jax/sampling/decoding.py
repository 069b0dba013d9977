"""Decoding with a cache of keys and values, in one compiled program.

The cache's shape is fixed within a stretch of positions and grows from stretch to stretch, so that
early codes do not pay for attention to positions that nothing fills yet.
"""

import jax
import jax.numpy as jnp

from vqgan_jax.models.transformer import Block, Transformer, cast_kernels
from vqgan_jax.sampling.filters import Filters, draw
from vqgan_jax.sampling.guidance import guide

STRETCH = 64  # positions


def sample_codes(
    transformer: Transformer,
    params,
    conditions: jax.Array,
    key: jax.Array,
    indices: jax.Array,
    filters: Filters,
    known: jax.Array,
    known_mask: jax.Array,
    null_conditions: jax.Array | None = None,
    scales: jax.Array | None = None,
) -> jax.Array:
    """Codes drawn one after the other, each from the model's distribution given those before.

    They are drawn in the model's order, and given and returned row by row. The noise at a place of
    a sample depends on `key`, the sample's index and the place alone.

    Args:
        transformer: the module.
        params: its parameters.
        conditions: `(B, num_conditions)` int.
        key: the random key of all samples.
        indices: `(B,)` int, the samples' indices.
        filters: which codes may be drawn.
        known: `(B, N)` int, codes that are given.
        known_mask: `(B, N)` bool, where they are.
        null_conditions: as `conditions`, for guidance: what stands for no condition.
        scales: `(N,)`, the guidance scale of the first code that is drawn, the second, and so on;
            with `null_conditions`.

    Returns:
        `(B, N)` int32.
    """
    guided = null_conditions is not None
    if guided:
        conditions = jnp.concatenate([conditions, null_conditions])
    step = CachedStep(transformer, params)
    num_conditions, num_codes = conditions.shape[1], known.shape[1]
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    places = _places(transformer, num_codes)

    def choose(n, logits, codes):
        """Code number `n` of the sequence, and all codes with it in its place."""
        place = places[n]
        logits = guide(logits, scales[n]) if guided else logits
        drawn = draw(logits, filters, jax.vmap(lambda key: jax.random.fold_in(key, place))(keys))
        code = jnp.where(known_mask[:, place], known[:, place], drawn)
        return code, codes.at[:, place].set(code)

    def decode_one(n, carry):
        cache, logits, codes = carry
        code, codes = choose(n, logits, codes)
        logits, cache = step(cache, jnp.tile(code, 1 + guided), n)
        return cache, logits, codes

    logits, cache = step.prefill(conditions)
    carry = cache, logits, jnp.zeros(known.shape, jnp.int32)
    for first in range(0, num_codes - 1, STRETCH):
        last = min(first + STRETCH, num_codes - 1)
        cache, *rest = carry
        carry = step.grown(cache, num_conditions + last), *rest
        carry = jax.lax.fori_loop(first, last, decode_one, carry)
    _, logits, codes = carry
    return choose(num_codes - 1, logits, codes)[1]


def _places(transformer: Transformer, num_codes: int) -> jax.Array:
    """Where row by row each code of the sequence stands, `(num_codes,)`."""
    order = transformer.permutation()
    return jnp.arange(num_codes) if order is None else jnp.asarray(order.forward)


def step_logits(transformer: Transformer, params, conditions, codes) -> jax.Array:
    """The logits that cached decoding sees when it is led along `codes`: `(B, N, K)`.

    The same numbers as the full forward pass gives, one position at a time; both row by row.
    """
    step = CachedStep(transformer, params)
    num_conditions, num_codes = conditions.shape[1], codes.shape[1]
    logits, cache = step.prefill(conditions)
    cache = step.grown(cache, num_conditions + num_codes)
    places = _places(transformer, num_codes)

    def along(cache, n):
        logits, cache = step(cache, codes[:, places[n]], n)
        return cache, logits

    _, rest = jax.lax.scan(along, cache, jnp.arange(num_codes - 1))
    in_order = jnp.concatenate([logits[:, None], rest.swapaxes(0, 1)], axis=1)
    return jnp.zeros_like(in_order).at[:, places].set(in_order)


class CachedStep:
    """A transformer one token at a time; its cache is `(keys, values)` of each layer.

    Layers are apart, not in a loop over stacked arrays: then a step changes one token of each array
    in place, where a loop would copy all of them.
    """

    def __init__(self, transformer: Transformer, params, layers=None):
        """Takes a step's parameters apart; or what another step has as `params` and `layers`."""
        if layers is None:
            # Matrices are read from memory at every step: once in the type they are used in.
            params = cast_kernels(params, transformer.dtype)
            leaves, structure = jax.tree.flatten(params["blocks"])
            layers = [
                structure.unflatten([leaf[i] for leaf in leaves])
                for i in range(transformer.num_layers)
            ]
        self.params, self.layers = params, layers
        self._transformer = transformer
        self._angles = transformer.angles()

    def _apply(self, *arguments, method):
        return self._transformer.apply({"params": self.params}, *arguments, method=method)

    def prefill(self, conditions):
        """`(B, num_conditions)` -> logits of the first code `(B, K)`, and the cache."""
        logits, (keys, values) = self._apply(conditions, method="prefill")
        return logits, [(keys[i], values[i]) for i in range(len(self.layers))]

    def grown(self, cache, length):
        """The cache with room for `length` tokens."""

        def grow(leaf):
            return jnp.pad(leaf, ((0, 0), (0, 0), (0, length - leaf.shape[2]), (0, 0)))

        return jax.tree.map(grow, cache)

    def __call__(self, cache, code, n):
        """Takes in code number `n` of the sequence, `(B,)`; logits of the next `(B, K)`, cache."""
        index = self._transformer.num_conditions + n
        angles = None
        if self._angles is not None:
            angles = jax.lax.dynamic_slice_in_dim(jnp.asarray(self._angles), index, 1)
        block = Block(**self._transformer.block_fields())
        x = self._apply(code[:, None], n, method="embed_codes")
        moved = []
        for layer, old in zip(self.layers, cache, strict=True):
            x, new = block.apply({"params": layer}, x, angles, old, index)
            moved.append(new)
        return self._apply(x[:, 0], method="logits"), moved
