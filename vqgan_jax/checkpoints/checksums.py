"""The SHA-256 of every file of an export, in `checksums.json` beside them."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import msgspec

from vqgan_jax.configuration.documents import convert, parse_json, read_bytes
from vqgan_jax.errors import DataError

CHECKSUMS = "checksums.json"
_THREADS = 8


def file_sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(directory: pathlib.Path, names: Iterable[str]) -> None:
    """Writes `checksums.json` for the files below some names of a directory.

    Args:
      directory: the export.
      names: files, and folders with all files below them.
    """
    text = json.dumps({"sha256": _sums(_files(directory, names))}, indent=1, sort_keys=True)
    (directory / CHECKSUMS).write_text(text + "\n")


def check_checksums(directory: pathlib.Path, names: Iterable[str]) -> bool:
    """Compares the files below some names with `checksums.json`.

    Returns:
      False where there is no such file to compare with.

    Raises:
      DataError: a file is damaged, missing, or not of the export; the message names it.
      OSError: a file cannot be read.
    """
    path = directory / CHECKSUMS
    if not os.path.lexists(path):
        return False
    expected = convert(parse_json(read_bytes(path), str(path)), _Stored, str(path)).sha256
    files = _files(directory, names)
    for name in sorted(expected.keys() | files.keys()):
        if name not in files:
            raise DataError(f"{directory / name} is missing.")
        if name not in expected:
            raise DataError(f"{directory / name} is no file of this export.")
        if not files[name].is_file():  # a pipe would never end
            raise DataError(f"{directory / name} is no regular file.")
    found = _sums(files)
    for name, digest in sorted(expected.items()):
        if found[name] != digest:
            raise DataError(f"{directory / name} is damaged: its SHA-256 is not that in {path}.")
    return True


@dataclasses.dataclass(frozen=True)
class _Stored:
    """What `checksums.json` holds: the SHA-256 of each file by its path in the export."""

    sha256: Annotated[
        dict[str, Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]],
        msgspec.Meta(min_length=1),
    ]


def _files(directory: pathlib.Path, names: Iterable[str]) -> dict[str, pathlib.Path]:
    """The files below some names, and whatever else is no folder, by their paths there."""
    found = []
    for name in names:
        path = directory / name
        below = [item for item in path.rglob("*") if item.is_symlink() or not item.is_dir()]
        found += below if path.is_dir() else [path] if os.path.lexists(path) else []
    return {item.relative_to(directory).as_posix(): item for item in found}


def _sums(files: Mapping[str, pathlib.Path]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(files, pool.map(file_sha256, files.values()), strict=True))
