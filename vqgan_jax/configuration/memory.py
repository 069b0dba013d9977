"""What a job needs of memory at least, compared with what there is, before anything compiles."""

import os

from vqgan_jax.configuration.common import ConfigError


def available_bytes() -> int | None:
    """Memory of one device, on a CPU that of the machine; None where it cannot be told."""
    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Raises `ConfigError` where a lower bound of what is needed is more than there is.

    Args:
        needed: bytes on one device, without which it cannot work.
        what: what needs them, the beginning of a sentence.
        remedy: what to change, a clause.
    """
    available = available_bytes()
    if available is not None and needed > available:
        raise ConfigError(
            f"{what} needs {needed / 2**30:,.1f} GiB or more, and there are "
            f"{available / 2**30:,.1f} GiB; {remedy}."
        )
