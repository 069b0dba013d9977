"""Stopping a run from outside without losing work."""

import signal
import threading


class Preempted(Exception):
    """The run was asked to stop and its state is saved; the same command goes on with it."""


class StopSignal:
    """Notes SIGTERM and SIGINT while it is entered, so that the loop can stop between steps.

    A second SIGINT (Ctrl-C) stops at once, as usual.
    """

    def __init__(self):
        self._received = threading.Event()
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        self._received.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def received(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received.is_set()
