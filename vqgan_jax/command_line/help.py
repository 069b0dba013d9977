"""What `--help` prints: a command's own flags in groups, each with its meaning and default.

It needs the flags' definitions alone, so it is there before JAX is imported.
"""

import contextlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType

from absl import flags

WIDTH, INDENT = 100, 26
SEVERAL_PROCESSES = "Several processes"  # shown by --helpfull alone

_groups: dict[str, list[str]] = {}  # names of flags
_required: set[str] = set()


def require(*names: str) -> None:
    """Marks flags that the command cannot do without."""
    _required.update(names)
    flags.mark_flags_as_required(list(names))


@contextlib.contextmanager
def group(title: str) -> Iterator[None]:
    """Flags that are defined within are listed below `title`."""
    before = set(flags.FLAGS)
    yield
    _groups.setdefault(title, []).extend(
        name
        for name in flags.FLAGS
        if name not in before and not _is_negation(name, flags.FLAGS[name])
    )


def help_text(command: ModuleType, full: bool = False) -> str:
    """The help of a command.

    Args:
        command: its module; the docstring has the text, with examples in indented paragraphs.
        full: with the flags of several processes, and those of libraries.
    """
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    lines = []
    for paragraph in paragraphs:
        lines += [*paragraph.splitlines(), ""]
    for title, names in _groups.items():
        if full or title != SEVERAL_PROCESSES:
            lines += [f"{title}:", *_described(names), ""]
    if full:
        own = {name for names in _groups.values() for name in names}
        others = sorted(
            name
            for name in flags.FLAGS
            if name not in own and not _is_negation(name, flags.FLAGS[name])
        )
        lines += ["Of libraries:", *_described(others)]
    elif SEVERAL_PROCESSES in _groups:
        lines += ["--helpfull also shows the flags for several processes."]
    return "\n".join(lines).rstrip()


def _described(names: list[str]) -> list[str]:
    lines = []
    for name in sorted(names, key=lambda name: not _is_required(flags.FLAGS[name])):
        flag = flags.FLAGS[name]
        text = _meaning(flag)
        if _is_required(flag):
            text = f"(required) {text}"
        elif flag.default not in (None, "", [], False) and not flag.boolean:
            text = f"{text} Default: {flag.default_as_str.strip(chr(39))}."
        left = f"  --{name}" if flag.boolean else f"  --{name}={_kind(flag)}"
        wrapped = textwrap.wrap(text, WIDTH - INDENT) or [""]
        if len(left) >= INDENT - 1:
            lines.append(left)
            left = ""
        lines.append(f"{left:<{INDENT}}{wrapped[0]}")
        lines += [" " * INDENT + line for line in wrapped[1:]]
    return lines


def _meaning(flag: flags.Flag) -> str:
    """The text that a flag was defined with, without what absl adds to it."""
    text = re.sub(r"^<[^>]*>: ", "", " ".join((flag.help or "").split()))
    return text.removesuffix("; repeat this option to specify a list of values").rstrip(";")


def _kind(flag: flags.Flag) -> str:
    """What a value looks like."""
    if choices := getattr(flag.parser, "enum_values", None):
        return "|".join(value for value in choices if value)
    kind = flag.flag_type()
    kinds = {
        "int": "N",
        "float": "X",
        "comma separated list of strings": "A,B",
        "config object": "NAME",
    }
    return kinds.get(kind.removeprefix("multi "), "TEXT")


def _is_negation(name: str, flag: flags.Flag) -> bool:
    return flag.name != name


def _is_required(flag: flags.Flag) -> bool:
    return flag.name in _required
