"""Writes the codes of a split to disk, shard by shard, so that a killed pass can go on.

While a pass is under way, the folder `partial` beside the shards has `plan.json`, the facts that
every shard depends on; a record of each finished shard; and files that are being written. A shard
is whole or not there: its files are synced under another name, then renamed, and its record comes
after them. `manifest.json` comes last of all, and `partial` goes.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vqgan_jax.checkpoints.directory_lock import is_empty
from vqgan_jax.data.code_manifest import (
    MANIFEST,
    PARTIAL,
    CodesInfo,
    Manifest,
    ShardRecord,
    read_json,
    read_manifest,
    read_record,
)
from vqgan_jax.data.codes import map_shard
from vqgan_jax.data.elements import ReadTransformed
from vqgan_jax.errors import DataError

PLAN = "plan.json"


def stored_rules(directory: pathlib.Path) -> int | None:
    """The rules for folders that a pass was begun with; None where there is none.

    Raises:
      DataError: what is stored of it is damaged.
    """
    for path in (directory / MANIFEST, directory / PARTIAL / PLAN):
        if path.exists():
            return CodesInfo.from_json(read_json(path), path).folder_rules
    return None


class ShardImages(Sequence):
    """The images of some shards, one after the other, each shard padded to whole batches.

    Batches so have images of one shard only, always the same ones, whoever encodes it.
    """

    def __init__(self, read: ReadTransformed, shards: Sequence[range], batch_size: int) -> None:
        """`shards` are indices of images."""
        self._read = read
        padded = [[*shard] + [-1] * (-len(shard) % batch_size) for shard in shards]
        self._indices = np.concatenate(padded)

    def __len__(self) -> int:
        """Number of images with the padding."""
        return len(self._indices)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """What `ReadTransformed.or_next` gives, or its `blank` for padding."""
        index = int(self._indices[place])
        if index >= 0:
            return self._read.or_next(index)
        return self._read.blank() | {"index": np.int64(0), "skipped": np.int64(0)}


class CodeWriter:
    """A directory that gets the codes of one split, in one go or several.

    Any number of processes may share it as long as each writes other shards. One of them calls
    `begin` before any writes, and `finish` when all have.
    """

    def __init__(self, directory: str | os.PathLike, info: CodesInfo) -> None:
        """Compares what is there, and writes nothing yet.

        Raises:
          DataError: the directory holds anything but codes of the same facts.
        """
        self.directory, self.info = pathlib.Path(directory).expanduser(), info
        self._partial = self.directory / PARTIAL
        if self.directory.exists() and not self.directory.is_dir():
            raise DataError(f"{self.directory} is no directory; choose another --output.")
        # The facts are on disk before the first shard: a pass with another tokenizer or other
        # images would otherwise go on with shards that it cannot tell from its own.
        for path in (self.directory / MANIFEST, self._partial / PLAN):
            if path.exists():
                _check_same(self.directory, CodesInfo.from_json(read_json(path), path), info)
                return
        if not is_empty(self.directory, besides=(PARTIAL,)):
            raise DataError(f"{self.directory} exists and is not empty; choose another --output.")

    @property
    def has_manifest(self) -> bool:
        """Whether a pass has come to its end."""
        return (self.directory / MANIFEST).exists()

    @property
    def is_complete(self) -> bool:
        """Whether a pass has come to its end and nothing was deleted since."""
        return self.has_manifest and all(map(self._is_whole, range(self.info.num_shards)))

    @property
    def has_begun(self) -> bool:
        """Whether a pass is under way."""
        return (self._partial / PLAN).exists()

    def begin(self) -> None:
        """Makes the directory ready for the shards that are missing.

        A directory that was complete until some of its files were deleted goes on too.
        """
        with self._explaining():
            self._partial.mkdir(parents=True, exist_ok=True)
            if not self.has_begun:
                self._write_json(self._partial / PLAN, self.info.to_json())
            listed = read_manifest(self.directory).shards if self.has_manifest else ()
            for i, record in enumerate(listed):
                self._write_json(self._record(i), dataclasses.asdict(record))
            for i in range(self.info.num_shards):
                if not self._is_whole(i):
                    self._record(i).unlink(missing_ok=True)
            (self.directory / MANIFEST).unlink(missing_ok=True)

    def unfinished(self) -> list[int]:
        """The shards that are still to be written, once the pass has begun."""
        return [i for i in range(self.info.num_shards) if not self._record(i).exists()]

    def write(
        self,
        shard: int,
        codes: np.ndarray,
        labels: np.ndarray,
        replaced: Sequence[int] = (),
        conditions: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Writes a shard.

        Args:
          shard: its number.
          codes: integers (n, augmentations, h * w * depth).
          labels: integers (n,), -1 where there is none.
          replaced: indices of damaged images, in whose place the next readable one is.
          conditions: integers (n, augmentations, tokens) of each condition by name.

        Raises:
          DataError: it cannot be written.
        """
        arrays = {"codes": codes, "labels": labels}
        arrays |= {c.kind: conditions[c.name] for c in self.info.conditions}
        digests = {}
        with self._explaining():
            for kind, (_, dtype) in self.info.arrays(shard).items():
                content = io.BytesIO()
                np.save(content, arrays[kind].astype(dtype))
                name = self.info.file_name(kind, shard)
                self._write(self.directory / name, content.getbuffer())
                # Of what was meant to be written, which tells of damage on the way to the disk too.
                digests[name] = hashlib.sha256(content.getbuffer()).hexdigest()
            own = {}
            for kind in ("codes", "labels"):
                own[kind] = self.info.file_name(kind, shard)
                own[f"{kind}_sha256"] = digests.pop(own[kind])
            numbers = tuple(int(index) for index in replaced)
            record = ShardRecord(**own, n=len(labels), replaced=numbers, conditions=digests)
            self._write_json(self._record(shard), dataclasses.asdict(record))

    def finish(self) -> None:
        """Writes the manifest, once no shard is unfinished, and removes what only passes need."""
        with self._explaining():
            if not self.has_manifest:
                paths = [self._record(i) for i in range(self.info.num_shards)]
                records = tuple(
                    read_record(read_json(path), self.info, i, path) for i, path in enumerate(paths)
                )
                manifest = Manifest(self.info, records)
                self._write_json(self.directory / MANIFEST, manifest.to_json())
            self.clean()

    def clean(self) -> None:
        """Removes what only a pass needs, of one that is complete."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _record(self, shard: int) -> pathlib.Path:
        return self._partial / f"shard-{shard:05}.json"

    def _is_whole(self, shard: int) -> bool:
        """Whether the files of a shard are there with all their bytes."""
        try:
            map_shard(self.directory, self.info, shard)
        except DataError:
            return False
        return True

    def _write_json(self, path: pathlib.Path, values: dict) -> None:
        self._write(path, (json.dumps(values, indent=1) + "\n").encode())

    def _write(self, path: pathlib.Path, content: bytes | memoryview) -> None:
        """A file that is on the disk with all its content, or not there."""
        temporary = self._partial / f"{path.name}.{os.getpid()}"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the renaming is on the disk with its folder
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"Cannot write codes to {self.directory}: {error.strerror or error}. Finished "
                "shards are kept; when this is mended, run the same command again."
            ) from error


def _check_same(directory: pathlib.Path, there: CodesInfo, here: CodesInfo) -> None:
    facts = _facts(here)
    for what, theirs in _facts(there).items():
        if theirs != facts[what]:
            raise DataError(
                f"{directory} has codes of another pass: its {what} is {_short(theirs)}, and here "
                f"it is {_short(facts[what])}. Choose another --output, or the same {what}."
            )


def _facts(info: CodesInfo) -> dict[str, Any]:
    """What two passes must agree on, in order; those of conditions come after which there are."""
    facts = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}
    facts["conditions"] = ", ".join(condition.name for condition in info.conditions) or "none"
    for condition in info.conditions:
        for name, value in condition.facts.items():
            facts[f"{name} of the condition {condition.name}"] = value
    return {what.replace("fingerprint", "tokenizer"): value for what, value in facts.items()}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
