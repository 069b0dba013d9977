"""Reads and writes PyTorch checkpoint files without PyTorch, and without running what they hold.

A checkpoint is a pickle whose tensors point to storages: since PyTorch 1.6 a zip archive with
`NAME/data.pkl` and one record `NAME/data/KEY` a storage, before that four pickles in a row with
the storages behind them. A pickle is a program, and `torch.load` of an untrusted one runs it; here
every name that the program mentions is looked up in one short table, and what is not in it becomes
an object that swallows everything and does nothing.
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

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ALIGNMENT = 64  # bytes; where PyTorch starts a record, so that a memory map is aligned

_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, None) or name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("complex128", "complex64", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
}
_DTYPE_ALIASES = {"double": "float64", "float": "float32", "half": "float16", "long": "int64"}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "BoolStorage": "bool",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "UntypedStorage": "uint8",
}
_STORAGE_OF_DTYPE = {dtype: name for name, dtype in _STORAGES.items() if name != "UntypedStorage"}


class CheckpointFileError(ValueError):
    """A file that cannot be read or written as a checkpoint; says which, why and what to do."""


class Unknown:
    """Stands for every object whose class the reader does not know.

    It takes any construction, state, item or call, keeps none of it, and can be a dictionary's key.
    """

    __slots__ = ()

    def __new__(cls, *_args, **_kwargs):
        """Takes the arguments of any class."""
        return object.__new__(cls)

    def __init__(self, *_args, **_kwargs):
        pass

    def __call__(self, *_args, **_kwargs):
        """Gives another unknown object."""
        return Unknown()

    def __setstate__(self, *_state):
        pass

    def __setitem__(self, _key, _value):
        pass

    def append(self, _item):
        """Keeps nothing."""

    def extend(self, _items):
        """Keeps nothing."""

    def add(self, _item):
        """Keeps nothing."""


# Everything that an unpickler hands out is one of these: all inherit the deaf `__setstate__`, so
# that a BUILD instruction cannot alter the reader's own objects.


class _Storage(Unknown):
    __slots__ = ("dtype", "key", "size")

    def __init__(self, dtype: str, key: str, size: int):
        self.dtype, self.key, self.size = dtype, key, size


class _Tensor(Unknown):
    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(self, storage, dtype, offset, shape, strides):
        self.storage, self.dtype = storage, dtype
        self.offset, self.shape, self.strides = offset, shape, strides


class _Dtype(Unknown):
    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class _StorageType(Unknown):
    __slots__ = ("dtype",)

    def __init__(self, dtype: str):
        self.dtype = dtype


class _Function(Unknown):
    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args, **_kwargs):
        return self.function(*args)


class _Dictionary(dict):
    __slots__ = ()

    def __setstate__(self, *_state):  # PyTorch hangs a version table on its state dicts
        pass


def _rebuild_tensor(storage, offset, shape, strides, *_rest):
    if not isinstance(storage, _Storage):
        return Unknown()
    return _Tensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_tensor_v3(storage, offset, shape, strides, _grad, _hooks, dtype, *_rest):
    if not isinstance(storage, _Storage) or not isinstance(dtype, _Dtype):
        return Unknown()
    return _Tensor(storage, dtype.name, offset, shape, strides)


def _rebuild_from_type(function, _type, args, *_state):
    return function(*args) if isinstance(function, _Function) else Unknown()


def _device(kind, index=None):
    return kind if index is None else f"{kind}:{index}"


_FUNCTIONS = {
    ("collections", "OrderedDict"): _Dictionary,
    ("torch", "Size"): tuple,
    ("torch", "device"): _device,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_rest: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_rest: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}


class _Unpickler(pickle.Unpickler):
    """Knows tensors and containers; imports nothing and calls nothing else."""

    def __init__(self, file, path: Path):
        super().__init__(file, encoding="utf-8", errors="replace")
        self.path = path
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str):
        function = _FUNCTIONS.get((module, name))
        if function is not None:
            return _Function(function)
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        if module == "torch" and _DTYPE_ALIASES.get(name, name) in _DTYPES:
            return _Dtype(_DTYPE_ALIASES.get(name, name))
        return type("UnknownClass", (Unknown,), {"__slots__": (), "origin": f"{module}.{name}"})

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or not pid:
            return Unknown()
        if pid[0] == "module" and len(pid) == 4:
            return pid[1]
        if not (
            pid[0] == "storage"
            and len(pid) in (5, 6)
            and isinstance(pid[1], _StorageType)
            and isinstance(pid[2], str)
            and isinstance(pid[4], int)
        ):
            return Unknown()
        if len(pid) == 6 and pid[5] is not None:
            raise CheckpointFileError(
                f"{self.path}: holds views of storages, as only PyTorch before 1.0 wrote them; "
                "load and save it once with a newer PyTorch."
            )
        known = self.storages.setdefault(pid[2], _Storage(pid[1].dtype, pid[2], pid[4]))
        # one storage may be mentioned as several types: keep each mention's own
        same = (known.dtype, known.size) == (pid[1].dtype, pid[4])
        return known if same else _Storage(pid[1].dtype, pid[2], pid[4])


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
            tree, storage_bytes = _open_zip(path)
        elif start[:1] == pickle.PROTO:
            tree, storage_bytes = _open_legacy(path)
        else:
            raise CheckpointFileError(
                f"{path}: is no PyTorch checkpoint (neither a zip archive nor a pickle); check "
                "that the download is the file itself and not a web page."
            )
        tree = _with_arrays(tree, lambda tensor: _array(tensor, storage_bytes, path), {})
    except (CheckpointFileError, OSError):
        raise
    except Exception as error:  # a damaged or hostile pickle ends in any of Python's errors
        raise CheckpointFileError(
            f"{path}: is damaged or no PyTorch checkpoint ({type(error).__name__}: {error}); "
            "download or copy it again."
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

    def storage_bytes(storage: _Storage) -> np.ndarray:
        values = record(f"data/{storage.key}")
        return _swapped(values, storage.dtype) if big_endian else values

    unpickler = _Unpickler(io.BytesIO(record("data.pkl").tobytes()), path)
    return unpickler.load(), storage_bytes


def _open_legacy(path: Path):
    file = _mapped(path)
    file_bytes = np.frombuffer(file, np.uint8)
    if _Unpickler(file, path).load() != _LEGACY_MAGIC:
        raise CheckpointFileError(f"{path}: is a pickle but no PyTorch checkpoint.")
    if _Unpickler(file, path).load() != _LEGACY_PROTOCOL:
        raise CheckpointFileError(
            f"{path}: is of an unknown version of PyTorch's old format; load and save it once "
            "with PyTorch."
        )
    system = _Unpickler(file, path).load()
    unpickler = _Unpickler(file, path)
    tree = unpickler.load()
    keys = _Unpickler(file, path).load()
    position = file.tell()

    big_endian = isinstance(system, dict) and system.get("little_endian") is False
    places = {}
    for key in keys:
        storage = unpickler.storages[key]
        header = file_bytes[position : position + 8].tobytes()
        count = int.from_bytes(header, "big" if big_endian else "little")
        size = count * _DTYPES[storage.dtype].itemsize
        position += 8
        if len(header) < 8 or position + size > file_bytes.size:
            raise CheckpointFileError(
                f"{path}: is cut off in storage {key} of {len(keys)}; download or copy it again."
            )
        places[key] = slice(position, position + size)
        position += size

    def storage_bytes(storage: _Storage) -> np.ndarray:
        if storage.key not in places:
            raise CheckpointFileError(
                f"{path}: lacks the storage {storage.key}; download or copy it again."
            )
        values = file_bytes[places[storage.key]]
        return _swapped(values, storage.dtype) if big_endian else values

    return tree, storage_bytes


def _swapped(values: np.ndarray, dtype: str) -> np.ndarray:
    width = _DTYPES[dtype].itemsize // (2 if dtype.startswith("complex") else 1)
    return values.view(f"u{width}").byteswap().view(np.uint8)


def _array(tensor: _Tensor, storage_bytes: Callable, path: Path) -> np.ndarray:
    dtype, storage = _DTYPES[tensor.dtype], tensor.storage
    offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
    values = storage_bytes(storage) if storage.size else np.empty(0, np.uint8)
    if values.size != storage.size * _DTYPES[storage.dtype].itemsize:
        raise CheckpointFileError(
            f"{path}: storage {storage.key} has {values.size} bytes instead of "
            f"{storage.size * _DTYPES[storage.dtype].itemsize}; download or copy it again."
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
    values = values[: values.size // dtype.itemsize * dtype.itemsize].view(dtype)[offset:]
    byte_strides = [stride * dtype.itemsize for stride in strides]
    return as_strided(values, shape, byte_strides, writeable=False)


def _with_arrays(value, array: Callable, done: dict):
    """The tree with plain containers, arrays for tensors, and cycles kept."""
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, _Tensor):
        result = array(value)
    elif isinstance(value, _Dtype):
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
