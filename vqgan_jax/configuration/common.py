"""What the configs of all stages share: sections, checks, the argument of a config file, JSON."""

import json
import re

import jax
from ml_collections import ConfigDict

from vqgan_jax.models.recomputation import POLICIES

MESH_AXES = ("data", "fsdp", "tensor", "spatial")
# For each parameter the first rule whose regex is found in its path: the mesh axes of its last
# dimensions, or one axis for the largest that it divides. What an axis does not divide stays whole.
SHARDING_RULES = (
    (r"/(bias|scale)$", ()),  # small
    (r"/quantize/", ()),  # all codes are compared with every latent
    (r"/(query|key|value|up|gate|hidden|conv1|head)/kernel$", ("fsdp", "tensor")),
    (r"/(out|down|conv2)/kernel$", ("tensor", "fsdp")),
    (r"/(kernel|embedding|position_embedding|positions)$", "fsdp"),
)


class ConfigError(ValueError):
    """A config value that cannot work; the message names the key and says what would."""


def base_config(stage: str) -> ConfigDict:
    """The sections that every stage has, with the reference's defaults."""
    config = ConfigDict()
    config.stage = stage
    config.seed = 0

    config.optimizer = ConfigDict(
        dict(
            learning_rate=0.0,  # 0 = base_learning_rate x batch_size, the reference's rule
            base_learning_rate=4.5e-6,
            b1=0.5,
            b2=0.9,
            eps=1e-8,
            weight_decay=0.0,
            clip_norm=0.0,  # 0 = no clipping
            first_moment="float32",  # "bfloat16" halves its memory
            schedule="constant",  # "constant", "cosine" or "exponential"
            warmup_steps=0,
            decay_start=0,  # the step from which the rate falls; 0 = after the warm-up
            end_factor=0.0,  # cosine and exponential end at this share of the peak
            ema_decay=0.0,  # of the generator's parameters; 0 = none kept
            accumulate=1,  # micro-batches an update
        )
    )

    config.data = ConfigDict(
        dict(
            name="earth",  # "earth", "folder:PATH" or a tensorflow-datasets name
            data_dir="",  # empty = $VQGAN_JAX_DATA or ~/.cache/vqgan_jax
            train_split="train",
            validation_split="validation",
            image_key="image",
            num_labels=0,  # above 0: image_key holds a label map, made one-hot
            resize=0,  # shorter side before the crop; 0 = the resolution, -1 = as it is
            random_crop=True,  # training; evaluation takes the centre
            random_flip=True,
            threads=8,
            processes=0,  # above 0: decode in that many worker processes
            prefetch=2,  # batches ready on the device
        )
    )

    config.training = ConfigDict(
        dict(
            batch_size=12,  # images an update, on all devices together
            num_steps=1_000_000,
            log_every=50,
            evaluate_every=5_000,
            checkpoint_every=5_000,
            keep_latest=2,
            keep_best=1,
            best_metric="lpips",  # lower is better; of the evaluation's figures
            evaluation_images=0,  # 0 = the whole validation split
            grid_images=8,
            initialize_from="",  # an export or run whose weights a new run starts from
            wandb_project="",
        )
    )

    config.mesh = ConfigDict(  # devices along each axis; -1 = those that are left
        dict(
            data=-1,  # each has its images and all parameters
            fsdp=1,  # each has its images and its share of the parameters
            tensor=1,  # each has its share of the channels, of the same images
            spatial=1,  # each has its rows of pixels, of the same images; tokenizers only
        )
    )
    config.sharding_rules = SHARDING_RULES  # of (regex of a parameter's path, its axes)
    return config


def parse_argument(argument: str, **defaults) -> ConfigDict:
    """The argument of a config file, `--config=FILE:ARGUMENT`, as `KEY=VALUE,KEY=VALUE`.

    The first one may be a data set alone: `earth` is `data=earth`, and `folder=PATH` is
    `data=folder:PATH`. Values take the type of their default.

    Raises:
        ConfigError: a key is unknown or a value has another type.
    """
    parsed = dict(defaults)
    for i, part in enumerate(filter(None, argument.split(","))):
        key, equals, value = part.partition("=")
        if key == "folder" and equals:
            key, value = "data", f"folder:{value}"
        elif i == 0 and not equals:
            key, value = "data", part
        if key not in defaults:
            raise ConfigError(
                f"the config's argument {part!r} is unknown; it takes "
                f"{', '.join(f'{name}={default}' for name, default in defaults.items())}."
            )
        try:
            parsed[key] = type(defaults[key])(value)
        except ValueError:
            raise ConfigError(
                f"the config's argument {part!r} needs a value like {defaults[key]!r}."
            ) from None
    return ConfigDict(parsed)


