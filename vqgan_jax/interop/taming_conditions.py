"""Condition stages of CompVis/taming-transformers' Net2NetTransformer to our configs and back.

A condition stage turns what an image is conditioned on into tokens: a tokenizer of pictures or
label maps, `CoordStage`, `Labelator`, `SOSProvider` for a start token, or `DummyCondStage` for
layouts, which the data set has made tokens of. Codes and conditions are rows of one table there.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from vqgan_jax.conditions.kinds import make_kinds
from vqgan_jax.conditions.scene_layouts import layout_encoding
from vqgan_jax.configuration import ConfigError, add_condition_image, downsampling_factor
from vqgan_jax.configuration.common import shortened
from vqgan_jax.data.condition_sources import ConditionImage, check_conditions
from vqgan_jax.errors import DataError
from vqgan_jax.interop.taming_options import ConversionError, assign, class_name, number, part
from vqgan_jax.interop.taming_yaml import config_from_yaml, reference_class, yaml_from_config
from vqgan_jax.training.checkpoints import condition_folder

NO_LOSS = "taming.modules.losses.vqperceptual.DummyLoss"
UNCONDITIONAL = "__is_unconditional__"
_FIRST_STAGE = "__is_first_stage__"
_LABELATOR = "taming.modules.util.Labelator"
_COORDINATES = "taming.modules.misc.coord.CoordStage"
_TOKENIZERS = ("VQModel", "VQSegmentationModel", "GumbelVQ")
_SUPPORTED = (
    f"supported are a start token ({UNCONDITIONAL}, SOSProvider), classes (Labelator), images "
    f"({_FIRST_STAGE}, {', '.join(_TOKENIZERS)}), coordinates (CoordStage) and layouts "
    "(DummyCondStage)"
)
_PLACES = {"objects_bbox": "boxes", "objects_center_points": "centers"}
_COCO_THINGS, _COCO_STUFF = 80, 91  # classes of the data set; "other" is none of the reference's

# an option of the reference -> (the key of ours, its type)
_CLASSES = {"n_classes": ("condition.num_classes", int)}
_START = {"sos_token": ("condition.start_token", int)}
_INTERVALS = {"n_embed": ("condition.coordinates.intervals", int)}
_LAYOUT = {
    "no_tokens": ("condition.layout.num_tokens", int),
    "max_objects_per_image": ("condition.layout.max_objects", int),
}
_LAYOUT_CLASSES = {"no_object_classes": ("condition.layout.num_classes", int)}
# what a number of tokens is called in an error
_VOCABULARY_KEYS = {
    "class": "n_classes",
    "coordinates": "cond_stage_config.params.n_embed",
    "layout": "no_tokens",
}


def assign_condition(
    config: ConfigDict, params: Mapping, data: Mapping, tokenizer: ConfigDict
) -> dict[str, ConfigDict]:
    """Sets `config.condition` but for the table.

    Args:
        config: of the transformer.
        params: the yaml's `model.params`.
        data: its `data.params`, which says how layouts become tokens.
        tokenizer: the first stage's config.

    Returns:
        The configs of the tokenizers of condition images, by name; `tokenizer` itself where it is
        theirs too.

    Raises:
        ConversionError: the condition is not supported, or something is missing.
    """
    stage = params.get("cond_stage_config")
    if stage == _FIRST_STAGE:
        return _assign_image(config, params, tokenizer)
    if stage == UNCONDITIONAL or params.get("unconditional", False):
        return {}
    stage = part(params, "cond_stage_config", "cond_stage_config")
    where = "cond_stage_config.params"
    options = part(stage, "params", where, {})
    name = class_name(stage)
    if name in _TOKENIZERS:
        return _assign_image(config, params, _tokenizer(stage, options))
    if name == "SOSProvider":
        assign(config, options, _START, where, required=set(_START))
    elif name == "Labelator":
        config.condition.kinds = ("class",)
        assign(config, options, _CLASSES, where, required=set(_CLASSES))
        if config.condition.num_classes < 1:
            raise ConversionError(f"{where}.n_classes is {config.condition.num_classes}.")
    elif name == "CoordStage":
        _assign_coordinates(config, options, where, downsampling_factor(tokenizer.model))
    elif name == "DummyCondStage":
        _assign_layout(config, options, data)
    else:
        raise ConversionError(
            f"cond_stage_config.target is {shortened(stage.get('target'))}, which is not "
            f"supported; {_SUPPORTED}."
        )
    return {}


def _tokenizer(stage: Mapping, options: Mapping) -> ConfigDict:
    network = part(options, "ddconfig", "cond_stage_config.params.ddconfig")
    channels = number(network, "in_channels", int, 3)
    if class_name(stage) == "VQModel" and channels not in (1, 3):
        # Label maps of the reference's first models: one channel a label, trained as images.
        stage = {
            "target": "VQSegmentationModel",
            "params": {**options, "n_labels": channels, "lossconfig": {"target": NO_LOSS}},
        }
    try:
        return config_from_yaml(stage)
    except (ConversionError, ConfigError) as error:
        raise ConversionError(f"In cond_stage_config: {error}") from error


def _assign_image(
    config: ConfigDict, params: Mapping, tokenizer: ConfigDict
) -> dict[str, ConfigDict]:
    name = str(params.get("cond_stage_key", "depth"))
    if name in _VOCABULARY_KEYS:
        raise ConversionError(
            f"cond_stage_key is {shortened(name)}, which is another kind of condition and not an "
            "image: give it another name in the yaml."
        )
    try:
        check_conditions([ConditionImage(name, name)], tokenizer.model.resolution, False)
    except DataError as error:
        raise ConversionError(f"cond_stage_key: {error}") from error
    size = number(params, "downsample_cond_size", int, -1)
    if size > -1:
        raise ConversionError(
            f"downsample_cond_size is {size}: condition images of another size than the image "
            "(-1) are not supported."
        )
    add_condition_image(config, name, condition_folder(name))  # within the export
    image = config.condition.images[name]
    image.codebook_size = tokenizer.model.quantizer.codebook_size
    image.num_labels = tokenizer.data.num_labels
    return {name: tokenizer}


def _assign_coordinates(config: ConfigDict, options: Mapping, where: str, factor: int) -> None:
    config.condition.kinds = ("coordinates",)
    assign(config, options, _INTERVALS, where, required=set(_INTERVALS))
    if config.condition.coordinates.intervals < 1:
        raise ConversionError(f"{where}.n_embed is {config.condition.coordinates.intervals}.")
    down = number(options, "down_factor", int, factor)
    if down != factor:
        raise ConversionError(
            f"{where}.down_factor is {down}, and a code of the first stage covers {factor} pixels: "
            "only one coordinate a code is supported."
        )


def _assign_layout(config: ConfigDict, options: Mapping, data: Mapping) -> None:
    key = options.get("conditional_key")
    if not isinstance(key, str) or key not in _PLACES:
        raise ConversionError(
            f"cond_stage_config.params.conditional_key is {shortened(key)}; supported are "
            f"{' and '.join(_PLACES)}."
        )
    config.condition.kinds = ("layout",)
    train = part(data, "train", "data.params.train")
    where = "data.params.train.params"
    values = part(train, "params", where)
    assign(config, values, _LAYOUT, where, required=set(_LAYOUT))
    layout = config.condition.layout
    layout.places = _PLACES[key]
    layout.with_crop = _flag(values, "encode_crop", where)
    attributes = ("group",) if _flag(values, "use_group_parameter", where) else ()
    if _flag(values, "use_additional_parameters", where, False):
        attributes += ("occluded", "depiction", "inside")
    layout.attributes = attributes

    of_coco = class_name(train) == "AnnotatedObjectsCoco"
    if values.get("no_object_classes"):
        assign(config, values, _LAYOUT_CLASSES, where)
    elif of_coco and not values.get("category_allow_list_target"):
        things, stuff = (_flag(values, name, where, True) for name in ("use_things", "use_stuff"))
        layout.num_classes = _COCO_THINGS * things + _COCO_STUFF * stuff
    else:
        raise ConversionError(
            f"The yaml lacks {where}.no_object_classes, the number of classes of objects, which "
            "the reference otherwise counts in its data set: add it."
        )
    try:
        layout_encoding(layout)
    except ValueError as error:
        raise ConversionError(f"In {where}: {error}") from error


def _flag(options: Mapping, key: str, where: str, default: bool | None = None) -> bool:
    value = options.get(key, default)
    if not isinstance(value, bool):
        problem = f"is {shortened(value)}" if key in options else "is missing"
        raise ConversionError(f"The yaml's {where}.{key} {problem}; it must be true or false.")
    return value


def assign_table(config: ConfigDict, vocab_size: int) -> None:
    """Decides whether conditions are rows of the codes' table, as in the reference.

    They are unless there are more of their tokens than codes. The token `n_embed` of coordinates,
    which only codes next to the lower right corner can have, is the one that may lie outside of
    the reference's vocabulary.

    Raises:
        ConversionError: there are tokens without a row.
    """
    codes, condition = config.model.codebook_size, config.condition
    if vocab_size < codes:
        raise ConversionError(
            f"transformer_config.params.vocab_size is {vocab_size}, and the first stage's n_embed "
            f"{codes}: codes from {vocab_size} on would have no token."
        )
    if condition.kinds:
        (kind,) = make_kinds(condition, config.model.grid)
        rows = kind.vocabulary
        last = rows - 2 if kind.name == "coordinates" else rows - 1
        key = _VOCABULARY_KEYS.get(kind.name, "cond_stage_config.params.n_embed")
    else:
        last, key = condition.start_token, "sos_token"
        rows = last + 1
    if not 0 <= last < vocab_size:
        raise ConversionError(
            f"The yaml's {key} needs token {last}, and transformer_config.params.vocab_size is "
            f"{vocab_size}: tokens go from 0 to {vocab_size - 1}."
        )
    condition.own_table = rows > codes


def condition_options(
    config: ConfigDict, factor: int, of_conditions: Mapping[str, ConfigDict]
) -> dict:
    """The inverse of `assign_condition`: options for `model.params`.

    Args:
        config: of the transformer.
        factor: pixels a code.
        of_conditions: the configs of the tokenizers of condition images, by name.

    Raises:
        ConversionError: the reference has no such condition.
    """
    condition = config.condition
    if not condition.kinds:
        start = 0 if condition.own_table else condition.start_token
        return {"sos_token": start, "cond_stage_config": UNCONDITIONAL}
    if len(condition.kinds) > 1:
        raise ConversionError(
            f"The reference has one condition; this transformer has {', '.join(condition.kinds)} "
            "(config.condition.kinds) and cannot be written in its form."
        )
    (kind,) = condition.kinds
    if kind == "layout":
        raise ConversionError("The way back for a transformer of layouts is not supported.")
    if condition.own_table and not may_share_rows(config):
        raise ConversionError(
            "In the reference, conditions are tokens of the codes' table; this transformer has a "
            "table for them (config.condition.own_table) and cannot be written in its form."
        )
    if kind == "class":
        stage = {"target": _LABELATOR, "params": {"n_classes": condition.num_classes}}
        return {"cond_stage_key": "class_label", "cond_stage_config": stage}
    if kind == "coordinates":
        values = {"n_embed": condition.coordinates.intervals, "down_factor": factor}
        stage = {"target": _COORDINATES, "params": values}
        return {"cond_stage_key": "coord", "cond_stage_config": stage}
    tokenizer = of_conditions[kind]
    stage = yaml_from_config(tokenizer)["model"]
    stage["params"]["lossconfig"] = {"target": NO_LOSS}  # it is not trained any more
    if reference_class(tokenizer) != "GumbelVQ":  # which gives codes as a grid anyway
        stage["params"]["sane_index_shape"] = True
    stage = {key: stage[key] for key in ("target", "params")}
    return {"cond_stage_key": kind, "cond_stage_config": stage}


def may_share_rows(config: ConfigDict) -> bool:
    """Whether an own table can say what the codes' table says.

    That of coordinates, as `assign_table` makes it for as many intervals as codes.
    """
    condition = config.condition
    return (
        condition.kinds == ("coordinates",)
        and condition.coordinates.intervals <= config.model.codebook_size
    )
