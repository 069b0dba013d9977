"""The device mesh and where arrays lie on it.

The batch is split over the axes "data" and "fsdp"; parameters are whole on every device except
where a rule of the config splits them. One CPU device, eight, two processes and a pod run the
same code.
"""

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vqgan_jax.configuration import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(mesh: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the config's axis sizes, one of which may be -1 (the rest)."""
    devices = jax.devices() if devices is None else devices
    sizes = [mesh[axis] for axis in AXES]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or len(devices) % known or min(known, *sizes) < -1 or 0 in sizes:
        raise ConfigError(
            f"config.mesh {dict(zip(AXES, sizes, strict=True))} does not fit {len(devices)} "
            "devices: at most one axis may be -1, and the others must divide the device count."
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"config.mesh {dict(zip(AXES, sizes, strict=True))} uses {int(np.prod(sizes))} of "
            f"{len(devices)} devices; set one axis to -1."
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh, batch_size: int, name: str = "config.training.batch_size"):
    """Rows of a batch over the data axes; `ConfigError` where they do not divide it."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ConfigError(
            f"{name} is {batch_size}, which {ways} data-parallel devices do not divide; "
            f"take {-(-batch_size // ways) * ways}."
        )
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def path_name(path) -> str:
    """A tree path as in "generator/params/encoder/conv_in/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_shardings(abstract_state, rules: Sequence[tuple[str, Sequence]], mesh: Mesh):
    """A sharding for each array of a state: the first rule whose regex is found in its path.

    A rule names a mesh axis (or None) for each dimension, aligned to the last one, so that one rule
    serves kernels of any rank. The path is as in "generator/params/encoder/conv_in/kernel"; the
    moments of Adam and the moving average carry it too. A dimension that the axis does not divide
    stays whole.
    """

    def sharding_of(path, leaf):
        name = path_name(path)
        for pattern, axes in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, _fit(axes, leaf.shape, mesh))
        return replicated(mesh)

    return jax.tree.map_with_path(sharding_of, abstract_state)


def _fit(axes: Sequence, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axes = tuple(axes)[-len(shape) :] if shape else ()
    axes = (None,) * (len(shape) - len(axes)) + axes
    fitting = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]
    return PartitionSpec(*fitting)
