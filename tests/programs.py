"""Python programs in processes of their own that do not each import JAX for four seconds.

A server imports the other packages once, as `multiprocessing` offers it, and forks for each
program; none of this project's modules is imported before that. `Program` and `run` take the same
command lines as `subprocess.Popen` and `subprocess.run`.
"""

import atexit
import io
import logging
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import threading

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "flax.linen",
        "grain",
        "jax",
        "jax.numpy",
        "ml_collections.config_flags",
        "msgspec",
        "optax",
        "orbax.checkpoint",
        "PIL.Image",
        "scipy.stats",
        "skimage.feature",
        "tensorboardX",
        "tensorflow_datasets",
    ]
)


class Program:
    """A running program: `python -m MODULE`, `python FILE` or `python -c CODE`, and arguments.

    Args:
        command: begins with `sys.executable`.
        cwd: where it runs; None is here.
        env: its environment; None is ours.
    """

    def __init__(self, command, cwd=None, env=None):
        self.args = [os.fspath(part) for part in command]
        assert self.args[0] == sys.executable
        self._directory = tempfile.TemporaryDirectory()
        self._files = [pathlib.Path(self._directory.name, name) for name in ("out", "err")]
        environment = dict(os.environ if env is None else env)
        arguments = (self.args[1:], os.fspath(cwd or os.getcwd()), environment, self._files)
        self._process = _CONTEXT.Process(target=_run, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """The exit code, minus a signal's number where that ended it; None while it runs."""
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout=None):
        """The exit code."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def communicate(self, timeout=None):
        """What it has written to standard output and error, at its end."""
        self.wait(timeout)
        return tuple(path.read_text() if path.exists() else "" for path in self._files)

    def send_signal(self, number):
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run(command, cwd=None, env=None, timeout=None):
    """The finished program with its exit code and what it wrote."""
    program = Program(command, cwd, env)
    try:
        output, errors = program.communicate(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(command, program.returncode, output, errors)


def _run(arguments, cwd, environment, files):
    """In the forked process: as the interpreter would run the program from its start to its end."""
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    streams = [io.BufferedWriter(io.FileIO(number, "w", closefd=False)) for number in (1, 2)]
    sys.stdout = io.TextIOWrapper(streams[0], "utf-8")
    sys.stderr = io.TextIOWrapper(streams[1], "utf-8", line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.root.handlers.clear()  # that an import in the server may have made
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    _configure_jax(environment)
    code = _code_of(arguments, cwd, environment)
    try:
        threading._shutdown()  # waits for threads, as the interpreter does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(code)


def _code_of(arguments, cwd, environment):
    """The program's exit code."""
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [cwd, *paths]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def _configure_jax(environment):
    """JAX took its settings from the environment of the server, when that imported it."""
    import jax

    for name, value in environment.items():
        key = name.lower()
        if name.startswith("JAX_") and key in jax.config.values:
            old = jax.config.values[key]
            if isinstance(old, bool):
                value = value.lower() in ("1", "true", "on", "yes")
            elif isinstance(old, int | float):
                value = type(old)(float(value))
            jax.config.update(key, value)
