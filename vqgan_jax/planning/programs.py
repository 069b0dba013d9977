"""The programs that a config's run would compile, without its data, weights and devices."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vqgan_jax.configuration import ConfigError, downsampling_factor
from vqgan_jax.data.images import prepare_images
from vqgan_jax.inference import Tokenizer
from vqgan_jax.models.transformer import cast_kernels
from vqgan_jax.sampling.decoding import CachedStep
from vqgan_jax.training.checkpoints import read_variables
from vqgan_jax.training.compilation import compile_options, compile_players, compile_update
from vqgan_jax.training.encoding import encode_raw
from vqgan_jax.training.game import Game
from vqgan_jax.training.learner import Learner
from vqgan_jax.training.objectives import uses_perceptual
from vqgan_jax.training.sharding import (
    batch_sharding,
    bytes_on_device,
    image_sharding,
    path_name,
    replicated,
    state_shardings,
    with_shardings,
)

DEVICE_BATCH = 32  # images a device, of programs that each device runs by itself


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program to compile.

    Attributes:
        name: what it does.
        lower: traces it, for `jax.stages.Lowered.compile`.
        images: that a run of it goes through, on all devices; parts of images when sampling.
        trains: whether it is a part of every training step; the others run by themselves.
        runs: of it in a training step.
        bytes_held: on a device, of what it is given, by kind.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    images: float
    trains: bool
    runs: float
    bytes_held: dict[str, int]


def planned_programs(config: ConfigDict, mesh: Mesh, tokenizer: ConfigDict | None) -> list[Planned]:
    """All that a run of a config compiles for a mesh.

    Args:
        config: of either stage; a transformer's as of `resolve`.
        mesh: of devices that may be elsewhere.
        tokenizer: of a transformer, its tokenizer's config; None: its codes are on disk.
    """
    if config.stage == "tokenizer":
        return [*_players(config, mesh), _encoding(config, mesh)]
    programs = [_update(config, mesh), _sampling(config, mesh)]
    return programs if tokenizer is None else [*programs, _encoding(tokenizer, mesh)]


def resolve(config: ConfigDict, tokenizer: ConfigDict | None) -> tuple[ConfigDict, ConfigDict]:
    """A transformer's config with what its tokenizer determines, and the tokenizer's config.

    The tokenizer at `config.tokenizer.path` where there is one already, or else `tokenizer`.

    Raises:
        ConfigError: it cannot be known how many codes or classes there are.
    """
    if config.tokenizer.path and pathlib.Path(config.tokenizer.path).exists():
        tokenizer, _, _ = read_variables(config.tokenizer.path)
    if tokenizer is None:
        raise ConfigError(
            f"There is no tokenizer at config.tokenizer.path {config.tokenizer.path} yet; name the "
            "config of the one that will be there: --tokenizer_config=configs/vqgan_f16.py."
        )
    config = config.copy_and_resolve_references()
    tokenizer = tokenizer.copy_and_resolve_references()
    resolution = config.tokenizer.resolution or tokenizer.model.resolution
    tokenizer.model.resolution = resolution
    config.model.codebook_size = tokenizer.model.quantizer.codebook_size
    config.model.grid = (resolution // downsampling_factor(tokenizer.model),) * 2
    condition = config.condition
    if "class" in condition.kinds and condition.num_classes == 0:
        raise ConfigError(
            "How many classes there are is not known before the data is: set "
            "--config.condition.num_classes=1000."
        )
    for name in condition.kinds:
        if name in condition.images and not condition.images[name].grid:
            raise ConfigError(
                f"The tokenizer of the condition {name} is not known: set "
                f"--config.condition.images.{name}.codebook_size and "
                f"--config.condition.images.{name}.grid."
            )
    return config, tokenizer


def planned_state(config: ConfigDict, mesh: Mesh) -> Any:
    """The state of a run of either stage: shapes and types with where each array lies."""
    if config.stage == "tokenizer":
        game = Game.from_config(config)
        shape = (config.training.batch_size, *_image_shape(config))
        abstract = jax.eval_shape(
            lambda images: game.init(prepare_images(config, images)),
            jax.ShapeDtypeStruct(shape, jnp.uint8),
        )
    else:
        abstract = jax.eval_shape(Learner.from_config(config).init)
    return with_shardings(abstract, state_shardings(abstract, config.sharding_rules, mesh))


def _layout(state):
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _rows(config: ConfigDict, mesh: Mesh) -> NamedSharding:
    size = config.training.batch_size // config.optimizer.accumulate
    return batch_sharding(mesh, size, "the micro-batch size")


def _images(config: ConfigDict, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A batch as it comes from the disk."""
    shape = (config.training.batch_size, *_image_shape(config))
    return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=_rows(config, mesh))


def _image_shape(config: ConfigDict) -> tuple[int, ...]:
    side = config.model.resolution
    return (side, side) if config.data.num_labels else (side, side, 3)


