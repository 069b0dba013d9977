"""How much of the time since a run was first started went to steps that counted: its goodput.

To the phases of each start, `phases.py`, come two of the run as a whole:

    lost         what was done after the checkpoint that a later start went on from
    down         between the last that is known of one start and the beginning of the next
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Annotated

import jax
import msgspec

from vqgan_jax.checkpoints.damage import set_aside
from vqgan_jax.checkpoints.writing import write_text
from vqgan_jax.configuration.documents import convert, parse_json, read_bytes
from vqgan_jax.errors import DataError
from vqgan_jax.training.phases import CHECKPOINTS, DATA, EVALUATION, PHASES, STEPS, PhaseClock
from vqgan_jax.training.progress import format_duration

LOST, DOWN = "lost", "down"
GOODPUT_FILE = "goodput.json"
_ALL = (*PHASES, LOST, DOWN)
_WORK = (STEPS, DATA, EVALUATION, CHECKPOINTS)  # what is lost with the steps that it was for
_MARKS = 100  # checkpoints that are remembered; a run goes on from one of the last


class Goodput:
    """The seconds of all starts of a run, kept in its directory by process 0.

    The file is written at every report, so what a killed process did after the last one counts as
    "down".

    Args:
        workdir: directory of the run.
        clock: of this start.
        step: the one that this start goes on from.
        now: seconds since 1970.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        clock: PhaseClock,
        step: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._path = pathlib.Path(workdir) / GOODPUT_FILE
        self._clock, self._now = clock, now
        self._before = dict.fromkeys(_ALL, 0.0)
        self._marks: dict[int, dict[str, float]] = {}
        self._starts = 1
        stored = _read(self._path) if jax.process_index() == 0 else None
        if stored is None:
            return
        self._starts = stored.starts + 1
        self._before |= stored.seconds
        began = now() - sum(clock.seconds().values())
        self._before[DOWN] += max(0.0, began - stored.written)
        self._marks = {at: mark for at, mark in stored.marks.items() if at <= step}
        kept = self._marks[max(self._marks)] if self._marks else dict.fromkeys(_WORK, 0.0)
        for phase in _WORK:
            self._before[LOST] += self._before[phase] - kept[phase]
            self._before[phase] = kept[phase]

    def seconds(self) -> dict[str, float]:
        """Seconds in each phase over all starts; their sum is the time since the first start."""
        current = self._clock.seconds()
        return {phase: value + current.get(phase, 0.0) for phase, value in self._before.items()}

    def mark(self, step: int) -> None:
        """Notes that a run which goes on from `step` loses nothing of what was until now."""
        seconds = self.seconds()
        self._marks[step] = {phase: seconds[phase] for phase in _WORK}
        self._marks = dict(sorted(self._marks.items())[-_MARKS:])
        self.write()

    def shares(self) -> dict[str, float]:
        """For the metrics: each phase's share of all time; that of "goodput/steps" is the goodput.

        In process 0; the others know of their own start alone.
        """
        seconds = self.seconds()
        total = sum(seconds.values()) or 1.0
        return {f"goodput/{phase}": value / total for phase, value in seconds.items()}

    def write(self) -> None:
        """Writes the file, all at once."""
        if jax.process_index() != 0:
            return
        content = {
            "starts": self._starts,
            "written": self._now(),
            "seconds": self.seconds(),
            "marks": self._marks,
        }
        write_text(self._path, json.dumps(content, indent=2) + "\n")

    def line(self) -> str:
        """All of it for the terminal."""
        seconds = self.seconds()
        share = seconds[STEPS] / (sum(seconds.values()) or 1.0)
        parts = [
            f"{phase} {format_duration(value)}"
            for phase, value in seconds.items()
            if phase == STEPS or value >= 0.5
        ]
        starts = f"{self._starts} start{'s' if self._starts > 1 else ''}"
        return f"goodput {share:.0%}: {', '.join(parts)}; {starts}"


@dataclasses.dataclass(frozen=True)
class _Stored:
    """What `Goodput.write` writes."""

    starts: Annotated[int, msgspec.Meta(ge=1, le=10**9)]
    written: float
    seconds: dict[str, float]
    marks: dict[int, dict[str, float]]

    def __post_init__(self) -> None:
        known = [self.seconds.keys() <= set(_ALL)]
        known += [mark.keys() == set(_WORK) for mark in self.marks.values()]
        if not all(known):
            raise ValueError("its phases are others")


def _read(path: pathlib.Path) -> _Stored | None:
    """What `Goodput.write` wrote; None where there is nothing, or it is damaged and set aside."""
    if not path.exists():
        return None
    try:
        return convert(parse_json(read_bytes(path)), _Stored)
    except DataError as error:
        set_aside(path, str(error).rstrip("."), "times are counted anew")
        return None
