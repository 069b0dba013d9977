"""The small files of a run's directory: read where they are good, set aside where they are not.

A resume needs its checkpoints alone; what else is damaged is renamed with a line and made again.
"""

import json
import logging
import os
import pathlib
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from vqgan_jax import configuration, distributed
from vqgan_jax.checkpoints.damage import set_aside
from vqgan_jax.configuration import documents
from vqgan_jax.errors import DataError
from vqgan_jax.training.checkpoints import CHECKPOINTS, CONFIG_FILE, all_steps
from vqgan_jax.training.goodput import GOODPUT_FILE
from vqgan_jax.training.logging import IMAGES, METRICS_FILE, TENSORBOARD, WANDB_FILE

EVALUATION_FILE = "evaluation.json"  # the newest evaluation's figures
_FILES = (CONFIG_FILE, EVALUATION_FILE, GOODPUT_FILE, METRICS_FILE, WANDB_FILE)
_FOLDERS = (CHECKPOINTS, IMAGES, TENSORBOARD)


def set_aside_others(workdir: pathlib.Path) -> None:
    """Sets aside files where folders belong, and folders, pipes and links to nothing for files."""
    if jax.process_index() == 0:
        for name in (*_FILES, *_FOLDERS):
            path = workdir / name
            if not os.path.lexists(path):
                continue
            if name in _FOLDERS and not path.is_dir():
                set_aside(path, "it is no folder", "another is made")
            if name in _FILES and not path.is_file():
                set_aside(path, "it is no file", "another is made")
    distributed.barrier("run files")


def stored_config(workdir: pathlib.Path) -> ConfigDict | None:
    """The config that the run in `workdir` was begun with; None where it has no checkpoint.

    Of `config.json`, or where that is damaged or missing of the newest checkpoint that has one.
    """
    steps = all_steps(workdir)
    if not steps:
        return None
    file = workdir / CONFIG_FILE
    others = [workdir / CHECKPOINTS / str(step) / "config" / "metadata" for step in steps[::-1]]
    found = None
    for path in (file, *others):
        try:
            found = configuration.from_json(documents.read_bytes(path))
            configuration.validate_stored(found)
            break
        except (configuration.ConfigError, DataError) as error:
            if path == file and path.exists() and jax.process_index() == 0:
                set_aside(file, str(error).rstrip("."), "it is written again")
    return found


def with_stored_rules(config: ConfigDict, stored: ConfigDict | None) -> ConfigDict:
    """The config with the rules for folders of the config that its run was begun with, if any."""
    if stored is None:
        return config
    config = config.copy_and_resolve_references()
    config.data.folder_rules = stored.data.folder_rules
    return config


def changed_keys(config: ConfigDict, stored: ConfigDict) -> list[str]:
    """ "KEY OLD -> NEW" of each key whose value is another than in the stored config."""
    ours, theirs = (dict(_flat(json.loads(configuration.to_json(c)))) for c in (config, stored))
    return [
        f"{key} {json.dumps(theirs[key])} -> {json.dumps(value)}"
        for key, value in ours.items()
        if key in theirs and theirs[key] != value
    ]


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_figures(file: pathlib.Path) -> dict[str, float]:
    """The figures of an evaluation; raises `ValueError` or `RecursionError` for anything else."""
    content = json.loads(documents.read_bytes(file))  # figures may be infinite
    figures = documents.convert(content, dict[str, float])
    if not figures:
        raise ValueError("it has no figures")
    return figures


def stored_figures(file: pathlib.Path) -> dict[str, float] | None:
    """The figures of the newest evaluation; None where they cannot be read, and are set aside."""
    try:
        return read_figures(file)
    except (ValueError, RecursionError) as error:
        if jax.process_index() == 0:
            set_aside(file, documents.first_line(error), "the evaluation is made again")
        return None


def warn_of_lost_lines(workdir: pathlib.Path, last_step: int, start: int, log_every: int) -> None:
    """Says where `metrics.jsonl` lacks the lines of steps before `start`, as after damage."""
    expected = start // log_every * log_every
    if last_step < expected:
        logging.warning(
            "%s has nothing of the steps %d to %d: those lines are lost, the run is not.",
            workdir / METRICS_FILE,
            last_step + 1,
            expected,
        )
