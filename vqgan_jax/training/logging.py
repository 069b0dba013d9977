"""The way of metrics from the device to people: fetched late, checked, written to disk.

`DeferredMetrics` brings them to the host without the device waiting, `check_finite` stops a run
that has diverged, and `MetricWriter` keeps them as JSON lines, TensorBoard events and, where a
project is named, in Weights & Biases.
"""

import importlib
import json
import math
import os
import pathlib
import re
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from vqgan_jax.checkpoints.damage import set_aside
from vqgan_jax.checkpoints.writing import naming
from vqgan_jax.configuration import ConfigError
from vqgan_jax.training.tensorboard import EventFile

METRICS_FILE, WANDB_FILE = "metrics.jsonl", "wandb_id.txt"
TENSORBOARD, IMAGES = "tensorboard", "images"


class NonFiniteError(ValueError):
    """A metric is infinite or not a number; the message names it and says what to try."""


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Raises `NonFiniteError` if any metric of the step is infinite or not a number."""
    bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(
            f"Step {step}: {', '.join(bad)}. The run stops here and its checkpoints stay as they "
            "are. Go on from the last of them with a lower config.optimizer.learning_rate, a later "
            "config.discriminator.start, config.optimizer.clip_norm=1.0 or "
            "config.model.dtype=float32."
        )


class DeferredMetrics:
    """Fetches metrics one step late, so that the device never waits for the host.

    To fetch the metrics of the step that was just dispatched, the host would have to wait until
    the device is done with it, and the device would then stand idle until the next dispatch.
    """

    def __init__(self) -> None:
        self._pending: tuple[int, Any] | None = None

    def push(self, step: int, metrics: Any) -> tuple[int, dict[str, float]] | None:
        """Takes a step's metrics and returns those of the step before.

        Args:
            step: the step that the metrics belong to.
            metrics: pytree of scalars, on the device or not. Nested names are joined by "/".

        Returns:
            (step, metrics by name) of the last call, or None on the first. Bfloat16 and float32
            values are exact. The step has been computed when the call returns, so times taken
            after it are times of finished work.
        """
        for leaf in jax.tree.leaves(metrics):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        previous = self.flush()
        self._pending = (step, metrics)
        return previous

    def flush(self) -> tuple[int, dict[str, float]] | None:
        """What the next `push` would return: before an evaluation, a checkpoint and the end."""
        if self._pending is None:
            return None
        step, metrics = self._pending
        self._pending = None
        leaves = jax.tree_util.tree_flatten_with_path(metrics)[0]
        return step, {
            jax.tree_util.keystr(path, simple=True, separator="/"): float(np.asarray(leaf))
            for path, leaf in leaves
        }


class MetricWriter:
    """Writes metrics and pictures of a run, on process 0; the other processes write nothing.

    - `workdir/metrics.jsonl`: an object a write, {"step": 100, "loss": 0.25}. Floats have all the
      digits they need to be read back bit for bit; infinities and NaN stand as the strings
      "Infinity", "-Infinity" and "NaN", which JSON has no numbers for and `float` reads.
    - `workdir/tensorboard`: events for TensorBoard.
    - `workdir/images`: pictures as PNG.
    - Weights & Biases, if a project is named.

    Args:
        workdir: directory of the run; made if missing.
        wandb_project: Weights & Biases project; empty for none.
        config_json: the run's config as JSON, shown in TensorBoard and Weights & Biases.
        resume_step: the step a resumed run goes on from. What was written for later steps is
            dropped, as it will be computed again. None for a new run: nothing is dropped.

    Attributes:
        last_step: the newest that `metrics.jsonl` has a line of; 0 without one.

    Raises:
        ConfigError: a project is named and the package `wandb` is not installed.
        OSError: here and in all methods: a file cannot be written; with its name.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        wandb_project: str = "",
        config_json: str = "",
        resume_step: int | None = None,
    ) -> None:
        self._is_writer, self.last_step = jax.process_index() == 0, 0
        if not self._is_writer:
            return
        self._wandb = _import_wandb(wandb_project) if wandb_project else None
        self._workdir = pathlib.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._path = self._workdir / METRICS_FILE
        with naming(self._path):
            self.last_step = _drop_lines_after(self._path, resume_step)
            self._jsonl = self._path.open("a", encoding="utf-8")
        self._tensorboard = EventFile(
            # Events of resume_step itself are kept.
            self._workdir / TENSORBOARD,
            None if resume_step is None else resume_step + 1,
        )
        if config_json and not resume_step:
            self._tensorboard.text(0, "config", f"```json\n{config_json}\n```")
        if self._wandb is not None:
            self._wandb_run = self._start_wandb(wandb_project, config_json, resume_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line and one event a metric; a killed process loses no line."""
        if not self._is_writer:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": step} | {name: _json_number(value) for name, value in values.items()}
        with naming(self._path):
            self._jsonl.write(json.dumps(line, allow_nan=False) + "\n")
            self._jsonl.flush()
        self._tensorboard.scalars(step, values)
        if self._wandb is not None:
            self._wandb_run.log({"step": step, **values})

    def write_images(self, step: int, name: str, picture: np.ndarray) -> pathlib.Path | None:
        """Writes a picture as `images/{name}_{step:08d}.png`, its path, and to TensorBoard.

        Args:
            step: the step it belongs to.
            name: what it shows; "/" in it makes a folder.
            picture: (H, W, 3) uint8.
        """
        if not self._is_writer:
            return None
        path = self._workdir / IMAGES / f"{name}_{step:08d}.png"
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
        self._tensorboard.image(step, name, picture)
        if self._wandb is not None:
            self._wandb_run.log({"step": step, name: self._wandb.Image(picture)})
        return path

    def close(self) -> None:
        """Finishes all files; the writer takes nothing more."""
        if not self._is_writer:
            return
        with naming(self._path):
            self._jsonl.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb_run.finish()

    def _start_wandb(self, project: str, config_json: str, resume_step: int | None) -> Any:
        """Starts a Weights & Biases run, or goes on with the one that the directory remembers."""
        id_path = self._workdir / WANDB_FILE
        run = self._wandb.init(
            project=project,
            name=self._workdir.resolve().name,
            dir=self._workdir,
            id=None if resume_step is None else _stored_id(id_path),
            resume="allow",
            config=json.loads(config_json) if config_json else None,
        )
        # Its own step count never goes back, as a resumed run does: ours is a metric like others.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        id_path.write_text(run.id + "\n")
        return run


def _json_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _stored_id(path: pathlib.Path) -> str | None:
    """The Weights & Biases run that a directory remembers, if any."""
    if not path.exists():
        return None
    text = path.read_bytes()[:1000].decode("ascii", "replace").strip()
    if re.fullmatch(r"[A-Za-z0-9_-]{1,128}", text):
        return text
    set_aside(path, "it holds no run's name", "a new run is begun in Weights & Biases")
    return None


def _drop_lines_after(path: pathlib.Path, step: int | None) -> int:
    """Rewrites a JSON-lines file without later steps (None: with all) and without half a line.

    A file with other lines that are not what `MetricWriter` writes is set aside whole, and its good
    lines are kept.

    Returns:
        The newest step that is kept; 0 without one.
    """
    if not path.exists():
        return 0
    limit = math.inf if step is None else step
    content = path.read_bytes()
    lines = content.split(b"\n")
    kept, why, last_step = [], "", 0
    for number, line in enumerate(lines, 1):
        found = _step_of(line)
        # No newline ends the last line: it is empty, or a write that was cut off.
        if found is None and not (number == len(lines) and line[:1] in (b"", b"{")):
            why = why or f"line {number} is no JSON object with a step"
        elif found is not None and found <= limit:
            kept.append(line + b"\n")
            last_step = max(last_step, found)
    if b"".join(kept) == content:
        return last_step
    if why:
        set_aside(path, why, "its other lines are kept")
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return last_step


def _step_of(line: bytes) -> int | None:
    """The step of a line of `metrics.jsonl`; None where it is no such line."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _import_wandb(project: str) -> types.ModuleType:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ConfigError(
            f"config.training.wandb_project is {project!r} and the package wandb is not installed; "
            'run `pip install "vqgan_jax[wandb]"` or leave the project empty.'
        ) from None
