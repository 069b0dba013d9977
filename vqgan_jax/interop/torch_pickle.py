"""Unpickles PyTorch's pickles without PyTorch, and without running what they hold.

A pickle is a program, and loading an untrusted one runs it. Here every name that the program
mentions is looked up in one short table, and what is not in it becomes an object that swallows
everything and does nothing. Tensors come out as descriptions that point into storages.

It is Python's own interpreter of pickles, the one in Python: unlike the one in C it makes no room
for what a pickle merely says will come, and its steps can be counted (`pickle_limits.py`).
"""

import pickle
import struct
from collections.abc import Callable

import ml_dtypes
import numpy as np

from vqgan_jax.interop.pickle_limits import Budget, CheckpointFileError, Memo, check_name

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
_MOST_CLASSES = 10_000  # distinct names in a pickle; each is a class of its own
_LARGEST_KEY = 2**61 - 2  # of the numbers that are their own hash
_LONGEST_NUMBER = 255  # bytes
_LONGEST_LINE = 4096


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
    __slots__ = ("budget", "function")

    def __init__(self, function: Callable, budget: Budget):
        self.function, self.budget = function, budget

    def __call__(self, *args, **_kwargs):
        # One step can call with a long list that is already there, over and over.
        self.budget.charge_arguments(args)
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
    if not isinstance(kind, str) or not isinstance(index, int | None):
        return Unknown()
    if index is not None and not 0 <= index < 2**16:
        return Unknown()
    return kind if index is None else f"{kind}:{index}"


_FUNCTIONS = {
    ("torch", "Size"): tuple,
    ("torch", "device"): _device,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_rest: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_rest: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}


class Unpickler(pickle._Unpickler):
    """Knows tensors and containers; imports nothing and calls nothing else.

    Attributes:
      budget: what the pickle may cost; several pickles of a file share one.
      storages: the storages that were mentioned, by their keys.
    """

    def __init__(self, file, budget: Budget):
        super().__init__(file, encoding="utf-8", errors="replace")
        self.budget = budget
        self.memo = Memo()
        self.storages: dict[str, Storage] = {}
        self._globals = {("collections", "OrderedDict"): _Function(self._dictionary, budget)}

    def load(self):
        """The object that the pickle builds; the same loop as Python's, with counted steps.

        Raises:
          CheckpointFileError: the budget is used up.
        """
        self._unframer = pickle._Unframer(self._file_read, self._file_readline)
        self.read, self.readline = self._read, self._read_line
        self.metastack, self.stack = [], []
        self.append = self.stack.append
        self.proto = 0
        charge, read, dispatch = self.budget.charge, self._unframer.read, self.dispatch
        try:
            while instruction := read(1):
                charge(1)
                dispatch[instruction[0]](self)
        except pickle._Stop as stop:
            return stop.value
        raise EOFError("it is cut off")

    def _read(self, count: int) -> bytes:
        self.budget.charge_bytes(count)
        return self._unframer.read(count)

    def _read_line(self) -> bytes:
        line = self._unframer.readline()
        if len(line) > _LONGEST_LINE:
            raise pickle.UnpicklingError(f"it has a line of {len(line)} bytes")
        self.budget.charge_bytes(len(line))
        return line

    def _key(self, key):
        """A key of a dictionary; other objects than these may take for ever to compare."""
        self.budget.charge_key(key)
        if isinstance(key, int) and abs(key) > _LARGEST_KEY:
            return Unknown()
        return key if isinstance(key, str | int | float | bytes | type | None) else Unknown()

    def _dictionary(self, items=()):
        pairs = items.items() if isinstance(items, dict) else items
        result = _Dictionary()
        for key, value in pairs:
            result[self._key(key)] = value
        return result

    def get_extension(self, code):
        """Of a registry that other packages fill: nothing of it is known here."""
        self.append(Unknown)

    def load_reduce(self):
        """A call."""
        self.budget.charge_arguments(self.stack[-1:])
        super().load_reduce()

    def load_newobj(self):
        """A new object of a class."""
        self.budget.charge_arguments(self.stack[-1:])
        super().load_newobj()

    def load_newobj_ex(self):
        """The same with named arguments."""
        self.budget.charge_arguments(self.stack[-2:])
        super().load_newobj_ex()

    def load_dict(self):
        """A dictionary of the items on the stack."""
        items = self.pop_mark()
        pairs = zip(items[::2], items[1::2], strict=True)
        self.append({self._key(key): value for key, value in pairs})

    def load_setitem(self):
        """One item into a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][self._key(key)] = value

    def load_setitems(self):
        """Items into a dictionary."""
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][self._key(key)] = value

    def load_additems(self):
        """Items into a set."""
        items = self.pop_mark()
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(map(self._key, items))

    def load_frozenset(self):
        """A set of the items on the stack."""
        self.append(frozenset(map(self._key, self.pop_mark())))

    def load_long4(self):
        """A long number; those of more digits than any count or seed are slow to compare."""
        (count,) = struct.unpack("<i", self.read(4))
        if not 0 <= count <= _LONGEST_NUMBER:
            raise pickle.UnpicklingError(f"it has a number of {count} bytes")
        self.append(pickle.decode_long(self.read(count)))

    def load_bytearray8(self):
        """Bytes; no checkpoint has any of this kind."""
        raise pickle.UnpicklingError("it holds a bytearray")

    dispatch = pickle._Unpickler.dispatch | {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.LONG4[0]: load_long4,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }

    def find_class(self, module: str, name: str):
        """What a global's name stands for; never the global itself."""
        known = self._globals.get((check_name(module), check_name(name)))
        if known is not None:
            return known
        if len(self._globals) >= _MOST_CLASSES:
            raise pickle.UnpicklingError(f"it names more than {_MOST_CLASSES} classes")
        self._globals[module, name] = found = self._find(module, name)
        return found

    def _find(self, module: str, name: str):
        function = _FUNCTIONS.get((module, name))
        if function is not None:
            return _Function(function, self.budget)
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
                f"{self.budget.path}: holds views of storages, as only PyTorch before 1.0 wrote "
                "them; load and save it once with a newer PyTorch."
            )
        key = check_name(pid[2])
        known = self.storages.setdefault(key, Storage(pid[1].dtype, key, pid[4]))
        # one storage may be mentioned as several types: keep each mention's own
        same = (known.dtype, known.size) == (pid[1].dtype, pid[4])
        return known if same else Storage(pid[1].dtype, key, pid[4])
