"""A file of TensorBoard events, written by the caller's own thread.

`tensorboardX.SummaryWriter` writes in a thread that a full disk ends with a traceback, after which
the next event waits for ever.
"""

import os
import pathlib
import time
from collections.abc import Mapping

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from vqgan_jax.checkpoints.writing import naming

_FLUSH_SECONDS = 10.0


class EventFile:
    """One start's events of a run.

    Args:
        directory: of the events of all starts; made if missing.
        purge_step: events of other files from this step on are hidden; None hides nothing.

    Raises:
        OSError: here and in all methods, with the directory's name: it cannot be written.
    """

    def __init__(self, directory: pathlib.Path, purge_step: int | None = None) -> None:
        self._directory = directory
        with naming(directory):
            directory.mkdir(parents=True, exist_ok=True)
            # Names have whole seconds only: a quick restart would overwrite the file before it.
            suffix = f".{os.getpid()}.{time.time_ns()}"
            self._writer = EventsWriter(str(directory / "events"), suffix)
        self._flushed = 0.0
        if purge_step is not None:
            self._add(Event(step=purge_step, file_version="brain.Event:2"))
            start = SessionLog(status=SessionLog.START)
            self._add(Event(step=purge_step, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes an event for each value."""
        for name, value in values.items():
            self._add(Event(step=step, summary=summary.scalar(name, value)))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Writes a picture, `(H, W, 3)` uint8."""
        self._add(Event(step=step, summary=summary.image(name, picture, dataformats="HWC")))

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text in Markdown."""
        self._add(Event(step=step, summary=summary.text(name, text)))

    def close(self) -> None:
        """Writes what is left."""
        with naming(self._directory):
            self._writer.close()

    def _add(self, event: Event) -> None:
        event.wall_time = now = time.time()
        with naming(self._directory):
            self._writer.write_event(event)
            if now - self._flushed > _FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = now
