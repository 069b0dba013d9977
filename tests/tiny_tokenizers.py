"""Tokenizers for the tests of decoding and encoding in tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.training.game import make_vqgan


def tokenizer(multipliers, attention=(), **changes):
    """A tiny tokenizer; `attention` holds levels, 0 being the highest resolution."""
    config = tokenizer_config().model
    config.dtype = "float32"
    config.resolution = 64
    config.channels = 8
    config.latent_channels = 8
    config.num_res_blocks = 0
    config.channel_multipliers = multipliers
    config.attention_resolutions = tuple(64 >> level for level in attention)
    config.quantizer.codebook_size = 16
    config.quantizer.code_dim = 8
    config.num_groups = 4
    config.update(changes)
    return make_vqgan(config)


def random_variables(module, channels=3, seed=0):
    """Everything random, norms too; kernels twice their usual size, so that far positions count."""
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 64, 64, channels)))
    )
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        values = random.standard_normal(leaf.shape).astype(np.float32)
        if name == "kernel":
            return values * 2.0 / np.sqrt(np.prod(leaf.shape[:-1]))
        return 1.0 + 0.5 * values if name == "scale" else values

    return jax.tree_util.tree_map_with_path(draw, shapes)


def published(multipliers=(1, 1, 2, 2, 4), attention=(16,)):
    """The shapes of a published tokenizer, of f16 unless told."""
    config = tokenizer_config().model
    config.channel_multipliers, config.attention_resolutions = multipliers, attention
    return make_vqgan(config)


def whole_and_in_tiles(module, method, in_tiles, variables, x):
    """What `method` makes of `x`, and what `in_tiles(variables, x)` does, of one type and shape."""
    whole = jax.jit(functools.partial(module.apply, method=method))(variables, x)
    tiled = jax.jit(in_tiles)(variables, x)
    assert tiled.dtype == whole.dtype and tiled.shape == whole.shape
    return np.asarray(whole), np.asarray(tiled)


def working_memory(function, *arguments):
    """Bytes that the compiled function needs besides arguments and results."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
