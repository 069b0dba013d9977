"""The keys of every config, their defaults and their checks.

A file in `configs/` starts from `tokenizer_config()` or `transformer_config()` and changes what its
experiment needs. The config is locked and typed, so a misspelt key or an ill-typed value is an
error that names the key.
"""

import json

from ml_collections import ConfigDict

from vqgan_jax.configuration.common import ConfigError, parse_argument, to_json, tuples
from vqgan_jax.configuration.tokenizer import (
    downsampling_factor,
    tokenizer_config,
    validate_tokenizer,
)
from vqgan_jax.configuration.transformer import (
    add_condition_image,
    transformer_config,
    validate_transformer,
)

__all__ = [
    "add_condition_image",
    "ConfigError",
    "downsampling_factor",
    "from_json",
    "parse_argument",
    "to_json",
    "tokenizer_config",
    "transformer_config",
    "validate",
]

_STAGES = {
    "tokenizer": (tokenizer_config, validate_tokenizer),
    "transformer": (transformer_config, validate_transformer),
}


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote, with today's defaults for keys that are newer.

    Raises:
        ConfigError: it is of no known stage.
    """
    values = json.loads(text)
    make, _ = _of_stage(values.get("stage"))
    config = make()
    with config.unlocked():
        config.update(tuples(values))
    return config


def validate(config: ConfigDict) -> None:
    """Raises `ConfigError` for values that cannot work, before anything compiles."""
    _, check = _of_stage(config.stage)
    check(config)


def _of_stage(stage):
    if stage not in _STAGES:
        raise ConfigError(f"config.stage is {stage!r}; it must be one of {', '.join(_STAGES)}.")
    return _STAGES[stage]
