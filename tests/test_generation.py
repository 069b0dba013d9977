"""Trained transformers for other programs, and the `sample` command, killed and on many devices."""

import logging
import os
import signal
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import programs
import training_runs as runs
import transformer_runs as stage2
import vqgan_jax
from transformer_runs import CLASSES, CODEBOOK, GRID, assert_one_line
from vqgan_jax.checkpoints.directory_lock import is_empty, locked
from vqgan_jax.drawing import Drawing
from vqgan_jax.errors import DataError
from vqgan_jax.generation import Generator
from vqgan_jax.inference.reconstruct import reconstruct
from vqgan_jax.inference.sample import sample
from vqgan_jax.sample_files import labelled_grid
from vqgan_jax.training.checkpoints import CheckpointError, read_variables, write_export

COUNT = 40


@pytest.fixture(scope="module")
def generator(transformer_run):
    return vqgan_jax.load(transformer_run)


# ---- `vqgan_jax.load`.


def test_run_checkpoint_and_export_are_one_generator(transformer_run, generator, tmp_path):
    config, variables, _ = read_variables(transformer_run)
    tokenizer = generator.tokenizer
    tokenizers = {"tokenizer": (tokenizer.config, tokenizer.variables)}
    write_export(tmp_path / "export", config, variables, tokenizers=tokenizers)
    expected = generator.sample(seed=3, num_samples=4, condition="sea")
    assert expected.shape == (4, 16, 16, 3) and expected.dtype == np.uint8
    assert len(np.unique(expected.reshape(4, -1), axis=0)) == 4
    newest = transformer_run / "checkpoints" / "10"
    for path in (tmp_path / "export", newest):
        loaded = vqgan_jax.load(path)
        assert isinstance(loaded, Generator) and loaded.class_names == CLASSES
        assert loaded.fingerprint == generator.fingerprint
        np.testing.assert_array_equal(loaded.sample(3, 4, condition="sea"), expected)
    older = vqgan_jax.load(transformer_run / "checkpoints" / "2")
    assert older.fingerprint != generator.fingerprint


def test_images_are_those_of_the_codes(generator):
    options = dict(condition=[0, 1, 2, 2, 1], temperature=0.7)
    codes = generator.sample_codes(5, 5, **options)
    assert codes.shape == (5, 16) and codes.dtype == np.int32
    decoded = np.asarray(generator.tokenizer.decode(codes.reshape(5, *GRID)))
    expected = np.round((decoded + 1) * 127.5)
    assert np.abs(generator.sample(5, 5, **options) - expected).max() <= 1
    assert generator.sample(5, 5, height=16, width=16, **options).shape == (5, 16, 16, 3)


def test_of_large_images_as_many_windows_as_of_small_ones_are_drawn_at_a_time(generator):
    rows, columns = GRID

    def batch_size(times):
        return Drawing(generator, (rows, times * columns), {}, {}).batch_size

    assert [batch_size(times) for times in (1, 2, 8, 100)] == [16, 8, 2, 1]


def test_a_sample_depends_on_its_number_and_not_on_the_batch(generator):
    labels = np.arange(12) % 3
    whole = generator.sample_codes(1, 12, labels)
    np.testing.assert_array_equal(generator.sample_codes(1, 12, labels, batch_size=1), whole)
    chosen = [7, 2, 11]
    np.testing.assert_array_equal(
        generator.sample_codes(1, 3, labels[chosen], indices=chosen), whole[chosen]
    )
    names = [CLASSES[label] for label in labels]
    np.testing.assert_array_equal(generator.sample_codes(1, 12, names), whole)
    assert np.any(generator.sample_codes(2, 12, labels) != whole)


