"""What a pickle may cost: a budget of steps, and a memo that cannot be made slow.

A pickle of a few bytes can ask for work and memory without end, for instance by naming one large
list in many calls. Everything that takes time or memory is charged to one budget a file: a step for
each instruction, each item that a call is given, and each 16 bytes or characters that are read or
compared. A checkpoint needs about 70 steps a tensor.
"""

import pickle
from pathlib import Path

from vqgan_jax.errors import DataError

MOST_STEPS = 2**21
MOST_PICKLE_BYTES = 64 * 2**20
_TEXT = 16  # bytes or characters a step
_NUMBER = 16  # steps a number as a key, whose hashes can be made to collide
_LONGEST_NAME = 1024  # characters


class CheckpointFileError(DataError):
    """A file that cannot be read or written as a checkpoint; says which, why and what to do."""


class Budget:
    """Steps that the pickles of a file may still take.

    Attributes:
      path: the file, for messages.
    """

    def __init__(self, path: Path, steps: int = MOST_STEPS):
        self.path = path
        self._steps = self._left = steps

    def charge(self, steps: int) -> None:
        """Takes steps off.

        Raises:
          CheckpointFileError: none are left.
        """
        self._left -= steps
        if self._left < 0:
            raise CheckpointFileError(
                f"{self.path}: its pickle needs more than {self._steps:,} steps to read, far more "
                "than a model's tensors do; save the state_dict() alone with PyTorch."
            )

    def charge_bytes(self, count: int) -> None:
        """Takes the steps of bytes or characters off."""
        self.charge(count // _TEXT)

    def charge_arguments(self, arguments) -> None:
        """Takes the steps of a call off: one for each item of each argument."""
        self.charge(sum(len(argument) for argument in arguments if hasattr(argument, "__len__")))

    def charge_key(self, key) -> None:
        """Takes the steps of a key of a dictionary off, which is hashed and compared."""
        if isinstance(key, str | bytes):
            self.charge_bytes(len(key))
        elif isinstance(key, int | float):
            self.charge(_NUMBER)


def check_name(name: str) -> str:
    """A name in a pickle; raises `UnpicklingError` for one of more than 1024 characters."""
    if len(name) > _LONGEST_NAME:
        raise pickle.UnpicklingError(f"it has a name of {len(name)} characters")
    return name


class Memo:
    """Objects by small numbers, as a list: a dictionary's keys could be made to collide."""

    def __init__(self):
        self._values, self._missing = [], object()

    def __len__(self):
        return len(self._values)

    def __getitem__(self, index: int):
        value = self._values[index] if 0 <= index < len(self._values) else self._missing
        if value is self._missing:
            raise KeyError(index)
        return value

    def __setitem__(self, index: int, value):
        if index >= MOST_STEPS:
            raise pickle.UnpicklingError(f"it has a memo of {index} objects")
        if index == len(self._values):
            self._values.append(value)
        else:
            self._values.extend([self._missing] * (index + 1 - len(self._values)))
            self._values[index] = value
