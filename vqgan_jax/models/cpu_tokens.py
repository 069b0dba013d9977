"""Forms of a transformer's operations that XLA compiles well for the CPU; see `operations.py`.

What is slow there, and what these forms do instead:

- The gradient of a layer normalisation, left to autodiff, reads its operands again for every sum.
- Causal attention computes the whole square of logits and then hides half of it. Here queries go
  in blocks, each against the tokens that it may see.
- The gradient of a softmax sums over the square once more. The sum equals that of output times
  gradient ("FlashAttention-2", Dao 2023, section 3.1), which is much smaller.

All keep the precision of their operands, and statistics are in float32 at least.
"""

import functools

import jax
import jax.numpy as jnp

QUERIES = 128  # of a block; fewer waste less on hidden logits and make smaller products


# ---- Layer normalisation.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_tokens(x, scale, bias, epsilon: float) -> jax.Array:
    """As `operations.normalize_tokens`."""
    return _normalize_forward(x, scale, bias, epsilon)[0]


def _mean(x):
    """Over the last axis, as a product: faster than a sum, which is not vectorised along it."""
    ones = jnp.full((x.shape[-1], 1), 1.0 / x.shape[-1], x.dtype)
    mean = jnp.dot(x.reshape(-1, x.shape[-1]), ones, precision=jax.lax.Precision.HIGHEST)
    return mean.reshape(*x.shape[:-1], 1)


def _normalize_forward(x, scale, bias, epsilon):
    centered = x - _mean(x)
    deviation = jax.lax.rsqrt(_mean(jnp.square(centered)) + epsilon)
    normal = centered * deviation
    return normal * scale + bias, (normal, deviation, scale)


def _normalize_backward(epsilon, residuals, gradient):
    """With n the normalised x and g the gradient at n: deviation (g - mean(g) - n mean(g n))."""
    del epsilon
    normal, deviation, scale = residuals
    g = gradient * scale
    x_gradient = deviation * (g - _mean(g) - normal * _mean(g * normal))
    axes = tuple(range(gradient.ndim - 1))
    return x_gradient, (gradient * normal).sum(axes), gradient.sum(axes)


normalize_tokens.defvjp(_normalize_forward, _normalize_backward)


# ---- Causal attention.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(query, key, value, num_unmasked: int) -> jax.Array:
    """As `operations.attend`."""
    return _attend_forward(query, key, value, num_unmasked)[0]


def _blocks(length: int, num_unmasked: int) -> list[tuple[slice, slice]]:
    """Queries, and the tokens that at least one of them sees."""
    blocks = []
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        seen = max(end, num_unmasked) if start < num_unmasked else end
        blocks.append((slice(start, end), slice(0, min(seen, length))))
    return blocks


def _hidden(queries: slice, tokens: slice, num_unmasked: int) -> jax.Array:
    """`(queries, tokens)`: what a query does not see."""
    i = jnp.arange(queries.start, queries.stop)[:, None]
    j = jnp.arange(tokens.stop)
    return (j > i) & ~((i < num_unmasked) & (j < num_unmasked))


def _by_heads(x, groups: int):
    """`(B, T, n g, h)` -> `(B, n, g, T, h)`."""
    batch, length, heads, head_dim = x.shape
    return x.reshape(batch, length, heads // groups, groups, head_dim).transpose(0, 2, 3, 1, 4)


def _by_tokens(x):
    """`(B, n, g, T, h)` -> `(B, T, n g, h)`."""
    batch, heads, groups, length, head_dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads * groups, head_dim)


def _rows(x, queries: slice):
    """`(B, n, g, T, h)` -> `(B, n, g q, h)`: of the queries, all that share keys together."""
    batch, heads, groups, _, head_dim = x.shape
    return x[:, :, :, queries].reshape(batch, heads, -1, head_dim)


def _join(parts, groups: int):
    """The inverse of `_rows` over all blocks."""
    parts = [part.reshape(*part.shape[:2], groups, -1, part.shape[-1]) for part in parts]
    return jnp.concatenate(parts, axis=3)


def _attend_forward(query, key, value, num_unmasked):
    groups = query.shape[2] // key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    q = _by_heads(query * query.shape[-1] ** -0.5, groups)
    k, v = _by_heads(key, 1)[:, :, 0], _by_heads(value, 1)[:, :, 0]
    weights, outputs = [], []
    for queries, tokens in _blocks(query.shape[1], num_unmasked):
        logits = jnp.einsum(
            "b n q h, b n t h -> b n q t",
            _rows(q, queries),
            k[:, :, tokens],
            preferred_element_type=wide,
        )
        hidden = jnp.tile(_hidden(queries, tokens, num_unmasked), (groups, 1))
        logits = jnp.where(hidden, -jnp.inf, logits)
        weights.append(jax.nn.softmax(logits, axis=-1).astype(query.dtype))
        outputs.append(jnp.einsum("b n q t, b n t h -> b n q h", weights[-1], v[:, :, tokens]))
    output = _join(outputs, groups)
    return _by_tokens(output), (q, k, v, weights, output)


def _attend_backward(num_unmasked, residuals, gradient):
    q, k, v, weights, output = residuals
    groups, length, head_dim = q.shape[2:]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    gradient = _by_heads(gradient, groups)
    sums = jnp.sum((gradient * output).astype(wide), axis=-1, keepdims=True)
    q_parts, k_gradient, v_gradient = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for (queries, tokens), weight in zip(_blocks(length, num_unmasked), weights, strict=True):
        g = _rows(gradient, queries)
        slopes = jnp.einsum(
            "b n q h, b n t h -> b n q t", g, v[:, :, tokens], preferred_element_type=wide
        )
        slopes = (weight * (slopes - _rows(sums, queries))).astype(q.dtype)
        q_parts.append(jnp.einsum("b n q t, b n t h -> b n q h", slopes, k[:, :, tokens]))
        k_gradient = k_gradient.at[:, :, tokens].add(
            jnp.einsum("b n q t, b n q h -> b n t h", slopes, _rows(q, queries))
        )
        v_gradient = v_gradient.at[:, :, tokens].add(
            jnp.einsum("b n q t, b n q h -> b n t h", weight, g)
        )
    return (
        _by_tokens(_join(q_parts, groups)) * head_dim**-0.5,
        _by_tokens(k_gradient[:, :, None]),
        _by_tokens(v_gradient[:, :, None]),
    )


attend.defvjp(_attend_forward, _attend_backward)
