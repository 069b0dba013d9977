"""The perceptual distance: reading weights safely, refusing wrong ones, gradients, sizes."""

import functools
import hashlib
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.errors import DataError
from vqgan_jax.interop.lpips import check_lpips, load_lpips
from vqgan_jax.models.lpips import HEAD_WIDTHS, LPIPS, SCALE, SHIFT


def network_at(path, sha256, backbone="alexnet"):
    network = tokenizer_config().loss.perceptual_network
    network.backbone, network.path, network.sha256 = backbone, str(path), sha256
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "alexnet.ckpt"
    return path, tiny.write_weights(path, tiny.published_tree("alexnet"))


@pytest.fixture(scope="module")
def params(weights):
    return load_lpips(network_at(*weights))


@pytest.mark.parametrize("backbone", ["alexnet", "vgg16"])
def test_reading_gives_every_array_under_its_name(tmp_path, backbone):
    tree = tiny.published_tree(backbone)
    sha256 = tiny.write_weights(tmp_path / "file", tree)
    params = load_lpips(network_at(tmp_path / "file", sha256, backbone))
    (published,) = (tree[name] for name in tree if not name.startswith("NetLin"))
    assert len(params["network"]) == len(published) == {"alexnet": 5, "vgg16": 13}[backbone]
    for i, layer in enumerate(params["network"].values()):
        for leaf, value in layer.items():
            np.testing.assert_array_equal(value, published[f"Conv_{i}"][leaf])
    assert [head.shape for head in params["heads"].values()] == [
        (width,) for width in HEAD_WIDTHS[backbone]
    ]
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    model = LPIPS(backbone)
    expected = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, x), images)["params"]
    found = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert found == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


def test_wrong_file_is_refused_before_it_is_read(weights, tmp_path):
    damaged = tmp_path / "damaged.ckpt"
    content = bytearray(weights[0].read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DataError, match=f"damaged.ckpt have sha256 .*expected {weights[1]}"):
        load_lpips(network_at(damaged, weights[1]))
    with pytest.raises(DataError, match=r"damaged.ckpt have sha256"):  # not the published one
        load_lpips(network_at(damaged, ""))
    with pytest.raises(DataError, match="Cannot read the perceptual weights .*missing"):
        load_lpips(network_at(tmp_path / "missing", weights[1]))


