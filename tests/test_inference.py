"""Tokenizers for other programs: runs, checkpoints and exports, and what is no such thing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import tiny
import vqgan_jax
from vqgan_jax.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    read_variables,
    write_export,
)
from vqgan_jax.training.game import Game, make_vqgan
from vqgan_jax.training.states import TokenizerState


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints and a moving average that is not the parameters."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    config = tiny.config_of_tiny_model()
    config.optimizer.ema_decay = 0.99
    generator = Game.from_config(config).init_generator(tiny.initial_variables(config))
    average = jax.tree.map(lambda x: x + 0.01, generator.params)
    state = TokenizerState(jnp.asarray(3, jnp.int32), generator, None)
    later = state.replace(generator=generator.replace(ema_params=average))
    checkpoints = Checkpoints(workdir, config)
    checkpoints.save(3, state)
    checkpoints.save(7, later)
    checkpoints.close()
    return workdir, config, later


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    workdir, _, _ = run
    path = tmp_path_factory.mktemp("exports") / "tiny"
    config, variables, _ = read_variables(workdir)
    write_export(path, config, variables)
    return path


def test_run_checkpoint_and_export_are_one_tokenizer(run, export):
    workdir, config, state = run
    images = tiny.random_images(2, 16, 24, 3)
    encode = jax.jit(functools.partial(make_vqgan(config.model).apply, method="encode"))
    expected = encode({"params": state.generator.ema_params}, images)
    assert len(np.unique(expected)) > 1
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "7", str(export)):
        tokenizer = vqgan_jax.load(path)
        codes = tokenizer.encode(images)
        np.testing.assert_array_equal(codes, expected)
        assert codes.dtype == jnp.int32
        assert tokenizer.config.model.to_dict() == config.model.to_dict()
        assert (tokenizer.factor, tokenizer.codebook_size) == (2, 32)


def test_moving_average_of_the_newest_checkpoint_is_taken(run):
    workdir, _, state = run
    loaded = vqgan_jax.load(workdir).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, loaded, state.generator.ema_params)
    older = vqgan_jax.load(workdir / "checkpoints" / "3").variables["params"]
    jax.tree.map(np.testing.assert_array_equal, older, state.generator.params)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(16, 24), (2, 2)])
def test_shapes_of_a_round_trip(export, size):
    tokenizer = vqgan_jax.load(export)
    images = tiny.random_images(2, *size, 3)
    codes = tokenizer.encode(images)
    assert codes.shape == (2, size[0] // 2, size[1] // 2)
    assert codes.min() >= 0 and codes.max() < tokenizer.codebook_size
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.dtype == jnp.float32
    assert np.abs(decoded).max() <= 1
    whole, _ = jax.jit(tokenizer.module.apply)(tokenizer.variables, images)
    np.testing.assert_allclose(decoded, np.clip(whole, -1, 1), atol=2e-5)
    np.testing.assert_array_equal(tokenizer.decode(np.asarray(codes, np.uint16)), decoded)


def test_wrong_input_is_named(export):
    tokenizer = vqgan_jax.load(export)
    with pytest.raises(ValueError, match="17x16, which the factor 2 does not divide"):
        tokenizer.encode(np.zeros((1, 17, 16, 3)))
    with pytest.raises(ValueError, match=r"\(1, 16, 16, 1\).*takes \(B, H, W, 3\)"):
        tokenizer.encode(np.zeros((1, 16, 16, 1)))
    with pytest.raises(ValueError, match=r"\(16, 16, 3\)"):
        tokenizer.encode(np.zeros((16, 16, 3)))
    with pytest.raises(ValueError, match=r"uint8.*\[-1, 1\]"):
        tokenizer.encode(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="float32; they must be integers"):
        tokenizer.decode(np.zeros((1, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        tokenizer.decode(np.zeros((4, 4), np.int32))
    with pytest.raises(ValueError, match="32.*0 to 31"):
        tokenizer.decode(np.full((1, 4, 4), 32))
    with pytest.raises(ValueError, match="0 to 31"):
        tokenizer.decode(np.full((1, 4, 4), -1))


def test_nothing_there_and_other_directories(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no .*missing"):
        vqgan_jax.load(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="no run directory, checkpoint or export"):
        vqgan_jax.load(tmp_path)
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(CheckpointError, match="no run directory, checkpoint or export"):
        vqgan_jax.load(tmp_path / "file.txt")


@pytest.mark.parametrize("name", ["config.json", "variables"])
def test_damaged_export_is_named(export, tmp_path, name):
    copy = copied(export, tmp_path)
    damaged = copy / name
    files = [damaged] if damaged.is_file() else [p for p in damaged.rglob("*") if p.is_file()]
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=str(copy)):
        vqgan_jax.load(copy)


def test_damaged_checkpoint_is_named(run, tmp_path):
    copy = copied(run[0] / "checkpoints" / "7", tmp_path)
    (copy / "config" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match=str(copy)):
        vqgan_jax.load(copy)


def copied(directory, tmp_path):
    target = tmp_path / "copy"
    for file in [path for path in directory.rglob("*") if path.is_file()]:
        new = target / file.relative_to(directory)
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(file.read_bytes())
    return target


def test_export_of_other_shapes_than_its_config_says(tmp_path):
    config = tiny.config_of_tiny_model()
    variables = tiny.initial_variables(config)
    config.model.quantizer.codebook_size = 64
    write_export(tmp_path / "export", config, variables)
    with pytest.raises(CheckpointError, match=r"codebook has the shape \(32, 8\).*\(64, 8\)"):
        vqgan_jax.load(tmp_path / "export")


def test_export_holds_what_inference_needs_and_nothing_else(run, export):
    stored = ocp.PyTreeCheckpointHandler().metadata(export / "variables").tree
    expected = tiny.leaves({"tokenizer": {"params": run[2].generator.params}})
    assert tiny.leaves(stored).keys() == expected.keys()
    assert sorted(path.name for path in export.iterdir()) == [
        "checksums.json",
        "config.json",
        "variables",
    ]


def test_export_never_overwrites(export, tmp_path):
    config, variables, _ = read_variables(export)
    before = {path: path.read_bytes() for path in export.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="exists already; choose another"):
        write_export(export, config, variables)
    assert {path: path.read_bytes() for path in export.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    write_export(tmp_path / "empty", config, variables)
    assert vqgan_jax.load(tmp_path / "empty").factor == 2


def test_export_that_cannot_be_written_leaves_no_directory(export, tmp_path):
    config, variables, _ = read_variables(export)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write"):
        write_export(tmp_path / "file" / "export", config, variables)
    with pytest.raises(Exception, match="object"):  # an object is nothing that can be stored
        write_export(tmp_path / "export", config, {"params": {"kernel": object()}})
    assert not (tmp_path / "export").exists()
    write_export(tmp_path / "export", config, variables)  # the remains of before are no hindrance
    assert vqgan_jax.load(tmp_path / "export").factor == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "file"]


@pytest.mark.slow
def test_export_of_a_moving_average_codebook(tmp_path):
    config = tiny.config_of_tiny_model(kind="ema")
    variables = tiny.initial_variables(config)
    write_export(tmp_path / "export", config, variables)
    tokenizer = vqgan_jax.load(tmp_path / "export")
    images = tiny.random_images(1, 16, 16, 3)
    to_latents = jax.jit(functools.partial(tokenizer.module.apply, method="latents"))
    codebook = np.asarray(variables["codebook"]["quantize"]["embedding"])
    latents = np.asarray(to_latents(variables, images))
    distances = ((latents[..., None, :] - codebook) ** 2).sum(-1)
    np.testing.assert_array_equal(tokenizer.encode(images), distances.argmin(-1))
    assert tokenizer.decode(np.zeros((1, 8, 8), np.int32)).shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_label_map_tokenizer_gives_logits(tmp_path):
    config = tiny.config_of_tiny_model()
    config.model.in_channels = config.model.out_channels = config.data.num_labels = 5
    config.loss.binary_cross_entropy = 1.0
    params = tiny.initial_variables(config)["params"]
    scaled = jax.tree.map(lambda x: 100 * x, params["decoder"]["conv_out"])
    params |= {"decoder": params["decoder"] | {"conv_out": scaled}}
    write_export(tmp_path / "export", config, {"params": params})
    tokenizer = vqgan_jax.load(tmp_path / "export")
    codes = tokenizer.encode(jax.nn.one_hot(np.arange(16 * 16).reshape(1, 16, 16) % 5, 5))
    logits = tokenizer.decode(codes)
    assert logits.shape == (1, 16, 16, 5) and np.abs(logits).max() > 1
