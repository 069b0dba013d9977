"""What all commands share: flags in, one call, errors as one line."""

import logging
import os
import sys
from collections.abc import Callable

import absl.logging
from absl import app, flags

from vqgan_jax.configuration import ConfigError
from vqgan_jax.data.errors import DataError

# The exit code that asks a launcher to start the same command again (EX_TEMPFAIL).
STOPPED = 75


def run(main: Callable[[], None]) -> None:
    """Runs a command; bad input ends it with one line on stderr and exit code 1."""
    quiet_libraries()

    def guarded(arguments):
        absl.logging.set_verbosity(absl.logging.WARNING)
        if len(arguments) > 1:
            _fail(f"unexpected argument {arguments[1]!r}; see --help.")
        from vqgan_jax.training.checkpoints import CheckpointError
        from vqgan_jax.training.logging import NonFiniteError
        from vqgan_jax.training.stopping import Preempted

        try:
            main()
        except Preempted as stop:
            print(stop, file=sys.stderr)
            sys.exit(STOPPED)
        except (ConfigError, DataError, CheckpointError, NonFiniteError) as error:
            _fail(str(error))
        except OSError as error:
            _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))

    app.run(guarded, flags_parser=_parse)


def _parse(arguments):
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        _fail(f"{error} See --help.")
    except (AttributeError, KeyError, TypeError, ValueError, ImportError, OSError) as error:
        _fail(f"{error}")


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def quiet_libraries() -> None:
    """Keeps other libraries' progress notes off the terminal; their warnings stay."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in ("absl", "orbax", "jax", "array_record"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def start_distributed() -> None:
    """Joins the other processes of a run where the environment says that there are any.

    Explicitly by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; on a TPU pod and
    under SLURM by what these set themselves.
    """
    import jax

    environment = os.environ
    if "JAX_NUM_PROCESSES" in environment:
        jax.distributed.initialize(
            environment["JAX_COORDINATOR_ADDRESS"],
            int(environment["JAX_NUM_PROCESSES"]),
            int(environment["JAX_PROCESS_ID"]),
        )
    elif (
        "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or int(environment.get("SLURM_NTASKS", "1")) > 1
    ):
        jax.distributed.initialize()


