"""Descriptions of CompVis/taming-transformers' Net2NetTransformer (yaml) to our configs and back.

Such a yaml describes three models: the GPT, its first stage, which is the tokenizer, and what makes
the condition: a start token (`SOSProvider`) or the image's class (`Labelator`). The number of heads
stands in the yaml alone, weights of any number have the same shapes.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from vqgan_jax.configuration import (
    ConfigError,
    downsampling_factor,
    transformer_config,
    validate,
)
from vqgan_jax.interop.taming_options import (
    ConversionError,
    assign,
    class_name,
    model_part,
    number,
    part,
    read_yaml,
    values,
)
from vqgan_jax.interop.taming_yaml import config_from_yaml, reference_class, yaml_from_config

_CLASS = "Net2NetTransformer"
_GPT = "taming.modules.transformer.mingpt.GPT"
_LABELATOR = "taming.modules.util.Labelator"
_NO_LOSS = "taming.modules.losses.vqperceptual.DummyLoss"
_UNCONDITIONAL = "__is_unconditional__"
_SUPPORTED_CONDITIONS = (
    f"supported are a start token ({_UNCONDITIONAL}, SOSProvider) and classes (Labelator)"
)
_OTHER_CONDITIONS = {
    "VQModel": "an image of another kind",
    "VQSegmentationModel": "a segmentation",
    "GumbelVQ": "an image of another kind",
    "CoordStage": "a picture's coordinates",
    "DummyCondStage": "a scene's layout",
}

# an option of the reference -> (the key of ours, its type)
_GPT_OPTIONS = {
    "block_size": ("model.max_length", int),
    "n_layer": ("model.num_layers", int),
    "n_head": ("model.num_heads", int),
    "n_embd": ("model.width", int),
    "n_unmasked": ("model.num_unmasked", int),
    "embd_pdrop": ("model.embedding_dropout", float),
    "resid_pdrop": ("model.dropout", float),
    "attn_pdrop": ("model.attention_dropout", float),
}
_GPT_DEFAULTS = {"n_layer": 12, "n_head": 8, "n_embd": 256}  # where they are not those of ours
_OPTIONS = {
    "first_stage_key": ("data.image_key", str),
    "pkeep": ("training.pkeep", float),
    "sos_token": ("condition.start_token", int),
}
_RATE = {"base_learning_rate": ("optimizer.base_learning_rate", float)}
_BATCH = {"batch_size": ("training.batch_size", int)}
_CLASSES = {"n_classes": ("condition.num_classes", int)}
_START = {"sos_token": _OPTIONS["sos_token"]}


@dataclasses.dataclass(frozen=True)
class TransformerDescription:
    """What the yaml of a transformer says.

    Attributes:
        config: the transformer's, with codebook size, grid and classes.
        tokenizer: the config of its first stage.
        vocab_size: tokens of the reference's table and head: the codes, and perhaps more.
    """

    config: ConfigDict
    tokenizer: ConfigDict
    vocab_size: int


def is_transformer(project: Mapping) -> bool:
    """Whether a description is a transformer's.

    Raises:
        ConversionError: it is none of a model.
    """
    return class_name(model_part(project)) == _CLASS


def transformer_from_yaml(source: Mapping | str | os.PathLike) -> TransformerDescription:
    """The configs of a transformer and its tokenizer from the reference's description.

    The grid is that of the first stage's resolution; where a sequence holds fewer codes, the square
    that fills it.

    In the reference, codes and conditions are rows of one table (`config.condition.own_table` is
    False). A start token or classes that are no codes, in a vocabulary larger than the codebook,
    get a table of their own here: then only codes can be drawn.

    Args:
        source: a yaml file or what is in it: a whole project, or the `model` part alone.

    Raises:
        ConversionError: it is no such description, or asks for what is not supported.
        ConfigError: the values do not make a working model.
    """
    project = source if isinstance(source, Mapping) else read_yaml(Path(source))
    description = model_part(project)
    if not is_transformer(project):
        raise ConversionError(f"model.target is {description['target']}, and not a {_CLASS}.")
    params = part(description, "params", "model.params")
    _require_row_order(params)
    tokenizer = _first_stage(part(params, "first_stage_config", "first_stage_config"))
    gpt = _gpt_options(params)

    config = transformer_config()
    where = "transformer_config.params"
    assign(config, {**_GPT_DEFAULTS, **gpt}, _GPT_OPTIONS, where, required={"block_size"})
    if "vocab_size" not in gpt:
        raise ConversionError(f"The yaml lacks {where}.vocab_size.")
    vocab_size = number(gpt, "vocab_size", int)
    config.model.codebook_size = tokenizer.model.quantizer.codebook_size
    assign(config, params, _OPTIONS, "params")
    _assign_condition(config, params)
    _assign_table(config, vocab_size)
    _assign_grid(config, tokenizer)
    _check_gpt(config)
    assign(config, description, _RATE, "model")
    data = part(project, "data", "data", {})
    assign(config, part(data, "params", "data.params", {}), _BATCH, "data.params")
    config.tokenizer.path = "tokenizer"  # within the export
    validate(config)
    return TransformerDescription(config, tokenizer, vocab_size)


def _require_row_order(params: Mapping) -> None:
    permuter = part(params, "permuter_config", "permuter_config", {"target": "Identity"})
    if class_name(permuter) not in ("Identity", ""):
        raise ConversionError(
            f"permuter_config.target is {permuter['target']}: codes in another order than that of "
            "rows (Identity) are not supported."
        )


def _first_stage(description: Mapping) -> ConfigDict:
    if class_name(description) == "VQSegmentationModel":
        raise ConversionError(
            "first_stage_config.target is a VQSegmentationModel: transformers that draw label maps "
            "are not supported."
        )
    try:
        return config_from_yaml(description)
    except (ConversionError, ConfigError) as error:
        raise ConversionError(f"In first_stage_config: {error}") from error


def _gpt_options(params: Mapping) -> Mapping:
    description = part(params, "transformer_config", "transformer_config")
    if class_name(description) != "GPT":
        raise ConversionError(
            f"transformer_config.target is {description.get('target')}; only {_GPT} is supported."
        )
    options = part(description, "params", "transformer_config.params")
    unknown = [key for key in options if key not in _GPT_OPTIONS and key != "vocab_size"]
    if unknown:
        raise ConversionError(f"transformer_config.params.{unknown[0]} is not supported.")
    return options


def _assign_condition(config: ConfigDict, params: Mapping) -> None:
    stage = params.get("cond_stage_config")
    if stage == "__is_first_stage__":
        raise ConversionError(
            f"cond_stage_config is {stage}: an image as the condition is not supported; "
            f"{_SUPPORTED_CONDITIONS}."
        )
    if stage == _UNCONDITIONAL or params.get("unconditional", False):
        return
    stage = part(params, "cond_stage_config", "cond_stage_config")
    where = "cond_stage_config.params"
    options = part(stage, "params", where, {})
    name = class_name(stage)
    if name == "SOSProvider":
        assign(config, options, _START, where, required=set(_START))
    elif name == "Labelator":
        config.condition.kinds = ("class",)
        assign(config, options, _CLASSES, where, required=set(_CLASSES))
        if config.condition.num_classes < 1:
            raise ConversionError(f"{where}.n_classes is {config.condition.num_classes}.")
    else:
        kind = _OTHER_CONDITIONS.get(name, "another thing")
        raise ConversionError(
            f"cond_stage_config.target is {stage.get('target')}: {kind} as the condition is not "
            f"supported; {_SUPPORTED_CONDITIONS}."
        )


def _assign_table(config: ConfigDict, vocab_size: int) -> None:
    """Decides whether conditions are rows of the codes' table, as in the reference."""
    codes = config.model.codebook_size
    if vocab_size < codes:
        raise ConversionError(
            f"transformer_config.params.vocab_size is {vocab_size}, and the first stage's n_embed "
            f"{codes}: codes from {vocab_size} on would have no token."
        )
    if config.condition.kinds:
        last, key = config.condition.num_classes - 1, "n_classes"
    else:
        last, key = config.condition.start_token, "sos_token"
    if not 0 <= last < vocab_size:
        raise ConversionError(
            f"The yaml's {key} needs token {last}, and transformer_config.params.vocab_size is "
            f"{vocab_size}: tokens go from 0 to {vocab_size - 1}."
        )
    config.condition.own_table = last >= codes


