"""TPU slices that are not here, as devices that programs can be compiled for."""

import contextlib
import dataclasses
import importlib.util
import os
import sys

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from vqgan_jax.configuration import ConfigError
from vqgan_jax.training.hardware import Chip, chip_of
from vqgan_jax.training.sharding import AXES, mesh_shape

EXAMPLES = "v5e:4x4, v5e:16x16, v5p:4x8x8, v6e:16x16"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPUs.

    Attributes:
        name: such as "v5e:16x16".
        devices: that can be compiled for and not run on.
        chip: what each of them can do.
    """

    name: str
    devices: list[jax.Device]
    chip: Chip

    @classmethod
    def named(cls, name: str) -> "Topology":
        """The slice of that name.

        Raises:
            ConfigError: there is none, or nothing that compiles for TPUs is installed.
        """
        devices = _devices(name)
        chip = chip_of(devices[0])
        if chip is None:
            raise ConfigError(
                f"The limits of a {devices[0].device_kind} are not known; add them to "
                "vqgan_jax/training/hardware.py."
            )
        return cls(name, devices, chip)

    def mesh(self, mesh: ConfigDict) -> Mesh:
        """The mesh that `make_mesh` would make of these devices."""
        sizes = mesh_shape(mesh, len(self.devices))
        try:
            placed = mesh_utils.create_device_mesh(sizes, self.devices)
        except (NotImplementedError, ValueError, AssertionError):  # no way along its links
            placed = np.array(self.devices).reshape(sizes)
        return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _devices(topology: str) -> list[jax.Device]:
    # The compiler otherwise looks for a machine's metadata, and logs that there are none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here owns a TPU
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "Planning for TPUs needs their compiler, and no TPU: pip install '.[tpu]'."
        )
    try:
        with _quiet_stderr():
            # As programs have it that run there: the two cores of a chip are one device.
            options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
            return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except Exception as error:  # the kind of error differs between versions
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"--topology={topology} is no slice of TPUs, which are named as in {EXAMPLES}: {reason}"
        ) from error


@contextlib.contextmanager
def _quiet_stderr():
    """Nothing on standard error, on which the compiler's library writes past Python."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
