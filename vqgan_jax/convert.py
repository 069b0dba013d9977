"""Converts a checkpoint of CompVis/taming-transformers to an export, or a run of ours back.

    python -m vqgan_jax.convert --input=last.ckpt --config=model.yaml --output=exports/imagenet
    python -m vqgan_jax.convert --reverse --input=runs/quickstart --output=quickstart.ckpt

PyTorch is not needed, and nothing in a checkpoint is executed. Existing files stay as they are.
"""

import sys
from pathlib import Path

import yaml
from absl import flags

from vqgan_jax import commands
from vqgan_jax.configuration import downsampling_factor
from vqgan_jax.interop import taming, torch_file
from vqgan_jax.interop.taming_yaml import (
    ConversionError,
    config_from_yaml,
    reference_class,
    yaml_from_config,
)
from vqgan_jax.interop.torch_pickle import CheckpointFileError
from vqgan_jax.training.checkpoints import read_variables, write_export


def convert(checkpoint_file: Path, description_file: Path, output: Path) -> None:
    """Writes the export `output` from a PyTorch file and its yaml, and prints what is in it."""
    if output.exists():
        raise ConversionError(f"{output} exists already; choose another --output.")
    config = config_from_yaml(description_file)
    state_dict = taming.state_dict_of(torch_file.read_checkpoint(checkpoint_file))
    variables, report = taming.variables_from_state_dict(state_dict, config)
    discriminator = taming.discriminator_from_state_dict(state_dict, config)
    write_export(output, config, variables, discriminator)

    codes, dimensions = report.codebook
    left_out = dict(report.left_out)
    if discriminator is not None:
        del left_out["loss.discriminator"]
    print(f"Read {report.model} f{downsampling_factor(config.model)} from {checkpoint_file}:")
    print(f"  parameters     {report.parameters:,}")
    print(f"  codebook       {codes:,} codes of {dimensions} dimensions")
    print(f"  discriminator  {'no' if discriminator is None else 'yes, for fine-tuning'}")
    print(f"  left out       {_listed(left_out)}")
    print(f"Wrote {output}. To see what it makes of images:")
    print(f"  python -m vqgan_jax.reconstruct --checkpoint={output} --input=PICTURES --output=seen")


def convert_back(source: Path, output: Path) -> None:
    """Writes the PyTorch file `output` and the yaml beside it from a run, checkpoint or export."""
    if output.suffix == ".yaml":
        raise ConversionError(f"--output={output} is where the yaml goes; name it X.ckpt.")
    description_file = output.with_suffix(".yaml")
    for path in (output, description_file):
        if path.exists():
            raise ConversionError(f"{path} exists already; choose another --output.")
    config, variables, discriminator = read_variables(source)
    without = "none in the input"
    if discriminator is not None and config.discriminator.norm == "group":
        without = "left out, since the reference has none with GroupNorm"
        discriminator = None
    state_dict = taming.state_dict_from_variables(variables, config, discriminator)
    description = yaml.safe_dump(yaml_from_config(config), sort_keys=False)
    torch_file.write_checkpoint(output, {"state_dict": state_dict})
    with description_file.open("x", encoding="utf-8") as file:
        file.write(description)

    name = reference_class(config)
    quantizer = config.model.quantizer
    print(f"Wrote {name} f{downsampling_factor(config.model)} of {source} to {output}:")
    print(f"  tensors        {len(state_dict)}")
    unit = ", at unit length" if quantizer.l2_normalize else ""
    size = f"{quantizer.codebook_size:,} codes of {quantizer.code_dim} dimensions"
    print(f"  codebook       {size}{unit}")
    print(f"  discriminator  {without if discriminator is None else 'yes'}")
    print("  left out       optimizer states, the perceptual network")
    print(f"Wrote {description_file}. To read both in the reference:")
    print(f"  {name}(**config.model.params).load_state_dict(")
    print(f'      torch.load("{output}")["state_dict"], strict=False)')


def _listed(groups: dict[str, int]) -> str:
    return ", ".join(f"{name}.* ({count} tensors)" for name, count in groups.items()) or "nothing"


def main() -> None:
    """Converts what the flags say."""
    options = flags.FLAGS
    try:
        if options.reverse and options.config:
            raise ConversionError("--config does not go with --reverse: the input holds its own.")
        if options.reverse:
            convert_back(Path(options.input), Path(options.output))
        elif options.config:
            convert(Path(options.input), Path(options.config), Path(options.output))
        else:
            raise ConversionError("--config is missing: the yaml that describes the model.")
    except (ConversionError, CheckpointFileError) as error:
        sys.exit(f"error: {error}")


def _define_flags() -> None:
    flags.DEFINE_enum("source", "taming", ["taming"], "The system that the other side is of.")
    flags.DEFINE_string(
        "input", None, "A PyTorch file; with --reverse a run, checkpoint or export.", required=True
    )
    flags.DEFINE_string("config", None, "The model's yaml, as the reference describes it.")
    flags.DEFINE_string(
        "output", None, "A new directory; with --reverse a new file X.ckpt.", required=True
    )
    flags.DEFINE_bool("reverse", False, "From ours to PyTorch, with X.yaml beside X.ckpt.")


if __name__ == "__main__":
    _define_flags()
    commands.run(main)
