"""Descriptions of CompVis/taming-transformers' Net2NetTransformer (yaml) to our configs and back.

Such a yaml describes three models: the GPT, its first stage, which is the tokenizer, and what makes
the condition (`taming_conditions.py`). The number of heads stands in the yaml alone, weights of any
number have the same shapes.
"""

import dataclasses
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
from vqgan_jax.configuration.common import check_ranges, shortened
from vqgan_jax.configuration.quantizer import MOST_CODES
from vqgan_jax.configuration.transformer import RANGES
from vqgan_jax.interop.taming_conditions import (
    NO_LOSS,
    assign_condition,
    assign_table,
    condition_options,
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
from vqgan_jax.interop.taming_permuters import assign_order, permuter_options
from vqgan_jax.interop.taming_yaml import config_from_yaml, reference_class, yaml_from_config
from vqgan_jax.training.learner import sequence_length

_CLASS = "Net2NetTransformer"
_GPT = "taming.modules.transformer.mingpt.GPT"

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


@dataclasses.dataclass(frozen=True)
class TransformerDescription:
    """What the yaml of a transformer says.

    Attributes:
        config: the transformer's, with codebook size, grid and all that the condition needs.
        tokenizer: the config of its first stage.
        of_conditions: the configs of the tokenizers of condition images, by name; `tokenizer`
            itself where it is theirs too.
        vocab_size: tokens of the reference's table and head: the codes, and perhaps more.
    """

    config: ConfigDict
    tokenizer: ConfigDict
    of_conditions: Mapping[str, ConfigDict]
    vocab_size: int


def is_transformer(project: Mapping) -> bool:
    """Whether a description is a transformer's.

    Raises:
        ConversionError: it is none of a model.
    """
    return class_name(model_part(project)) == _CLASS


def transformer_from_yaml(source: Mapping | str | os.PathLike) -> TransformerDescription:
    """The configs of a transformer and its tokenizer from the reference's description.

    The grid is that of the first stage's resolution; where a sequence holds fewer tokens, the
    square of codes that fills it together with the condition.

    In the reference, codes and conditions are rows of one table (`config.condition.own_table` is
    False). Conditions with tokens that are no codes get a table of their own here: then only codes
    can be drawn.

    Args:
        source: a yaml file or what is in it: a whole project, or the `model` part alone.

    Raises:
        ConversionError: it is no such description, or asks for what is not supported.
        ConfigError: the values do not make a working model.
    """
    project = source if isinstance(source, Mapping) else read_yaml(Path(source))
    description = model_part(project)
    if not is_transformer(project):
        raise ConversionError(
            f"model.target is {shortened(description['target'])}, and not a {_CLASS}."
        )
    params = part(description, "params", "model.params")
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
    check_ranges(config, RANGES)
    if not 0 < vocab_size <= MOST_CODES:
        raise ConversionError(f"{where}.vocab_size is {vocab_size}; at most {MOST_CODES}.")
    data = part(part(project, "data", "data", {}), "params", "data.params", {})
    of_conditions = assign_condition(config, params, data, tokenizer)
    _assign_grid(config, tokenizer, of_conditions)
    assign_order(config.model, params)
    assign_table(config, vocab_size)
    _check_gpt(config)
    assign(config, description, _RATE, "model")
    assign(config, data, _BATCH, "data.params")
    config.tokenizer.path = "tokenizer"  # within the export
    validate(config)
    return TransformerDescription(config, tokenizer, of_conditions, vocab_size)


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


def _assign_grid(
    config: ConfigDict, tokenizer: ConfigDict, of_conditions: Mapping[str, ConfigDict]
) -> None:
    length, resolution = config.model.max_length, tokenizer.model.resolution
    factor = downsampling_factor(tokenizer.model)
    whole = resolution // factor
    for side in range(whole, 0, -1):
        config.model.grid = (side, side)
        for name, other in of_conditions.items():
            other_side, rest = divmod(side * factor, downsampling_factor(other.model))
            if rest:
                break
            config.condition.images[name].grid = (other_side, other_side)
        else:
            # The last code is never put in, but descriptions may count it.
            spare = length - sequence_length(config)
            if spare in (0, 1) or (side == whole and spare >= 0):
                config.tokenizer.resolution = 0 if side == whole else side * factor
                return
    kinds = " and ".join(("codes", *config.condition.kinds))
    raise ConversionError(
        f"transformer_config.params.block_size is {length}, which is neither enough for the "
        f"{whole**2} codes of images of the first stage's resolution {resolution} with what stands "
        f"in front nor what a smaller square of {kinds} needs."
    )


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


def yaml_from_transformer(
    config: ConfigDict, tokenizer: ConfigDict, of_conditions: Mapping[str, ConfigDict]
) -> dict:
    """The reference's description of a transformer with its tokenizers, for a yaml file.

    Raises:
        ConversionError: the reference has no such model.
    """
    _require_reference_form(config)
    model = config.model
    if reference_class(tokenizer) == "VQSegmentationModel":
        raise ConversionError("The way back for a transformer of label maps is not supported.")
    first_stage = yaml_from_config(tokenizer)["model"]
    first_stage["params"]["lossconfig"] = {"target": NO_LOSS}  # it is not trained any more
    sizes = {"vocab_size": model.codebook_size, **values(config, _GPT_OPTIONS)}
    sizes["block_size"] = model.max_length or sequence_length(config)
    params = {
        "first_stage_key": config.data.image_key,
        "pkeep": config.training.pkeep,
        "transformer_config": {"target": _GPT, "params": sizes},
        "first_stage_config": {key: first_stage[key] for key in ("target", "params")},
    }
    params |= permuter_options(model)
    params |= condition_options(config, downsampling_factor(tokenizer.model), of_conditions)
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
