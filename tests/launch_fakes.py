"""Programs in place of gcloud, sbatch, kubectl and the like: they record calls and follow a plan.

`Place` writes them into a directory that goes in front of the PATH. Each call adds a line to
`calls.jsonl` of the directory in `$FAKES`; `plan.json` there says how calls go. The workers of a
TPU are home directories; what is sent to them over "ssh" is run by bash.
"""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = ("gcloud", "curl", "uv", "sleep", "sbatch", "srun", "scontrol", "kubectl")
TIMEOUT = 600  # seconds for what a plan waits for


class Place:
    """A directory with the fakes, their plan, and what they recorded.

    The plan of gcloud: `workers`; `create`, `scp`, `install` and `list`, exit codes of the calls in
    turn, 0 after them; `run`, what happens in each ssh of a run: {"do": WHAT, "after": [file, text
    in it]} or null, WHAT being one of `_ssh`; `state`, that of a TPU that is there. Of what runs on
    the workers: `program`, a Python for it, or `exits`: for each worker the ends of its starts in
    turn: a code, [code, file to wait for], or "wait" for a signal. Of srun and scontrol: exit codes
    by their names. Of kubectl: `jobset` and `pods`, the answers in turn, the last one again, exit
    codes among them; `logs` by pod; `apply`, exit codes.
    """

    def __init__(self, directory):
        self.directory = directory
        self.bin = directory / "bin"
        self.bin.mkdir(parents=True)
        tests = str(ROOT / "tests")
        for name in NAMES:
            program = f"#!{sys.executable} -S\nimport sys\nsys.path.insert(0, {tests!r})\n"
            program += f"import launch_fakes\nsys.exit(launch_fakes.main({name!r}))\n"
            (self.bin / name).write_text(program)
            (self.bin / name).chmod(0o755)

    def launch(self, script, *arguments, plan=(), **environment):
        """The finished script of launch/, run in this directory."""
        (self.directory / "plan.json").write_text(json.dumps(dict(plan)))
        environment = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "FAKES": str(self.directory),
            **environment,
        }
        # A shell cannot trap what is ignored when it starts, as SIGINT is in the background.
        command = ["env", "--default-signal=INT", "bash", str(ROOT / "launch" / script), *arguments]
        process = subprocess.Popen(
            command,
            cwd=self.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def close(self):
        """Ends what a test that failed has left on the workers."""
        for lock in self.directory.glob("homes/*/vqgan_jax/run/lock"):
            if subprocess.run(["flock", "--nonblock", str(lock), "true"]).returncode:
                os.killpg(int(lock.with_name("pid").read_text()), signal.SIGKILL)

    def calls(self, *names):
        """The argument lists of the calls of these programs, of all but sleep and curl if none."""
        path = self.directory / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = [json.loads(line) for line in lines]
        return [c for c in calls if (c[0] in names if names else c[0] not in ("sleep", "curl"))]

    def home(self, worker=0):
        """The home directory of a worker."""
        return self.directory / "homes" / str(worker)

    def programs(self):
        """What the workers ran, with `exits` as the plan: dictionaries with worker, argv, ..."""
        path = self.directory / "programs.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


def dry_commands(output):
    """The argument lists of what a dry run has printed, without the text that comes on stdin."""
    lines, commands = iter(output.splitlines()), []
    for line in lines:
        command, here, end = line.partition(" <<")
        commands.append(shlex.split(command))
        if here:
            while next(lines) != end.strip("'"):
                pass
    return commands


# ---- The programs.
def _directory():
    return pathlib.Path(os.environ["FAKES"])


def _plan():
    return json.loads((_directory() / "plan.json").read_text())


def _record(name, arguments, file="calls.jsonl"):
    with (_directory() / file).open("a") as calls:
        calls.write(json.dumps([name, *arguments] if file == "calls.jsonl" else arguments) + "\n")


def _turn(name):
    """How often this was asked before."""
    path = _directory() / f"turn_{name}"
    turn = int(path.read_text()) if path.exists() else 0
    path.write_text(str(turn + 1))
    return turn


def _next(name, default=0):
    answers = _plan().get(name, [])
    turn = _turn(name)
    return answers[turn] if turn < len(answers) else default


def main(name):
    """Runs the fake program of that name; its exit code."""
    _record(name, sys.argv[1:])
    return globals()[f"_{name}"](sys.argv[1:]) or 0


def _sleep(_):
    time.sleep(0.02)


def _curl(arguments):
    if "Metadata-Flavor: Google" not in arguments:
        return 22
    attribute = arguments[-1].rpartition("/instance/attributes/")[2]
    workers = _plan().get("workers", 1)
    print(
        {
            "agent-worker-number": os.environ["FAKE_WORKER"],
            "worker-network-endpoints": ",".join(f"u:v:10.0.0.{i}" for i in range(workers)),
        }[attribute],
        end="",
    )


def _uv(arguments):
    if arguments[0] == "venv":
        python = pathlib.Path(arguments[-1]) / "bin" / "python"
        python.parent.mkdir(parents=True)
        program = _plan().get("program")
        run = shlex.quote(program) if program else f"{sys.executable} {shlex.quote(__file__)}"
        python.write_text(f'#!/bin/sh\nexec {run} "$@"\n')
        python.chmod(0o755)


# ---- TPUs.
def _tpu():
    path = _directory() / "tpu.json"
    return json.loads(path.read_text()) if path.exists() else _plan().get("state", [None, None])


def _set_tpu(vm, queue):
    (_directory() / "tpu.json").write_text(json.dumps([vm, queue]))


def _gcloud(arguments):
    kind, verb, *rest = arguments[2:]
    assert arguments[:2] == ["compute", "tpus"], arguments
    vm, queue = _tpu()
    if verb == "list":
        if code := _next("list"):
            print("ERROR: (gcloud) no route to host", file=sys.stderr)
            return code
        if kind == "tpu-vm" and vm:
            print(f"{vm}\t{_plan().get('workers', 1)}")
        elif kind == "queued-resources" and queue:
            print(queue)
    elif verb == "create":
        if code := _next("create"):
            print("ERROR: (gcloud) RESOURCE_EXHAUSTED: quota", file=sys.stderr)
            return code
        assert (vm, queue) == (None, None), "there is one already"
        _set_tpu("READY", "ACTIVE")
    elif verb == "delete":
        _set_tpu(None, None)
        shutil.rmtree(_directory() / "homes", ignore_errors=True)
    elif verb == "scp":
        if code := _next("scp"):
            return code
        for worker in range(_plan().get("workers", 1)):
            home = _directory() / "homes" / str(worker)
            home.mkdir(parents=True, exist_ok=True)
            shutil.copy(rest[0], home)
    elif verb == "ssh":
        (command,) = [a.removeprefix("--command=") for a in rest if a.startswith("--command=")]
        if "tpu_worker.sh install" in command:
            return _next("install") or _ssh(command, None)
        return _ssh(command, _next("run", None))
    return 0


def _ssh(command, event):
    """Runs a command on all workers; the first exit code that is not 0, as gcloud's."""
    if event and event["do"] == "unreachable":
        return 255
    homes = [_directory() / "homes" / str(i) for i in range(_plan().get("workers", 1))]
    shells = [
        subprocess.Popen(
            ["bash", "-c", command],
            cwd=home,
            env=os.environ | {"HOME": str(home), "FAKE_WORKER": str(i)},
            start_new_session=True,
        )
        for i, home in enumerate(homes)
    ]
    if event:
        path, text = event["after"]
        _wait_for(_directory() / path, text)
        for home in homes:
            _wait_for(home / "vqgan_jax/run/pid", "\n")
        sessions = [int((home / "vqgan_jax/run/pid").read_text()) for home in homes]
        if event["do"] == "release":
            (_directory() / "release").write_text("")
        elif event["do"] == "terminate":
            for session in sessions:
                os.killpg(session, signal.SIGTERM)
        else:
            for shell in shells:
                os.killpg(shell.pid, signal.SIGKILL)  # a broken connection takes no more output
                shell.wait()
            if event["do"] in ("preempt", "delete"):
                for session in sessions:
                    os.killpg(session, signal.SIGKILL)
                shutil.rmtree(_directory() / "homes")
                preempted = event["do"] == "preempt"
                _set_tpu(*(("PREEMPTED", "SUSPENDED") if preempted else (None, None)))
            elif event["do"] == "interrupt":
                os.killpg(0, signal.SIGINT)  # as Ctrl-C at a terminal
            return 255
    codes = [shell.wait() for shell in shells]
    return next((code for code in codes if code), 0)


def _wait_for(path, text):
    end = time.monotonic() + TIMEOUT
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, f"{text!r} never came in {path}"
        time.sleep(0.01)


def _program():
    """What stands in for a training run on a worker."""
    worker = int(os.environ.get("FAKE_WORKER", 0))
    coordinator = {k: v for k, v in os.environ.items() if k.startswith(("JAX_COORD", "JAX_NUM_PR"))}
    coordinator |= {"JAX_PROCESS_ID": os.environ.get("JAX_PROCESS_ID")} if coordinator else {}
    seen = {
        "worker": worker,
        "argv": sys.argv[1:],
        "env": os.environ.get("FAKE_ENV"),
        **coordinator,
    }
    _record("", seen, "programs.jsonl")
    exits = _plan().get("exits", [])
    turn = _turn(f"program_{worker}")
    code = exits[worker][turn] if worker < len(exits) and turn < len(exits[worker]) else 0
    for line in range(30):
        print(f"line {line} of start {turn} on worker {worker}")
    sys.stdout.flush()
    if code == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        print("waiting", flush=True)
        time.sleep(TIMEOUT)
    elif isinstance(code, list):
        code, path = code
        _wait_for(_directory() / path, "")
    sys.exit(code)


# ---- SLURM.
def _sbatch(arguments):
    """Runs the job until it is not put back; its last exit code is in job.json."""
    script = next(i for i, a in enumerate(arguments) if not a.startswith("--"))
    copy = _directory() / "slurm_script"  # SLURM, too, runs a copy of the script elsewhere
    shutil.copy(arguments[script], copy)
    print("Submitted batch job 7")
    cpus = [a.partition("=")[2] for a in arguments if a.startswith("--cpus-per-task=")]
    for restart in range(10):
        (_directory() / "requeued").unlink(missing_ok=True)
        environment = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": cpus[0]}
        if restart:
            environment["SLURM_RESTART_COUNT"] = str(restart)
        job = subprocess.run(
            ["bash", str(copy), *arguments[script + 1 :]],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        with (_directory() / "job.json").open("w") as file:
            json.dump({"code": job.returncode, "output": job.stdout + job.stderr}, file)
        if not (_directory() / "requeued").exists():
            break


def _srun(_):
    return _next("srun")


def _scontrol(arguments):
    assert arguments == ["requeue", "7"], arguments
    if code := _next("scontrol"):
        return code
    (_directory() / "requeued").write_text("")


# ---- Kubernetes.
def _kubectl(arguments):
    verb = arguments[0]
    if verb == "apply":
        manifest = sys.stdin.read()
        if code := _next("apply"):
            print("error: the server could not be reached", file=sys.stderr)
            return code
        (_directory() / "manifest.yaml").write_text(manifest)
    elif verb == "logs":
        print(_plan()["logs"].get(arguments[1], ""), end="")
    elif verb == "get":
        answers = _plan()["jobset" if arguments[1] == "jobset" else "pods"]
        answer = answers[min(_turn(arguments[1]), len(answers) - 1)]
        if isinstance(answer, int):
            print("Unable to connect to the server", file=sys.stderr)
            return answer
        print(answer, end="")
    return 0


if __name__ == "__main__":
    _program()
