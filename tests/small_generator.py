"""An untrained transformer with its tokenizer, and images whose classes are colours."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import tiny
from vqgan_jax.configuration import transformer_config
from vqgan_jax.training.checkpoints import write_export
from vqgan_jax.training.learner import Learner

CLASSES = ("blue", "green", "red")
COUNTS = {"train": 60, "validation": 24}
SIDE, GRID, CODEBOOK, BLOCKS = 16, (4, 4), 24, 2


def write_images(directory):
    """A folder data set; the training split `(60, 16, 16, 3)` in [-1, 1]."""
    random, images = np.random.default_rng(0), []
    for split, count in COUNTS.items():
        for i in range(count):
            pixels = random.integers(0, 160, (SIDE, SIDE, 3))
            pixels[..., 2 - i % 3] += 80
            path = directory / split / CLASSES[i % 3] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            if split == "train":
                images.append(pixels)
    return np.stack(images).astype(np.float32) / 127.5 - 1


def write_models(directory):
    """`images`, `tokenizer` and `transformer`, the latter two as exports."""
    images = write_images(directory / "images")
    config = tiny.config_of_tiny_model(codebook_size=CODEBOOK, kmeans_init=True)
    config.model.resolution, config.model.channel_multipliers = SIDE, (1, 1, 1)
    config.data.name, config.data.threads = f"folder:{directory / 'images'}", 1
    variables = tiny.variables_with_centres(config, images)
    write_export(directory / "tokenizer", config, variables)
    own = transformer()
    own.tokenizer.path, own.data.name = str(directory / "tokenizer"), config.data.name
    params = random_params(own)
    tokenizers = {"tokenizer": (config, variables)}
    write_export(directory / "transformer", own, {"params": params}, tokenizers=tokenizers)


def transformer():
    """Its config, resolved."""
    config = transformer_config()
    config.model.update(dtype="float32", num_layers=BLOCKS, num_heads=2, width=16)
    config.model.positions, config.model.dropout = "learned_2d", 0.1
    config.model.codebook_size, config.model.grid = CODEBOOK, GRID
    config.condition.kinds, config.condition.dropout = ("class",), 0.1
    config.condition.num_classes, config.condition.class_names = 3, CLASSES
    return config


def random_params(config):
    """Large enough that every part has a say."""
    learner = Learner.from_config(config)
    shapes = jax.eval_shape(learner.init).params
    random = np.random.default_rng(1)

    def draw(path, leaf):
        values = random.standard_normal(leaf.shape) / math.sqrt(config.model.width)
        return jnp.asarray(values + (path[-1].key == "scale"), jnp.float32)

    return jax.tree.map_with_path(draw, shapes)
