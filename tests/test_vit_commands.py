"""Every command with a ViT-VQGAN, as users run them one after the other."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import training_runs as runs
import transformer_runs as stage2
import vqgan_jax
from vqgan_jax.data.images import prepare_images
from vqgan_jax.data.pipeline import evaluation_images
from vqgan_jax.inference.reconstruct import reconstruct
from vqgan_jax.inference.sample import sample
from vqgan_jax.inference.tokenize import tokenize
from vqgan_jax.interop.conversion import convert_back
from vqgan_jax.interop.taming_options import ConversionError
from vqgan_jax.training.checkpoints import read_variables, write_export

pytestmark = pytest.mark.slow

CONFIG = runs.CONFIG.with_name("tiny_vit_config.py")


@pytest.fixture(scope="module")
def run(shared_directory, run_inputs):
    """A run of four steps that nothing interrupted."""
    return runs.made_once(shared_directory / "vit", lambda d: runs.run(d, config=CONFIG))


@pytest.fixture(scope="module")
def codes(run, tmp_path_factory):
    """What `tokenize` writes of the run's own images."""
    directory = tmp_path_factory.mktemp("codes") / "codes"
    tokenize(str(run), directory, splits=["train", "validation"], resolution=32)
    return directory


@pytest.mark.slow
def test_training_goes_on_bit_for_bit_and_learns_every_term(run, tmp_path):
    resumed = runs.copy_until(run, tmp_path / "run", 2)
    runs.run(resumed, config=CONFIG)
    runs.assert_same_run(resumed, run, 4)
    lines = [line for line in runs.metrics(run) if "loss/total" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert runs.steps(run)[-1] == 4
    for name in ("l2", "logit_laplace", "perceptual", "quantization", "adversarial"):
        assert all(np.isfinite(line[f"raw/{name}"]) for line in lines[1:])
    first, last = (runs.state(run, step) for step in (2, 4))
    moved = [name for name in first if name.startswith("generator/params")]
    moved = [name for name in moved if not np.array_equal(first[name], last[name])]
    assert len(moved) == len([name for name in first if name.startswith("generator/params")])


def test_reconstructions_of_other_sizes(run, run_inputs, tmp_path):
    pictures = run_inputs / "images" / "validation"
    summary = reconstruct(str(run), [str(pictures)], tmp_path / "seen", resize=72)
    assert summary["images"] == 11
    for picture in summary["pictures"]:
        assert (picture["height"], picture["width"]) == (72, 80)
        assert np.isfinite(picture["psnr"])


@pytest.mark.slow
def test_codes_on_disk_are_those_of_the_tokenizer(run, codes):
    tokenizer = vqgan_jax.load(run)
    assert (tokenizer.factor, tokenizer.codebook_size) == (8, 16)
    stored = np.load(next((codes / "validation").glob("codes-*.npy")))
    manifest = json.loads((codes / "validation" / "manifest.json").read_text())
    assert manifest["fingerprint"] == tokenizer.fingerprint
    assert stored.reshape(11, 16).max() < 16
    assert len(np.unique(stored)) > 3

    raw = evaluation_images(tokenizer.config, 4)
    found = tokenizer.encode(prepare_images(tokenizer.config, jnp.asarray(raw)))
    for row in np.asarray(found).reshape(4, 16):  # but for ties that rounding decides
        assert (stored.reshape(11, 16) == row).sum(axis=1).max() >= 15


@pytest.mark.slow
def test_transformer_of_its_codes_and_samples(run, codes, tmp_path, monkeypatch):
    monkeypatch.setenv(*stage2.inputs_environment(tmp_path).popitem())
    config = stage2.tiny_config(
        tokenizer={"path": str(run)},
        data={"codes": str(codes)},
        condition={"kinds": (), "dropout": 0.0},
        training={"num_steps": 2, "evaluate_every": 2, "checkpoint_every": 2},
        sampling={"guidance_scale": 1.0},
    )
    stage2.train_alone(config, tmp_path / "transformer")
    sample(str(tmp_path / "transformer"), tmp_path / "samples", num_samples=2)
    pictures = sorted((tmp_path / "samples").rglob("*.png"))
    assert any(np.asarray(Image.open(path)).shape == (32, 32, 3) for path in pictures)


def test_export_is_the_same_tokenizer(run, tmp_path):
    config, variables, _ = read_variables(run)
    write_export(tmp_path / "export", config, variables)
    ours, theirs = vqgan_jax.load(run), vqgan_jax.load(tmp_path / "export")
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    codes = ours.encode(images)
    assert codes.shape == (2, 4, 6) and codes.dtype == jnp.int32
    np.testing.assert_array_equal(theirs.encode(images), codes)
    decoded = ours.decode(codes)
    assert decoded.shape == images.shape and np.abs(decoded).max() <= 1
    np.testing.assert_array_equal(theirs.decode(codes), decoded)
    assert ours.fingerprint == theirs.fingerprint


def test_the_reference_has_no_such_model(run, tmp_path):
    with pytest.raises(ConversionError, match="convolutional; config.model.architecture is 'vit'"):
        convert_back(run, tmp_path / "vit.ckpt")
    assert not list(tmp_path.iterdir())
