"""The range of each number of a config, which stands beside its default.

A config's sections are written as dicts in which `number(12, 1, 4096)` is the default 12 and the
range from 1 to 4096, and `numbers((1, 2), 1, 64, length=(1, 10))` the same for each of several.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Number:
    """A default with its range.

    Attributes:
        default: the value, or a tuple of values.
        low: the smallest that is allowed.
        high: the largest.
        above: whether `low` itself is too small.
        below: whether `high` itself is too large.
        length: the fewest and the most values of a tuple; None for one number.
    """

    default: Any
    low: float
    high: float
    above: bool = False
    below: bool = False
    length: tuple[int, int] | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of a sentence; None where nothing is."""
        if self.length is None:
            return None if self._fits(value) else f"it must be {self}"
        if not isinstance(value, tuple | list):
            return f"it must be a tuple of numbers, each {self}"
        fewest, most = self.length
        if not fewest <= len(value) <= most:
            count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            return f"it has {len(value)} numbers, and must have {count}"
        return None if all(map(self._fits, value)) else f"each number must be {self}"

    def _fits(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self._is_whole and not isinstance(value, int):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        too_small = value <= self.low if self.above else value < self.low
        too_large = value >= self.high if self.below else value > self.high
        return not too_small and not too_large

    @property
    def _is_whole(self) -> bool:
        if self.length is None:
            return isinstance(self.default, int)
        return isinstance(self.low, int) and isinstance(self.high, int)

    def __str__(self) -> str:
        low = f"above {self.low:.16g}" if self.above else f"at least {self.low:.16g}"
        high = f"below {self.high:.16g}" if self.below else f"at most {self.high:.16g}"
        return f"{low} and {high}"


def number(
    default: float, low: float, high: float, above: bool = False, below: bool = False
) -> Number:
    """A number with its range; see `Number`."""
    return Number(default, low, high, above, below)


def share(default: float, below: bool = False) -> Number:
    """A number from 0 to 1; with `below`, 1 is too large."""
    return Number(default, 0.0, 1.0, below=below)


def numbers(default: tuple, low: float, high: float, length: tuple[int, int]) -> Number:
    """A tuple of numbers with the range of each; see `Number`."""
    return Number(default, low, high, length=length)


def defaults(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section as plain values."""
    return {
        key: defaults(value)
        if isinstance(value, Mapping)
        else value.default
        if isinstance(value, Number)
        else value
        for key, value in section.items()
    }


def ranges(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Number]]:
    """The numbers of a section by their paths, such as ("training.batch_size", Number(...))."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from ranges(value, f"{prefix}{key}.")
        elif isinstance(value, Number):
            yield f"{prefix}{key}", value