def to_json(config: ConfigDict) -> str:
    """The resolved config as JSON, as it stands in every checkpoint and export."""
    return json.dumps(config.to_dict(), indent=2, default=list)


def tuples(value):
    """JSON's lists as the tuples that configs have."""
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(tuples(item) for item in value)
    return value


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with the message where the condition does not hold."""
    if not condition:
        raise ConfigError(message)


def one_of(config: ConfigDict, path: str, *choices: str) -> None:
    """Raises `ConfigError` where the key has another value."""
    value = value_at(config, path)
    require(
        value in choices, f"config.{path} is {value!r}; it must be one of {', '.join(choices)}."
    )


def value_at(config: ConfigDict, path: str):
    """The value of a key that is written with dots."""
    for key in path.split("."):
        config = config[key]
    return config


def positive(config: ConfigDict, *paths: str) -> None:
    """Raises `ConfigError` where one of the keys is not above 0."""
    for path in paths:
        value = value_at(config, path)
        require(value > 0, f"config.{path} is {value}; it must be positive.")


def _validate_mesh(config: ConfigDict) -> None:
    """Checks of the mesh's axes and of the rules that name them."""
    for axis, size in config.mesh.items():
        require(
            size == -1 or size > 0,
            f"config.mesh.{axis} is {size}; it must be a number of devices, or -1 for the rest.",
        )
    for rule in config.sharding_rules:
        require(
            isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str),
            f"config.sharding_rules has {rule!r}; a rule is a pattern and its axes, as in "
            "(('kernel$', ('fsdp', 'tensor')),).",
        )
        try:
            re.compile(rule[0])
        except re.error as error:
            raise ConfigError(
                f"config.sharding_rules: {rule[0]!r} is no pattern: {error}."
            ) from None
        named = [axis for axis in ([rule[1]] if isinstance(rule[1], str) else rule[1]) if axis]
        require(
            all(axis in MESH_AXES for axis in named) and len(set(named)) == len(named),
            f"config.sharding_rules has {rule!r}; axes are {', '.join(MESH_AXES)}, each once.",
        )


def validate_base(config: ConfigDict) -> None:
    """Checks of what every stage has."""
    _validate_mesh(config)
    one_of(config, "model.dtype", "auto", "float32", "bfloat16", "float64")
    require(
        config.model.dtype != "float64" or jax.config.jax_enable_x64,
        "config.model.dtype is float64, which JAX computes only with JAX_ENABLE_X64=1 in the "
        "environment.",
    )
    one_of(config, "model.remat_keeps", *POLICIES)
    one_of(config, "optimizer.schedule", "constant", "cosine", "exponential")
    one_of(config, "optimizer.first_moment", "float32", "bfloat16")
    optimizer = config.optimizer
    require(
        optimizer.schedule != "exponential" or optimizer.end_factor > 0,
        f"config.optimizer.end_factor is {optimizer.end_factor}; the exponential schedule needs "
        "the share of the peak that it ends at, above 0.",
    )
    require(
        optimizer.decay_start == 0 or optimizer.decay_start >= optimizer.warmup_steps,
        f"config.optimizer.decay_start is {optimizer.decay_start}, before the end of the warm-up, "
        f"config.optimizer.warmup_steps {optimizer.warmup_steps}.",
    )
    names = ("batch_size", "num_steps", "log_every", "evaluate_every", "checkpoint_every")
    names += ("keep_latest", "grid_images")
    positive(config, "optimizer.accumulate", *(f"training.{name}" for name in names))
    batch_size, accumulate = config.training.batch_size, config.optimizer.accumulate
    require(
        batch_size % accumulate == 0,
        f"config.training.batch_size {batch_size} is not divisible by "
        f"config.optimizer.accumulate {accumulate}.",
    )
