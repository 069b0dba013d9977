"""Causal self-attention over tokens, with the options of later systems, whole or a token at a time.

Sources: "Attention Is All You Need" (Vaswani et al. 2017); grouped queries: "GQA" (Ainslie et al.
2023); normalised queries and keys: "Scaling Vision Transformers to 22 Billion Parameters" (Dehghani
et al. 2023), section 2.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.layers import at_least_float32
from vqgan_jax.models.operations import attend, causal_mask, project
from vqgan_jax.models.positions import rotate


class Linear(nn.Module):
    """`x @ kernel + bias` over the last axis; kernels N(0, 0.02), biases 0, as GPT-2 has them."""

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def weights(self, width: int) -> tuple[jax.Array, jax.Array | None]:
        """Kernel `(width, features)` and bias, in the type of the computation."""
        init = nn.initializers.normal(0.02)
        kernel = self.param("kernel", init, (width, self.features)).astype(self.dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,)).astype(
            self.dtype
        )

    def __call__(self, x):
        return apply_linear([self], x)[0]


def apply_linear(layers: Sequence[Linear], x: jax.Array) -> list[jax.Array]:
    """What each of some layers of one type gives for the same `x`, `(..., D)`."""
    kernels, biases = zip(*(layer.weights(x.shape[-1]) for layer in layers), strict=True)
    products = project(x.astype(layers[0].dtype), kernels)
    return [y if bias is None else y + bias for y, bias in zip(products, biases, strict=True)]


class SelfAttention(nn.Module):
    """Multi-head attention in which a token sees those before it.

    Keys and values may have fewer heads than queries: each then serves several query heads.
    """

    num_heads: int
    num_kv_heads: int
    qk_norm: bool = False
    use_bias: bool = True
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, angles=None, num_unmasked: int = 0, cache=None, index=None, train=False):
        """Attends within `x`, or from one token to those in a cache.

        Args:
            x: `(B, T, D)`; with `index`, `(B, 1, D)`.
            angles: `(T, head_dim / 2)` of rotary positions, or None.
            num_unmasked: so many first tokens see each other in both directions.
            cache: keys and values `(B, num_kv_heads, limit, head_dim)` each, with `index`.
            index: of the token, whose key and value are written there; tokens after it are not
                seen.
            train: whether dropout is on.

        Returns:
            The output, like `x`; and keys and values: of all tokens, in the cache's layout, or the
            cache with the token written.
        """
        width = x.shape[-1]
        head_dim = width // self.num_heads

        heads = dict(query=self.num_heads, key=self.num_kv_heads, value=self.num_kv_heads)
        layers = [
            Linear(count * head_dim, self.use_bias, self.dtype, name=name)
            for name, count in heads.items()
        ]
        query, key, value = (
            y.reshape(*x.shape[:-1], -1, head_dim) for y in apply_linear(layers, x)
        )
        if self.qk_norm:
            query = nn.RMSNorm(dtype=self.dtype, name="query_norm")(query)
            key = nn.RMSNorm(dtype=self.dtype, name="key_norm")(key)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)

        keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if index is not None:
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=2)
                for old, new in zip(cache, (keys, values), strict=True)
            )
            y = attend_to_cache(query, keys, values, index)
        elif self.dropout > 0.0 and train:
            y = self._attend_with_dropout(query, key, value, num_unmasked)
        else:
            y = attend(query, key, value, num_unmasked)
        y = y.reshape(*x.shape[:-1], width)
        return Linear(width, self.use_bias, self.dtype, name="out")(y), (keys, values)

    def _attend_with_dropout(self, query, key, value, num_unmasked):
        repeats = self.num_heads // self.num_kv_heads
        key, value = key.repeat(repeats, axis=2), value.repeat(repeats, axis=2)
        logits = jnp.einsum("b q n h, b k n h -> b n q k", at_least_float32(query), key)
        logits *= query.shape[-1] ** -0.5
        logits = jnp.where(causal_mask(query.shape[1], num_unmasked), logits, -jnp.inf)
        weights = nn.Dropout(self.dropout)(jax.nn.softmax(logits, axis=-1), deterministic=False)
        # Without the barrier, the TPU's compiler crashes where blocks are computed again.
        weights = jax.lax.optimization_barrier(weights.astype(self.dtype))
        return jnp.einsum("b n q k, b k n h -> b q n h", weights, value)


def attend_to_cache(query, keys, values, index) -> jax.Array:
    """Attention from one token to the first `index + 1` tokens of a cache.

    Args:
        query: `(B, 1, num_heads, head_dim)`.
        keys: `(B, num_kv_heads, limit, head_dim)`.
        values: the same.
        index: of the token.

    Returns:
        `(B, 1, num_heads, head_dim)`.
    """
    batch, _, num_heads, head_dim = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    groups = query.reshape(batch, keys.shape[1], -1, head_dim)
    logits = jnp.einsum("b n g h, b n t h -> b n g t", groups, keys, preferred_element_type=wide)
    logits *= head_dim**-0.5
    logits = jnp.where(jnp.arange(keys.shape[2]) <= index, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    y = jnp.einsum("b n g t, b n t h -> b n g h", weights, values)
    return y.reshape(batch, 1, num_heads, head_dim)
