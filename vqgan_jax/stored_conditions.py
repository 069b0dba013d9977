"""What the command `tokenize` can write beside the codes: the tokens of conditions.

Items of its flag `--conditions` are

    NAME=TOKENIZER                    an image of another kind, through the tokenizer at a path
    low_resolution:SCALE=TOKENIZER    the image itself, SCALE times smaller
    coordinates=INTERVALS             where the crop lies
    layout=CONFIG                     which objects are where, encoded as `config.condition.layout`
                                      of a transformer's config file says
"""

import dataclasses
import importlib.util
import pathlib

from ml_collections import ConfigDict

from vqgan_jax.conditions.derived import DERIVED
from vqgan_jax.conditions.scene_layouts import layout_encoding
from vqgan_jax.configuration import ConfigError
from vqgan_jax.data.condition_sources import (
    ConditionImage,
    ConditionSource,
    Coordinates,
    Layouts,
)
from vqgan_jax.data.sources import Feature, open_configured
from vqgan_jax.errors import DataError
from vqgan_jax.inference import Tokenizer, load_tokenizer
from vqgan_jax.training.encoding import check_channels, check_one_code


@dataclasses.dataclass(frozen=True)
class ConditionTokens:
    """Where the tokens of a condition come from.

    Attributes:
        condition: what is read.
        tokenizer: what makes tokens of it; None where it is read as tokens.
    """

    condition: ConditionSource
    tokenizer: Tokenizer | None = None


def open_condition(
    text: str, factor: int, data: ConfigDict, split: str, resolution: int
) -> ConditionTokens:
    """What an item of `--conditions` asks for, described in the module.

    Args:
        text: the item.
        factor: pixels a code of the images.
        data: the images' `config.data`.
        split: one of the data set's.
        resolution: of the images.

    Raises:
        CheckpointError: there is no tokenizer at its path.
        DataError: it is no such item, or the tokenizer is not for images, or the data or the config
            file has no objects.
    """
    key, _, value = text.partition("=")
    name, colon, scale = key.partition(":")
    scaled = not colon or (name == "low_resolution" and scale.isdecimal())
    counted = name != "coordinates" or value.isdecimal()
    if not (name and value and scaled and counted):
        raise DataError(
            f"--conditions has {text!r}; it takes NAME=TOKENIZER, as in segmentation=runs/labels "
            "or edges=runs/edges, low_resolution:4=TOKENIZER, coordinates=1024 and layout=CONFIG."
        )
    if name == "coordinates":
        return ConditionTokens(Coordinates(factor, int(value)))
    if name == "layout":
        return ConditionTokens(_open_layouts(value, data, split, resolution))
    tokenizer = load_tokenizer(value)
    check_channels(f"tokenizer of the condition {name}", tokenizer)
    check_one_code(f"tokenizer of the condition {name}", tokenizer)
    source = {"derive": name, "scale": int(scale or 4)} if name in DERIVED else {}
    num_labels = tokenizer.config.data.num_labels
    return ConditionTokens(ConditionImage(name, name, num_labels, **source), tokenizer)


def _open_layouts(path: str, data: ConfigDict, split: str, resolution: int) -> Layouts:
    layout = _read_config(path).condition.layout
    features = {Layouts.feature: Feature.OBJECTS}
    source = open_configured(data, split, resolution, features)
    names = source.object_names or tuple(layout.class_names)
    count = layout.num_classes or len(names)
    if count == 0 or (names and count != len(names)):
        raise DataError(
            f"--conditions=layout={path}: config.condition.layout.num_classes is "
            f"{layout.num_classes}, and the data has the names of {len(names)} classes of objects; "
            "there must be one of them, or the same number."
        )
    with layout.unlocked():
        layout.num_classes = count
    try:
        return Layouts(layout_encoding(layout), layout.min_area, names)
    except ValueError as error:
        raise DataError(f"--conditions=layout={path}: {error}") from error


def _read_config(argument: str) -> ConfigDict:
    """The config of a file of `configs/`, given as FILE or FILE:ARGUMENT.

    Raises:
        DataError: it is no config of a transformer.
    """
    flag = f"--conditions=layout={argument}"
    file, _, config_argument = argument.partition(":")
    path = pathlib.Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise DataError(
            f"{flag}: {path} is no config file; layout=CONFIG takes that of the transformer, as in "
            "layout=configs/transformer_conditional.py:coco_scenes."
        )
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(config_argument)
    except ConfigError as error:
        raise DataError(f"{flag}: {error}") from error
    except Exception as error:  # a config file is a program and can raise anything
        raise DataError(f"{flag}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict) or config.get("stage") != "transformer":
        raise DataError(f"{flag}: {path} is no config of a transformer.")
    return config
