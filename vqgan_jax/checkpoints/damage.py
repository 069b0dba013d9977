"""Damaged files are set aside with a line, never deleted and never used."""

import logging
import os
import pathlib


def set_aside(
    path: pathlib.Path, why: str, instead: str, folder: pathlib.Path | None = None
) -> None:
    """Renames a file or directory to `NAME.damaged`, or `NAME.damaged-2` and so on, and says so.

    Args:
      path: what is damaged.
      why: what is wrong with it.
      instead: what is done without it, a clause.
      folder: one around it in which nothing else may stand; it is moved beside that, and is called
        `FOLDER.NAME.damaged`.
    """
    damaged = path.with_name(f"{path.name}.damaged")
    if folder is not None:
        damaged = folder.with_name(f"{folder.name}.{damaged.name}")
    target, number = damaged, 1
    while os.path.lexists(target):
        number += 1
        target = damaged.with_name(f"{damaged.name}-{number}")
    path.rename(target)
    logging.warning(
        "%s is damaged (%s); it is renamed to %s, and %s.", path, why, target.name, instead
    )
