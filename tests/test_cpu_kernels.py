"""The CPU's own forms of operations against autodiff of the plain ones, and finite differences."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from vqgan_jax.models import cpu, cpu_tokens, operations
from vqgan_jax.models.target import planned_for
from vqgan_jax.models.transformer import gelu

PADDINGS = {
    "same": ((1, 1), (1, 1)),
    "none": ((0, 0), (0, 0)),
    "uneven": ((0, 1), (2, 0)),
}
SHAPES = [(2, 5, 7, 3, 4), (1, 8, 6, 2, 5), (3, 4, 4, 1, 1)]  # B, H, W, I, O


def normal(seed, shape, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def plain_convolution(x, kernel, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def plain_normalization(x, scale, bias, num_groups, epsilon):
    """By the definition, one group after the other."""
    groups = jnp.split(x, num_groups, axis=-1)
    normal = [
        (g - g.mean(axis=(1, 2, 3), keepdims=True))
        / jnp.sqrt(g.var(axis=(1, 2, 3), keepdims=True) + epsilon)
        for g in groups
    ]
    return jnp.concatenate(normal, axis=-1) * scale + bias


def gradients(function, *inputs):
    """Gradients of a weighted sum of the output, whose weights are no symmetry's."""
    output = jax.eval_shape(function, *inputs)
    weights = normal(99, output.shape, output.dtype)
    return jax.jit(
        jax.grad(lambda *inputs: jnp.sum(weights * function(*inputs)), tuple(range(len(inputs))))
    )(*inputs)


