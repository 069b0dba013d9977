"""Codes from disk: random access to whole batches, the same on any number of hosts.

Batch `step` is a pure function of (seed, step): places of an endless order that has its own
permutation of the images in every pass, and of each image one of its augmentations at random. It
is gathered from files that are mapped into memory, so nothing is loaded before it is needed.
"""

import functools
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from vqgan_jax.data.code_manifest import CodesInfo, ConditionInfo, Manifest, read_manifest
from vqgan_jax.errors import DataError

_ORDER, _AUGMENTATION, _OBJECTS = 0, 1, 2  # streams of random numbers


def open_codes(directory: str | os.PathLike, verify: bool = False) -> "Codes":
    """The codes of one split.

    Args:
      directory: has `manifest.json`, as `python -m vqgan_jax.tokenize` leaves it.
      verify: read every file once and compare its SHA-256 and its codes' range.

    Raises:
      DataError: there are no complete codes, a file is missing or of another shape, a label is out
        of range; with `verify`, anything in a file is not as it was written.
    """
    directory = pathlib.Path(directory).expanduser()
    manifest = read_manifest(directory)
    if verify and (damaged := damaged_files(directory, manifest)):
        raise DataError(
            f"{len(damaged)} of the files in {directory} are damaged: {' '.join(damaged)} Delete "
            "them and run the same tokenize command again; it makes only these anew."
        )
    return Codes(directory, manifest)


