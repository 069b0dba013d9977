"""The transformer: sizes that are published, causality, cached decoding, options, FLOPs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tiny
from vqgan_jax.models.operations import attend
from vqgan_jax.models.positions import rotary_angles, rotate
from vqgan_jax.models.transformer import Transformer
from vqgan_jax.sampling.decoding import step_logits
from vqgan_jax.sampling.guidance import guide
from vqgan_jax.sampling.likelihood import log_likelihood
from vqgan_jax.training.hardware import forward_flops

GRID = (3, 5)
REFERENCE = dict(num_kv_heads=4, hidden=128)
MODERN = dict(
    num_kv_heads=2,
    hidden=96,
    norm="rms",
    feed_forward="swiglu",
    positions="rotary",
    qk_norm=True,
    use_bias=False,
)
FORMS = {"reference": REFERENCE, "modern": MODERN}


def tiny_transformer(**fields):
    fields = dict(condition_size=6, num_conditions=1, num_heads=4, width=32, grid=GRID) | fields
    return Transformer(codebook_size=24, max_length=20, num_layers=3, **fields)


def inputs(batch=2, num_conditions=1, seed=0):
    random = np.random.default_rng(seed)
    conditions = random.integers(0, 6, (batch, num_conditions)).astype(np.int32)
    return conditions, random.integers(0, 24, (batch, 15)).astype(np.int32)


def random_params(transformer, conditions, codes):
    """Parameters that are not small, so that every part has a say."""
    shapes = jax.eval_shape(transformer.init, jax.random.key(0), conditions, codes)["params"]
    random = np.random.default_rng(1)

    def draw(path, leaf):
        values = 0.2 * random.standard_normal(leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((1024, 256, 24, 16, 1664), 801.8e6),  # FFHQ, CelebA-HQ
        ((16384, 256, 48, 24, 1536), 1410.6e6),  # class-conditional ImageNet
        ((1024, 512, 24, 16, 1024), 304.9e6),  # S-FLCKR
    ],
    ids=["faces", "imagenet", "sflckr"],
)
def test_parameter_counts_of_the_reference(shape, count):
    size, length, layers, heads, width = shape
    transformer = Transformer(
        codebook_size=size,
        grid=(16, 16),
        num_conditions=1,
        condition_size=0,
        max_length=length,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        width=width,
        hidden=4 * width,
    )
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(transformer.init, jax.random.key(0), tokens, tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == pytest.approx(count, abs=5e4)


@pytest.mark.parametrize("form", FORMS)
def test_a_code_depends_on_those_before_it_only(form):
    transformer = tiny_transformer(**FORMS[form])
    conditions, codes = inputs()
    params = random_params(transformer, conditions, codes)
    apply = jax.jit(transformer.apply)
    before = apply({"params": params}, conditions, codes)
    changed = codes.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 24
    after = apply({"params": params}, conditions, changed)
    np.testing.assert_allclose(after[:, :8], before[:, :8], atol=1e-5)
    assert np.all(np.abs(after - before)[:, 8:].max(axis=-1) > 1e-4)
    other = apply({"params": params}, (conditions + 1) % 6, codes)
    assert np.all(np.abs(other - before).max(axis=-1) > 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize(
    ("num_conditions", "order"), [(1, "row_major"), (4, "row_major"), (4, "random")]
)
@pytest.mark.parametrize("form", FORMS)
def test_cached_decoding_is_the_full_forward_pass(form, num_conditions, order, guided):
    unmasked = num_conditions if num_conditions > 1 else 0
    transformer = tiny_transformer(
        **FORMS[form], num_conditions=num_conditions, num_unmasked=unmasked, order=order
    )
    conditions, codes = inputs(num_conditions=num_conditions)
    params = random_params(transformer, conditions, codes)
    if guided:
        conditions = np.concatenate([conditions, np.full_like(conditions, 5)])
        codes = np.concatenate([codes, codes])
    full = tiny.run(transformer, {"params": params}, conditions, codes)
    cached = jax.jit(functools.partial(step_logits, transformer))(params, conditions, codes)
    if guided:
        full, cached = guide(full, 3.0), guide(cached, 3.0)
    assert full.shape == (2, 15, 24)
    np.testing.assert_allclose(cached, full, rtol=1e-5, atol=1e-5 * float(np.abs(full).max()))


def test_cached_decoding_on_eight_devices():
    transformer = tiny_transformer(**MODERN)
    conditions, codes = inputs(batch=8)
    params = random_params(transformer, conditions, codes)
    full = tiny.run(transformer, {"params": params}, conditions, codes)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    decode = jax.jit(functools.partial(step_logits, transformer), out_shardings=rows)
    arguments = jax.device_put((params, conditions, codes), (whole, rows, rows))
    program = decode.lower(*arguments).compile()
    np.testing.assert_allclose(
        program(*arguments), full, rtol=1e-5, atol=1e-5 * float(np.abs(full).max())
    )
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in program.as_text()


def test_the_first_tokens_may_see_each_other():
    """With four condition tokens unmasked, the first sees the last; masked, it does not."""
    conditions, codes = inputs(num_conditions=4)
    changed = conditions.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 6
    for unmasked in (0, 4):
        transformer = tiny_transformer(**REFERENCE, num_conditions=4, num_unmasked=unmasked)
        params = random_params(transformer, conditions, codes)
        keys = []
        for tokens in (conditions, changed):
            _, (key, _) = tiny.run(transformer, {"params": params}, tokens, method="prefill")
            keys.append(key[1, :, :, 0])  # the second layer's, of the first token
        assert np.allclose(*keys, atol=1e-6) == (unmasked == 0)


def test_grouped_queries_are_repeated_keys():
    random = np.random.default_rng(0)
    query = jnp.asarray(random.standard_normal((2, 6, 4, 8)), jnp.float32)
    key, value = (jnp.asarray(random.standard_normal((2, 6, 2, 8)), jnp.float32) for _ in "kv")
    ours = jax.jit(lambda *x: attend(*x))(query, key, value)
    keys, values = (np.repeat(np.asarray(x, np.float64), 2, axis=2) for x in (key, value))
    logits = np.einsum("bqnh,bknh->bnqk", np.asarray(query, np.float64), keys) / np.sqrt(8)
    logits = np.where(np.tril(np.ones((6, 6), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(ours, np.einsum("bnqk,bknh->bqnh", weights, values), atol=1e-5)


def test_rotary_positions_are_relative_in_both_directions():
    """The product of a query and a key depends on the difference of their rows and columns."""
    angles = rotary_angles((4, 6), [(1,)], 16)
    assert angles.shape == (25, 8) and not angles[0].any()
    random = np.random.default_rng(0)
    query, key = (
        jnp.broadcast_to(jnp.asarray(random.standard_normal(16), jnp.float32), (1, 25, 1, 16))
        for _ in range(2)
    )
    products = jnp.einsum("btnh,bsnh->ts", rotate(query, angles), rotate(key, angles))
    at = np.asarray(products)[1:, 1:].reshape(4, 6, 4, 6)
    np.testing.assert_allclose(at[1, 2, 0, 4], at[3, 1, 2, 3], rtol=1e-4)
    np.testing.assert_allclose(at[2, 2, 1, 1], at[3, 5, 2, 4], rtol=1e-4)
    assert abs(at[1, 2, 0, 4] - at[1, 2, 0, 3]) > 1e-3
    with pytest.raises(ValueError, match="multiple of 4 channels, not 6"):
        rotary_angles((2, 2), [(1,)], 6)


@pytest.mark.slow
def test_recomputed_and_unrolled_layers_give_the_same_gradients():
    conditions, codes = inputs()
    gradients = []
    kept = {"remat": True, "remat_keeps": "products"}
    for options in ({}, {"remat": True}, kept, {"unroll": 3}):
        transformer = tiny_transformer(**MODERN, **options)
        params = random_params(transformer, conditions, codes)

        def loss(params, transformer=transformer):
            return -log_likelihood(transformer, params, conditions, codes).mean()

        gradients.append(jax.jit(jax.grad(loss))(params))
    for other in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients[0], other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedding_dropout", "dropout", "attention_dropout"])
def test_dropout_is_of_training_only(name):
    transformer = tiny_transformer(**REFERENCE, **{name: 0.5})
    conditions, codes = inputs()
    params = random_params(transformer, conditions, codes)

    def logits(train, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return transformer.apply({"params": params}, conditions, codes, train=train, rngs=rngs)

    np.testing.assert_array_equal(logits(False, 0), logits(False, 1))
    assert np.abs(logits(True, 0) - logits(True, 1)).max() > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_flops_are_those_of_the_unrolled_program(form):
    """A loop's body counts once in the compiler's analysis, so layers are unrolled for it."""
    conditions, codes = inputs(batch=1)
    wide = FORMS[form] | dict(width=256, hidden=768)

    def counted(**options):
        transformer = tiny_transformer(**wide, **options)
        variables = jax.eval_shape(transformer.init, jax.random.key(0), conditions, codes)
        program = jax.jit(transformer.apply).lower(variables, conditions, codes).compile()
        return transformer, program.cost_analysis()["flops"]

    transformer, unrolled = counted(unroll=3)
    assert unrolled == pytest.approx(forward_flops(transformer, 15), rel=0.05)
    assert counted()[1] < 0.5 * unrolled
