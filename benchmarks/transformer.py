"""Seconds per sequence of a transformer's training step and of sampling 256 codes.

    python benchmarks/transformer.py [--peer] [--repeats=N]

Prints one line of JSON: for 12 layers of width 512 with 8 heads over 1,024 codes, batch 8, sampling
with top-k 100, by the very functions that training and `Generator` run. `--peer` times the PyTorch
reference with the same weights in the same run, in turns with ours; a ratio is the reference's time
over ours. Times are medians over the repeats. Weights and codes are random: they do not change the
work.
"""

import argparse
import functools
import sys

import jax
import numpy as np

from comparison import compare, print_line
from taming_reference import MissingPackages, TamingTransformer
from vqgan_jax.configuration import transformer_config
from vqgan_jax.interop.taming_gpt import state_dict_from_gpt_params
from vqgan_jax.sampling.decoding import sample_codes
from vqgan_jax.sampling.filters import Filters
from vqgan_jax.training.learner import Learner
from vqgan_jax.training.transformer_step import transformer_step

BATCH, LENGTH, CODES, TOP_K = 8, 256, 1024, 100
LAYERS, HEADS, WIDTH = 12, 8, 512


class Ours:
    """What is timed of this package on given codes."""

    def __init__(self, codes: np.ndarray):
        config = transformer_config()
        config.model.update(
            codebook_size=CODES,
            grid=(16, 16),
            num_layers=LAYERS,
            num_heads=HEADS,
            width=WIDTH,
            unroll=LAYERS,
        )
        config.condition.own_table = False
        config.training.batch_size = BATCH
        learner = Learner.from_config(config)
        self.state = jax.jit(learner.init)()
        self.state_dict = state_dict_from_gpt_params(jax.device_get(self.state.params))
        self.update = jax.jit(functools.partial(transformer_step, learner), donate_argnums=0)
        self.draw = jax.jit(functools.partial(sample_codes, learner.transformer))
        self.codes = jax.device_put(codes)
        self.params = jax.tree.map(lambda leaf: leaf.copy(), self.state.params)
        self.seed = 0

    def train(self) -> None:
        """One update."""
        self.state, metrics = self.update(self.state, {"codes": self.codes})
        jax.block_until_ready((self.state, metrics))

    def sample(self) -> None:
        """All codes of each row."""
        self.seed += 1
        start = np.zeros((BATCH, 1), np.int32)
        free = np.zeros(self.codes.shape, bool)
        key = jax.random.key(self.seed)
        filters = Filters(top_k=TOP_K)
        numbers = np.arange(BATCH)
        jax.block_until_ready(
            self.draw(self.params, start, key, numbers, filters, self.codes, free)
        )


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="store_true", help="time the PyTorch reference too")
    parser.add_argument("--repeats", type=int, default=5, help="blocks a figure (default 5)")
    arguments = parser.parse_args()
    codes = np.random.default_rng(0).integers(0, CODES, (BATCH, LENGTH)).astype(np.int32)
    ours = Ours(codes)
    contestants = {"": ours}
    if arguments.peer:
        shape = dict(
            vocab_size=CODES, block_size=LENGTH, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH
        )
        try:
            contestants["peer_"] = TamingTransformer(shape, ours.state_dict, codes, TOP_K)
        except MissingPackages as error:
            sys.exit(f"error: {error}")
    case = {"case": f"{LAYERS}x{WIDTH}", "batch": BATCH}
    kinds = ("train", "sample")
    print_line(case | compare(contestants, kinds, BATCH, "sequence", arguments.repeats))


if __name__ == "__main__":
    main()
