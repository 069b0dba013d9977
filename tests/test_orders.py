"""Orders of codes: those of the reference, in the transformer, in drawing and in training."""

import functools
import hashlib
import json

import jax
import numpy as np
import pytest

import training_runs as runs
import transformer_runs as stage2
import vqgan_jax
from test_transformer import FORMS, random_params, tiny_transformer
from transformer_runs import assert_one_line, tiny_config
from vqgan_jax.configuration import ConfigError
from vqgan_jax.data.codes import open_codes
from vqgan_jax.errors import DataError
from vqgan_jax.inference.sample import sample
from vqgan_jax.models.orders import ORDERS, permutation
from vqgan_jax.sampling.decoding import sample_codes
from vqgan_jax.sampling.filters import Filters
from vqgan_jax.sampling.likelihood import log_likelihood
from vqgan_jax.training.learner import Learner
from vqgan_jax.training.transformer_setup import resolved
from vqgan_jax.training.transformer_step import objective

# ---- The orders.

# The reference's permuters on a grid of 4x4, as it prints them.
FOUR_BY_FOUR = {
    "row_major": "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
    "alternate": "0 1 2 3 7 6 5 4 8 9 10 11 15 14 13 12",
    "subsample": "0 2 8 10 1 3 9 11 4 6 12 14 5 7 13 15",
    "z_curve": "0 1 4 5 2 3 6 7 8 9 12 13 10 11 14 15",
    "spiral_out": "9 5 6 10 14 13 12 8 4 0 1 2 3 7 11 15",
    "spiral_in": "15 11 7 3 2 1 0 4 8 12 13 14 10 6 5 9",
    "random": "3 13 7 2 6 10 4 1 14 0 15 9 8 12 11 5",
}
# SHA-256 of the reference's int32 orders on larger grids.
DIGESTS = {
    ("alternate", 16, 16): "445b85d8f0e9",
    ("subsample", 16, 16): "2587b03d5501",
    ("z_curve", 16, 16): "822b22c8c0d5",
    ("spiral_out", 16, 16): "dcbc9d243462",
    ("spiral_in", 16, 16): "c1287eae40f5",
    ("random", 16, 16): "a9a9ad31a9a2",
    ("alternate", 4, 8): "b2b4bf7a0128",
    ("z_curve", 4, 8): "bcc30954aa30",
    ("random", 4, 8): "d1b7a88c46a3",
}


def test_every_order_is_tested():
    assert FOUR_BY_FOUR.keys() == ORDERS.keys()


@pytest.mark.parametrize("name", FOUR_BY_FOUR)
def test_small_orders_equal_those_of_the_reference(name):
    forward = permutation(name, 4, 4).forward
    assert " ".join(map(str, forward)) == FOUR_BY_FOUR[name]


@pytest.mark.parametrize(("name", "height", "width"), DIGESTS)
def test_large_orders_equal_those_of_the_reference(name, height, width):
    forward = permutation(name, height, width).forward
    assert forward.dtype == np.int32
    digest = hashlib.sha256(forward.astype("<i4").tobytes()).hexdigest()
    assert digest[:12] == DIGESTS[name, height, width]


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [
        *((name, 8, 8) for name in ORDERS),
        ("row_major", 3, 5),
        ("alternate", 3, 5),
        ("random", 3, 5),
        ("z_curve", 1, 2),
        ("spiral_out", 2, 2),
        ("spiral_in", 6, 6),
        ("subsample", 1, 1),
    ],
)
def test_the_inverse_undoes_the_order(name, height, width):
    forward, inverse = permutation(name, height, width)
    codes = np.random.default_rng(0).integers(1000, size=height * width)
    np.testing.assert_array_equal(codes[forward][inverse], codes)


@pytest.mark.parametrize(
    ("name", "height", "width", "message"),
    [
        ("subsample", 6, 6, "power of two"),
        ("subsample", 4, 8, "square"),
        ("z_curve", 3, 3, "power of two"),
        ("z_curve", 4, 2, "not 4 x 2"),
        ("z_curve", 2, 8, "not 2 x 8"),
        ("spiral_out", 5, 5, "even side"),
        ("spiral_in", 4, 8, "square grid"),
        ("row_major", 0, 4, "at least one row"),
        ("hilbert", 4, 4, "there are row_major, alternate"),
    ],
)
def test_orders_that_do_not_exist_are_errors(name, height, width, message):
    with pytest.raises(ValueError, match=message):
        permutation(name, height, width)


# ---- In the transformer: codes come and logits go row by row.


@functools.cache
def numbers(name):
    """The sequence of a grid of 4x4 as the reference prints it."""
    return np.array([int(number) for number in FOUR_BY_FOUR[name].split()])


