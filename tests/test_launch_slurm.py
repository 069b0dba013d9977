"""launch/slurm.sh and the job it submits, with a fake SLURM that runs the job here."""

import json
import shutil

import pytest

import launch_fakes as fakes

OPTIONS = ("--name=f16", "--nodes=2", "--gpus_per_node=4", "--python=python3")
COMMAND = (
    "--",
    "vqgan_jax.train",
    "--config=configs/quickstart.py",
    "--config.training.freeze=('encoder','quantizer')",
    '--b=$HOME `date` "x" \\',
)


@pytest.fixture
def place(tmp_path):
    return fakes.Place(tmp_path / "place")


def launch(place, *arguments, plan=()):
    return place.launch("slurm.sh", *OPTIONS, *arguments, *COMMAND, plan=plan)


def job(place):
    """Exit code and output of the job when it last ended."""
    return json.loads((place.directory / "job.json").read_text())


def names(place):
    return [call[0] for call in place.calls()]


def test_job(place):
    result = launch(place, "--time=24:00:00", "--partition=gpu", "--sbatch=--mem=64G")
    assert result.returncode == 0, result.stderr
    assert "Submitted batch job 7" in result.stdout
    assert "the log is runs/slurm/f16-JOB.log" in result.stderr
    sbatch, srun = place.calls()
    options = set(sbatch[1 : sbatch.index(str(fakes.ROOT / "launch/slurm_job.sh"))])
    assert options == {
        "--job-name=f16",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=8",
        "--signal=TERM@120",
        "--requeue",
        "--open-mode=append",
        "--output=runs/slurm/%x-%j.log",
        "--time=24:00:00",
        "--partition=gpu",
        "--mem=64G",
    }
    assert (place.directory / "runs/slurm").is_dir()  # SLURM makes no directories for logs
    python = shutil.which("python3")
    assert srun[1:] == [
        "--label",
        "--gpu-bind=none",
        "--cpus-per-task=8",
        python,
        "-m",
        *COMMAND[1:],
    ]
    assert job(place)["code"] == 0


def test_stopped_job_is_put_back(place):
    launch(place, plan={"srun": [75, 75, 0]})
    assert names(place) == ["sbatch", "srun", "scontrol", "srun", "scontrol", "srun"]
    assert job(place)["code"] == 0


@pytest.mark.parametrize("code", [1, 137])
def test_failed_job_is_not(place, code):
    launch(place, plan={"srun": [75, code]})
    assert names(place) == ["sbatch", "srun", "scontrol", "srun"]
    assert job(place)["code"] == code
    assert f"job 7: ended with exit code {code}." in job(place)["output"]


def test_restarts_are_limited(place):
    launch(place, "--max_restarts=2", plan={"srun": [75] * 9})
    assert names(place).count("srun") == 3
    assert job(place)["code"] == 75
    assert "no restarts are left of 2." in job(place)["output"]


def test_job_that_cannot_be_put_back(place):
    launch(place, plan={"srun": [75], "scontrol": [1]})
    assert job(place)["code"] == 75
    assert "cannot be put back; submit the same command again." in job(place)["output"]


def test_dry_run_is_what_a_run_does(place):
    dry = launch(place, "--dry_run")
    assert dry.returncode == 0 and dry.stderr == ""
    assert place.calls() == [] and not (place.directory / "runs").exists()
    launch(place)
    mkdir, sbatch = fakes.dry_commands(dry.stdout)
    assert mkdir == ["mkdir", "-p", "runs/slurm"]
    assert sbatch == place.calls("sbatch")[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--name=a b"], "--name=a\\ b is not a name of letters"),
        (["--nodes=0"], "--nodes=0 is not a whole number"),
        (["--gpus_per_node=all"], "is not a whole number"),
        (["--time=soon"], "--time=soon is not a time such as 24:00:00"),
        (["--python=no_such_python"], "there is no program no_such_python"),
    ],
)
def test_bad_options(place, arguments, words):
    result = launch(place, *arguments)
    assert result.returncode == 1
    assert words in result.stderr and result.stderr.count("\n") == 1
    assert place.calls() == []
