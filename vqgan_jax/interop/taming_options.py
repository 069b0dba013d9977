"""Options in a yaml file of CompVis/taming-transformers, as the types that our configs have.

A description of a model there is a `target`, the name of its class, and its `params`; models within
models are described the same way. Errors name the yaml's key.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from ml_collections import ConfigDict

from vqgan_jax.configuration.common import shortened, value_at
from vqgan_jax.configuration.documents import MAX_DEPTH, read_bytes
from vqgan_jax.errors import DataError

MOST_YAML_BYTES = 2**17  # published descriptions have some 5,000
MOST_ALIASES = 16  # no published description has any
MOST_NUMBERS = 64  # in a list
MOST_DIGITS = 1024  # of a number; yaml's base of 60 takes time that grows with their square
_SHOWN = 4


class ConversionError(ValueError):
    """A description or state dict that cannot be converted; says what differs and where."""


def read_yaml(path: Path) -> Mapping:
    """What is in a yaml file.

    Raises:
        ConversionError: there is none, or it is no yaml file with named options.
    """
    try:
        text = read_bytes(path, MOST_YAML_BYTES).decode("utf-8")
        _check_size(text)
        project = yaml.safe_load(text)
    except DataError as error:
        raise ConversionError(str(error)) from None
    except Exception as error:  # yaml's readers of numbers and dates raise Python's own errors
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConversionError(f"{path}: is no yaml file ({reason}).") from None
    if not isinstance(project, Mapping):
        raise ConversionError(f"{path}: is no model description of the reference.")
    return project


def _check_size(text: str) -> None:
    """Raises `ValueError` for what takes more than its text: depth, aliases, long numbers."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > MAX_DEPTH or aliases > MOST_ALIASES:
            raise ValueError(f"more than {MAX_DEPTH} levels or {MOST_ALIASES} aliases")
        value = event.value if isinstance(event, yaml.ScalarEvent) else ""
        if len(value) > MOST_DIGITS and value[0] in "+-.0123456789":
            raise ValueError(f"a number of more than {MOST_DIGITS} digits")


def model_part(project: Mapping) -> Mapping:
    """The model's description in a whole project's, which may be the model's alone.

    Raises:
        ConversionError: there is none.
    """
    description = project.get("model", project)
    if not isinstance(description, Mapping) or "target" not in description:
        raise ConversionError(
            "The yaml has no model.target: it is no model description of the reference."
        )
    return description


def class_name(description: Mapping) -> str:
    """The last part of a target; empty where there is none."""
    target = description.get("target", "")
    return target.rpartition(".")[2] if isinstance(target, str) else ""


def part(parent: Mapping, key: str, where: str, default: Mapping | None = None) -> Mapping:
    """The options under a key; `where` names them in an error.

    Raises:
        ConversionError: there are none and there is no default.
    """
    options = parent.get(key)
    if options is None:
        options = default
    if not isinstance(options, Mapping):
        raise ConversionError(f"The yaml's {where} is missing or no table of options.")
    return options


def require_fixed(options: Mapping, fixed: Mapping, where: str) -> None:
    """Raises `ConversionError` unless options have the one value that is supported.

    Args:
        options: what the yaml says.
        fixed: (the reference's default, what is supported) of each option.
        where: what options are of.
    """
    for key, (default, supported) in fixed.items():
        value = options.get(key, default)
        if value != supported:
            raise ConversionError(
                f"{where}.{key} is {shortened(value)}; only {supported} is supported."
            )


def assign(
    config: ConfigDict,
    options: Mapping,
    table: Mapping[str, tuple[str, type]],
    where: str,
    required: set[str] = frozenset(),
) -> None:
    """Sets the config's keys from options, of which `table` says the key and the type.

    Raises:
        ConversionError: one has another type, or a required one is missing.
    """
    for key, (path, kind) in table.items():
        if key not in options:
            if key in required:
                raise ConversionError(f"The yaml lacks {where}.{key}.")
            continue
        config.update_from_flattened_dict({path: number(options, key, kind)})


def number(options: Mapping, key: str, kind: type, default=None):
    """An option as a value of type `kind`: int, float, str, or tuple of whole numbers.

    Raises:
        ConversionError: it is none.
    """
    value = options.get(key, default)
    try:
        if isinstance(value, bool | dict) or (kind is tuple and len(value) > MOST_NUMBERS):
            raise ValueError
        # plain yaml reads 1e-6 as text, the reference's reader as a number
        if kind is tuple:
            return tuple(int(item) for item in value)
        if kind is int and int(value) != float(value):
            raise ValueError
        if kind is not str and not math.isfinite(float(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ConversionError(
            f"The yaml's {key} is {shortened(value)}; it must be "
            f"{'a list of whole numbers' if kind is tuple else 'of type ' + kind.__name__}."
        ) from None


def values(config: ConfigDict, table: Mapping[str, tuple[str, type]]) -> dict:
    """The inverse of `assign`: options for a yaml file."""
    return {key: value_at(config, path) for key, (path, _) in table.items()}


def some(names: Iterable[str]) -> str:
    """The first few names, for an error message."""
    names = [name if len(name) <= 80 else f"{name[:77]}..." for name in names]
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
