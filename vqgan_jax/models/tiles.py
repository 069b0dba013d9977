"""Tiles of large maps: where they lie, and norms that see the whole map from within one tile."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from vqgan_jax.models.cpu import group_mean
from vqgan_jax.models.layers import GroupNorm, at_least_float32
from vqgan_jax.models.operations import sum_positions

# In values (positions times channels). With 128 channels at full resolution, images of up to
# 1024x1024 are handled at once; in float32 such a map takes 512 MiB, and a tokenizer holds a few.
LARGEST_MAP = 2**27
# 256x256 positions of 128 channels: enough to keep an accelerator busy, and little margin.
TILE_MAP = 2**23


def limits(norm: str) -> tuple[int, int]:
    """Values of a tile's map without its margin, and of the largest map that is held whole.

    Where norms are those of each position alone, a tile costs only its margins, and no more than
    four of them are held.
    """
    return TILE_MAP, LARGEST_MAP if norm == "group" else 4 * TILE_MAP


@dataclasses.dataclass(frozen=True)
class Axis:
    """The tiles along height or width: cores of one size, each in a window with its margins.

    At the border of the map a window is shifted inwards, so that zero padding is where it is for
    the whole map. The last core is shifted likewise, and shares positions with the one before.

    Attributes:
        size: positions of the finest map, that of the highest resolution.
        core: positions there.
        finest: its level; each level after it has half the resolution.
        margins: positions on each side of a core, in each level that a tile passes.
    """

    size: int
    core: int
    finest: int
    margins: Mapping[int, int]

    @classmethod
    def divide(cls, size: int, most: int, margins: Mapping[int, int]) -> "Axis":
        """Cores of at most `most` positions, as equal as may be, whole in the coarsest map."""
        finest, coarsest = min(margins), max(margins)
        step = 1 << (coarsest - finest)
        count = math.ceil(size / max(step, most // step * step))
        core = math.ceil(size / count / step) * step
        return cls(size, core, finest, margins)

    @property
    def count(self) -> int:
        """Of tiles."""
        return math.ceil(self.size / self.core)

    def core_extent(self, level: int) -> int:
        """Positions of a core at a level."""
        return self.core >> (level - self.finest)

    def core_start(self, level: int, index):
        """Where a core begins in a level's map."""
        return jnp.minimum(index * self.core, self.size - self.core) >> (level - self.finest)

    def extent(self, level: int) -> int:
        """Positions of a window at a level."""
        whole = self.size >> (level - self.finest)
        return min(whole, self.core_extent(level) + 2 * self.margins[level])

    def start(self, level: int, index):
        """Where a window begins in a level's map."""
        wanted = self.core_start(level, index) - self.margins[level]
        return jnp.clip(wanted, 0, (self.size >> (level - self.finest)) - self.extent(level))

    def own(self, level: int, index):
        """Which positions of a window belong to the core and to none before it: bool."""
        place = self.start(level, index) + jnp.arange(self.extent(level))
        core = self.core_extent(level)
        return (place >= index * core) & (place < (index + 1) * core)


# Of a tile: an index along each of the two axes.
Place = tuple[tuple[Axis, jax.Array], tuple[Axis, jax.Array]]


def window(x: jax.Array, level: int, place: Place, origin=(0, 0)) -> jax.Array:
    """A tile's window of one level from a map `(1, H, W, ...)` that begins at `origin`."""
    starts = [axis.start(level, index) - o for (axis, index), o in zip(place, origin, strict=True)]
    rest = x.shape[3:]
    extents = [axis.extent(level) for axis, _ in place]
    return jax.lax.dynamic_slice(x, (0, *starts, *[0] * len(rest)), (1, *extents, *rest))


def core(x: jax.Array, level: int, place: Place) -> jax.Array:
    """The core of a window of one level."""
    starts = [axis.core_start(level, index) - axis.start(level, index) for axis, index in place]
    extents = [axis.core_extent(level) for axis, _ in place]
    return jax.lax.dynamic_slice(x, (0, *starts, 0), (1, *extents, x.shape[-1]))


def run_in_tiles(
    run: Callable[[Place, "Norms"], jax.Array],
    rows: Axis,
    columns: Axis,
    num_norms: int,
    level: int,
    output: jax.Array,
    i: int | jax.Array,
) -> jax.Array:
    """Writes what `run` makes of each tile into `output[i]`.

    Args:
        run: the core of a tile, `(1, h, w, C)` at `level`. To be called in the way of `Norms`: what
            it gives has no meaning once these have found their moments.
        rows, columns: the tiles.
        num_norms: how many norms of the whole map `run` passes.
        level: of the output's resolution.
        output: `(B, H, W, C)`.
        i: which image.
    """
    tiles = jnp.arange(rows.count * columns.count)

    def place_of(index):
        return (rows, index // columns.count), (columns, index % columns.count)

    def moments(index, known):
        norms = Norms(known)
        run(place_of(index), norms)
        return norms.moments

    known = []
    for _ in range(num_norms):
        found = jax.lax.map(lambda index, known=tuple(known): moments(index, known), tiles)
        known.append(_joined(*found))

    def write(index, output):
        place = place_of(index)
        corner = [axis.core_start(level, position) for axis, position in place]
        return jax.lax.dynamic_update_slice(output, run(place, Norms(known)), (i, *corner, 0))

    return jax.lax.fori_loop(0, len(tiles), write, output)


class Norms:
    """An interceptor of `GroupNorm`: the first few get the whole map's statistics.

    Of the one after them the moments of the tile are taken; what follows it has no meaning.
    """

    def __init__(self, known):
        """`known` holds mean and variance `(1, C)` of the norms in the order of execution."""
        self.known = list(known)
        self.weights = None  # (1, h, w, 1): 1 where a position counts
        self.moments = None  # count, mean and variance, once they are found

    def count(self, level: int, place: Place) -> None:
        """What follows is a window of this level, of which the core counts."""
        rows, columns = (axis.own(level, index) for axis, index in place)
        self.weights = (rows[:, None] & columns).astype(jnp.float32)[None, ..., None]

    def __call__(self, call, args, kwargs, context):
        """As `flax.linen.intercept_methods` wants it."""
        norm = context.module
        if not isinstance(norm, GroupNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        x = at_least_float32(args[0])
        if self.known:
            mean, variance = self.known.pop(0)
            scale, bias = (norm.get_variable("params", name) for name in ("scale", "bias"))
            factor = scale * jax.lax.rsqrt(variance + norm.epsilon)
            x = x * factor[:, None, None] + (bias - mean * factor)[:, None, None]
        elif self.moments is None:
            self.moments = _moments(x, self.weights, norm.num_groups)
        return x.astype(norm.dtype)


def _moments(x, weights, num_groups):
    """Number of positions, mean and variance of each channel's group `(1, C)`."""
    weights = weights.astype(x.dtype)
    count = weights.sum()
    mean = group_mean(sum_positions(x * weights) / count, num_groups)
    squares = jnp.square(x - mean[:, None, None]) * weights
    return count, mean, group_mean(sum_positions(squares) / count, num_groups)


def _joined(count, mean, variance):
    """Mean and variance of all from those of parts `(T,)`, `(T, 1, C)`: within plus between.

    "Updating formulae and a pairwise algorithm for computing sample variances" (Chan et al. 1979).
    """
    share = (count / count.sum())[:, None, None]
    total = (share * mean).sum(axis=0)
    return total, (share * (variance + jnp.square(mean - total))).sum(axis=0)
