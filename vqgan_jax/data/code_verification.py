"""Whether codes on disk are as they were written: once since then, and before they are relied on.

The SHA-256 of every file was compared once since it was written where `verified.json` stands beside
the manifest, with the size and time of each file. Otherwise training compares them in a thread of
its own, and saves nothing before that has ended.
"""

import dataclasses
import json
import logging
import os
import pathlib
import threading

from vqgan_jax.configuration.documents import convert, parse_json, read_bytes
from vqgan_jax.data.code_manifest import Manifest
from vqgan_jax.data.codes import Codes, damaged_files
from vqgan_jax.errors import DataError

STAMP = "verified.json"


@dataclasses.dataclass(frozen=True)
class _FileStamp:
    size: int
    time: int  # of its last change, in nanoseconds
    moved: int  # of the last change of its place or its times, which no copy keeps
    sha256: str


def write_stamp(directory: pathlib.Path, manifest: Manifest) -> None:
    """Notes that all files were compared now; nothing where the directory cannot be written."""
    found = {name: dataclasses.asdict(stamp) for name, stamp in _stamps(directory, manifest)}
    temporary = directory / f".{STAMP}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(directory / STAMP)
    except OSError as error:
        logging.warning("%s is not written: %s.", directory / STAMP, error.strerror)


def is_verified(directory: pathlib.Path, manifest: Manifest) -> bool:
    """Whether all files were compared, and are as they were then by size and time."""
    path = directory / STAMP
    try:
        stored = convert(parse_json(read_bytes(path)), dict[str, _FileStamp])
        return stored == dict(_stamps(directory, manifest))
    except (DataError, OSError):
        return False


def _stamps(directory: pathlib.Path, manifest: Manifest):
    for record in manifest.shards:
        for name, digest in record.files.items():
            status = os.stat(directory / name)
            yield name, _FileStamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest)


class Verification:
    """Compares the files of codes in the background; several processes share them out."""

    def __init__(self, codes: Codes, process: int = 0, processes: int = 1) -> None:
        """Begins, unless they were compared since they were written."""
        self._directory, self._manifest = codes.directory, codes.manifest
        self._damaged: list[str] = []
        self._shards = range(process, codes.info.num_shards, processes)
        self._is_alone = processes == 1
        self._thread = None
        if not is_verified(self._directory, self._manifest):
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Returns when all files were compared.

        Raises:
          DataError: one is damaged; the message names it.
        """
        if self._thread is not None:
            self._thread.join()
        if self._damaged:
            raise DataError(
                f"Codes that the run was trained on are damaged, so nothing is saved: "
                f"{' '.join(self._damaged[:5])} Delete these files in {self._directory} and run "
                "the same tokenize command again; it makes only them anew."
            )

    def _run(self) -> None:
        for shard in self._shards:
            self._damaged += damaged_files(self._directory, self._manifest, [shard])
            if self._damaged:
                return
        if self._is_alone:
            write_stamp(self._directory, self._manifest)
