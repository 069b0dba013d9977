"""What a transformer's config leaves to its tokenizers and data: grids, codebooks, classes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vqgan_jax.conditions.kinds import make_kinds
from vqgan_jax.conditions.scene_layouts import layout_encoding
from vqgan_jax.configuration import ConfigError
from vqgan_jax.configuration.common import value_at
from vqgan_jax.data.code_manifest import ConditionInfo
from vqgan_jax.data.codes import Codes, check_codes
from vqgan_jax.data.condition_sources import (
    ConditionImage,
    ConditionSource,
    Coordinates,
    Layouts,
)
from vqgan_jax.data.sources import Feature, open_configured
from vqgan_jax.errors import DataError
from vqgan_jax.inference import Tokenizer
from vqgan_jax.models.orders import permutation
from vqgan_jax.training.learner import sequence_length


def resolved(
    config: ConfigDict,
    tokenizer: Tokenizer,
    of_conditions: Mapping[str, Tokenizer] | None = None,
    codes: Sequence[Codes] | None = None,
) -> ConfigDict:
    """The config with what its tokenizers and data determine.

    Raises:
        ConfigError: what it says itself is something else, or it needs what they do not have.
        DataError: there is no such data.
    """
    config = config.copy_and_resolve_references()
    resolution = config.tokenizer.resolution or tokenizer.config.model.resolution
    has_layout = "layout" in config.condition.kinds
    found: dict[str, Any] = {"model.codebook_size": tokenizer.codebook_size}
    if codes:
        resolution = codes[0].info.resolution
        if config.tokenizer.resolution not in (0, resolution):
            raise ConfigError(
                f"config.tokenizer.resolution is {config.tokenizer.resolution}, and "
                f"{codes[0].directory} has codes of images of {resolution} pixels; tokenize with "
                f"--resolution={config.tokenizer.resolution} into another --output."
            )
        grid, class_names = tuple(codes[0].grid), codes[0].class_names
        objects = _objects_of_codes(codes[0]) if has_layout else {}
    else:
        grid = _grid(tokenizer, resolution, "tokenizer")
        data = config.data
        found["data.num_labels"] = num_labels = tokenizer.config.data.num_labels
        features = {Layouts.feature: Feature.OBJECTS} if has_layout else {}
        source = open_configured(data, data.train_split, resolution, features, num_labels)
        class_names = source.class_names
        objects = {"num_classes": len(source.object_names), "class_names": source.object_names}
    found["model.grid"] = grid
    if "class" in config.condition.kinds:
        found["condition.num_classes"] = len(class_names or ())
        found["condition.class_names"] = tuple(class_names or ())
    if has_layout:  # where the data has no names, the config says how many classes there are
        found |= {f"condition.layout.{key}": value for key, value in objects.items() if value}
    for path, value in found.items():
        own, (section, _, key) = value_at(config, path), path.rpartition(".")
        if own and own != value:
            raise ConfigError(
                f"config.{path} is {_short(own)}, but the tokenizer and the data have "
                f"{_short(value)}."
            )
        value_at(config, section)[key] = value
    for name, own in (of_conditions or {}).items():
        image = config.condition.images[name]
        image.codebook_size = own.codebook_size
        image.grid = _grid(own, resolution, f"condition.images.{name}.tokenizer")
        image.num_labels = own.config.data.num_labels
    _check_order(config)
    _check_conditions(config)
    _check_length(config)
    return config


def _objects_of_codes(codes: Codes) -> dict[str, Any]:
    """What stored layouts know of the classes of objects."""
    info = codes.conditions.get("layout")
    if info is None or info.layout is None:
        raise DataError(
            f"{codes.directory} has no tokens of the condition layout; it has "
            f"{', '.join(codes.conditions) or 'none of any'}. Tokenize with "
            "--conditions=layout=CONFIG into another --output."
        )
    return {"num_classes": info.layout.num_classes, "class_names": info.class_names}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _grid(tokenizer: Tokenizer, resolution: int, key: str) -> tuple[int, int]:
    if resolution % tokenizer.factor:
        raise ConfigError(
            f"config.tokenizer.resolution is {resolution}, which the factor {tokenizer.factor} of "
            f"config.{key} does not divide."
        )
    return (resolution // tokenizer.factor,) * 2


def _check_order(config: ConfigDict) -> None:
    try:
        permutation(config.model.order, *config.model.grid)
    except ValueError as error:
        raise ConfigError(f"config.model.order: {error}") from error


def _check_conditions(config: ConfigDict) -> None:
    """Raises `ConfigError` where a condition has no tokens, or no row in the codes' table."""
    condition, size = config.condition, config.model.codebook_size
    if "class" in condition.kinds and condition.num_classes == 0:
        raise ConfigError("config.condition.kinds has class, but the data has no classes.")
    if "layout" in condition.kinds:
        _check_layout(condition.layout)
    if condition.own_table:
        return
    if not condition.kinds and condition.start_token >= size:
        raise ConfigError(
            f"config.condition.start_token is {condition.start_token}, and the codes' table has "
            f"{size} rows; set config.condition.own_table=True."
        )
    for kind in make_kinds(condition, config.model.grid):
        needed = kind.vocabulary + (condition.dropout > 0.0)
        if needed > size:
            raise ConfigError(
                f"The condition {kind.name} needs {needed} rows of a table, and the codes' has "
                f"{size}; set config.condition.own_table=True."
            )


