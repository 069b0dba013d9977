"""State dicts of CompVis/taming-transformers' Net2NetTransformer to our variables and back.

One file holds both stages: `transformer.*` is the GPT and `first_stage_model.*` the tokenizer.
Start tokens and classes have no tensors of their own. `taming_transformer_yaml.py` reads the yaml,
without which the number of heads and what the condition is would not be known.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from vqgan_jax.interop import taming
from vqgan_jax.interop.taming_gpt import (
    gpt_masks,
    gpt_params_from_state_dict,
    gpt_shapes,
    state_dict_from_gpt_params,
)
from vqgan_jax.interop.taming_options import ConversionError
from vqgan_jax.interop.taming_transformer_yaml import TransformerDescription

_GPT = "transformer."
_FIRST_STAGE = "first_stage_model."
_OTHER_PARTS = {
    "cond_stage_model.": "a condition stage with weights",
    "permuter.": "an order of codes other than that of rows",
}


@dataclasses.dataclass(frozen=True)
class ConvertedTransformer:
    """Both stages of a checkpoint.

    Attributes:
        params: of our `Transformer`.
        tokenizer: the variables of the tokenizer's `VQGAN`.
        parameters: how many weights the transformer has.
        report: of the tokenizer.
    """

    params: dict
    tokenizer: dict
    parameters: int
    report: taming.Report


def transformer_state_dict_of(checkpoint: Mapping) -> dict[str, np.ndarray]:
    """The state dict of a transformer's checkpoint, as of `taming.tensors_of`.

    Raises:
        ConversionError: it holds none, or that of a tokenizer, or a part is not supported.
    """
    tensors = taming.tensors_of(checkpoint)
    if any(name.startswith(("encoder.", "decoder.")) for name in tensors):
        raise ConversionError(
            "The yaml describes a transformer and the checkpoint is a tokenizer's: it takes the "
            "yaml of the tokenizer, whose model.target is VQModel or GumbelVQ."
        )
    for part in (_GPT, _FIRST_STAGE):
        if not any(name.startswith(part) for name in tensors):
            raise ConversionError(
                f"The checkpoint holds no transformer with its tokenizer: it has no tensors "
                f"{part}*; it has {taming.some(map(str, tensors or checkpoint))}."
            )
    for part, meaning in _OTHER_PARTS.items():
        if any(name.startswith(part) for name in tensors):
            raise ConversionError(
                f"The checkpoint has {meaning} ({part}*) and the yaml describes none: they do not "
                "belong together."
            )
    unknown = [name for name in tensors if not name.startswith((_GPT, _FIRST_STAGE))]
    if unknown:
        raise ConversionError(f"The checkpoint has unknown tensors: {taming.some(unknown)}.")
    return tensors


def transformer_from_state_dict(
    state_dict: Mapping[str, np.ndarray], description: TransformerDescription
) -> ConvertedTransformer:
    """Both stages' variables, float32, from the state dict of a Net2NetTransformer.

    Of a vocabulary that is larger than the codebook, tokens that are no codes lose their place in
    table and head: drawn, they could not be decoded. What is the condition among them goes to the
    condition's own table.

    Raises:
        ConversionError: tensors are missing, unexpected, of another shape than the yaml says, or
            not finite.
    """
    config = description.config
    gpt = {
        name: value
        for name, value in state_dict.items()
        if name.startswith(_GPT) and not name.endswith(".attn.mask")
    }
    _check_sizes(gpt, description)
    params = gpt_params_from_state_dict(gpt)
    taming.check_finite({".".join(path): leaf for path, leaf in flatten_dict(params).items()})

    codes, table = config.model.codebook_size, params["code_embedding"]["embedding"]
    if config.condition.own_table:
        params["condition_embedding"] = {"embedding": _condition_rows(config.condition, table)}
    params["code_embedding"]["embedding"] = table[:codes]
    params["head"]["kernel"] = np.ascontiguousarray(params["head"]["kernel"][:, :codes])

    first_stage = {
        name.removeprefix(_FIRST_STAGE): value
        for name, value in state_dict.items()
        if name.startswith(_FIRST_STAGE)
    }
    try:
        tokenizer, report = taming.variables_from_state_dict(first_stage, description.tokenizer)
    except ConversionError as error:
        raise ConversionError(f"In first_stage_model: {error}") from error
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return ConvertedTransformer(params, tokenizer, parameters, report)


def _condition_rows(condition: ConfigDict, table: np.ndarray) -> np.ndarray:
    """The table of `conditions.kinds.Conditions`: classes and none, or the start token alone."""
    if not condition.kinds:
        return table[[condition.start_token]]
    none = np.zeros((1, table.shape[1]), table.dtype)  # the reference leaves no class out
    return np.concatenate([table[: condition.num_classes], none])


def _check_sizes(gpt: Mapping[str, np.ndarray], description: TransformerDescription) -> None:
    """Names the yaml's key where one wrong number would make many tensors wrong."""
    model = description.config.model
    layers = {name.split(".")[2] for name in gpt if name.startswith(f"{_GPT}blocks.")}
    if layers and len(layers) != model.num_layers:
        raise ConversionError(
            f"The yaml says n_layer is {model.num_layers}, and the checkpoint has {len(layers)} "
            f"blocks: n_layer must be {len(layers)}, or the two do not belong together."
        )
    for name, axis, expected, key in (
        ("tok_emb.weight", 0, description.vocab_size, "vocab_size"),
        ("tok_emb.weight", 1, model.width, "n_embd"),
        ("pos_emb", 1, model.max_length, "block_size"),
    ):
        shape = np.shape(gpt.get(_GPT + name, ()))
        if axis < len(shape) and shape[axis] != expected:
            raise ConversionError(
                f"The yaml says {key} is {expected}, and the checkpoint's {_GPT}{name} has shape "
                f"{shape}: {key} must be {shape[axis]}, or the two do not belong together."
            )
    taming.check_shapes(
        {name: np.shape(value) for name, value in gpt.items()},
        gpt_shapes(description.vocab_size, model.max_length, model.num_layers, model.width),
    )


def state_dict_from_transformer(
    params: Mapping, config: ConfigDict, variables: Mapping, tokenizer: ConfigDict
) -> dict[str, np.ndarray]:
    """The reference's state dict: the inverse, for transformers that its yaml can describe.

    The token of an unconditional model with a table of its own becomes code 0. It only ever stands
    first, so that the first position takes on the difference.

    Args:
        params: of our `Transformer`.
        config: its config.
        variables: those of the tokenizer's `VQGAN`.
        tokenizer: its config.

    Raises:
        ConversionError: the variables are not those of the configs' models.
    """
    params = dict(params)
    if config.condition.own_table and not config.condition.kinds:
        start = np.asarray(params.pop("condition_embedding")["embedding"][0])
        positions = np.array(params["position_embedding"])
        positions[0] += start - np.asarray(params["code_embedding"]["embedding"][0])
        params["position_embedding"] = positions
    gpt = state_dict_from_gpt_params(params)
    model = config.model
    block_size = gpt[f"{_GPT}pos_emb"].shape[1]
    expected = gpt_shapes(model.codebook_size, block_size, model.num_layers, model.width)
    taming.check_shapes({name: value.shape for name, value in gpt.items()}, expected)
    first_stage = taming.state_dict_from_variables(variables, tokenizer)
    return (
        gpt
        | gpt_masks(model.num_layers, block_size, model.num_unmasked)
        | {_FIRST_STAGE + name: value for name, value in first_stage.items()}
    )
