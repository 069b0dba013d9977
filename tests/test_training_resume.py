"""A run that is stopped in any way goes on as if it had not been, and loses nothing."""

import resource
import secrets
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

import training_runs as runs

LAST = 14


@pytest.fixture
def interrupted(reference_run, tmp_path):
    """The reference run as it was after the checkpoint of step 8."""
    return runs.copy_until(reference_run, tmp_path / "run", 8)


@pytest.mark.slow
def test_killed_at_a_random_moment(reference_run, tmp_path):
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # pytest shows it when the test fails
    random = np.random.default_rng(seed)
    workdir = tmp_path / "run"
    for first, last in ((1, 7), (7, LAST)):
        process = runs.start(workdir)
        runs.wait_for_step(process, workdir, int(random.integers(first, last)))
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        runs.finish(process)
    # Checkpoints are written behind the steps: on a slow machine none may be whole yet.
    stored = runs.steps(workdir)
    output, _ = runs.run(workdir)
    assert not stored or "Going on from step" in output or "finished" in output
    runs.assert_same_run(workdir, reference_run, LAST)


@pytest.mark.slow
def test_stopped_by_a_signal(reference_run, tmp_path):
    for attempt in range(5):
        workdir = tmp_path / str(attempt)
        process = runs.start(workdir)
        runs.wait_for_step(process, workdir, 4)
        process.send_signal(signal.SIGTERM)
        code, _, errors = runs.finish(process)
        if code != 0:  # where it is, the last steps were done before the signal came
            break
    assert code == 75, errors
    stopped = runs.steps(workdir)[-1]
    assert stopped < LAST
    assert errors.splitlines() == [
        f"Stopped at step {stopped}; the same command goes on from there."
    ]
    output, _ = runs.run(workdir)
    assert f"Going on from step {stopped} " in output
    runs.assert_same_run(workdir, reference_run, LAST)


def test_finished_run_changes_nothing(reference_run):
    before = runs.fingerprint(reference_run)
    output, errors = runs.run(reference_run)
    assert "is finished: it has all its 14 steps." in output
    assert "PSNR in dB" in output and errors == ""
    assert runs.fingerprint(reference_run) == before


@pytest.mark.slow
def test_truncated_checkpoint_is_set_aside(reference_run, tmp_path):
    workdir = runs.copy_until(reference_run, tmp_path / "run", 12)
    damaged = workdir / "checkpoints" / "12"
    truncate_largest_file(damaged)
    output, errors = runs.run(workdir)
    assert "Going on from step 8 " in output
    assert f"{damaged} is damaged" in errors
    assert "renamed to 12.damaged, and the checkpoint before it is used." in errors
    assert len(errors.splitlines()) == 1
    assert damaged.with_name("12.damaged").is_dir()
    runs.assert_same_run(workdir, reference_run, LAST)


@pytest.mark.slow
def test_all_checkpoints_damaged(interrupted):
    lines = runs.metrics(interrupted)
    for step in runs.steps(interrupted):
        truncate_largest_file(interrupted / "checkpoints" / str(step))
    for _ in range(2):  # nor does a second try start anew over what is there
        line = runs.fails(interrupted)
        assert "None of the checkpoints in" in line and "choose another --workdir" in line.lower()
        names = sorted(path.name for path in (interrupted / "checkpoints").iterdir())
        assert names == ["4.damaged", "7.damaged", "8.damaged"]
        assert runs.metrics(interrupted) == lines


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("--config.model.latent_channels=16", "model.latent_channels is 8 there and 16 here"),
        ("--config.optimizer.ema_decay=0.99", "another training state"),
        ("--config.discriminator.num_layers=2", "another training state"),
    ],
)
def test_checkpoint_of_another_config(interrupted, changed, words):
    before = runs.fingerprint(interrupted)
    line = runs.fails(interrupted, changed)
    assert words in line and "--workdir" in line
    assert runs.fingerprint(interrupted) == before


@pytest.mark.slow
def test_diverged_run_stops(interrupted):
    before = runs.fingerprint(interrupted / "checkpoints")
    line = runs.fails(
        interrupted,
        "--config.optimizer.learning_rate=1e30",
        "--config.training.checkpoint_every=100",
    )
    assert line.startswith("error: Step 10: ") and "loss/total is " in line
    assert "lower config.optimizer.learning_rate" in line
    assert runs.fingerprint(interrupted / "checkpoints") == before


@pytest.mark.slow
def test_no_space_left(interrupted, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk cannot be mounted here")
    try:
        workdir = disk / "run"
        shutil.copytree(interrupted, workdir)
        room = shutil.disk_usage(disk).free - 2**16
        (disk / "ballast").write_bytes(bytes(room))
        before = runs.fingerprint(workdir / "checkpoints")
        line = runs.fails(workdir)
        assert f"Cannot write a checkpoint to {workdir / 'checkpoints'}: it needs" in line
        assert "make room" in line
        assert runs.fingerprint(workdir / "checkpoints") == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_write_that_fails_half_way(reference_run, interrupted):
    """No file may grow beyond 32 KiB, as where a quota is used up, until the second attempt."""
    before = runs.fingerprint(interrupted / "checkpoints")
    process = runs.start(interrupted)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**15, 2**15))
    code, _, errors = runs.finish(process)
    assert code == 1
    assert errors.startswith("error: Cannot write a checkpoint to") and errors.count("\n") == 1
    assert before.items() <= runs.fingerprint(interrupted / "checkpoints").items()
    runs.run(interrupted)
    runs.assert_same_run(interrupted, reference_run, LAST)


def truncate_largest_file(directory):
    """Cuts the file that holds most of the checkpoint's arrays to half its size."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
