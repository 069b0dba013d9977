"""The device mesh and where arrays lie on it.

The batch is split over the axes "data" and "fsdp"; parameters are split over "fsdp" and "tensor"
as the config's rules say, and whole along the others; rows of pixels can be split over "spatial".
One CPU device, eight, two processes and a pod run the same code.
"""

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vqgan_jax.configuration import ConfigError
from vqgan_jax.configuration.common import MESH_AXES

AXES = MESH_AXES
BATCH_AXES = ("data", "fsdp")
BATCH = PartitionSpec(BATCH_AXES)


def mesh_shape(mesh: ConfigDict, num_devices: int) -> tuple[int, ...]:
    """The config's axis sizes, of which one may be -1 (the rest); `ConfigError` if they misfit."""
    sizes = [mesh[axis] for axis in AXES]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or min(known, *sizes) < -1 or 0 in sizes or num_devices % known:
        raise ConfigError(
            f"config.mesh {dict(zip(AXES, sizes, strict=True))} does not fit {num_devices} "
            "devices: at most one axis may be -1, and the others must divide the device count."
        )
    sizes = [num_devices // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != num_devices:
        raise ConfigError(
            f"config.mesh {dict(zip(AXES, sizes, strict=True))} uses {int(np.prod(sizes))} of "
            f"{num_devices} devices; set one axis to -1."
        )
    return tuple(sizes)


def make_mesh(mesh: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the config's axis sizes, one of which may be -1 (the rest)."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(mesh, len(devices))
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


def image_sharding(mesh: Mesh) -> NamedSharding:
    """Of images `(B, H, ...)` in a step: the batch, and where the mesh says so rows of pixels."""
    return NamedSharding(mesh, PartitionSpec(*BATCH, "spatial"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def path_name(path) -> str:
    """A tree path as in "generator/params/encoder/conv_in/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


Rule = tuple[str, Sequence | str]


def state_shardings(abstract_state, rules: Sequence[Rule], mesh: Mesh):
    """A sharding for each array of a state: the first rule whose regex is found in its path.

    A rule names a mesh axis (or None) for each dimension, aligned to the last one, so that one rule
    serves kernels of any rank; or one axis alone, which splits the largest dimension that it can.
    The path is as in "generator/params/encoder/conv_in/kernel"; the moments of Adam and the moving
    average carry it too. A dimension that the axis does not divide stays whole.
    """

    def sharding_of(path, leaf):
        name = path_name(path)
        for pattern, axes in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, _fit(axes, leaf.shape, mesh))
        return replicated(mesh)

    return jax.tree.map_with_path(sharding_of, abstract_state)


def _fit(axes: Sequence | str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if isinstance(axes, str):
        divisible = [i for i, size in enumerate(shape) if size % mesh.shape[axes] == 0]
        # Of equal ones the last; the first of stacked layers is their number.
        largest = max(divisible, key=lambda i: (shape[i], i), default=None)
        return PartitionSpec(*(axes if i == largest else None for i in range(len(shape))))
    axes = tuple(axes)[-len(shape) :] if shape else ()
    axes = (None,) * (len(shape) - len(axes)) + axes
    fitting = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]
    return PartitionSpec(*fitting)


def with_shardings(abstract, shardings):
    """A tree of shapes and types with where each array lies."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def sharding_table(state) -> str:
    """A line for each array of a state: its shape, type, mesh axes and bytes on a device.

    At the end their sums for each part of the state, such as "generator/params".

    Args:
        state: of `with_shardings`.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    lines, totals = [("array", "shape", "type", "split over", "bytes a device")], {}
    for path, leaf in flat:
        name, own = path_name(path), bytes_on_device(leaf)
        part = re.match(r"(generator/|discriminator/)?[^/]+", name)[0]
        whole = leaf.size * leaf.dtype.itemsize
        totals[part] = tuple(map(sum, zip(totals.get(part, (0, 0)), (own, whole), strict=True)))
        split = leaf.sharding.mesh.shape
        axes = [axis if split.get(axis, 1) > 1 else "-" for axis in leaf.sharding.spec]
        used = ", ".join(axes) if set(axes) - {"-"} else "-"
        lines.append((name, str(list(leaf.shape)), str(leaf.dtype), used, f"{own:,}"))
    everything = tuple(map(sum, zip(*totals.values(), strict=True)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(map(str.ljust, line, widths[:-1])) + f"  {line[-1]:>{widths[-1]}}"
        for line in lines
    ]
    for part, (own, whole) in [*totals.items(), ("all", everything)]:
        table.append(f"{part}: {own:,} bytes on a device of {whole:,}")
    return "\n".join(table)


def bytes_on_device(leaf: jax.ShapeDtypeStruct) -> int:
    """What one device holds of an array with a sharding."""
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
