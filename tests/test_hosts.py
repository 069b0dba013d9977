"""Runs of several processes of which one does not come, dies or fails: the others end and say why.

All with real processes; runs are compared in float64, see `training_runs.assert_close_metrics`.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

import programs
import training_runs as runs
from vqgan_jax import distributed
from vqgan_jax.configuration import ConfigError

# One after the other: where several processes compile, Gloo waits 30 s for the slowest.
pytestmark = pytest.mark.xdist_group("processes")

HOST = os.uname().nodename
LAST = 16
SMALL = (
    "--config.discriminator.norm=group",
    f"--config.training.num_steps={LAST}",
    "--config.training.evaluate_every=8",
)
SECONDS = 60.0  # within which the others end


@pytest.fixture(scope="session")
def undisturbed(shared_directory, run_inputs):
    """A run of one process."""

    def make(directory):
        runs.run(directory, *SMALL, dtype="float64")

    return runs.made_once(shared_directory / "undisturbed", make)


def end_of(process):
    """Exit code, the one line of error and the seconds that it took; no traceback is printed."""
    start = time.monotonic()
    code, output, errors = runs.finish(process)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in errors and len(lines) == 1, errors
    assert errors.splitlines()[-1] == lines[0], errors
    return code, lines[0], time.monotonic() - start


def assert_is_gone(line, victim, workdir):
    """The line of a process that lost another; the step that the run goes on from."""
    found = re.fullmatch(
        rf"error: process {victim} \(host {HOST}\) is gone: its connection was closed\. "
        r"This process stops too; the same command goes on from the last checkpoint "
        r"\(step (\d+)\)\.",
        line,
    )
    assert found and int(found[1]) == runs.steps(workdir)[-1] < LAST, line
    return int(found[1])


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_one_goes_on(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    processes = runs.start_several(2, workdir, *SMALL, dtype="float64")
    runs.wait_for_checkpoint(processes[0], workdir)
    processes[1].kill()
    code, line, seconds = end_of(processes[0])
    runs.finish(processes[1])
    assert code == 75 and seconds < SECONDS
    step = assert_is_gone(line, 1, workdir)
    output, _ = runs.run(workdir, *SMALL, dtype="float64")
    assert f"Going on from step {step} " in output
    runs.assert_close_metrics(workdir, undisturbed)


@pytest.mark.slow
def test_the_first_process_is_killed(run_inputs, tmp_path):
    """It is what all others are connected to, by way of which JAX aborts them."""
    workdir = tmp_path / "run"
    processes = runs.start_several(3, workdir, *SMALL, "--config.training.batch_size=9")
    runs.wait_for_checkpoint(processes[0], workdir)
    processes[0].kill()
    for process in processes[1:]:
        code, line, seconds = end_of(process)
        assert code == 75 and seconds < SECONDS
        assert_is_gone(line, 0, workdir)
    runs.finish(processes[0])


@pytest.mark.slow
def test_bad_images_of_one_process_end_the_other(run_inputs, tmp_path):
    """The images are other files for each process here, as on disks of their own."""
    damaged = tmp_path / "images"
    shutil.copytree(run_inputs / "images", damaged)
    for path in (damaged / "train").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    workdir, port = tmp_path / "run", runs.free_port()
    first = runs.start(workdir, *SMALL, process=(0, 2, port))
    second = runs.start(
        workdir, *SMALL, process=(1, 2, port), variables={"VQGAN_JAX_TEST_IMAGES": str(damaged)}
    )
    code, cause, _ = end_of(second)
    assert code == 1 and ("damaged" in cause or "read" in cause), cause
    code, line, seconds = end_of(first)
    assert code == 1 and seconds < SECONDS
    assert line == f"error: process 1 (host {HOST}) stopped: {cause.removeprefix('error: ')}"


@pytest.mark.slow
def test_processes_that_do_not_agree(run_inputs, tmp_path):
    """The same start would end the same again: that is no code that asks for it."""
    port = runs.free_port()
    started = [runs.start(tmp_path / "run", process=(i, 3 - i, port)) for i in range(2)]
    for process in started:
        code, line, seconds = end_of(process)
        assert code == 1 and seconds < SECONDS
        assert "was told that there are 2 processes, and process 0 that there are 3" in line


@pytest.mark.slow
def test_a_process_that_never_comes(run_inputs, tmp_path):
    port = runs.free_port()
    for process, words in (
        ((0, 3, port), ["processes 1, 2 did not come within 2 s"]),
        ((1, 3, port), ["process 0 (host 127.0.0.1) did not come within 2 s"]),
    ):
        alone = runs.start(tmp_path / "run", "--join_timeout=2", process=process)
        code, line, seconds = end_of(alone)
        assert code == 75 and seconds < SECONDS
        assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


# ---- Parts of it, in small programs.

JOIN = """
import os, sys, time
import jax
from vqgan_jax import command_line, distributed
def main():
    distributed.join()
    index = jax.process_index()
