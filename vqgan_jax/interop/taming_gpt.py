"""The transformer of CompVis/taming-transformers to ours and back: names and layouts.

Its GPT keeps one tensor a layer, in PyTorch's (out, in) order; ours stacks the layers of a kind and
has kernels as (in, out). Its causal masks are buffers in every checkpoint and are left out.
"""

import re
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqgan_jax.interop.taming_options import ConversionError

# Within a block: theirs and ours.
_LAYERS = {
    "ln1": "attention_norm",
    "ln2": "feed_forward_norm",
    "attn.query": "attention/query",
    "attn.key": "attention/key",
    "attn.value": "attention/value",
    "attn.proj": "attention/out",
    "mlp.0": "feed_forward/up",
    "mlp.2": "feed_forward/down",
}
_OUTER = {
    "pos_emb": "position_embedding",
    "tok_emb.weight": "code_embedding/embedding",
    "ln_f.weight": "norm_out/scale",
    "ln_f.bias": "norm_out/bias",
    "head.weight": "head/kernel",
}


def _block_names() -> dict[str, str]:
    names = {}
    for theirs, ours in _LAYERS.items():
        weight = "scale" if theirs.startswith("ln") else "kernel"
        names[f"{theirs}.weight"] = f"blocks/{ours}/{weight}"
        names[f"{theirs}.bias"] = f"blocks/{ours}/bias"
    return names


_BLOCK = _block_names()


def gpt_shapes(
    vocab_size: int, block_size: int, num_layers: int, width: int
) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors `transformer.*` of such a GPT have, without masks."""
    shapes = {
        "pos_emb": (1, block_size, width),
        "tok_emb.weight": (vocab_size, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
        "head.weight": (vocab_size, width),
    }
    for layer in range(num_layers):
        for name in _BLOCK:
            outputs = 4 * width if name.startswith("mlp.0.") else width
            inputs = 4 * width if name.startswith("mlp.2.") else width
            matrix = name.endswith(".weight") and not name.startswith("ln")
            shapes[f"blocks.{layer}.{name}"] = (outputs, inputs) if matrix else (outputs,)
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def gpt_masks(num_layers: int, block_size: int, num_unmasked: int) -> dict[str, np.ndarray]:
    """The buffers of who sees whom, which the reference wants to find in a state dict."""
    mask = np.tril(np.ones((block_size, block_size), np.float32))
    mask[:num_unmasked, :num_unmasked] = 1.0
    return {
        f"transformer.blocks.{layer}.attn.mask": mask[None, None] for layer in range(num_layers)
    }


def gpt_params_from_state_dict(state_dict: Mapping[str, np.ndarray]) -> dict:
    """Parameters of `Transformer` from the tensors `transformer.*` of a state dict.

    Raises:
        ConversionError: tensors are missing or unexpected, or layers differ in shape.
    """
    outer, layers, unexpected = {}, {}, []
    for name, value in state_dict.items():
        own = name.removeprefix("transformer.")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", own)
        if own == name or own.endswith(".attn.mask"):
            continue
        if own in _OUTER:
            outer[_OUTER[own]] = _ours(_OUTER[own], value)
        elif block and block[2] in _BLOCK:
            path = _BLOCK[block[2]]
            layers.setdefault(path, {})[int(block[1])] = _ours(path, value)
        else:
            unexpected.append(name)
    if unexpected:
        raise ConversionError(f"The transformer has unknown tensors: {', '.join(unexpected[:5])}.")
    count = 1 + max((max(of_path) for of_path in layers.values()), default=-1)
    missing = [ours for ours in _OUTER.values() if ours not in outer]
    missing += [ours for ours in _BLOCK.values() if len(layers.get(ours, ())) != count]
    if missing or count == 0:
        raise ConversionError(
            f"The transformer's tensors are not complete: {', '.join(missing[:5]) or 'no blocks'}."
        )
    try:
        stacked = {
            path: np.stack([of_path[i] for i in range(count)]) for path, of_path in layers.items()
        }
    except (ValueError, KeyError) as error:
        raise ConversionError(f"The transformer's layers do not fit together: {error}.") from error
    return unflatten_dict({tuple(path.split("/")): v for path, v in (outer | stacked).items()})


def state_dict_from_gpt_params(params: Mapping) -> dict[str, np.ndarray]:
    """The inverse: tensors `transformer.*` by the reference's names, without masks."""
    flat = {"/".join(path): np.asarray(value) for path, value in flatten_dict(params).items()}
    tensors = {name: _theirs(path, flat[path]) for name, path in _OUTER.items()}
    tensors["pos_emb"] = tensors["pos_emb"][None]
    for name, path in _BLOCK.items():
        for layer, value in enumerate(flat[path]):
            tensors[f"blocks.{layer}.{name}"] = _theirs(path, value)
    return {f"transformer.{name}": value for name, value in tensors.items()}


def _ours(path: str, value: np.ndarray) -> np.ndarray:
    value = np.asarray(value, np.float32)
    if path == "position_embedding":
        return value[0]
    return np.ascontiguousarray(value.T) if path.endswith("/kernel") else value


def _theirs(path: str, value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value.T) if path.endswith("/kernel") else value
