"""What all scripts of launch/ have in common."""

import os
import re
import shutil
import subprocess
import sys

import pytest

import launch_fakes as fakes

SCRIPTS = sorted(
    str(path.relative_to(fakes.ROOT)) for path in (fakes.ROOT / "launch").rglob("*.sh")
)
LAUNCHERS = ["tpu_pod.sh", "slurm.sh", "kubernetes/launch.sh"]
COMMAND = ("--", "vqgan_jax.train", "--config=configs/quickstart.py")
OPTIONS = {
    "tpu_pod.sh": ("--name=a", "--zone=us-east5-b"),
    "slurm.sh": ("--name=a",),
    "kubernetes/launch.sh": ("--name=a", "--image=b", "--kind=gpu", "--per_host=1"),
}


@pytest.fixture
def place(tmp_path):
    return fakes.Place(tmp_path / "place")


def test_shellcheck():
    # It is installed beside Python, which need not be on the PATH.
    directories = [os.path.dirname(sys.executable), os.environ["PATH"]]
    program = shutil.which("shellcheck", path=os.pathsep.join(directories))
    command = [program, "--external-sources", *SCRIPTS]
    result = subprocess.run(command, cwd=fakes.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_has_all_options(place, script):
    result = place.launch(script, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith(("Runs ", "Submits "))
    source = (fakes.ROOT / "launch" / script).read_text()
    options = set(re.findall(r"(--[a-z_]+)=?\*?\)", source)) - {"--help"}
    assert len(options) > 8
    assert options <= set(re.findall(r"--[a-z_]+", result.stdout))


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nmae=x", *COMMAND), "error: unknown option --nmae=x; see --help."),
        (("--name", "x", *COMMAND), "error: unknown option --name; see --help."),
        (("x y", *COMMAND), "error: unknown option x\\ y; see --help."),
        ((), "error: no command; it comes after --"),
        (("--",), "error: no command; it comes after --"),
        (("--", "vqgan_jax.trian"), "error: vqgan_jax.trian is no command of the package"),
        (("--", "train.py"), "error: train.py is no command of the package"),
        (("--", "vqgan_jax.train;date"), "error: vqgan_jax.train\\;date is no command"),
    ],
)
def test_errors_are_one_line(place, script, arguments, words):
    result = place.launch(script, *OPTIONS[script], *arguments)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(words) and result.stderr.count("\n") == 1
    assert place.calls() == []
