"""JSON files that people write, with errors that name the file."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

from vqgan_jax.data.errors import DataError

Parsed = TypeVar("Parsed")


def load_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"This is not JSON: {error}.") from error


def parse_file(path: str | os.PathLike, parse: Callable[[bytes], Parsed]) -> Parsed:
    """What `parse` makes of a file's content.

    Raises:
        DataError: the file cannot be read, or what `parse` raises; one line that names the file.
    """
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return parse(content)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
