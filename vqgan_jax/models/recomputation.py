"""What the backward pass computes again instead of keeping it.

Source: "Training Deep Nets with Sublinear Memory Cost" (Chen et al. 2016).
"""

from collections.abc import Callable

import flax.linen as nn
import jax

# What is kept of a block beside its input, by the name that configs have for it.
POLICIES: dict[str, Callable | None] = {
    "nothing": None,
    "products": lambda primitive, *arguments, **options: (
        primitive is jax.lax.conv_general_dilated_p
        or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
            primitive, *arguments, **options
        )
    ),
}


def recomputed(block: type[nn.Module], keep: str, **options) -> type[nn.Module]:
    """A module that is computed again in the backward pass.

    Args:
        block: the module.
        keep: "nothing": least memory, a third more time; "products": what convolutions and products
            with weights give stays, and only what is cheap comes again, with attention.
        **options: of `flax.linen.remat`.
    """
    return nn.remat(block, policy=POLICIES[keep], **options)
