"""What a run, a checkpoint or an export is, for people: its model, how far it is, how good."""

import math
import pathlib
from typing import Any

from vqgan_jax.checkpoints.checksums import CHECKSUMS
from vqgan_jax.configuration import downsampling_factor
from vqgan_jax.training.checkpoints import (
    CHECKPOINTS,
    CONFIG_FILE,
    VARIABLES,
    all_steps,
    read_config,
    read_shapes,
)
from vqgan_jax.training.run_files import EVALUATION_FILE, read_figures


def kind_of(path: pathlib.Path) -> str | None:
    """ "run", "checkpoint" or "export"; None for anything else."""
    if (path / CONFIG_FILE).is_file() and (path / VARIABLES).is_dir():
        return "export"
    if (path / "state").is_dir() and (path / "config").is_dir():
        return "checkpoint"
    return "run" if (path / CHECKPOINTS).is_dir() else None


def describe_model(path: pathlib.Path) -> dict[str, Any]:
    """What is at `path`, without loading its weights.

    Returns:
      What `python -m vqgan_jax.describe --json` writes: `kind`, `path`, `stage`, `model`, the
      sizes of the network, `parameters`, `dataset`, and of a run `steps` of its checkpoints,
      `num_steps` and the last `evaluation`; of an export, whether it has `checksums`.

    Raises:
      CheckpointError: it is damaged.
    """
    kind = kind_of(path)
    report: dict[str, Any] = {"kind": kind, "path": str(path)}
    weights = path
    if kind == "run":
        report["steps"] = steps = all_steps(path)
        if not steps:
            return report
        weights = path / CHECKPOINTS / str(steps[-1])
    config = read_config(weights)
    report |= {"stage": config.stage, "model": _model(config), "dataset": config.data.name}
    report["parameters"] = sum(map(math.prod, read_shapes(weights).values()))
    if kind == "run":
        report["num_steps"] = config.training.num_steps
        report["evaluation"] = _evaluation(path / EVALUATION_FILE)
    if kind == "checkpoint" and path.name.isdecimal():
        report["step"] = int(path.name)
    if kind == "export":
        report["checksums"] = (path / CHECKSUMS).exists()
    return report


def _model(config) -> dict[str, Any]:
    model = config.model
    if config.stage == "tokenizer":
        return {
            "architecture": model.architecture,
            "factor": downsampling_factor(model),
            "resolution": model.resolution,
            "quantizer": model.quantizer.kind,
            "codebook_size": model.quantizer.codebook_size,
            "code_dim": model.quantizer.code_dim,
        }
    return {
        "layers": model.num_layers,
        "heads": model.num_heads,
        "width": model.width,
        "codebook_size": model.codebook_size,
        "grid": list(model.grid),
        "conditions": list(config.condition.kinds),
        "classes": list(config.condition.class_names),
    }


def _evaluation(file: pathlib.Path) -> dict[str, float] | None:
    try:
        return read_figures(file)
    except (ValueError, RecursionError):  # there is none, or a damaged one
        return None


def lines(report: dict[str, Any]) -> list[str]:
    """A report of `describe_model` as text."""
    if "stage" not in report:
        return [f"{report['path']}: a run without a checkpoint yet"]
    model = report["model"]
    if report["stage"] == "tokenizer":
        what = (
            f"tokenizer f{model['factor']} ({model['architecture']}), {model['codebook_size']} "
            f"codes of {model['code_dim']} dimensions ({model['quantizer']})"
        )
    else:
        grid = "x".join(map(str, model["grid"]))
        conditions = ", ".join(model["conditions"]) or "none"
        what = (
            f"transformer of {model['layers']} layers of width {model['width']} over {grid} of "
            f"{model['codebook_size']} codes; conditions: {conditions}"
        )
    found = [
        f"{report['path']}: a {report['kind']}",
        f"  model        {what}",
        f"  parameters   {report['parameters']:,}",
        f"  data set     {report['dataset']}",
    ]
    if "num_steps" in report:
        found.append(f"  checkpoints  of the steps {', '.join(map(str, report['steps']))}")
        found.append(f"  steps        {report['steps'][-1]} of {report['num_steps']}")
    if report.get("evaluation"):
        figures = ", ".join(f"{name} {value:.4g}" for name, value in report["evaluation"].items())
        found.append(f"  evaluation   {figures}")
    if "step" in report:
        found.append(f"  step         {report['step']}")
    if "checksums" in report:
        found.append(
            f"  checksums    {'yes' if report['checksums'] else 'none, of an older version'}"
        )
    return found
