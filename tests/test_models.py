"""Networks: sizes against the published ones, layers against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.models.autoencoder import Decoder, Encoder, Level
from vqgan_jax.models.discriminator import ActNorm, BatchNorm, PatchDiscriminator
from vqgan_jax.models.layers import AttentionBlock, Conv, Downsample, GroupNorm, Upsample
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.training.game import make_vqgan


def shapes_of(module, *inputs, **options):
    """Shapes of a module's variables, without computing anything."""
    key = jax.random.key(0)
    return jax.eval_shape(lambda *x: module.init(key, *x, **options), *inputs)


def images(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


# ---- Sizes.


def test_parameters_of_the_imagenet_f16_model():
    """The published model: 72.1 M parameters, besides a codebook of 1,024 x 256."""
    params = shapes_of(make_vqgan(tokenizer_config().model), images(1, 256, 256, 3))["params"]
    assert count(params["encoder"]) == 29_298_176
    assert count(params["decoder"]) == 42_449_795
    assert params["quantize"]["codebook"].shape == (1024, 256)
    assert count(params) == 72_141_699


def test_parameters_of_the_gumbel_f8_model():
    config = tokenizer_config()
    config.model.channel_multipliers = (1, 1, 2, 4)
    config.model.attention_resolutions = (32,)
    config.model.quantizer.kind = "gumbel"
    config.model.quantizer.codebook_size = 8192
    params = shapes_of(make_vqgan(config.model), images(1, 256, 256, 3))["params"]
    assert count(params["encoder"]) == 26_345_728
    assert count(params["decoder"]) == 38_316_163
    assert count(params["quantize"]) == 4_202_496


def test_parameters_of_discriminator_and_perceptual_network():
    assert count(shapes_of(PatchDiscriminator(), images(1, 256, 256, 3))["params"]) == 2_765_633
    pair = images(1, 64, 64, 3), images(1, 64, 64, 3)
    assert count(shapes_of(LPIPS(), *pair)) == 14_716_160
    assert count(shapes_of(LPIPS("alexnet"), *pair)) == 2_469_696 + 1_152


@pytest.mark.parametrize(
    ("size", "latent", "output"),
    [((64, 48), (16, 12), (64, 48)), ((33, 35), (8, 8), (32, 32)), ((4, 4), (1, 1), (4, 4))],
)
def test_sizes_through_an_f4_model(size, latent, output):
    config = tokenizer_config()
    config.model.channel_multipliers = (1, 2, 2)
    model = make_vqgan(config.model)
    variables = shapes_of(model, images(1, 64, 64, 3))
    codes = jax.eval_shape(
        lambda v, x: model.apply(v, x, method="encode"), variables, images(2, *size, 3)
    )
    assert codes.shape == (2, *latent) and codes.dtype == jnp.int32
    decoded = jax.eval_shape(lambda v, c: model.apply(v, c, method="decode"), variables, codes)
    assert decoded.shape == (2, *output, 3) and decoded.dtype == jnp.float32


@pytest.mark.parametrize(("size", "patches"), [(256, 30), (64, 6)])
def test_patches_of_the_discriminator(size, patches):
    model, x = PatchDiscriminator(), images(2, size, size, 3)
    logits = jax.eval_shape(model.apply, shapes_of(model, x), x)
    assert logits.shape == (2, patches, patches, 1)


def test_a_patch_logit_sees_70_pixels():
    """Isola et al. 2017: three layers make the 70 x 70 discriminator."""
    model = PatchDiscriminator(channels=2)
    x = jax.random.normal(jax.random.key(0), (1, 128, 128, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    gradient = jax.jit(jax.grad(lambda x: model.apply(variables, x)[0, 7, 7, 0]))(x)
    rows, columns = (np.unique(index) for index in np.nonzero(gradient)[1:3])
    assert len(rows) == len(columns) == 70


@pytest.mark.parametrize(
    ("resolution", "levels"), [(256, {"down_4": 2}), (64, {"down_2": 2}), (100, {})]
)
def test_attention_is_where_the_config_says(resolution, levels):
    config = tokenizer_config()
    config.model.resolution = resolution
    params = shapes_of(make_vqgan(config.model), images(1, 64, 64, 3))["params"]
    found = {}
    for name, level in params["encoder"].items():
        blocks = [key for key in level if key.startswith("attention_")]
        if blocks and name != "mid":
            found[name] = len(blocks)
    assert found == levels
    assert "attention_1" in params["encoder"]["mid"]


# ---- Layers.


def test_downsample_pads_below_and_to_the_right():
    params = {"conv": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}
    output = tiny.run(Downsample(), {"params": params}, jnp.ones((1, 4, 4, 1)))
    np.testing.assert_array_equal(output.ravel(), [9, 6, 6, 4])


def test_upsample_repeats_pixels():
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    params = {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}
    x = np.arange(6.0).reshape(1, 2, 3, 1)
    output = tiny.run(Upsample(), {"params": params}, x)
    np.testing.assert_array_equal(output[0, ..., 0], np.kron(x[0, ..., 0], np.ones((2, 2))))


def test_convolution_starts_in_the_bounds_of_its_fan_in():
    params = tiny.initialized(Conv(64), jnp.zeros((1, 4, 4, 16)))["params"]
    bound = 1 / np.sqrt(9 * 16)
    for leaf in params.values():
        assert 0.9 * bound < np.abs(leaf).max() <= bound
    np.testing.assert_allclose(np.std(params["kernel"]), bound / np.sqrt(3), rtol=0.03)


def test_one_by_one_convolution_is_a_matrix_product():
    x = tiny.random_images(2, 3, 5, 4)
    variables = tiny.initialized(Conv(6, kernel_size=1), x)
    kernel, bias = (np.asarray(variables["params"][name]) for name in ("kernel", "bias"))
    expected = x @ kernel[0, 0] + bias
    found = tiny.run(Conv(6, kernel_size=1), variables, x)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_group_norm_is_that_of_numpy():
    random = np.random.default_rng(0)
    x = random.normal(3, 2, (2, 5, 4, 64)).astype(np.float32)
    scale, bias = random.normal(size=(2, 64)).astype(np.float32)
    groups = x.reshape(2, 20, 32, 2).astype(np.float64)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
    found = tiny.run(GroupNorm(), {"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_group_norm_keeps_its_statistics_in_float32():
    x = 100 + tiny.random_images(1, 32, 32, 32)
    norm = GroupNorm(dtype=jnp.bfloat16)
    output = tiny.run(norm, tiny.initialized(norm, x), x)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.std(np.asarray(output, np.float32)), 1, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_only_with_norms_of_each_position_has_a_place_its_latents_in_every_image(norm):
    config = tiny.config_of_tiny_model().model
    config.norm, config.middle_attention, config.attention_resolutions = norm, False, ()
    module, whole = make_vqgan(config), tiny.random_images(1, 64, 64, 3)
    whole[:, :16] += 1.0  # which the part does not see
    variables = jax.jit(module.init)(jax.random.key(0), whole)
    encode = jax.jit(lambda images: module.apply(variables, images, method="latents"))
    factor = 64 // encode(whole).shape[1]
    margin, latents = 16 // factor, encode(whole)[0]
    part = encode(whole[:, 16:, 16:])[0]
    inside = part[margin:-margin, margin:-margin]
    difference = np.abs(inside - latents[2 * margin : -margin, 2 * margin : -margin]).max()
    assert inside.size > 0
    assert difference < 1e-5 if norm == "layer" else difference > 1e-2


def test_attention_is_that_of_numpy():
    x = tiny.random_images(2, 3, 4, 32)
    variables = tiny.initialized(AttentionBlock(), x)
    params = jax.tree.map(np.asarray, variables["params"])
    h = np.asarray(tiny.run(GroupNorm(), {"params": params["norm"]}, x)).reshape(2, 12, 32)

    def project(name, h):
        return h @ params[name]["kernel"][0, 0] + params[name]["bias"]

    logits = project("query", h) @ project("key", h).transpose(0, 2, 1) / np.sqrt(32)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = x + project("out", weights @ project("value", h)).reshape(x.shape)
    np.testing.assert_allclose(tiny.run(AttentionBlock(), variables, x), expected, atol=1e-5)


def test_batch_norm_is_that_of_numpy_and_its_statistics_those_of_pytorch():
    random = np.random.default_rng(0)
    norm = BatchNorm()
    x = random.normal(2, 3, (4, 3, 3, 5)).astype(np.float32)
    variables = tiny.initialized(norm, x, train=True)
    stats = jax.tree.map(np.asarray, variables["batch_stats"])
    np.testing.assert_array_equal(stats["mean"], 0)
    np.testing.assert_array_equal(stats["var"], 1)
    params = jax.tree.map(np.asarray, variables["params"])
    train = jax.jit(functools.partial(norm.apply, train=True, mutable=["batch_stats"]))
    mean, variance = np.zeros(5), np.ones(5)
    for _ in range(3):
        x = random.normal(2, 3, (4, 3, 3, 5)).astype(np.float32)
        found, moved = train(variables, x)
        normal = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
        np.testing.assert_allclose(found, normal * params["scale"] + params["bias"], atol=1e-5)
        mean = 0.9 * mean + 0.1 * x.mean((0, 1, 2))
        variance = 0.9 * variance + 0.1 * x.var((0, 1, 2), ddof=1)
        variables = variables | moved
        np.testing.assert_allclose(moved["batch_stats"]["mean"], mean, rtol=1e-5)
        np.testing.assert_allclose(moved["batch_stats"]["var"], variance, rtol=1e-5)
    found = tiny.run(norm, variables, x, train=False)
    expected = (x - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_act_norm_whitens_the_first_batch_and_keeps_its_constants():
    random = np.random.default_rng(0)
    first = random.normal(2, 3, (4, 3, 3, 5)).astype(np.float32)
    variables = tiny.initialized(ActNorm(), first)
    output = np.asarray(tiny.run(ActNorm(), variables, first))
    np.testing.assert_allclose(output.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(output.std((0, 1, 2), ddof=1), 1, rtol=1e-4)
    other = random.normal(-1, 1, (2, 3, 3, 5)).astype(np.float32)
    expected = (other - first.mean((0, 1, 2))) / (first.std((0, 1, 2), ddof=1) + 1e-6)
    np.testing.assert_allclose(tiny.run(ActNorm(), variables, other), expected, atol=1e-5)


# ---- Precision and memory.


def test_recomputation_gives_equal_gradients():
    x = tiny.random_images(1, 8, 8, 32)
    variables = tiny.drawn(Level(32, num_blocks=2, attention=False), x)

    def gradients(remat, keeps="nothing"):
        level = Level(
            32, num_blocks=2, attention=False, dropout=0.5, remat=remat, remat_keeps=keeps
        )

        def loss(variables):
            output = level.apply(variables, x, True, rngs={"dropout": jax.random.key(1)})
            return jnp.sum(jnp.square(output))

        compiled = jax.jit(jax.grad(loss)).lower(variables).compile()
        program = str(jax.make_jaxpr(jax.grad(loss))(variables))
        return compiled(variables), program.count("conv_general_dilated[")

    plain, kept, recomputed = gradients(False), gradients(True, "products"), gradients(True)
    for other in (kept, recomputed):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), plain[0], other[0]
        )
    assert plain[1] == kept[1] < recomputed[1]  # convolutions of the whole program


def test_bfloat16_computes_with_float32_parameters_and_results():
    config = tiny.config_of_tiny_model()
    wide = make_vqgan(config.model)
    config.model.dtype = "bfloat16"
    narrow = make_vqgan(config.model)
    x = jnp.asarray(tiny.random_images(1, 16, 16, 3))
    variables = tiny.initial_variables(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    reconstructions, quantized = jax.jit(narrow.apply)(variables, x)
    assert (
        reconstructions.dtype == quantized.latents.dtype == quantized.vectors.dtype == jnp.float32
    )
    latents = {
        name: jax.jit(lambda v, x, model=model: model.apply(v, x, method="latents"))(variables, x)
        for name, model in (("wide", wide), ("narrow", narrow))
    }
    assert latents["narrow"].dtype == jnp.bfloat16
    difference = np.asarray(latents["narrow"], np.float32) - latents["wide"]
    relative = np.linalg.norm(difference) / np.linalg.norm(latents["wide"])
    assert 1e-4 < relative < 0.05


@pytest.mark.parametrize("norm", ["batch", "act", "group"])
def test_discriminator_in_bfloat16_gives_float32_logits(norm):
    model = PatchDiscriminator(channels=16, num_layers=1, norm=norm, dtype=jnp.bfloat16)
    x = jnp.asarray(tiny.random_images(2, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert jax.jit(model.apply)(variables, x).dtype == jnp.float32


def test_dropout_acts_in_training_only():
    shared = dict(
        resolution=8,
        channels=32,
        channel_multipliers=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        dropout=0.5,
    )
    encoder = Encoder(latent_channels=4, **shared)
    x = tiny.random_images(1, 8, 8, 3)
    variables = tiny.drawn(encoder, x)
    run = jax.jit(
        lambda train, key: encoder.apply(variables, x, train, rngs={"dropout": key}),
        static_argnums=0,
    )
    first, second = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(run(False, first), run(False, second))
    assert not np.allclose(run(True, first), run(True, second))
    assert not np.allclose(run(True, first), run(False, first))


def test_decoder_is_its_features_and_its_head():
    decoder = Decoder(
        resolution=8,
        channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=0,
        attention_resolutions=(),
        out_channels=3,
    )
    x = tiny.random_images(1, 4, 4, 4)
    variables = tiny.drawn(decoder, x)

    @jax.jit
    def parts(variables):
        features = decoder.apply(variables, x, method="features")
        return features, decoder.apply(variables, features, method="head")

    features, whole = parts(variables)
    assert features.shape == (1, 8, 8, 32)
    np.testing.assert_allclose(whole, jax.jit(decoder.apply)(variables, x), atol=1e-5)
