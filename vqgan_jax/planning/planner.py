"""From a config and a slice of TPUs to a plan: what fits, how fast it can be at most."""

import dataclasses
import pathlib

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqgan_jax import configuration
from vqgan_jax.configuration import ConfigError
from vqgan_jax.models.target import planned_for
from vqgan_jax.planning import report
from vqgan_jax.planning.figures import Figures, figures_of
from vqgan_jax.planning.programs import Planned, planned_programs, planned_state, resolve
from vqgan_jax.planning.topologies import Topology
from vqgan_jax.training.sharding import sharding_table


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans a config for one slice.

    Attributes:
        topology: the slice.
        tokenizer: of a transformer, its tokenizer's config; None for that of its run.
        cache: where figures are kept; None to compile always.
        wanted: words of which a program's name has one; empty for all programs.
    """

    topology: Topology
    tokenizer: ConfigDict | None = None
    cache: pathlib.Path | None = None
    wanted: tuple[str, ...] = ()

    def mesh(self, config: ConfigDict) -> Mesh:
        """The config's mesh of the slice's devices."""
        return self.topology.mesh(config.mesh)

    def programs(self, config: ConfigDict) -> list[Planned]:
        """All programs of a run."""
        mesh, tokenizer = self.mesh(config), None
        if config.stage == "transformer":
            config, tokenizer = resolve(config, self.tokenizer)
        return planned_programs(config, mesh, tokenizer)

    def figures(self, config: ConfigDict, training_only: bool = False) -> list[Figures]:
        """Of the programs of a run, those that are wanted, or only of its training step."""
        with planned_for("tpu"):
            programs = [one for one in self.programs(config) if one.trains or not training_only]
            return self._figures_of(programs)

    def _figures_of(self, programs: list[Planned]) -> list[Figures]:
        chosen = [
            planned
            for planned in programs
            if not self.wanted or any(word in planned.name for word in self.wanted)
        ]
        if not chosen:
            raise ConfigError(
                f"--programs={','.join(self.wanted)} names none of "
                f"{', '.join(planned.name for planned in programs)}."
            )
        return [figures_of(planned, self.topology, self.cache) for planned in chosen]

    def explain_sharding(self, config: ConfigDict) -> str:
        """Where each array of the training state lies."""
        with planned_for("tpu"):
            if config.stage == "transformer":
                config, _ = resolve(config, self.tokenizer)
            return sharding_table(planned_state(config, self.mesh(config)))

    def with_largest_batch(self, config: ConfigDict) -> ConfigDict:
        """The config with the largest batch whose training step fits, to an eighth.

        Raises:
            ConfigError: the smallest one does not fit.
        """
        shape = self.mesh(config).shape
        unit = shape["data"] * shape["fsdp"] * config.optimizer.accumulate

        def fits(count: int) -> bool:
            tried = with_batch(config, count * unit)
            configuration.validate(tried)
            figures = self.figures(tried, training_only=True)
            need = max(one.memory["all"] for one in figures) / report.GIB
            fit = all(one.fits for one in figures)
            words = "fits" if fit else "does not fit"
            print(f"batch {count * unit}: {need:.2f} GiB a chip, {words}", flush=True)
            return fit

        low, high = 0, 1
        while fits(high):
            low, high = high, 2 * high
        if low == 0:
            raise ConfigError(
                f"A batch of {unit}, the smallest on {self.topology.name}, does not fit; split "
                "parameters by --config.mesh.fsdp or --config.mesh.tensor, or set "
                "--config.model.remat=True."
            )
        while high - low > max(1, low // 8):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return with_batch(config, low * unit)

    def plan(self, config: ConfigDict) -> tuple[dict, bool]:
        """Prints the plan of a config.

        Returns:
            All of it, for JSON; and whether every program fits.
        """
        shape, size = self.mesh(config).shape, config.training.batch_size
        name, devices = self.topology.name, self.topology.devices
        split = ", ".join(f"{axis} {n}" for axis, n in shape.items() if n > 1)
        print(
            f"{name}: {len(devices)} x {devices[0].device_kind}"
            + (f" ({split})" if split else "")
            + f", batch {size}, {size / len(devices):g} a chip",
            flush=True,
        )
        with planned_for("tpu"):
            programs = self.programs(config)
            figures = self._figures_of(programs)
        chip = self.topology.chip
        print(report.table(figures, chip))
        print(
            f"A chip: {chip.memory / report.GIB:g} GiB, {chip.flops / 1e12:g} TFLOP/s, "
            f"{chip.bandwidth / 1e9:g} GB/s of memory, {chip.interconnect / 1e9:g} GB/s to others; "
            f"programs of less than {chip.flops / chip.bandwidth:.0f} FLOP a byte wait for memory."
        )
        print(report.details(figures))
        plan = {"topology": name, "batch_size": size, "mesh": dict(shape)}
        plan["chip"] = dataclasses.asdict(chip)
        plan["programs"] = [one.as_dict() for one in figures]
        steps = {planned.name for planned in programs if planned.trains}
        limit = report.training_limit(figures)
        if limit is not None and steps <= {one.name for one in figures}:
            seconds, rate = limit
            days = config.training.num_steps * seconds / 86_400
            plan |= {"images_per_second": rate, "days": days}
            print(
                f"At most {rate:,.0f} images a second in training; {config.training.num_steps:,} "
                f"steps take {days:.2f} days at least."
            )
        print(flush=True)
        return plan, all(one.fits for one in figures)


def with_batch(config: ConfigDict, size: int) -> ConfigDict:
    """The config with another batch size."""
    config = config.copy_and_resolve_references()
    config.training.batch_size = size
    return config
