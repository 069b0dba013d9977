"""XLA's compiled programs as text, read into computations, and how often each of them runs.

XLA's own cost analysis counts the body of a loop once. Here every computation knows its number of
runs, from the loops' trip counts.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(r"(calls|body|condition|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    in_main_memory: bool  # else in the chip's fast memory, S(1) and above in the layout

    @property
    def bytes(self) -> float:
        """Without the padding of tiles; 0 for what is no array, such as a token."""
        size = _ITEM_BYTES.get(self.dtype)
        if size is None:
            size = 1 if self.dtype.startswith("f8") else 0
        return size * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str  # what stands in the parentheses
    attributes: str  # what stands behind them
    is_root: bool

    @functools.cached_property
    def called(self) -> tuple[tuple[str, str], ...]:
        """What it calls, as (role, name of the computation)."""
        found = [match.groups() for match in _CALLED.finditer(self.attributes)]
        for match in _BRANCHES.finditer(self.attributes):
            found += [("calls", name.strip().lstrip("%")) for name in match[1].split(",")]
        return tuple(found)


Computation = Mapping[str, Instruction]


class Program:
    """A compiled program.

    Attributes:
        computations: by name, each its instructions by name, in order.
        entry: the name of the one that begins.
        devices: that run it together.
    """

    def __init__(self, text: str) -> None:
        """Reads what `compiled.as_text()` gives."""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", None
        devices = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
        self.devices = int(devices[1]) if devices else 1
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                if header[1]:
                    self.entry = header[2]
            elif current is not None and (parts := _INSTRUCTION.match(line)):
                instruction = _read(parts[2], parts[3], bool(parts[1]))
                current[instruction.name] = instruction

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in a run of the program."""
        runs: dict[str, int] = collections.defaultdict(int)
        runs[self.entry] = 1
        for name in self._callers_first():
            for instruction in self.computations[name].values():
                trips = self.trip_count(name, instruction) if instruction.opcode == "while" else 1
                for _, called in instruction.called:
                    runs[called] += runs[name] * trips
        return dict(runs)

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """All that run: the computation's name, the instruction, and how often it runs."""
        for name, count in self.runs.items():
            for instruction in self.computations.get(name, {}).values():
                yield name, instruction, count

    def scheduled(self) -> set[str]:
        """Computations whose instructions run one by one: not those within a fused operation."""
        found, left = set(), [self.entry]
        while left:
            name = left.pop()
            if name in found:
                continue
            found.add(name)
            for instruction in self.computations[name].values():
                if instruction.opcode in ("while", "call", "conditional"):
                    left += [called for _, called in instruction.called]
        return found

    def trip_count(self, name: str, loop: Instruction) -> int:
        """How often a `while` of computation `name` runs its body; 1 where that is not known."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        roles = dict(loop.called)
        condition, body = self.computations[roles["condition"]], self.computations[roles["body"]]
        root = next(i for i in condition.values() if i.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return 1
        counter, limit = (condition[operand] for operand in root.operands)
        end = _constant(condition, limit)
        index = re.search(r"index=(\d+)", counter.attributes)
        if end is None or index is None:
            return 1
        index = int(index[1])
        start = _constant(self.computations[name], _element(self.computations[name], loop, index))
        step = self._step(body, index)
        return max(0, -(-(end - (start or 0)) // step))

    def _step(self, body: Computation, index: int) -> int:
        """What the body adds to the counter; 1 where that does not stand in it as a number."""
        root = next(i for i in body.values() if i.is_root)
        if root.opcode != "tuple":
            return 1
        added = body.get(root.operands[index])
        if added is None or added.opcode != "add":
            return 1
        numbers = [_constant(body, body.get(operand)) for operand in added.operands]
        return next((number for number in numbers if number), 1)

    def _callers_first(self) -> list[str]:
        order, done = [], set()

        def visit(name):
            if name in done or name not in self.computations:
                return
            done.add(name)
            for instruction in self.computations[name].values():
                for _, called in instruction.called:
                    visit(called)
            order.append(name)

        visit(self.entry)
        return order[::-1]


def _read(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    types, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    arguments = rest[len(opcode) + 1 : close]
    return Instruction(
        name=name,
        opcode=opcode,
        results=tuple(arrays(types)),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[close + 1 :],
        is_root=is_root,
    )


def arrays(types: str) -> Iterator[Array]:
    """The arrays that a type, or a tuple of types, is written as."""
    for dtype, dims, layout in _ARRAY.findall(types):
        shape = tuple(int(size.strip("<= ")) for size in dims.split(",") if size.strip())
        yield Array(dtype, shape, re.search(r"S\([1-9]", layout) is None)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _constant(computation: Computation, instruction: Instruction | None) -> int | None:
    """The whole number that an instruction gives, seen through copies."""
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    number = re.fullmatch(r"-?\d+", instruction.arguments)
    return int(number[0]) if number else None


def _element(computation: Computation, loop: Instruction, index: int) -> Instruction | None:
    """The instruction that a loop's state gets its element `index` from."""
    state = computation.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return None
    return computation.get(state.operands[index])
