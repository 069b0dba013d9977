"""The layout of a scene as a condition."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vqgan_jax.conditions.layout_pictures import draw_layout
from vqgan_jax.conditions.layouts import LayoutEncoding


@dataclasses.dataclass(frozen=True)
class SceneLayout:
    """Which objects are where; their names, if there are any, are for people."""

    encoding: LayoutEncoding
    class_names: tuple[str, ...] = ()
    name: str = "layout"

    @property
    def shape(self) -> tuple[int, ...]:
        """One row of tokens."""
        return (self.encoding.length,)

    @property
    def vocabulary(self) -> int:
        """Classes, places and padding share their numbers."""
        return self.encoding.num_tokens

    def tokens(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """As `LayoutEncoding.encode` made them, or `encode_windows` for a larger image."""
        tokens = jnp.asarray(batch[self.name], jnp.int32)
        return tokens.reshape(len(tokens), -1)

    def picture(self, tokens: np.ndarray, height: int, width: int) -> np.ndarray:
        """Tokens `(n,)` -> the boxes, uint8 `(height, width, 3)`."""
        return draw_layout(self.encoding.decode(tokens), height, width, self.class_names)


def layout_encoding(layout: ConfigDict) -> LayoutEncoding:
    """The encoding that `config.condition.layout` describes.

    Raises:
        ValueError: as `LayoutEncoding`.
    """
    names = (field.name for field in dataclasses.fields(LayoutEncoding))
    return LayoutEncoding(**{name: layout[name] for name in names})
