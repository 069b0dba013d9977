"""Connections between the processes of a run: who has not come, and who is gone.

JAX's own client ends its process from C++, with a stack trace and nothing that Python could catch,
when another process does not come or the first one dies. So the processes meet here before, and
stay connected: process 0 listens at the coordinator's address, and every other one connects to it.
A process that ends in any way closes its connection, and of a host that vanishes the kernel finds
out by TCP keep-alive, however busy Python is. What JAX's client sends goes through a `Relay`, which
does not tell it of a coordinator that is gone: that is said here, in one line.

Messages are lines of JSON.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable

START_AGAIN = 75  # EX_TEMPFAIL: what a launcher is to take as "start the same command again"
LIVENESS_SECONDS = 20  # without a sign of life of a host, until it counts as gone
# For a process to end by itself when another one has said that it ends, by exit code.
GRACE_SECONDS = {1: 10.0, START_AGAIN: 30.0}
_RETRY_SECONDS = 0.2
_LONGEST_LINE = 2**16


class HostError(RuntimeError):
    """Another process did not come, or is gone; the message says which.

    Attributes:
        code: the exit code that follows: 1 where the same start would run into it again.
    """

    def __init__(self, message: str, code: int = START_AGAIN):
        super().__init__(message)
        self.code = code


def _keep_alive(connection: socket.socket) -> None:
    """Lets the kernel watch a connection: dead after `LIVENESS_SECONDS` without an answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    interval = LIVENESS_SECONDS // 4
    for name, value in (
        ("TCP_KEEPIDLE", interval),
        ("TCP_KEEPINTVL", interval),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 1000 * LIVENESS_SECONDS),
        ("TCP_NODELAY", 1),
    ):
        if hasattr(socket, name):  # not all systems have all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Link:
    """A connection that carries messages."""

    def __init__(self, connection: socket.socket):
        self.connection, self._buffer = connection, b""
        _keep_alive(connection)

    def send(self, message: dict) -> None:
        """Sends one; a connection that is broken is noticed where it is read."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict]:
        """What has come: no message where the rest of it is still on its way.

        Raises:
            EOFError: the other end closed the connection, or sent something else.
            OSError: it is broken.
        """
        data = self.connection.recv(2**16)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            raise EOFError from None
        if not data or len(self._buffer) > _LONGEST_LINE:
            raise EOFError
        if not all(isinstance(message, dict) for message in messages):
            raise EOFError
        return messages


class Peers:
    """The other processes of a run, as far as this one talks to them.

    Attributes:
        index: of this process.
        hosts: the host name of each process.
        advice: what follows where a process was lost: how the work goes on.
    """

    def __init__(self, index: int, hosts: dict[int, str], links: dict[int, _Link]):
        """Watches `links`, by the index of the process at their other end, from now on."""
        self.index, self.hosts = index, hosts
        self.advice: Callable[[], str] = lambda: "the same command goes on from what is stored"
        self._links = links
        self._left: set[int] = set()  # they end, and have said so
        self._ending = threading.Event()
        self._last_words = threading.Lock()
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def name(self, index: int) -> str:
        """For people."""
        return f"process {index} (host {self.hosts.get(index, 'unknown')})"

    def leave(self, code: int = 0, reason: str = "") -> None:
        """Tells the others that this process ends, so that they do not take it for a failure.

        Args:
            code: its exit code. For all but 0 the others end too, unless they do by themselves
                within `GRACE_SECONDS`.
            reason: what they print then.
        """
        if code != 0:
            self._last_words.acquire()  # for good: the watcher has nothing to say any more
        self._tell({"left": self.index, "code": code, "reason": reason})

    def wait_for_loss(self, seconds: float) -> None:
        """Waits whether it turns out that another process is gone, which ends this one."""
        if self._ending.wait(seconds):
            time.sleep(max(GRACE_SECONDS.values()))  # the watcher ends the process within this

    def _tell(self, message: dict, but: int | None = None) -> None:
        for index, link in list(self._links.items()):
            if index != but:
                link.send(message)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, link in self._links.items():
                selector.register(link.connection, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    index = key.data
                    try:
                        for message in self._links[index].receive():
                            self._note(message, index)
                    except TimeoutError:
                        selector.unregister(key.fileobj)
                        self._lost(index, f"no sign of life for {LIVENESS_SECONDS} s")
                    except (OSError, EOFError):
                        selector.unregister(key.fileobj)
                        self._lost(index, "its connection was closed")

    def _note(self, message: dict, sender: int) -> None:
        """Takes in a message of the process `sender`, which may be about another."""
        if "lost" in message:
            self._lost(message["lost"], message["reason"])
            return
        index, code = message["left"], message["code"]
        self._left.add(index)
        if code != 0:
            if self.index == 0:
                self._tell(message, but=sender)
            self._ending.set()
            line = f"{self.name(index)} stopped: {message['reason']}"
            timer = threading.Timer(GRACE_SECONDS[code], self._end, (code, line))
            timer.daemon = True  # a process that ends earlier does not wait for it
            timer.start()

    def _lost(self, index: int, how: str) -> None:
        if index in self._left or self._ending.is_set():
            return
        self._ending.set()
        if self.index == 0:
            self._tell({"lost": index, "reason": how}, but=index)
        try:
            advice = self.advice()
        except OSError:  # as where the files were on the host that is gone
            advice = "start the same command again"
        self._end(
            START_AGAIN,
            f"{self.name(index)} is gone: {how}. This process stops too; {advice}.",
        )

    def _end(self, code: int, line: str) -> None:
        """Ends the process here and now: its main thread may wait for others for ever."""
        if self._last_words.acquire(blocking=False):
            sys.stdout.flush()
            print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(code)


# ---- The meeting at the start.


def host_name() -> str:
    """The name of this machine, as its shell shows it."""
    return socket.gethostname()


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[::1]:port"; `ValueError` for anything else."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(address)
    return host.strip("[]"), int(port)


def connect(address: tuple[str, int], timeout: float) -> socket.socket:
    """A connection to a host and port; `OSError` where nobody listens there."""
    connection = socket.create_connection(address, timeout=timeout)
    if connection.getsockname() == connection.getpeername():
        # Where nobody listens at a port of the own machine, TCP may have taken it for this end.
        connection.close()
        raise ConnectionRefusedError(f"nobody listens at {address}")
    return connection


def _listen(address: str) -> socket.socket:
    """A listening socket; of "[::]", on all addresses of this machine, of both kinds."""
    host, port = split_address(address)
    if host == "::" and not socket.has_dualstack_ipv6():
        host = "0.0.0.0"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::"
    return socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=both)


def meet(
    address: str,
    bind_address: str,
    index: int,
    count: int,
    timeout: float,
    expected_hosts: dict[int, str] | None = None,
) -> Peers:
    """Returns when all processes have come; every one of them calls it.

    Args:
        address: of process 0, "host:port".
        bind_address: where that listens, as "[::]:port".
        index: of this process.
        count: of processes.
        timeout: in seconds, for all to come.
        expected_hosts: host names of processes where the environment knows them, for messages.

    Raises:
        HostError: not all came in time, or they do not agree about how many they are.
    """
    if index == 0:
        try:
            listener = _listen(bind_address)
        except OSError as error:
            raise HostError(
                f"process 0 cannot listen at {bind_address}: {error.strerror}; choose another "
                "port, or end the program that has it.",
                code=1,
            ) from error
        with listener:
            return _receive_all(listener, count, timeout, expected_hosts or {})
    return _visit(address, index, count, timeout)


def _receive_all(
    listener: socket.socket, count: int, timeout: float, expected_hosts: dict[int, str]
) -> Peers:
    """The meeting as process 0 sees it."""
    deadline = time.monotonic() + timeout
    hosts, links = {0: host_name()}, {}

    def fail(reason: str, code: int):
        for link in links.values():
            link.send({"failed": reason, "code": code})
        raise HostError(reason, code)

    def greet(link: _Link) -> None:
        """Takes a process in; one that is not of this run is sent away."""
        message = link.receive()[0]
        index, others_count = message["index"], message["count"]
        if others_count != count:
            links[index] = link  # so that it is told
            fail(
                f"process {index} (host {message['host']}) was told that there are {others_count} "
                f"processes, and process 0 that there are {count}; give all the same number.",
                code=1,
            )
        if index in links or index == 0:
            reason = (
                f"there are two processes {index}, on {hosts[index]} and on {message['host']}; "
                "give each another index."
            )
            link.send({"failed": reason, "code": 1})
            fail(reason, code=1)
        hosts[index], links[index] = message["host"], link

    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        waiting = {}  # links by their connection: not greeted yet, or greeted and waiting
        while len(links) < count - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [index for index in range(1, count) if index not in links]
                fail(_did_not_come(missing, expected_hosts, timeout), START_AGAIN)
            for key, _ in selector.select(left):
                if key.fileobj is listener:
                    link = _Link(listener.accept()[0])
                    waiting[link.connection] = link
                    selector.register(link.connection, selectors.EVENT_READ)
                    continue
                link = waiting[key.fileobj]
                try:
                    greet(link)
                except (OSError, EOFError, LookupError):  # it went away, or is none of ours
                    selector.unregister(key.fileobj)
                    del waiting[key.fileobj]
                    link.connection.close()
                    for index in [i for i, other in links.items() if other is link]:
                        del links[index], hosts[index]
    for link in links.values():
        link.send({"hosts": hosts})
    return Peers(0, hosts, links)


def _did_not_come(missing: list[int], hosts: dict[int, str], timeout: float) -> str:
    """Which processes are missing, the first ten by name."""
    names = [f"{i} (host {hosts[i]})" if i in hosts else str(i) for i in missing[:10]]
    more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
    word = "process" if len(missing) == 1 else "processes"
    return (
        f"{word} {', '.join(names)}{more} did not come within {timeout:g} s; see the output there, "
        "and start the same command again on all hosts."
    )


def _visit(address: str, index: int, count: int, timeout: float) -> Peers:
    """The meeting as the other processes see it."""
    host, port = split_address(address)
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise HostError(
                f"process 0 (host {host}) did not come within {timeout:g} s: nobody of this run "
                f"answers at {address}; see the output there, and start the same command again on "
                "all hosts."
            )
        try:
            link = _Link(connect((host, port), left))
            link.send({"index": index, "count": count, "host": host_name()})
            # Process 0 counts from when it came, and says whom it did not see.
            link.connection.settimeout(timeout + LIVENESS_SECONDS)
            while not (messages := link.receive()):
                pass
        except (OSError, EOFError):  # not there yet, or gone again
            time.sleep(_RETRY_SECONDS)
            continue
        if "failed" in messages[0]:
            raise HostError(messages[0]["failed"], messages[0].get("code", START_AGAIN))
        link.connection.settimeout(None)
        hosts = {int(key): name for key, name in messages[0]["hosts"].items()}
        return Peers(index, hosts, {0: link})
