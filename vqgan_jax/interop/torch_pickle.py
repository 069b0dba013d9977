"""Unpickles PyTorch's pickles without PyTorch, and without running what they hold.

A pickle is a program, and loading an untrusted one runs it. Here every name that the program
mentions is looked up in one short table, and what is not in it becomes an object that swallows
everything and does nothing. Tensors come out as descriptions that point into storages.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, None) or name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("complex128", "complex64", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
}
_DTYPE_ALIASES = {"double": "float64", "float": "float32", "half": "float16", "long": "int64"}
STORAGES = {
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


class Storage(Unknown):
    """Raw values by their key in the file: `size` elements of `dtype`."""

    __slots__ = ("dtype", "key", "size")

    def __init__(self, dtype: str, key: str, size: int):
        self.dtype, self.key, self.size = dtype, key, size


class Tensor(Unknown):
    """A view of a storage; offset and strides in elements, as the file says, unchecked."""

    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(self, storage, dtype, offset, shape, strides):
        self.storage, self.dtype = storage, dtype
        self.offset, self.shape, self.strides = offset, shape, strides


class Dtype(Unknown):
    """An element type by its name."""

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
    if not isinstance(storage, Storage):
        return Unknown()
    return Tensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_tensor_v3(storage, offset, shape, strides, _grad, _hooks, dtype, *_rest):
    if not isinstance(storage, Storage) or not isinstance(dtype, Dtype):
        return Unknown()
    return Tensor(storage, dtype.name, offset, shape, strides)


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


class Unpickler(pickle.Unpickler):
    """Knows tensors and containers; imports nothing and calls nothing else.

    Attributes:
      storages: the storages that were mentioned, by their keys.
    """

    def __init__(self, file, path: Path):
        super().__init__(file, encoding="utf-8", errors="replace")
        self.path = path
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str):
        """What a global's name stands for; never the global itself."""
        function = _FUNCTIONS.get((module, name))
        if function is not None:
            return _Function(function)
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
            return _StorageType(STORAGES[name])
        if module == "torch" and _DTYPE_ALIASES.get(name, name) in DTYPES:
            return Dtype(_DTYPE_ALIASES.get(name, name))
        return type("UnknownClass", (Unknown,), {"__slots__": (), "origin": f"{module}.{name}"})

    def persistent_load(self, pid):
        """The storage that a persistent id describes; inert where it describes none."""
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
        known = self.storages.setdefault(pid[2], Storage(pid[1].dtype, pid[2], pid[4]))
        # one storage may be mentioned as several types: keep each mention's own
        same = (known.dtype, known.size) == (pid[1].dtype, pid[4])
        return known if same else Storage(pid[1].dtype, pid[2], pid[4])
