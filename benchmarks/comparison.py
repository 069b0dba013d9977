"""Timing two implementations beside each other, in turns, so that what else runs falls on both."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

BLOCK_SECONDS = 0.5  # short calls are repeated within a block until it is about this long


def compare(
    contestants: Mapping[str, Any], kinds: Sequence[str], batch: int, unit: str, repeats: int
) -> dict[str, float]:
    """Seconds of each kind of call, and the ratios where there are two contestants.

    Args:
        contestants: by the prefix of their figures, "" for ours and "peer_" for the other; each has
            a method for each kind.
        kinds: the methods' names.
        batch: units that a call works on.
        unit: what they are: "image".
        repeats: blocks a figure.
    """
    figures = {}
    for kind in kinds:
        calls = {prefix: getattr(player, kind) for prefix, player in contestants.items()}
        for prefix, seconds in block_times(calls, repeats).items():
            figures[f"{prefix}{kind}_s_per_{unit}"] = seconds / batch
    if "peer_" in contestants:
        for kind in kinds:
            own, other = (figures[f"{prefix}{kind}_s_per_{unit}"] for prefix in ("", "peer_"))
            figures[f"{kind}_ratio"] = other / own
    return figures


def block_times(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of a call of each, measured in blocks that take turns."""
    lengths = {}
    for name, call in calls.items():
        call()  # compiles
        start = time.perf_counter()
        call()
        lengths[name] = max(1, round(BLOCK_SECONDS / (time.perf_counter() - start)))
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()  # out of the caches of the other's block
            start = time.perf_counter()
            for _ in range(lengths[name]):
                call()
            times[name].append((time.perf_counter() - start) / lengths[name])
    return {name: statistics.median(values) for name, values in times.items()}


def print_line(figures: Mapping[str, Any]) -> None:
    """One line of JSON, with four digits."""
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded), flush=True)
