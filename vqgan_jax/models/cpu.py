"""Forms of operations that XLA compiles well for the CPU; `operations.py` chooses them there.

Four things are slow on XLA's CPU backend, and the forms here go around them:

- A sum over positions is fused with all the elementwise work in front of it, which is then done
  again for every such sum, one value at a time. A matrix product with a row of ones is never fused,
  and reads memory in order.
- The gradient of a group normalisation, left to autodiff, makes more of these sums than it needs.
- The gradient of max pooling scatters value by value.
- The weight gradient of a convolution of a large map copies the whole map into another layout.

All keep the precision of their operands, and sums are in float32 at least.
"""

import functools

import einops
import jax
import jax.numpy as jnp

# The weight gradient goes row by row where a map has this many positions; below it, XLA's own form
# is the faster one. Two rows at a time keep the matrices of a step in the cache.
LARGE_MAP = 128 * 128
ROWS = 2


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sum_middle(x: jax.Array) -> jax.Array:
    """`(B, N, C)` -> `(B, C)`."""
    ones = jnp.ones((x.shape[0], 1, x.shape[1]), x.dtype)
    return jnp.matmul(ones, x, precision=jax.lax.Precision.HIGHEST)[:, 0]


def sum_positions(x: jax.Array) -> jax.Array:
    """`(B, H, W, C)` -> `(B, C)`, float32 or wider.

    Along each row first, then over the rows: two short sums round less than a long one. Channels
    stay the last axis, for the elementwise work that fills the product's operand is vectorised
    along it.
    """
    rows = _sum_middle(einops.rearrange(_wide(x), "b h w c -> (b h) w c"))
    return _sum_middle(einops.rearrange(rows, "(b h) c -> b h c", h=x.shape[1]))


# ---- Bias.


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`x + bias` for `(B, H, W, C)` and `(C,)`."""
    return x + bias


def _add_bias_forward(x, bias):
    return x + bias, None


def _add_bias_backward(_, gradient):
    return gradient, sum_positions(gradient).sum(axis=0).astype(gradient.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


# ---- Group normalisation.


def group_mean(per_channel, num_groups):
    """`(B, C)` -> `(B, C)`: every channel gets the mean of its group."""
    groups = einops.rearrange(per_channel, "b (g c) -> b g c", g=num_groups)
    mean = jnp.broadcast_to(groups.mean(axis=-1, keepdims=True), groups.shape)
    return einops.rearrange(mean, "b g c -> b (g c)")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize_groups(x, scale, bias, num_groups: int, epsilon: float) -> jax.Array:
    """As `operations.normalize_groups`."""
    return _normalize_forward(x, scale, bias, num_groups, epsilon)[0]


def _normalize_forward(x, scale, bias, num_groups, epsilon):
    positions = x.shape[1] * x.shape[2]
    mean = group_mean(sum_positions(x) / positions, num_groups)
    squares = jnp.square(x - mean[:, None, None])
    variance = group_mean(sum_positions(squares) / positions, num_groups)
    deviation = jax.lax.rsqrt(variance + epsilon)
    factor = scale * deviation
    shift = bias - mean * factor
    y = x * factor[:, None, None] + shift[:, None, None]
    return y, (x, scale, mean, deviation)


def _normalize_backward(num_groups, epsilon, residuals, gradient):
    """With n = (x - mean) deviation and g the gradient at n, the one at x is

    deviation (g - mean(g) - n mean(g n)), the means over a group; linear in `gradient` and x.
    """
    del epsilon
    x, scale, mean, deviation = residuals
    positions = x.shape[1] * x.shape[2]
    bias_sums = sum_positions(gradient)
    scale_sums = sum_positions(gradient * (x - mean[:, None, None])) * deviation
    mean_gradient = group_mean(scale * bias_sums, num_groups) / positions
    mean_product = group_mean(scale * scale_sums, num_groups) / positions
    factor = scale * deviation
    slope = -jnp.square(deviation) * mean_product
    shift = -deviation * mean_gradient - slope * mean
    x_gradient = gradient * factor[:, None, None] + x * slope[:, None, None] + shift[:, None, None]
    parameters = (scale_sums.sum(axis=0), bias_sums.sum(axis=0))
    return x_gradient, *(gradient.astype(scale.dtype) for gradient in parameters)


normalize_groups.defvjp(_normalize_forward, _normalize_backward)


# ---- Pooling.


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Maximum of 2x2 squares at stride 2: `(B, H, W, C)` -> `(B, H/2, W/2, C)`, H and W even.

    The gradient goes to the first of equal values, in the order of reading.
    """
    return _max_pool_forward(x)[0]


def _corners(x):
    return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


def _max_pool_forward(x):
    return functools.reduce(jnp.maximum, _corners(x)), x


def _max_pool_backward(x, gradient):
    corners = _corners(x)
    largest = functools.reduce(jnp.maximum, corners)
    taken = jnp.zeros(largest.shape, bool)
    parts = []
    for corner in corners:
        here = (corner == largest) & ~taken
        taken |= here
        parts.append(jnp.where(here, gradient, 0))
    squares = jnp.stack(parts, axis=3)
    return (einops.rearrange(squares, "b h w (i j) c -> b (h i) (w j) c", i=2),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


# ---- Convolution of large maps.


def _convolve(x, kernel, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_large(x: jax.Array, kernel: jax.Array, padding) -> jax.Array:
    """Convolution at stride 1 whose weight gradient is `weight_gradient`."""
    return _convolve(x, kernel, padding)


def _convolve_large_forward(x, kernel, padding):
    return _convolve(x, kernel, padding), (x, kernel)


def _convolve_large_backward(padding, residuals, gradient):
    x, kernel = residuals
    (x_gradient,) = jax.linear_transpose(lambda x: _convolve(x, kernel, padding), x)(gradient)
    kernel_gradient = weight_gradient(x, gradient, kernel.shape[:2], padding)
    return x_gradient, kernel_gradient.astype(kernel.dtype)


convolve_large.defvjp(_convolve_large_forward, _convolve_large_backward)


def weight_gradient(x, gradient, size: tuple[int, int], padding) -> jax.Array:
    """The gradient at the kernel `(*size, I, O)` of a convolution of `x` at stride 1.

    A sum over blocks of rows of (patches of x)^T (gradient), in float32 or wider. Blocks are of
    rows and not of images, so that a batch that is split over devices stays where it is.
    """
    rows, columns = size
    batch, height, width, features = gradient.shape
    channels = x.shape[-1]
    spare = -height % ROWS  # rows of zeros that fill the last block
    (top, bottom), sides = padding
    x = jnp.pad(x, ((0, 0), (top, bottom + spare), sides, (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), (0, spare), (0, 0), (0, 0)))

    def add_block(i, total):
        band = jax.lax.dynamic_slice_in_dim(x, i * ROWS, ROWS + rows - 1, axis=1)
        outputs = jax.lax.dynamic_slice_in_dim(gradient, i * ROWS, ROWS, axis=1)
        shifted = [
            band[:, r : r + ROWS, c : c + width] for r in range(rows) for c in range(columns)
        ]
        patches = jnp.concatenate(shifted, axis=-1).reshape(-1, rows * columns * channels)
        product = jnp.dot(
            patches.T, outputs.reshape(-1, features), preferred_element_type=total.dtype
        )
        return total + product

    dtype = jnp.promote_types(x.dtype, jnp.float32)
    total = jnp.zeros((rows * columns * channels, features), dtype)
    total = jax.lax.fori_loop(0, (height + spare) // ROWS, add_block, total)
    return total.reshape(rows, columns, channels, features)