def test_likelihoods_lead_greedy_drawing(generator):
    """No other code at any place is likelier than the one that is drawn at temperature 0."""
    codes = generator.sample_codes(0, 1, "town", temperature=0.0, guidance_scale=1.0)
    for place in (0, 5, 15):
        others = np.repeat(codes, CODEBOOK, axis=0)
        others[:, place] = np.arange(CODEBOOK)
        logs = generator.log_likelihood(others, "town")[:, place]
        assert np.argmax(logs) == codes[0, place]
        assert np.exp(logs).sum() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_array_equal(
        generator.log_likelihood(codes.reshape(1, *GRID)), generator.log_likelihood(codes)
    )


def test_other_classes_temperatures_and_seeds_compile_nothing(generator, caplog):
    def compiled(**options):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
            generator.sample_codes(num_samples=8, **options)
        return [record for record in caplog.records if "Finished XLA" in record.getMessage()]

    first = dict(condition=0, temperature=1.0, top_k=7, top_p=0.9, guidance_scale=2.0, seed=0)
    assert compiled(**first)
    for change in (
        {"condition": "town"},
        {"condition": [0, 1, 2, 0, 1, 2, 0, 1]},
        {"temperature": 0.5, "top_p": 0.8, "guidance_scale": 3.0},
        {"guidance_schedule": "cosine"},
        {"seed": 12345},
    ):
        assert not compiled(**first | change), change


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"condition": 3}, "there is no class 3; there are 0 to 2"),
        ({"condition": -1}, "there is no class -1"),
        ({"condition": "river"}, "there is no class 'river'; there are forest, sea, town."),
        ({"condition": [0, 1]}, "condition has 2 classes for 4 samples"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"guidance_schedule": "sine"}, "guidance_schedule is 'sine'"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"height": 8}, "height is 8; it must be a multiple of 4 pixels and at least 16"),
        ({"known": np.full(16, 24), "known_mask": True}, "known codes are outside of 0 to 23"),
        ({"known": np.zeros(16, int)}, "known codes need known_mask"),
        ({"indices": [1]}, "1 indices for 4 samples"),
    ],
)
def test_wrong_options_are_named(generator, options, words):
    with pytest.raises(ValueError) as error:
        generator.sample(**{"num_samples": 4, "condition": 0} | options)
    assert words in assert_one_line(error)


def test_wrong_codes_are_named(generator):
    with pytest.raises(ValueError, match=r"codes have shape \(2, 15\)"):
        generator.log_likelihood(np.zeros((2, 15), int), 0)
    with pytest.raises(ValueError, match="codes are outside of 0 to 23"):
        generator.log_likelihood(np.full((2, 16), 24), 0)


def test_what_a_model_was_not_trained_for(generator):
    """Without classes left out in training there is no guidance, and no image of no class."""
    config = generator.config.copy_and_resolve_references()
    config.condition.dropout, config.sampling.guidance_scale = 0.0, 1.0
    always = Generator(config, generator.params, generator.tokenizer)
    with pytest.raises(ValueError, match="guidance needs a model that was trained without"):
        always.sample_codes(condition=0, guidance_scale=2.0)
    with pytest.raises(ValueError, match="condition must be one of its 3 classes"):
        always.sample_codes()
    assert generator.sample_codes(num_samples=2, guidance_scale=1.0).shape == (2, 16)


# ---- The command.


def start(run, output, *arguments, devices=1, process=None):
    """`process` is (index, port) of one of two."""
    environment = stage2.environment_of_processes(devices)
    if process is not None:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{process[1]}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(process[0]),
        }
    command = [sys.executable, "-m", "vqgan_jax.sample", f"--checkpoint={run}"]
    return programs.Program(
        [*command, f"--output={output}", f"--num_samples={COUNT}", "--batch_size=2", *arguments],
        env=environment,
    )


@pytest.fixture(scope="module")
def sampled(transformer_run, tmp_path_factory):
    """What the command wrote on one device without interruption."""
    output = tmp_path_factory.mktemp("samples") / "output"
    code, printed, errors = runs.finish(start(transformer_run, output, "--format=png,grid,npz"))
    assert code == 0, errors
    assert f"{COUNT} samples: png, grid, npz" in printed
    return output