def _assign_grid(config: ConfigDict, tokenizer: ConfigDict) -> None:
    length, resolution = config.model.max_length, tokenizer.model.resolution
    factor = downsampling_factor(tokenizer.model)
    side = resolution // factor
    if side**2 > length:
        side = math.isqrt(max(length, 0))
        if side == 0 or side**2 != length:
            raise ConversionError(
                f"transformer_config.params.block_size is {length}, which is neither enough for "
                f"the {(resolution // factor) ** 2} codes of images of the first stage's "
                f"resolution {resolution} nor a square of codes."
            )
        config.tokenizer.resolution = side * factor
    config.model.grid = (side, side)


def _check_gpt(config: ConfigDict) -> None:
    model = config.model
    if model.num_heads < 1 or model.width % model.num_heads:
        raise ConversionError(
            f"transformer_config.params.n_head is {model.num_heads}, which does not divide n_embd "
            f"{model.width}."
        )
    if model.num_unmasked > 1:
        raise ConversionError(
            f"transformer_config.params.n_unmasked is {model.num_unmasked}: codes that see those "
            "after them are not supported, only the condition's token may (1)."
        )


def yaml_from_transformer(config: ConfigDict, tokenizer: ConfigDict) -> dict:
    """The reference's description of a transformer with its tokenizer, for a yaml file.

    Raises:
        ConversionError: the reference has no such model.
    """
    _require_reference_form(config)
    model, condition = config.model, config.condition
    if reference_class(tokenizer) == "VQSegmentationModel":
        raise ConversionError("The way back for a transformer of label maps is not supported.")
    first_stage = yaml_from_config(tokenizer)["model"]
    first_stage["params"]["lossconfig"] = {"target": _NO_LOSS}  # it is not trained any more
    sizes = {"vocab_size": model.codebook_size, **values(config, _GPT_OPTIONS)}
    sizes["block_size"] = model.max_length or math.prod(model.grid)
    params = {
        "first_stage_key": config.data.image_key,
        "pkeep": config.training.pkeep,
        "transformer_config": {"target": _GPT, "params": sizes},
        "first_stage_config": {key: first_stage[key] for key in ("target", "params")},
    }
    if condition.kinds:
        classes = {"target": _LABELATOR, "params": {"n_classes": condition.num_classes}}
        params |= {"cond_stage_key": "class_label", "cond_stage_config": classes}
    else:
        start = 0 if condition.own_table else condition.start_token
        params |= {"sos_token": start, "cond_stage_config": _UNCONDITIONAL}
    options = config.optimizer
    rate = options.learning_rate / config.training.batch_size or options.base_learning_rate
    target = f"taming.models.cond_transformer.{_CLASS}"
    return {"model": {"base_learning_rate": rate, "target": target, "params": params}}


def _require_reference_form(config: ConfigDict) -> None:
    model = config.model
    form = {
        "norm": ("layer",),
        "feed_forward": ("gelu",),
        "positions": ("learned",),
        "qk_norm": (False,),
        "use_bias": (True,),
        "num_kv_heads": (0, model.num_heads),
        "hidden": (0, 4 * model.width),
    }
    for key, supported in form.items():
        if model[key] not in supported:
            raise ConversionError(
                f"The reference's GPT has no config.model.{key}={model[key]} (only "
                f"{supported[-1]}): this transformer cannot be written in its form."
            )
    if config.condition.kinds and config.condition.own_table:
        raise ConversionError(
            "In the reference, classes are tokens of the codes' table; this transformer has a "
            "table for them (config.condition.own_table) and cannot be written in its form."
        )