def assert_near(ours, theirs, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b))


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("size", [(3, 3), (4, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_a_large_convolution(float64, shape, size, padding):
    batch, height, width, channels, features = shape
    x, kernel = normal(0, (batch, height, width, channels)), normal(1, (*size, channels, features))
    ours = gradients(lambda x, k: cpu.convolve_large(x, k, padding), x, kernel)
    theirs = gradients(lambda x, k: plain_convolution(x, k, padding), x, kernel)
    assert_near(ours, theirs, 1e-13)


def test_finite_differences(float64):
    x, kernel, bias = normal(0, (2, 5, 3, 4)), normal(1, (3, 3, 4, 4)), normal(2, (4,))

    def network(x, kernel, scale, bias):
        x = cpu.add_bias(cpu.convolve_large(x, kernel, PADDINGS["uneven"]), bias)
        return jnp.sin(cpu.normalize_groups(x, scale, bias, 2, 1e-6))

    check_grads(jax.jit(network), (x, kernel, normal(3, (4,)), bias), order=1, modes=["rev"])


@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_group_normalization(float64, num_groups):
    x = 3.0 + normal(0, (2, 5, 7, 6))
    inputs = x, normal(1, (6,)), normal(2, (6,))

    def ours(*inputs):
        return cpu.normalize_groups(*inputs, num_groups, 1e-6)

    def theirs(*inputs):
        return plain_normalization(*inputs, num_groups, 1e-6)

    assert_near(jax.jit(ours)(*inputs), jax.jit(theirs)(*inputs), 1e-13)
    assert_near(gradients(ours, *inputs), gradients(theirs, *inputs), 1e-12)


def test_group_normalization_far_from_zero():
    """Float32 statistics keep their precision where the mean is 1,000 times the deviation."""
    x = np.random.default_rng(0).standard_normal((1, 64, 64, 4)) + 1000.0
    x = x.astype(np.float32)
    normalize = jax.jit(lambda *inputs: cpu.normalize_groups(*inputs, 2, 1e-6))
    ours = normalize(jnp.asarray(x), jnp.ones(4), jnp.zeros(4))
    with jax.enable_x64(True):
        exact = plain_normalization(jnp.asarray(x, np.float64), jnp.ones(4), jnp.zeros(4), 2, 1e-6)
    assert np.max(np.abs(np.asarray(ours, np.float64) - np.asarray(exact))) < 1e-3


def test_max_pooling(float64):
    """Few different values, so that most squares have ties; the odd edges get no gradient."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 7, 9, 4)), jnp.float64)

    def theirs(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    assert_near(operations.max_pool(x), theirs(x), 0)
    assert_near(gradients(operations.max_pool, x), gradients(theirs, x), 0)


def test_bfloat16():
    """Sums over many bfloat16 values are taken in float32: the error is one last rounding."""
    gradient = jnp.full((4, 33, 32, 8), 1.0 + 2.0**-7, jnp.bfloat16)
    _, pull = jax.vjp(cpu.add_bias, gradient, jnp.zeros(8, jnp.bfloat16))
    exact = 4 * 33 * 32 * (1.0 + 2.0**-7)
    np.testing.assert_allclose(np.asarray(pull(gradient)[1], np.float64), exact, rtol=2**-8)

    x, kernel = normal(0, (2, 9, 9, 4), jnp.bfloat16), normal(1, (3, 3, 4, 4), jnp.bfloat16)
    ours = gradients(lambda x, k: cpu.convolve_large(x, k, PADDINGS["same"]), x, kernel)
    wide = x.astype(jnp.float32), kernel.astype(jnp.float32)
    theirs = gradients(lambda x, k: plain_convolution(x, k, PADDINGS["same"]), *wide)
    theirs = jax.tree.map(lambda g: g.astype(jnp.bfloat16), theirs)
    assert_near(ours, theirs, 2**-6)


def test_a_split_batch_stays_where_it_is():
    """Eight devices: the gradients are one device's, and only sums over the batch travel."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    x, kernel = normal(0, (8, 6, 5, 4), np.float32), normal(1, (3, 3, 4, 8), np.float32)
    scale, bias = normal(2, (8,), np.float32), normal(3, (8,), np.float32)

    def loss(kernel, scale, bias, x):
        x = cpu.add_bias(cpu.convolve_large(x, kernel, PADDINGS["same"]), bias)
        return jnp.sum(jnp.sin(cpu.normalize_groups(x, scale, bias, 4, 1e-6)))

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
    one = jax.jit(gradient)(kernel, scale, bias, x)
    inputs = [jax.device_put(p, whole) for p in (kernel, scale, bias)]
    split = jax.jit(gradient, out_shardings=(whole, whole, whole, rows))
    program = split.lower(*inputs, jax.device_put(x, rows)).compile()
    assert_near(program(*inputs, jax.device_put(x, rows)), one, 1e-5)
    text = program.as_text()
    assert "all-reduce" in text
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in text


def test_the_forms_of_all_backends_agree(float64, monkeypatch):
    """What an accelerator would run gives what the CPU's forms give."""
    monkeypatch.setattr(cpu, "LARGE_MAP", 1)
    x, kernel, bias = normal(0, (2, 6, 5, 8)), normal(1, (3, 3, 8, 8)), normal(2, (8,))
    scale = normal(3, (8,))

    def network(x, kernel, scale, bias):
        x = operations.convolve(x, kernel, 1, PADDINGS["same"])
        x = operations.add_bias(x, bias)
        return operations.normalize_groups(x, scale, bias, 4, 1e-6)

    inputs = x, kernel, scale, bias
    ours = jax.jit(lambda *x: network(*x))(*inputs), gradients(network, *inputs)
    with planned_for("tpu"):
        theirs = jax.jit(lambda *x: network(*x))(*inputs), gradients(network, *inputs)
    assert_near(ours, theirs, 1e-12)


def plain_attention(query, key, value, num_unmasked):
    """By the definition, one head after the other."""
    length, heads, head_dim = query.shape[1:]
    mask = operations.causal_mask(length, num_unmasked)
    outputs = []
    for head in range(heads):
        theirs = head * key.shape[2] // heads
        logits = query[:, :, head] @ key[:, :, theirs].swapaxes(1, 2) / jnp.sqrt(head_dim)
        weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
        outputs.append(weights @ value[:, :, theirs])
    return jnp.stack(outputs, axis=2)


@pytest.mark.slow
@pytest.mark.parametrize("num_unmasked", [0, 3, 6], ids=lambda n: f"{n}-unmasked")
@pytest.mark.parametrize("length, heads, kv_heads", [(1, 2, 2), (4, 2, 2), (11, 4, 2), (8, 3, 1)])
def test_causal_attention(float64, monkeypatch, length, heads, kv_heads, num_unmasked):
    """Blocks of 4 queries: less than one, just one, an odd rest, two."""
    monkeypatch.setattr(cpu_tokens, "QUERIES", 4)
    query = normal(0, (2, length, heads, 6))
    key, value = (normal(i, (2, length, kv_heads, 6)) for i in (1, 2))

    def ours(*inputs):
        return cpu_tokens.attend(*inputs, num_unmasked)

    def theirs(*inputs):
        return plain_attention(*inputs, num_unmasked)

    assert_near(ours(query, key, value), theirs(query, key, value), 1e-14)
    inputs = query, key, value
    assert_near(gradients(ours, *inputs), gradients(theirs, *inputs), 1e-13)


def test_causal_attention_in_bfloat16():
    inputs = [normal(i, (2, 9, 4, 8), jnp.bfloat16) for i in range(3)]
    ours = jax.jit(lambda *inputs: cpu_tokens.attend(*inputs, 0))(*inputs)
    assert ours.dtype == jnp.bfloat16
    exact = plain_attention(*(x.astype(jnp.float32) for x in inputs), 0)
    assert_near(ours.astype(jnp.float32), exact, 1e-2)
    got = gradients(lambda *inputs: cpu_tokens.attend(*inputs, 0), *inputs)
    assert all(gradient.dtype == jnp.bfloat16 for gradient in got)


def test_token_normalization(float64):
    x, scale, bias = 3 + 2 * normal(0, (3, 5, 8)), normal(1, (8,)), normal(2, (8,))

    def plain(x, scale, bias):
        deviation = jnp.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        return (x - x.mean(axis=-1, keepdims=True)) / deviation * scale + bias

    def ours(*inputs):
        return cpu_tokens.normalize_tokens(*inputs, 1e-5)

    assert_near(ours(x, scale, bias), plain(x, scale, bias), 1e-14)
    assert_near(gradients(ours, x, scale, bias), gradients(plain, x, scale, bias), 1e-13)
    elsewhere = flax_normalization(x, scale, bias)
    assert_near(ours(x, scale, bias), elsewhere, 1e-14)


def flax_normalization(x, scale, bias):
    norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=x.dtype)
    return norm.apply({"params": {"scale": scale, "bias": bias}}, x)


def test_gelu(float64):
    x = jnp.linspace(-9, 9, 101)
    phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    np.testing.assert_allclose(gelu(x), x * phi, rtol=0, atol=1e-14)
    check_grads(gelu, (x,), order=1, modes=["rev"])
