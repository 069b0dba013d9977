"""Ctrl-C ends every command with one line and 130, or 75 where it saved; never a traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

import programs
import training_runs as runs
from vqgan_jax.training.stopping import INTERRUPTED

COMMANDS = ("train", "tokenize", "sample", "reconstruct", "probe", "convert", "plan", "describe")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, "RESOURCE_EXHAUSTED: 5 GiB"])
def test_ends_of_commands(error):
    """What a command ends with where its work does."""
    raised = f"RuntimeError({error!r})" if isinstance(error, str) else f"{error.__name__}()"
    code = (
        "import sys; sys.argv = ['x']\n"
        "from vqgan_jax import command_line\n"
        f"def main():\n    raise {raised}\n"
        "command_line.run(main)\n"
    )
    done = programs.run([sys.executable, "-c", code], env=_environment(), timeout=60)
    (line,) = done.stderr.splitlines()
    if error is KeyboardInterrupt:
        assert (done.returncode, line) == (INTERRUPTED, "Interrupted.")
    else:
        assert done.returncode == 1 and line.startswith("error: There is not enough memory")


def test_flags_that_are_no_numbers():
    done = programs.run(
        [sys.executable, "-m", "vqgan_jax.sample", "--checkpoint=x", "--output=y",
         "--temperature=nan"],
        env=_environment(),
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        1,
        "error: --temperature is nan; it must be a finite number.\n",
    )


def _environment():
    return os.environ | {"PYTHONPATH": str(runs.ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("seconds", [0.8, 1.5])  # while it imports
def test_ctrl_c_while_a_command_starts(command, seconds, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", f"vqgan_jax.{command}", "--help"],
        env=_environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors
    assert process.returncode in (0, INTERRUPTED, -signal.SIGINT)
