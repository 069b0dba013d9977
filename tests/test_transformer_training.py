"""Stage 2 by the `train` command: data, updates, going on, many devices, and what it refuses."""

import dataclasses
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import training_runs as runs
import transformer_runs as stage2
import vqgan_jax
from transformer_runs import CODEBOOK, CONFIG, GRID, assert_one_line, tiny_config
from vqgan_jax.configuration import ConfigError
from vqgan_jax.data.codes import open_codes
from vqgan_jax.errors import DataError
from vqgan_jax.metrics.baselines import code_frequency_bits, left_neighbour_bits
from vqgan_jax.training.checkpoints import CheckpointError, read_variables
from vqgan_jax.training.learner import Learner
from vqgan_jax.training.loop import train
from vqgan_jax.training.sharding import make_mesh
from vqgan_jax.training.transformer_setup import resolved
from vqgan_jax.training.transformer_stage import TransformerStage
from vqgan_jax.training.transformer_step import objective, transformer_step

LAST = 10
NUM_CODES = math.prod(GRID)


def open_stage(config, workdir):
    return TransformerStage(config, make_mesh(config.mesh, jax.devices()[:1]), workdir)


# ---- Data: codes from disk, or of images by the frozen tokenizer.


def test_codes_of_both_ways_are_those_of_the_tokenizer(transformer_inputs, tmp_path):
    tokenizer = vqgan_jax.load(transformer_inputs.tokenizer)
    images = stage2.images_of(transformer_inputs.images / "train")
    expected = np.asarray(tokenizer.encode(images)).reshape(64, NUM_CODES)
    assert len(np.unique(expected)) > 15 and len(np.unique(expected, axis=0)) == 64
    flipped = np.asarray(tokenizer.encode(images[:, :, ::-1])).reshape(64, NUM_CODES)

    stage = open_stage(stage2.from_images(tiny_config()), tmp_path)
    batches = stage.batches(0)
    seen, labels = [], []
    for _ in range(64 // 8):
        batch = next(batches)
        codes = np.asarray(stage._tokens_of(batch)["codes"])
        pixels = np.asarray(batch["image"]) / np.float32(127.5) - 1
        np.testing.assert_array_equal(codes, tokenizer.encode(pixels).reshape(8, NUM_CODES))
        seen += [row.tobytes() for row in codes.astype(np.int32)]
        labels += np.asarray(batch["label"]).tolist()
    batches.close()
    rows = [row.tobytes() for row in expected]
    assert sorted(seen) == sorted(rows)
    assert [rows.index(row) for row in seen] != list(range(64))
    assert labels == [
        open_codes(transformer_inputs.codes / "train").labels[rows.index(row)] for row in seen
    ]

    stage = open_stage(tiny_config(), tmp_path)
    batches = stage.batches(0)
    allowed = {row.tobytes() for row in np.concatenate([expected, flipped])}
    for _ in range(8):
        codes = np.asarray(stage._tokens_of(next(batches))["codes"])
        assert {row.tobytes() for row in codes} <= allowed
    batches.close()


@pytest.mark.slow
def test_both_ways_have_one_evaluation(transformer_inputs, tmp_path):
    """And from images too a run goes on as if it had not been stopped."""
    config = tiny_config(training={"num_steps": 4, "evaluate_every": 2})
    stage2.train_alone(stage2.from_images(config.copy_and_resolve_references()), tmp_path / "a")
    runs.copy_until(tmp_path / "a", tmp_path / "b", 2)
    stage2.train_alone(stage2.from_images(config.copy_and_resolve_references()), tmp_path / "b")
    runs.assert_same_run(tmp_path / "b", tmp_path / "a", 4)

    params = {"params": read_variables(tmp_path / "a")[1]["params"]}
    figures = []
    for settings in (config, stage2.from_images(config.copy_and_resolve_references())):
        stage = open_stage(settings, tmp_path / "a")
        state = dataclasses.replace(
            stage.init(None), params=params["params"], ema_params=params["params"]
        )
        figures.append(stage.evaluate(state))
    from_codes, from_images = figures
    assert from_codes["images"] == from_images["images"] == 11
    assert from_images["bits_per_code"] == pytest.approx(from_codes["bits_per_code"], rel=1e-5)
    assert from_codes.keys() - from_images.keys() == {"code_frequency_bits", "left_neighbour_bits"}


def test_figures_of_an_evaluation(transformer_run, transformer_inputs):
    """Bits per code are those of `Generator.log_likelihood`; beside them the simple models'."""
    figures = runs.metrics(transformer_run)[-1]
    train, validation = (open_codes(transformer_inputs.codes / s) for s in stage2.COUNTS)
    codes = validation.gather(np.arange(11))
    logs = vqgan_jax.load(transformer_run).log_likelihood(codes, validation.labels)
    assert figures["validation/images"] == 11
    assert figures["validation/bits_per_code"] == pytest.approx(-logs.mean() / np.log(2), rel=1e-5)
    assert figures["validation/perplexity"] == pytest.approx(np.exp(-logs.mean()), rel=1e-5)
    seen = train.gather(np.arange(64))
    for name, expected in (
        ("code_frequency_bits", code_frequency_bits(seen, codes, CODEBOOK)),
        ("left_neighbour_bits", left_neighbour_bits(seen, codes, CODEBOOK, GRID[1])),
    ):
        assert figures[f"validation/{name}"] == pytest.approx(expected)
    picture = transformer_run / "images" / f"samples_{LAST:08}.png"
    assert picture.stat().st_size > 1000


# ---- The update.


@pytest.fixture
def learner(transformer_inputs):
    """`learner(**sections)`: that of the tiny config with some keys changed."""
    tokenizer = vqgan_jax.load(transformer_inputs.tokenizer)
    codes = [open_codes(transformer_inputs.codes / split) for split in stage2.COUNTS]

    def make(dtype="float32", **sections):
        return Learner.from_config(resolved(tiny_config(dtype, **sections), tokenizer, codes=codes))

    return make


def initial(learner):
    return jax.jit(learner.init)()


PLAIN = {
    "model": {"dropout": 0.0},
    "condition": {"dropout": 0.0},
    "sampling": {"guidance_scale": 1.0},
    "training": {"pkeep": 1.0},
}
MODERN = dict(norm="rms", feed_forward="swiglu", positions="rotary", qk_norm=True, use_bias=False)


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, MODERN], ids=["reference", "modern"])
def test_only_matrices_decay(learner, form):
    """With no gradient, what moves does so by the learning rate times the decay."""
    learner = learner(model=form)
    params = jax.tree.map(jnp.ones_like, initial(learner).params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = learner.optimizer.update(zeros, learner.optimizer.init(params), params)
    updates, shapes = runs.tiny.leaves(updates), runs.tiny.leaves(params)
    decayed = {name for name, update in updates.items() if np.any(update)}
    matrices = ("query", "key", "value", "out", "up", "down", "gate", "head")
    assert {name.split("/")[-2] for name in decayed} >= {*matrices} - ({"gate"} - {*str(form)})
    assert decayed == {name for name in shapes if name.endswith("/kernel")}
    for name in decayed:
        np.testing.assert_allclose(updates[name], -3e-3 * 0.05, rtol=1e-5)
    others = shapes.keys() - decayed
    kinds = {name.split("/")[-1] for name in others}
    assert kinds >= {"embedding", "scale"}
    if not form:
        assert kinds == {"embedding", "scale", "bias", "position_embedding"}


def copying_params(learner):
    """Parameters by which the likeliest code is the one before, and first the class plus 1.

    Nothing comes from the blocks; tokens are unit vectors, and so are the rows of the head.
    """
    params = initial(learner).params
    params["blocks"] = jax.tree.map(jnp.zeros_like, params["blocks"])
    params["code_embedding"]["embedding"] = jnp.eye(CODEBOOK, 32)
    classes = jnp.asarray([1, 2, 3, 0])  # the last for no class
    params["condition_embedding"]["embedding"] = jnp.eye(CODEBOOK, 32)[classes]
    params["head"]["kernel"] = jnp.eye(32, CODEBOOK)
    return params


def accuracy(learner, seed, count=4000):
    labels = np.arange(count, dtype=np.int32) % 3
    codes = np.broadcast_to(labels[:, None] + 1, (count, NUM_CODES))
    keys = dict(
        zip(
            ("dropout", "corruption", "condition"),
            jax.random.split(jax.random.key(seed), 3),
            strict=True,
        )
    )
    batch = {"codes": codes, "label": labels}
    _, metrics = jax.jit(lambda params: objective(learner, params, batch, keys))(
        copying_params(learner)
    )
    return float(metrics["accuracy"])


def test_inputs_are_corrupted_and_targets_are_not(learner):
    """Each code is the one before it, so it is foretold where that one was seen as it is."""
    plain = PLAIN | {"training": {"pkeep": 0.7}}
    right = 0.7 + 0.3 / CODEBOOK  # a random code may be the right one; the class is always seen
    expected = (1 + (NUM_CODES - 1) * right) / NUM_CODES
    assert accuracy(learner(**plain), 0) == pytest.approx(expected, abs=0.006)
    assert accuracy(learner(**PLAIN), 0) == 1.0


@pytest.mark.slow
def test_classes_are_left_out(learner):
    settings = PLAIN | {"condition": {"dropout": 0.25}}
    expected = (NUM_CODES - 0.25) / NUM_CODES  # without its class, the first code is not foretold
    assert accuracy(learner(**settings), 0) == pytest.approx(expected, abs=0.002)


def batch_of_codes(size=8):
    random = np.random.default_rng(0)
    codes = random.integers(0, CODEBOOK, (size, NUM_CODES)).astype(np.int32)
    return {"codes": codes, "label": np.arange(size, dtype=np.int32) % 3}


def test_moving_average(learner):
    learner = learner(optimizer={"ema_decay": 0.3})
    step = jax.jit(lambda state: transformer_step(learner, state, batch_of_codes())[0])
    first = initial(learner)
    second = step(first)
    third = step(second)
    for before, after, decay in ((first, second, 1 / 10), (second, third, 2 / 11)):
        jax.tree.map(
            lambda old, new, found, decay=decay: np.testing.assert_allclose(
                found, decay * old + (1 - decay) * new, rtol=1e-5, atol=1e-7
            ),
            before.ema_params,
            after.params,
            after.ema_params,
        )
        assert after.inference_params is after.ema_params
    later = step(third.replace(step=jnp.asarray(1000)))
    expected = 0.3 * np.asarray(third.ema_params["head"]["kernel"])
    expected += 0.7 * np.asarray(later.params["head"]["kernel"])
    np.testing.assert_allclose(later.ema_params["head"]["kernel"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_batch(float64, learner):
    states = []
    for count in (1, 4):
        settings = PLAIN | {"optimizer": {"accumulate": count, "eps": 1e-3}}
        own = learner("float64", **settings)
        states.append(
            jax.jit(lambda own=own: transformer_step(own, own.init(), batch_of_codes()))()
        )
    (whole, metrics), (parts, metrics_of_parts) = states
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_of_parts[name], value, rtol=1e-5, err_msg=name)
    ours, theirs = runs.tiny.leaves(parts.params), runs.tiny.leaves(whole.params)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-6, err_msg=name)


# ---- Going on.


@pytest.mark.slow
def test_killed_run_goes_on(transformer_run, tmp_path):
    process = runs.start(tmp_path / "run", config=CONFIG)
    runs.wait_for_step(process, tmp_path / "run", 5)
    process.kill()
    runs.finish(process)
    assert runs.steps(tmp_path / "run")[-1] < LAST
    output, _ = runs.run(tmp_path / "run", config=CONFIG)
    assert "Going on from step" in output
    runs.assert_same_run(tmp_path / "run", transformer_run, LAST)


@pytest.mark.slow
def test_run_keeps_its_tokenizer(transformer_run, transformer_inputs, tmp_path):
    """It goes on, and is loaded, when the tokenizer it was begun with is gone."""
    away = tmp_path / "inputs"
    shutil.copytree(transformer_inputs.directory, away)
    config = tiny_config(tokenizer={"path": str(away / "tokenizer")}, training={"num_steps": 4})
    stage2.train_alone(config, tmp_path / "run")
    shutil.rmtree(away)
    config.training.num_steps = 6
    stage2.train_alone(config, tmp_path / "run")
    generator = vqgan_jax.load(tmp_path / "run")
    known = vqgan_jax.load(transformer_inputs.tokenizer)
    assert generator.tokenizer.fingerprint == known.fingerprint
    images = generator.sample(num_samples=2, condition=0)
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8


@pytest.mark.slow
def test_another_tokenizer_is_refused(transformer_run, transformer_inputs, tmp_path):
    """A run that cannot begin leaves nothing behind, and one that has begun stays as it is."""
    other = tmp_path / "other"
    stage2.export_tokenizer(other, stage2.images_of(transformer_inputs.images / "train"), seed=1)
    config = tiny_config(tokenizer={"path": str(other)}, training={"num_steps": 2})
    with pytest.raises(DataError) as error:
        stage2.train_alone(config, tmp_path / "run")
    assert "codes of another tokenizer" in assert_one_line(error)
    assert not (tmp_path / "run").exists()

    workdir = runs.copy_until(transformer_run, tmp_path / "begun", 4)
    before = runs.fingerprint(workdir)
    with pytest.raises(ConfigError) as error:
        stage2.train_alone(stage2.from_images(config), workdir)
    assert "another tokenizer than that of the run" in assert_one_line(error)
    assert runs.fingerprint(workdir) == before
    config = tiny_config(tokenizer={"path": str(transformer_inputs.tokenizer) + "/."})
    stage2.train_alone(config, workdir)  # the same tokenizer under another path
    assert runs.steps(workdir)[-1] == LAST


# ---- Several devices and processes.


@pytest.mark.slow
def test_parameters_are_born_and_kept_split(transformer_inputs, tmp_path):
    """By the rules that every config has; what they compute is the matter of `test_meshes`."""
    config = tiny_config(training={"num_steps": 1})
    config.mesh.update(data=2, fsdp=2, tensor=2)
    train(config, tmp_path, jax.devices())
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = checkpointer.metadata(tmp_path / "checkpoints" / "1" / "state").item_metadata.tree
    for tree in (stored["params"], stored["ema_params"], stored["opt_state"][1]["mu"]):
        for name, split in (("up", ("fsdp", "tensor")), ("down", ("tensor", "fsdp"))):
            kernel = tree["blocks"]["feed_forward"][name]["kernel"]
            assert tuple(kernel.sharding.partition_spec) == (None, *split)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")  # as in `test_hosts`
def test_two_processes_go_on(transformer_run, tmp_path):
    """In float32, where sums over devices are rounded in another order."""
    workdir = runs.copy_until(transformer_run, tmp_path / "run", 4)
    for process in runs.start_several(2, workdir, devices=2, config=CONFIG):
        code, _, errors = runs.finish(process)
        assert code == 0, errors
    ours, theirs = runs.metrics(workdir), runs.metrics(transformer_run)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name, count in (("loss/cross_entropy", LAST), ("validation/bits_per_code", 2)):
        values = [[line[name] for line in lines if name in line] for lines in (ours, theirs)]
        assert len(values[0]) == count
        np.testing.assert_allclose(*values, rtol=1e-3, err_msg=name)
    assert (workdir / "images" / f"samples_{LAST:08}.png").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("processes")  # as in `test_hosts`
def test_two_processes_begin_and_keep_the_tokenizer(transformer_inputs, tmp_path):
    options = ("--config.training.num_steps=2", "--config.training.grid_images=2")
    for process in runs.start_several(2, tmp_path / "run", *options, config=CONFIG):
        code, _, errors = runs.finish(process)
        assert code == 0, errors
    kept = vqgan_jax.load(tmp_path / "run").tokenizer
    assert kept.fingerprint == vqgan_jax.load(transformer_inputs.tokenizer).fingerprint


# ---- What it learns.


@pytest.mark.slow
def test_overfitted_model_gives_back_what_it_has_seen(transformer_inputs, tmp_path):
    """Greedy completion from the first row of codes returns the memorised images."""
    stage2.write_codes(transformer_inputs.directory, "codes_as_they_are")
    config = tiny_config(**PLAIN)
    config.data.codes = str(transformer_inputs.directory / "codes_as_they_are")
    config.model.update(width=64, num_heads=4, **MODERN)
    config.optimizer.update(weight_decay=0.0, learning_rate=5e-3)
    config.training.update(batch_size=64, num_steps=150, log_every=25)
    config.training.update(evaluate_every=1000, checkpoint_every=1000)
    train(config, tmp_path, jax.devices()[:1])
    assert runs.metrics(tmp_path)[-2]["bits_per_code"] < 0.3

    seen = open_codes(transformer_inputs.directory / "codes_as_they_are" / "train")
    codes = seen.gather(np.arange(64))
    known = np.arange(NUM_CODES) < 2 * GRID[1]
    assert len(np.unique(codes[:, known], axis=0)) == 64
    generator = vqgan_jax.load(tmp_path)
    given = dict(condition=seen.labels, temperature=0.0, known=codes, known_mask=known, top_k=0)
    found = generator.sample_codes(0, 64, **given)
    np.testing.assert_array_equal(found, codes)
    images = generator.sample(0, 64, **given)
    decoded = generator.tokenizer.decode(codes.reshape(-1, *GRID))
    expected = (np.asarray(decoded) + 1) * 127.5
    assert np.abs(images - expected).max() <= 0.51


# ---- Beginning from another run.


@pytest.mark.slow
def test_warm_start(transformer_run, tmp_path):
    config = tiny_config(training={"num_steps": 1, "initialize_from": str(transformer_run)})
    config.optimizer.learning_rate = 1e-12
    train(config, tmp_path / "run", jax.devices())
    first = runs.tiny.leaves(read_variables(transformer_run)[1])
    begun = runs.tiny.leaves(read_variables(tmp_path / "run")[1])
    for name, value in first.items():
        np.testing.assert_allclose(begun[name], value, rtol=1e-5, atol=1e-8, err_msg=name)
    assert runs.state(tmp_path / "run", 1)["step"] == 1


@pytest.mark.slow
def test_warm_start_from_another_model(transformer_run, transformer_inputs, tmp_path):
    for changes, path, words in (
        ({"model": {"width": 64}}, transformer_run, "the shape of blocks/"),
        ({"model": {"num_layers": 3}}, transformer_run, "the shape of blocks/"),
        ({"model": MODERN}, transformer_run, "there and not here"),
        ({}, transformer_inputs.tokenizer, "is a tokenizer; a transformer is needed"),
        ({}, tmp_path / "nowhere", f"There is no {tmp_path / 'nowhere'}"),
    ):
        config = tiny_config(**changes)
        config.training.initialize_from = str(path)
        with pytest.raises(CheckpointError) as error:
            stage2.train_alone(config, tmp_path / "run")
        assert words in assert_one_line(error)
        assert not (tmp_path / "run").exists()


# ---- What cannot work.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": {"path": ""}, "data": {"codes": ""}}, "config.tokenizer.path is empty"),
        (
            {"tokenizer": {"path": "/nowhere/else"}, "data": {"codes": ""}},
            "There is no /nowhere/else.",
        ),
        ({"data": {"codes": "/nowhere/codes"}}, "There is no directory /nowhere/codes/train."),
        ({"model": {"grid": (4, 5)}}, "config.model.grid is (4, 5)"),
        ({"model": {"codebook_size": 32}}, "config.model.codebook_size is 32"),
        ({"model": {"max_length": 9}}, "config.model.max_length is 9"),
        ({"condition": {"num_classes": 4}}, "config.condition.num_classes is 4"),
        ({"condition": {"class_names": ("a", "b", "c")}}, "config.condition.class_names is"),
        ({"condition": {"dropout": 0.0}}, "guidance_scale needs a model"),
        ({"condition": {"kinds": ()}}, "condition.dropout leaves out conditions"),
        (
            {
                "condition": {
                    "own_table": False,
                    "kinds": (),
                    "start_token": 24,
                    "dropout": 0.0,
                },
                "sampling": {"guidance_scale": 1.0},
            },
            "config.condition.start_token is 24",
        ),
        ({"sampling": {"top_p": 0.0}}, "top_p is 0.0; it must be above 0"),
        ({"training": {"batch_size": 7}, "mesh": {"data": 2}}, "does not fit 1 devices"),
        ({"data": {"codes": ""}, "tokenizer": {"resolution": 18}}, "config.tokenizer.resolution"),
        ({"data": {"codes": "", "num_labels": 5}}, "config.data.num_labels is 5"),
        ({"model": {"positions": "rotary", "num_heads": 16}}, "heads of a multiple of 4"),
    ],
)
def test_errors_are_one_line_and_write_nothing(transformer_inputs, tmp_path, changes, words):
    with pytest.raises((ConfigError, DataError, CheckpointError)) as error:
        stage2.train_alone(tiny_config(**changes), tmp_path / "run")
    assert words in assert_one_line(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_codes_of_another_grid_and_without_classes(transformer_inputs, tmp_path):
    inputs = tmp_path / "inputs"
    shutil.copytree(transformer_inputs.directory, inputs)
    stage2.write_codes(inputs, "larger", resolution=20)
    larger = tiny_config(data={"codes": str(inputs / "larger")}, tokenizer={"resolution": 16})
    with pytest.raises(ConfigError) as error:
        stage2.train_alone(larger, tmp_path / "run")
    assert "has codes of images of 20 pixels; tokenize with --resolution=16" in str(error.value)
    shutil.rmtree(inputs / "codes" / "validation")
    shutil.copytree(inputs / "larger" / "validation", inputs / "codes" / "validation")
    config = tiny_config(data={"codes": str(inputs / "codes")})
    with pytest.raises(DataError) as error:
        stage2.train_alone(config, tmp_path / "run")
    assert "grids of 5x5 codes; 4x4 are expected" in assert_one_line(error)

    for split in stage2.COUNTS:
        for path in list((inputs / "images" / split).rglob("*.png")):
            path.rename(inputs / "images" / split / path.name)
        for name in stage2.CLASSES:
            (inputs / "images" / split / name).rmdir()
    stage2.write_codes(inputs, "without_classes")
    for data in (
        {"codes": str(inputs / "without_classes")},
        {"codes": "", "name": f"folder:{inputs / 'images'}"},
    ):
        with pytest.raises(ConfigError) as error:
            stage2.train_alone(tiny_config(data=data), tmp_path / "run")
        assert "the data has no classes" in assert_one_line(error)
    assert not (tmp_path / "run").exists()
    settings = PLAIN | {"condition": {"kinds": (), "dropout": 0.0}}
    config = tiny_config(data={"codes": str(inputs / "without_classes")}, **settings)
    config.training.update(num_steps=2, evaluate_every=2)
    stage2.train_alone(config, tmp_path / "run")
    assert vqgan_jax.load(tmp_path / "run").sample(num_samples=3).shape == (3, 16, 16, 3)


def test_damaged_codes_end_a_run_before_it_saves(transformer_inputs, tmp_path):
    """A code that is another one, which only the SHA-256 of its file shows."""
    codes = tmp_path / "codes"
    shutil.copytree(transformer_inputs.directory / "codes", codes)
    shard = codes / "train" / "codes-00000-of-00001.npy"
    changed = bytearray(shard.read_bytes())
    changed[-2] ^= 1
    shard.write_bytes(changed)
    config = tiny_config(data={"codes": str(codes)})
    with pytest.raises(DataError, match=f"damaged, so nothing is saved: .*{shard.name}"):
        stage2.train_alone(config, tmp_path / "run")
    assert runs.steps(tmp_path / "run") == []


def test_an_error_ends_the_command_in_one_line(transformer_run, tmp_path):
    workdir = runs.copy_until(transformer_run, tmp_path / "run", 4)
    before = runs.fingerprint(workdir)
    line = runs.fails(workdir, "--config.model.num_layers=3", config=CONFIG)
    assert "model.num_layers is 2 there and 3 here" in line
    assert runs.fingerprint(workdir) == before
