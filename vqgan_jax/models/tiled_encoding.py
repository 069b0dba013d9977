"""Encoding of large images in tiles, equal to the encoder's own codes up to rounding.

The way is that of `tiled_decoding.py`, downwards: the levels of high resolution go in tiles, with
the statistics of group norms found norm by norm, and everything from the first attention on, or
from the first small map, runs whole.
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.autoencoder import Encoder
from vqgan_jax.models.tiles import Axis, core, limits, run_in_tiles, window
from vqgan_jax.models.vqgan import VQGAN


def _same(images: jax.Array) -> jax.Array:
    return images


def encode_images(
    module: VQGAN,
    variables,
    images: jax.Array,
    prepare: Callable[[jax.Array], jax.Array] = _same,
) -> jax.Array:
    """Images -> codes `(B, H/f, W/f)` int32; large ones in tiles.

    As `VQGAN.encode` of what `prepare` makes of the images, which it calls where no map of the
    encoder is above `tiles.limits`.

    Args:
        module: the tokenizer.
        variables: its own.
        images: `(B, H, W, ...)`, the factor dividing height and width.
        prepare: from raw images or label maps to the float `(B, H, W, C)` that the tokenizer takes,
            each position by itself. A tile is prepared when it is its turn, so that a large label
            map is never one-hot as a whole.
    """
    encoder = module.encoder
    if isinstance(encoder, Encoder):
        height, width = images.shape[1:3]
        levels = range(len(encoder.channel_multipliers))
        tile, largest = limits(encoder.norm)
        if max(_map_values(encoder, level, height, width) for level in levels) > largest:
            return encode_in_tiles(module, variables, images, tile, largest, prepare)
    return module.apply(variables, prepare(images), method="encode")


def encode_in_tiles(
    module: VQGAN,
    variables,
    images: jax.Array,
    tile: int,
    keep: int,
    prepare: Callable[[jax.Array], jax.Array] = _same,
) -> jax.Array:
    """Images -> codes `(B, H/f, W/f)` int32, one image after another in tiles.

    To be called under `jax.jit`. Equal to `VQGAN.encode` up to the rounding of sums, whatever
    `tile` and `keep` are.

    Args:
        module, variables, images, prepare: as of `encode_images`.
        tile: values of a tile's map without its margin; more takes more memory and less time.
        keep: values that a map may have to be kept whole; the same.
    """
    encoder = module.encoder.clone(remat=False)  # it is for gradients
    module = module.clone(encoder=encoder)
    height, width = images.shape[1:3]
    first, stages = plan(encoder, height, width, tile, keep)

    def encode_image(image):
        x = image[None]
        for stage in stages:
            x = _run_stage(module, variables, stage, tile, x, prepare)
        if not stages:
            x = prepare(x)
        return module.apply(variables, x, first, method=_run_whole)[0]

    return jax.lax.map(encode_image, images)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Levels that tiles go through from one whole map, or the images, to the next.

    Attributes:
        levels: those that the tiles go through, the highest resolution first.
        blocks: residual blocks a level.
        global_norms: whether norms see the whole map.
    """

    levels: tuple[int, ...]
    blocks: int
    global_norms: bool

    @property
    def target(self) -> int:
        """The level whose resolution the result has."""
        return self.levels[-1] + 1

    @property
    def num_norms(self) -> int:
        """Norms of the whole map: two a residual block."""
        return 2 * self.blocks * len(self.levels) if self.global_norms else 0

    def margins(self) -> dict[int, int]:
        """Positions beyond a tile's core in each level, all that padding at its sides may change.

        Each 3x3 convolution adds one position: the first, and two in a block. Halving the
        resolution looks two positions to the right of the one it stands on.
        """
        changed = 1 if self.levels[0] == 0 else 0
        for _ in self.levels:
            changed = (changed + 2 * self.blocks) // 2 + 1
        return {level: changed << (self.target - level) for level in (*self.levels, self.target)}


def plan(
    encoder: Encoder, height: int, width: int, tile: int, keep: int
) -> tuple[int, tuple[Stage, ...]]:
    """How images of this size are encoded: the first level that runs whole, and what is before it.

    Whole are the levels from the first with attention on, the last, and those whose maps are no
    larger than a tile's.
    """
    levels = len(encoder.channel_multipliers)
    attention = [
        i for i in range(levels) if encoder.resolution >> i in encoder.attention_resolutions
    ]
    first = min([*attention, levels - 1])
    while first > 0 and _map_values(encoder, first - 1, height, width) <= tile:
        first -= 1

    fixed = encoder.num_res_blocks, encoder.norm == "group"
    stages, pending = [], []
    for level in range(first):
        pending.append(level)
        positions = (height >> level + 1) * (width >> level + 1)
        if level == first - 1 or positions * _width(encoder, level) <= keep:
            stages.append(Stage(tuple(pending), *fixed))
            pending = []
    return first, tuple(stages)


def _width(encoder: Encoder, level: int) -> int:
    """Channels that leave a level, which its blocks change; first, those of the convolution."""
    changed = level >= 0 and encoder.num_res_blocks > 0
    return encoder.channels * (encoder.channel_multipliers[level] if changed else 1)


def _map_values(encoder: Encoder, level: int, height: int, width: int) -> int:
    """Values of the largest map of a level for images `(height, width)`."""
    positions = (height >> level) * (width >> level)
    return positions * max(_width(encoder, level), _width(encoder, level - 1))


def _run_stage(module, variables, stage, tile, x, prepare):
    """What a stage makes of the whole map `x`, or of the images."""
    encoder = module.encoder
    side = min(
        math.isqrt(tile // (_map_values(encoder, level, 1 << level, 1 << level)))
        << (level - stage.levels[0])
        for level in stage.levels
    )
    rows, columns = (Axis.divide(size, side, stage.margins()) for size in x.shape[1:3])

    def run(place, norms):
        return module.apply(variables, x, stage, place, norms, prepare, method=_run_tile)

    shift = stage.target - stage.levels[0]
    shape = (1, x.shape[1] >> shift, x.shape[2] >> shift, _width(encoder, stage.levels[-1]))
    output = jnp.zeros(shape, encoder.dtype)
    return run_in_tiles(run, rows, columns, stage.num_norms, stage.target, output, 0)


# ---- Parts of the encoder, as methods of the tokenizer.


def _run_tile(module, x, stage, place, norms, prepare):
    """The core of a tile of a stage's result, from the whole map `x`."""
    encoder = module.encoder
    x = window(x, stage.levels[0], place)
    with nn.intercept_methods(norms):
        if stage.levels[0] == 0:
            x = encoder.conv_in(prepare(x))
        for level in stage.levels:
            norms.count(level, place)
            x = encoder.down[level](x)
    return core(x, stage.target, place)


def _run_whole(module, x, first):
    """What enters level `first` -> codes; images where it is the highest."""
    encoder = module.encoder
    if first == 0:
        x = encoder.conv_in(x)
    for level in encoder.down[first:]:
        x = level(x)
    return module.quantize(module.quant_conv(encoder.tail(x))).codes
