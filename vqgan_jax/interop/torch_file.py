"""Reads and writes PyTorch checkpoint files without PyTorch.

A checkpoint is a pickle whose tensors point to storages: since PyTorch 1.6 a zip archive with
`NAME/data.pkl` and one record `NAME/data/KEY` a storage, before that five pickles in a row with
the storages behind them. Nothing in a file is executed: see `torch_pickle.py`.
"""

import io
import math
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from vqgan_jax.interop.torch_pickle import (
    DTYPES,
    STORAGES,
    CheckpointFileError,
    Dtype,
    Storage,
    Tensor,
    Unpickler,
)

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ALIGNMENT = 64  # bytes; where PyTorch starts a record, so that a memory map is aligned

_STORAGE_OF_DTYPE = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


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
        raise CheckpointFileError(f"{path}: there is no such file.")
    with path.open("rb") as file:
        start = file.read(4)
    try:
        if start == _ZIP_START:
            tree, storage_bytes, big_endian = _open_zip(path)
        elif start[:1] == pickle.PROTO:
            tree, storage_bytes, big_endian = _open_legacy(path)
        else:
            raise CheckpointFileError(
                f"{path}: is no PyTorch checkpoint (neither a zip archive nor a pickle); check "
                "that the download is the file itself and not a web page."
            )

        def array(tensor: Tensor) -> np.ndarray:
            return _array(tensor, storage_bytes, big_endian, path)

        tree = _with_arrays(tree, array, {})
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


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _open_zip(path: Path):
    if not zipfile.is_zipfile(path):
        raise CheckpointFileError(
            f"{path}: is cut off (a zip archive without its end); download or copy it again."
        )
    archive = zipfile.ZipFile(path)
    records = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
    if not roots:
        raise CheckpointFileError(
            f"{path}: is a zip archive but no PyTorch checkpoint (it has no data.pkl)."
        )
    root = min(roots, key=len)
    file_bytes = np.frombuffer(_mapped(path), np.uint8)

    def record(name: str) -> np.ndarray:
        if root + name not in records:
            raise CheckpointFileError(
                f"{path}: lacks the record {root + name}; download or copy it again."
            )
        info = records[root + name]
        if info.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(archive.read(info), np.uint8)
        header = file_bytes[info.header_offset : info.header_offset + 30].tobytes()
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        begin = info.header_offset + 30 + name_size + extra_size
        if begin + info.file_size > file_bytes.size:
            raise CheckpointFileError(
                f"{path}: the record {root + name} reaches past the file's end; download or copy "
                "it again."
            )
        return file_bytes[begin : begin + info.file_size]

    big_endian = root + "byteorder" in records and record("byteorder").tobytes() == b"big"

    def storage_bytes(storage: Storage) -> np.ndarray:
        return record(f"data/{storage.key}")

    unpickler = Unpickler(io.BytesIO(record("data.pkl").tobytes()), path)
    return unpickler.load(), storage_bytes, big_endian


def _open_legacy(path: Path):
    file = _mapped(path)
    file_bytes = np.frombuffer(file, np.uint8)
    if Unpickler(file, path).load() != _LEGACY_MAGIC:
        raise CheckpointFileError(f"{path}: is a pickle but no PyTorch checkpoint.")
    if Unpickler(file, path).load() != _LEGACY_PROTOCOL:
        raise CheckpointFileError(
            f"{path}: is of an unknown version of PyTorch's old format; load and save it once "
            "with PyTorch."
        )
    system = Unpickler(file, path).load()
    unpickler = Unpickler(file, path)
    tree = unpickler.load()
    keys = Unpickler(file, path).load()
    position = file.tell()

    big_endian = isinstance(system, dict) and system.get("little_endian") is False
    places = {}
    for key in keys:
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
    reach = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    if any(not isinstance(number, int) or number < 0 for number in numbers) or (
        math.prod(shape) > 0 and reach * dtype.itemsize > values.size
    ):
        raise CheckpointFileError(
            f"{path}: a tensor of shape {shape} reaches past its storage {storage.key}; download "
            "or copy it again."
        )
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    values = values[: values.size // dtype.itemsize * dtype.itemsize]
    if big_endian:
        width = dtype.itemsize // (2 if dtype.kind == "c" else 1)
        values = values.view(f"u{width}").byteswap()
    values = values.view(dtype)[offset:]
    byte_strides = [stride * dtype.itemsize for stride in strides]
    return as_strided(values, shape, byte_strides, writeable=False)


def _with_arrays(value, array: Callable, done: dict):
    """The tree with plain containers, arrays for tensors, and cycles kept."""
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, Tensor):
        result = array(value)
    elif isinstance(value, Dtype):
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


