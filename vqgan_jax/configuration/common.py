"""What the configs of all stages share: sections, checks, the argument of a config file, JSON."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vqgan_jax.configuration.ranges import Number, defaults, number, numbers, share

DTYPES = ("auto", "float32", "bfloat16", "float64")
MOST_STEPS = 10**12
MOST_PIXELS = 2**17  # along a side
MOST_CHANNELS = 2**16
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


def base_sections(stage: str) -> dict[str, Any]:
    """The sections that every stage has, with the reference's defaults and ranges."""
    return dict(
        stage=stage,
        seed=number(0, -(2**63), 2**63 - 1),
        optimizer=dict(
            # 0 = base_learning_rate x batch_size, the reference's rule
            learning_rate=number(0.0, 0, 1e38),
            base_learning_rate=number(4.5e-6, 0, 1e3),
            b1=share(0.5, below=True),
            b2=share(0.9, below=True),
            eps=number(1e-8, 0, 1, above=True),
            weight_decay=number(0.0, 0, 1e3),
            clip_norm=number(0.0, 0, 1e9),  # 0 = no clipping
            first_moment="float32",  # "bfloat16" halves its memory
            schedule="constant",  # "constant", "cosine" or "exponential"
            warmup_steps=number(0, 0, MOST_STEPS),
            # The step from which the rate falls; 0 = after the warm-up
            decay_start=number(0, 0, MOST_STEPS),
            end_factor=share(0.0),  # cosine and exponential end at this share of the peak
            ema_decay=share(0.0, below=True),  # of the generator's parameters; 0 = none kept
            accumulate=number(1, 1, 2**20),  # micro-batches an update
        ),
        data=dict(
            name="earth",  # "earth", a folder or a tensorflow-datasets name
            data_dir="",  # empty = $VQGAN_JAX_DATA or ~/.cache/vqgan_jax
            train_split="train",
            validation_split="validation",
            image_key="image",
            # Which folders are splits, see `data.splits`; 1 = as in older runs
            folder_rules=number(3, 1, 3),
            # An image of more is refused before it is decoded
            max_pixels=number(300_000_000, 1, 10**11),
            # Of pictures in 32-bit integers or floats, what is black and white; (0, 0) = 0 to 65535
            # for integers and 0 to 1 for floats. 16 bits are divided by 257.
            grey_range=numbers((0.0, 0.0), -1e30, 1e30, length=(2, 2)),
            # Above 0: image_key holds a label map, made one-hot
            num_labels=number(0, 0, 2**16),
            # Shorter side before the crop; 0 = the resolution, -1 = as it is
            resize=number(0, -1, MOST_PIXELS),
            random_crop=True,  # training; evaluation takes the centre
            random_flip=True,
            threads=number(8, 1, 1024),
            processes=number(0, 0, 1024),  # above 0: decode in that many worker processes
            prefetch=number(2, 1, 1024),  # batches ready on the device
        ),
        training=dict(
            batch_size=number(12, 1, 2**24),  # images an update, on all devices together
            num_steps=number(1_000_000, 1, MOST_STEPS),
            log_every=number(50, 1, MOST_STEPS),
            evaluate_every=number(5_000, 1, MOST_STEPS),
            checkpoint_every=number(5_000, 1, MOST_STEPS),
            keep_latest=number(2, 1, 10**6),
            keep_best=number(1, 0, 10**6),
            best_metric="lpips",  # lower is better; of the evaluation's figures
            evaluation_images=number(0, 0, 10**12),  # 0 = the whole validation split
            pictures_every=number(0, 0, MOST_STEPS),  # steps; 0 = at evaluations only
            grid_images=number(8, 1, 4096),
            initialize_from="",  # an export or run whose weights a new run starts from
            wandb_project="",
        ),
        mesh=dict(  # devices along each axis; -1 = those that are left
            data=number(-1, -1, 2**20),  # each has its images and all parameters
            fsdp=number(1, -1, 2**20),  # each has its images and its share of the parameters
            # Each has its share of the channels, of the same images
            tensor=number(1, -1, 2**20),
            # Each has its rows of pixels, of the same images; tokenizers only
            spatial=number(1, -1, 2**20),
        ),
        sharding_rules=SHARDING_RULES,  # of (regex of a parameter's path, its axes)
    )


