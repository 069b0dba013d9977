"""State dicts of CompVis/taming-transformers' Net2NetTransformer to our variables and back.

One file holds all stages: `transformer.*` is the GPT, `first_stage_model.*` the tokenizer, and
`cond_stage_model.*` the tokenizer of condition images; other conditions have no tensors of their
own. `permuter.*` is an order of codes other than row by row. `taming_transformer_yaml.py` reads the
yaml, without which the number of heads and what the condition is would not be known.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from vqgan_jax.conditions.kinds import make_kinds
from vqgan_jax.interop import taming
from vqgan_jax.interop.taming_conditions import may_share_rows
from vqgan_jax.interop.taming_gpt import (
    gpt_masks,
    gpt_params_from_state_dict,
    gpt_shapes,
    state_dict_from_gpt_params,
)
from vqgan_jax.interop.taming_options import ConversionError, some
from vqgan_jax.interop.taming_permuters import PERMUTER, check_buffers, permuter_buffers
from vqgan_jax.interop.taming_transformer_yaml import TransformerDescription
from vqgan_jax.interop.wrappers import unwrap

_GPT = "transformer."
_FIRST_STAGE = "first_stage_model."
_CONDITION_STAGE = "cond_stage_model."


@dataclasses.dataclass(frozen=True)
class ConvertedTransformer:
    """All stages of a checkpoint.

    Attributes:
        params: of our `Transformer`.
        tokenizer: the variables of the tokenizer's `VQGAN`.
        parameters: how many weights the transformer has.
        report: of the tokenizer.
        of_conditions: variables and report of the tokenizers of condition images, by name.
    """

    params: dict
    tokenizer: dict
    parameters: int
    report: taming.Report
    of_conditions: Mapping[str, tuple[dict, taming.Report]]


ROOTS = (_GPT, _FIRST_STAGE)  # of its names


def transformer_state_dict_of(checkpoint: Mapping) -> dict[str, np.ndarray]:
    """The state dict of a transformer's checkpoint, unwrapped as of `wrappers.unwrap`.

    Raises:
        ConversionError: it holds none, or that of a tokenizer, or a part is not supported.
    """
    tensors, _ = unwrap(checkpoint, ROOTS)
    if any(name.startswith(("encoder.", "decoder.")) for name in tensors):
        raise ConversionError(
            "The yaml describes a transformer and the checkpoint is a tokenizer's: it takes the "
            "yaml of the tokenizer, whose model.target is VQModel or GumbelVQ."
        )
    for part in (_GPT, _FIRST_STAGE):
        if not any(name.startswith(part) for name in tensors):
            raise ConversionError(
                f"The checkpoint holds no transformer with its tokenizer: it has no tensors "
                f"{part}*; it has {some(map(str, tensors or checkpoint))}."
            )
    known = (_GPT, _FIRST_STAGE, _CONDITION_STAGE, PERMUTER)
    unknown = [name for name in tensors if not name.startswith(known)]
    if unknown:
        raise ConversionError(f"The checkpoint has unknown tensors: {some(unknown)}.")
    return tensors


def transformer_from_state_dict(
    state_dict: Mapping[str, np.ndarray], description: TransformerDescription
) -> ConvertedTransformer:
    """All stages' variables, float32, from the state dict of a Net2NetTransformer.

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
    check_buffers(state_dict, config.model)
    taming.check_floating(gpt)
    params = gpt_params_from_state_dict(gpt)
    taming.check_finite({".".join(path): leaf for path, leaf in flatten_dict(params).items()})

    codes, table = config.model.codebook_size, params["code_embedding"]["embedding"]
    if config.condition.own_table:
        params["condition_embedding"] = {"embedding": _condition_rows(config, table)}
    params["code_embedding"]["embedding"] = table[:codes]
    params["head"]["kernel"] = np.ascontiguousarray(params["head"]["kernel"][:, :codes])

    tokenizer, report = _tokenizer(state_dict, _FIRST_STAGE, description.tokenizer)
    has_own = any(name.startswith(_CONDITION_STAGE) for name in state_dict)
    if has_own and not description.of_conditions:
        raise ConversionError(
            f"The checkpoint has a condition stage with weights ({_CONDITION_STAGE}*) and the yaml "
            "describes none: they do not belong together."
        )
    of_conditions = {}
    for name, own in description.of_conditions.items():
        # Tensors of a tokenizer of both are written once or twice.
        stage = _FIRST_STAGE if own is description.tokenizer else _CONDITION_STAGE
        of_conditions[name] = _tokenizer(state_dict, stage, own)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return ConvertedTransformer(params, tokenizer, parameters, report, of_conditions)


