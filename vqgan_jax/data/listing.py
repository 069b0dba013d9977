"""The files below a folder: each real folder once, regular files only."""

import collections
import dataclasses
import os
from collections.abc import Sequence

from vqgan_jax.errors import DataError

# What archives, file systems and viewers leave behind; hidden files and folders count as such too.
JUNK = frozenset(("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"))
NO_REGULAR_FILE = "no regular file"


@dataclasses.dataclass
class FolderFiles:
    """What is below a folder.

    Attributes:
      files: path and name of each regular file with one of the suffixes.
      folders: paths of the folders, without the one that was asked for.
      others: number of other files by (folder, suffix in lower case); "no regular file" stands for
        the suffix of pipes, sockets, devices and links to nothing.
      junk: paths of folders that systems leave behind.
      notes: a line for each link that leads to a folder which is listed already.
    """

    files: list[str] = dataclasses.field(default_factory=list)
    folders: list[str] = dataclasses.field(default_factory=list)
    others: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    junk: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def list_files(root: str | os.PathLike, suffixes: Sequence[str]) -> FolderFiles:
    """The files below a folder with some suffixes, in the order of their paths.

    Links to folders are followed, but each real folder is listed once: where it lies below `root`,
    else at the first of the links to it. So circles end, and no file is in two splits.

    Raises:
      DataError: a folder cannot be read.
    """
    found, suffixes = FolderFiles(), tuple(suffixes)
    root = os.fspath(root)
    seen = {_identity(root)}
    _list_real(root, suffixes, found, seen, links := [])
    while links:
        path = links.pop(0)
        identity = _identity(path)
        if identity in seen:
            found.notes.append(f"{path} is left out: its files are listed where it links to.")
            continue
        seen.add(identity)
        found.folders.append(path)
        _list_real(path, suffixes, found, seen, more := [])
        links += more
    found.files.sort()
    found.folders.sort()
    return found


def _list_real(
    root: str, suffixes: tuple[str, ...], found: FolderFiles, seen: set, links: list[str]
) -> None:
    """Lists a folder and the real folders below it; links to folders are left to the caller."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        own_links = []
        for entry in _entries(folder):
            name = entry.name
            if name.startswith("."):
                continue
            kind = _kind(entry)
            if kind == "folder" and name in JUNK:
                found.junk.append(entry.path)
            elif kind == "folder" and entry.is_symlink():
                own_links.append(entry.path)
            elif kind == "folder":
                identity = _identity(entry.path)
                if identity not in seen:  # else a mount of a folder that is listed
                    seen.add(identity)
                    found.folders.append(entry.path)
                    waiting.append(entry.path)
            elif kind == "file" and name.lower().endswith(suffixes):
                found.files.append(entry.path)
            else:
                suffix = os.path.splitext(name)[1].lower() if kind == "file" else NO_REGULAR_FILE
                found.others[folder, suffix] += 1
        links += sorted(own_links)


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be read: {error.strerror}.") from error


def _kind(entry: os.DirEntry) -> str:
    """ "file", "folder" or "other"; links are what they lead to."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else "other"
    except OSError:  # a link to itself
        return "other"


def _identity(path: str) -> tuple[int, int]:
    """What a real folder is known by, whatever path leads to it."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"The folder {path} cannot be read: {error.strerror}.") from error
    return status.st_dev, status.st_ino