def _check_layout(layout: ConfigDict) -> None:
    if layout.num_classes == 0:
        raise ConfigError(
            "The classes of objects have no names in the data: write them to "
            "PATH/layout/classes.txt, one a line, or set config.condition.layout.num_classes."
        )
    if layout.class_names and len(layout.class_names) != layout.num_classes:
        raise ConfigError(
            f"config.condition.layout.class_names are {len(layout.class_names)}, and num_classes "
            f"is {layout.num_classes}."
        )
    try:
        layout_encoding(layout)
    except ValueError as error:
        raise ConfigError(f"config.condition.layout: {error}") from error


def _check_length(config: ConfigDict) -> None:
    needed, (rows, columns) = sequence_length(config), config.model.grid
    if 0 < config.model.max_length < needed:
        raise ConfigError(
            f"config.model.max_length is {config.model.max_length}; the conditions and a grid of "
            f"{rows}x{columns} codes need {needed}."
        )


def check_all_codes(
    config: ConfigDict,
    tokenizer: Tokenizer,
    of_conditions: Mapping[str, Tokenizer],
    codes: Sequence[Codes],
) -> None:
    """Raises `DataError` where stored codes are not those that a resolved config is for."""
    condition = config.condition
    fingerprints = {name: own.fingerprint for name, own in of_conditions.items()}
    wanted = [
        ConditionInfo(
            name=kind.name,
            num_tokens=math.prod(kind.shape),
            vocabulary=kind.vocabulary,
            grid=kind.shape if len(kind.shape) == 2 else None,
            fingerprint=fingerprints.get(kind.name, ""),
            **_source_of(condition, kind.name),
        )
        for kind in make_kinds(condition, config.model.grid)
        if kind.name not in ("class", "layout")
    ]
    if "layout" in condition.kinds:
        own = _layouts(condition.layout)
        wanted.append(ConditionInfo.of_layout(own.encoding, own.min_area, own.class_names))
    for split in codes:
        check_codes(
            split,
            tokenizer.fingerprint,
            config.model.grid,
            config.model.codebook_size,
            condition.num_classes if "class" in condition.kinds else 0,
            wanted,
        )


def _source_of(condition: ConfigDict, name: str) -> dict[str, str | int]:
    """How a condition's images are made, as `ConditionInfo` has it."""
    if name not in condition.images:
        return {}
    image = _condition_image(name, condition.images[name])
    return {
        "image_key": image.feature,
        "derive": image.derive,
        "scale": image.scale if image.derive == "low_resolution" else 0,
    }


def _condition_image(name: str, image: ConfigDict) -> ConditionImage:
    return ConditionImage(
        name=name,
        image_key=image.image_key,
        num_labels=image.num_labels,
        derive=image.derive,
        scale=image.scale,
    )


def _layouts(layout: ConfigDict) -> Layouts:
    return Layouts(layout_encoding(layout), layout.min_area, tuple(layout.class_names))


def images_config(config: ConfigDict, tokenizer: Tokenizer) -> ConfigDict:
    """The tokenizer's config with this run's data, for the pipeline of images."""
    images = tokenizer.config.copy_and_resolve_references()
    with images.unlocked():
        images.seed, images.data = config.seed, config.data
        images.training.batch_size = config.training.batch_size
        if config.tokenizer.resolution:
            images.model.resolution = config.tokenizer.resolution
    return images


def condition_sources(config: ConfigDict, tokenizer: Tokenizer) -> tuple[ConditionSource, ...]:
    """What the pipeline of images reads beside them for a resolved config's conditions."""
    condition, sources = config.condition, []
    for name in condition.kinds:
        if name == "coordinates":
            sources.append(Coordinates(tokenizer.factor, condition.coordinates.intervals))
        elif name == "layout":
            sources.append(_layouts(condition.layout))
        elif name in condition.images:
            sources.append(_condition_image(name, condition.images[name]))
    return tuple(sources)
