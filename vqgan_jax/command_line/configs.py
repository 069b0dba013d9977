"""The configs that come with the package: found by name, listed, and shown key by key."""

import ast
import json
import pathlib
import textwrap
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

import vqgan_jax

_PACKAGE = pathlib.Path(vqgan_jax.__file__).parent
# Of an installed package, and of a checkout.
FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")

_COLUMNS = 100
_JOINED = ("config", "tokenizer_config", "workdir")
STORED_CONFIG = pathlib.Path(__file__).with_name("stored_config.py")


def config_files() -> dict[str, pathlib.Path]:
    """The configs of the package, by name."""
    for folder in FOLDERS:
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.py"))}
    return {}


def with_config_found(argument: str) -> str:
    """A command's argument, with the path of the config in place of its name.

    `--config=quickstart` and `--config=configs/quickstart.py` are the config of the package where
    there is no such file in the current folder; after a colon stays what was there.
    """
    for flag in ("--config=", "-config=", "--tokenizer_config="):
        if not argument.startswith(flag):
            continue
        name, colon, variant = argument.removeprefix(flag).partition(":")
        path = pathlib.PurePath(name)
        if pathlib.Path(name).is_file() or path.parent.name not in ("", "configs"):
            return argument
        if found := config_files().get(path.name.removesuffix(".py")):
            return f"{flag}{_shown(found)}{colon}{variant}"
    return argument


def joined(arguments: Sequence[str]) -> list[str]:
    """Arguments in which `--config NAME` and `--workdir DIR` are one word, as `--config=NAME`."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1].lstrip("-") in _JOINED and found[-1].startswith("-"):
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def with_stored_config(arguments: Sequence[str]) -> list[str]:
    """A command's arguments, where only --workdir is given with the config of the run there."""
    arguments = list(arguments)
    if any(argument.startswith(("--config=", "-config=")) for argument in arguments):
        return arguments
    for argument in arguments[1:]:
        flag, _, workdir = argument.partition("=")
        if flag in ("--workdir", "-workdir") and workdir:
            return [arguments[0], f"--config={STORED_CONFIG}:{workdir}", *arguments[1:]]
    return arguments


def _shown(path: pathlib.Path) -> str:
    """Relative where that is shorter."""
    try:
        return str(path.relative_to(pathlib.Path.cwd()))
    except ValueError:
        return str(path)


def list_configs() -> Iterator[str]:
    """A line for each config: its name, what it is, and its variants below."""
    files = config_files()
    width = max(map(len, files), default=0)
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        title = (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".:")
        first, *rest = textwrap.wrap(title, _COLUMNS - width - 2) or [""]
        yield f"{name:<{width}}  {first}"
        yield from (f"{'':<{width}}  {line}" for line in rest)
        for variant in _variants(tree):
            if variant:
                yield f"{'':<{width}}  --config={name}:{variant}"


def _variants(tree: ast.Module) -> tuple[str, ...]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "VARIANTS":
            try:
                return tuple(ast.literal_eval(node.value))
            except ValueError:
                return ()
    return ()


def described_config(config: ConfigDict, prefix: str = "config") -> Iterator[str]:
    """A line for each key: its whole name and its value, as a flag takes it."""
    for key in sorted(config):
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from described_config(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key} = {json.dumps(value, default=list)}"
