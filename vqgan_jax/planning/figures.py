"""What a planned program costs on a chip, from its compilation, and what limits its speed."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import time

import jax

from vqgan_jax.configuration import ConfigError
from vqgan_jax.planning import costs
from vqgan_jax.planning.hlo import Program
from vqgan_jax.planning.programs import Planned
from vqgan_jax.planning.topologies import Topology
from vqgan_jax.training.hardware import Chip

_SHOWN = 12  # collectives that the figures name
_MEMORY = ("argument", "output", "alias", "temp", "generated_code")
_OWN = ("results", "temporaries", "program")  # beside what it is given
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass
class Figures:
    """Of one program, on one chip, for one run.

    Attributes:
        name: of the program.
        chips: that run it together.
        images: that a run goes through on all of them.
        trains: whether it is a part of the training step.
        runs: of it in a training step.
        memory: bytes at its peak, by kind; "all" is their sum.
        fits: whether that is within the chip.
        flops: operations: XLA's count, with loops as often as they run.
        moved: bytes to and from main memory.
        sent: bytes to other chips, by kind of collective.
        collectives: the largest, as of `costs.Collective`.
        seconds: that flops, moved and sent need at the chip's limits.
        compile_seconds: what the compiler took.
    """

    name: str
    chips: int
    images: float
    trains: bool
    runs: float
    memory: dict[str, float]
    fits: bool
    flops: float = 0.0
    moved: float = 0.0
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: list[dict] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0

    @property
    def limit(self) -> tuple[str, float]:
        """What takes longest, and the images a second that all chips make at most."""
        name = max(self.seconds, key=self.seconds.get)
        return name, self.images / self.seconds[name]

    def as_dict(self) -> dict:
        """For JSON, with what follows from the rest."""
        found = dataclasses.asdict(self) | {"flops_per_byte": self.intensity}
        if self.seconds:
            name, rate = self.limit
            found |= {"limited_by": name, "images_per_second": rate}
            found["flops_per_image"] = self.flops * self.chips / self.images
        return found

    @property
    def intensity(self) -> float:
        """Operations a byte to or from memory."""
        return self.flops / self.moved if self.moved else 0.0


@dataclasses.dataclass
class Compilation:
    """What is read of a compiled program.

    Attributes:
        text: the program; empty where the compiler refused it.
        memory: its `memory_analysis`, bytes by name.
        flops: of its `cost_analysis`.
        refusal: the compiler's message where it does not fit.
        seconds: that the compiler took.
    """

    text: str
    memory: dict[str, int]
    flops: float
    refusal: str
    seconds: float


def figures_of(planned: Planned, topology: Topology, cache: pathlib.Path | None = None) -> Figures:
    """Compiles a program, or takes its compilation from `cache`, and reads its figures."""
    chip, chips = topology.chip, len(topology.devices)
    compilation = _compiled(planned, topology.name, cache)
    figures = Figures(planned.name, chips, planned.images, planned.trains, planned.runs, {}, True)
    figures.compile_seconds = compilation.seconds
    if compilation.refusal:
        figures.memory, figures.fits = _refused(compilation.refusal, planned), False
    else:
        _fill(figures, compilation, planned, chip)
    return figures


def _compiled(planned: Planned, topology: str, cache: pathlib.Path | None) -> Compilation:
    """Kept as text, by what was to compile and by the compilers' versions."""
    lowered = planned.lower()
    # Names of places in the source are not part of the program.
    source = re.sub(r"(?m)^#loc.*$|loc\(.*?\)", "", lowered.as_text())
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    options = [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
    key = hashlib.sha256("\n".join([*versions, *options, topology, source]).encode()).hexdigest()
    file = cache / f"{key}.json.gz" if cache else None
    if file is not None and (kept := _read(file)):
        return kept
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compilation = Compilation("", {}, 0.0, str(error), 0.0)
    else:
        analysis = compiled.memory_analysis()
        memory = {name: getattr(analysis, f"{name}_size_in_bytes") for name in _MEMORY}
        flops = compiled.cost_analysis()["flops"]
        compilation = Compilation(compiled.as_text(), memory, flops, "", 0.0)
    compilation.seconds = time.perf_counter() - start
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(compilation)).encode()))
        partial.rename(file)
    return compilation


def _read(file: pathlib.Path) -> Compilation | None:
    """None where there is no such file, or none that is whole and of this version."""
    try:
        return Compilation(**json.loads(gzip.decompress(file.read_bytes())))
    except (OSError, EOFError, ValueError, TypeError):
        return None


def _fill(figures: Figures, compilation: Compilation, planned: Planned, chip: Chip) -> None:
    program, memory = Program(compilation.text), compilation.memory
    held = dict(planned.bytes_held)
    held["padding"] = max(0, memory["argument"] - sum(held.values()))
    held["results"] = memory["output"] - memory["alias"]
    held["temporaries"] = memory["temp"]
    held["program"] = memory["generated_code"]
    held["all"] = memory["argument"] + sum(held[name] for name in _OWN)
    exchanges = costs.collectives(program)
    repeated = costs.product_flops(program) - costs.product_flops(program, loops_once=True)
    figures.memory = held
    figures.fits = held["all"] <= chip.memory
    figures.flops = compilation.flops + repeated
    figures.moved = costs.memory_bytes(program)
    figures.sent = costs.total_sent(exchanges)
    figures.collectives = [dataclasses.asdict(exchange) for exchange in exchanges[:_SHOWN]]
    figures.seconds = {
        "compute": figures.flops / chip.flops,
        "memory": figures.moved / chip.bandwidth,
        "interconnect": sum(figures.sent.values()) / chip.interconnect,
    }


def _refused(message: str, planned: Planned) -> dict[str, float]:
    """What a program that does not fit would need, as the compiler's message says."""
    held = planned.bytes_held
    if used := re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message):
        return dict(held) | {"all": float(used[1]) * _UNITS[used[2]]}
    used = re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", message)
    if used is None:
        raise ConfigError(f"The compiler refused the {planned.name}: {message.splitlines()[0]}")
    temporaries = float(used[1]) * _UNITS[used[2]]
    return dict(held) | {"temporaries": temporaries, "all": sum(held.values()) + temporaries}
