"""Options in a yaml file of CompVis/taming-transformers, as the types that our configs have.

A description of a model there is a `target`, the name of its class, and its `params`; models within
models are described the same way. Errors name the yaml's key.
"""

from collections.abc import Mapping
from pathlib import Path

import yaml
from ml_collections import ConfigDict

from vqgan_jax.configuration.common import value_at


class ConversionError(ValueError):
    """A description or state dict that cannot be converted; says what differs and where."""


def read_yaml(path: Path) -> Mapping:
    """What is in a yaml file.

    Raises:
        ConversionError: there is none, or it is no yaml file with named options.
    """
    try:
        project = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path}: there is no such file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"{path}: is no yaml file ({reason}).") from None
    if not isinstance(project, Mapping):
        raise ConversionError(f"{path}: is no model description of the reference.")
    return project


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
    return str(description.get("target", "")).rpartition(".")[2]


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
            raise ConversionError(f"{where}.{key} is {value}; only {supported} is supported.")


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
        # plain yaml reads 1e-6 as text, the reference's reader as a number
        if kind is tuple:
            return tuple(int(item) for item in value)
        if kind is int and int(value) != float(value):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ConversionError(
            f"The yaml's {key} is {value!r}; it must be "
            f"{'a list of whole numbers' if kind is tuple else 'of type ' + kind.__name__}."
        ) from None


def values(config: ConfigDict, table: Mapping[str, tuple[str, type]]) -> dict:
    """The inverse of `assign`: options for a yaml file."""
    return {key: value_at(config, path) for key, (path, _) in table.items()}
