"""Seconds to draw a large grid of codes, row by row and as a wavefront, at batch 1.

    python benchmarks/sliding_window.py [--height=64] [--width=128] [--steps=32]

Prints one line of JSON: for 6 layers of width 256 with 4 heads over 1,024 codes, with a class in
front and a window of 16x16 codes. A few steps in the middle of the grid are timed, where all rows
that can be in flight are, and multiplied by the number of steps; `speed_up` is row by row over
wavefront. Weights are random: they do not change the work.
"""

import argparse
import functools
import json
import time

import jax
import numpy as np

from vqgan_jax.configuration import transformer_config
from vqgan_jax.sampling.filters import Filters
from vqgan_jax.sampling.sliding_window import num_steps, sample_steps
from vqgan_jax.training.learner import Learner

CODES, WINDOW, LAYERS, HEADS, WIDTH = 1024, 16, 6, 4, 256


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=64, help="rows of codes (default 64)")
    parser.add_argument("--width", type=int, default=128, help="columns of codes (default 128)")
    parser.add_argument("--steps", type=int, default=32, help="steps that are timed (default 32)")
    arguments = parser.parse_args()
    height, width = arguments.height, arguments.width

    config = transformer_config()
    config.model.update(
        codebook_size=CODES, grid=(WINDOW,) * 2, num_layers=LAYERS, num_heads=HEADS, width=WIDTH
    )
    learner = Learner.from_config(config)
    params = jax.jit(learner.init)().params
    conditions = [np.zeros((1, 1), np.int32)]
    codes, free = np.zeros((1, height, width), np.int32), np.zeros((1, height, width), bool)
    filters, key, numbers = Filters(top_k=100), jax.random.key(0), np.arange(1)

    figures = {"grid": [height, width]}
    for name, lag in (("rows", width), ("wavefront", WINDOW)):
        advance = jax.jit(functools.partial(sample_steps, learner.transformer, lag=lag))
        steps = num_steps(height, width, lag)

        def timed(first, count, advance=advance):
            start = time.perf_counter()
            jax.block_until_ready(
                advance(params, conditions, key, numbers, filters, codes, free, first, count)
            )
            return time.perf_counter() - start

        middle = steps // 2
        timed(middle, 1)
        seconds = sorted(timed(middle, arguments.steps) for _ in range(3))[1] / arguments.steps
        figures[name] = {"steps": steps, "s_per_step": seconds, "s": seconds * steps}
    figures["speed_up"] = figures["rows"]["s"] / figures["wavefront"]["s"]
    print(json.dumps(jax.tree.map(lambda x: round(x, 4), figures)))


if __name__ == "__main__":
    main()
