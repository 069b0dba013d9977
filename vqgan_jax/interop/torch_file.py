"""Reads PyTorch checkpoint files without PyTorch; `torch_writer.py` writes them.

A checkpoint is a pickle whose tensors point to storages: since PyTorch 1.6 a zip archive with
`NAME/data.pkl` and one record `NAME/data/KEY` a storage, before that five pickles in a row with
the storages behind them. Nothing in a file is executed: see `torch_pickle.py`.
"""

import functools
import io
import math
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from vqgan_jax.interop.pickle_limits import MOST_PICKLE_BYTES, Budget, CheckpointFileError
from vqgan_jax.interop.torch_pickle import (
    DTYPES,
    Dtype,
    Storage,
    Tensor,
    Unpickler,
)

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MOST_INFLATED = 512 * 2**20  # bytes of compressed records, beside eight times the file
_MOST_REPEATED = 2**20  # bytes of a tensor that repeats a smaller storage
_MOST_SHARED = 256 * 2**20  # bytes of all tensors, beside four times their storages
_MOST_DIRECTORY = 8 * 2**20  # bytes of an archive's directory: some 100,000 tensors


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The dictionary in a PyTorch checkpoint file, with NumPy arrays in place of tensors.

    Arrays are read-only; those of an uncompressed file are memory maps, read when they are used.
    Tensors in bfloat16 and float8 come as ml_dtypes' types, other objects as `Unknown`. Nothing in
    the file is executed.

    Args:
      path: a file that `torch.save` of any version since 0.4 wrote, of either format.

    Raises:
      CheckpointFileError: the file is missing, no checkpoint, cut off or damaged.
    """
    path = Path(path)
    if not path.is_file():
        what = "is no regular file" if path.exists() else "there is no such file"
        raise CheckpointFileError(f"{path}: {what}.")
    with path.open("rb") as file:
        start = file.read(512)
    try:
        with _BoundedReads(path) as file:
            if start[:4] == _ZIP_START:
                tree, storage_bytes, big_endian = _open_zip(path, file)
            elif start[:1] == pickle.PROTO:
                tree, storage_bytes, big_endian = _open_legacy(path)
            else:
                raise CheckpointFileError(f"{path}: {_what_it_is(start)}.")

            tree = _with_arrays(tree, _Arrays(path, storage_bytes, big_endian), {})
    except (CheckpointFileError, OSError):
        raise
    except Exception as error:  # a damaged or hostile pickle ends in any of Python's errors
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointFileError(
            f"{path}: is damaged or no PyTorch checkpoint ({reason[:200]}); download or copy it "
            "again."
        ) from error
    if not isinstance(tree, dict):
        raise CheckpointFileError(
            f"{path}: holds a single object instead of a dictionary of tensors; save the model's "
            "state_dict() with PyTorch and convert that."
        )
    return tree


def _what_it_is(start: bytes) -> str:
    """What a file that is no PyTorch checkpoint begins like, and what to do."""
    if not start:
        return "is empty; download or copy it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs and not the file itself; fetch it by `git lfs pull`"
    if start.startswith(b"\x89HDF"):
        return "is an HDF5 file (of Keras) and no PyTorch checkpoint"
    if start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 2**32:
        return "is a safetensors file and no PyTorch checkpoint; save its tensors with torch.save"
    if start.lstrip()[:1] == b"<":
        return "is a web page and no PyTorch checkpoint; download the file itself"
    return (
        "is no PyTorch checkpoint (neither a zip archive nor a pickle); check that the download is "
        "the file itself"
    )


def _what_archive_it_is(names: Collection[str]) -> str:
    """What a zip archive without a pickle of PyTorch is."""
    if any(name.endswith(".npy") for name in names):
        return "is an .npz file of NumPy and no PyTorch checkpoint"
    if "model.weights.h5" in names:
        return "is a file of Keras and no PyTorch checkpoint"
    return "is a zip archive but no PyTorch checkpoint (it has no data.pkl)"


def has_checksums(path: str | os.PathLike) -> bool:
    """Whether a checkpoint is of the format of PyTorch 1.6 on, whose records have a CRC-32."""
    with open(path, "rb") as file:
        return file.read(4) == _ZIP_START


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class _BoundedReads(io.FileIO):
    """A file of which no large part is read at once: a directory of an archive comes in one."""

    def read(self, size: int = -1) -> bytes:
        if size > _MOST_DIRECTORY:
            raise ValueError(f"its directory has {size} bytes")
        return super().read(size)


def _inflated(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """A compressed record, read in parts so that it is held once; checks the CRC-32 too."""
    values = np.empty(info.file_size, np.uint8)
    with archive.open(info) as file:
        position = 0
        while part := file.read(2**20):
            values[position : position + len(part)] = np.frombuffer(part, np.uint8)
            position += len(part)
    if position != values.size:
        raise EOFError(f"a record has {position} bytes instead of {values.size}")
    return values


def _open_zip(path: Path, file: _BoundedReads):
    if not zipfile.is_zipfile(file):
        raise CheckpointFileError(
            f"{path}: is cut off (a zip archive without its end); download or copy it again."
        )
    archive = zipfile.ZipFile(file)
    file_bytes = np.frombuffer(_mapped(path), np.uint8)
    records = _records(path, archive, file_bytes)
    roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
    if not roots:
        raise CheckpointFileError(f"{path}: {_what_archive_it_is(records)}.")
    root = min(roots, key=len)
    inflated = 0

    @functools.cache
    def record(name: str, most_bytes: int | None = None) -> np.ndarray:
        nonlocal inflated
        if root + name not in records:
            raise CheckpointFileError(
                f"{path}: lacks the record {root + name}; download or copy it again."
            )
        info, begin = records[root + name]
        if most_bytes is not None and info.file_size > most_bytes:
            raise CheckpointFileError(
                f"{path}: the record {root + name} has {info.file_size} bytes, more than the "
                f"{most_bytes} that it may have."
            )
        if info.compress_type != zipfile.ZIP_STORED:  # PyTorch itself never compresses
            inflated += info.file_size
            if inflated > _MOST_INFLATED + 8 * file_bytes.size:
                raise CheckpointFileError(
                    f"{path}: its compressed records have {inflated} bytes or more; load and save "
                    "it once with PyTorch."
                )
            return _inflated(archive, info)
        values = file_bytes[begin : begin + info.file_size]
        if zlib.crc32(values) != info.CRC:
            raise CheckpointFileError(
                f"{path}: the record {root + name} is damaged (its CRC-32 is another); download or "
                "copy it again."
            )
        return values

    big_endian = root + "byteorder" in records and record("byteorder").tobytes() == b"big"

    def storage_bytes(storage: Storage) -> np.ndarray:
        size = storage.size * DTYPES[storage.dtype].itemsize
        if not 0 <= size < 2**63:
            raise CheckpointFileError(f"{path}: the storage {storage.key[:60]!r} has no size.")
        return record(f"data/{storage.key}", size)

    program = record("data.pkl", MOST_PICKLE_BYTES).tobytes()
    unpickler = Unpickler(io.BytesIO(program), Budget(path))
    return unpickler.load(), storage_bytes, big_endian


def _records(
    path: Path, archive: zipfile.ZipFile, file_bytes: np.ndarray
) -> dict[str, tuple[zipfile.ZipInfo, int]]:
    """The records of an archive by name, each with the place where its bytes begin.

    Raises:
      CheckpointFileError: two have the same name or share bytes, or one is not where it should be.
    """
    found, places = {}, []
    for info in archive.infolist():
        header = file_bytes[info.header_offset : info.header_offset + 30].tobytes()
        if len(header) < 30 or header[:4] != _ZIP_START or info.flag_bits & 1:
            raise _misplaced(path, info)
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        begin = info.header_offset + 30 + name_size + extra_size
        name = file_bytes[info.header_offset + 30 :][:name_size].tobytes()
        if name != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
            raise _misplaced(path, info)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointFileError(
                f"{path}: the record {info.filename[:60]!r} is compressed by a method that no "
                "PyTorch writes; load and save it once with PyTorch."
            )
        if info.filename in found:
            raise CheckpointFileError(f"{path}: has the record {info.filename[:60]!r} twice.")
        found[info.filename] = info, begin
        places.append((info.header_offset, begin + info.compress_size, info))
    places.sort(key=lambda place: place[0])
    ends = [place[0] for place in places[1:]] + [archive.start_dir]
    for (_, end, info), limit in zip(places, ends, strict=True):
        if end > limit:
            raise _misplaced(path, info)
    return found


def _misplaced(path: Path, info: zipfile.ZipInfo) -> CheckpointFileError:
    return CheckpointFileError(
        f"{path}: the record {info.filename[:60]!r} is not where the archive says, or shares bytes "
        "with another; download or copy it again."
    )


def _open_legacy(path: Path):
    file_bytes = np.frombuffer(_mapped(path), np.uint8)
    # Not the file itself: a pickle may say that a string of all of it comes next.
    file, budget = io.BytesIO(file_bytes[:MOST_PICKLE_BYTES].tobytes()), Budget(path)
    if Unpickler(file, budget).load() != _LEGACY_MAGIC:
        raise CheckpointFileError(f"{path}: is a pickle but no PyTorch checkpoint.")
    if Unpickler(file, budget).load() != _LEGACY_PROTOCOL:
        raise CheckpointFileError(
            f"{path}: is of an unknown version of PyTorch's old format; load and save it once "
            "with PyTorch."
        )
    system = Unpickler(file, budget).load()
    unpickler = Unpickler(file, budget)
    tree = unpickler.load()
    keys = Unpickler(file, budget).load()
    position = file.tell()

    big_endian = isinstance(system, dict) and system.get("little_endian") is False
    places = {}
    for key in keys:
        if not isinstance(key, str) or key not in unpickler.storages or key in places:
            raise CheckpointFileError(
                f"{path}: its list of storages is damaged; download or copy it again."
            )
        storage = unpickler.storages[key]
        header = file_bytes[position : position + 8].tobytes()
        count = int.from_bytes(header, "big" if big_endian else "little")
        size = count * DTYPES[storage.dtype].itemsize
        position += 8
        if len(header) < 8 or position + size > file_bytes.size:
            raise CheckpointFileError(
                f"{path}: is cut off in storage {key} of {len(keys)}; download or copy it again."
            )
        places[key] = slice(position, position + size)
        position += size

    def storage_bytes(storage: Storage) -> np.ndarray:
        if storage.key not in places:
            raise CheckpointFileError(
                f"{path}: lacks the storage {storage.key}; download or copy it again."
            )
        return file_bytes[places[storage.key]]

    return tree, storage_bytes, big_endian


class _Arrays:
    """The arrays that tensors describe.

    Tensors may share storages, and a tensor may be mentioned often: each mention counts, because
    what reads the checkpoint copies each.
    """

    def __init__(self, path: Path, storage_bytes: Callable, big_endian: bool):
        self._path, self._storage_bytes, self._big_endian = path, storage_bytes, big_endian
        self._storages: set[str] = set()
        self._stored = self._mentioned = 0

    def __call__(self, tensor: Tensor) -> np.ndarray:
        array = _array(tensor, self._storage_bytes, self._big_endian, self._path)
        if tensor.storage.key not in self._storages:
            self._storages.add(tensor.storage.key)
            self._stored += tensor.storage.size * DTYPES[tensor.storage.dtype].itemsize
        self._mentioned += array.nbytes
        if self._mentioned > 4 * self._stored + _MOST_SHARED:
            raise CheckpointFileError(
                f"{self._path}: its tensors share storages and are far larger than these "
                f"({self._mentioned} bytes of {self._stored}); save their contiguous() forms with "
                "PyTorch."
            )
        return array


def _array(tensor: Tensor, storage_bytes: Callable, big_endian: bool, path: Path) -> np.ndarray:
    dtype, storage = DTYPES[tensor.dtype], tensor.storage
    offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
    values = storage_bytes(storage) if storage.size else np.empty(0, np.uint8)
    if values.size != storage.size * DTYPES[storage.dtype].itemsize:
        raise CheckpointFileError(
            f"{path}: storage {storage.key} has {values.size} bytes instead of "
            f"{storage.size * DTYPES[storage.dtype].itemsize}; download or copy it again."
        )
    numbers = (offset, *shape, *strides)
    if len(shape) > 32 or any(type(number) is not int or number >= 2**63 for number in numbers):
        raise CheckpointFileError(
            f"{path}: a tensor in storage {storage.key} has no shape; download or copy it again."
        )
    reach = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    if any(number < 0 for number in numbers) or (
        math.prod(shape) > 0 and reach * dtype.itemsize > values.size
    ):
        raise CheckpointFileError(
            f"{path}: a tensor of shape {shape} reaches past its storage {storage.key}; download "
            "or copy it again."
        )
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    if math.prod(shape) * dtype.itemsize > max(values.size, _MOST_REPEATED):
        raise CheckpointFileError(
            f"{path}: a tensor of shape {shape} repeats the {values.size} bytes of its storage "
            f"{storage.key}; save its contiguous() form with PyTorch."
        )
    values = values[: values.size // dtype.itemsize * dtype.itemsize]
    byte_strides = [stride * dtype.itemsize for stride in strides]
    if not big_endian:
        return as_strided(values.view(dtype)[offset:], shape, byte_strides, writeable=False)
    width = dtype.itemsize // (2 if dtype.kind == "c" else 1)
    parts = dtype.itemsize // width  # the real and the imaginary one are swapped by themselves
    values = values.view(f"u{width}")[offset * parts :]
    swapped = as_strided(values, (*shape, parts), (*byte_strides, width)).byteswap()
    array = swapped.view(dtype)[..., 0]
    array.flags.writeable = False
    return array


def _with_arrays(value, array: Callable, done: dict):
    """The tree with plain containers, arrays for tensors, and cycles kept."""
    if isinstance(value, Tensor):
        return array(value)
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, Dtype):
        result = value.name
    elif isinstance(value, dict):
        result = {}
        done[id(value)] = value, result
        for key, item in value.items():
            result[key] = _with_arrays(item, array, done)
    elif isinstance(value, list):
        result = []
        done[id(value)] = value, result
        result.extend(_with_arrays(item, array, done) for item in value)
    elif isinstance(value, tuple):
        result = tuple(_with_arrays(item, array, done) for item in value)
    else:
        return value
    done[id(value)] = value, result
    return result
