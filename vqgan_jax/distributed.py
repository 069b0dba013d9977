"""Runs of several processes: how they are found, join, wait for each other and end together.

A command calls `define_flags` beside its other flags and `join` before anything of JAX; a process
that is alone goes on at once. `command_line.run` calls `leave` at the end.
"""

import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping

from absl import flags

from vqgan_jax.configuration import ConfigError
from vqgan_jax.peers import START_AGAIN, HostError, Peers, meet, split_address
from vqgan_jax.relay import Relay

# Each by a flag, or by the environment variable that follows.
COORDINATOR = ("coordinator_address", "JAX_COORDINATOR_ADDRESS")
COUNT = ("num_processes", "JAX_NUM_PROCESSES")
INDEX = ("process_id", "JAX_PROCESS_ID")
JOIN_TIMEOUT = ("join_timeout", "VQGAN_JAX_JOIN_TIMEOUT")
DEFAULT_TIMEOUT = 300.0
_ADDRESS_OF_OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"  # where the first process is
NO_TIMEOUT = 7 * 24 * 3600.0  # for work of unequal length: a process that dies is noticed anyway

flags.disclaim_key_flags()  # a command's --help shows those of `define_flags` as its own

_peers: Peers | None = None  # of this process, once it has joined
_timeout = DEFAULT_TIMEOUT
_barriers: dict[str, int] = {}  # how often each was passed


@dataclasses.dataclass(frozen=True)
class Processes:
    """What a process has to know to join the others.

    Attributes:
        coordinator: "host:port" of process 0.
        count: how many processes there are, two or more.
        index: which one this is.
        local_devices: the accelerators of its machine that are this process's; None for all.
        hosts: host names by index, of those that the environment tells.
    """

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None
    hosts: Mapping[int, str] = dataclasses.field(default_factory=dict)


def define_flags() -> None:
    """The flags of every command that can run as several processes."""
    flags.DEFINE_string(
        COORDINATOR[0],
        None,
        f"host:port of the first of several processes, or {COORDINATOR[1]}. It and the next two "
        "are found by themselves on TPU pods, under SLURM, Kubernetes and Open MPI.",
    )
    flags.DEFINE_integer(COUNT[0], None, f"How many processes there are, or {COUNT[1]}.")
    flags.DEFINE_integer(INDEX[0], None, f"Which one this is, from 0 on, or {INDEX[1]}.")
    flags.DEFINE_float(
        JOIN_TIMEOUT[0],
        None,
        f"Seconds that processes wait for each other, {DEFAULT_TIMEOUT:g} by default, or "
        f"{JOIN_TIMEOUT[1]}.",
    )


# ---- Which processes there are.


def find_processes(given: Mapping[str, object], environment: Mapping[str, str]) -> Processes | None:
    """The processes of this run; None where this one is alone.

    Args:
        given: values of the flags of `define_flags`, those that are not None.
        environment: variables, `os.environ`. What is neither here nor given is asked of JAX's own
            detection of clusters, which looks into `os.environ` itself.

    Raises:
        ConfigError: what is given is incomplete or contradicts itself.
    """
    address = given.get(COORDINATOR[0], environment.get(COORDINATOR[1]))
    count, index = (_whole(names, given, environment) for names in (COUNT, INDEX))
    if count == 1 and not index:
        return None
    cluster = None
    if None in (address, count, index):
        cluster = _cluster(environment)
    if cluster is not None:
        count = cluster.get_process_count() if count is None else count
        index = cluster.get_process_id() if index is None else index
        if count == 1 and index == 0 and address is None:
            return None
        if address is None:
            address = cluster.get_coordinator_address(
                timeout_secs=int(join_timeout(given, environment)),
                override_coordinator_port=environment.get("JAX_COORDINATOR_PORT"),
            )
    else:
        if count is None and "OMPI_COMM_WORLD_SIZE" in environment:  # without its contact address
            count = int(environment["OMPI_COMM_WORLD_SIZE"])
            index = int(environment["OMPI_COMM_WORLD_RANK"]) if index is None else index
            if count == 1:
                return None
        found = {COORDINATOR: address, COUNT: count, INDEX: index}
        if all(value is None for value in found.values()):
            return None
        missing = [names for names, value in found.items() if value is None]
        if missing:
            raise ConfigError(
                f"Several processes need {_names(COORDINATOR)}, {_names(COUNT)} and "
                f"{_names(INDEX)}; missing: {', '.join(_names(names) for names in missing)}."
            )
    if count < 1 or not 0 <= index < count:
        raise ConfigError(
            f"{_names(INDEX)} is {index} and {_names(COUNT)} is {count}; processes count from 0 to "
            f"{max(count, 1) - 1}."
        )
    try:
        split_address(address)
    except ValueError:
        raise ConfigError(
            f"{_names(COORDINATOR)} is {address!r}; it must be HOST:PORT of process 0."
        ) from None
    local = None if cluster is None else _local_devices(cluster)
    return Processes(address, count, index, local, _hosts(environment, count))


def _names(names: tuple[str, str]) -> str:
    return f"--{names[0]} (or {names[1]})"


def _whole(names: tuple[str, str], given: Mapping, environment: Mapping[str, str]) -> int | None:
    if given.get(names[0]) is not None:
        return given[names[0]]
    text = environment.get(names[1])
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{names[1]} is {text!r}; it must be a whole number.") from None


