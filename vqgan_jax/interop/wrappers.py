"""The weights in a checkpoint, whatever a trainer has wrapped around them.

Trainers save a model's tensors under a key (`state_dict`, `model`), in front of whose names
wrappers of the model put their own (`module.` of DistributedDataParallel, `_orig_mod.` of
`torch.compile`), and beside them a moving average (`ema`, or `model_ema.*` of latent-diffusion).
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vqgan_jax.interop.taming_options import ConversionError, some

EMA, RAW = "ema", "raw"
_RAW_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "generator")
_EMA_KEYS = ("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "params_ema")
_INNER_KEYS = (*_RAW_KEYS, "shadow", "module")  # of an object that holds a moving average
# Of wrappers of a part of a model too, so anywhere in a name.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_CONDITION_STAGE = "cond_stage_model."
_FIRST_STAGE = "first_stage_model."  # the tokenizer in a checkpoint of another model
_COUNTERS = ("n_averaged", "initted", "step")  # tensors of wrappers themselves
_LIT_EMA = "model_ema."  # whose names have no dots
# Of averages beside the weights in one dictionary, and of all that belongs to the average.
_EMA_PREFIXES = {"ema.ema_model.": "ema.", "ema_model.": "ema_model.", "ema.": "ema."}
_ONLINE = ("online_model.", "ema.online_model.")  # the weights, where the average holds them too


def unwrap(
    checkpoint: Mapping, roots: Sequence[str], weights: str = ""
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of a model by the names that it has itself.

    Args:
      checkpoint: as `torch_file.read_checkpoint` reads it.
      roots: what names of the model begin with, such as "encoder.".
      weights: "ema" for the moving average, "raw" for the weights that were trained; empty for the
        moving average where there is one.

    Returns:
      The tensors, and lines that say what was chosen and stripped. Where no name begins with a
      root, the tensors are as they are in the file.

    Raises:
      ConversionError: there are no tensors, or not those that are asked for.
    """
    notes = []
    raw_key, raw = _find(checkpoint, _RAW_KEYS)
    if not raw:
        raw_key, raw = "", _arrays(checkpoint)
    ema_key, ema = _find(checkpoint, _EMA_KEYS)
    raw, lit = _split_lit_ema(raw)
    if lit:
        ema_key, ema = f"{_LIT_EMA}*", lit
    if not ema:
        ema_key, ema, raw = _split_prefixed_ema(raw, roots)
    if weights == EMA and not ema:
        raise ConversionError(
            "The checkpoint has no moving average that --weights=ema could take: it has "
            f"{some(map(str, checkpoint))}."
        )
    if weights == RAW and ema and not raw:
        raise ConversionError(
            f"The checkpoint holds a moving average alone, {ema_key}: leave out --weights=raw."
        )
    if not raw and not ema:
        lists = [key for key in checkpoint if isinstance(checkpoint[key], list | tuple)]
        hint = f" Lists such as {lists[0]!r} have no names." if lists else ""
        raise ConversionError(
            f"The checkpoint holds no tensors by name: it has {some(map(str, checkpoint))}.{hint}"
        )
    tensors, key = raw, raw_key
    if ema and weights != RAW:
        tensors, key = ema, ema_key
        if raw:
            notes.append(f"the moving average, {key}; --weights=raw takes the trained weights")
    if key not in ("", "state_dict") and not key.endswith("*"):
        notes.append(f"the tensors under the key {key!r}")
    tensors, stripped, left_out = _stripped(tensors, roots)
    if stripped:
        notes.append(f"names without the wrapper {', '.join(stripped)}")
    if left_out:
        notes.append(f"nothing of {len(left_out)} other tensors ({some(left_out)})")
    over = _passed_over(checkpoint, (raw_key, ema_key))
    if over:
        notes.append(f"nothing of {some(over)}, averages without the model's names")
    return tensors, notes


def _arrays(values: Mapping) -> dict[str, np.ndarray]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(name, str) and isinstance(value, np.ndarray)
    }


