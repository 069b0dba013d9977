"""Model descriptions of CompVis/taming-transformers (yaml) to our configs and back."""

import os
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from vqgan_jax.configuration import tokenizer_config, validate
from vqgan_jax.configuration.common import check_ranges, shortened
from vqgan_jax.configuration.tokenizer import RANGES
from vqgan_jax.interop.taming_options import (
    ConversionError,
    assign,
    class_name,
    model_part,
    number,
    part,
    read_yaml,
    require_fixed,
    values,
)

_MODELS = "taming.models.vqgan."
_LOSSES = "taming.modules.losses."
_IMAGE_LOSS = "vqperceptual.VQLPIPSWithDiscriminator"
_LABEL_LOSS = "segmentation.BCELossWithQuant"
_NO_LOSS = "vqperceptual.DummyLoss"
# The second, PyTorch's own, in latent-diffusion.
_NO_LOSSES = (_NO_LOSS.rpartition(".")[2], "Identity")
_SCHEDULER = "taming.lr_scheduler.LambdaWarmUpCosineScheduler"
_CLASSES = ("VQModel", "GumbelVQ", "VQSegmentationModel")
# The same networks in other projects, where other methods are around them.
_SAME_AS = {"VQModelInterface": "VQModel", "VQNoDiscModel": "VQModel"}

# an option of the reference -> (the key of ours, its type); ours start at the reference's defaults
_NETWORK = {
    "resolution": ("model.resolution", int),
    "in_channels": ("model.in_channels", int),
    "out_ch": ("model.out_channels", int),
    "ch": ("model.channels", int),
    "ch_mult": ("model.channel_multipliers", tuple),
    "num_res_blocks": ("model.num_res_blocks", int),
    "attn_resolutions": ("model.attention_resolutions", tuple),
    "z_channels": ("model.latent_channels", int),
    "dropout": ("model.dropout", float),
}
_LOSS = {
    "codebook_weight": ("loss.codebook", float),
    "perceptual_weight": ("loss.perceptual", float),
    "disc_start": ("discriminator.start", int),
    "disc_weight": ("discriminator.weight", float),
    "disc_factor": ("discriminator.factor", float),
    "disc_num_layers": ("discriminator.num_layers", int),
    "disc_ndf": ("discriminator.channels", int),
    "disc_loss": ("discriminator.loss", str),
}
_TEMPERATURE = {
    "warm_up_steps": ("temperature.warmup_steps", int),
    "max_decay_steps": ("temperature.decay_steps", int),
    "lr_start": ("temperature.start", float),
    "lr_max": ("temperature.peak", float),
    "lr_min": ("temperature.end", float),
}
_LOSS_DEFAULTS = {
    "disc_weight": 1.0,
    "disc_factor": 1.0,
    "disc_loss": "hinge",
    "disc_num_layers": 3,
    "disc_ndf": 64,
}
# values that these options must have, since nothing else was ever published
_FIXED_NETWORK = {
    "double_z": (True, False),  # default, and the only value a tokenizer can have
    "resamp_with_conv": (True, True),
    "give_pre_end": (False, False),
    "use_linear_attn": (False, False),
    "tanh_out": (False, False),
    "attn_type": ("vanilla", "vanilla"),
}
_FIXED_LOSS = {
    "disc_conditional": (False, False),
    "pixel_loss": ("l1", "l1"),
    "perceptual_loss": ("lpips", "lpips"),
}
_UNUSED_LOSS = ("pixelloss_weight", "n_classes", "disc_in_channels", "use_actnorm")


def reference_class(config: ConfigDict) -> str:
    """The reference's class of a config's model.

    Raises:
      ConversionError: the reference has no such quantizer.
    """
    kind = config.model.quantizer.kind
    if kind not in ("nearest", "ema", "gumbel"):
        raise ConversionError(f"The reference has no quantizer of the kind {kind}.")
    if config.model.quantizer.kind == "gumbel":
        return "GumbelVQ"
    return "VQSegmentationModel" if config.data.num_labels else "VQModel"


