"""Converts checkpoints of CompVis/taming-transformers to exports, and runs of ours back.

    python -m vqgan_jax.convert --input=last.ckpt --config=model.yaml --output=exports/imagenet
    python -m vqgan_jax.convert --reverse --input=runs/quickstart --output=quickstart.ckpt

The yaml says whether it is a tokenizer or a transformer, whose export has its tokenizers inside.
PyTorch is not needed, and nothing in a checkpoint is executed. Existing files stay as they are.
"""

import pathlib
import sys

from absl import flags

from vqgan_jax import command_line
from vqgan_jax.command_line.help import group, require


def define_flags() -> None:
    """The flags of this command."""
    with group("Input and output"):
        flags.DEFINE_string(
            "input", None, "A PyTorch file; with --reverse a run, a checkpoint or an export."
        )
        flags.DEFINE_string("output", None, "A new directory; with --reverse a new file X.ckpt.")
        flags.DEFINE_string("config", None, "The model's yaml, as the reference describes it.")
    with group("How"):
        flags.DEFINE_enum("source", "taming", ["taming"], "The project of the PyTorch file.")
        flags.DEFINE_enum(
            "weights",
            "",
            ["", "ema", "raw"],
            "Which weights of a file with a moving average: ema, the average, which is the "
            "default; or raw, those beside it.",
        )
        flags.DEFINE_bool("reverse", False, "From ours to PyTorch, with X.yaml beside X.ckpt.")
    require("input", "output")


def main() -> None:
    """Converts what the flags say."""
    from vqgan_jax.interop.conversion import convert, convert_back
    from vqgan_jax.interop.taming_options import ConversionError
    from vqgan_jax.interop.torch_pickle import CheckpointFileError

    options = flags.FLAGS
    source, output = pathlib.Path(options.input), pathlib.Path(options.output)
    try:
        if options.reverse and options.config:
            raise ConversionError("--config does not go with --reverse: the input holds its own.")
        if options.reverse and options.weights:
            raise ConversionError("--weights is for PyTorch files; it does not go with --reverse.")
        if options.reverse:
            convert_back(source, output)
        elif options.config:
            convert(source, pathlib.Path(options.config), output, options.weights)
        else:
            raise ConversionError("--config is missing: the yaml that describes the model.")
    except (ConversionError, CheckpointFileError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