def _tokenizer(
    state_dict: Mapping[str, np.ndarray], stage: str, config: ConfigDict
) -> tuple[dict, taming.Report]:
    own = {
        name.removeprefix(stage): value
        for name, value in state_dict.items()
        if name.startswith(stage)
    }
    try:
        return taming.variables_from_state_dict(own, config)
    except ConversionError as error:
        raise ConversionError(f"In {stage[:-1]}: {error}") from error


def _condition_rows(config: ConfigDict, table: np.ndarray) -> np.ndarray:
    """The table of `conditions.kinds.Conditions`: a kind's tokens and none, or a start token."""
    if not config.condition.kinds:
        return table[[config.condition.start_token]]
    (kind,) = make_kinds(config.condition, config.model.grid)
    # The last coordinate may have no row in the reference, which could not run with it. It lies at
    # the lower right corner, and the coordinate before it is the nearest to it.
    tokens = np.minimum(np.arange(kind.vocabulary), len(table) - 1)
    none = np.zeros((1, table.shape[1]), table.dtype)  # the reference leaves no condition out
    return np.concatenate([table[tokens], none])


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
    params: Mapping,
    config: ConfigDict,
    variables: Mapping,
    tokenizer: ConfigDict,
    of_conditions: Mapping[str, tuple[ConfigDict, Mapping]],
) -> dict[str, np.ndarray]:
    """The reference's state dict: the inverse, for transformers that its yaml can describe.

    The token of an unconditional model with a table of its own becomes code 0. It only ever stands
    first, so that the first position takes on the difference. A table of coordinates is left out
    where it says what the codes' says.

    Args:
        params: of our `Transformer`.
        config: its config.
        variables: those of the tokenizer's `VQGAN`.
        tokenizer: its config.
        of_conditions: config and variables of the tokenizers of condition images, by name.

    Raises:
        ConversionError: the variables are not those of the configs' models, or conditions have
            other rows than codes.
    """
    params = dict(params)
    if config.condition.own_table and not config.condition.kinds:
        start = np.asarray(params.pop("condition_embedding")["embedding"][0])
        positions = np.array(params["position_embedding"])
        positions[0] += start - np.asarray(params["code_embedding"]["embedding"][0])
        params["position_embedding"] = positions
    elif config.condition.own_table and may_share_rows(config):
        rows = params.pop("condition_embedding")["embedding"]
        shared = config.condition.coordinates.intervals
        codes = params["code_embedding"]["embedding"]
        if not np.array_equal(rows[:shared], codes[:shared]):
            raise ConversionError(
                "In the reference, coordinates are tokens of the codes' table; this transformer "
                "has a table for them (config.condition.own_table) and cannot be written in its "
                "form."
            )
    gpt = state_dict_from_gpt_params(params)
    model = config.model
    block_size = gpt[f"{_GPT}pos_emb"].shape[1]
    expected = gpt_shapes(model.codebook_size, block_size, model.num_layers, model.width)
    taming.check_shapes({name: value.shape for name, value in gpt.items()}, expected)
    stages = {_FIRST_STAGE: taming.state_dict_from_variables(variables, tokenizer)}
    for own, own_variables in of_conditions.values():
        stages[_CONDITION_STAGE] = taming.state_dict_from_variables(own_variables, own)
    return (
        gpt
        | gpt_masks(model.num_layers, block_size, model.num_unmasked)
        | permuter_buffers(model)
        | {
            stage + name: value
            for stage, tensors in stages.items()
            for name, value in tensors.items()
        }
    )