def _under(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _without_counters(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in tensors.items() if name not in _COUNTERS}


def _has_root(names: Iterable[str], roots: Sequence[str]) -> bool:
    return any(f".{root}" in f".{name}" for name in names for root in roots)


def _find(checkpoint: Mapping, keys: Sequence[str]) -> tuple[str, dict[str, np.ndarray]]:
    """The first of some keys that has tensors in it, or in a dictionary in it."""
    for key in keys:
        value = checkpoint.get(key)
        if not isinstance(value, Mapping):
            continue
        if arrays := _arrays(value):
            return key, arrays
        for inner in _INNER_KEYS:
            if isinstance(value.get(inner), Mapping) and (arrays := _arrays(value[inner])):
                return f"{key}.{inner}", arrays
    return "", {}


def _split_lit_ema(
    tensors: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors without `model_ema.*`, and these by the names of what they are averages of."""
    averages = _under(tensors, _LIT_EMA)
    if not averages:
        return tensors, {}
    rest = {name: value for name, value in tensors.items() if not name.startswith(_LIT_EMA)}
    by_flat_name = {name.replace(".", ""): name for name in rest}
    found = {by_flat_name[flat]: value for flat, value in averages.items() if flat in by_flat_name}
    # What has no average, such as buffers, stays as it is.
    return rest, (rest | found if found else {})


def _split_prefixed_ema(
    tensors: dict[str, np.ndarray], roots: Sequence[str]
) -> tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The name of a moving average, its tensors, and those of the weights, as `_EMA_PREFIXES`."""
    for prefix, everything in _EMA_PREFIXES.items():
        averages = _without_counters(_under(tensors, prefix))
        if not _has_root(averages, roots):
            continue
        online = [_under(tensors, name) for name in _ONLINE]
        rest = {name: tensors[name] for name in tensors if not name.startswith(everything)}
        for weights in (*online, _without_counters(rest)):
            if _has_root(weights, roots):
                return f"{prefix}*", averages, weights
        return f"{prefix}*", averages, {}
    return "", {}, tensors


def _stripped(
    tensors: dict[str, np.ndarray], roots: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Names without those of wrappers; the tensors as they are where that finds no root.

    Returns:
      The tensors, the wrappers' names, and the names of tensors outside of the model.
    """
    without = {}
    stripped = []
    for name, value in tensors.items():
        parts = name.split(".")
        kept = [part for part in parts if part not in _WRAPPERS]
        stripped += [f"{part}." for part in parts if part in _WRAPPERS]
        without[".".join(kept)] = value
    if len(without) < len(tensors):
        return tensors, [], []
    left_out = []
    if not any(name.startswith(tuple(roots)) for name in without):
        prefix = _prefix(without, roots)
        if prefix:
            stripped.append(prefix)
            left_out = [
                name
                for name in without
                if not name.startswith(prefix) and name.rpartition(".")[2] not in _COUNTERS
            ]
            without = _under(without, prefix)
    if not any(name.startswith(tuple(roots)) for name in without):
        return tensors, [], []
    return without, list(dict.fromkeys(stripped)), left_out


def _prefix(names: Iterable[str], roots: Sequence[str]) -> str:
    """What stands in front of a whole model's names; empty where it is none or one of several.

    A whole model has each of the roots. Of a checkpoint of several, its first stage is the model;
    a transformer's is a part of it.
    """
    found = {}
    for name in names:
        for root in roots:
            place = f".{name}".find(f".{root}")
            if place > 0:
                found.setdefault(name[:place], set()).add(root)
    whole = [prefix for prefix, own in found.items() if len(own) == len(roots)]
    transformers = {name.partition("transformer.")[0] for name in names if "transformer." in name}
    stages = [
        prefix
        for prefix in whole
        if f".{prefix}".endswith(f".{_FIRST_STAGE}")
        and prefix.removesuffix(_FIRST_STAGE) not in transformers
    ]
    others = [
        prefix
        for prefix in whole
        if not f".{prefix}".endswith((f".{_FIRST_STAGE}", f".{_CONDITION_STAGE}"))
    ]
    candidates = stages or others
    return candidates[0] if len(candidates) == 1 else ""


def _passed_over(checkpoint: Mapping, taken: Sequence[str]) -> list[str]:
    """The keys of averages in a checkpoint of which none is taken, such as lists without names."""
    found = []
    for key, value in checkpoint.items():
        inner = value.items() if isinstance(value, Mapping) else ()
        for path, part in ((str(key), value), *((f"{key}.{name}", item) for name, item in inner)):
            if "shadow" not in path.lower() and "ema" not in re.split(r"[._]", path.lower()):
                continue
            tensors = isinstance(part, list | tuple) and part and _is_arrays(part)
            tensors = tensors or (isinstance(part, Mapping) and _is_arrays(part.values()))
            if tensors and not any(f"{path}.".startswith(f"{own}.") for own in taken if own):
                found.append(path)
    return found


def _is_arrays(values: Iterable) -> bool:
    return any(isinstance(value, np.ndarray) for value in values)
