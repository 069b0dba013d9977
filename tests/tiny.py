"""Small tokenizers and stand-in perceptual weights for tests."""

import functools
import hashlib
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import scipy.cluster.vq

from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.models.lpips import ALEXNET_LAYERS, HEAD_WIDTHS, VGG16_WIDTHS
from vqgan_jax.training.game import make_vqgan


def config_of_tiny_model(**quantizer):
    """An f2 tokenizer that compiles in seconds; `quantizer` changes keys of `model.quantizer`."""
    config = tokenizer_config()
    config.model.dtype = "float32"
    config.model.resolution = 32
    config.model.channels = 32
    config.model.channel_multipliers = (1, 1)
    config.model.num_res_blocks = 0  # the decoder has one a level
    config.model.attention_resolutions = ()
    config.model.latent_channels = 32
    config.model.quantizer.codebook_size = 32
    config.model.quantizer.code_dim = 8
    config.model.quantizer.update(quantizer)
    config.discriminator.channels = 16
    config.discriminator.num_layers = 2
    config.training.batch_size = 2
    return config


def random_images(*shape, seed=0):
    """Uniform in [-1, 1], float32."""
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def run(module, variables, *inputs, **options):
    """`module.apply`, compiled as one program, in which `options` are constants."""
    return jax.jit(functools.partial(module.apply, **options))(variables, *inputs)


def initialized(module, *inputs, seed=0, **options):
    """`module.init`, compiled as one program."""
    return jax.jit(functools.partial(module.init, **options))(jax.random.key(seed), *inputs)


def drawn(module, *inputs, seed=0):
    """Variables like those of `init`, by NumPy: compiling `init` of a network takes long."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        values, name = random.uniform(-1, 1, leaf.shape), path[-1].key
        if name == "kernel":
            values /= math.sqrt(math.prod(leaf.shape[:-1]))
        elif name == "codebook":
            values /= len(values)
        elif name == "scale":
            values = np.ones(leaf.shape)
        else:
            values *= 0.05
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def initial_variables(config, seed=0):
    """Variables of an untrained tokenizer, whose quantizer is initialised by its own code."""
    module = make_vqgan(config.model)
    images = jax.ShapeDtypeStruct((1, 16, 16, config.model.in_channels), jnp.float32)
    if config.model.quantizer.kind != "nearest":
        return initialized(module, jnp.asarray(random_images(*images.shape)), seed=seed)
    return drawn(module, images, seed=seed)


def variables_with_centres(config, images, seed=0):
    """The same with the k-means centres of the images' latents as codebook."""
    module = make_vqgan(config.model)
    variables = drawn(module, images, seed=seed)
    latents = np.asarray(run(module, variables, images, method="latents"))
    points = latents.reshape(-1, latents.shape[-1])
    size = config.model.quantizer.codebook_size
    centres, _ = scipy.cluster.vq.kmeans2(points, size, minit="++", seed=seed)
    variables["params"]["quantize"]["codebook"] = jnp.asarray(centres, jnp.float32)
    return variables


def leaves(tree):
    """The arrays of a tree by path, as in "params/decoder/conv_out/kernel"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def published_tree(backbone, seed=0):
    """LPIPS weights with the names and shapes of the published files, but random."""
    random = np.random.default_rng(seed)
    if backbone == "vgg16":
        layers = [(width, 3) for widths in VGG16_WIDTHS for width in widths]
        name = "VGG16_0"
    else:
        layers = [(width, size) for width, size, *_ in ALEXNET_LAYERS]
        name = "AlexNet_0"
    network, channels = {}, 3
    for i, (width, size) in enumerate(layers):
        kernel = random.standard_normal((size, size, channels, width), np.float32)
        network[f"Conv_{i}"] = {
            "kernel": kernel * np.float32(np.sqrt(2 / (size * size * channels))),
            "bias": np.float32(0.01) * random.standard_normal(width, np.float32),
        }
        channels = width
    heads = {
        f"NetLinLayer_{k}": {
            "Conv_0": {"kernel": np.full((1, 1, width, 1), 1.0 / width, np.float32)}
        }
        for k, width in enumerate(HEAD_WIDTHS[backbone])
    }
    return {name: network} | heads


def write_weights(path, tree):
    """Pickles a tree as the published files are; returns the file's sha256."""
    path.write_bytes(pickle.dumps(tree, protocol=3).replace(b"numpy._core", b"numpy.core"))
    return hashlib.sha256(path.read_bytes()).hexdigest()
