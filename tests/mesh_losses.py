"""Ten steps of both stages on several meshes, as one of one or several processes.

    python tests/mesh_losses.py OUTPUT RUN...

A run is written `CONFIG:data,fsdp,tensor,spatial`, the config by its name here, the last axes
left out where they are 1. Process 0 writes the metrics of every step to OUTPUT, and behind them
the sizes of all arrays of the last state, as JSON by run. The environment is that of
`training_runs.start` and of the tiny configs.
"""

import collections
import contextlib
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

import tiny_config
import tiny_transformer_config
from vqgan_jax import distributed
from vqgan_jax.training.loop import make_stage
from vqgan_jax.training.sharding import AXES, make_mesh, path_name

STEPS = 10


def tokenizer(**discriminator):
    """With what its discriminator has otherwise."""
    config = tiny_config.get_config("float64")
    config.training.num_steps = STEPS
    config.discriminator.update(discriminator)
    return config


def ema_and_act_norm():
    """What depends on the whole batch: statistics of codes and of the first images."""
    config = tokenizer(norm="act", lecam=0.1)
    config.model.quantizer.update(kind="ema", kmeans_init=True, restart_below=0.95)
    config.optimizer.ema_decay = 0.99
    return config


def gumbel_and_perceptual():
    """What is drawn at random for each image, and LPIPS, for a few steps of larger images."""
    config = tokenizer(norm="group", refresh_reconstruction=True)
    config.model.update(resolution=32, dropout=0.1)
    config.model.quantizer.kind = "gumbel"
    config.loss.perceptual = 1.0
    config.training.num_steps = 3
    return config


def transformer():
    """With classes that are left out, dropout and corrupted codes."""
    config = tiny_transformer_config.get_config("float64")
    config.training.num_steps = STEPS
    return config


def metrics_on(config, mesh, workdir, first):
    """The metrics of every step on a mesh of all devices, and the last state's sizes.

    The first state is born on the first mesh of a config and kept in `first`: to be compiled takes
    it as long as both steps, and on the other meshes it is the same.
    """
    config.mesh.update(dict(zip(AXES, mesh, strict=False)))
    stage = make_stage(config, make_mesh(config.mesh), workdir)
    with contextlib.closing(stage.batches(0)) as batches:
        batch, found = next(batches), []
        if not first:
            first.append(multihost_utils.process_allgather(stage.init(batch), tiled=True))
        state = jax.device_put(first[0], stage.layout)
        for step in range(config.training.num_steps):
            state, metrics = stage.update(state, batch, step)
            found.append({name: float(value) for name, value in metrics.items()})
            batch = next(batches)
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    names = [path_name(path) for path, _ in flat]
    sizes = jax.jit(lambda leaves: jnp.stack([jnp.linalg.norm(x.ravel()) for x in leaves]))
    arrays = [leaf.astype(jnp.float64) for _, leaf in flat]
    return [*found, dict(zip(names, map(float, sizes(arrays)), strict=True))]


def main(output, *wanted):
    """Writes what the wanted runs give."""
    distributed.join()
    found, first = {}, collections.defaultdict(list)
    for run in wanted:
        name, _, mesh = run.partition(":")
        with tempfile.TemporaryDirectory() as workdir:
            sizes = tuple(map(int, mesh.split(",")))
            workdir = pathlib.Path(workdir)
            found[run] = metrics_on(globals()[name](), sizes, workdir, first[name])
    if jax.process_index() == 0:
        pathlib.Path(output).write_text(json.dumps(found))
    distributed.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