@pytest.mark.slow
def test_two_processes_share_the_work(transformer_run, sampled, tmp_path):
    port = runs.free_port()
    output = tmp_path / "output"
    processes = [
        start(transformer_run, output, "--format=png,grid,npz", process=(i, port)) for i in (0, 1)
    ]
    results = [runs.finish(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert f"{COUNT} samples: png" in results[0][1] and "samples" not in results[1][1]
    assert runs.fingerprint(output) == runs.fingerprint(sampled)


def pictures(output):
    return {path.name: np.asarray(Image.open(path)) for path in output.glob("0*.png")}


def test_files_of_the_command(sampled, generator):
    names = {path.name for path in sampled.iterdir()}
    numbered = {f"{i:06}.png" for i in range(COUNT)}
    assert names == numbered | {"grid.png", "samples.npz", "settings.json"}
    with np.load(sampled / "samples.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["labels"]
    assert images.shape == (COUNT, 16, 16, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.arange(COUNT) % 3)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(sampled / f"{i:06}.png")), image)
    expected = generator.sample(0, COUNT, condition=labels)
    different = [i for i in range(COUNT) if np.any(np.abs(images[i] - expected[i].astype(int)) > 1)]
    assert not different
    grid = np.asarray(Image.open(sampled / "grid.png"))
    side = 128 + 2
    left = grid.shape[1] - (8 * side - 2)  # what the names take
    assert grid.shape[0] == 3 * side - 2 and 0 < left < 2 * side
    corner = grid[side : side + 128, left + side : left + side + 128]  # the second sea is number 4
    np.testing.assert_array_equal(corner, images[4].repeat(8, axis=0).repeat(8, axis=1))
    assert all((grid[row * side : row * side + 128, :left] < 128).any() for row in range(3))


def test_eight_devices_draw_what_one_does(transformer_run, sampled, tmp_path):
    sample(str(transformer_run), tmp_path / "output", COUNT, formats=["png"], batch_size=2)
    ours, theirs = pictures(tmp_path / "output"), pictures(sampled)
    assert ours.keys() == theirs.keys()
    different = np.abs([ours[name].astype(int) - theirs[name] for name in ours])
    assert different.max() <= 1 and different.mean() < 1e-3  # a rounding of a pixel


@pytest.mark.slow
def test_killed_command_makes_what_is_missing(transformer_run, sampled, tmp_path):
    output = tmp_path / "output"
    process = start(transformer_run, output, "--format=png,grid,npz")
    end = time.monotonic() + runs.TIMEOUT
    while len(list(output.glob("0*.png"))) < 5:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    runs.finish(process)
    made = {path: path.stat() for path in output.glob("0*.png")}
    assert 5 <= len(made) < COUNT and not (output / "samples.npz").exists()
    code, _, errors = runs.finish(start(transformer_run, output, "--format=png,grid,npz"))
    assert code == 0, errors
    for path, stat in made.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    ours, theirs = runs.fingerprint(output), runs.fingerprint(sampled)
    assert ours.pop("samples.npz") and theirs.pop("samples.npz")  # an archive has times in it
    assert ours == theirs
    with np.load(output / "samples.npz") as a, np.load(sampled / "samples.npz") as b:
        assert set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_part_of_a_batch_is_made_again_as_it_was(transformer_run, tmp_path, capsys):
    options = dict(classes=["town", "0"], formats=["png", "npz"], batch_size=1, temperature=0.9)
    sample(str(transformer_run), tmp_path / "output", 11, **options)
    before = runs.fingerprint(tmp_path / "output")
    for name in ("000003.png", "000010.png"):
        (tmp_path / "output" / name).unlink()
    (tmp_path / "output" / ".000003.png.17.partial").write_bytes(b"of a killed command")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "output").glob("0*.png")}
    sample(str(transformer_run), tmp_path / "output", 11, **options)
    after = runs.fingerprint(tmp_path / "output")
    assert before.pop("samples.npz") and after.pop("samples.npz") and after == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    with np.load(tmp_path / "output" / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["labels"], np.arange(11) % 2 * -2 + 2)


