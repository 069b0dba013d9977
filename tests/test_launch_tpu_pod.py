"""launch/tpu_pod.sh against a fake gcloud, whose workers really run what is sent to them."""

import contextlib
import os
import sys

import pytest

import launch_fakes as fakes
import training_runs as runs

OPTIONS = (
    "--name=pod",
    "--zone=us-east5-b",
    "--accelerator_type=v6e-16",
    "--poll_seconds=1",
)
COMMAND = ("--", "vqgan_jax.train", "--config=configs/quickstart.py", "--workdir=/shared/run")
WORKER_LOG = "homes/0/vqgan_jax/run/log"
WAITING = [WORKER_LOG, "waiting"]


@pytest.fixture
def place(tmp_path):
    with contextlib.closing(fakes.Place(tmp_path / "place")) as place:
        yield place


def launch(place, *arguments, plan=(), command=COMMAND, **environment):
    return place.launch("tpu_pod.sh", *OPTIONS, *arguments, *command, plan=plan, **environment)


def verbs(place):
    """What gcloud was asked to do, without the looks at the state."""
    names = {"tpu_worker.sh install": "install", "tpu_worker.sh run": "run"}
    verbs = []
    for call in place.calls("gcloud"):
        verb = call[4]
        if verb == "ssh":
            (verb,) = [name for text, name in names.items() if text in call[-1]]
        verbs.append(verb)
    return [verb for verb in verbs if verb != "list"]


START = ["create", "scp", "install", "run"]


def test_simple_run(place):
    result = launch(place, "--spot", "--at_end=delete", "--service_account=a@b.example")
    assert result.returncode == 0, result.stderr
    assert verbs(place) == [*START, "delete"]
    create = next(call for call in place.calls("gcloud") if call[4] == "create")
    assert create[3:] == [
        "queued-resources",
        "create",
        "pod",
        "--node-id=pod",
        "--zone=us-east5-b",
        "--accelerator-type=v6e-16",
        "--runtime-version=v2-alpha-tpuv6e",
        "--spot",
        "--service-account=a@b.example",
    ]
    assert "line 0 of start 0 on worker 0\n" in result.stdout
    assert (place.directory / "runs/launch/pod.log").read_text() == result.stdout
    assert "pod is deleted." in result.stderr
    assert "JAX_NUM_PROCESSES" not in place.programs()[0]


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
    ],
)
def test_runtime_versions(place, accelerator, version):
    result = launch(place, f"--accelerator_type={accelerator}", "--dry_run")
    assert f"--runtime-version={version}" in result.stdout


@pytest.mark.slow
def test_interruptions_in_a_row(place):
    """Preempted twice, then stopped with the state saved, then done."""
    plan = {
        "exits": [["wait", "wait", "wait", 0]],
        "run": [
            {"do": "preempt", "after": WAITING},
            {"do": "preempt", "after": WAITING},
            {"do": "terminate", "after": WAITING},
        ],
    }
    result = launch(place, plan=plan)
    assert result.returncode == 0, result.stderr
    assert verbs(place) == [*START, "delete", *START, "delete", *START, "run"]
    assert "pod is lost (SUSPENDED, VM PREEMPTED); restart 2 of at most 100." in result.stderr
    assert "the run was stopped, and has saved its state; restart 3 of" in result.stderr
    assert "line 29 of start 3 on worker 0" in result.stdout
    assert "pod is kept, and costs" in result.stderr


