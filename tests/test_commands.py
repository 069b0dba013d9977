"""Bad input at the command line: one clear line, exit code 1, and the disk as it was."""

import concurrent.futures
import os
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import programs
import training_runs as runs
from vqgan_jax.configuration import ConfigError
from vqgan_jax.errors import DataError
from vqgan_jax.training import loop

UNKNOWN_KEY = """\
from vqgan_jax.configuration import tokenizer_config
def get_config(arg=""):
    config = tokenizer_config()
    config.model.chanels = 64
    return config
"""
TINY = str(runs.CONFIG)
LPIPS = {"loss.perceptual": 1.0}
FILES = {
    "syntax.py": "def get_config(:\n",
    "nothing.py": "x = 1\n",
    "unknown.py": UNKNOWN_KEY,
    "number.py": "def get_config():\n    return 3\n",
    "division.py": "def get_config():\n    return 1 / 0\n",
}
# What follows `python -m vqgan_jax.train`, and what the error must say.
COMMANDS = [
    ([], "--config is missing; --list shows"),
    (["--config="], "no config file"),
    (["--config=missing.py"], "There is no config file 'missing.py'"),
    (["--config=quickstrt"], "Did you mean quickstart?"),
    (["--config=syntax.py"], "syntax.py, line 1: invalid syntax"),
    (["--config=nothing.py"], "has no attribute 'get_config'"),
    (["--config=unknown.py"], 'unknown.py, line 4: AttributeError: Key "chanels" does not exist'),
    (["--config=unknown.py"], 'Did you mean "channels" instead of "chanels"?'),
    (["--config=number.py"], "returns no ConfigDict, but 3"),
    (["--config=division.py"], "division.py, line 2: ZeroDivisionError: division by zero"),
    ([f"--config={runs.ROOT}/configs/vqgan_f16.py:nonsense=1"], "argument 'nonsense=1' is unknown"),
    ([f"--config={runs.ROOT}/configs/vqgan_f16.py:codes=many"], "'codes=many' needs a value like"),
    ([f"--config={TINY}", "--config.model.chanels=64"], 'Did you mean "channels"'),
    ([f"--config={TINY}", "--config.model.channels=abc"], "--config.model.channels=abc: "),
    ([f"--config={TINY}", "--no_such_flag=3"], "'no_such_flag'"),
    ([f"--config={TINY}", "tail"], "unexpected argument 'tail'"),
    ([f"--config={TINY}", "--config.data.name=no_such"], "no data set called 'no_such'"),
    ([f"--config={TINY}", "--config.model.resolution=33"], "config.model.resolution is 33"),
]


def train(directory, arguments):
    """The finished `python -m vqgan_jax.train`, started in `directory` on one device."""
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "vqgan_jax.train", *arguments]
    return programs.run(command, cwd=directory, env=environment, timeout=300)


@pytest.fixture(scope="module")
def command_results(run_inputs, tmp_path_factory):
    """The results of `COMMANDS`, two at a time, and what they left in their directory."""
    directory = tmp_path_factory.mktemp("commands")
    for name, text in FILES.items():
        (directory / name).write_text(text)
    distinct = {tuple(arguments) for arguments, _ in COMMANDS}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda arguments: train(directory, arguments), distinct)
        results = dict(zip(distinct, results, strict=True))
    left = {path.name for path in directory.iterdir()} - {"__pycache__"}
    return results, left


@pytest.mark.parametrize(("arguments", "words"), COMMANDS)
def test_bad_command(command_results, arguments, words):
    result = command_results[0][tuple(arguments)]
    assert result.returncode == 1
    assert all(line.startswith(("train ", "devices: ")) for line in result.stdout.splitlines())
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert words in lines[0]


def test_bad_commands_write_nothing(command_results):
    assert command_results[1] == set(FILES)


