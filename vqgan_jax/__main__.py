"""Lists the commands, or runs one: `python -m vqgan_jax`, `vqgan-jax train --config=quickstart`."""

import ast
import contextlib
import difflib
import pathlib
import runpy
import sys

# In the order in which they are mostly used.
COMMANDS = ("train", "tokenize", "sample", "reconstruct", "describe", "probe", "convert", "plan")


def main() -> None:
    """Runs the command that is named first, or lists all."""
    if len(sys.argv) < 2 or sys.argv[1] in ("--help", "-h", "help"):
        lines = ["Usage: vqgan-jax COMMAND --help, or python -m vqgan_jax.COMMAND --help", ""]
        lines += [f"  {name:<11} {_title(name)}" for name in COMMANDS]
        lines += ["", "First steps: vqgan-jax train --config=quickstart"]
        with contextlib.suppress(BrokenPipeError):
            print("\n".join(lines), flush=True)
        return
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        nearest = f" Did you mean {close[0]}?" if close else ""
        sys.exit(f"error: There is no command {name!r}.{nearest} There are {', '.join(COMMANDS)}.")
    runpy.run_module(f"vqgan_jax.{name}", run_name="__main__", alter_sys=True)


def _title(name: str) -> str:
    """The first line of a command's docstring."""
    source = (pathlib.Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
