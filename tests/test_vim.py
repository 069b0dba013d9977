"""The transformers of vector-quantized image modeling: sizes, schedule, positions of a grid."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from vqgan_jax.configuration import ConfigError, transformer_config, validate
from vqgan_jax.models.orders import permutation
from vqgan_jax.models.transformer import Transformer
from vqgan_jax.sampling.decoding import step_logits
from vqgan_jax.training.learner import Learner, make_transformer
from vqgan_jax.training.optimizers import learning_rate_schedule

FILE = pathlib.Path(__file__).parent.parent / "configs" / "vim.py"
GRID = (3, 5)


def get_config(argument):
    spec = importlib.util.spec_from_file_location("vim", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def resolved(argument):
    """With what ImageNet and the paper's tokenizer would say."""
    config = get_config(argument)
    config.model.codebook_size, config.model.grid = 8192, (32, 32)
    config.condition.num_classes = 1000
    return config


@pytest.mark.parametrize(
    ("size", "layers", "heads", "width", "hidden", "matrices"),
    [
        ("base", 24, 16, 1536, 6144, 679_477_248),
        ("large", 36, 32, 2048, 8192, 1_811_939_328),
    ],
)
def test_parameter_counts(size, layers, heads, width, hidden, matrices):
    config = resolved(size)
    transformer = make_transformer(config)
    assert (transformer.num_layers, transformer.num_heads) == (layers, heads)
    assert (transformer.width, transformer.hidden) == (width, hidden)
    params = jax.eval_shape(Learner.from_config(config).init).params
    blocks = jax.tree_util.tree_leaves_with_path(params["blocks"])
    found = sum(leaf.size for path, leaf in blocks if path[-1].key == "kernel")
    assert found == matrices == layers * (4 * width * width + 2 * width * hidden)
    positions = params["grid_positions"]
    shapes = {name: leaf.shape for name, leaf in positions.items()}
    assert shapes == {"rows": (32, width), "columns": (32, width), "conditions": (1, width)}
    # Codes, classes and no class, positions, head; norms and biases are the rest.
    tables = (8192 + 1001 + 65 + 8192) * width
    rest = layers * (4 * width + 5 * width + hidden + 0) + 2 * width
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == matrices + tables + rest


@pytest.mark.parametrize("size", ["base", "large"])
def test_schedule_and_sampling_of_the_paper(size):
    config = get_config(size)
    validate(config)
    optimizer = config.optimizer
    schedule = learning_rate_schedule(optimizer, optimizer.learning_rate, config.training.num_steps)
    peak, end, first, last = 4.5e-4, 1e-5, 80_000, 450_000
    for step, expected in (
        (0, 0.0),
        (1_000, peak / 5),
        (5_000, peak),
        (first, peak),
        (265_000, np.sqrt(peak * end)),  # half of the way, by an exponential
        (last, end),
    ):
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.96, 1e-4)
    assert (config.training.batch_size, config.training.num_steps) == (1024, last)
    assert config.model.dropout == 0.1
    sampling = config.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
    assert sampling.guidance_scale == 1.0
    assert config.data.codes == "" and config.data.random_crop and config.data.random_flip


def test_arguments():
    assert get_config("base").condition.kinds == ("class",)
    assert get_config("base,classes=0").condition.kinds == ()
    earth = get_config("earth,tokenizer=runs/mine,codes=codes/mine")
    assert (earth.tokenizer.path, earth.data.codes) == ("runs/mine", "codes/mine")
    assert earth.data.name == "earth"
    with pytest.raises(ConfigError, match="'huge' must be one of base, large, earth"):
        get_config("huge")
    config = transformer_config()
    config.model.positions = "sine"
    with pytest.raises(ConfigError, match="one of learned, learned_2d, rotary"):
        validate(config)


# ---- Positions of rows and columns.


def tiny_transformer(**fields):
    fields = dict(num_conditions=2, positions="learned_2d", grid=GRID) | fields
    return Transformer(
        codebook_size=24,
        condition_size=6,
        max_length=0,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        width=16,
        hidden=32,
        **fields,
    )


def inputs(seed=0):
    random = np.random.default_rng(seed)
    conditions = random.integers(0, 6, (2, 2)).astype(np.int32)
    return conditions, random.integers(0, 24, (2, 15)).astype(np.int32)


def random_params(transformer):
    """Large enough that every part has a say."""
    shapes = jax.eval_shape(transformer.init, jax.random.key(0), *inputs())["params"]
    random = np.random.default_rng(1)

    def draw(path, leaf):
        values = 0.3 * random.standard_normal(leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("order", ["row_major", "random"])
def test_a_code_has_the_position_of_its_row_and_column(order):
    transformer = tiny_transformer(order=order)
    params, (conditions, codes) = random_params(transformer), inputs()
    found = tiny.run(transformer, {"params": params}, conditions, codes, method="embed_sequence")

    table = {name: np.asarray(leaf) for name, leaf in params["grid_positions"].items()}
    forward = np.arange(15) if order == "row_major" else permutation(order, *GRID).forward
    expected = np.empty((2, 16, 16), np.float32)
    for image in range(2):
        for n in range(2):
            embedding = params["condition_embedding"]["embedding"][conditions[image, n]]
            expected[image, n] = embedding + table["conditions"][n]
        for n in range(14):
            row, column = divmod(int(forward[n]), GRID[1])
            embedding = params["code_embedding"]["embedding"][codes[image, forward[n]]]
            expected[image, 2 + n] = embedding + table["rows"][row] + table["columns"][column]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ["row_major", "random"])
def test_cached_decoding_is_the_full_forward_pass(order):
    transformer = tiny_transformer(order=order)
    params, (conditions, codes) = random_params(transformer), inputs()
    apply = jax.jit(transformer.apply)
    full = apply({"params": params}, conditions, codes)
    cached = jax.jit(functools.partial(step_logits, transformer))(params, conditions, codes)
    np.testing.assert_allclose(cached, full, rtol=1e-5, atol=1e-5 * float(np.abs(full).max()))
    moved = dict(params["grid_positions"])
    moved["columns"] = moved["columns"].at[3].add(jnp.linspace(-1.0, 1.0, 16))
    other = apply({"params": params | {"grid_positions": moved}}, conditions, codes)
    places = np.arange(15) if order == "row_major" else permutation(order, *GRID).forward
    first = int(np.flatnonzero(np.asarray(places) % GRID[1] == 3)[0])
    changed = np.abs(other - full).max(axis=(0, 2))[np.asarray(places)] > 1e-4
    np.testing.assert_array_equal(changed, np.arange(15) > first)


def test_gradients_of_positions_are_sums_over_rows_and_columns():
    transformer = tiny_transformer()
    params, (conditions, codes) = random_params(transformer), inputs()
    weights = np.random.default_rng(3).standard_normal((2, 16, 16)).astype(np.float32)

    def total(positions):
        own = params | {"grid_positions": positions}
        tokens = transformer.apply({"params": own}, conditions, codes, method="embed_sequence")
        return jnp.sum(tokens * weights)

    gradients = jax.jit(jax.grad(total))(params["grid_positions"])
    by_place = np.zeros((15, 16))
    by_place[:14] = weights[:, 2:].sum(axis=0)
    by_place = by_place.reshape(*GRID, 16)
    np.testing.assert_allclose(gradients["rows"], by_place.sum(axis=1), atol=1e-4)
    np.testing.assert_allclose(gradients["columns"], by_place.sum(axis=0), atol=1e-4)
    np.testing.assert_allclose(gradients["conditions"], weights[:, :2].sum(axis=0), atol=1e-4)