def join_timeout(given: Mapping[str, object], environment: Mapping[str, str]) -> float:
    """Seconds that processes wait for each other.

    Raises:
        ConfigError: it is no number above 0.
    """
    text = given.get(JOIN_TIMEOUT[0], environment.get(JOIN_TIMEOUT[1], DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= NO_TIMEOUT:
        raise ConfigError(f"{_names(JOIN_TIMEOUT)} is {text}; it must be seconds above 0.")
    return seconds


def _cluster(environment: Mapping[str, str]):
    """JAX's description of the cluster that this process is in; None outside of one.

    Asks nobody over the network where a process is alone: of Kubernetes, only jobs whose processes
    have an index count.
    """
    from jax._src.clusters import ClusterEnv, K8sCluster, OmpiCluster

    for cluster in ClusterEnv._cluster_types:  # as JAX itself goes through them
        if cluster.opt_in_only_method:
            continue
        if (
            cluster is OmpiCluster
            and _ADDRESS_OF_OPEN_MPI_4 not in environment
            and not _is_installed("mpi4py")
        ):
            continue  # later versions tell count and index alone
        if cluster is K8sCluster:
            if "JOB_COMPLETION_INDEX" not in environment:
                continue
            if not _is_installed("kubernetes"):
                raise ConfigError(
                    "This process is one of a Kubernetes job, and the package kubernetes, which "
                    "finds the others, is not installed: run `pip install kubernetes`, or give "
                    f"{_names(COORDINATOR)} and {_names(COUNT)} and {_names(INDEX)}; "
                    f"--{COUNT[0]}=1 for a process that works alone."
                )
        if cluster.is_env_present():
            return cluster
    return None


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _local_devices(cluster) -> tuple[int, ...] | None:
    """One device each, where a cluster starts a process for every device; as JAX decides it."""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    local = None if running_in_cloud_tpu_vm else cluster.get_local_process_id()
    return None if local is None else (local,)


def _hosts(environment: Mapping[str, str], count: int) -> dict[int, str]:
    """Host names by index where there is a list of them, one for each process."""
    names = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return dict(enumerate(names)) if len(names) == count else {}


# ---- Joining, waiting, leaving.


def join() -> None:
    """Joins the other processes of the run, if there are any; before anything else of JAX.

    Raises:
        ConfigError: the flags or variables are incomplete or contradict each other.
        HostError: a process did not come in time.
    """
    global _peers, _timeout
    names = (COORDINATOR[0], COUNT[0], INDEX[0], JOIN_TIMEOUT[0])
    given = {name: flags.FLAGS[name].value for name in names if name in flags.FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    _timeout = join_timeout(given, os.environ)
    processes = find_processes(given, os.environ)
    if processes is None:
        return
    import jax

    port = split_address(processes.coordinator)[1]
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{port}")
    index = processes.index
    _peers = meet(
        processes.coordinator, bind, index, processes.count, _timeout, dict(processes.hosts)
    )
    address = processes.coordinator if index == 0 else Relay(processes.coordinator).address
    jax.distributed.initialize(
        address,
        processes.count,
        index,
        local_device_ids=processes.local_devices,
        cluster_detection_method="deactivate",  # it has been asked
        initialization_timeout=int(_timeout) + 1,
        coordinator_bind_address=bind,
        shutdown_timeout_seconds=int(NO_TIMEOUT),  # the first may write for long what all have made
    )


def is_alone() -> bool:
    """Whether this process has joined no other."""
    return _peers is None


def advise(text: Callable[[], str]) -> None:
    """Sets how the work goes on where a process is lost: `text()` ends the line that says so."""
    if _peers is not None:
        _peers.advice = text


def barrier(name: str, timeout: float | None = None) -> None:
    """Returns when all processes have come here.

    Args:
        name: says at what, in messages; the same in all processes.
        timeout: seconds; None for those of `join`.

    Raises:
        HostError: not all came in time.
    """
    from jax._src.distributed import global_state as state

    client, seconds = state.client, _timeout if timeout is None else timeout
    if client is None:  # alone
        return
    _barriers[name] = number = _barriers.get(name, 0) + 1
    place = f"vqgan_jax/barrier/{name}/{number}"
    client.key_value_set(f"{place}/{state.process_id}", "")
    start = time.monotonic()
    try:
        client.wait_at_barrier(place, int(1000 * seconds))
    except Exception as error:  # the kind of error differs between versions
        if time.monotonic() - start < 0.9 * seconds:
            raise
        came = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(place)}
        missing = [_name(index) for index in range(state.num_processes) if index not in came]
        raise HostError(
            f"{', '.join(missing) or 'a process'} did not come to {name!r} within {seconds:g} s; "
            "see the output there, and start the same command again on all hosts."
        ) from error


def _name(index: int) -> str:
    return f"process {index}" if _peers is None else _peers.name(index)


def wait_for_loss(seconds: float) -> None:
    """Waits whether an error is the consequence of another process's end, which ends this one."""
    if _peers is not None:
        _peers.wait_for_loss(seconds)


def leave(code: int = 0, reason: str = "") -> None:
    """Tells the other processes that this one ends with an exit code, and why.

    With an error it ends here: at the usual end of a program it would wait for all others, which
    may wait for it. The caller has printed the reason. All processes stop together with
    `START_AGAIN`, so these do wait for each other.
    """
    if _peers is None:
        return
    _peers.leave(code, reason)
    if code not in (0, START_AGAIN):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
