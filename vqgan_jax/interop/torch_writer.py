"""Writes PyTorch checkpoint files without PyTorch, of the format since version 1.6."""

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vqgan_jax.interop.pickle_limits import CheckpointFileError
from vqgan_jax.interop.torch_pickle import STORAGES

_ALIGNMENT = 64  # bytes; where PyTorch starts a record, so that a memory map is aligned
_STORAGE_OF_DTYPE = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


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
