"""What a transformer's config leaves to its tokenizers and data: grids, codebooks, classes."""

import math
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from vqgan_jax.conditions.kinds import make_kinds
from vqgan_jax.configuration import ConfigError
from vqgan_jax.data.code_manifest import ConditionInfo
from vqgan_jax.data.codes import Codes, check_codes
from vqgan_jax.data.condition_sources import ConditionImage, Coordinates
from vqgan_jax.data.sources import open_source
from vqgan_jax.inference import Tokenizer
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
    """
    config = config.copy_and_resolve_references()
    resolution = config.tokenizer.resolution or tokenizer.config.model.resolution
    found = {("model", "codebook_size"): tokenizer.codebook_size}
    if codes:
        resolution = codes[0].info.resolution
        grid, class_names = tuple(codes[0].grid), codes[0].class_names
    else:
        grid = _grid(tokenizer, resolution, "tokenizer")
        data = config.data
        found["data", "num_labels"] = num_labels = tokenizer.config.data.num_labels
        class_names = open_source(
            data.name, data.train_split, data.data_dir, data.image_key, resolution, num_labels > 0
        ).class_names
    found["model", "grid"] = grid
    if "class" in config.condition.kinds:
        found["condition", "num_classes"] = len(class_names or ())
        found["condition", "class_names"] = tuple(class_names or ())
    for (section, key), value in found.items():
        own = config[section][key]
        if own and own != value:
            raise ConfigError(
                f"config.{section}.{key} is {own}, but the tokenizer and the data have {value}."
            )
        config[section][key] = value
    for name, own in (of_conditions or {}).items():
        image = config.condition.images[name]
        image.codebook_size = own.codebook_size
        image.grid = _grid(own, resolution, f"condition.images.{name}.tokenizer")
        image.num_labels = own.config.data.num_labels
    _check_conditions(config)
    _check_length(config)
    return config


def _grid(tokenizer: Tokenizer, resolution: int, key: str) -> tuple[int, int]:
    if resolution % tokenizer.factor:
        raise ConfigError(
            f"config.tokenizer.resolution is {resolution}, which the factor {tokenizer.factor} of "
            f"config.{key} does not divide."
        )
    return (resolution // tokenizer.factor,) * 2


def _check_conditions(config: ConfigDict) -> None:
    """Raises `ConfigError` where a condition has no tokens, or no row in the codes' table."""
    condition, size = config.condition, config.model.codebook_size
    if "class" in condition.kinds and condition.num_classes == 0:
        raise ConfigError("config.condition.kinds has class, but the data has no classes.")
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
        if kind.name != "class"
    ]
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
    image = condition.images[name]
    return {
        "image_key": "" if image.derive else image.image_key,
        "derive": image.derive,
        "scale": image.scale if image.derive == "low_resolution" else 0,
    }


def images_config(config: ConfigDict, tokenizer: Tokenizer) -> ConfigDict:
    """The tokenizer's config with this run's data, for the pipeline of images."""
    images = tokenizer.config.copy_and_resolve_references()
    with images.unlocked():
        images.seed, images.data = config.seed, config.data
        images.training.batch_size = config.training.batch_size
        if config.tokenizer.resolution:
            images.model.resolution = config.tokenizer.resolution
    return images


def condition_sources(
    config: ConfigDict, tokenizer: Tokenizer
) -> tuple[ConditionImage | Coordinates, ...]:
    """What the pipeline of images reads beside them for a resolved config's conditions.

    Raises:
        ConfigError: a condition is none that can be read beside images.
    """
    condition, sources = config.condition, []
    for name in condition.kinds:
        if name == "coordinates":
            sources.append(Coordinates(tokenizer.factor, condition.coordinates.intervals))
        elif name in condition.images:
            image = condition.images[name]
            sources.append(
                ConditionImage(
                    name=name,
                    image_key=image.image_key,
                    num_labels=image.num_labels,
                    derive=image.derive,
                    scale=image.scale,
                )
            )
        elif name != "class":
            raise ConfigError(
                f"config.condition.kinds has {name}, which no data set of images has; write its "
                "tokens to disk beside the codes and set config.data.codes."
            )
    return tuple(sources)
