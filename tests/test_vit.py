"""The networks of ViT-VQGAN: sizes, their values against NumPy, positions, configs."""

import functools
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from vqgan_jax.configuration import (
    ConfigError,
    downsampling_factor,
    from_json,
    to_json,
    tokenizer_config,
    validate,
)
from vqgan_jax.data.images import prepare_images
from vqgan_jax.models import layers, vit
from vqgan_jax.models.vit import Trunk, attend_among_all, resize_positions
from vqgan_jax.training.game import make_vqgan


def config_of_pair(pair):
    """That of configs/vit_vqgan.py for two sizes, as "SL"."""
    path = tiny.__file__.replace("tests/tiny.py", "configs/vit_vqgan.py")
    spec = importlib.util.spec_from_file_location("vit_vqgan", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(pair)


def config_of_tiny_vit(**model):
    """A ViT-VQGAN of 16 channels a head that compiles in seconds; `model` changes keys of it."""
    config = tiny.config_of_tiny_model()
    config.model.architecture = "vit"
    config.model.resolution = 16
    config.model.vit.patch = 4
    config.model.vit.encoder.update(layers=2, heads=2, width=16)
    config.model.vit.decoder.update(layers=1, heads=3, width=24)
    config.model.update(model)
    return config


def random_variables(config, seed=0):
    """Of a config's tokenizer, everything random, biases and norms too."""
    side, channels = config.model.resolution, config.model.in_channels
    shapes = jax.eval_shape(
        lambda: make_vqgan(config.model).init(
            jax.random.key(0), jnp.zeros((1, side, side, channels))
        )
    )
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        values = random.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return values / np.sqrt(leaf.shape[-2])
        return 1.0 + 0.5 * values if path[-1].key == "scale" else 0.5 * values

    return jax.tree_util.tree_map_with_path(draw, shapes)


def run(module, variables, *inputs, method="__call__"):
    """A method of a module, compiled."""
    return jax.jit(functools.partial(module.apply, method=method))(variables, *inputs)


# ---- Sizes.


def abstract(config):
    """Module and shapes of its variables."""
    module, side = make_vqgan(config.model), config.model.resolution
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return module, jax.eval_shape(module.init, jax.random.key(0), images)


@pytest.mark.parametrize(
    ("pair", "millions"), [("SB", (25.17, 84.93)), ("LS", (629.15, 25.17)), ("BL", (84.93, 629.15))]
)
def test_parameters_of_the_blocks(pair, millions):
    """Query, key, value, output and the two of the MLP, of all blocks."""
    _, variables = abstract(config_of_pair(pair))
    for network, expected in zip(("encoder", "decoder"), millions, strict=True):
        blocks = tiny.leaves(variables["params"][network]["trunk"]["blocks"])
        matrices = [leaf for name, leaf in blocks.items() if name.endswith("kernel")]
        assert len(matrices) == 6
        count = sum(math.prod(leaf.shape) for leaf in matrices)
        assert round(count / 1e6, 2) == expected


def test_all_parameters_of_the_base_encoder():
    """The paper's Base has 91 million."""
    _, variables = abstract(config_of_pair("BB"))
    encoder = jax.tree.leaves(variables["params"]["encoder"])
    assert sum(math.prod(leaf.shape) for leaf in encoder) == 90_713_088


def multiply_adds(function, *inputs):
    """Of all matrix products in a function of abstract arrays; a loop's as often as it runs."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                inner = math.prod(shape[axis] for axis in contracted)
                total += inner * math.prod(equation.outvars[0].aval.shape)
            for value in equation.params.values():
                inner_jaxpr = getattr(value, "jaxpr", value)
                if hasattr(inner_jaxpr, "eqns"):
                    total += times * count(inner_jaxpr)
        return total

    return count(jax.make_jaxpr(function)(*inputs).jaxpr)


@pytest.mark.parametrize(("pair", "billions"), [("SS", 68.7), ("BB", 212.6), ("SL", 764.5)])
def test_multiply_adds_of_an_image(pair, billions):
    config = config_of_pair(pair)
    module, variables = abstract(config)
    blocks = 0
    for network in ("encoder", "decoder"):
        trunk, params = getattr(module, network).trunk, variables["params"][network]["trunk"]
        tokens = jax.ShapeDtypeStruct((1, 32, 32, trunk.width), jnp.float32)
        blocks += multiply_adds(trunk.apply, {"params": params}, tokens)
    assert abs(blocks / 1e9 - billions) <= 0.01 * billions

    image = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    codes = jax.ShapeDtypeStruct((1, 32, 32), jnp.int32)
    latents = multiply_adds(lambda v, x: module.apply(v, x, method="latents"), variables, image)
    decoded = multiply_adds(lambda v, x: module.apply(v, x, method="decode"), variables, codes)
    encoder, decoder = config.model.vit.encoder.width, config.model.vit.decoder.width
    heads = encoder * (8 * 8 * 3 + 8 * encoder + 32)  # patches, head, projection
    heads += decoder * (32 + 8 * decoder + 4 * decoder + 4 * 8 * 8 * 6)  # and back; mean and scale
    assert latents + decoded - blocks == 1024 * heads


# ---- Values.


def linear(p, x):
    kernel = np.asarray(p["kernel"], np.float64)
    return x @ kernel.reshape(kernel.shape[-2:]) + np.asarray(p["bias"], np.float64)


def layer_norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def softmax_attention(query, key, value):
    """Of one image and one head, `(N, C)` each."""
    logits = query @ key.T / np.sqrt(query.shape[1])
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ value


def block(p, x, heads):
    """Of one image, `(N, D)`."""
    h, a = layer_norm(p["attention_norm"], x), p["attention"]
    parts = [np.split(linear(a[name], h), heads, axis=1) for name in ("query", "key", "value")]
    attended = np.concatenate([softmax_attention(*head) for head in zip(*parts, strict=True)], 1)
    x = x + linear(a["out"], attended)
    h = linear(p["feed_forward"]["up"], layer_norm(p["feed_forward_norm"], x))
    h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    return x + linear(p["feed_forward"]["down"], h)


def trunk(p, x, heads):
    x = x + np.asarray(p["positions"], np.float64)
    tokens = x.reshape(-1, x.shape[-1])
    for i in range(len(p["blocks"]["attention_norm"]["scale"])):
        tokens = block(jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"]), tokens, heads)
    return layer_norm(p["norm_out"], tokens).reshape(x.shape)


def head(p, x):
    return linear(p["out"], np.tanh(linear(p["hidden"], x)))


def latents_in_numpy(params, image, heads):
    """Of an image `(16, 16, C)` in patches of 4 x 4."""
    p = params["encoder"]
    rows = [
        [linear(p["embedding"], image[i : i + 4, j : j + 4].ravel()) for j in range(0, 16, 4)]
        for i in range(0, 16, 4)
    ]
    x = head(p["head_out"], trunk(p["trunk"], np.array(rows), heads))
    return linear(params["quant_conv"], x)


def image_in_numpy(params, codes, heads):
    p, codebook = params["decoder"], params["quantize"]["codebook"]
    x = linear(params["post_quant_conv"], np.asarray(codebook, np.float64)[codes])
    x = trunk(p["trunk"], head(p["head_in"], x), heads)
    pixels = linear(p["pixels"], np.tanh(linear(p["hidden"], x)))
    image = np.zeros((16, 16, pixels.shape[-1] // 16))
    for i, j in np.ndindex(4, 4):
        image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = pixels[i, j].reshape(4, 4, -1)
    return image


def test_networks_are_those_of_numpy():
    config = config_of_tiny_vit()
    module, variables = make_vqgan(config.model), random_variables(config)
    images = tiny.random_images(2, 16, 16, 3)
    latents = run(module, variables, images, method="latents")
    codes = np.random.default_rng(1).integers(0, 32, (2, 4, 4))
    decoded = run(module, variables, codes, method="decode")
    assert latents.shape == (2, 4, 4, 8) and decoded.dtype == jnp.float32
    for i in range(2):
        expected = latents_in_numpy(variables["params"], images[i].astype(np.float64), heads=2)
        np.testing.assert_allclose(latents[i], expected, atol=2e-5 * np.abs(expected).max())
        expected = image_in_numpy(variables["params"], codes[i], heads=3)
        np.testing.assert_allclose(decoded[i], expected, atol=2e-5 * np.abs(expected).max())


def test_unrolled_or_recomputed_layers_are_the_same():
    x = tiny.random_images(2, 4, 4, 12)
    fields = dict(side=4, layers=3, heads=2, width=12)
    plain = Trunk(**fields)
    variables = jax.jit(plain.init)(jax.random.key(0), x)

    def value_and_gradient(module):
        def total(variables):
            return jnp.sum(jnp.sin(module.apply(variables, x)))

        return tiny.leaves(jax.jit(jax.value_and_grad(total))(variables))

    expected = value_and_gradient(plain)
    kept = dict(remat=True, remat_keeps="products")
    for options in (dict(unroll=3), dict(remat=True), kept):
        for name, leaf in value_and_gradient(Trunk(**fields, **options)).items():
            np.testing.assert_allclose(leaf, expected[name], atol=1e-5, err_msg=name)


def test_dropout_is_on_in_training_alone():
    x = tiny.random_images(1, 4, 4, 12)
    module = Trunk(side=4, layers=2, heads=2, width=12, dropout=0.5)
    variables = jax.jit(module.init)(jax.random.key(0), x)

    @jax.jit
    def dropped(seed):
        return module.apply(variables, x, True, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(dropped(0), dropped(0))
    assert np.abs(dropped(0) - dropped(1)).max() > 0.01
    assert np.abs(dropped(0) - run(module, variables, x)).max() > 0.01


@pytest.mark.parametrize("largest", [100, 20])
def test_attention_among_all_tokens_at_once_and_in_blocks(monkeypatch, largest):
    for module in (layers, vit):
        monkeypatch.setattr(module, "LARGE_GRID", largest)
    monkeypatch.setattr(layers, "BLOCK_LOGITS", 2 * 3 * 37 * 7)
    query, key, value = (2 * tiny.random_images(2, 37, 3, 5, seed=seed) for seed in range(3))
    found = jax.jit(lambda *x: attend_among_all(*x))(query, key, value)  # nothing of another case
    for i, a in np.ndindex(2, 3):
        expected = softmax_attention(query[i, :, a], key[i, :, a], value[i, :, a])
        np.testing.assert_allclose(found[i, :, a], expected, atol=1e-5)


# ---- Positions.


def test_positions_are_exact_at_the_grid_of_training():
    positions = jnp.asarray(tiny.random_images(5, 5, 3))
    assert resize_positions(positions, 5, 5) is positions


@pytest.mark.parametrize(("rows", "columns"), [(32, 24), (8, 12), (16, 17)])
def test_positions_of_another_grid_are_places_in_the_image(rows, columns):
    """What grows linearly from left to right of the image does so on any grid, borders aside."""
    places = (np.arange(16) + 0.5) / 16
    ramps = np.stack(np.meshgrid(places, places, indexing="ij"), axis=-1)
    found = np.asarray(resize_positions(jnp.asarray(ramps, jnp.float32), rows, columns))
    expected = np.stack(
        np.meshgrid(*((np.arange(n) + 0.5) / n for n in (rows, columns)), indexing="ij"), axis=-1
    )
    inner = (slice(rows // 4, -(rows // 4)), slice(columns // 4, -(columns // 4)))
    # Half a place off would be 0.03; the filter for a smaller grid is not quite linear.
    np.testing.assert_allclose(found[inner], expected[inner], atol=2e-3)


def test_other_sizes_of_images():
    config = config_of_tiny_vit()
    module, variables = make_vqgan(config.model), random_variables(config)
    for height, width in ((8, 24), (4, 4)):
        images = tiny.random_images(2, height, width, 3)
        reconstructions, quantized = run(module, variables, images)
        assert reconstructions.shape == images.shape
        assert quantized.codes.shape == (2, height // 4, width // 4)
        assert np.all(np.isfinite(reconstructions))


# ---- What else a tokenizer may be.


@pytest.mark.parametrize("channels", [1, 5])
def test_one_channel_and_label_maps(channels):
    config = config_of_tiny_vit(in_channels=channels, out_channels=channels)
    if channels > 1:
        config.data.num_labels, config.loss.binary_cross_entropy = channels, 1.0
    validate(config)
    raw = np.random.default_rng(0).integers(0, 5, (2, 16, 16) + (3,) * (channels == 1))
    images = prepare_images(config, jnp.asarray(raw, jnp.uint8))
    assert images.shape == (2, 16, 16, channels)
    reconstructions, _ = run(make_vqgan(config.model), random_variables(config), images)
    assert reconstructions.shape == images.shape


def test_mean_of_the_distribution_is_the_image():
    """The decoder's location m and scale for each value; 0.8 x + 0.1 = sigmoid(m), x in [0, 1]."""
    config = config_of_tiny_vit(logit_laplace=True)
    module, variables = make_vqgan(config.model), random_variables(config)
    images = tiny.random_images(2, 16, 16, 3)
    output, _ = run(module, variables, images, method="predict")
    reconstructions, quantized = run(module, variables, images)
    assert output.shape == (2, 16, 16, 6)
    unit = (1 / (1 + np.exp(-np.asarray(output[..., :3], np.float64))) - 0.1) / 0.8
    np.testing.assert_allclose(reconstructions, 2 * unit - 1, atol=1e-5)
    decoded = run(module, variables, quantized.codes, method="decode")
    np.testing.assert_allclose(decoded, reconstructions, atol=1e-5)


def test_last_layer_is_enough_for_images_from_features():
    config = config_of_tiny_vit()
    module, variables = make_vqgan(config.model), random_variables(config)
    params = variables["params"]
    features = tiny.random_images(1, 4, 4, 96)
    layer = module.last_layer(params)
    assert layer["kernel"].shape == (96, 48)
    images = run(module, {"params": module.only_last_layer(layer)}, features, method="head")
    np.testing.assert_array_equal(images, run(module, variables, features, method="head"))
    doubled = module.with_last_layer(params, jax.tree.map(lambda x: 2 * x, layer))
    twice = run(module, {"params": doubled}, features, method="head")
    np.testing.assert_allclose(twice, 2 * images, rtol=1e-6)
    assert tiny.leaves(doubled).keys() == tiny.leaves(params).keys()


# ---- Configs.


def test_recipe_of_the_paper():
    config = config_of_pair("SL")
    assert downsampling_factor(config.model) == 8
    weights = {key: config.loss[key] for key in ("codebook", "perceptual", "logit_laplace", "l2")}
    assert weights == dict(codebook=1.0, perceptual=0.1, logit_laplace=0.1, l2=1.0)
    assert config.loss.l1 == 0 and config.discriminator.weight == 0.1
    assert not config.discriminator.adaptive_weight


def test_start_of_a_normalized_codebook():
    """Of length 1, and in all directions alike, as normal vectors are."""
    config = config_of_tiny_vit()
    config.model.quantizer.update(codebook_size=4096, l2_normalize=True)
    images = tiny.random_images(1, 16, 16, 3)
    variables = jax.jit(make_vqgan(config.model).init)(jax.random.key(0), images)
    codebook = np.asarray(variables["params"]["quantize"]["codebook"])
    np.testing.assert_allclose(np.linalg.norm(codebook, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(codebook.mean(axis=0), 0.0, atol=0.05)
    np.testing.assert_allclose(
        codebook.T @ codebook / 4096, np.eye(codebook.shape[1]) / codebook.shape[1], atol=0.02
    )


def test_configs_stored_before_there_were_vision_transformers():
    stored = json.loads(to_json(tokenizer_config()))
    for key in ("architecture", "vit", "logit_laplace"):
        del stored["model"][key]
    config = from_json(json.dumps(stored))
    assert config.to_dict() == tokenizer_config().to_dict()
    assert downsampling_factor(config.model) == 16


def test_sizes_of_networks_survive_json():
    config = config_of_pair("SL")
    assert from_json(to_json(config)).model.vit.to_dict() == config.model.vit.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mlp"}, "'mlp'; it must be one of conv, vit"),
        ({"vit.encoder.heads": 3}, "config.model.vit.encoder.width 16 is not divisible by config"),
        ({"vit.decoder.layers": 0}, "config.model.vit.decoder.layers is 0; it must be at least 1"),
        ({"vit.patch": 0}, "config.model.vit.patch is 0"),
        ({"norm": "layer"}, "config.model.norm is for the convolutional architecture"),
        ({"vit.patch": 5}, "config.model.resolution is 16, which the model's factor 5 does not"),
    ],
)
def test_message_names_the_key(changes, message):
    config = config_of_tiny_vit()
    config.model.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert message in str(caught.value)


@pytest.mark.parametrize("size", ["XL", "S", "SBL"])
def test_sizes_that_the_config_file_does_not_have(size):
    with pytest.raises(ConfigError, match=f"size={size} must be two letters of S, B, L"):
        config_of_pair(f"size={size}")