def test_help(run_inputs, tmp_path):
    result = train(tmp_path, ["--help"])
    assert result.returncode == 0
    assert "--workdir" in result.stdout and "runs/NAME" in result.stdout
    assert "the same command resumes a stopped run" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"data.name": "folder:missing"}, DataError, "The folder missing"),
        ({"data.name": "folder:EMPTY"}, DataError, "has no images"),
        ({"data.train_split": "trian"}, DataError, "no split 'trian'; it has"),
        ({"data.validation_split": "valid"}, DataError, "no split 'valid'; it has"),
        ({"data.image_key": "pixels"}, DataError, "has no pictures of the feature 'pixels'"),
        ({"data.resize": -1, "data.name": "folder:SMALL"}, DataError, "too few for a crop of 16"),
        ({"data.resize": 8}, DataError, "config.data.resize is 8"),
        ({"model.resolution": 17}, ConfigError, "factor 2 does not divide; take 16."),
        ({"model.channels": 10}, ConfigError, "num_groups 4 does not divide"),
        ({"model.quantizer.kind": "nearst"}, ConfigError, "one of nearest, ema, gumbel"),
        ({"training.batch_size": 0}, ConfigError, "config.training.batch_size is 0"),
        ({"training.batch_size": 12}, ConfigError, "8 data-parallel devices do not divide"),
        ({"optimizer.accumulate": 3}, ConfigError, "config.optimizer.accumulate 3"),
        ({"mesh.fsdp": 3}, ConfigError, "does not fit 8 devices"),
        (LPIPS | {"loss.perceptual_network.path": "none"}, DataError, "Cannot read the perceptual"),
        (LPIPS | {"loss.perceptual_network.sha256": "0"}, DataError, "expected 0"),
    ],
)
def test_bad_config(run_inputs, tmp_path, changes, error, words):
    from tiny_config import get_config

    for name, size in (("SMALL", 12), ("EMPTY", 0)):
        (tmp_path / name).mkdir()
        for i in range(40 if size else 0):
            pixels = np.full((size, size, 3), i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    config = get_config()
    for key, value in changes.items():
        if isinstance(value, str):
            value = value.replace("folder:S", f"folder:{tmp_path}/S")
            value = value.replace("folder:E", f"folder:{tmp_path}/E")
        config.update_from_flattened_dict({key: value})
    workdir = tmp_path / "run"
    with pytest.raises(error) as caught:
        loop.train(config, workdir, jax.devices())
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not workdir.exists()


def test_training_image_smaller_than_the_crop(run_inputs, tmp_path):
    """Found when the first batch is read, which is before anything is written too."""
    from tiny_config import get_config

    for split, size in (("train", 12), ("validation", 20)):
        folder = tmp_path / "images" / split
        folder.mkdir(parents=True)
        for i in range(9):
            Image.fromarray(np.full((size, size, 3), i, np.uint8)).save(folder / f"{i}.png")
    config = get_config()
    config.data.name = f"folder:{tmp_path}/images"
    config.data.resize = -1
    with pytest.raises(DataError, match="12 x 12 pixels are too few for a crop of 16"):
        loop.train(config, tmp_path / "run", jax.devices())
    assert not (tmp_path / "run").exists()


def test_workdir_that_cannot_be_written(run_inputs, tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        line = runs.fails(workdir)
        assert str(workdir) in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_no_deprecation_warnings(run_inputs, tmp_path):
    """Two steps, an evaluation and a checkpoint, where any such warning of ours is an error."""
    workdir = tmp_path / "run"
    script = (
        "import warnings\n"
        "for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):\n"
        "    warnings.filterwarnings('error', category=kind, module=r'vqgan_jax\\.')\n"
        "from tiny_config import get_config\n"
        "from vqgan_jax.training.loop import train\n"
        "config = get_config()\n"
        "config.training.num_steps = 3\n"
        f"train(config, {str(workdir)!r})\n"
    )
    paths = os.pathsep.join([str(runs.ROOT), str(runs.ROOT / "tests")])
    environment = os.environ | {
        "PYTHONPATH": paths,
        "XLA_FLAGS": runs.compiler_flags(devices=1),
    }
    result = programs.run([sys.executable, "-c", script], env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    assert runs.steps(workdir)[-1] == 3
