"""Decoding of large images in tiles, equal to the decoder's own output up to rounding.

Convolutions see a neighbourhood, so that a tile with enough of a margin gives the same values as
the whole map. Two things see everything. Attention runs on the whole map, and with it all levels
of lower resolution. Group normalisation needs mean and variance of the whole map, which are found
norm by norm: a pass over all tiles runs up to the norm in question, those in front of it known by
then, and takes the moments of each tile; a last pass gives the values. Layer normalisation at each
position alone needs none of this.

Every pass begins again at the last map that was kept whole. A decoder of f16 in this way computes
a 2048x2048 image some five times, and holds no map larger than those of a 1024x1024 image.

Only the convolutional decoder goes in tiles. In a vision transformer every block sees the whole,
and no map is larger than the grid of codes.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.autoencoder import Decoder
from vqgan_jax.models.layers import AttentionBlock, ResidualBlock, Upsample
from vqgan_jax.models.tiles import Axis, core, limits, run_in_tiles, window
from vqgan_jax.models.vqgan import VQGAN


def decode_codes(module: VQGAN, variables, codes: jax.Array) -> jax.Array:
    """Codes `(B, h, w)` -> images `(B, f h, f w, C)`, not clipped; large ones in tiles.

    As `VQGAN.decode`, which it calls where no map of the decoder is above `tiles.limits`, and where
    the decoder is a vision transformer.
    """
    decoder = module.decoder
    if isinstance(decoder, Decoder):
        height, width = codes.shape[1:3]
        levels = range(len(decoder.channel_multipliers))
        tile, largest = limits(decoder.norm)
        if max(_map_values(decoder, level, height, width) for level in levels) > largest:
            return decode_in_tiles(module, variables, codes, tile, largest)
    return module.apply(variables, codes, method="decode")


def decode_in_tiles(module: VQGAN, variables, codes: jax.Array, tile: int, keep: int) -> jax.Array:
    """Codes `(B, h, w)` -> images `(B, f h, f w, C)`, not clipped, one after another in tiles.

    To be called under `jax.jit`. Equal to `VQGAN.decode` up to the rounding of sums, whatever
    `tile` and `keep` are.

    Args:
        module: the tokenizer, whose decoder is convolutional.
        variables: its own.
        codes: of any size.
        tile: values of a tile's map without its margin; more takes more memory and less time.
        keep: values that a map may have to be kept whole; the same.
    """
    decoder = module.decoder.clone(remat=False)  # it is for gradients
    module = module.clone(decoder=decoder)
    batch, height, width = codes.shape[:3]
    lowest = len(decoder.channel_multipliers) - 1
    first, stages = plan(decoder, height, width, tile, keep)

    def new_map(batch, level, channels, dtype):
        scale = 1 << (lowest - level)
        return jnp.zeros((batch, height * scale, width * scale, channels), dtype)

    def decode_image(i, images):
        own = jax.lax.dynamic_slice_in_dim(codes, i, 1)
        x = module.apply(variables, own, first, method=_run_whole)
        for stage in stages[:-1]:
            output = new_map(1, stage.target, _width(decoder, stage.target), decoder.dtype)
            x = _run_stage(module, variables, stage, tile, x, output, 0)
        return _run_stage(module, variables, stages[-1], tile, x, images, i)

    dtype = jnp.promote_types(decoder.dtype, jnp.float32)
    channels = decoder.out_channels // (2 if module.logit_laplace else 1)
    images = new_map(batch, 0, channels, dtype)
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


def _run_stage(module, variables, stage, tile, x, output, i):
    """Writes what a stage makes of the whole map `x` into `output[i]`."""
    decoder = module.decoder
    side = min(
        math.isqrt(tile // max(_width(decoder, level), _width(decoder, level + 1)))
        << (level - stage.target)
        for level in (stage.target, *stage.levels)
    )
    rows, columns = (Axis.divide(size, side, stage.margins()) for size in output.shape[1:3])

    def run(place, norms):
        return module.apply(variables, x, stage, place, norms, method=_run_tile)

    return run_in_tiles(run, rows, columns, stage.num_norms, stage.target, output, i)


def plan(
    decoder: Decoder, height: int, width: int, tile: int, keep: int
) -> tuple[int, tuple[Stage, ...]]:
    """How a grid of codes is decoded.

    Returns:
        The last level that runs whole, which is the number of levels where none does; and the
        stages that follow. Whole are levels up to the last with attention, and those whose maps
        are no larger than a tile's.
    """
    levels = len(decoder.channel_multipliers)
    attention = [
        i for i in range(levels) if decoder.resolution >> i in decoder.attention_resolutions
    ]
    first = min(attention, default=levels)
    while first > 0 and _map_values(decoder, first - 1, height, width) <= tile:
        first -= 1

    fixed = decoder.num_res_blocks + 1, decoder.norm == "group"
    stages, source, pending = [], min(first, levels - 1), []
    for level in reversed(range(first)):
        pending.append(level)
        positions = height * width << 2 * (levels - 1 - level)
        if level > 0 and positions * _width(decoder, level) <= keep:
            stages.append(Stage(source, tuple(pending), False, *fixed))
            source, pending = level, []
    return first, (*stages, Stage(source, tuple(pending), True, *fixed))


def _width(decoder: Decoder, level: int) -> int:
    """Channels that leave a level; below the lowest they are its own."""
    multipliers = decoder.channel_multipliers
    return decoder.channels * multipliers[min(level, len(multipliers) - 1)]


def _map_values(decoder: Decoder, level: int, height: int, width: int) -> int:
    """Values of the largest map of a level for codes `(height, width)`."""
    positions = height * width << 2 * (len(decoder.channel_multipliers) - 1 - level)
    return positions * max(_width(decoder, level), _width(decoder, level + 1))


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


def _run_tile(module, x, stage, place, norms):
    """The core of a tile of a stage's result, from the whole map `x`."""
    decoder, at = module.decoder, stage.source

    with nn.intercept_methods(norms):
        norms.count(at, place)
        x = window(x, at, place)
        for level in stage.levels:
            if level < at:
                origin = [2 * axis.start(at, index) for axis, index in place]
                x = window(_double(decoder, at, x), level, place, origin)
                norms.count(level, place)
                at = level
            x = _run_blocks(decoder, level, x)
        if stage.last:
            x = module.head(nn.swish(decoder.norm_out(x)))
    return core(x, at, place)


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
