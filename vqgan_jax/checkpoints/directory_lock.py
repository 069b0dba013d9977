"""One job at a time in a directory.

The lock is the operating system's on the file `.lock`, so it is gone with its process, however
that ended: a lock is never stale. The file says who holds it, for the message to the other.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Collection, Iterator
from typing import TextIO

from vqgan_jax.errors import DataError

LOCK_FILE = ".lock"
_held: set[str] = set()  # of this process: the system's lock is between processes


def is_empty(directory: str | os.PathLike, besides: Collection[str] = ()) -> bool:
    """Whether there is nothing in a directory but a lock and what else is named, or none at all."""
    try:
        return set(os.listdir(directory)) <= {LOCK_FILE, *besides}
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
    """Holds a directory for this process while entered; makes it where it is missing.

    Of several processes of one job, only the first takes the lock. Where the file system has no
    locks, there is none.

    Raises:
      DataError: another job works in the directory; the message names its host and process.
      OSError: the directory cannot be made or written.
    """
    directory = pathlib.Path(directory).expanduser()
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            yield
    finally:
        for path in missing:  # where the job has written nothing
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    path = directory / LOCK_FILE
    key = os.path.realpath(path)
    if key in _held:
        raise DataError(_in_use(directory, path))
    with _open_locked(directory, path) as file:
        _held.add(key)
        try:
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            owner = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
            try:
                file.truncate(0)
                file.write(json.dumps(owner) + "\n")
                file.flush()
            except OSError as error:
                raise DataError(f"Cannot write to {directory}: {error.strerror}.") from error
            yield
        finally:
            path.unlink(missing_ok=True)
            _held.discard(key)


def _open_locked(directory: pathlib.Path, path: pathlib.Path) -> TextIO:
    """The lock's file, open and locked; closing it releases the lock."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise DataError(_in_use(directory, path)) from None
        except OSError:
            return file  # no locks on this file system
        # Whoever held it may have removed the file between our opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def _in_use(directory: pathlib.Path, path: pathlib.Path) -> str:
    """The message, with what the lock's file says of its holder."""
    who = "another process"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads(path.read_text(encoding="utf-8")[:1000])
        who = f"process {owner['process']} on {owner['host']}, since {owner['since']}"
    return (
        f"{directory} is in use by another job ({who}). Wait for it or stop it, or choose another "
        "directory."
    )
