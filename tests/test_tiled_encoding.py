"""Encoding in tiles: the encoder's own codes, in memory that does not grow with the image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiny_tokenizers import (
    published,
    random_variables,
    tokenizer,
    whole_and_in_tiles,
    working_memory,
)
from vqgan_jax.models import tiled_encoding, tiles
from vqgan_jax.models.quantizers import NearestQuantizer
from vqgan_jax.models.tiled_encoding import Stage, encode_in_tiles, plan

# ---- Equality.


def random_images(*shape):
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture
def latents(monkeypatch):
    """Makes codes of what stands in front of the quantiser, which shows every difference."""

    class Bare(NearestQuantizer):
        def __call__(self, latents, train=False, temperature=None):
            return super().__call__(latents, train, temperature).replace(codes=latents)

    monkeypatch.setattr(
        "vqgan_jax.models.vqgan.make_quantizer",
        lambda kind, **kwargs: Bare(kwargs["codebook_size"], kwargs["code_dim"]),
    )


def encode_both_ways(module, variables, images, tile, keep):
    def in_tiles(variables, images):
        return encode_in_tiles(module, variables, images, tile, keep)

    return whole_and_in_tiles(module, "encode", in_tiles, variables, images)


CASES = {
    "f4, all levels in one stage": ((1, 1, 2), (), 2, (1, 84, 68, 3), 2**11, 0),
    "f4, a stage for each level, two images": ((1, 2, 2), (2,), 1, (2, 64, 84, 3), 2**11, 2**30),
    "f4, attention in two levels": ((1, 1, 1), (1, 2), 1, (1, 48, 36, 3), 2**11, 0),
    "f4, attention everywhere": ((1, 1, 1), (0, 1, 2), 1, (1, 16, 24, 3), 2**8, 0),
    "f4, a strip": ((1, 1, 2), (2,), 0, (1, 12, 160, 3), 2**10, 0),
    "f8, one level whole by its size": ((1, 1, 1, 1), (3,), 1, (1, 88, 104, 3), 2**13, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_latents_are_those_of_the_encoder(case, latents):
    multipliers, attention, blocks, shape, tile, keep = CASES[case]
    module = tokenizer(multipliers, attention, num_res_blocks=blocks)
    variables, images = random_variables(module), random_images(*shape)
    whole, in_tiles = encode_both_ways(module, variables, images, tile, keep)
    assert np.abs(whole - in_tiles).max() <= 1e-5 * np.abs(whole).max()


def test_norms_of_each_position_alone_need_no_pass_of_their_own(latents):
    module = tokenizer((1, 1, 2), norm="layer", middle_attention=False, num_res_blocks=2)
    variables, images = random_variables(module), random_images(2, 84, 68, 3)
    _, stages = plan(module.encoder, 84, 68, 2**10, 0)
    assert [stage.num_norms for stage in stages] == [0]
    whole, in_tiles = encode_both_ways(module, variables, images, 2**10, 0)
    assert np.abs(whole - in_tiles).max() <= 1e-5 * np.abs(whole).max()


def test_codes_of_label_maps_that_are_one_hot_tile_by_tile():
    module = tokenizer((1, 2), (1,), num_res_blocks=1, in_channels=37, remat=True)
    variables = random_variables(module, 37)
    labels = np.random.default_rng(1).integers(0, 37, (2, 60, 52))
    prepare = functools.partial(jax.nn.one_hot, num_classes=37)
    whole = jax.jit(functools.partial(module.apply, method="encode"))(variables, prepare(labels))
    in_tiles = jax.jit(lambda v, x: encode_in_tiles(module, v, x, 2**14, 0, prepare))(
        variables, labels
    )
    np.testing.assert_array_equal(whole, in_tiles)
    assert len(np.unique(whole)) >= 8


def test_nothing_but_rounding_differs(float64, latents):
    module = tokenizer((1, 1, 2), (2,), dtype="float64", num_res_blocks=1)
    variables, images = random_variables(module), random_images(1, 36, 44, 3).astype(np.float64)
    whole, in_tiles = encode_both_ways(module, variables, images, 2**10, 0)
    assert np.abs(whole - in_tiles).max() <= 1e-12 * np.abs(whole).max()


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_margin_is_as_wide_as_it_must_be(blocks, monkeypatch, latents):
    """With one code less, tiles show at their seams."""
    module = tokenizer((1, 1, 1), norm="layer", middle_attention=False, num_res_blocks=blocks)
    variables, images = random_variables(module), random_images(1, 160, 128, 3)
    needed = Stage.margins

    def less(stage):
        changed = needed(stage)
        return {level: m - (1 << (stage.target - level)) for level, m in changed.items()}

    monkeypatch.setattr(Stage, "margins", less)
    whole, in_tiles = encode_both_ways(module, variables, images, 2**12, 0)
    assert np.abs(whole - in_tiles).max() > 1e-4 * np.abs(whole).max()


# ---- Which way is taken, and its memory.


def test_plan_of_the_published_models():
    def planned(module, size):
        first, stages = plan(module.encoder, size, size, *tiles.limits(module.encoder.norm))
        return first, [stage.levels for stage in stages]

    f16, f8 = published(), published((1, 1, 2, 4), (32,))
    assert planned(f16, 2048) == (4, [(0,), (1,), (2,), (3,)])
    assert planned(f16, 4096) == (4, [(0, 1), (2,), (3,)])
    assert planned(f8, 2048) == (3, [(0,), (1,), (2,)])
    assert planned(f16, 256) == (0, [])


def test_large_images_go_in_tiles_by_themselves(monkeypatch):
    module = tokenizer((1, 1))
    variables = random_variables(module)
    monkeypatch.setattr(tiles, "LARGEST_MAP", 40 * 40 * 8)
    for size, is_tiled in ((40, False), (42, True)):
        encode = jax.jit(functools.partial(tiled_encoding.encode_images, module))
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        assert ("while" in encode.lower(variables, images).as_text()) == is_tiled


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_memory_grows_by_the_lowest_maps_alone(norm):
    module = tokenizer(
        (1, 1, 1), norm=norm, middle_attention=False, num_res_blocks=1, in_channels=64
    )
    variables = jax.eval_shape(lambda: random_variables(module, 64))
    prepare = functools.partial(jax.nn.one_hot, num_classes=64)

    def memory(size, encode):
        return working_memory(encode, variables, jax.ShapeDtypeStruct((1, size, size), jnp.int32))

    def in_tiles(variables, labels):
        return encode_in_tiles(module, variables, labels, 2**16, 0, prepare)

    def whole(variables, labels):
        return module.apply(variables, prepare(labels), method="encode")

    small, large = memory(512, in_tiles), memory(1024, in_tiles)
    lowest_maps = [4 * 8 * (size // 4) ** 2 for size in (512, 1024)]
    assert large - small <= 8 * (lowest_maps[1] - lowest_maps[0])
    assert large < 0.1 * memory(1024, whole)
