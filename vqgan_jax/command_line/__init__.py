"""What all commands share: flags in, one call, errors as one line.

Exit codes:

    0   done.
    1   bad input, or an error that the same command would run into again; one line says which.
    75  stopped before the end: by SIGTERM or Ctrl-C with all saved, or because another process of
        the run did not come or is gone. The same command resumes; a launcher starts it again.
    130 interrupted by Ctrl-C with nothing to save.
"""

import contextlib
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence

import absl.logging
from absl import app, flags

from vqgan_jax import distributed
from vqgan_jax.command_line.compiled_programs import keep_compiled_programs
from vqgan_jax.command_line.configs import joined, with_config_found, with_stored_config
from vqgan_jax.command_line.help import help_text
from vqgan_jax.configuration import ConfigError
from vqgan_jax.errors import DataError
from vqgan_jax.peers import LIVENESS_SECONDS, START_AGAIN, HostError
from vqgan_jax.training.stopping import InterruptWatch, end_at_once

STARTED = time.time()  # of the process, but for what is imported above
# For an error to turn out as the consequence of another process's end. What is not an error of
# ours mostly is one, and the host may just have vanished.
_LOSS_SECONDS, _LONG_LOSS_SECONDS = 1.0, LIVENESS_SECONDS + 10.0
_INTERRUPT_SECONDS = 0.5  # for the main thread to come to an instruction
_UNWINDING_SECONDS = 2.0  # for it to leave what it was in; there is nothing to save
# In errors of JAX about the connections between processes, all of which are alive. Gloo, which
# joins CPUs, waits 30 s for one that is still compiling.
_CONNECTION_WORDS = ("Gloo", "DEADLINE_EXCEEDED", "UNAVAILABLE")


def run(main: Callable[..., None], arguments: Sequence[str] = ()) -> None:
    """Runs a command; what goes wrong ends it with one line on stderr and an exit code of these.

    `arguments` are names of what the command takes beside flags, which `main` is called with.
    """
    quiet_libraries()
    keep_compiled_programs(os.environ)
    handled = threading.Event()

    def interrupt(*_):
        handled.set()
        raise KeyboardInterrupt

    def answer(count: int) -> None:
        """Ends the program where its main thread does not, as while it compiles."""
        if count == 1 and handled.wait(_INTERRUPT_SECONDS):
            time.sleep(_UNWINDING_SECONDS)
        if distributed.is_alone():
            end_at_once()

    signal.signal(signal.SIGINT, interrupt)
    watch = InterruptWatch(answer)
    watch.__enter__()
    for stream in (sys.stdout, sys.stderr):  # names of files may be what they cannot write
        stream.reconfigure(errors="backslashreplace")

    def guarded(given):
        absl.logging.set_verbosity(absl.logging.WARNING)
        if len(given) - 1 > len(arguments):
            _fail(f"unexpected argument {given[1 + len(arguments)]!r}; see --help.")
        if len(given) - 1 < len(arguments):
            _fail(f"the argument {arguments[len(given) - 1]} is missing; see --help.")
        for name in flags.FLAGS:
            value = flags.FLAGS[name].value
            if isinstance(value, float) and not math.isfinite(value):
                _fail(f"--{name} is {value}; it must be a finite number.")
        from vqgan_jax.training.checkpoints import CheckpointError
        from vqgan_jax.training.logging import NonFiniteError
        from vqgan_jax.training.stopping import Preempted

        try:
            main(*given[1:])
            distributed.leave()
        except Preempted as stop:
            print(stop, file=sys.stderr)
            distributed.leave(START_AGAIN, str(stop))
            sys.exit(START_AGAIN)
        except HostError as error:
            _print_error(str(error))
            sys.stdout.flush()
            distributed.leave(error.code, str(error))
            os._exit(error.code)  # the usual end of a program would wait for the others
        except (ConfigError, DataError, CheckpointError, NonFiniteError) as error:
            distributed.wait_for_loss(_LOSS_SECONDS)
            _fail(str(error))
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads what is still to be written
            distributed.leave(1, "its output was closed")
            sys.exit(1)
        except OSError as error:
            distributed.wait_for_loss(_LOSS_SECONDS)
            _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and distributed.is_alone():
                end_at_once()
            if "Could not determine home directory" in str(error):  # pathlib's words
                named = [part for part in sys.argv if "~" in part] or ["A path"]
                _fail(f"{named[0]} begins with ~ and the name of a user that does not exist.")
            if is_out_of_memory(error):
                _fail(
                    f"There is not enough memory ({_first_words(error)[:200]}). Take a smaller "
                    "batch, smaller images or a smaller model."
                )
            if distributed.is_alone():
                raise
            if not isinstance(error, KeyboardInterrupt):
                distributed.wait_for_loss(_LONG_LOSS_SECONDS)
            if any(word in str(error) for word in _CONNECTION_WORDS):
                reason = f"a connection to another process failed: {_first_words(error)}"
                _print_error(f"{reason} The same command goes on.")
                sys.stdout.flush()
                distributed.leave(START_AGAIN, reason)
                os._exit(START_AGAIN)
            traceback.print_exc()
            distributed.leave(1, f"{type(error).__name__}: {_first_words(error)}")

    app.run(guarded, flags_parser=_parse)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or XLA says that memory ran out."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def announce(line: str) -> None:
    """Prints at once what begins, before anything slow; of several processes only on the first."""
    if flags.FLAGS.is_parsed() and "process_id" in flags.FLAGS:
        index = flags.FLAGS["process_id"].value or os.environ.get("JAX_PROCESS_ID", 0)
        if str(index) != "0":
            return
    print(line, flush=True)


