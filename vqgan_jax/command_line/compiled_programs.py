"""Compiled programs are kept between runs: the next start of a command reads them from disk.

JAX's persistent compilation cache does the work; here is where it lies. There is a folder for each
version of JAX and each kind of processor, since a program is compiled for the instructions of the
machine and would end with an illegal instruction on another. `VQGAN_JAX_CACHE` names another folder
or, as "off", keeps nothing; where `JAX_COMPILATION_CACHE_DIR` is set, JAX is left to it.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, MutableMapping

VARIABLE = "VQGAN_JAX_CACHE"
MAX_BYTES = 2 * 2**30  # of a folder; what was not used for longest goes
UNUSED_DAYS = 60  # after which the folder of another version goes
MIN_COMPILE_SECONDS = "0.1"  # reading a smaller program takes as long as compiling it


def keep_compiled_programs(environment: MutableMapping[str, str]) -> pathlib.Path | None:
    """Sets the variables of JAX's cache, before JAX is imported.

    Args:
        environment: `os.environ`.

    Returns:
        The folder; None where nothing is kept: switched off, set by the user, or not writable.
    """
    root = cache_root(environment)
    if root is None or "JAX_COMPILATION_CACHE_DIR" in environment:
        return None
    folder = root / folder_name()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        os.utime(folder)
    except OSError:
        return None
    _remove_unused(root)
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", MIN_COMPILE_SECONDS)
    # A full disk, a damaged entry, a lock held by a process that was killed: it is compiled again.
    for words in ("Error (reading|writing) persistent compilation cache", ".*cache.*[Ll]ock"):
        warnings.filterwarnings("ignore", words)
    return folder


def cache_root(environment: MutableMapping[str, str]) -> pathlib.Path | None:
    """The folder of all versions; None where it is switched off or there is no home."""
    chosen = environment.get(VARIABLE, "")
    if chosen.lower() in ("off", "0", "no", "false"):
        return None
    if chosen:
        return pathlib.Path(chosen)
    base = environment.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):
        return pathlib.Path(base) / "vqgan_jax" / "programs"
    with contextlib.suppress(RuntimeError):  # no home directory
        return pathlib.Path.home() / ".cache" / "vqgan_jax" / "programs"
    return None


def folder_name() -> str:
    """Of this version of JAX on this kind of processor."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
    text = "\n".join([*versions, platform.system(), platform.machine(), *sorted(_processor())])
    return f"jax-{versions[0]}-{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _processor() -> Iterator[str]:
    """The model and the instruction sets, as Linux names them, of the first core."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        yield platform.processor()
        return
    for line in text.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "flags", "Features", "CPU implementer", "CPU part"):
            yield f"{name.strip()}={value.strip()}"


def _remove_unused(root: pathlib.Path) -> None:
    """Folders of other versions that no command has used for long."""
    with contextlib.suppress(OSError):
        for folder in root.glob("jax-*"):
            if time.time() - folder.stat().st_mtime > UNUSED_DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)