class Codes:
    """The codes of one split.

    Attributes:
      directory: where they are.
      info: all that is known of them, `CodesInfo`.
      manifest: the same with the SHA-256 of each file.
      grid: (h, w) of the codes of an image.
      codebook_size: number of codes.
      depth: codes a position.
      fingerprint: of the tokenizer.
      num_classes: 0 where images have no classes.
      class_names: None where images have no classes.
      labels: int32 (N,), -1 for an image without class.
      conditions: those whose tokens are stored too, `ConditionInfo` by name.
      num_replaced: damaged images, in whose place the next readable one is.
    """

    def __init__(self, directory: pathlib.Path, manifest: Manifest) -> None:
        """Maps the files into memory; for the errors see `open_codes`."""
        info = manifest.info
        self.directory, self.info, self.manifest = directory, info, manifest
        self.grid, self.codebook_size, self.depth = info.grid, info.codebook_size, info.depth
        self.fingerprint = info.fingerprint
        self.num_classes, self.class_names = info.num_classes, info.class_names
        self.conditions = {condition.name: condition for condition in info.conditions}
        self.num_replaced = sum(len(shard.replaced) for shard in manifest.shards)
        shards = [map_shard(directory, info, shard) for shard in range(info.num_shards)]
        self._sequences = {
            kind: [arrays[kind].reshape(-1, arrays[kind].shape[-1]) for arrays in shards]
            for kind in info.vocabularies
        }
        self.labels = np.concatenate([arrays["labels"] for arrays in shards])
        lowest, highest = self.labels.min(), self.labels.max()
        if lowest < -1 or highest >= info.num_classes:
            raise DataError(
                f"{directory} has labels from {lowest} to {highest}, but its manifest names "
                f"{info.num_classes} classes. Look for damage with python -m vqgan_jax.tokenize "
                f"--verify={directory}."
            )
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        """Number of images."""
        return self.info.count

    def batch(
        self, seed: int, step: int, batch_size: int, rows: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Batch number `step` of the training order.

        Args:
          seed: of the order.
          step: from 0 on.
          batch_size: sequences of the batch on all hosts together.
          rows: those of the batch that this host wants; None for all.

        Returns:
          `codes`, int32 (rows, h * w * depth); `label`, int32 (rows,), -1 where there is none; and
          under its name each condition, int32 (rows, n), of the same image and augmentation; the
          objects of layouts are in a random order.
        """
        rows = np.arange(batch_size) if rows is None else rows
        passes, places = np.divmod(step * batch_size + rows, len(self))
        images = np.empty(len(rows), np.int64)
        for number in np.unique(passes):
            chosen = passes == number
            images[chosen] = self._order(seed, int(number))[places[chosen]]
        drawn = _random_bits(batch_size, seed, _AUGMENTATION, step)[rows]
        augmentations = (drawn % len(self.info.augmentations)).astype(np.int64)
        tokens = self.rows(images, augmentations)
        for name, condition in self.conditions.items():
            if condition.layout is not None:
                count = condition.layout.max_objects
                bits = _random_bits(batch_size * count, seed, _OBJECTS, step)
                keys = bits.reshape(batch_size, count)[rows]
                tokens[name] = condition.layout.shuffled(tokens[name], keys)
        return tokens

    def rows(
        self, images: np.ndarray, augmentations: np.ndarray | int = 0
    ) -> dict[str, np.ndarray]:
        """All that is stored of images by index, each in one augmentation, as of `batch`."""
        tokens = {"codes": self.gather(images, augmentations), "label": self.labels[images]}
        for name in self.conditions:
            tokens[name] = self.gather(images, augmentations, name)
        for kind, size in self.info.vocabularies.items():
            found = tokens[kind.removeprefix("condition-")]
            if found.size and found.max() >= size:
                raise DataError(self._outside(kind, size, images, found))
        return tokens

    def _outside(self, kind: str, size: int, images: np.ndarray, found: np.ndarray) -> str:
        """The message for a token that its vocabulary does not have."""
        row = np.unravel_index(found.argmax(), found.shape)[0]
        name = self.info.file_name(kind, int(images[row]) // self.info.images_per_shard)
        return (
            f"{self.directory / name} has the code {found.max()}, and there are {size}. Look for "
            f"damage with python -m vqgan_jax.tokenize --verify={self.directory}."
        )

    def gather(
        self, images: np.ndarray, augmentations: np.ndarray | int = 0, condition: str = ""
    ) -> np.ndarray:
        """The codes of images by index, each in one augmentation.

        int32 (len(images), h * w * depth); with the name of a condition, its tokens: int32
        (len(images), n).
        """
        sequences = self._sequences[self.conditions[condition].kind if condition else "codes"]
        shards, places = np.divmod(images, self.info.images_per_shard)
        places = places * len(self.info.augmentations) + augmentations
        order = np.argsort(shards, kind="stable")
        by_shard = shards[order]
        starts = np.flatnonzero(np.diff(by_shard, prepend=-1))
        gathered = np.empty((len(images), sequences[0].shape[-1]), np.int32)
        for start, end in zip(starts, [*starts[1:], len(images)], strict=True):
            members = order[start:end]
            gathered[members] = sequences[by_shard[start]][places[members]]
        return gathered

    def _make_order(self, seed: int, number: int) -> np.ndarray:
        """A permutation of the images for pass `number`."""
        return np.argsort(_random_bits(len(self), seed, _ORDER, number), kind="stable")


def _random_bits(count: int, *keys: int) -> np.ndarray:
    """uint64 (count,), a pure function of the keys.

    Raw bits, because NumPy promises that these stay the same in later versions, and does not
    promise it of its permutations.
    """
    seeds = np.random.SeedSequence([key % 2**64 for key in keys])
    return np.random.PCG64(seeds).random_raw(count)


def map_shard(directory: pathlib.Path, info: CodesInfo, shard: int) -> dict[str, np.ndarray]:
    """The arrays of a shard by kind, as of `CodesInfo.arrays`, mapped into memory.

    Raises:
      DataError: a file is missing, truncated, or not what `info` says.
    """
    return {
        kind: _map_array(directory / info.file_name(kind, shard), shape, dtype)
        for kind, (shape, dtype) in info.arrays(shard).items()
    }


def _map_array(path: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array of an .npy file, mapped into memory; `DataError` where it is not as expected."""
    again = "Delete it and run the same tokenize command again; it makes only this one anew."
    try:
        with open(path, "rb") as file:
            offset, found_shape, found_dtype = _read_header(file)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing. Run the same tokenize command again; it makes only this one anew."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged or truncated: {error}. {again}") from error
    if found_shape != shape or found_dtype != dtype:
        raise DataError(
            f"{path} has the shape {found_shape} and type {found_dtype} instead of {shape} and "
            f"{dtype}. {again}"
        )
    if size != offset + math.prod(shape) * dtype.itemsize:
        raise DataError(f"{path} is damaged or truncated: it has {size} bytes. {again}")
    # As a plain array: the subclass for maps is several times slower to index.
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))


_HEADER = re.compile(
    rb"\{'descr': '([<|][iu][1248])', 'fortran_order': False, 'shape': \(([0-9, ]{0,100})\), \} *\n"
)


