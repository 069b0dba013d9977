"""A tokenizer, images and their codes for runs of stage 2, and what such runs are started with."""

import dataclasses
import os
import pathlib

import jax
import numpy as np
from PIL import Image

import tiny
from vqgan_jax.inference.tokenize import tokenize
from vqgan_jax.training.checkpoints import write_export
from vqgan_jax.training.loop import train

CONFIG = pathlib.Path(__file__).with_name("tiny_transformer_config.py")
CLASSES = ("forest", "sea", "town")
COUNTS = {"train": 64, "validation": 11}
SIDE, GRID, CODEBOOK = 16, (4, 4), 24


def write_inputs(directory):
    """Images of three classes, an f4 tokenizer whose codes differ among them, and these codes."""
    images = write_images(directory / "images")
    export_tokenizer(directory / "tokenizer", images, seed=0)
    write_codes(directory, "codes", augmentations=["flip"])


def write_images(directory):
    """Smooth random images; those of the training split, `(64, 16, 16, 3)` in [-1, 1]."""
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for i in range(count):
            path = directory / split / CLASSES[i % 3] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8))
            small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
    return images_of(directory / "train")


def images_of(directory):
    """`(N, 16, 16, 3)` in [-1, 1], in the order of their paths."""
    pixels = [np.asarray(Image.open(path)) for path in sorted(directory.rglob("*.png"))]
    return np.stack(pixels) / np.float32(127.5) - 1


def export_tokenizer(directory, images, seed):
    """An untrained tokenizer, but with the k-means centres of its latents as codebook."""
    config = tiny.config_of_tiny_model(codebook_size=CODEBOOK, kmeans_init=True)
    config.model.resolution, config.model.channel_multipliers = SIDE, (1, 1, 1)
    variables = tiny.variables_with_centres(config, images, seed)
    write_export(directory, config, variables)


def write_codes(directory, name, **options):
    """What the command `tokenize` writes of the images."""
    dataset, splits = f"folder:{directory / 'images'}", list(COUNTS)
    tokenize(str(directory / "tokenizer"), directory / name, dataset, splits, **options)


def inputs_environment(directory):
    """What `tiny_transformer_config.py` reads from the environment."""
    return {"VQGAN_JAX_TEST_TRANSFORMER": str(directory)}


def tiny_config(dtype="float32", **sections):
    """The config, with keys of its sections changed: `training={"num_steps": 3}`."""
    from tiny_transformer_config import get_config

    config = get_config(dtype)
    for name, values in sections.items():
        config[name].update(values)
    return config


def from_images(config):
    """The same run without stored codes: as `tokenize` sees the images, without augmentation."""
    config.data.update(codes="", random_crop=False, random_flip=False)
    return config


def train_alone(config, workdir):
    """Trains on one device, in this process."""
    return train(config, workdir, jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Where things are."""

    directory: pathlib.Path

    @property
    def tokenizer(self):
        return self.directory / "tokenizer"

    @property
    def codes(self):
        return self.directory / "codes"

    @property
    def images(self):
        return self.directory / "images"


def assert_one_line(error):
    """An error's message as the terminal shows it, which must be one line."""
    message = str(error.value)
    assert message and "\n" not in message, message
    return message


def environment_of_processes(devices=1):
    """For processes that a test starts."""
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(CONFIG.parents[1]),
    }