def write_checkpoint(path: str | os.PathLike, checkpoint: Mapping) -> None:
    """Writes a file that `torch.load(path)` reads, with its safe default `weights_only=True` too.

    Args:
      path: the new file; it appears only when it is complete.
      checkpoint: string keys; values are None, bool, int, float, str, arrays (which become CPU
        tensors), and lists, tuples and mappings of these. Inner mappings become OrderedDicts.

    Raises:
      CheckpointFileError: the file exists, or a value has a type that PyTorch files do not.
      OSError: the file cannot be written; nothing is left behind.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointFileError(f"{path}: exists already; delete it or choose another name.")
    arrays = []
    program = pickle.PROTO + b"\x02" + _pickled(checkpoint, arrays, "", top=True) + pickle.STOP
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                root = "archive"  # the name that PyTorch gives it in a stream
                _write_record(archive, file, f"{root}/data.pkl", program)
                _write_record(archive, file, f"{root}/byteorder", b"little")
                for index, values in enumerate(arrays):
                    _write_record(archive, file, f"{root}/data/{index}", values.data.cast("B"))
                _write_record(archive, file, f"{root}/version", b"3\n")
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_record(archive: zipfile.ZipFile, file, name: str, values) -> None:
    info = zipfile.ZipInfo(name)
    info.file_size = len(values)
    begin = file.tell() + 30 + len(name) + 4
    padding = -begin % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w") as record:
        record.write(values)


def _pickled(value, arrays: list[np.ndarray], where: str, top: bool = False) -> bytes:
    """Pickle instructions that build the value; its arrays, little-endian, go to `arrays`."""
    if value is None:
        return pickle.NONE
    if isinstance(value, bool):
        return pickle.NEWTRUE if value else pickle.NEWFALSE
    if isinstance(value, int):
        digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return pickle.LONG1 + struct.pack("<B", len(digits)) + digits
    if isinstance(value, float):
        return pickle.BINFLOAT + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    if isinstance(value, Mapping):
        items = b"".join(
            _pickled(key, arrays, where) + _pickled(item, arrays, f"{where}.{key}")
            for key, item in value.items()
        )
        empty = pickle.EMPTY_DICT
        if not top:
            empty = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        return empty + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, list | tuple):
        items = pickle.MARK + b"".join(_pickled(item, arrays, where) for item in value)
        if isinstance(value, tuple):
            return items + pickle.TUPLE
        return pickle.EMPTY_LIST + items + pickle.APPENDS
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _pickled_tensor(np.asarray(value), arrays, where)
    raise CheckpointFileError(
        f"{where.lstrip('.')}: a {type(value).__name__} cannot be written to a PyTorch file."
    )


def _pickled_tensor(value: np.ndarray, arrays: list[np.ndarray], where: str) -> bytes:
    storage = _STORAGE_OF_DTYPE.get(value.dtype.name)
    if storage is None:
        raise CheckpointFileError(
            f"{where.lstrip('.')}: PyTorch files hold no {value.dtype}; convert it to float32 or "
            "int64."
        )
    shape = value.shape
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    contiguous = np.ascontiguousarray(value.reshape(-1), value.dtype.newbyteorder("<"))
    key = str(len(arrays))
    arrays.append(contiguous.view(np.uint8))
    pid = (
        pickle.MARK
        + _pickled("storage", arrays, where)
        + _global("torch", storage)
        + b"".join(_pickled(item, arrays, where) for item in (key, "cpu", value.size))
        + pickle.TUPLE
        + pickle.BINPERSID
    )
    geometry = b"".join(_pickled(item, arrays, where) for item in (0, shape, strides, False))
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = pickle.MARK + pid + geometry + hooks + pickle.TUPLE
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
