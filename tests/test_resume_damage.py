"""Small files of a run that are damaged in any way: a start ends as it would have, and says so."""

import json
import os
import random
import shutil

import jax
import numpy as np
import pytest

import tiny
import tiny_config
import training_runs as runs
from vqgan_jax import configuration
from vqgan_jax.checkpoints.directory_lock import LOCK_FILE, locked
from vqgan_jax.checkpoints.writing import naming, write_text
from vqgan_jax.errors import DataError
from vqgan_jax.training import loop
from vqgan_jax.training.checkpoints import CheckpointError, Checkpoints
from vqgan_jax.training.goodput import Goodput
from vqgan_jax.training.logging import MetricWriter
from vqgan_jax.training.phases import PhaseClock
from vqgan_jax.training.run_files import (
    set_aside_others,
    stored_config,
    stored_figures,
    warn_of_lost_lines,
)

LAST = 14
DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "noise": lambda content: random.Random(0).randbytes(max(50, len(content))),
    "zeros": lambda content: bytes(max(5, len(content))),
    "flip": lambda content: flipped(content),
    "deep": lambda content: b"[" * 100_000,
    "digits": lambda content: b'{"step": ' + b"9" * 10_000 + b"}",
    "missing": None,
    "folder": "folder",
    "pipe": "pipe",
}


