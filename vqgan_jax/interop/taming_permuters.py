"""Orders of codes, the permuters of CompVis/taming-transformers, to ours and back.

A yaml there names the order's class, and a checkpoint holds the order and its inverse as buffers.
"""

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from vqgan_jax.configuration.common import shortened
from vqgan_jax.interop.taming_options import ConversionError, class_name, number, part
from vqgan_jax.models.orders import ORDERS, ROW_MAJOR, permutation

PERMUTER = "permuter."
_FORWARD, _INVERSE = f"{PERMUTER}forward_shuffle_idx", f"{PERMUTER}backward_shuffle_idx"
_MODULE = "taming.modules.transformer.permuter"
_CLASSES = {
    ROW_MAJOR: "Identity",
    "alternate": "AlternateParsing",
    "subsample": "Subsample",
    "z_curve": "ZCurve",
    "spiral_out": "SpiralOut",
    "spiral_in": "SpiralIn",
    "random": "Random",
}
_ORDERS = {name: order for order, name in _CLASSES.items()}


def assign_order(model: ConfigDict, params: Mapping) -> None:
    """Sets `order` of a `config.model` that has its grid.

    Args:
        model: of the transformer.
        params: the yaml's `model.params`.

    Raises:
        ConversionError: the order is not known, of another grid, or does not exist for it.
    """
    permuter = part(params, "permuter_config", "permuter_config", {"target": _CLASSES[ROW_MAJOR]})
    name = class_name(permuter)
    if name not in _ORDERS:
        raise ConversionError(
            f"permuter_config.target is {shortened(permuter.get('target'))}; supported are "
            f"{', '.join(_ORDERS)}."
        )
    if _ORDERS[name] != ROW_MAJOR:
        rows, columns = model.grid
        where = "permuter_config.params"
        options = part(permuter, "params", where)
        for key, size in (("H", rows), ("W", columns)):
            if number(options, key, int, 0) != size:
                raise ConversionError(
                    f"{where}.{key} is {shortened(options.get(key))}, and the model's grid has "
                    f"{rows}x{columns} codes."
                )
        try:
            permutation(_ORDERS[name], rows, columns)
        except ValueError as error:
            raise ConversionError(
                f"permuter_config.target is {shortened(name)}: {error}"
            ) from error
    model.order = _ORDERS[name]


def permuter_options(model: ConfigDict) -> dict:
    """The inverse of `assign_order`: options for `model.params`."""
    if model.order == ROW_MAJOR:
        return {}
    rows, columns = model.grid
    target = f"{_MODULE}.{_CLASSES[model.order]}"
    return {"permuter_config": {"target": target, "params": {"H": rows, "W": columns}}}


def check_buffers(state_dict: Mapping[str, np.ndarray], model: ConfigDict) -> None:
    """Raises `ConversionError` where a state dict's order is not that of a `config.model`."""
    stored = {name: value for name, value in state_dict.items() if name.startswith(PERMUTER)}
    found = _order_of(stored, model.grid)
    if found is None:
        raise ConversionError(
            f"The checkpoint's order of codes ({PERMUTER}*) is none of the reference's for "
            f"{model.grid[0]}x{model.grid[1]} codes ({', '.join(_ORDERS)})."
        )
    if found != model.order:
        raise ConversionError(
            f"The checkpoint's order of codes is {_CLASSES[found]} ({PERMUTER}*) and the yaml's "
            f"{_CLASSES[model.order]} (permuter_config.target): they do not belong together."
        )


def _order_of(stored: Mapping[str, np.ndarray], grid: tuple[int, int]) -> str | None:
    """The order that has these buffers."""
    if not stored:
        return ROW_MAJOR
    for order in ORDERS:
        try:
            expected = permutation(order, *grid)
        except ValueError:
            continue  # it does not exist for this grid
        buffers = dict(zip((_FORWARD, _INVERSE), expected, strict=True))
        if stored.keys() == buffers.keys() and all(
            np.array_equal(stored[name], value) for name, value in buffers.items()
        ):
            return order
    return None


def permuter_buffers(model: ConfigDict) -> dict[str, np.ndarray]:
    """The buffers of a `config.model`'s order in the reference, int64."""
    if model.order == ROW_MAJOR:
        return {}
    order = permutation(model.order, *model.grid)
    return {_FORWARD: order.forward.astype(np.int64), _INVERSE: order.inverse.astype(np.int64)}
