"""What a compiled program does: operations, bytes to and from memory, and between chips."""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

from vqgan_jax.planning.hlo import Array, Computation, Instruction, Program

# Bytes that a chip sends in a ring of n, as a share of the whole array.
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
    "ragged-all-to-all": lambda n: (n - 1) / n,
}
_NO_MOVE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "async-update", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between chips.

    Attributes:
        kind: "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute".
        bytes: of the whole array: what is gathered, or what is reduced.
        group: chips that take part in it together.
        runs: how often it happens in a run of the program.
        source: the operation of the model that it comes from.
    """

    kind: str
    bytes: float
    group: int
    runs: int
    source: str

    @property
    def sent(self) -> float:
        """Bytes that each chip sends in a run of the program, in a ring."""
        return self.runs * self.bytes * _SENT[self.kind](self.group)


def product_flops(program: Program, loops_once: bool = False) -> float:
    """Operations of matrix products and convolutions; two for a multiplication and an addition.

    Args:
        program: what was compiled.
        loops_once: count bodies of loops once, as XLA's cost analysis does.
    """
    return sum(
        (1 if loops_once else runs) * _flops(program.computations[name], instruction)
        for name, instruction, runs in program.instructions()
        if instruction.opcode in ("dot", "convolution")
    )


def _flops(computation: Computation, product: Instruction) -> float:
    (output,) = product.results[:1]
    left, right = (computation[operand].results[0] for operand in product.operands[:2])
    if product.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
        dims = [int(i) for i in contracted[1].split(",") if i] if contracted else []
        return 2.0 * math.prod(output.shape) * math.prod(left.shape[i] for i in dims)
    return _convolution_flops(product, left, right, output)


def _convolution_flops(product: Instruction, left: Array, right: Array, output: Array) -> float:
    """As XLA counts: positions of the kernel that lie in the padding are not computed."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes)
    inputs, kernels, outputs = labels.groups()
    total = 2.0 * output.shape[outputs.index("b")] * output.shape[outputs.index("f")]
    total *= right.shape[kernels.index("i")]  # of one group
    window = re.search(r"window=\{([^}]*)\}", product.attributes)
    values = dict(part.split("=") for part in window[1].split()) if window else {}

    def of_dimension(name, i, default):
        return values[name].split("x")[i] if name in values else default

    for i, label in enumerate(sorted(label for label in inputs if label.isdigit())):
        low = int(of_dimension("pad", i, "0_0").split("_")[0])
        stride, dilation, base = (
            int(of_dimension(name, i, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate")
        )
        total *= _valid_positions(
            left.shape[inputs.index(label)],
            right.shape[kernels.index(label)],
            output.shape[outputs.index(label)],
            (low, stride, dilation, base),
        )
    return total


@functools.lru_cache(maxsize=4096)
def _valid_positions(size: int, kernel: int, output: int, window: tuple[int, ...]) -> int:
    """Pairs of an output and a place of the kernel that meet an input, along one dimension."""
    low, stride, dilation, base = window
    places = np.arange(output)[:, None] * stride - low + np.arange(kernel) * dilation
    inside = (places >= 0) & (places <= (size - 1) * base) & (places % base == 0)
    return int(inside.sum())


def collectives(program: Program) -> list[Collective]:
    """All exchanges between chips, each once: what belongs together has one channel."""
    found: dict[object, Collective] = {}
    for name, instruction, runs in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _SENT:
            continue
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        key = int(channel[1]) if channel else (name, instruction.name)
        source = re.search(r'op_name="([^"]*)"', instruction.attributes)
        operands = [
            array
            for operand in instruction.operands
            if operand in program.computations[name]
            for array in program.computations[name][operand].results
        ]
        moved = operands if kind in ("reduce-scatter", "all-reduce") else instruction.results
        if instruction.opcode.endswith("-start") and moved is not operands:
            # In front of what comes stand the operands, behind it what belongs to the waiting.
            moved = instruction.results[len(operands) : 2 * len(operands)]
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"
        collective = Collective(
            kind,
            sum(array.bytes for array in moved),
            _group_size(instruction.attributes, program.devices),
            runs,
            source[1] if source else "",
        )
        # Of one that goes on while others compute, each part has a copy: where it begins counts.
        begins = any(
            "AsyncCollectiveStart" in other.attributes
            for other in program.computations[name].values()
        )
        if key not in found or begins:
            found[key] = collective
    return sorted(found.values(), key=lambda collective: -collective.sent)


def _group_size(attributes: str, devices: int) -> int:
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])  # of an axis, or a part of it
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    return devices  # all; of a permutation it does not matter


