"""Small files are written all at once, and what cannot be written ends with the file's name."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Around what writes a file: a full disk is told of without a name by the system itself."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file under a temporary name and renames it: a killed process leaves no half of it.

    Raises:
        OSError: it cannot be written; with its name.
    """
    temporary = path.with_name(path.name + ".tmp")
    with naming(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
