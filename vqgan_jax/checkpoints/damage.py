"""Damaged files are set aside with a line, never deleted and never used."""

import logging
import os
import pathlib


def set_aside(path: pathlib.Path, why: str, instead: str) -> None:
    """Renames a file or directory to `NAME.damaged`, or `NAME.damaged-2` and so on, and says so.

    Args:
      path: what is damaged.
      why: what is wrong with it.
      instead: what is done without it, a clause.
    """
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(target)
    logging.warning(
        "%s is damaged (%s); it is renamed to %s, and %s.", path, why, target.name, instead
    )
