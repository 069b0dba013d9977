"""What the commands say before they work: help, lists, names of configs, kept programs, Ctrl-C."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import programs
import training_runs as runs
from vqgan_jax.__main__ import COMMANDS
from vqgan_jax.command_line import compiled_programs, configs
from vqgan_jax.configuration import dataset_name
from vqgan_jax.training.stopping import InterruptWatch

ENVIRONMENT = os.environ | {"PYTHONPATH": str(runs.ROOT), "COLUMNS": "80"}


def run(*arguments, cwd=None, **environment):
    command = [sys.executable, *arguments]
    return programs.run(command, env=ENVIRONMENT | environment, cwd=cwd, timeout=60)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, tmp_path):
    """Short, within 100 columns, with an example, and there before JAX is imported."""
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try:\n    runpy.run_module('vqgan_jax.{command}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    print('JAX' if 'jax' in sys.modules else '', end.code, file=sys.stderr)\n"
    )
    done = subprocess.run(  # an interpreter of its own: those of `programs` have imported JAX
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.split() == ["0"]
    lines = done.stdout.splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= 100
    assert f"    python -m vqgan_jax.{command} " in done.stdout
    assert "--process_id" not in done.stdout
    if command in ("train", "tokenize", "sample"):
        assert "--process_id" in run("-m", f"vqgan_jax.{command}", "--helpfull").stdout


def test_every_flag_is_in_the_help():
    """Also of a program that is no command of the list."""
    shown = run("-m", "vqgan_jax.data.earth_maps", "--help").stdout
    for flag in ("output", "west", "north", "height", "width"):
        assert f"  --{flag}=" in shown
    assert "(required)" in shown


def test_list_of_commands():
    listed = run("-m", "vqgan_jax")
    assert [line.split()[0] for line in listed.stdout.splitlines()[2 : 2 + len(COMMANDS)]] == [
        *COMMANDS
    ]
    assert max(map(len, listed.stdout.splitlines())) <= 100
    wrong = run("-m", "vqgan_jax", "smaple")
    assert wrong.returncode == 1 and "Did you mean sample?" in wrong.stderr
    assert run("-m", "vqgan_jax", "sample", "--help").stdout.startswith("Samples images")


def test_configs_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quickstart = str(runs.ROOT / "configs" / "quickstart.py")
    for name in ("quickstart", "quickstart.py", "configs/quickstart.py"):
        found = configs.with_config_found(f"--config={name}:photos")
        assert found == f"--config={quickstart}:photos"
    for other in ("--config=nowhere", "--config=mine/quickstart.py", "--output=quickstart"):
        assert configs.with_config_found(other) == other
    for given in (
        ["x", "--config", "quickstart", "--workdir", "new"],
        ["x", "--config=quickstart"],
    ):
        assert configs.with_stored_config(configs.joined(given))[1] == "--config=quickstart"
    resumed = configs.with_stored_config(configs.joined(["x", "--workdir", "runs/a"]))
    assert resumed == ["x", f"--config={configs.STORED_CONFIG}:runs/a", "--workdir=runs/a"]
    pathlib.Path("quickstart").write_text("")
    assert configs.with_config_found("--config=quickstart") == "--config=quickstart"

    listed = [*configs.list_configs()]
    assert max(map(len, listed)) <= 100
    assert {line.split()[0] for line in listed if line[0] != " "} == set(configs.config_files())
    assert "--config=vqgan_f16:earth" in "\n".join(listed)


def test_config_key_by_key(tmp_path):
    arguments = ("--print_config", "--config=quickstart", "--config.seed=7")
    done = run("-m", "vqgan_jax.train", *arguments, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert "config.seed = 7" in lines and "config.model.channel_multipliers = [1, 1, 2]" in lines
    assert not (tmp_path / "runs").exists()


def test_a_path_is_a_folder_wherever_a_data_set_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "earth").mkdir()
    for path in (
        "photos",
        "photos/",
        "./photos",
        "./missing",
        "../x",
        "/data/x",
        "~/x",
        "missing/",
    ):
        assert dataset_name(path) == f"folder:{path}"
        assert dataset_name(f"folder:{path}") == f"folder:{path}"
    for name in ("earth", "earth/128", "cifar10", "imagenette/320px-v2", ""):
        assert dataset_name(name) == name


@pytest.mark.slow
def test_a_run_is_resumed_without_its_config(reference_run, tmp_path):
    """With what it was begun with, and the changes on top of it."""
    workdir = shutil.copytree(reference_run, tmp_path / "run")
    last = runs.steps(workdir)[-1]
    for changes, words in (
        ([], [f"it has all its {last} steps."]),
        ([f"--config.training.num_steps={last + 1}"], [
            f"Going on from step {last} in ",
            f"changed since then: training.num_steps {last} -> {last + 1}\n",
        ]),
    ):  # fmt: skip
        done = run("-m", "vqgan_jax.train", f"--workdir={workdir}", *changes, XLA_FLAGS="")
        assert done.returncode == 0, done.stderr
        assert all(word in done.stdout for word in words), done.stdout
    assert runs.steps(workdir)[-1] == last + 1
    nothing = run("-m", "vqgan_jax.train", f"--workdir={tmp_path / 'none'}")
    assert nothing.returncode == 1 and "holds no run with a checkpoint" in nothing.stderr


# ---- Compiled programs.


def test_where_compiled_programs_are_kept(tmp_path):
    environment = {"VQGAN_JAX_CACHE": str(tmp_path)}
    folder = compiled_programs.keep_compiled_programs(environment)
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o77 == 0
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    old = tmp_path / "jax-0.1-x"
    old.mkdir()
    os.utime(old, (0, 0))
    assert compiled_programs.keep_compiled_programs({"VQGAN_JAX_CACHE": str(tmp_path)}) == folder
    assert not old.exists()
    assert compiled_programs.cache_root({"XDG_CACHE_HOME": "/x"}) == pathlib.Path(
        "/x/vqgan_jax/programs"
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"VQGAN_JAX_CACHE": "off"},
        {"VQGAN_JAX_CACHE": "/proc/nowhere"},
        {"VQGAN_JAX_CACHE": "/tmp/x", "JAX_COMPILATION_CACHE_DIR": "/tmp/mine"},
    ],
)
def test_where_no_compiled_programs_are_kept(environment):
    before = dict(environment)
    assert compiled_programs.keep_compiled_programs(environment) is None
    assert environment == before


@pytest.mark.slow
def test_compiled_programs_are_read_again_and_damage_does_no_harm(tmp_path):
    code = (
        "import sys; sys.argv = ['x']\n"
        "from vqgan_jax import command_line\n"
        "def main():\n"
        "    import jax, jax.numpy as jnp\n"
        "    f = jax.jit(lambda x: jnp.linalg.svd(jnp.sin(x @ x.T))[1])\n"
        "    hits = []\n"
        "    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))\n"
        "    x = jnp.ones((8, 8))\n"
        "    hits.clear()\n"
        "    total = float(f(x)[0])\n"
        "    print(total, '/jax/compilation_cache/cache_hits' in hits)\n"
        "command_line.run(main)\n"
    )
    environment = {"VQGAN_JAX_CACHE": str(tmp_path), "XLA_FLAGS": ""}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    base = {k: v for k, v in ENVIRONMENT.items() if k != "JAX_COMPILATION_CACHE_DIR"}

    def result():
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=base | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout.split()

    first, second = result(), result()
    assert first[0] == second[0] and (first[1], second[1]) == ("False", "True")
    for path in tmp_path.rglob("*-cache"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert result()[0] == first[0]


# ---- Ctrl-C.


def test_each_interrupt_is_answered_while_the_main_thread_is_busy():
    answers, received = [], threading.Event()

    def answer(count):
        answers.append(count)
        received.set()

    previous = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with InterruptWatch(answer):
            for count in (1, 2):
                received.clear()
                os.kill(os.getpid(), signal.SIGINT)
                assert received.wait(5) and answers[-1] == count
    finally:
        signal.signal(signal.SIGINT, previous)
    assert answers == [1, 2]


@pytest.mark.slow
def test_ctrl_c_ends_a_compilation(tmp_path):
    """XLA gives no time to Python's handlers while it compiles."""
    code = (
        "import sys; sys.argv = ['x']\n"
        "from vqgan_jax import command_line\n"
        "def main():\n"
        "    import jax, jax.numpy as jnp\n"
        "    def f(x):\n"
        "        for i in range(400):\n"
        "            x = jnp.sin(jax.lax.sort(x * i) @ x)\n"
        "        return x\n"
        "    lowered = jax.jit(f).lower(jnp.ones((16, 16)))\n"
        "    print('compiling', flush=True)\n"
        "    lowered.compile()\n"
        "command_line.run(main)\n"
    )
    environment = ENVIRONMENT | {"VQGAN_JAX_CACHE": "off", "XLA_FLAGS": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "compiling\n"
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "Interrupted.\n")
    assert time.monotonic() - began < 5
