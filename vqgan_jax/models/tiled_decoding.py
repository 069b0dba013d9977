"""Decoding of large images in tiles, equal to the decoder's own output up to rounding.

Convolutions see a neighbourhood, so that a tile with enough of a margin gives the same values as
the whole map. Two things see everything. Attention runs on the whole map, and with it all levels
of lower resolution. Group normalisation needs mean and variance of the whole map, which are found
norm by norm: a pass over all tiles runs up to the norm in question, those in front of it known by
then, and takes the moments of each tile; a last pass gives the values. Layer normalisation at each
position alone needs none of this.

Every pass begins again at the last map that was kept whole. A decoder of f16 in this way computes
a 2048x2048 image some five times, and holds no map larger than those of a 1024x1024 image.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.cpu import group_mean
from vqgan_jax.models.layers import (
    AttentionBlock,
    GroupNorm,
    ResidualBlock,
    Upsample,
    at_least_float32,
)
from vqgan_jax.models.operations import sum_positions
from vqgan_jax.models.vqgan import VQGAN

# In values (positions times channels). With 128 channels at full resolution, images of up to
# 1024x1024 are decoded at once; in float32 such a map takes 512 MiB, and a decoder holds a few.
LARGEST_MAP = 2**27
# 256x256 positions of 128 channels: enough to keep an accelerator busy, and little margin.
TILE_MAP = 2**23


def decode_codes(module: VQGAN, variables, codes: jax.Array) -> jax.Array:
    """Codes `(B, h, w)` -> images `(B, f h, f w, C)`, not clipped; large ones in tiles.

    As `VQGAN.decode`, which it calls where no map of the decoder is above `LARGEST_MAP`; or above
    four tiles, where norms are those of each position alone and a tile costs only its margins.
    """
    height, width = codes.shape[1:3]
    levels = range(len(module.channel_multipliers))
    largest = LARGEST_MAP if module.norm == "group" else 4 * TILE_MAP
    if max(_map_values(module, level, height, width) for level in levels) <= largest:
        return module.apply(variables, codes, method="decode")
    return decode_in_tiles(module, variables, codes, TILE_MAP, largest)


def decode_in_tiles(
    module: VQGAN, variables, codes: jax.Array, tile: int = TILE_MAP, keep: int = LARGEST_MAP
) -> jax.Array:
    """Codes `(B, h, w)` -> images `(B, f h, f w, C)`, not clipped, one after another in tiles.

    To be called under `jax.jit`. Equal to `VQGAN.decode` up to the rounding of sums, whatever
    `tile` and `keep` are.

    Args:
        module: the tokenizer.
        variables: its own.
        codes: of any size.
        tile: values of a tile's map without its margin; more takes more memory and less time.
        keep: values that a map may have to be kept whole; the same.
    """
    module = module.clone(remat=False)  # it is for gradients
    batch, height, width = codes.shape[:3]
    lowest = len(module.channel_multipliers) - 1
    first, stages = plan(module, height, width, tile, keep)

    def new_map(batch, level, channels, dtype):
        scale = 1 << (lowest - level)
        return jnp.zeros((batch, height * scale, width * scale, channels), dtype)

    def decode_image(i, images):
        own = jax.lax.dynamic_slice_in_dim(codes, i, 1)
        x = module.apply(variables, own, first, method=_run_whole)
        for stage in stages[:-1]:
            output = new_map(1, stage.target, _width(module, stage.target), module.dtype)
            x = _run_in_tiles(module, variables, stage, tile, x, output, 0)
        return _run_in_tiles(module, variables, stages[-1], tile, x, images, i)

    images = new_map(batch, 0, module.out_channels, jnp.promote_types(module.dtype, jnp.float32))
    return jax.lax.fori_loop(0, batch, decode_image, images)


# ---- What runs whole, what runs in tiles, and how much of a margin a tile needs.


@dataclasses.dataclass(frozen=True)
class Stage:
    """Levels that tiles go through from one whole map to the next, or to the images.

    Attributes:
        source: the level whose resolution the given map has.
        levels: those that the tiles go through, the lowest resolution first.
        last: whether it ends in images.
        blocks: residual blocks a level.
        global_norms: whether norms see the whole map.
    """

    source: int
    levels: tuple[int, ...]
    last: bool
    blocks: int
    global_norms: bool

    @property
    def target(self) -> int:
        """The level whose resolution the result has."""
        return self.levels[-1] if self.levels else self.source

    @property
    def num_norms(self) -> int:
        """Norms of the whole map: two a residual block, and one before the last convolution."""
        if not self.global_norms:
            return 0
        return 2 * self.blocks * len(self.levels) + self.last

    def margins(self) -> dict[int, int]:
        """Positions beyond a tile's core that enter each level, and that the source must have.

        Each 3x3 convolution takes one position more: two in a block, one after each doubling of
        the resolution, and the last.
        """
        needed, found = int(self.last), {}
        for level in reversed(self.levels):
            needed += 2 * self.blocks
            found[level] = needed
            if level < self.source:
                needed = (needed + 1 + 1) // 2  # the convolution's, rounded up to whole positions
        found[self.source] = needed
        return found


def plan(
    module: VQGAN, height: int, width: int, tile: int, keep: int
) -> tuple[int, tuple[Stage, ...]]:
    """How a grid of codes is decoded.

    Returns:
        The last level that runs whole, which is the number of levels where none does; and the
        stages that follow. Whole are levels up to the last with attention, and those whose maps
        are no larger than a tile's.
    """
    levels = len(module.channel_multipliers)
    attention = [i for i in range(levels) if module.resolution >> i in module.attention_resolutions]
    first = min(attention, default=levels)
    while first > 0 and _map_values(module, first - 1, height, width) <= tile:
        first -= 1

    fixed = module.num_res_blocks + 1, module.norm == "group"
    stages, source, pending = [], min(first, levels - 1), []
    for level in reversed(range(first)):
        pending.append(level)
        positions = height * width << 2 * (levels - 1 - level)
        if level > 0 and positions * _width(module, level) <= keep:
            stages.append(Stage(source, tuple(pending), False, *fixed))
            source, pending = level, []
    return first, (*stages, Stage(source, tuple(pending), True, *fixed))


def _width(module: VQGAN, level: int) -> int:
    """Channels that leave a level; below the lowest they are its own."""
    multipliers = module.channel_multipliers
    return module.channels * multipliers[min(level, len(multipliers) - 1)]


def _map_values(module: VQGAN, level: int, height: int, width: int) -> int:
    """Values of the largest map of a level for codes `(height, width)`."""
    positions = height * width << 2 * (len(module.channel_multipliers) - 1 - level)
    return positions * max(_width(module, level), _width(module, level + 1))


# ---- Tiles.


@dataclasses.dataclass(frozen=True)
class Axis:
    """The tiles along height or width: cores of one size, each in a window with its margins.

    At the border of the map a window is shifted inwards, so that zero padding is where it is for
    the whole map. The last core is shifted likewise, and shares positions with the one before.
    """

    size: int  # positions of the target's map
    core: int
    target: int
    margins: dict[int, int]

    @classmethod
    def divide(cls, size: int, most: int, stage: Stage) -> "Axis":
        """Cores of at most `most` positions, as equal as may be, whole in the source's map."""
        step = 1 << (stage.source - stage.target)
        count = math.ceil(size / max(step, most // step * step))
        core = math.ceil(size / count / step) * step
        return cls(size, core, stage.target, stage.margins())

    @property
    def count(self) -> int:
        """Of tiles."""
        return math.ceil(self.size / self.core)

    def core_start(self, index):
        """Where a core begins in the target's map."""
        return jnp.minimum(index * self.core, self.size - self.core)

    def extent(self, level: int) -> int:
        """Positions of a window at a level."""
        shift = level - self.target
        return min(self.size >> shift, (self.core >> shift) + 2 * self.margins[level])

    def start(self, level: int, index):
        """Where a window begins in a level's map."""
        shift = level - self.target
        wanted = (self.core_start(index) >> shift) - self.margins[level]
        return jnp.clip(wanted, 0, (self.size >> shift) - self.extent(level))

    def own(self, level: int, index):
        """Which positions of a window belong to the core and to none before it: bool."""
        place = self.start(level, index) + jnp.arange(self.extent(level))
        core = self.core >> (level - self.target)
        return (place >= index * core) & (place < (index + 1) * core)


class Norms:
    """An interceptor of `GroupNorm`: the first few get the whole map's statistics.

    Of the one after them the moments of the tile are taken; what follows it has no meaning.
    """

    def __init__(self, known):
        """`known` holds mean and variance `(1, C)` of the norms in the order of execution."""
        self.known = list(known)
        self.weights = None  # (1, h, w, 1): 1 where a position counts
        self.moments = None  # count, mean and variance, once they are found

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


def _run_in_tiles(module, variables, stage, tile, x, output, i):
    """Writes what a stage makes of the whole map `x` into `output[i]`."""
    side = min(
        math.isqrt(tile // max(_width(module, level), _width(module, level + 1)))
        << (level - stage.target)
        for level in (stage.target, *stage.levels)
    )
    rows, columns = (Axis.divide(size, side, stage) for size in output.shape[1:3])

    def run(index, known):
        place = (rows, index // columns.count), (columns, index % columns.count)
        return module.apply(variables, x, stage, place, known, method=_run_tile)

    tiles = jnp.arange(rows.count * columns.count)
    known = []
    for _ in range(stage.num_norms):
        moments = jax.lax.map(lambda index, known=tuple(known): run(index, known)[1], tiles)
        known.append(_joined(*moments))

    def write(index, output):
        values, _ = run(index, known)
        corner = rows.core_start(index // columns.count), columns.core_start(index % columns.count)
        return jax.lax.dynamic_update_slice(output, values, (i, *corner, 0))

    return jax.lax.fori_loop(0, len(tiles), write, output)


# ---- Parts of the decoder, as methods of the tokenizer.


def _run_whole(module, codes, first):
    """Codes -> what leaves level `first`, its resolution not yet doubled."""
    decoder = module.decoder
    latents = module.post_quant_conv(module.quantize.lookup(codes))
    x = decoder.mid(decoder.conv_in(latents))
    for level in reversed(range(first, len(decoder.up))):
        if level + 1 < len(decoder.up):
            x = _double(decoder, level + 1, x)
        x = _run_blocks(decoder, level, x)
    return x


def _run_tile(module, x, stage, place, known):
    """The core of a tile of a stage's result; or the moments at the norm after the known ones."""
    decoder, norms, at = module.decoder, Norms(known), stage.source

    def cut(x, level, origin=(0, 0)):
        """The window of `level` from a map that begins at `origin`."""
        starts = [axis.start(level, index) for axis, index in place]
        starts = [start - first for start, first in zip(starts, origin, strict=True)]
        extents = [axis.extent(level) for axis, _ in place]
        rows, columns = (axis.own(level, index) for axis, index in place)
        norms.weights = (rows[:, None] & columns).astype(jnp.float32)[None, ..., None]
        return jax.lax.dynamic_slice(x, (0, *starts, 0), (1, *extents, x.shape[-1]))

    with nn.intercept_methods(norms):
        x = cut(x, at)
        for level in stage.levels:
            if level < at:
                origin = [2 * axis.start(at, index) for axis, index in place]
                x = cut(_double(decoder, at, x), level, origin)
                at = level
            x = _run_blocks(decoder, level, x)
            if norms.moments is not None:
                return None, norms.moments
        if stage.last:
            x = decoder.head(nn.swish(decoder.norm_out(x)))
    starts = [axis.core_start(index) - axis.start(at, index) for axis, index in place]
    cores = [axis.core for axis, _ in place]
    values = jax.lax.dynamic_slice(x, (0, *starts, 0), (1, *cores, x.shape[-1]))
    return values, norms.moments


def _run_blocks(decoder, level, x):
    """A level without its doubling."""
    with nn.intercept_methods(_skip(Upsample)):
        return decoder.up[level](x)


def _double(decoder, level, x):
    """The doubling at a level's end."""
    with nn.intercept_methods(_skip(ResidualBlock, AttentionBlock)):
        return decoder.up[level](x)


def _skip(*kinds):
    """An interceptor that makes modules of these kinds hand on what they are given."""

    def interceptor(call, args, kwargs, context):
        return args[0] if isinstance(context.module, kinds) else call(*args, **kwargs)

    return interceptor
