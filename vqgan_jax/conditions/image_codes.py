"""Images of another kind as a condition: label maps, relief, depth, edges, skeletons."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ImageCodes:
    """The codes that a tokenizer of its own gives to a condition image."""

    name: str
    shape: tuple[int, ...]
    vocabulary: int

    def tokens(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Those under the kind's own name, `(B, ...)`, as `(B, n)`."""
        tokens = jnp.asarray(batch[self.name], jnp.int32)
        return tokens.reshape(len(tokens), -1)
