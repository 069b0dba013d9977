"""The planner's figures as lines for the terminal."""

from collections.abc import Sequence

from vqgan_jax.planning.figures import Figures
from vqgan_jax.training.hardware import Chip

GIB = 2**30


def table(figures: Sequence[Figures], chip: Chip) -> str:
    """A line a program: memory, operations, bytes, and what limits its speed."""
    lines = [
        ("program", "GiB a chip", "share", "TFLOP an image", "GB moved", "GB sent", "FLOP a byte",
         "limited by", "images/s at most")
    ]  # fmt: skip
    for one in figures:
        memory = one.memory["all"]
        line = [one.name, f"{memory / GIB:.2f}", f"{memory / chip.memory:.0%}"]
        if one.seconds:
            limit, rate = one.limit
            line += [
                f"{one.flops * one.chips / one.images / 1e12:.3g}",
                f"{one.moved / 1e9:.3g}",
                f"{sum(one.sent.values()) / 1e9:.3g}",
                f"{one.intensity:.0f}",
                limit,
                f"{rate:,.0f}",
            ]
        else:
            line += ["does not fit", *[""] * 5]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip()
        for first, *rest in lines
    )


def details(figures: Sequence[Figures]) -> str:
    """What each program's memory holds, what its chips exchange, and what limits it how far."""
    lines = []
    for one in figures:
        held = [
            f"{kind} {size / GIB:.2f}"
            for kind, size in one.memory.items()
            if kind != "all" and size >= 0.005 * GIB
        ]
        lines.append(f"{one.name}: GiB a chip: {', '.join(held)}")
        sent = [f"{kind} {size / 1e9:.3g}" for kind, size in one.sent.items() if size >= 0.5e6]
        if sent:
            lines.append(f"{one.name}: GB sent by a chip: {', '.join(sent)}")
        if one.seconds:
            times = [f"{name} {1e3 * seconds:.3g}" for name, seconds in one.seconds.items()]
            lines.append(f"{one.name}: ms at least: {', '.join(times)}")
    return "\n".join(lines)


def training_limit(figures: Sequence[Figures]) -> tuple[float, float] | None:
    """Seconds a training step at the chip's limits, and images a second; None if it cannot run."""
    steps = [one for one in figures if one.trains]
    if not steps or not all(one.seconds for one in steps):
        return None
    seconds = sum(one.runs * max(one.seconds.values()) for one in steps)
    return seconds, steps[0].images / seconds
