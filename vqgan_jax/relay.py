"""What stands between JAX's client and a coordinator that may die."""

import contextlib
import socket
import threading
import time

from vqgan_jax.peers import LIVENESS_SECONDS, connect, split_address

_RETRY_SECONDS = 0.1
_CONNECT_SECONDS = 30.0  # the coordinator starts right after the processes have met


class Relay:
    """A port of this machine that leads to the coordinator's.

    JAX's client aborts its process at the moment when the coordinator closes a connection. Here
    the client's end stays open for `LIVENESS_SECONDS` more, in which `Peers` ends the process with
    a line that says why. Only what processes tell each other at the start, at checkpoints and as
    heartbeats goes this way; arrays do not.
    """

    def __init__(self, coordinator: str):
        """Of the coordinator at "host:port"; there until the process ends."""
        self._coordinator = split_address(coordinator)
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True, name="relay").start()

    @property
    def address(self) -> str:
        """For JAX's client."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        coordinator = self._connect()
        if coordinator is None:
            client.close()
            return
        for connection in (client, coordinator):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_pump, args=(client, coordinator, 0.0), daemon=True).start()
        _pump(coordinator, client, LIVENESS_SECONDS + 10.0)

    def _connect(self) -> socket.socket | None:
        end = time.monotonic() + _CONNECT_SECONDS
        while time.monotonic() < end:
            try:
                connection = connect(self._coordinator, _CONNECT_SECONDS)
                connection.settimeout(None)
                return connection
            except OSError:
                time.sleep(_RETRY_SECONDS)
        return None


def _pump(source: socket.socket, target: socket.socket, delay: float) -> None:
    """Copies until `source` ends; ends `target` so many seconds after."""
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    time.sleep(delay)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