def total_sent(exchanges: list[Collective]) -> dict[str, float]:
    """Bytes that a chip sends in a run of the program, by kind."""
    sums: dict[str, float] = collections.defaultdict(float)
    for collective in exchanges:
        sums[collective.kind] += collective.sent
    return dict(sums)


def memory_bytes(program: Program) -> float:
    """Bytes to and from a chip's main memory in a run of the program.

    Each operation reads its operands and writes its results once, but where a fused operation uses
    only a slice of an operand, or changes one in place, the slice counts. What is held in fast
    memory does not.
    """
    scheduled = program.scheduled()
    return sum(
        runs * _moved(program, program.computations[name], instruction)
        for name, instruction, runs in program.instructions()
        if name in scheduled and instruction.opcode not in _NO_MOVE
    )


def _moved(program: Program, computation: Computation, instruction: Instruction) -> float:
    operands = [computation[name].results for name in instruction.operands if name in computation]
    if instruction.opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0.0  # moved by what began it; only set apart
    if instruction.opcode == "dynamic-update-slice":
        return _main_bytes(operands[1]) * 2
    if instruction.opcode in _SLICES:
        return _main_bytes(instruction.results) * 2
    if instruction.opcode == "slice-start":  # to fast memory; the whole and the slice are given
        return instruction.results[1].bytes
    if instruction.opcode.endswith("-start"):  # results repeat the operands
        return sum(map(_main_bytes, operands)) + _main_bytes(instruction.results[:1])
    fused = next((name for role, name in instruction.called if role == "calls"), None)
    if fused is None or instruction.opcode != "fusion":
        return sum(map(_main_bytes, operands)) + _main_bytes(instruction.results)
    body, handed_on = program.computations[fused], _handed_on(instruction)
    operands = [() if i in handed_on.values() else arrays for i, arrays in enumerate(operands)]
    return _read_by(program, body, operands) + _written_by(body, instruction, handed_on)


def _handed_on(fusion: Instruction) -> dict[int, int]:
    """The results of a fusion that are its operands' buffers, by number.

    They are changed in place, or only passed through while something else is sent in them.
    """
    found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", fusion.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", found[1]) if found else []
    return {int(result or 0): int(operand) for result, operand in pairs}


def _main_bytes(results) -> float:
    return sum(array.bytes for array in results if array.in_main_memory)


def _read_by(program: Program, body: Computation, operands) -> float:
    """Of each operand what the fused operations use of it."""
    total = 0.0
    for instruction in body.values():
        if instruction.opcode == "parameter" and int(instruction.arguments) < len(operands):
            whole = _main_bytes(operands[int(instruction.arguments)])
            total += _used(program, body, instruction.name, whole)
    return total


def _used(program: Program, body: Computation, name: str, whole: float) -> float:
    """Bytes used of what `name` gives in a fused computation: all, or slices of it alone."""
    total = 0.0
    for instruction in body.values():
        for place, operand in enumerate(instruction.operands):
            if operand != name:
                continue
            if instruction.opcode in _SLICES and place == 0:
                total += sum(array.bytes for array in instruction.results)
            elif instruction.opcode == "bitcast":
                total += _used(program, body, instruction.name, whole)
            elif instruction.opcode == "fusion":  # fused ones within a fused one
                inner = program.computations[dict(instruction.called)["calls"]]
                parameter = next(
                    other.name
                    for other in inner.values()
                    if other.opcode == "parameter" and int(other.arguments) == place
                )
                total += _used(program, inner, parameter, whole)
            elif instruction.opcode == "dynamic-update-slice" and place == 0:
                continue  # changed in place
            else:
                return whole
    return min(total, whole)


def _written_by(body: Computation, fusion: Instruction, handed_on: dict[int, int]) -> float:
    root = next(instruction for instruction in body.values() if instruction.is_root)
    written = [root] if root.opcode != "tuple" else [body[name] for name in root.operands]
    if len(written) != len(fusion.results):
        new = (result for i, result in enumerate(fusion.results) if i not in handed_on)
        return _main_bytes(new)
    total = 0.0
    for i, (instruction, result) in enumerate(zip(written, fusion.results, strict=True)):
        while instruction.opcode == "bitcast" and instruction.operands[0] in body:
            instruction = body[instruction.operands[0]]
        if instruction.opcode == "dynamic-update-slice" and result.in_main_memory:
            total += sum(array.bytes for array in body[instruction.operands[1]].results)
        elif i not in handed_on:
            total += _main_bytes([result])
    return total