@pytest.mark.slow
def test_arrays_alone_are_not_drawn_twice(transformer_run, tmp_path, capsys):
    for count, drawn in ((5, True), (5, False), (6, True)):
        capsys.readouterr()
        sample(str(transformer_run), tmp_path / "output", count, formats=["npz"], batch_size=1)
        assert (f"{count} of {count} samples" in capsys.readouterr().out) == drawn
        assert {p.name for p in (tmp_path / "output").iterdir()} == {"samples.npz", "settings.json"}
        with np.load(tmp_path / "output" / "samples.npz") as arrays:
            assert len(arrays["arr_0"]) == count


@pytest.mark.slow
def test_other_settings_are_refused(transformer_run, sampled, transformer_inputs, tmp_path):
    before = runs.fingerprint(sampled)
    for options, words in (
        ({"seed": 1}, "was begun with seed 0, and this is 1"),
        ({"temperature": 0.5}, "was begun with temperature 1.0, and this is 0.5"),
        ({"classes": ["sea"]}, "was begun with classes [0, 1, 2], and this is [1]"),
        ({"top_k": 3}, "was begun with top_k 8, and this is 3"),
    ):
        with pytest.raises(DataError) as error:
            sample(str(transformer_run), sampled, COUNT, **options)
        assert words in assert_one_line(error)
    with pytest.raises(DataError, match="was begun with model"):
        sample(str(transformer_run / "checkpoints" / "2"), sampled, COUNT)
    assert runs.fingerprint(sampled) == before
    images = transformer_inputs.images
    with pytest.raises(DataError, match="exists and is not empty"):
        sample(str(transformer_run), images, COUNT)

    new = tmp_path / "new"
    for options, words in (
        ({"classes": ["river"]}, "there is no class 'river'"),
        ({"classes": ["3"]}, "there is no class 3"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"guidance_schedule": "sine"}, "guidance_schedule is 'sine'"),
        ({"formats": ["jpeg"]}, "--format is jpeg"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
    ):
        with pytest.raises(DataError) as error:
            sample(str(transformer_run), new, COUNT, **options)
        assert words in assert_one_line(error)
        assert not new.exists()


def test_a_second_job_is_refused(transformer_run, tmp_path):
    with locked(tmp_path / "samples"):
        with pytest.raises(DataError, match="samples is in use by another job"):
            sample(str(transformer_run), tmp_path / "samples", COUNT)
        assert is_empty(tmp_path / "samples")


def test_the_wrong_kind_of_model(transformer_run, transformer_inputs, tmp_path):
    with pytest.raises(CheckpointError) as error:
        sample(str(transformer_inputs.tokenizer), tmp_path / "new", 4)
    assert "is a tokenizer; sample needs a transformer" in assert_one_line(error)
    with pytest.raises(CheckpointError) as error:
        reconstruct(str(transformer_run), ["validation"], tmp_path / "new")
    assert "is a transformer; a tokenizer is needed here" in assert_one_line(error)
    assert not (tmp_path / "new").exists()


def test_an_error_ends_the_command_in_one_line(transformer_run, tmp_path):
    process = start(transformer_run, tmp_path / "new", "--class=sea,river")
    code, _, errors = runs.finish(process)
    assert code == 1
    assert errors == "error: --class: there is no class 'river'; there are forest, sea, town.\n"
    assert os.listdir(tmp_path) == []


def test_grid_without_classes():
    images = [np.full((32, 32, 3), value, np.uint8) for value in range(10)]
    grid = np.asarray(labelled_grid(images, None, ()))
    assert grid.shape == (2 * 130 - 2, 8 * 130 - 2, 3)
    assert (grid[130:258, 130:258] == 9).all() and (grid[130:258, 260:] == 255).all()
