"""Checkpoints of CompVis/taming-transformers to exports, and runs, checkpoints and exports back."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from ml_collections import ConfigDict

from vqgan_jax.configuration import downsampling_factor
from vqgan_jax.interop import taming, torch_file, torch_writer
from vqgan_jax.interop.taming_options import ConversionError, read_yaml
from vqgan_jax.interop.taming_transformer import ROOTS as TRANSFORMER_ROOTS
from vqgan_jax.interop.taming_transformer import (
    state_dict_from_transformer,
    transformer_from_state_dict,
    transformer_state_dict_of,
)
from vqgan_jax.interop.taming_transformer_yaml import (
    is_transformer,
    transformer_from_yaml,
    yaml_from_transformer,
)
from vqgan_jax.interop.taming_yaml import config_from_yaml, reference_class, yaml_from_config
from vqgan_jax.interop.wrappers import unwrap
from vqgan_jax.training.checkpoints import (
    TOKENIZER,
    condition_folder,
    read_variables,
    tokenizer_path,
    write_export,
)


def convert(checkpoint_file: Path, description_file: Path, output: Path, weights: str = "") -> None:
    """Writes the export `output` from a PyTorch file and its yaml, and prints what is in it.

    `weights` are those of `wrappers.unwrap`: "ema" or "raw"; empty for the average where there is
    one.
    """
    if output.exists():
        raise ConversionError(f"{output} exists already; choose another --output.")
    project = read_yaml(description_file)
    if is_transformer(project):
        _convert_transformer(checkpoint_file, project, output, weights)
    else:
        _convert_tokenizer(checkpoint_file, project, output, weights)


def _read(checkpoint_file: Path, roots: Sequence[str], weights: str) -> dict:
    """The tensors of a model in a file, with a line on each thing that was chosen."""
    tensors, notes = unwrap(torch_file.read_checkpoint(checkpoint_file), roots, weights)
    for note in notes:
        print(f"Takes {note}.")
    if not torch_file.has_checksums(checkpoint_file):
        print("PyTorch's format before 1.6 has no checksums: damaged weights would not be noticed.")
    return tensors


def _convert_tokenizer(checkpoint_file: Path, project: Mapping, output: Path, weights: str) -> None:
    config = config_from_yaml(project)
    state_dict = taming.state_dict_of(_read(checkpoint_file, taming.ROOTS, weights))
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
    print(f"  python -m vqgan_jax.reconstruct --checkpoint={output} --dataset=FOLDER --output=seen")


def _convert_transformer(
    checkpoint_file: Path, project: Mapping, output: Path, weights: str
) -> None:
    description = transformer_from_yaml(project)
    config, tokenizer = description.config, description.tokenizer
    state_dict = transformer_state_dict_of(_read(checkpoint_file, TRANSFORMER_ROOTS, weights))
    converted = transformer_from_state_dict(state_dict, description)
    tokenizers = {TOKENIZER: (tokenizer, converted.tokenizer)}
    for name, (variables, _) in converted.of_conditions.items():
        tokenizers[condition_folder(name)] = description.of_conditions[name], variables
    write_export(output, config, {"params": converted.params}, tokenizers=tokenizers)

    model, report = config.model, converted.report
    codes = model.codebook_size
    others = description.vocab_size - codes
    print(f"Read Net2NetTransformer from {checkpoint_file}:")
    print(f"  parameters     {converted.parameters:,}")
    print(f"  form           {_form(model)}")
    print(f"  grid           {_grid(model)}")
    print(f"  condition      {_condition(config.condition)}")
    if others:
        print(f"  vocabulary     {codes:,} codes; {others:,} tokens that are none are never drawn")
    print(f"  tokenizer      {_tokenizer(report, tokenizer)}")
    left_out = Counter(report.left_out)
    for name, (_, own) in converted.of_conditions.items():
        print(f"  of {name:<11} {_tokenizer(own, description.of_conditions[name])}")
        left_out.update(own.left_out)
    print(f"  left out       {_listed(left_out)}")
    given = [kind for kind in config.condition.kinds if kind not in ("class", "coordinates")]
    options = "".join(f" --condition={kind}=FILE" for kind in given)
    print(f"Wrote {output}. To draw from it:")
    print(f"  python -m vqgan_jax.sample --checkpoint={output}{options} --output=samples")


def convert_back(source: Path, output: Path) -> None:
    """Writes the PyTorch file `output` and the yaml beside it from a run, checkpoint or export."""
    if output.suffix == ".yaml":
        raise ConversionError(f"--output={output} is where the yaml goes; name it X.ckpt.")
    description_file = output.with_suffix(".yaml")
    for path in (output, description_file):
        if path.exists():
            raise ConversionError(f"{path} exists already; choose another --output.")
    config, variables, discriminator = read_variables(source)
    if config.stage == "transformer":
        _convert_transformer_back(source, config, variables["params"], output, description_file)
    else:
        _convert_tokenizer_back(source, config, variables, discriminator, output, description_file)


def _convert_tokenizer_back(
    source: Path,
    config: ConfigDict,
    variables: Mapping,
    discriminator: Mapping | None,
    output: Path,
    description_file: Path,
) -> None:
    without = "none in the input"
    if discriminator is not None and config.discriminator.norm == "group":
        without = "left out, since the reference has none with GroupNorm"
        discriminator = None
    elif discriminator is not None and config.discriminator.kind != "patch":
        without = f"left out, since the reference has none of the kind {config.discriminator.kind}"
        discriminator = None
    description = yaml_from_config(config)
    state_dict = taming.state_dict_from_variables(variables, config, discriminator)
    _write(state_dict, description, output, description_file)

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


def _convert_transformer_back(
    source: Path, config: ConfigDict, params: Mapping, output: Path, description_file: Path
) -> None:
    tokenizer, variables, _ = read_variables(tokenizer_path(source))
    of_conditions = {
        name: read_variables(tokenizer_path(source, condition_folder(name)))[:2]
        for name in config.condition.kinds
        if name in config.condition.images
    }
    configs = {name: own for name, (own, _) in of_conditions.items()}
    description = yaml_from_transformer(config, tokenizer, configs)
    state_dict = state_dict_from_transformer(params, config, variables, tokenizer, of_conditions)
    _write(state_dict, description, output, description_file)

    print(f"Wrote Net2NetTransformer of {source} to {output}:")
    print(f"  tensors        {len(state_dict)}")
    print(f"  form           {_form(config.model)}")
    print(f"  grid           {_grid(config.model)}")
    print(f"  condition      {_condition(config.condition)}")
    print(f"  tokenizer      {reference_class(tokenizer)} f{downsampling_factor(tokenizer.model)}")
    for name, own in configs.items():
        print(f"  of {name:<11} {reference_class(own)} f{downsampling_factor(own.model)}")
    print("  left out       optimizer states")
    print(f"Wrote {description_file}. To read both in the reference:")
    print("  Net2NetTransformer(**config.model.params).load_state_dict(")
    print(f'      torch.load("{output}")["state_dict"])')


def _write(state_dict: Mapping, description: Mapping, output: Path, description_file: Path) -> None:
    text = yaml.safe_dump(description, sort_keys=False)
    torch_writer.write_checkpoint(output, {"state_dict": state_dict})
    with description_file.open("x", encoding="utf-8") as file:
        file.write(text)


def _form(model: ConfigDict) -> str:
    return f"{model.num_layers} layers of {model.width} channels, {model.num_heads} heads"


def _grid(model: ConfigDict) -> str:
    return f"{model.grid[0]}x{model.grid[1]} codes in the order {model.order}"


def _tokenizer(report: taming.Report, config: ConfigDict) -> str:
    codes, dimensions = report.codebook
    return (
        f"{report.model} f{downsampling_factor(config.model)}, {codes:,} codes of {dimensions} "
        f"dimensions, {report.parameters:,} parameters"
    )


def _condition(condition: ConfigDict) -> str:
    if not condition.kinds:
        return "none, a start token"
    (kind,) = condition.kinds  # more are none of the reference's
    if kind == "class":
        return f"one of {condition.num_classes:,} classes"
    if kind == "coordinates":
        return f"coordinates, in {condition.coordinates.intervals:,} intervals"
    if kind == "layout":
        layout = condition.layout
        return (
            f"a layout of up to {layout.max_objects} objects of {layout.num_classes:,} classes, "
            f"{layout.places}"
        )
    image = condition.images[kind]
    what = f"a map of {image.num_labels} labels" if image.num_labels else "an image"
    return f"{kind}, {what} of {image.grid[0]}x{image.grid[1]} codes"


def _listed(groups: dict[str, int]) -> str:
    return ", ".join(f"{name}.* ({count} tensors)" for name, count in groups.items()) or "nothing"
