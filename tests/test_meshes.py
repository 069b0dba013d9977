"""Every mesh, on one process or two, computes what one device does, in both stages."""

import json
import os
import sys

import numpy as np
import pytest

import programs
import training_runs as runs

# One after the other: where several processes compile, Gloo waits 30 s for the slowest.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

# Each axis alone, all in one, and what depends on the whole batch; on a config's first mesh its
# state is born. `test_training_devices` has a tokenizer on eight devices of data.
ON_EIGHT = ["tokenizer:2,2,2", "tokenizer:2,2,1,2", "transformer:2,2,2", "transformer:1,8,1"]
ON_EIGHT += ["ema_and_act_norm:4,2,1", "gumbel_and_perceptual:8,1,1"]
# Two processes are apart along the first axis that is not 1: each axis once.
ON_TWO = ["tokenizer:1,8,1", "transformer:2,2,2"]


def start(output, wanted, devices, process=None):
    """`mesh_losses.py` as a process of its own; `process` as of `training_runs.start`."""
    environment = os.environ | {
        "XLA_FLAGS": runs.compiler_flags(devices),
        "PYTHONPATH": f"{runs.ROOT}{os.pathsep}{runs.ROOT / 'tests'}",
        "JAX_ENABLE_X64": "1",
    }
    if process is not None:
        environment |= runs.process_environment(*process)
    return programs.Program(
        [sys.executable, str(runs.ROOT / "tests" / "mesh_losses.py"), str(output), *wanted],
        env=environment,
    )


def finished(processes, output):
    for process in processes:
        code, _, errors = runs.finish(process)
        assert code == 0, errors
    return json.loads(output.read_text())


@pytest.fixture(scope="session")
def on_one_device(shared_directory, run_inputs, transformer_inputs):
    def make(directory):
        names = dict.fromkeys(run.split(":")[0] for run in ON_EIGHT)
        output = directory / "metrics.json"
        finished([start(output, [f"{name}:1,1,1" for name in names], 1)], output)

    directory = runs.made_once(shared_directory / "one_device", make)
    found = json.loads((directory / "metrics.json").read_text())
    return {run.split(":")[0]: metrics for run, metrics in found.items()}


def assert_same(found, wanted, expected):
    """Within 1e-6 in double precision; in single a kink moves some figures by 4e-4."""
    assert list(found) == list(wanted)
    for run, metrics in found.items():
        reference = expected[run.split(":")[0]]
        for step, (ours, theirs) in enumerate(zip(metrics, reference, strict=True)):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                np.testing.assert_allclose(
                    ours[key], value, rtol=1e-6, atol=1e-9, err_msg=f"{run} {key} at {step}"
                )


def test_eight_devices(on_one_device, tmp_path):
    output = tmp_path / "metrics.json"
    found = finished([start(output, ON_EIGHT, 8)], output)
    assert_same(found, ON_EIGHT, on_one_device)


def test_two_processes_of_four_devices(on_one_device, tmp_path):
    output, port = tmp_path / "metrics.json", runs.free_port()
    processes = [start(output, ON_TWO, 4, (index, 2, port)) for index in range(2)]
    assert_same(finished(processes, output), ON_TWO, on_one_device)
