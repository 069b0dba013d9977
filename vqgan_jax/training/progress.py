"""The line a run prints every so often: how far, how good, how fast, how long still."""

import sys
from collections.abc import Mapping
from typing import TextIO

import jax

from vqgan_jax.training.phases import COMPILE, DATA, STEPS, PhaseClock


class Progress:
    """Prints plain lines, which read the same in a terminal and in a log file.

    A line covers the steps since the line before:

        step  1200/10000  12.0%  l1 0.1034  lpips 0.412  312.5 images/s  data wait 3%  left 1:23:45

    The rate and the share of time spent waiting for data are of the time of steps and data alone;
    the time left is of all but compilation, as there will be more evaluations.

    Args:
        total_steps: the last step of the run.
        batch_size: images a step, on all devices together.
        start_step: the step that the run goes on from.
        stream: where lines go; None is standard output. Only process 0 prints.
        clock: tells what the time went to; None is one of its own.
    """

    def __init__(
        self,
        total_steps: int,
        batch_size: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: PhaseClock | None = None,
    ) -> None:
        self._total_steps = total_steps
        self._batch_size = batch_size
        self._stream = sys.stdout if stream is None else stream
        self.clock = PhaseClock() if clock is None else clock
        self.begin(start_step)

    def begin(self, step: int) -> None:
        """Rates and the time left count from the end of this step on."""
        self._first_step, self._first_time = step, self._time()
        self._start_window(step)

    def report(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Prints the line of a step and begins the next window.

        Args:
            step: a step whose results have arrived on the host. For one that is only dispatched
                the rate would be that of the dispatch.
            metrics: the figures to show, in this order.

        Returns:
            The window's "images_per_second" and "data_wait", a share in [0, 1], on all processes.
        """
        now = self.clock.seconds()
        waited = now[DATA] - self._window[DATA]
        seconds = waited + now[STEPS] - self._window[STEPS]
        steps = step - self._window_step
        rate = steps * self._batch_size / seconds if seconds > 0 else 0.0
        wait = waited / seconds if seconds > 0 else 0.0
        width = len(str(self._total_steps))
        parts = [
            f"step {step:>{width}}/{self._total_steps}",
            f"{step / self._total_steps:6.1%}",
            *(f"{name} {value:.4g}" for name, value in metrics.items()),
            f"{rate:.1f} images/s",
            f"data wait {wait:.0%}",
            f"left {format_duration(self._seconds_left(step))}",
        ]
        if jax.process_index() == 0:
            print("  ".join(parts), file=self._stream, flush=True)
        self._start_window(step)
        return {"images_per_second": rate, "data_wait": wait}

    def _seconds_left(self, step: int) -> float:
        done = max(1, step - self._first_step)
        return (self._total_steps - step) * (self._time() - self._first_time) / done

    def _time(self) -> float:
        return sum(value for phase, value in self.clock.seconds().items() if phase != COMPILE)

    def _start_window(self, step: int) -> None:
        self._window_step, self._window = step, self.clock.seconds()


def format_duration(seconds: float) -> str:
    """Seconds as mm:ss, or h:mm:ss from one hour on, rounded to the nearest second."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
