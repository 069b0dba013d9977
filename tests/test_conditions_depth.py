"""Depth of 16 bits through a tokenizer of one channel, whose codes cover more than the images'."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import tiny
import transformer_runs as stage2
import vqgan_jax
from test_transformer_training import open_stage
from transformer_runs import CODEBOOK, SIDE, assert_one_line, tiny_config
from vqgan_jax.conditions.files import read_conditions
from vqgan_jax.configuration import add_condition_image
from vqgan_jax.data.codes import open_codes
from vqgan_jax.data.images import prepare_images, to_grey
from vqgan_jax.errors import DataError
from vqgan_jax.inference.sample import sample
from vqgan_jax.inference.tokenize import tokenize
from vqgan_jax.training.checkpoints import write_export
from vqgan_jax.training.game import make_vqgan

FACTOR = 8  # of the depth's tokenizer; that of the images is 4


def test_grey_is_that_of_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=-1)
    for picture in (pixels, grey):
        expected = np.asarray(Image.fromarray(picture).convert("L"))[..., None]
        np.testing.assert_array_equal(to_grey(picture), expected)
        np.testing.assert_array_equal(jax.jit(to_grey)(picture), expected)
    np.testing.assert_array_equal(to_grey(grey), grey[..., :1])
    config = tiny.config_of_tiny_model()
    assert prepare_images(config, pixels[None]).shape == (1, 64, 64, 3)
    config.model.in_channels = 1
    expected = np.asarray(Image.fromarray(pixels).convert("L"))[None, ..., None] / 127.5 - 1
    np.testing.assert_allclose(prepare_images(config, pixels[None]), expected, atol=1e-6)


def scaled(depth):
    """[-1, 1] in levels of 8 bits, from the smallest to the largest value: `(..., H, W, 1)`."""
    lowest, highest = (f(depth, axis=(-2, -1), keepdims=True) for f in (np.min, np.max))
    levels = np.rint(255 * (depth - lowest) / (highest - lowest))
    return (levels / 127.5 - 1).astype(np.float32)[..., None]


@pytest.fixture(scope="module")
def inputs(transformer_inputs, tmp_path_factory):
    """The inputs of stage 2 with depth in millimetres beside the images, and its tokenizer."""
    directory = tmp_path_factory.mktemp("depth") / "inputs"
    shutil.copytree(transformer_inputs.directory, directory)
    random = np.random.default_rng(0)
    for path in sorted((directory / "images").rglob("*.png")):
        blurred = np.asarray(Image.open(path).convert("L"), int)
        depth = random.integers(500, 3000) + random.integers(2, 40) * blurred
        target = directory / "images" / "depth" / path.relative_to(directory / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(depth.astype(np.uint16)).save(target)
    export_tokenizer(directory / "of_depth", scaled(depth_of(directory, "train")))
    stage2.write_codes(
        directory, "with_depth", conditions=[f"depth={directory / 'of_depth'}", "coordinates=9"]
    )
    return stage2.Inputs(directory)


def export_tokenizer(directory, pictures):
    """Untrained, of one channel, with the k-means centres of its latents as codebook."""
    config = tiny.config_of_tiny_model(codebook_size=CODEBOOK, kmeans_init=True)
    config.model.resolution, config.model.channel_multipliers = SIDE, (1, 1, 1, 1)
    config.model.in_channels = config.model.out_channels = 1
    variables = tiny.variables_with_centres(config, pictures, seed=1)
    write_export(directory, config, variables)


def depth_of(directory, split):
    """`(N, 16, 16)` in the order of paths, as NumPy reads the millimetres."""
    paths = sorted((directory / "images" / "depth" / split).rglob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)


def pictures_of(inputs, split):
    """What NumPy makes of the millimetres, as a user gives it: uint8 `(N, 16, 16, 3)`."""
    levels = np.rint((scaled(depth_of(inputs.directory, split)) + 1) * 127.5)
    return np.repeat(levels.astype(np.uint8), 3, axis=-1)


def config_of(inputs, **sections):
    steps = {"num_steps": 2, "evaluate_every": 2, "checkpoint_every": 2}
    config = tiny_config(training=steps, **sections)
    config.data.codes = str(inputs.directory / "with_depth")
    config.data.name = f"folder:{inputs.images}"
    config.condition.coordinates.intervals = 9
    config.condition.kinds = ()
    add_condition_image(config, "depth", str(inputs.directory / "of_depth"))
    config.condition.kinds = ("depth", "coordinates")
    return config


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = stage2.from_images(config_of(inputs, model={"positions": "rotary"}))
    stage2.train_alone(config, workdir)
    assert (workdir / "images" / "samples_00000002.png").stat().st_size > 1000
    return workdir


@pytest.fixture(scope="module")
def generator(trained):
    return vqgan_jax.load(trained)


@pytest.mark.slow
def test_depth_has_the_same_codes_everywhere(inputs, generator, tmp_path):
    """On disk, in training from images, and in sampling: those of what NumPy makes of the files."""
    pictures = scaled(depth_of(inputs.directory, "validation"))
    tokenizer = vqgan_jax.load(inputs.directory / "of_depth")
    expected = np.asarray(tokenizer.encode(pictures)).reshape(11, 4)
    assert len(np.unique(expected)) > 8 and len(np.unique(expected, axis=0)) > 8
    stored = open_codes(inputs.directory / "with_depth" / "validation")
    np.testing.assert_array_equal(stored.gather(np.arange(11), condition="depth"), expected)

    config = stage2.from_images(config_of(inputs))
    config.data.train_split = "validation"
    batches = (stage := open_stage(config, tmp_path)).batches(0)
    batch = next(batches)
    batches.close()
    pixels = np.asarray(batch["image"])
    images = stage2.images_of(inputs.images / "validation")
    order = [
        np.abs(images - (image / np.float32(127.5) - 1)).sum(axis=(1, 2, 3)).argmin()
        for image in pixels
    ]
    assert len(set(order)) == 8
    np.testing.assert_array_equal(stage._tokens_of(batch)["depth"], expected[order])

    folder = inputs.images / "depth" / "validation"
    files = [
        read_conditions(generator.config.condition, "depth", str(folder / name))
        for name in stage2.CLASSES
    ]
    given = np.stack([picture for own in files for picture in own.values()])
    rows = generator.given.batch({"depth": given}, 11, (4, 4))
    np.testing.assert_array_equal(rows["depth"].reshape(11, 4), expected)


@pytest.mark.slow
def test_both_ways_of_training(inputs, trained, generator, tmp_path):
    """The run is straight from images; its figures are those of the codes on disk, which fit."""
    stage = open_stage(config_of(inputs), tmp_path)
    assert stage.config.condition == generator.config.condition
    assert generator.config.condition.images.depth.grid == (2, 2)
    stored = open_codes(inputs.directory / "with_depth" / "validation")
    depth = {"depth": pictures_of(inputs, "validation")}
    logs = generator.log_likelihood(stored.gather(np.arange(11)), depth)
    figures = json.loads((trained / "evaluation.json").read_text())
    assert figures["bits_per_code"] == pytest.approx(-logs.mean() / np.log(2), rel=1e-5)


@pytest.mark.slow
def test_the_command_draws_after_a_file(inputs, trained, generator, tmp_path):
    path = min((inputs.images / "depth" / "validation").rglob("*.png"))
    sample(str(trained), tmp_path / "output", 1, conditions={"depth": str(path)})
    given = pictures_of(inputs, "validation")[0]
    expected = generator.sample(num_samples=1, condition=given)[0].astype(int)
    found = np.asarray(Image.open(tmp_path / "output" / "000000.png"))
    assert np.abs(found - expected).max() <= 1


@pytest.mark.slow
def test_larger_images_see_their_own_depth(generator):
    depth = np.random.default_rng(0).integers(0, 256, (24, 32, 1), np.uint8).repeat(3, axis=-1)
    size = dict(height=24, width=32)
    codes = generator.sample_codes(num_samples=2, condition=depth, **size)
    assert codes.shape == (2, 6 * 8)
    other = generator.sample_codes(num_samples=2, condition=255 - depth, **size)
    assert np.any(codes != other)
    with pytest.raises(ValueError) as error:
        generator.sample_codes(num_samples=1, condition=depth, height=20)
    assert "height is 20; it must be a multiple of 8 pixels" in assert_one_line(error)


@pytest.mark.slow
def test_a_tokenizer_of_other_channels(inputs, tmp_path):
    tokenizer = vqgan_jax.load(inputs.directory / "of_depth")
    config = tokenizer.config.copy_and_resolve_references()
    config.model.in_channels = config.model.out_channels = 4
    images = np.zeros((1, SIDE, SIDE, 4), np.float32)
    shapes = jax.eval_shape(make_vqgan(config.model).init, jax.random.key(0), images)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    write_export(tmp_path / "four", config, zeros)
    config = config_of(inputs)
    config.condition.images.depth.tokenizer = str(tmp_path / "four")
    with pytest.raises(DataError) as error:
        stage2.train_alone(stage2.from_images(config), tmp_path / "run")
    words = "tokenizer of the condition depth takes 4 channels; pictures have 3, or are read as"
    assert words in assert_one_line(error)
    with pytest.raises(DataError, match=words):
        tokenize(
            str(inputs.tokenizer),
            tmp_path / "codes",
            f"folder:{inputs.images}",
            conditions=[f"depth={tmp_path / 'four'}"],
        )
    assert [path.name for path in tmp_path.iterdir()] == ["four"]