def _players(config: ConfigDict, mesh: Mesh) -> list[Planned]:
    game, images, whole = Game.from_config(config), _images(config, mesh), replicated(mesh)
    state = planned_state(config, mesh)
    perceptual = None
    if uses_perceptual(config.loss):
        pixels = jnp.zeros((1, 64, 64, 3))
        variables = jax.eval_shape(game.perceptual.init, jax.random.key(0), pixels, pixels)
        perceptual = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
            variables["params"],
        )
    update_generator, update_discriminator = compile_players(game, _layout(state), mesh)
    size, playing = config.training.batch_size, config.discriminator.enabled
    held = _held(state) | {"batch": bytes_on_device(images)}
    generator = Planned(
        "generator step",
        lambda: update_generator.lower(state, images, perceptual, playing=playing),
        size, True, 1.0, held | {"perceptual network": _bytes_held(perceptual)},
    )  # fmt: skip
    if not playing:
        return [generator]
    made = jax.ShapeDtypeStruct(
        (*images.shape[:3], config.model.out_channels), jnp.float32, sharding=image_sharding(mesh)
    )
    held["batch"] += bytes_on_device(made)
    lower = functools.partial(update_discriminator.lower, state, images, made, playing=True)
    # The update with R1 comes every so manyth time, the other one in between.
    share = 1 / config.discriminator.r1_interval if config.discriminator.r1 > 0 else 0.0
    variants = [("discriminator step", False, 1 - share), ("step with R1", True, share)]
    return [generator] + [
        Planned(name, functools.partial(lower, regularizing=r1), size, True, runs, held)
        for name, r1, runs in variants
        if runs
    ]


def _update(config: ConfigDict, mesh: Mesh) -> Planned:
    learner, state = Learner.from_config(config), planned_state(config, mesh)
    rows, size = _rows(config, mesh), config.training.batch_size
    batch = {"codes": ((math.prod(config.model.grid),), jnp.int32)}
    for kind in learner.conditions.kinds:
        name = "label" if kind.name == "class" else kind.name
        batch[name] = ((), jnp.int32) if name == "label" else ((math.prod(kind.shape),), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=rows)
        for name, (shape, dtype) in batch.items()
    }
    update = compile_update(learner, _layout(state), mesh)
    held = _held(state) | {"batch": _bytes_held(batch)}
    return Planned("transformer step", lambda: update.lower(state, batch), size, True, 1.0, held)


def _one_device(mesh: Mesh) -> NamedSharding:
    alone = Mesh(mesh.devices.reshape(-1)[:1], ("data",))
    return NamedSharding(alone, PartitionSpec())


def _encoding(config: ConfigDict, mesh: Mesh) -> Planned:
    """As `HostEncoder` and `Tokenizer` encode: each device by itself."""
    tokenizer, here = Tokenizer(config, None), _one_device(mesh)
    shape = (DEVICE_BATCH, *_image_shape(config))
    images = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=here)
    pixels = jax.ShapeDtypeStruct(shape[:3] + (config.model.in_channels,), jnp.float32)
    variables = jax.eval_shape(tokenizer.module.init, jax.random.key(0), pixels)
    variables = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), variables
    )
    encode = jax.jit(functools.partial(encode_raw, tokenizer), compiler_options=compile_options())
    return Planned(
        "tokenising",
        lambda: encode.lower(variables, images),
        DEVICE_BATCH * mesh.size, False, 0.0,
        {"parameters": _bytes_held(variables), "batch": bytes_on_device(images)},
    )  # fmt: skip


def _sampling(config: ConfigDict, mesh: Mesh) -> Planned:
    """One code of each sample, the last of the sequence; each device by itself."""
    learner, here = Learner.from_config(config), _one_device(mesh)
    transformer = learner.transformer
    length = learner.conditions.num_tokens + math.prod(config.model.grid) - 1

    def on_device(tree):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree
        )

    def prepared():
        step = CachedStep(transformer, cast_kernels(learner.init().params, transformer.dtype))
        conditions = jnp.zeros((DEVICE_BATCH, learner.conditions.num_tokens), jnp.int32)
        others = {name: own for name, own in step.params.items() if name != "blocks"}
        return others, step.layers, step.grown(step.prefill(conditions)[1], length)

    params, layers, cache = on_device(jax.eval_shape(prepared))
    codes = jax.ShapeDtypeStruct((DEVICE_BATCH,), jnp.int32, sharding=here)

    def one_step(params, layers, cache, codes, n):
        return CachedStep(transformer, params, layers)(cache, codes, n)

    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=here)
    return Planned(
        "sampling step",
        lambda: jax.jit(one_step, donate_argnums=2).lower(params, layers, cache, codes, number),
        DEVICE_BATCH * mesh.size / math.prod(config.model.grid), False, 0.0,
        {"parameters": _bytes_held((params, layers)), "cache": _bytes_held(cache)},
    )  # fmt: skip


def _held(state) -> dict[str, int]:
    """Bytes on a device, of each kind of a training state."""
    kinds = {"opt_state": "optimizer", "ema_params": "moving average", "params": "parameters"}
    held: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = path_name(path).split("/")
        kind = next((kinds[part] for part in name[:2] if part in kinds), "statistics")
        held[kind] = held.get(kind, 0) + bytes_on_device(leaf)
    return held


def _bytes_held(tree) -> int:
    return sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(tree))