def _read_header(file: BinaryIO) -> tuple[int, tuple[int, ...], np.dtype]:
    """Where the values of an .npy file begin, their shape and type.

    Read without NumPy, which evaluates a header as Python text: that is slow, not for several
    threads, and not for hostile files.

    Raises:
      ValueError: it is no such file of whole numbers.
    """
    start = file.read(10)
    if len(start) < 10 or start[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("it does not begin like an .npy file")
    header = file.read(int.from_bytes(start[8:10], "little"))
    match = _HEADER.fullmatch(header)
    if match is None:
        raise ValueError("its header is none of an array of whole numbers")
    shape = tuple(int(size) for size in match[2].split(b",") if size.strip())
    return 10 + len(header), shape, np.dtype(match[1].decode())


def damaged_files(
    directory: pathlib.Path, manifest: Manifest, shards: Sequence[int] | None = None
) -> list[str]:
    """A sentence for each file that is not as it was written, of all shards or some."""
    info = manifest.info
    wanted = range(info.num_shards) if shards is None else shards

    def names(shard: int) -> dict[str, str]:
        return {kind: info.file_name(kind, shard) for kind in info.arrays(shard)}

    def altered(shard: int) -> list[str]:
        found = []
        recorded = manifest.shards[shard].files
        for name in names(shard).values():
            try:
                with open(directory / name, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != recorded.get(name):
                        found.append(f"{name} has another SHA-256 than its manifest says.")
            except OSError as error:
                found.append(f"{name} cannot be read: {error.strerror}.")
        return found

    def outside(shard: int) -> list[str]:
        found = []
        for kind, size in info.vocabularies.items():
            name = names(shard)[kind]
            shape, dtype = info.arrays(shard)[kind]
            try:
                highest = _map_array(directory / name, shape, dtype).max(initial=0)
            except DataError as error:
                found.append(str(error))
                continue
            if highest >= size:
                what = "codebook" if kind == "codes" else "vocabulary"
                found.append(f"{name} has the code {highest} of a {what} of {size}.")
        return found

    def faults(shard: int) -> list[str]:
        return altered(shard) or outside(shard)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [line for found in pool.map(faults, wanted) for line in found]


def check_codes(
    codes: Codes,
    fingerprint: str,
    grid: tuple[int, int],
    codebook_size: int,
    num_classes: int = 0,
    conditions: Sequence[ConditionInfo] = (),
) -> None:
    """Raises `DataError` where codes are not those that a transformer is for.

    Args:
      codes: what there is.
      fingerprint: of the transformer's tokenizer.
      grid: (h, w) that it models.
      codebook_size: of its tokenizer.
      num_classes: that it is conditioned on; 0 = labels do not matter.
      conditions: that it is conditioned on beside classes.
    """
    where = codes.directory
    if codes.fingerprint != fingerprint:
        raise DataError(
            f"{where} has codes of another tokenizer: its fingerprint is "
            f"{codes.fingerprint[:12]}..., and this tokenizer's is {fingerprint[:12]}.... Make "
            "them with this tokenizer by python -m vqgan_jax.tokenize."
        )
    if codes.codebook_size != codebook_size:
        raise DataError(
            f"{where} has codes of a codebook of {codes.codebook_size}; {codebook_size} are "
            "expected."
        )
    if tuple(codes.grid) != tuple(grid):
        raise DataError(
            f"{where} has grids of {codes.grid[0]}x{codes.grid[1]} codes; {grid[0]}x{grid[1]} are "
            "expected. Tokenize with another --resolution."
        )
    for condition in conditions:
        _check_condition(codes, condition)
    if num_classes == 0:
        return
    if codes.labels.min() < 0:
        raise DataError(
            f"{where} has images without a class, and the transformer is conditioned on "
            f"{num_classes} classes."
        )
    if codes.labels.max() >= num_classes:
        raise DataError(
            f"{where} has the class {codes.labels.max()}; the transformer has {num_classes}, 0 to "
            f"{num_classes - 1}."
        )


def _check_condition(codes: Codes, wanted: ConditionInfo) -> None:
    where, name = codes.directory, wanted.name
    if name not in codes.conditions:
        raise DataError(
            f"{where} has no tokens of the condition {name}; it has "
            f"{', '.join(codes.conditions) or 'none of any'}. Tokenize with --conditions={name}=..."
            " into another --output."
        )
    found = codes.conditions[name]
    if found.fingerprint != wanted.fingerprint:
        raise DataError(
            f"{where} has tokens of the condition {name} by another tokenizer: its fingerprint is "
            f"{found.fingerprint[:12] or 'none'}, and {wanted.fingerprint[:12] or 'none'} is "
            "expected. Tokenize with the condition's tokenizer into another --output."
        )
    theirs, ours = found.facts, wanted.facts
    for fact in theirs | ours:
        # What rounding depends on may differ, as with the codes.
        if fact != "dtype" and theirs.get(fact) != ours.get(fact):
            raise DataError(
                f"{where} has tokens of the condition {name} whose {fact} is "
                f"{_short(theirs.get(fact))}; {_short(ours.get(fact))} is expected. Tokenize with "
                "other --conditions into another --output, or change the transformer's config."
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
