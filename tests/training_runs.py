"""Real training runs for tests: as processes, as users start them, and what they leave on disk."""

import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

import programs
import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = ROOT / "tests" / "tiny_config.py"
TIMINGS = ("images_per_second", "codes_per_second", "data_wait", "goodput")
TIMEOUT = 600  # seconds for any process; a hang fails instead of standing still


def write_inputs(directory):
    """Smooth random images, 40 to train on and 11 to validate on, and perceptual weights."""
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("validation", 11)):
        folder = directory / "images" / split
        folder.mkdir(parents=True)
        for i in range(count):
            small = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8))
            small.resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{i:03}.png")
    tiny.write_weights(directory / "alexnet.ckpt", tiny.published_tree("alexnet"))


def inputs_environment(directory):
    """What `tiny_config.py` reads from the environment."""
    weights = directory / "alexnet.ckpt"
    return {
        "VQGAN_JAX_TEST_IMAGES": str(directory / "images"),
        "VQGAN_JAX_TEST_WEIGHTS": str(weights),
        "VQGAN_JAX_TEST_SHA256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def made_once(directory, make):
    """`directory`, filled by `make(directory)` in the first of all test processes that asks."""
    with open(directory.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            partial = directory.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(directory)
    return directory


def start(
    workdir, *arguments, devices=1, process=None, dtype="float32", config=CONFIG, variables=()
):
    """`python -m vqgan_jax.train` in a process of its own.

    `process` is (index, count, port) for one of several processes of a run; `variables` are more of
    the environment.
    """
    environment = os.environ | {
        "XLA_FLAGS": compiler_flags(devices),
        "PYTHONPATH": str(ROOT),
        "JAX_ENABLE_X64": str(int(dtype == "float64")),
    }
    if process is not None:
        environment |= process_environment(*process)
    command = [sys.executable, "-m", "vqgan_jax.train", f"--config={config}:{dtype}"]
    return programs.Program(
        [*command, f"--workdir={workdir}", *arguments],
        env=environment | dict(variables),
    )


def compiler_flags(devices):
    """Those of the tests, for another number of devices."""
    return re.sub(r"(?<=device_count=)\d+", str(devices), os.environ["XLA_FLAGS"])


def process_environment(index, count, port):
    """What makes a process one of several, on this machine."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }


def finish(process):
    """Waits; the exit code, standard output and standard error."""
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, output, errors


def run(workdir, *arguments, **options):
    """Starts and finishes a run that must succeed; its standard output and error."""
    code, output, errors = finish(start(workdir, *arguments, **options))
    assert code == 0, f"exit code {code}\n{output[-2000:]}\n{errors[-4000:]}"
    return output, errors


def fails(workdir, *arguments, **options):
    """The line that a run ends with, which must be the only one of that kind, without traceback."""
    code, _, errors = finish(start(workdir, *arguments, **options))
    assert code == 1, f"exit code {code}\n{errors[-4000:]}"
    assert "Traceback" not in errors, errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and errors.splitlines()[-1] == lines[0], errors
    return lines[0]


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_several(count, workdir, *arguments, **options):
    """The processes of one run; `options` as of `start`."""
    port = free_port()
    return [
        start(workdir, *arguments, process=(index, count, port), **options)
        for index in range(count)
    ]


def wait_for_step(process, workdir, step):
    """Returns once the run in `workdir` has logged `step`."""
    path = workdir / "metrics.jsonl"
    end = time.monotonic() + TIMEOUT
    while not path.exists() or f'{{"step": {step},' not in path.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"step {step} never came"
        time.sleep(0.01)


def wait_for_checkpoint(process, workdir):
    """Returns once `workdir` has a whole checkpoint, which comes a while after its step."""
    end = time.monotonic() + TIMEOUT
    while not (workdir / "checkpoints").is_dir() or not steps(workdir):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no checkpoint ever came"
        time.sleep(0.01)


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def metrics(workdir):
    """The lines of `metrics.jsonl`, without what depends on the clock."""
    return [
        {k: v for k, v in line.items() if k.split("/")[0] not in TIMINGS}
        for line in _lines(workdir)
    ]


def steps(workdir):
    """The steps of the checkpoints in a run directory."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def state(workdir, step):
    """All arrays of a checkpoint by path, on the host."""
    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return tiny.leaves(
            checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        )


def copy_until(source, target, step):
    """A run directory as it was when the checkpoint of `step` was the newest."""
    shutil.copytree(source, target)
    for newer in steps(target):
        if newer > step:
            shutil.rmtree(target / "checkpoints" / str(newer))
    (target / "evaluation.json").unlink()
    kept = [line for line in _lines(target) if line["step"] <= step]
    (target / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return target


def fingerprint(directory):
    """The content of every file under a directory, to see that nothing changed."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def assert_same_run(workdir, reference, step):
    """Bit for bit the same metrics and the same final state."""
    assert metrics(workdir) == metrics(reference)
    ours, theirs = state(workdir, step), state(reference, step)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def assert_close_metrics(workdir, reference, ignored=()):
    """Every metric of every step but the groups `ignored`, for runs in float64.

    In float32, rounding decides now and then on which side of a kink an activation lies, and what
    depends on it moves by 1e-3 and more. In float64 nothing but a defect does that.
    """
    ours, theirs = metrics(workdir), metrics(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            if name.split("/")[0] not in ignored:
                np.testing.assert_allclose(
                    a[name], value, rtol=1e-5, atol=1e-8, err_msg=f"{name} at step {b['step']}"
                )
