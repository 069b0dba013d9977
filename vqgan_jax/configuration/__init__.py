"""The keys of every config, their defaults and their checks.

A file in `configs/` starts from `tokenizer_config()` or `transformer_config()` and changes what its
experiment needs. The config is locked and typed, so a misspelt key or an ill-typed value is an
error that names the key.
"""

from typing import Any

from ml_collections import ConfigDict

from vqgan_jax.configuration.common import (
    ConfigError,
    dataset_name,
    parse_argument,
    require,
    shortened,
    to_json,
    tuples,
)
from vqgan_jax.configuration.documents import parse_json
from vqgan_jax.configuration.ranges import defaults
from vqgan_jax.configuration.tokenizer import (
    downsampling_factor,
    tokenizer_config,
    validate_tokenizer,
    validate_tokenizer_model,
)
from vqgan_jax.configuration.transformer import (
    add_condition_image,
    condition_image_section,
    transformer_config,
    validate_transformer,
    validate_transformer_model,
)
from vqgan_jax.errors import DataError

__all__ = [
    "add_condition_image",
    "ConfigError",
    "dataset_name",
    "downsampling_factor",
    "from_json",
    "parse_argument",
    "to_json",
    "tokenizer_config",
    "transformer_config",
    "validate",
    "validate_stored",
]

_STAGES = {
    "tokenizer": (tokenizer_config, validate_tokenizer),
    "transformer": (transformer_config, validate_transformer),
}


def from_json(text: str | bytes) -> ConfigDict:
    """The config that `to_json` wrote, with today's defaults for keys that are newer.

    Raises:
        ConfigError: it is no JSON, of no known stage, or has an unknown key or a value of another
            type.
    """
    try:
        values = parse_json(text, "The config")
    except DataError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(values, dict):
        raise ConfigError("The config is no JSON object.")
    make, _ = _of_stage(values.get("stage"))
    config = make()
    if isinstance(data := values.get("data"), dict):
        data.setdefault("folder_rules", 1)  # as it was before configs said it
    values = tuples(values)
    _check_form(values, config, "config")
    with config.unlocked():
        config.update(values)
    return config


def _check_form(values: Any, known: Any, path: str) -> None:
    """Raises `ConfigError` where stored values are not of the keys and types of a config."""
    if isinstance(known, ConfigDict):
        require(isinstance(values, dict), f"{path} is {shortened(values)}, and no section.")
        for key, value in values.items():
            if path == "config.condition.images":
                of_image = ConfigDict(defaults(condition_image_section()))
                _check_form(value, of_image, f"{path}.{key}")
            else:
                require(key in known, f"{path} has no key {shortened(key)}.")
                _check_form(value, known[key], f"{path}.{key}")
        return
    kind = (int, float) if isinstance(known, float) else type(known)
    fits = isinstance(values, kind) and isinstance(values, bool) == isinstance(known, bool)
    require(fits, f"{path} is {shortened(values)}; it must be like {shortened(known)}.")


def validate(config: ConfigDict) -> None:
    """Raises `ConfigError` for values that cannot work, before anything compiles."""
    _, check = _of_stage(config.stage)
    check(config)


def validate_stored(config: ConfigDict) -> None:
    """Raises `ConfigError` where a stored config describes no model that could be built.

    What only training needs is not looked at: runs of before may have what is refused today.
    """
    if config.stage == "tokenizer":
        validate_tokenizer_model(config)
    else:
        validate_transformer_model(config)


def _of_stage(stage):
    if not isinstance(stage, str) or stage not in _STAGES:
        raise ConfigError(
            f"config.stage is {shortened(stage)}; it must be one of {', '.join(_STAGES)}."
        )
    return _STAGES[stage]