def flipped(content):
    changed = bytearray(content)
    changed[len(content) // 2] ^= 0x10
    return bytes(changed)


def damage(path, kind):
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_bytes(DAMAGE[kind](content))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# ---- Checkpoints, without a training.


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run of steps 1 and 2, whose state is a few numbers."""
    workdir, config = tmp_path_factory.mktemp("run"), tiny.config_of_tiny_model()
    checkpoints = Checkpoints(workdir, config)
    for step in (1, 2):
        state = {"step": jax.numpy.int32(step), "w": jax.numpy.arange(4.0) * step}
        checkpoints.save(step, state, {"lpips": 1.0 / step})
    checkpoints.close()
    (workdir / "config.json").write_text(configuration.to_json(config))
    return workdir


def restored(workdir):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = jax.ShapeDtypeStruct
    abstract = {
        "step": shape((), np.int32, sharding=device),
        "w": shape((4,), np.float32, sharding=device),
    }
    checkpoints = Checkpoints(workdir, tiny.config_of_tiny_model())
    try:
        step, state = checkpoints.restore(abstract)
    finally:
        checkpoints.close()
    np.testing.assert_array_equal(state["w"], np.arange(4.0) * step)
    return step


BESIDE = ("config/metadata", "metrics/metrics", "_CHECKPOINT_METADATA")


@pytest.mark.parametrize("file", BESIDE)
def test_a_good_state_is_used_whatever_lies_beside_it(two_checkpoints, tmp_path, caplog, file):
    for kind in DAMAGE:
        workdir = tmp_path / kind
        shutil.copytree(two_checkpoints, workdir)
        path = workdir / "checkpoints" / "2" / file
        before = path.read_bytes()
        damage(path, kind)
        caplog.clear()
        assert restored(workdir) == 2, kind
        # Within a checkpoint orbax would take it for an item of it.
        assert not list((workdir / "checkpoints" / "2").rglob("*.damaged*")), kind
        ours = [record for record in caplog.records if "is damaged (" in record.getMessage()]
        is_said = bool(ours) or "takes its place" in caplog.text
        if kind == "flip":  # which may be another good file
            continue
        if file == "config/metadata":
            assert is_said, kind
            found, stored = (configuration.from_json(text) for text in (before, path.read_bytes()))
            assert found.to_dict() == stored.to_dict()
        elif kind != "missing":
            assert len(ours) == 1, kind
        assert restored(workdir) == 2  # and once more, with what is left


def test_a_config_of_another_model_is_damage_only_where_the_run_says_so(two_checkpoints, tmp_path):
    """Where both say the same, it is the command that is of another model."""
    for is_run in (False, True):
        workdir = tmp_path / str(is_run)
        shutil.copytree(two_checkpoints, workdir)
        files = [workdir / "checkpoints" / str(step) / "config" / "metadata" for step in (1, 2)]
        for file in [*files, workdir / "config.json"][: 3 if is_run else 2]:
            values = json.loads(file.read_text())
            values["model"]["channels"] = 64
            file.write_text(json.dumps(values))
        if is_run:
            with pytest.raises(CheckpointError, match="model.channels is 64 there and 32 here"):
                restored(workdir)
        else:
            assert restored(workdir) == 2


def test_a_damaged_state_falls_back_to_the_one_before(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "2" / "state"
    shutil.rmtree(state)
    assert restored(tmp_path / "run") == 1
    assert names(tmp_path / "run" / "checkpoints") == ["1", "2.damaged"]


def test_the_rules_of_a_run_outlive_its_config(two_checkpoints, tmp_path):
    for kind in DAMAGE:
        workdir = tmp_path / kind
        shutil.copytree(two_checkpoints, workdir)
        for file in (workdir / "checkpoints").glob("*/config/metadata"):
            values = json.loads(file.read_text())
            values["data"]["folder_rules"] = 1
            file.write_text(json.dumps(values))
        damage(workdir / "config.json", kind)
        set_aside_others(workdir)
        if kind != "flip":  # of a digit or a name, which may be another good config
            assert stored_config(workdir).data.folder_rules == 1
    assert stored_config(tmp_path) is None


# ---- Files beside the checkpoints.


def test_files_where_folders_belong_and_the_other_way_round(tmp_path, caplog):
    for name in ("config.json", "evaluation.json", "metrics.jsonl"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "goodput.json")
    (tmp_path / "wandb_id.txt").symlink_to(tmp_path / "nowhere")
    for name in ("checkpoints", "images", "tensorboard"):
        (tmp_path / name).write_text("")
    set_aside_others(tmp_path)
    assert all(name.endswith(".damaged") for name in names(tmp_path)) and len(caplog.records) == 8
    set_aside_others(tmp_path)
    assert len(caplog.records) == 8


@pytest.mark.parametrize("kind", sorted(DAMAGE.keys() - {"missing", "flip"}))
def test_figures_and_times_that_cannot_be_read(tmp_path, caplog, kind):
    figures, times = tmp_path / "evaluation.json", tmp_path / "goodput.json"
    figures.write_text(json.dumps({"psnr": 20.0, "lpips": float("inf")}))
    assert stored_figures(figures) == {"psnr": 20.0, "lpips": float("inf")}
    Goodput(tmp_path, PhaseClock(), 0).write()
    for file in (figures, times):
        damage(file, kind)
    caplog.clear()
    assert stored_figures(figures) is None and not figures.exists()
    set_aside_others(tmp_path)
    goodput = Goodput(tmp_path, PhaseClock(), 0)
    goodput.write()
    assert goodput.line().endswith("1 start")
    assert "goodput.json is damaged" in caplog.text


def test_lost_lines_are_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(10, 60, 10))
    for content, last in (
        (whole, 50),
        (whole + '{"step": 6', 50),
        (whole[:60], 20),
        ("", 0),
        ("\x00" * 100, 0),
        ('{"step": true}\n{"step": NaN}\n{"step": -1}\n' + whole, 50),
    ):
        path.write_text(content)
        caplog.clear()
        writer = MetricWriter(tmp_path, resume_step=55)
        writer.close()
        assert writer.last_step == last
        kept = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(10, last + 1, 10))
        assert path.read_text() == kept
        warn_of_lost_lines(tmp_path, writer.last_step, 55, 10)
        said = f"nothing of the steps {last + 1} to 50" in caplog.text
        assert said == (last < 50)
        assert ("is damaged" in caplog.text) == (content[:1] == "\x00" or "true" in content)


# ---- Locks, and disks that cannot be written.


def test_a_second_job_is_refused_before_anything(run_inputs, tmp_path):
    config = tiny_config.get_config()
    with locked(tmp_path / "run"):
        with pytest.raises(DataError, match="is in use by another job"):
            loop.train(config, tmp_path / "run")
        assert names(tmp_path / "run") == [LOCK_FILE]
    assert not (tmp_path / "run").exists()  # which the job made and left empty


def test_a_run_that_cannot_begin_leaves_nothing(run_inputs, tmp_path):
    config = tiny_config.get_config()
    config.data.name = f"folder:{tmp_path / 'nowhere'}"
    with pytest.raises(DataError):
        loop.train(config, tmp_path / "parent" / "run")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("n" * 300)):
        with pytest.raises(OSError) as error:
            loop.train(config, workdir)
        assert str(error.value.filename).startswith(str(workdir))


def test_a_full_disk_is_told_with_the_files_name(tmp_path):
    with pytest.raises(OSError) as error, naming(tmp_path / "x"), open("/dev/full", "w") as full:
        full.write("a")
    assert (error.value.strerror, error.value.filename) == (
        "No space left on device",
        str(tmp_path / "x"),
    )
    write_text(tmp_path / "y", "text")
    assert names(tmp_path) == ["y"] and (tmp_path / "y").read_text() == "text"


# ---- All of it with a real run.


@pytest.fixture(scope="module")
def unfinished(reference_run, tmp_path_factory):
    """The reference run after step 12, with checkpoints of 7, which was evaluated, and 12."""
    workdir = tmp_path_factory.mktemp("unfinished") / "run"
    runs.copy_until(reference_run, workdir, 12)
    shutil.copy(reference_run / "evaluation.json", workdir)
    for step in runs.steps(workdir):
        if step not in (7, 12):
            shutil.rmtree(workdir / "checkpoints" / str(step))
    return workdir


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads given up
def test_the_files_of_a_run_damaged_in_every_way(unfinished, tmp_path):
    """A start ends with the state that the undamaged run ends with, bit for bit."""
    beside = ["evaluation.json", "goodput.json", "metrics.jsonl"]
    for step in (7, 12):
        beside += [f"checkpoints/{step}/{file}" for file in ("_CHECKPOINT_METADATA", BESIDE[1])]
    either = ("config.json", "checkpoints/12/config/metadata")  # one takes the other's place
    kinds = list(DAMAGE)
    cases = [  # each file in another way
        {file: kinds[(2 * n + i) % len(kinds)] for i, file in enumerate([*beside, either[n % 2]])}
        for n in range(len(kinds) // 2)
    ]
    state = (unfinished / "checkpoints" / "12" / "state").rglob("*")
    files = sorted(str(path.relative_to(unfinished)) for path in state if path.is_file())
    cases += [{file: "half"} for file in files[::25]]
    expected = []  # from step 12, and from the checkpoint before it
    whole = {"checkpoints/12": "removed"}
    for number, damaged in enumerate([{}, whole, *cases]):
        workdir = tmp_path / str(number)
        shutil.copytree(unfinished, workdir)
        for file, kind in damaged.items():
            if kind == "removed":
                shutil.rmtree(workdir / file)
            else:
                damage(workdir / file, kind)
        loop.train(tiny_config.get_config(), workdir, devices=jax.devices()[:1])
        found = runs.state(workdir, LAST)
        if number < 2:
            expected.append(found)
        same = [all(np.array_equal(found[name], run[name]) for name in run) for run in expected]
        is_of_state = "/state/" in "".join(damaged)  # one file is not always needed
        assert any(same) if is_of_state or number < 2 else same[0], damaged
        assert not (workdir / LOCK_FILE).exists()
