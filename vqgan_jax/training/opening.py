"""What a run says before its first step: the model, the data, the devices and the steps."""

import math
import os
import pathlib
from collections.abc import Mapping

import jax
from ml_collections import ConfigDict

from vqgan_jax.configuration import downsampling_factor

_NVIDIA = pathlib.Path("/proc/driver/nvidia/version")


def num_parameters(params) -> int:
    """Of a tree of arrays or their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def model_line(config: ConfigDict, parameters: Mapping[str, int]) -> str:
    """What is trained.

    Args:
        config: the experiment.
        parameters: how many each network has, by name; the first is the model itself.
    """
    counts = [f"{_rounded(count)} parameters" for count in parameters.values()]
    counts[1:] = [
        f"{name} of {count}" for name, count in zip([*parameters][1:], counts[1:], strict=True)
    ]
    return f"model: {_name(config)}, {', '.join(counts)}"


def _name(config: ConfigDict) -> str:
    model = config.model
    if config.stage == "tokenizer":
        kind = "ViT-VQGAN" if model.architecture == "vit" else "VQGAN"
        codes = f"{model.quantizer.codebook_size:,} codes"
        return f"{kind} f{downsampling_factor(model)} at {model.resolution} pixels, {codes}"
    rows, columns = model.grid
    return (
        f"transformer of {model.num_layers} layers and width {model.width} over "
        f"{rows}x{columns} of {model.codebook_size:,} codes"
    )


def device_line(devices: list[jax.Device]) -> str:
    """The devices of all processes, with a hint where an accelerator is left unused."""
    kind = devices[0].device_kind if devices[0].platform != "cpu" else "CPU"
    count = f"{len(devices)} {kind} device{'s' if len(devices) > 1 else ''}"
    if devices[0].platform != "cpu":
        return f"devices: {count}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    line = f"devices: {count}, {cores} core{'s' if cores != 1 else ''}"
    if _NVIDIA.exists() and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        line += '; for the NVIDIA GPU that is here: pip install "vqgan_jax[cuda]"'
    return line


def data_line(name: str, counts: Mapping[str, int], classes: int) -> str:
    """How many images there are of each split."""
    parts = [f"{count:,} images of {split}" for split, count in counts.items()]
    of_classes = f", {classes:,} classes" if classes else ""
    return f"data: {name}: {', '.join(parts)}{of_classes}"


def steps_line(config: ConfigDict, start: int) -> str:
    """How many steps are to come."""
    training = config.training
    from_step = f", from step {start} on" if start else ""
    return f"steps: {training.num_steps:,} of {training.batch_size:,} images{from_step}"


def _rounded(count: int) -> str:
    if count < 1_000_000:
        return f"{count / 1000:.0f}k" if count >= 1000 else str(count)
    return f"{count / 1e6:.1f}M" if count < 1e9 else f"{count / 1e9:.2f}B"