@pytest.mark.slow
def test_training_goes_on_bit_for_bit(place, reference_run, tmp_path):
    """The VM is gone after step 4 is stored, SIGTERM comes after step 9; the end is the same."""
    workdir = tmp_path / "run"
    stored = str(workdir / "checkpoints" / "4" / "commit_success.txt")
    metrics = str(workdir / "metrics.jsonl")
    plan = {
        "program": sys.executable,
        "run": [
            {"do": "preempt", "after": [stored, ""]},
            {"do": "terminate", "after": [metrics, '{"step": 9,']},
        ],
    }
    flags = runs.compiler_flags(devices=1)
    command = ("--", "vqgan_jax.train", f"--config={runs.CONFIG}:float32", f"--workdir={workdir}")
    result = launch(
        place, plan=plan, command=command, XLA_FLAGS=flags, PYTHONPATH="", JAX_ENABLE_X64="0"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert verbs(place) == [*START, "delete", *START, "run"]
    assert result.stdout.count("Going on from step") == 2
    assert "; the same command goes on from there." in result.stdout
    runs.assert_same_run(workdir, reference_run, 14)


def test_arguments_reach_every_worker_unchanged(place):
    arguments = [
        "--config.training.freeze=('encoder','quantizer')",
        '--a="$HOME" `date` $(date) \\ * ? ~ # ; & | < > !',
        "--tab=\tand\nnew line ",
        "--empty=",
        "",
        "%USER% %TPU% é  two spaces",
    ]
    result = launch(
        place,
        "--env=FAKE_ENV=$(date) 'x' \"y\" & z=1",
        "--setup=echo \"$HOME's\" >'set up'",
        command=(*COMMAND, *arguments),
        plan={"workers": 3},
    )
    assert result.returncode == 0, result.stderr
    programs = sorted(place.programs(), key=lambda program: program["worker"])
    assert programs == [
        {
            "worker": worker,
            "argv": ["-m", *COMMAND[1:], *arguments],
            "env": "$(date) 'x' \"y\" & z=1",
            "JAX_COORDINATOR_ADDRESS": "10.0.0.0:8476",
            "JAX_NUM_PROCESSES": "3",
            "JAX_PROCESS_ID": str(worker),
        }
        for worker in range(3)
    ]
    for worker in range(3):
        assert (place.home(worker) / "set up").read_text() == f"{place.home(worker)}'s\n"
    assert "on worker 0" in result.stdout and "on worker 1" not in result.stdout
    assert "line 0 of start 0 on worker 1" in (place.home(1) / "vqgan_jax/run/log").read_text()


@pytest.mark.parametrize("options", [[], ["--reserved", "--project=mine", "--at_end=delete"]])
def test_dry_run_is_what_a_run_does(place, tmp_path, options):
    command = (*COMMAND, "--config.training.freeze=('encoder','quantizer')", "--b=$HOME 'x' \"")
    dry = launch(place, *options, "--dry_run", command=command)
    assert dry.returncode == 0 and dry.stderr == ""
    assert place.calls() == []
    assert sorted(p.name for p in place.directory.iterdir()) == ["bin", "plan.json"]
    launch(place, *options, command=command)
    commands = fakes.dry_commands(dry.stdout)
    assert [c[0] for c in commands if c[0] != "gcloud"] == ["mkdir", "tar"]
    assert [c for c in commands if c[0] == "gcloud"] == place.calls("gcloud")


@pytest.mark.slow
def test_printed_commands_can_be_pasted(place, tmp_path):
    dry = launch(place, "--dry_run", command=(*COMMAND, "--b=$HOME 'x' \"")).stdout
    pasted = fakes.Place(tmp_path / "pasted")
    script = tmp_path / "script.sh"
    script.write_text(dry)
    result = pasted.launch(os.path.relpath(script, fakes.ROOT / "launch"))
    assert result.returncode == 0, result.stderr
    assert pasted.calls("gcloud") == [c for c in fakes.dry_commands(dry) if c[0] == "gcloud"]
    assert pasted.programs()[0]["argv"][-1] == "--b=$HOME 'x' \""


@pytest.mark.slow
def test_worker_that_fails(place):
    """Worker 1 fails, and the others end because of it: its code is the one to end with."""
    others = [134, "homes/1/vqgan_jax/run/exit_code"]
    result = launch(place, plan={"workers": 3, "exits": [[others], [1], [others]]})
    assert result.returncode == 1
    assert verbs(place) == START
    assert "failed: worker 1: exit code 1." in result.stderr
    assert "vqgan_jax worker 1: exit code 1 at " in result.stdout
    assert "worker 1: line 29 of start 0 on worker 1\n" in result.stdout
    assert "worker 1: line 5 " not in result.stdout


def test_command_that_fails(place):
    result = launch(place, "--at_end=delete", plan={"exits": [[1]]})
    assert result.returncode == 1
    assert verbs(place) == [*START, "delete"]
    assert "failed: worker 0: exit code 1. The log of worker 0 is" in result.stderr


@pytest.mark.slow
def test_worker_that_was_stopped(place):
    """The others may end in another way then, and the run is started again."""
    others = [134, "homes/1/vqgan_jax/run/exit_code"]
    result = launch(place, plan={"workers": 2, "exits": [[others, 0], [75, 0]]})
    assert result.returncode == 0
    assert verbs(place) == [*START, "run"]


@pytest.mark.slow
def test_worker_that_cannot_start(place):
    """The others wait for it and end with 75, and would do so for ever."""
    others = [75, "homes/1/vqgan_jax/run/exit_code"]
    result = launch(place, plan={"workers": 2, "exits": [[others], [1]]})
    assert result.returncode == 1
    assert verbs(place) == START
    assert "failed: worker 1: exit code 1." in result.stderr


def test_create_that_fails(place):
    result = launch(place, plan={"create": [1]})
    assert result.returncode == 1
    assert verbs(place) == ["create"]
    assert "RESOURCE_EXHAUSTED: quota" in result.stderr
    assert result.stderr.splitlines()[-1] == ("error: cannot create pod; gcloud says why above.")


@pytest.mark.slow
def test_create_that_fails_after_preemption_is_tried_again(place):
    plan = {
        "exits": [["wait"]],
        "run": [{"do": "preempt", "after": WAITING}],
        "create": [0, 1, 1],
    }
    result = launch(place, plan=plan)
    assert result.returncode == 0, result.stderr
    assert verbs(place) == [*START, "delete", "create", "create", *START]


@pytest.mark.slow
def test_workers_that_cannot_be_reached(place):
    result = launch(place, plan={"run": [{"do": "unreachable"}] * 9})
    assert result.returncode == 255
    assert verbs(place) == [*START, *["run"] * 4]
    assert [call[1] for call in place.calls("sleep") if float(call[1]) >= 1] == ["1", "2", "4", "8"]
    assert "gave up after 5 tries: lost the connection to pod (exit code 255)" in result.stderr


@pytest.mark.slow
def test_connection_that_breaks_is_taken_up_again(place):
    """The program on the worker runs once, through both."""
    plan = {
        "exits": [[[0, "release"]]],
        "run": [{"do": "drop", "after": [WORKER_LOG, "line 29"]}, {"do": "unreachable"}, None],
    }
    (place.directory / "release").write_text("")
    result = launch(place, plan=plan)
    assert result.returncode == 0, result.stderr
    assert verbs(place) == [*START, "run", "run"]
    assert len(place.programs()) == 1


@pytest.mark.slow
def test_launcher_that_is_interrupted(place):
    """Ctrl-C ends the launcher; the run goes on, and the same call shows it."""
    plan = {"exits": [[[0, "release"]]]}
    plan["run"] = [{"do": "interrupt", "after": [WORKER_LOG, "line 29"]}]
    result = launch(place, plan=plan)
    assert result.returncode == 130
    assert "A run on pod goes on, and the same call shows it again." in result.stderr
    plan["run"] += [{"do": "release", "after": [WORKER_LOG, "line 29"]}]
    result = launch(place, plan=plan)
    assert result.returncode == 0, result.stderr
    assert verbs(place) == [*START, *START[1:]]
    assert len(place.programs()) == 1


@pytest.mark.slow
def test_tpu_that_is_deleted_by_hand(place):
    plan = {"exits": [["wait"]], "run": [{"do": "delete", "after": WAITING}]}
    result = launch(place, plan=plan)
    assert result.returncode == 1
    assert verbs(place) == START
    assert result.stderr.splitlines()[-1] == "error: pod was deleted while it was in use."


@pytest.mark.slow
def test_another_command_under_way(place):
    first = {"exits": [[[0, "release"]]]}
    first["run"] = [{"do": "drop", "after": [WORKER_LOG, "line 29"]}]
    first["run"] += [{"do": "unreachable"}] * 4
    assert launch(place, plan=first).returncode == 255
    result = launch(place, plan={}, command=(*COMMAND, "--other"))
    assert result.returncode == 1
    assert "error: worker 0 still runs another command: vqgan_jax.train" in result.stdout
    plan = {"run": [None] * 6 + [{"do": "release", "after": [WORKER_LOG, "line 29"]}]}
    result = launch(place, plan=plan)  # the same command as the first
    assert result.returncode == 0, result.stderr
    assert "nothing is installed" in result.stdout
    assert len(place.programs()) == 1


@pytest.mark.slow
def test_restarts_are_limited(place):
    result = launch(place, "--max_restarts=2", plan={"exits": [[75] * 9]})
    assert result.returncode == 75
    assert verbs(place) == [*START, "run", "run"]
    assert "no restarts are left of 2" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_state_that_cannot_be_asked_for(place):
    result = launch(place, plan={"list": [1, 1]})
    assert result.returncode == 0, result.stderr
    failed = fakes.Place(place.directory / "other")
    result = launch(failed, plan={"list": [1] * 9})
    assert result.returncode == 255
    assert "gave up after 5 tries: cannot ask for the state of pod" in result.stderr
    assert len(failed.calls("gcloud")) == 5


@pytest.mark.slow
def test_installation_that_fails_is_tried_again(place):
    result = launch(place, plan={"install": [1], "scp": [255]})
    assert result.returncode == 0, result.stderr
    assert verbs(place) == ["create", "scp", "scp", "install", "scp", "install", "run"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "calls"),
    [
        (["READY", "ACTIVE"], START[1:]),
        (["READY", None], START[1:]),
        (["PREEMPTED", "SUSPENDED"], ["delete", *START]),
        ([None, "FAILED"], ["delete", *START]),
        (["TERMINATED", None], ["delete", *START]),
    ],
)
def test_tpu_that_is_there(place, state, calls):
    result = launch(place, plan={"state": state})
    assert result.returncode == 0, result.stderr
    assert verbs(place) == calls
    kinds = [call[3] for call in place.calls("gcloud") if call[4] == "delete"]
    assert kinds == (["queued-resources" if state[1] else "tpu-vm"] if "delete" in calls else [])