"""
ALL_READ = """
    from jax.sharding import NamedSharding
    from tiny_config import get_config
    from vqgan_jax.data.pipeline import evaluation_batches
    from vqgan_jax.training.sharding import BATCH, make_mesh
    opened = []
    def note(event, arguments):
        if event == "open" and str(arguments[0]).endswith(".png"):
            opened.append(os.path.basename(arguments[0]))
    sys.addaudithook(note)
    config = get_config()
    rows = NamedSharding(make_mesh(config.mesh), BATCH)
    batches = [batch for batch, _ in evaluation_batches(config, rows, 4)]
    assert len(batches) == 3 and batches[0]["image"].shape[0] == 4
    print(*opened)
"""
LATE = """
    distributed.barrier("both")
    distributed.barrier("both")
    time.sleep(30 * index)
    distributed.barrier("lunch", 2.0)
"""
HANG = """
    import numpy as np
    from jax.experimental import multihost_utils
    multihost_utils.process_allgather(np.ones(3))
    print("joined", flush=True)
    while True:
        multihost_utils.process_allgather(np.ones(3))
"""
CUT_THE_NETWORK = """
ip link set lo up
for i in 0 1; do JAX_PROCESS_ID=$i "$0" program.py >output_$i 2>errors_$i & all="$all $!"; done
until grep -q joined output_0 && grep -q joined output_1; do sleep 0.1; done
ip link set lo down
for process in $all; do wait $process; echo $?; done
"""


def write_program(text, directory):
    """A program that joins and does what the text says, and the environment of two of it."""
    program = directory / "program.py"
    program.write_text(f"{JOIN}{text}\nsys.argv = sys.argv[:1]\ncommand_line.run(main)\n")
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{runs.free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "PYTHONPATH": f"{runs.ROOT}:{runs.ROOT / 'tests'}",
        "XLA_FLAGS": "",
    }
    return program, environment


def start_programs(text, directory):
    """Two processes of a program."""
    program, environment = write_program(text, directory)
    return [
        programs.Program(
            [sys.executable, program],
            env=environment | {"JAX_PROCESS_ID": str(index)},
        )
        for index in range(2)
    ]


@pytest.mark.slow
def test_each_process_opens_its_own_images(run_inputs, tmp_path):
    opened = []
    for process in start_programs(ALL_READ, tmp_path):
        code, output, errors = runs.finish(process)
        assert code == 0, errors
        opened.append(output.split())
    # Batches of 4 over two processes, from 11 images in order.
    places = ((0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10))
    assert [sorted(names) for names in opened] == [[f"{i:03}.png" for i in own] for own in places]


@pytest.mark.slow
def test_a_process_that_does_not_come_to_a_barrier(tmp_path):
    first, second = start_programs(LATE, tmp_path)
    code, line, _ = end_of(first)
    assert code == 75
    assert f"process 1 (host {HOST}) did not come to 'lunch' within 2 s" in line
    code, line, seconds = end_of(second)
    reason = f"process 0 (host {HOST}) stopped: process 1 (host {HOST}) did not come to 'lunch'"
    assert code == 75 and reason in line and seconds < SECONDS


@pytest.mark.slow
def test_a_host_that_vanishes(tmp_path):
    """The network is cut: no connection is closed, and a collective operation hangs."""
    namespace = ["unshare", "--net"]
    try:
        subprocess.run([*namespace, "ip", "link", "set", "lo", "up"], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a network of its own cannot be made here")
    _, environment = write_program(HANG, tmp_path)
    result = subprocess.run(
        [*namespace, "sh", "-c", CUT_THE_NETWORK, sys.executable],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.split() == ["75", "75"], result.stderr
    for index in range(2):
        lines = (tmp_path / f"errors_{index}").read_text().splitlines()
        assert lines == [
            f"error: process {1 - index} (host {HOST}) is gone: no sign of life for 20 s. "
            "This process stops too; the same command goes on from what is stored."
        ]


# ---- Which processes there are, without starting any.

ALL = {
    "JAX_COORDINATOR_ADDRESS": "first:8476",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}
SLURM = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
HEAD_NODE = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.96.0.1,10.148.0.1:34911"}
PORT = 65535 - 2**12 + 1  # the first one that JAX takes for a job


@pytest.fixture
def find(monkeypatch):
    """`find_processes` in an environment that has no other variables of this kind."""
    for name in list(os.environ):
        if name.startswith(("JAX_CO", "JAX_N", "JAX_PR", "SLURM", "OMPI", "TPU", "KUBE", "JOB_")):
            monkeypatch.delenv(name)

    def found(environment=(), **given):
        for name, value in dict(environment).items():
            monkeypatch.setenv(name, value)
        return distributed.find_processes(given, os.environ)

    return found


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, {}, None),
        ({}, {"num_processes": 1}, None),
        ({"JAX_NUM_PROCESSES": "1"}, {"process_id": 0}, None),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, None),
        (SLURM, {"num_processes": 1}, None),
        ({"SLURM_NTASKS": "2"}, {}, None),  # in a batch script, not started by srun
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {}, None),  # a pod of no job
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, {}, None),
        (ALL, {}, ("first:8476", 2, 1)),
        (ALL, {"process_id": 0, "coordinator_address": "[::1]:99"}, ("[::1]:99", 2, 0)),
        (SLURM, {}, (f"node07:{PORT + 5}", 2, 1)),
        (SLURM, {"coordinator_address": "a:1"}, ("a:1", 2, 1)),
        (OPEN_MPI | HEAD_NODE, {}, (f"10.96.0.1:{PORT + 1}", 2, 1)),
        (OPEN_MPI, {"coordinator_address": "a:1"}, ("a:1", 2, 1)),  # Open MPI 5 has no address
    ],
)
def test_found_processes(find, environment, given, expected):
    found = find(environment, **given)
    if expected is None:
        assert found is None
    else:
        assert (found.coordinator, found.count, found.index) == expected


@pytest.mark.parametrize(
    ("environment", "given", "words"),
    [
        ({}, {"num_processes": 2}, "missing: --coordinator_address (or JAX_COORDINATOR_ADDRESS), "),
        (ALL | {"JAX_PROCESS_ID": "2"}, {}, "processes count from 0 to 1"),
        (ALL | {"JAX_PROCESS_ID": "one"}, {}, "JAX_PROCESS_ID is 'one'; it must be a whole number"),
        (ALL, {"num_processes": 0}, "(or JAX_NUM_PROCESSES) is 0"),
        (ALL, {"coordinator_address": "first"}, "is 'first'; it must be HOST:PORT"),
        (OPEN_MPI, {}, "missing: --coordinator_address (or JAX_COORDINATOR_ADDRESS)."),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            {},
            "pip install kubernetes",
        ),
    ],
)
def test_processes_that_cannot_be_found(find, environment, given, words):
    if "kubernetes" in words and importlib.util.find_spec("kubernetes"):
        pytest.skip("the package is installed here")
    with pytest.raises(ConfigError) as raised:
        find(environment, **given)
    assert words in str(raised.value)


def test_workers_of_a_pod_are_named_where_the_environment_knows_them(find):
    environment = ALL | {"TPU_WORKER_HOSTNAMES": "worker-0,worker-1"}
    assert find(environment).hosts == {0: "worker-0", 1: "worker-1"}
