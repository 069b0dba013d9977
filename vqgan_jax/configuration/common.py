"""The keys of every config, their defaults and their checks.

A file in `configs/` starts from `tokenizer_config()` and changes what its experiment needs. The
config is locked and typed, so a misspelt key or an ill-typed value is an error that names the key.
"""

import json

import jax
from ml_collections import ConfigDict


class ConfigError(ValueError):
    """A config value that cannot work; the message names the key and says what would."""


def tokenizer_config() -> ConfigDict:
    """The VQGAN f16 of "Taming Transformers" (Esser et al. 2021), without a data set's choices."""
    config = ConfigDict()
    config.stage = "tokenizer"
    config.seed = 0

    config.model = ConfigDict(
        dict(
            dtype="auto",  # of the computation: "float32", "bfloat16", "float64"; auto = by backend
            resolution=256,  # nominal; attention_resolutions refer to it, other sizes work too
            in_channels=3,
            out_channels=3,
            channels=128,
            channel_multipliers=(1, 1, 2, 2, 4),  # one level each; factor = 2^(levels - 1)
            num_res_blocks=2,  # a level of the encoder; the decoder has one more
            attention_resolutions=(16,),
            latent_channels=256,
            num_groups=32,  # of GroupNorm; below 128 channels fewer keep colours better
            dropout=0.0,
            remat=False,  # recompute residual blocks in the backward pass: less memory, more time
        )
    )
    config.model.quantizer = ConfigDict(
        dict(
            kind="nearest",  # "nearest", "ema" or "gumbel"
            codebook_size=1024,
            code_dim=256,  # below latent_channels: low-dimensional projection by the 1x1 convs
            l2_normalize=False,  # cosine distance (ViT-VQGAN); for "nearest" and "ema"
            kmeans_init=False,  # start the codebook at the k-means centres of the first batch
            ema_decay=0.99,  # "ema" only
            restart_below=0.0,  # "ema" only: a code used less per batch (EMA) starts again; 0 = off
        )
    )

    config.loss = ConfigDict(
        dict(
            l1=1.0,
            l2=0.0,
            perceptual=1.0,
            binary_cross_entropy=0.0,  # for label maps; instead of all of the above
            codebook=1.0,  # weight of the whole quantisation loss
            commitment=0.25,  # beta, equation 4 of the paper
            legacy_codebook=True,  # the reference's form: beta on the codebook term instead
            kl=1e-8,  # "gumbel" only: weight of the divergence from uniform code use
        )
    )
    config.loss.perceptual_network = ConfigDict(
        dict(
            backbone="vgg16",  # "vgg16" or "alexnet"
            path="",  # a weights file of your own; empty = the published LPIPS v0.1 weights
            sha256="",  # of the file at `path`; required with it
            dropout=False,  # the reference trains with the heads' dropout active, by accident
        )
    )
    config.temperature = ConfigDict(  # of the Gumbel-softmax; linear warm-up, then cosine
        dict(warmup_steps=0, decay_steps=1_000_001, start=0.9, peak=0.9, end=1e-6)
    )

    config.discriminator = ConfigDict(
        dict(
            enabled=True,
            channels=64,
            num_layers=3,
            norm="batch",  # "batch", "act" or "group"
            loss="hinge",  # "hinge", "vanilla" or "non_saturating"
            weight=0.8,  # of the generator's term, times the adaptive weight
            factor=1.0,  # of both players' terms
            start=250_001,  # generator steps before the adversarial game begins
            warmup_steps=0,  # linear ramp of the terms after `start`
            adaptive_weight=True,
            adaptive_delta=1e-4,  # the reference's; the paper writes 1e-6
            adaptive_max=1e4,
            lecam=0.0,  # weight of the LeCam regularisation
            lecam_decay=0.999,
            refresh_reconstruction=False,  # the reference's order: one more forward pass
        )
    )

    config.optimizer = ConfigDict(
        dict(
            learning_rate=0.0,  # 0 = base_learning_rate x batch_size, the reference's rule
            base_learning_rate=4.5e-6,
            discriminator_learning_rate=0.0,  # 0 = the generator's
            b1=0.5,
            b2=0.9,
            eps=1e-8,
            weight_decay=0.0,
            clip_norm=0.0,  # 0 = no clipping
            schedule="constant",  # "constant" or "cosine"
            warmup_steps=0,
            end_factor=0.0,  # cosine ends at this share of the peak
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

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1 = the devices that are left
    config.sharding_rules = ()  # of (regex of a parameter's path, axes of its dimensions)
    return config.lock()


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


def downsampling_factor(model: ConfigDict) -> int:
    """Pixels a code in each direction: f in "f16"."""
    return 2 ** (len(model.channel_multipliers) - 1)


def to_json(config: ConfigDict) -> str:
    """The resolved config as JSON, as it stands in every checkpoint and export."""
    return json.dumps(config.to_dict(), indent=2, default=list)


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote, with today's defaults for keys that are newer."""
    config = tokenizer_config()
    with config.unlocked():
        config.update(_tuples(json.loads(text)))
    return config


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(config: ConfigDict, path: str, *choices: str) -> None:
    value = _value_at(config, path)
    _require(
        value in choices, f"config.{path} is {value!r}; it must be one of {', '.join(choices)}."
    )


def _value_at(config: ConfigDict, path: str):
    for key in path.split("."):
        config = config[key]
    return config


_POSITIVE = (
    "model.resolution",
    "model.channels",
    "model.latent_channels",
    "model.num_groups",
    "model.quantizer.codebook_size",
    "model.quantizer.code_dim",
    "optimizer.accumulate",
    "training.batch_size",
    "training.num_steps",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.keep_latest",
    "training.grid_images",
)


def validate(config: ConfigDict) -> None:
    """Raises `ConfigError` for values that cannot work, before anything compiles."""
    _one_of(config, "model.quantizer.kind", "nearest", "ema", "gumbel")
    _one_of(config, "model.dtype", "auto", "float32", "bfloat16", "float64")
    _require(
        config.model.dtype != "float64" or jax.config.jax_enable_x64,
        "config.model.dtype is float64, which JAX computes only with JAX_ENABLE_X64=1 in the "
        "environment.",
    )
    _one_of(config, "discriminator.norm", "batch", "act", "group")
    _one_of(config, "discriminator.loss", "hinge", "vanilla", "non_saturating")
    _one_of(config, "loss.perceptual_network.backbone", "vgg16", "alexnet")
    _one_of(config, "optimizer.schedule", "constant", "cosine")
    for path in _POSITIVE:
        value = _value_at(config, path)
        _require(value > 0, f"config.{path} is {value}; it must be positive.")

    model, training = config.model, config.training
    factor = downsampling_factor(model)
    _require(
        model.resolution % factor == 0,
        f"config.model.resolution is {model.resolution}, which the model's factor {factor} does "
        f"not divide; take {max(1, model.resolution // factor) * factor}.",
    )
    for multiplier in model.channel_multipliers:
        _require(
            model.channels * multiplier % model.num_groups == 0,
            f"config.model.channels x channel_multipliers gives {model.channels * multiplier} "
            f"channels, which config.model.num_groups {model.num_groups} does not divide.",
        )
    _require(
        config.loss.binary_cross_entropy == 0 or config.data.num_labels > 0,
        "config.loss.binary_cross_entropy needs a label map: set config.data.num_labels.",
    )
    _require(
        config.loss.binary_cross_entropy > 0 or config.data.num_labels == 0,
        "config.data.num_labels makes a label-map tokenizer, whose loss is "
        "config.loss.binary_cross_entropy: set it to 1.",
    )
    channels = config.data.num_labels or model.in_channels
    _require(
        model.in_channels == channels == model.out_channels,
        f"config.model.in_channels and out_channels are {model.in_channels} and "
        f"{model.out_channels}, and the data has {channels} channels.",
    )
    _require(
        training.batch_size % config.optimizer.accumulate == 0,
        f"config.training.batch_size {training.batch_size} is not divisible by "
        f"config.optimizer.accumulate {config.optimizer.accumulate}.",
    )
