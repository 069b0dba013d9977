"""Small text files that are read back: size, nesting, types and ranges are checked first.

Each format is a dataclass whose fields are annotated with their ranges, as in
`Annotated[int, msgspec.Meta(ge=1, le=4096)]`; `msgspec` compares a parsed file with it. A file can
be damaged or hostile, so nothing here executes, hangs or needs more memory than a few times the
file's size, and whatever is wrong ends in one line that names the file.
"""

import json
import os
import stat
from typing import Any, TypeVar

import msgspec

from vqgan_jax.errors import DataError

Form = TypeVar("Form")

MAX_BYTES = 64 * 2**20  # of a document, unless its format needs more
MAX_DEPTH = 64  # of lists and objects within each other


def read_bytes(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Args:
        path: of the file.
        max_bytes: of its content; 64 MiB by default.

    Raises:
        DataError: it is no regular file (a named pipe would never end), is larger or cannot be
            read.
    """
    try:
        # Opening a pipe waits for its writer, unless it is asked not to.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path} is no regular file.")
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(content) > max_bytes:
        raise DataError(
            f"{path} has {status.st_size} bytes, more than the {max_bytes} that such a file may "
            "have."
        )
    return content


def parse_json(text: str | bytes, what: str = "This") -> Any:
    """The value of a JSON text.

    Args:
        text: UTF-8 where it is bytes.
        what: the file or thing it is from, for the message.

    Raises:
        DataError: it is not JSON, has NaN or infinity, numbers beyond float64, or more than
            `MAX_DEPTH` levels.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        check_depth(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is damaged or not JSON: {first_line(error)}.") from error
    return value


def check_depth(value: Any) -> None:
    """Raises `ValueError` where lists and objects are nested more than `MAX_DEPTH` deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def convert(value: Any, form: type[Form], what: str = "This") -> Form:
    """A parsed document as `form`, a dataclass with ranges in its annotations.

    Args:
        value: what `parse_json` or a YAML reader gave.
        form: the type; numbers are not made of text, nor text of numbers.
        what: the file or thing it is from, for the message.

    Raises:
        DataError: a field is missing, of another type or out of its range; the message names it.
    """
    try:
        return msgspec.convert(value, form, str_keys=True)  # as JSON has them
    except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise DataError(f"{what} is damaged: {first_line(error)}.") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters and without a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it has the number {name}, which JSON does not have")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value