class Hostile:
    """Runs a command where it is unpickled as usual."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickle_that_asks_for_more_than_arrays_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "mark"
    content = pickle.dumps({"AlexNet_0": Hostile(mark)})
    pickle.loads(content)
    assert mark.exists()  # it is hostile indeed
    mark.unlink()
    path = tmp_path / "hostile.ckpt"
    path.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    with pytest.raises(DataError, match="hostile.ckpt does not hold LPIPS weights.*system"):
        load_lpips(network_at(path, sha256))
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({}), pickle.dumps({"VGG16_0": {}})],
    ids=["empty", "text", "list", "no network", "no layers"],
)
def test_file_that_holds_something_else_is_named(tmp_path, content):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    with pytest.raises(DataError, match="other.ckpt does not hold LPIPS weights for alexnet"):
        load_lpips(network_at(path, hashlib.sha256(content).hexdigest()))


def test_weights_of_the_other_network_are_named(weights):
    with pytest.raises(DataError, match="does not hold LPIPS weights for vgg16"):
        load_lpips(network_at(*weights, backbone="vgg16"))


def test_check_takes_weights_that_measure_and_refuses_those_that_do_not(params):
    model = LPIPS("alexnet")
    check_lpips(model, params)
    heads = jax.tree.map(jnp.zeros_like, params["heads"])
    with pytest.raises(DataError, match="is 0 between equal images and 0 between different"):
        check_lpips(model, params | {"heads": heads})
    network = jax.tree.map(jnp.zeros_like, params["network"])
    with pytest.raises(DataError, match="cannot be right"):
        check_lpips(model, params | {"network": network})
    with pytest.raises(DataError, match="nan"):
        check_lpips(model, params | {"heads": jax.tree.map(lambda x: x * np.nan, params["heads"])})


@pytest.fixture(scope="module")
def distance(params):
    return jax.jit(lambda x, y: LPIPS("alexnet").apply({"params": params}, x, y))


def test_distance_is_symmetric_and_grows_with_damage(distance):
    x, noise = tiny.random_images(2, 64, 64, 3), tiny.random_images(2, 64, 64, 3, seed=1)
    assert distance(x, x).shape == (2,)
    np.testing.assert_allclose(distance(x, x), 0, atol=1e-12)
    np.testing.assert_allclose(distance(x, noise), distance(noise, x), rtol=1e-5)
    distances = [distance(x, x + share * (noise - x)) for share in (0.02, 0.1, 0.5)]
    assert np.all(np.diff(np.stack(distances), axis=0) > 0)


def test_distance_is_the_definition_on_the_first_layer(params):
    """Zhang et al. 2018, equation 1, with the first convolution in NumPy; other heads are zero."""
    first_only = {k: v if k == "head_0" else jnp.zeros_like(v) for k, v in params["heads"].items()}
    x, y = (tiny.random_images(1, 35, 35, 3, seed=seed) for seed in (0, 1))
    kernel, bias = (np.asarray(params["network"]["conv_0"][name]) for name in ("kernel", "bias"))

    def unit_features(image):
        padded = np.pad((image[0] - np.array(SHIFT)) / np.array(SCALE), ((2, 2), (2, 2), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (11, 11), axis=(0, 1))[::4, ::4]
        features = np.maximum(np.einsum("hwcij,ijco->hwo", windows, kernel) + bias, 0)
        return features / (np.linalg.norm(features, axis=-1, keepdims=True) + 1e-10)

    squares = (unit_features(x) - unit_features(y)) ** 2
    expected = np.mean(squares @ np.asarray(first_only["head_0"]))
    params = params | {"heads": first_only}
    found = tiny.run(LPIPS("alexnet"), {"params": params}, x, y)
    np.testing.assert_allclose(found, [expected], rtol=1e-4)


def test_gradient_is_finite_where_all_features_are_zero(params):
    """Biases far below zero switch every unit off."""
    network = {
        name: {"kernel": layer["kernel"], "bias": jnp.full_like(layer["bias"], -1e6)}
        for name, layer in params["network"].items()
    }
    x, y = tiny.random_images(1, 32, 32, 3), tiny.random_images(1, 32, 32, 3, seed=1)

    def loss(y):
        return LPIPS("alexnet").apply({"params": params | {"network": network}}, x, y).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(y)
    assert value == 0 and not np.any(gradient)  # and neither is NaN


def test_gradient_is_finite_at_equal_images(params):
    x = tiny.random_images(1, 32, 32, 3)
    gradient = jax.jit(jax.grad(lambda y: LPIPS("alexnet").apply({"params": params}, x, y).sum()))(
        x
    )
    assert np.all(np.isfinite(gradient))


def test_one_channel_is_grey(params):
    model = LPIPS("alexnet")
    x, y = tiny.random_images(1, 32, 32, 1), tiny.random_images(1, 32, 32, 1, seed=1)
    grey = tiny.run(model, {"params": params}, x, y)
    colour = tiny.run(model, {"params": params}, np.repeat(x, 3, -1), np.repeat(y, 3, -1))
    np.testing.assert_allclose(grey, colour, rtol=1e-6)


def test_heads_drop_features_only_where_training_asks_for_it(params):
    model = LPIPS("alexnet")
    x, y = tiny.random_images(1, 32, 32, 3), tiny.random_images(1, 32, 32, 3, seed=1)
    plain = tiny.run(model, {"params": params}, x, y)
    dropping = jax.jit(functools.partial(model.apply, train=True))
    dropped = [
        dropping({"params": params}, x, y, rngs={"dropout": jax.random.key(seed)})
        for seed in range(2)
    ]
    assert len({float(d[0]) for d in (plain, *dropped)}) == 3
    np.testing.assert_allclose(dropped, [plain, plain], rtol=0.5)
