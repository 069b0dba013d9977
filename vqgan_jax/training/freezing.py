"""Parts of a tokenizer that training leaves as they are (`config.training.freeze`).

With encoder and quantizer frozen, codes stay what they are, and a larger decoder can learn to make
better images of them: so "Scaling Autoregressive Models for Content-Rich Text-to-Image Generation"
(Yu et al. 2022) has it. A transformer over these codes draws with it by `sample --tokenizer`.
"""

from collections.abc import Mapping

import jax
import optax
from ml_collections import ConfigDict

_PARAMETERS = {"encoder": ("encoder", "quant_conv"), "quantizer": ("quantize",)}
CODING = ("encoder", "quant_conv", "quantize")  # what codes depend on; all else makes images


def is_frozen(config: ConfigDict, name: str) -> bool:
    """Whether the tokenizer's parameters of this name, as in `params["encoder"]`, are frozen."""
    return any(name in _PARAMETERS[part] for part in config.training.freeze)


def frozen_parts(config: ConfigDict, params: Mapping) -> dict:
    """Those of a tokenizer's parameters that are frozen, by name."""
    return {name: params[name] for name in params if is_frozen(config, name)}


def without_gradient(config: ConfigDict, params: Mapping) -> dict:
    """The parameters, the frozen ones as constants: no backward pass goes where nothing learns."""
    return dict(params) | jax.lax.stop_gradient(frozen_parts(config, params))


def of_trained_parts(
    config: ConfigDict, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An optimiser that keeps nothing of frozen parameters, and gives no updates to them."""
    if not config.training.freeze:
        return optimizer
    return optax.chain(
        optax.masked(optimizer, lambda tree: {n: not is_frozen(config, n) for n in tree}),
        optax.masked(optax.set_to_zero(), lambda tree: {n: is_frozen(config, n) for n in tree}),
    )
