"""Stopping a run from outside without losing work."""

import os
import signal
import sys
import threading
from collections.abc import Callable

INTERRUPTED = 130


class Preempted(Exception):
    """The run was asked to stop and its state is saved; the same command goes on with it."""


class InterruptWatch:
    """Answers each Ctrl-C at once, in a thread of its own, while it is entered.

    Python runs a signal's handler between two instructions of the main thread, which has none for
    as long as it waits for a compilation. The number of a signal is written to a pipe before that.

    Args:
        answer: called with 1 at the first SIGINT, 2 at the second and so on.
    """

    def __init__(self, answer: Callable[[int], None]) -> None:
        self._answer = answer
        self._pipe: int | None = None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            read, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            self._previous = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(read,), daemon=True).start()
        return self

    def __exit__(self, *_):
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous, warn_on_full_buffer=False)
            os.close(self._pipe)
            self._pipe = None

    def _watch(self, read: int) -> None:
        count = 0
        while number := os.read(read, 1):
            if number[0] == signal.SIGINT:
                count += 1
                self._answer(count)
        os.close(read)


def end_at_once() -> None:
    """Ends the program after Ctrl-C, without waiting for anything."""
    print("Interrupted.", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(INTERRUPTED)


class StopSignal:
    """Notes SIGTERM and SIGINT while it is entered, so that the loop can stop between steps.

    The first SIGINT (Ctrl-C) is answered at once with `message`, a second one ends the program.
    """

    message = "Stopping after this step and saving; press Ctrl-C again to stop at once."

    def __init__(self):
        self._received = threading.Event()
        self._previous = {}
        self._watch = InterruptWatch(self._answer)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        self._watch.__enter__()
        return self

    def __exit__(self, *exception):
        self._watch.__exit__(*exception)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        self._received.set()

    def _answer(self, count: int) -> None:
        if count > 1:
            end_at_once()
        print(f"\n{self.message}", file=sys.stderr, flush=True)

    @property
    def received(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received.is_set()