def config_from_yaml(source: Mapping | str | os.PathLike) -> ConfigDict:
    """A full config from the reference's description of a model.

    The reference's loss has no weight for the L1 term and always the legacy codebook loss; both
    are the defaults here. A model without a training loss (`DummyLoss`, `torch.nn.Identity`)
    becomes a config without a discriminator.

    Args:
      source: a yaml file or what is in it: a whole project, or the `model` part alone.

    Raises:
      ConversionError: the file is no such description, or asks for what is not supported.
      configuration.ConfigError: the values do not make a working model.
    """
    project = source if isinstance(source, Mapping) else read_yaml(Path(source))
    description = model_part(project)
    name = class_name(description)
    name = _SAME_AS.get(name, name)
    if name not in _CLASSES:
        raise ConversionError(
            f"model.target is {shortened(description['target'])}; supported are "
            f"{', '.join((*_CLASSES, *_SAME_AS))} and Net2NetTransformer, of any module."
        )
    params = part(description, "params", "model.params")
    config = tokenizer_config()

    network = part(params, "ddconfig", "model.params.ddconfig")
    require_fixed(network, _FIXED_NETWORK, "ddconfig")
    assign(config, network, _NETWORK, "ddconfig", required=set(_NETWORK) - {"dropout"})
    check_ranges(config, RANGES)
    # Others have no effect there either.
    levels = [config.model.resolution >> i for i in range(len(config.model.channel_multipliers))]
    config.model.attention_resolutions = tuple(
        resolution for resolution in config.model.attention_resolutions if resolution in levels
    )
    if params.get("remap") is not None:
        raise ConversionError("model.params.remap (a reduced codebook) is not supported.")
    quantizer = {
        "n_embed": ("model.quantizer.codebook_size", int),
        "embed_dim": ("model.quantizer.code_dim", int),
    }
    assign(config, params, quantizer, "params", required=set(quantizer))
    config.data.image_key = str(params.get("image_key", "image"))

    if name == "GumbelVQ":
        config.model.quantizer.kind = "gumbel"
        assign(config, params, {"kl_weight": ("loss.kl", float)}, "params")
        schedule = part(params, "temperature_scheduler_config", "temperature_scheduler_config", {})
        where = "temperature_scheduler_config.params"
        assign(config, part(schedule, "params", where, {}), _TEMPERATURE, where)
        if config.model.latent_channels != config.model.quantizer.code_dim:
            raise ConversionError("GumbelVQ needs embed_dim equal to ddconfig.z_channels.")
    if name == "VQSegmentationModel":
        labels = {"n_labels": ("data.num_labels", int)}
        assign(config, params, labels, "params", required=set(labels))
    _assign_loss(config, part(params, "lossconfig", "lossconfig", {"target": _NO_LOSS}))

    rate = {"base_learning_rate": ("optimizer.base_learning_rate", float)}
    assign(config, description, rate, "model")
    batch = {"batch_size": ("training.batch_size", int)}
    data = part(project, "data", "data", {})
    assign(config, part(data, "params", "data.params", {}), batch, "data.params")
    validate(config)
    return config


