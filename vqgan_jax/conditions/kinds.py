"""What a transformer can be conditioned on: each kind turns a batch into tokens.

Tokens of several kinds stand one after the other in front of the codes, in the config's order. A
kind's tokens are numbers from 0; -1 is no condition, which training without a share of the
conditions needs, and guidance.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vqgan_jax.conditions.class_labels import ClassLabel
from vqgan_jax.conditions.coordinates import Coordinates
from vqgan_jax.conditions.image_codes import ImageCodes
from vqgan_jax.conditions.scene_layouts import SceneLayout, layout_encoding


class Condition(Protocol):
    """One kind of condition.

    For logs, `picture(tokens, height, width)` shows what tokens `(n,)` say, uint8 `(height, width,
    3)`; a class has none, and codes of an image are shown by their tokenizer.

    Attributes:
        name: in configs, batches and files.
        shape: `(n,)`, tokens of the image as a whole; or `(rows, columns)`, tokens that lie over
            it, which a window over a larger image crops.
        vocabulary: how many different tokens there are.
    """

    name: str
    shape: tuple[int, ...]
    vocabulary: int

    def tokens(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """`(B, n)` int32 from a batch of codes."""


def make_kinds(condition: ConfigDict, grid: tuple[int, int]) -> tuple[Condition, ...]:
    """The kinds of a resolved `config.condition`, for codes of a grid."""
    return tuple(_make_kind(name, condition, tuple(grid)) for name in condition.kinds)


def _make_kind(name: str, condition: ConfigDict, grid: tuple[int, int]) -> Condition:
    if name == "class":
        return ClassLabel(condition.num_classes)
    if name == "coordinates":
        return Coordinates(grid, condition.coordinates.intervals)
    if name == "layout":
        layout = condition.layout
        return SceneLayout(layout_encoding(layout), tuple(layout.class_names))
    image = condition.images[name]
    return ImageCodes(name, tuple(image.grid), image.codebook_size)


@dataclasses.dataclass(frozen=True)
class Conditions:
    """All kinds of a model together: from batches to the tokens that its tables have rows for.

    With a table of their own, each kind has its part of it, the last row of which is no condition.
    In the codes' table, as in the reference, kinds and codes share rows by number, and the row
    after a kind's tokens is no condition. Without kinds, one start token stands in front.

    Attributes:
        kinds: in the order of their tokens.
        own_table: whether they have a table of their own.
        start_token: without kinds, in the codes' table.
    """

    kinds: tuple[Condition, ...]
    own_table: bool = True
    start_token: int = 0

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Conditions":
        """Those of a transformer's resolved config."""
        condition = config.condition
        kinds = make_kinds(condition, config.model.grid)
        return cls(kinds, condition.own_table, condition.start_token)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each kind's tokens."""
        return tuple(kind.shape for kind in self.kinds) or ((1,),)

    @property
    def num_tokens(self) -> int:
        """Of a sequence."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    @property
    def table_size(self) -> int:
        """Rows of the own table, 0 without one."""
        if not self.own_table:
            return 0
        return sum(kind.vocabulary + 1 for kind in self.kinds) or 1

    def read(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What the kinds read of a batch."""
        names = ("label" if kind.name == "class" else kind.name for kind in self.kinds)
        return {name: batch[name] for name in names}

    def parts(
        self, batch: Mapping[str, jax.Array], dropped: jax.Array | bool = False
    ) -> list[jax.Array]:
        """Each kind's rows of the table, `(B, *shape)` int32.

        Args:
            batch: what the kinds read; without kinds, anything with the number of rows. A grid of
                tokens may come as `(B, rows, columns)`, that of a larger image too; a layout as
                `(B, tops, lefts, n)`, for each place of a window over a larger image.
            dropped: `(B,)` bool, which rows are to have no condition.
        """
        if not self.kinds:
            size = len(next(iter(batch.values())))
            return [jnp.full((size, 1), 0 if self.own_table else self.start_token, jnp.int32)]
        parts, offset = [], 0
        dropped = jnp.asarray(dropped).reshape(-1, 1)
        for kind in self.kinds:
            tokens = kind.tokens(batch)
            tokens = jnp.where(dropped | (tokens < 0), kind.vocabulary, tokens) + offset
            whole = batch.get(kind.name)  # what is for a larger image keeps its shape
            shape = whole.shape[1:] if whole is not None and whole.ndim >= 3 else kind.shape
            parts.append(tokens.reshape(len(tokens), *shape))
            offset += kind.vocabulary + 1 if self.own_table else 0
        return parts

    def tokens(
        self, batch: Mapping[str, jax.Array], dropped: jax.Array | bool = False
    ) -> jax.Array:
        """All of them as the transformer takes them, `(B, num_tokens)` int32; see `parts`."""
        parts = self.parts(batch, dropped)
        return jnp.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