@functools.cache
def model(order, form="reference", **fields):
    """A transformer over 4x4 codes, with parameters that do not depend on the order."""
    transformer = tiny_transformer(**FORMS[form] | {"grid": (4, 4), "order": order} | fields)
    conditions, codes = inputs()
    return transformer, random_params(transformer, conditions, codes)


def inputs(batch=2):
    random = np.random.default_rng(0)
    conditions = random.integers(0, 6, (batch, 1)).astype(np.int32)
    return conditions, random.integers(0, 24, (batch, 16)).astype(np.int32)


def logits(order, conditions, codes, *form, **fields):
    transformer, params = model(order, *form, **fields)
    return np.asarray(jax.jit(transformer.apply)({"params": params}, conditions, codes))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["z_curve", "spiral_in", "random"])
def test_learned_positions_are_those_of_the_sequence(order):
    """As in the reference: a model row by row, which is given the codes as the order has them."""
    conditions, codes = inputs()
    expected = logits("row_major", conditions, codes[:, numbers(order)])
    found = logits(order, conditions, codes)
    np.testing.assert_allclose(found[:, numbers(order)], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["spiral_out", "z_curve"])
def test_rotary_positions_are_those_of_the_grid(order):
    """Where all codes see each other, a token means the same in each order that has it.

    The logits at a place are made from the token of the place before it in the order. All orders
    here leave out the same one, which ends them.
    """
    conditions, codes = inputs()
    expected = logits("row_major", conditions, codes, "modern", num_unmasked=16)
    found = logits(order, conditions, codes, "modern", num_unmasked=16)
    sequence = numbers(order)
    assert sequence[-1] == 15
    np.testing.assert_allclose(found[:, sequence[1:]], expected[:, sequence[:-1] + 1], atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_code_depends_on_those_before_it_in_the_order(form):
    conditions, codes = inputs()
    changed = codes.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 24
    before, after = (logits("spiral_out", conditions, c, form) for c in (codes, changed))
    moved = np.abs(after - before).max(axis=(0, 2)) > 1e-4
    first, second, third, *others = numbers("spiral_out")  # 9, 5, 6, and then 10, ...
    assert third == 6 and not moved[[first, second, third]].any() and moved[others].all()


# ---- In drawing.


def drawn(order, filters, params=None, known=None, mask=None):
    transformer, own = model(order, "modern")
    conditions, _ = inputs()
    none = np.zeros((2, 16), np.int32)
    return np.asarray(
        jax.jit(functools.partial(sample_codes, transformer))(
            own if params is None else params,
            conditions,
            jax.random.key(7),
            np.arange(2),
            filters,
            none if known is None else known,
            none.astype(bool) if mask is None else mask,
        )
    )


def test_codes_are_drawn_in_the_order_and_known_ones_stay():
    conditions, codes = inputs()
    mask = np.random.default_rng(1).random(codes.shape) < 0.4
    found = drawn("spiral_in", Filters(temperature=0.0), known=codes, mask=mask)
    likeliest = np.argmax(logits("spiral_in", conditions, found, "modern"), axis=-1)
    np.testing.assert_array_equal(found, np.where(mask, codes, likeliest))
    other = drawn("row_major", Filters(temperature=0.0), known=codes, mask=mask)
    assert np.any(found != other)


def test_the_noise_of_a_code_is_that_of_its_place():
    """A model that knows nothing draws by noise alone, so that orders make no difference."""
    ignorant = jax.tree.map(np.zeros_like, model("row_major", "modern")[1])
    rows, spiral = (drawn(o, Filters(), params=ignorant) for o in ("row_major", "spiral_out"))
    np.testing.assert_array_equal(spiral, rows)
    assert len(np.unique(rows)) > 10


def test_likelihoods_of_all_sequences_add_up_to_one():
    """The last two codes of the order take all values; what is likely stands at their places."""
    transformer, params = model("spiral_in", "modern")
    conditions, codes = inputs(1)
    last, previous = numbers("spiral_in")[[-1, -2]]  # 9 and 5
    codes = np.repeat(codes, 24 * 24, axis=0)
    codes[:, previous], codes[:, last] = np.divmod(np.arange(24 * 24), 24)
    conditions = np.repeat(conditions, len(codes), axis=0)
    likelihood = jax.jit(functools.partial(log_likelihood, transformer))
    logs = np.asarray(likelihood(params, conditions, codes), np.float64)
    assert np.exp(logs[:, [previous, last]].sum(axis=1)).sum() == pytest.approx(1.0, rel=1e-5)
    others = np.delete(logs, [previous, last], axis=1)
    np.testing.assert_allclose(others, np.broadcast_to(others[:1], others.shape), atol=1e-5)


# ---- In training, and what it leads to.


def test_the_loss_is_that_of_the_codes_in_the_order(transformer_inputs):
    tokenizer = vqgan_jax.load(transformer_inputs.tokenizer)
    stored = [open_codes(transformer_inputs.codes / split) for split in stage2.COUNTS]
    plain = {
        "condition": {"dropout": 0.0},
        "sampling": {"guidance_scale": 1.0},
        "training": {"pkeep": 1.0},
    }

    def learner(order):
        config = tiny_config(model={"dropout": 0.0, "order": order}, **plain)
        return Learner.from_config(resolved(config, tokenizer, codes=stored))

    batch = stored[0].rows(np.arange(8))
    codes = np.asarray(batch["codes"], np.int32)
    params = random_params(learner("z_curve").transformer, np.zeros((1, 1), np.int32), codes[:1])
    keys = {"dropout": jax.random.key(0)}
    loss, _ = jax.jit(lambda params: objective(learner("z_curve"), params, batch, keys))(params)
    by_rows, sequence = learner("row_major"), codes[:, numbers("z_curve")]
    labels = by_rows.conditions.tokens(batch)
    scores = jax.jit(by_rows.transformer.apply)({"params": params}, labels, sequence)
    scores = np.asarray(scores, float)
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(scores, sequence[..., None], axis=-1).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def spiral_run(transformer_inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("spiral") / "run"
    steps = {"num_steps": 2, "evaluate_every": 2, "checkpoint_every": 2}
    config = tiny_config(model={"order": "spiral_out", "positions": "rotary"}, training=steps)
    figures = stage2.train_alone(config, workdir)
    return workdir, figures


@pytest.mark.slow
def test_a_run_keeps_its_order(spiral_run, transformer_inputs):
    workdir, figures = spiral_run
    generator = vqgan_jax.load(workdir)
    assert generator.config.model.order == "spiral_out"
    codes = open_codes(transformer_inputs.codes / "validation")
    logs = generator.log_likelihood(codes.gather(np.arange(11)), codes.labels)
    assert figures["bits_per_code"] == pytest.approx(-logs.mean() / np.log(2), rel=1e-5)
    assert generator.sample(num_samples=2, condition=0).shape == (2, 16, 16, 3)
    config = tiny_config(model={"order": "random", "positions": "rotary"})
    with pytest.raises(ValueError, match="model.order is spiral_out there and random here"):
        stage2.train_alone(config, workdir)


@pytest.mark.slow
def test_a_run_from_before_there_were_orders_is_row_major(spiral_run, tmp_path):
    """What an older checkpoint does not say is not another model."""
    workdir = runs.copy_until(spiral_run[0], tmp_path / "run", 2)
    for stored in (workdir / "config.json", workdir / "checkpoints" / "2" / "config" / "metadata"):
        config = json.loads(stored.read_text())
        del config["model"]["order"]
        stored.write_text(json.dumps(config))
    config = tiny_config(model={"order": "spiral_out", "positions": "rotary"})
    with pytest.raises(ValueError, match="model.order is row_major there and spiral_out here"):
        stage2.train_alone(config, workdir)
    assert vqgan_jax.load(workdir / "checkpoints" / "2").config.model.order == "row_major"


@pytest.mark.slow
def test_larger_images_need_rows(spiral_run, tmp_path):
    workdir, _ = spiral_run
    generator = vqgan_jax.load(workdir)
    for options in ({"width": 20}, {"on_progress": print}):
        with pytest.raises(ValueError) as error:
            generator.sample(num_samples=1, condition=0, **options)
        assert "needs a model of the order row_major; this" in assert_one_line(error)
    for options in ({"width": 20}, {"animate": True}):
        with pytest.raises(DataError) as error:
            sample(str(workdir), tmp_path / "output", 1, **options)
        assert "order of codes is spiral_out" in assert_one_line(error)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("hilbert", "config.model.order is 'hilbert'; it must be one of row_major, alternate"),
        ("subsample", "config.model.order: The order 'subsample' needs a square grid"),
    ],
)
def test_orders_that_cannot_be_are_one_line(transformer_inputs, tmp_path, order, words):
    config = tiny_config(model={"order": order})
    config.data.update(codes="")
    config.tokenizer.resolution = 24  # 6 x 6 codes
    with pytest.raises(ConfigError) as error:
        stage2.train_alone(config, tmp_path / "run")
    assert words in assert_one_line(error)
    assert not (tmp_path / "run").exists()