def make_config(sections: Mapping[str, Any]) -> ConfigDict:
    """Sections with ranges as a typed and locked config of their defaults."""
    return ConfigDict(defaults(sections)).lock()


def parse_argument(argument: str, **defaults) -> ConfigDict:
    """The argument of a config file, `--config=FILE:ARGUMENT`, as `KEY=VALUE,KEY=VALUE`.

    The first one may be a data set alone: `earth` is `data=earth`, and `folder=PATH` is
    `data=folder:PATH`. Values take the type of their default; one with commas is quoted.

    Raises:
        ConfigError: a key is unknown or a value has another type.
    """
    parsed = dict(defaults)
    # A quoted value may have commas.
    parts = re.findall(r"""(?:[^,'"]|'[^']*'|"[^"]*"|['"])+""", argument)
    for i, part in enumerate(parts):
        key, equals, value = part.partition("=")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        if key == "folder" and equals:
            key, value = "data", f"folder:{value}"
        elif i == 0 and not equals:
            key, value = "data", part
        if key not in defaults:
            comma = ""
            if i > 0:
                comma = " Quote a path that has a comma, as in \"folder='a,b'\"."
            raise ConfigError(
                f"the config's argument {part!r} is unknown; it takes "
                f"{', '.join(f'{name}={default}' for name, default in defaults.items())}.{comma}"
            )
        try:
            parsed[key] = type(defaults[key])(value)
        except ValueError:
            raise ConfigError(
                f"the config's argument {part!r} needs a value like {defaults[key]!r}."
            ) from None
    return ConfigDict(parsed)


def dataset_name(text: str) -> str:
    """A data set as configs store it: what a person wrote, with `folder:` in front of a path.

    A path is what begins as one (`/`, `./`, `../`, `~`), ends in `/`, or is a folder that there is;
    `earth` and what else has no such form is a name.
    """
    if text.startswith("folder:") or text == "earth":
        return text
    is_path = text.startswith(("/", "./", "../", "~")) or text.endswith("/") or os.path.isdir(text)
    return f"folder:{text}" if is_path else text


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


def check_ranges(config: ConfigDict, ranges: Mapping[str, Number]) -> None:
    """Raises `ConfigError` where a number is out of its range, infinite or not a number."""
    for path, known in ranges.items():
        value = value_at(config, path)
        problem = known.problem(value)
        require(problem is None, f"config.{path} is {shortened(value)}; {problem}.")


def check_paths(config: ConfigDict, *paths: str) -> None:
    """Raises `ConfigError` where a path has a `~user` that does not exist."""
    for path in paths:
        value = value_at(config, path)
        require(
            not os.path.expanduser(value).startswith("~"),
            f"config.{path} is {value!r}; there is no user of that name.",
        )


def shortened(value: Any) -> str:
    """A value for a message."""
    text = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _validate_mesh(config: ConfigDict) -> None:
    """Checks of the mesh's axes and of the rules that name them."""
    for axis, size in config.mesh.items():
        require(
            size != 0,
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
    import jax  # a command's --help need not wait for it

    from vqgan_jax.models.recomputation import POLICIES

    _validate_mesh(config)
    one_of(config, "model.dtype", *DTYPES)
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
    check_paths(config, "data.data_dir", "training.initialize_from")
    folder = config.data.name.removeprefix("folder:")
    require(
        folder == config.data.name or bool(folder),
        "config.data.name is 'folder:', without a path behind it.",
    )
    require(bool(config.data.name), "config.data.name is empty; it names the images.")
    batch_size, accumulate = config.training.batch_size, config.optimizer.accumulate
    require(
        batch_size % accumulate == 0,
        f"config.training.batch_size {batch_size} is not divisible by "
        f"config.optimizer.accumulate {accumulate}.",
    )