def _parse(arguments):
    if wanted := {"--help", "-h", "-help", "--helpfull", "--helpshort"}.intersection(arguments):
        with contextlib.suppress(BrokenPipeError):
            print(help_text(sys.modules["__main__"], full="--helpfull" in wanted), flush=True)
        sys.exit(0)
    try:
        return flags.FLAGS(list(map(with_config_found, with_stored_config(joined(arguments)))))
    except KeyboardInterrupt:
        end_at_once()
    except SystemExit:  # absl has shown the help, and would end with an error's exit code
        sys.exit(0)
    except Exception as error:  # a config file is a program and can raise anything
        _fail(_describe(error, arguments))


def _describe(error: Exception, arguments: list[str]) -> str:
    """One line about flags that cannot be taken, or about what went wrong in the config file."""
    chain = [error]
    while cause := chain[-1].__cause__ or (
        None if chain[-1].__suppress_context__ else chain[-1].__context__
    ):
        chain.append(cause)
    for cause in reversed(chain):  # outer ones repeat the inner with a traceback as text
        if isinstance(cause, ConfigError):
            return str(cause)
        if isinstance(cause, SyntaxError):
            return f"{cause.filename}, line {cause.lineno}: {cause.msg}."

    values = [argument.partition("--config=")[2] for argument in arguments]
    path = next((value.split(":")[0] for value in values if value), "--config")
    for cause in chain:
        frames = traceback.extract_tb(cause.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        if lines:
            return f"{path}, line {lines[-1]}: {type(cause).__name__}: {_first_words(cause)}"
    if isinstance(error, flags.Error):
        return f"{error} See --help."
    return f"{path}: {type(error).__name__}: {_first_words(error)}"


def _first_words(error: Exception) -> str:
    """An error's text on one line, without the list of all other keys of a config."""
    text = str(error.args[0]) if error.args else str(error)
    text = text.replace("\\n", "\n").replace("\\'", "'")  # ml_collections quotes some twice
    if text.startswith("'") and text.endswith("'"):
        text = text[1:-1]
    text = re.sub(r" Other fields present: .*?(?=\nDid you mean|\Z)", "", text, flags=re.DOTALL)
    return " ".join(text.split())


def _fail(message: str) -> None:
    _print_error(message)
    distributed.leave(1, message)
    sys.exit(1)


def _print_error(message: str) -> None:
    _print(f"error: {message}")


def _print(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Keeps other libraries' progress notes off the terminal; their warnings stay.

    A checkpoint that cannot be written ends with our one line: the threads of its writer raise what
    they log, so their log's tracebacks, hundreds of lines, say nothing more.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in ("absl", "orbax", "jax", "array_record"):
        logging.getLogger(name).setLevel(logging.WARNING)
    absl.logging.get_absl_handler().addFilter(lambda record: not _from_writer(record))
    # What the writer had begun when it failed.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _unraisablehook
    # XLA's alarms too: of slow compilations, and of instructions that a kept program was made for.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _from_writer(record: logging.LogRecord) -> bool:
    """Whether a record shows an error of orbax's threads, logged there or by their event loop.

    No other part of a command has an event loop.
    """
    return bool(record.exc_info) and ("orbax" in record.pathname or record.name == "asyncio")


def _unraisablehook(unraisable):
    """Silent on what is left of a checkpoint's reader or writer that failed and was reported."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt) and distributed.is_alone():
        end_at_once()
    text = str(unraisable.exc_value)
    if text != "Event loop is closed" and not text.startswith("Encountered error while reading"):
        sys.__unraisablehook__(unraisable)