def test_stopped_tpu(place):
    result = launch(place, plan={"state": ["STOPPED", None]})
    assert result.returncode == 1
    assert result.stderr == "error: pod is stopped; start it, or choose another --name.\n"


def test_nothing_says_what_to_create(place):
    result = place.launch("tpu_pod.sh", "--name=pod", "--zone=us-east5-b", *COMMAND)
    assert result.returncode == 1
    assert "error: there is no TPU pod in us-east5-b; --accelerator_type says" in result.stderr


def test_workdir_that_would_be_lost(place):
    result = launch(place, command=(*COMMAND[:3], "--workdir=runs/x"))
    assert "warning: --workdir is no absolute path" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--name=Pod"], "--name=Pod is not a name of small letters"),
        (["--name=a;date"], "--name=a\\;date is not a name"),
        (["--zone=east"], "--zone=east is not a zone"),
        (["--accelerator_type=v6e"], "is not an accelerator type"),
        (["--accelerator_type=v9-8"], "no default is known for v9-8: add --runtime_version."),
        (["--spot", "--reserved"], "exclude each other"),
        (["--max_restarts=-1"], "is not a whole number"),
        (["--at_end=stop"], "is not keep or delete"),
        (["--env=1A=b"], "is not NAME=VALUE"),
        (["--service_account=me"], "is not an e-mail address"),
    ],
)
def test_bad_options(place, arguments, words):
    result = launch(place, *arguments)
    assert result.returncode == 1
    assert words in result.stderr and result.stderr.count("\n") == 1
    assert place.calls() == []