def _assign_loss(config: ConfigDict, description: Mapping) -> None:
    target = str(description.get("target", ""))
    params = part(description, "params", "lossconfig.params", {})
    name = class_name(description)
    labels = name == _LABEL_LOSS.rpartition(".")[2]
    if bool(config.data.num_labels) != labels and name not in _NO_LOSSES:
        raise ConversionError(
            f"lossconfig.target {shortened(target)} does not fit the model's target."
        )
    if labels:
        assign(config, params, {"codebook_weight": _LOSS["codebook_weight"]}, "lossconfig.params")
    elif name == _IMAGE_LOSS.rpartition(".")[2]:
        known = {*_LOSS, *_FIXED_LOSS, *_UNUSED_LOSS}
        unknown = [key for key in params if key not in known]
        if unknown:
            raise ConversionError(f"lossconfig.params.{unknown[0]} is not supported.")
        require_fixed(params, _FIXED_LOSS, "lossconfig.params")
        assign(config, {**_LOSS_DEFAULTS, **params}, _LOSS, "lossconfig.params", {"disc_start"})
        config.discriminator.norm = "act" if params.get("use_actnorm", False) else "batch"
        channels = number(params, "disc_in_channels", int, 3)
        if channels != config.model.out_channels:
            raise ConversionError(
                f"lossconfig.params.disc_in_channels is {channels}, and ddconfig.out_ch is "
                f"{config.model.out_channels}; a conditional discriminator is not supported."
            )
    elif name in _NO_LOSSES:
        config.discriminator.enabled = False
    else:
        raise ConversionError(f"lossconfig.target is {shortened(target)}, which is not supported.")
    if config.data.num_labels:
        config.discriminator.enabled = False
        config.loss.l1 = config.loss.perceptual = 0.0
        config.loss.binary_cross_entropy = 1.0


def yaml_from_config(config: ConfigDict) -> dict:
    """The reference's description of a config's model, as a dictionary for a yaml file.

    A training loss that the reference lacks becomes its `DummyLoss`: enough to encode, decode and
    sample. A moving-average or normalised codebook becomes a plain one, as
    `taming.state_dict_from_variables` writes it.

    Raises:
      ConversionError: the reference has no such model.
    """
    if config.model.architecture != "conv":
        raise ConversionError(
            f"The reference's networks are convolutional; config.model.architecture is "
            f"{config.model.architecture!r}."
        )
    if config.model.logit_laplace:
        raise ConversionError(
            "The reference's decoder gives images, and that of config.model.logit_laplace a "
            "distribution."
        )
    if config.model.norm != "group" or not config.model.middle_attention:
        raise ConversionError(
            "The reference has group normalisation and attention in the middle (config.model.norm, "
            "config.model.middle_attention)."
        )
    if config.model.num_groups != 32:
        raise ConversionError(
            f"The reference's norms have 32 groups; config.model.num_groups is "
            f"{config.model.num_groups}."
        )
    if config.data.num_labels and config.model.quantizer.kind == "gumbel":
        raise ConversionError("The reference has no Gumbel quantizer for label maps.")
    options = config.optimizer
    rate = options.learning_rate / config.training.batch_size or options.base_learning_rate
    name = reference_class(config)
    network = {"double_z": False, **values(config, _NETWORK)}
    params = {
        "ddconfig": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in network.items()
        },
        "lossconfig": _loss_description(config),
        "n_embed": config.model.quantizer.codebook_size,
        "embed_dim": config.model.quantizer.code_dim,
        "image_key": config.data.image_key,
    }
    if name == "GumbelVQ":
        params["kl_weight"] = config.loss.kl
        schedule = {"target": _SCHEDULER, "params": values(config, _TEMPERATURE)}
        params["temperature_scheduler_config"] = schedule
    if name == "VQSegmentationModel":
        params["n_labels"] = config.data.num_labels
    return {"model": {"base_learning_rate": rate, "target": _MODELS + name, "params": params}}


def _loss_description(config: ConfigDict) -> dict:
    loss, discriminator = config.loss, config.discriminator
    if config.data.num_labels:
        return {"target": _LOSSES + _LABEL_LOSS, "params": {"codebook_weight": loss.codebook}}
    expressible = (
        discriminator.enabled
        and discriminator.norm in ("batch", "act")
        and discriminator.loss in ("hinge", "vanilla")
        and (loss.l1, loss.l2) == (1.0, 0.0)
    )
    if not expressible:
        return {"target": _LOSSES + _NO_LOSS}
    params = {
        **values(config, _LOSS),
        "disc_in_channels": config.model.out_channels,
        "disc_conditional": False,
        "use_actnorm": discriminator.norm == "act",
    }
    return {"target": _LOSSES + _IMAGE_LOSS, "params": params}
