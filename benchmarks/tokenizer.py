"""Seconds per image of a tokenizer's training step, of encoding and of decoding.

    python benchmarks/tokenizer.py CASE... [--peer] [--repeats=N]

Prints one line of JSON a case. The training step is that of both players with the adversarial game
on, LPIPS on VGG16 and both Adam updates, by the very functions that training runs. `--peer` times
the PyTorch reference on the same images and weights in the same run, its blocks and ours in turn,
so that what else the machine does falls on both; a ratio is the reference's time over ours. Times
are medians over the repeats. Images and weights are random: they do not change the work.
"""

import argparse
import sys

import jax
import numpy as np
from ml_collections import ConfigDict

from comparison import compare, print_line
from taming_reference import MissingPackages, TamingReference
from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.inference import Tokenizer
from vqgan_jax.interop.taming import state_dict_from_variables
from vqgan_jax.training.compilation import compile_players
from vqgan_jax.training.game import Game
from vqgan_jax.training.sharding import batch_sharding, make_mesh, replicated, state_shardings

CASES = {
    "f4-64": dict(
        resolution=64,
        channels=32,
        channel_multipliers=(1, 2, 2),
        attention_resolutions=(16,),
        codebook_size=512,
        code_dim=32,
        batch_size=16,
    ),
    "f8-64": dict(
        resolution=64,
        channels=64,
        channel_multipliers=(1, 1, 2, 2),
        attention_resolutions=(8,),
        codebook_size=1024,
        code_dim=64,
        batch_size=8,
    ),
    "f16-256": dict(
        resolution=256,
        channels=128,
        channel_multipliers=(1, 1, 2, 2, 4),
        attention_resolutions=(16,),
        codebook_size=1024,
        code_dim=256,
        batch_size=1,
    ),
}
KINDS = ("train", "encode", "decode")


def case_config(name: str) -> ConfigDict:
    """The config of a case; the adversarial game is on from the first step."""
    case = dict(CASES[name])
    config = tokenizer_config()
    config.training.batch_size = case.pop("batch_size")
    for key in ("codebook_size", "code_dim"):
        config.model.quantizer[key] = case.pop(key)
    config.model.latent_channels = config.model.quantizer.code_dim
    config.model.update(case)
    config.discriminator.start = 0
    return config


class Ours:
    """What is timed of this package on given images."""

    def __init__(self, config: ConfigDict, images: np.ndarray):
        game = Game.from_config(config)
        mesh = make_mesh(config.mesh)
        rows, whole = batch_sharding(mesh, len(images)), replicated(mesh)
        layout = state_shardings(jax.eval_shape(game.init, images), (), mesh)
        self.steps = compile_players(game, layout, mesh)
        self.images = jax.device_put(images, rows)
        self.perceptual = jax.device_put(random_lpips(game, images), whole)
        self.state = jax.jit(game.init, out_shardings=layout)(self.images)
        generator, discriminator = self.state.generator, self.state.discriminator
        variables = jax.device_get(generator.inference_variables)
        opponent = {"params": discriminator.params, "batch_stats": discriminator.batch_stats}
        self.state_dict = state_dict_from_variables(variables, config, jax.device_get(opponent))
        self.tokenizer = Tokenizer(config, jax.device_put(variables))
        self.codes = self.tokenizer.encode(images)

    def train(self) -> None:
        """One step of both players."""
        update_generator, update_discriminator = self.steps
        self.state, _, reconstructions = update_generator(
            self.state, self.images, self.perceptual, playing=True
        )
        self.state, metrics = update_discriminator(
            self.state, self.images, reconstructions, playing=True
        )
        jax.block_until_ready((self.state, metrics))

    def encode(self) -> None:
        """Images to codes."""
        jax.block_until_ready(self.tokenizer.encode(self.images))

    def decode(self) -> None:
        """Codes to images."""
        jax.block_until_ready(self.tokenizer.decode(self.codes))


def random_lpips(game: Game, images: np.ndarray) -> dict:
    """LPIPS weights of the right shapes, at a scale that keeps activations near 1."""
    shapes = jax.eval_shape(game.perceptual.init, jax.random.key(0), images[:1], images[:1])
    random = np.random.default_rng(0)

    def draw(leaf):
        values = random.standard_normal(leaf.shape, np.float32)
        if leaf.ndim == 1:  # biases, and heads, which are never negative
            return 0.01 * np.abs(values)
        return values * np.sqrt(2.0 / np.prod(leaf.shape[:-1]), dtype=np.float32)

    return jax.tree.map(draw, shapes["params"])


def measure(name: str, peer: bool, repeats: int) -> dict:
    """The figures of a case; `MissingPackages` where the peer is asked for and not installed."""
    config = case_config(name)
    batch, size = config.training.batch_size, config.model.resolution
    images = np.random.default_rng(0).uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)
    ours = Ours(config, images)
    contestants = {"": ours}
    if peer:
        rate = config.optimizer.base_learning_rate * batch
        contestants["peer_"] = TamingReference(config.model, ours.state_dict, images, rate)
    figures = {"case": name, "batch": batch}
    return figures | compare(contestants, KINDS, batch, "image", repeats)


def main() -> None:
    """Prints the figures of the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--peer", action="store_true", help="time the PyTorch reference too")
    parser.add_argument("--repeats", type=int, default=7, help="blocks a figure (default 7)")
    arguments = parser.parse_args()
    for name in arguments.cases:
        try:
            figures = measure(name, arguments.peer, arguments.repeats)
        except MissingPackages as error:
            sys.exit(f"error: {error}")
        print_line(figures)


if __name__ == "__main__":
    main()
