"""The class of an image as a condition."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ClassLabel:
    """The image's class: one token."""

    num_classes: int
    name: str = "class"
    shape: tuple[int, ...] = (1,)

    @property
    def vocabulary(self) -> int:
        """One token a class."""
        return self.num_classes

    def tokens(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """`label`, `(B,)`, as `(B, 1)`."""
        return jnp.asarray(batch["label"], jnp.int32)[:, None]
