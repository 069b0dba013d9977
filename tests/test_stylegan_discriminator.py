"""The StyleGAN2 discriminator against SciPy, NumPy and its published number of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.signal

import tiny
from vqgan_jax.configuration import ConfigError, tokenizer_config, validate
from vqgan_jax.models.stylegan_discriminator import (
    EqualizedConv,
    EqualizedDense,
    StyleGANDiscriminator,
    activate,
    blur,
    minibatch_deviation,
)

FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def small(**fields):
    return StyleGANDiscriminator(**({"base_channels": 128, "max_channels": 16} | fields))


def initialized(model, images):
    """Variables whose biases are not zero either."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.tree.map(lambda x: (1.0 if x.ndim > 1 else 0.1) * normal(*x.shape, seed=5), shapes)


# ---- Blur.


@pytest.mark.parametrize("padding", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (4, 7)])
def test_blur_is_a_convolution_with_the_binomial_filter(size, stride, padding):
    x = normal(2, *size, 3)
    padded = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    expected = [
        [scipy.signal.convolve2d(image[..., c], FILTER, mode="valid") for c in range(3)]
        for image in padded
    ]
    expected = np.moveaxis(np.array(expected), 1, -1)[:, ::stride, ::stride]
    found = jax.jit(blur, static_argnums=(1, 2))(x, padding, stride)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_downsampling_convolution_is_blur_then_stride_two(kernel_size):
    """Of the whole: filter with room for the kernel, correlate, keep every second value."""
    x = normal(2, 8, 6, 3)
    layer = EqualizedConv(4, kernel_size, downsample=True)
    variables = initialized(layer, x)
    found = jax.jit(layer.apply)(variables, x)
    kernel = np.asarray(variables["params"]["kernel"]) / np.sqrt(kernel_size**2 * 3)
    room = 1 + kernel_size // 2
    padded = np.pad(x, ((0, 0), (room,) * 2, (room,) * 2, (0, 0)))
    expected = np.zeros((2, 4, 3, 4))
    for b, i, o in np.ndindex(2, 3, 4):
        blurred = scipy.signal.convolve2d(padded[b, ..., i], FILTER, mode="valid")
        expected[b, ..., o] += scipy.signal.correlate2d(blurred, kernel[..., i, o], mode="valid")[
            ::2, ::2
        ]
    expected += np.asarray(variables["params"]["bias"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_constant_maps_keep_their_value_and_shifts_of_two_are_shifts_of_one():
    constant = np.full((1, 8, 8, 1), 3.0, np.float32)
    halved = jax.jit(lambda x: blur(x, 1, 2))
    np.testing.assert_allclose(np.asarray(halved(constant))[:, 1:-1, 1:-1], 3.0, rtol=1e-6)
    x = np.zeros((1, 16, 16, 2), np.float32)
    x[:, 4:10, 4:10] = normal(1, 6, 6, 2)
    shifted = np.roll(x, (2, 2), axis=(1, 2))
    np.testing.assert_allclose(halved(shifted), np.roll(halved(x), (1, 1), axis=(1, 2)), atol=1e-6)


# ---- Deviation over the batch.


def deviations(x, group_size):
    """Group by group: image i is in group i modulo the number of groups."""
    count = -(-len(x) // group_size)
    result = np.zeros(len(x))
    for group in range(count):
        members = x[group::count].astype(np.float64)
        result[group::count] = np.sqrt(members.var(axis=0) + 1e-8).mean()
    return result


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6, 7, 8, 12])
@pytest.mark.parametrize("group_size", [2, 4])
def test_deviation_of_groups_at_any_batch_size(batch, group_size):
    x = normal(batch, 3, 2, 5)
    found = jax.jit(minibatch_deviation, static_argnums=1)(x, group_size)
    assert found.shape == (batch, 1, 1, 1)
    np.testing.assert_allclose(found.ravel(), deviations(x, group_size), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_groups_of_micro_batches_are_those_of_the_batch(count):
    x = normal(16, 2, 2, 3)
    deviation = jax.jit(lambda x: minibatch_deviation(x, 4).ravel())
    whole = np.asarray(deviation(x))
    for j in range(count):
        np.testing.assert_allclose(deviation(x[j::count]), whole[j::count], rtol=1e-6)


def test_deviation_of_equal_images_has_a_gradient():
    gradient = jax.jit(jax.grad(lambda x: minibatch_deviation(x, 4).sum()))(jnp.ones((4, 2, 2, 1)))
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("batch", [8, 16])
def test_eight_devices_have_the_groups_of_one(batch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    model, images = small(), tiny.random_images(batch, 8, 8, 3)
    variables = initialized(model, images)
    run = jax.jit(lambda variables, images: model.apply(variables, images))
    np.testing.assert_allclose(
        run(variables, jax.device_put(images, split)), run(variables, images), rtol=2e-4, atol=1e-5
    )


# ---- Equalised learning rate.


@pytest.mark.parametrize(
    ("layer", "shape", "fan_in"),
    [
        (EqualizedConv(64, 3), (2, 5, 6, 16), 144),
        (EqualizedConv(64, 1), (2, 5, 6, 16), 16),
        (EqualizedDense(64), (2, 300), 300),
    ],
)
def test_kernels_are_standard_normal_and_scaled_at_run_time(layer, shape, fan_in):
    x = normal(*shape, seed=1)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["kernel"])
    assert kernel.std() == pytest.approx(1.0, rel=0.05)
    assert abs(kernel.mean()) < 0.05
    kernel = kernel / np.sqrt(fan_in)
    if x.ndim == 2:
        expected = x @ kernel
    else:
        half = kernel.shape[0] // 2
        padded = np.pad(x, ((0, 0), (half,) * 2, (half,) * 2, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], axis=(1, 2))
        expected = np.einsum("bhwirc,rcio->bhwo", windows, kernel)
    found = jax.jit(layer.apply)(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_activation():
    x = normal(1000)
    expected = np.sqrt(2) * np.where(x > 0, x, 0.2 * x)
    np.testing.assert_allclose(jax.jit(activate)(x), expected, rtol=1e-6)


# ---- The network.


@pytest.mark.parametrize(
    ("side", "base", "parameters"), [(1024, 32_768, 29_012_513), (256, 16_384, 24_001_089)]
)
def test_number_of_parameters_is_the_published_one(side, base, parameters):
    """The tables that the authors' training prints: config F at 1024, and half the maps at 256."""
    model = StyleGANDiscriminator(base_channels=base)
    images = jax.ShapeDtypeStruct((4, side, side, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(x.size for x in jax.tree.leaves(variables)) == parameters


def forward(params, x, group_size):
    """The whole network on one image after another, in NumPy and SciPy."""

    def conv(layer, x, downsample=False):
        kernel = np.asarray(layer["kernel"], np.float64)
        size, _, channels, features = kernel.shape
        room = size // 2 + int(downsample)
        padded = np.pad(x, ((room,) * 2, (room,) * 2, (0, 0)))
        maps = []
        for i in range(channels):
            one = padded[..., i]
            maps.append(scipy.signal.convolve2d(one, FILTER, "valid") if downsample else one)
        out = [
            sum(
                scipy.signal.correlate2d(maps[i], kernel[..., i, o], "valid")
                for i in range(channels)
            )
            for o in range(features)
        ]
        out = np.stack(out, axis=-1) / np.sqrt(size * size * channels)
        return (out[::2, ::2] if downsample else out) + np.asarray(layer.get("bias", 0.0))

    def act(x):
        return np.sqrt(2) * np.maximum(x, 0.2 * x)

    x = [act(conv(params["from_images"], image)) for image in x.astype(np.float64)]
    for name in sorted(name for name in params if name.startswith("block")):
        block = params[name]
        deep = [act(conv(block["conv2"], act(conv(block["conv1"], y)), True)) for y in x]
        x = [
            (a + conv(block["shortcut"], y, True)) / np.sqrt(2)
            for a, y in zip(deep, x, strict=True)
        ]
    x = np.stack(x)
    spread = np.broadcast_to(deviations(x, group_size)[:, None, None, None], (*x.shape[:3], 1))
    x = np.stack([act(conv(params["conv_out"], y)) for y in np.concatenate([x, spread], -1)])
    x = x.reshape(len(x), -1)
    for name, after in (("dense", act), ("logits", lambda x: x)):
        kernel = np.asarray(params[name]["kernel"])
        x = after(x @ kernel / np.sqrt(len(kernel)) + np.asarray(params[name]["bias"]))
    return x


@pytest.mark.parametrize(("size", "blocks"), [((16, 16), 2), ((10, 8), 1), ((4, 5), 0)])
def test_logits_are_those_of_the_equations(size, blocks):
    model, images = small(max_channels=6, group_size=2), tiny.random_images(3, *size, 3)
    variables = initialized(model, images)
    assert sum(name.startswith("block") for name in variables["params"]) == blocks
    found = jax.jit(model.apply)(variables, images)
    assert found.shape == (3, 1, 1, 1) and found.dtype == jnp.float32
    expected = forward(variables["params"], images, 2)
    np.testing.assert_allclose(found.reshape(3, 1), expected, rtol=1e-3, atol=1e-4)


def test_images_are_judged_by_themselves_without_groups():
    model, images = small(group_size=1), tiny.random_images(3, 8, 8, 3)
    variables = initialized(model, images)
    run = jax.jit(model.apply)
    alone = [run(variables, images[i : i + 1]).item() for i in range(3)]
    np.testing.assert_allclose(run(variables, images).ravel(), alone, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near():
    images = tiny.random_images(4, 16, 16, 3)
    variables = initialized(small(), images)
    exact = np.asarray(jax.jit(small().apply)(variables, images))
    rounded = jax.jit(small(dtype=jnp.bfloat16).apply)(variables, images)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.1 * np.abs(exact).max())


def test_small_images_are_refused_in_one_line():
    with pytest.raises(ValueError, match="at least 4 x 4 pixels; these are 8 x 3") as caught:
        small().init(jax.random.key(0), jnp.zeros((1, 3, 8, 3)))
    assert "\n" not in str(caught.value)
    config = tokenizer_config()
    config.model.resolution, config.model.channel_multipliers = 2, (1, 1)
    config.discriminator.kind = "stylegan"
    with pytest.raises(ConfigError, match=r"config\.model\.resolution is 2; the stylegan"):
        validate(config)


def test_sizes_that_do_not_halve_are_refused():
    config = tokenizer_config()
    config.discriminator.kind = "stylegan"
    validate(config)
    config.model.resolution = 272
    with pytest.raises(ConfigError, match="is 272, of which .* makes 17 x 17 by halving"):
        validate(config)
