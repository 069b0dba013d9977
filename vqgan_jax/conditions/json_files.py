"""JSON files that people write, with errors that name the file."""

import os
from collections.abc import Callable
from typing import TypeVar

from vqgan_jax.configuration.documents import read_bytes
from vqgan_jax.errors import DataError

Parsed = TypeVar("Parsed")


def parse_file(path: str | os.PathLike, parse: Callable[[bytes], Parsed]) -> Parsed:
    """What `parse` makes of a file's content.

    Raises:
        DataError: the file cannot be read, or what `parse` raises; one line that names the file.
    """
    content = read_bytes(path)
    try:
        return parse(content)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
