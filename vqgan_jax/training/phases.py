"""What the time of a program goes to: at each moment it is in one phase.

    start        imports, opening data, restoring the state
    compile      tracing and compiling, wherever it happens
    data         waiting for the next batch
    steps        all else in the loop: the devices compute, and the host waits for their metrics
    evaluation   evaluations and pictures
    checkpoints  what the loop waits for them; they are written in the background

The dispatch of a step returns before the devices are done, so there are no shorter phases.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import jax

START, COMPILE, DATA, STEPS = "start", "compile", "data", "steps"
EVALUATION, CHECKPOINTS = "evaluation", "checkpoints"
PHASES = (STEPS, COMPILE, DATA, EVALUATION, CHECKPOINTS, START)
_COMPILER_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class PhaseClock:
    """Seconds in each phase; one clock for all that is said about a run's speed.

    Args:
        phase: the first one.
        before: seconds that it has lasted already.
        clock: seconds from any origin, never going back.
    """

    def __init__(
        self,
        phase: str = STEPS,
        before: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._phase, self._since = phase, clock() - before
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._spans: list[tuple[float, float]] = []  # of the compiler, the latest ones

    def enter(self, phase: str) -> None:
        """Ends the current phase and begins another."""
        now = self._clock()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a phase within another one, which goes on afterwards."""
        outer = self._phase
        self.enter(name)
        try:
            yield
        finally:
            self.enter(outer)

    def seconds(self) -> dict[str, float]:
        """Seconds in each phase until now."""
        self.enter(self._phase)
        return dict(self._seconds)

    def note_compilation(self, start: float, end: float) -> None:
        """Counts a time span that just ended as compilation, not as what it happened in.

        Spans within this one, which ended before it, are not counted twice.

        Args:
            start: in seconds, from any origin that is the same for all spans.
            end: likewise.
        """
        seconds = end - start
        while self._spans and self._spans[-1][0] >= start:
            inner_start, inner_end = self._spans.pop()
            seconds -= inner_end - inner_start
        self._spans.append((start, end))
        self._seconds[COMPILE] += seconds
        self._seconds[self._phase] -= seconds

    @contextlib.contextmanager
    def watching_compiler(self) -> Iterator[None]:
        """While it is entered, what JAX compiles in this thread counts as compilation."""
        thread = threading.get_ident()

        def note(event: str, start: float, end: float, **_) -> None:
            if event in _COMPILER_EVENTS and threading.get_ident() == thread:
                self.note_compilation(start, end)

        jax.monitoring.register_event_time_span_listener(note)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_time_span_listener(note)
