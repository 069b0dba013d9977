"""Decoding in tiles: the decoder's own images, in memory that does not grow with them."""

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
from vqgan_jax.models import layers, tiled_decoding, tiles
from vqgan_jax.models.layers import AttentionBlock
from vqgan_jax.models.tiled_decoding import Stage, decode_in_tiles, plan

# ---- Equality.


def random_codes(*shape):
    return np.random.default_rng(1).integers(0, 16, shape)


def decode_both_ways(module, variables, codes, tile, keep):
    def in_tiles(variables, codes):
        return decode_in_tiles(module, variables, codes, tile, keep)

    return whole_and_in_tiles(module, "decode", in_tiles, variables, codes)


CASES = {
    "f4, all levels in one stage": ((1, 1, 2), (), (1, 21, 17), 2**11, 0),
    "f4, a stage for each level, two images": ((1, 2, 2), (2,), (2, 16, 21), 2**11, 2**30),
    "f4, attention in two levels": ((1, 1, 1), (1, 2), (1, 12, 9), 2**11, 0),
    "f4, attention everywhere": ((1, 1, 1), (0, 1, 2), (1, 4, 6), 2**8, 0),
    "f4, a strip": ((1, 1, 2), (2,), (1, 3, 40), 2**10, 0),
    "f8, one level whole by its size": ((1, 1, 1, 1), (3,), (1, 11, 13), 2**13, 0),
    "f8, attention in two levels": ((1, 1, 1, 2), (2, 3), (1, 7, 10), 2**12, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_images_are_those_of_the_decoder(case):
    multipliers, attention, shape, tile, keep = CASES[case]
    module = tokenizer(multipliers, attention)
    variables, codes = random_variables(module), random_codes(*shape)
    whole, in_tiles = decode_both_ways(module, variables, codes, tile, keep)
    assert np.abs(whole - in_tiles).max() <= 1e-5 * np.abs(whole).max()


@pytest.mark.slow
def test_norms_of_each_position_alone_need_no_pass_of_their_own():
    module = tokenizer((1, 1, 2), norm="layer", middle_attention=False, num_res_blocks=1)
    variables, codes = random_variables(module), random_codes(2, 21, 17)
    _, stages = plan(module.decoder, 21, 17, 2**11, 0)
    assert [stage.num_norms for stage in stages] == [0]
    whole, in_tiles = decode_both_ways(module, variables, codes, 2**11, 0)
    assert np.abs(whole - in_tiles).max() <= 1e-5 * np.abs(whole).max()


@pytest.mark.slow
def test_nothing_but_rounding_differs(float64):
    module = tokenizer((1, 1, 2), (2,), dtype="float64")
    variables, codes = random_variables(module), random_codes(1, 9, 11)
    whole, in_tiles = decode_both_ways(module, variables, codes, 2**10, 0)
    assert np.abs(whole - in_tiles).max() <= 1e-13 * np.abs(whole).max()


@pytest.mark.slow
def test_more_blocks_a_level_and_many_channels_of_a_label_map():
    module = tokenizer((1, 2), (1,), num_res_blocks=1, out_channels=37, remat=True)
    variables, codes = random_variables(module), random_codes(1, 30, 26)
    whole, in_tiles = decode_both_ways(module, variables, codes, 2**12, 0)
    assert np.abs(whole - in_tiles).max() <= 1e-5 * np.abs(whole).max()


@pytest.mark.slow
def test_bfloat16_is_as_exact_in_tiles():
    """The compiler rounds at other places there, so values differ, but by less than it rounds."""
    module, exact = (tokenizer((1, 2), (1,), dtype=dtype) for dtype in ("bfloat16", "float32"))
    variables, codes = random_variables(module), random_codes(1, 20, 16)
    whole, in_tiles = decode_both_ways(module, variables, codes, 2**11, 0)
    reference = jax.jit(functools.partial(exact.apply, method="decode"))(variables, codes)
    assert np.abs(in_tiles - reference).mean() < 1.1 * np.abs(whole - reference).mean()
    assert np.abs(in_tiles - whole).mean() < 0.5 * np.abs(whole - reference).mean()
    assert np.abs(in_tiles - whole).max() < np.abs(whole - reference).max()


def test_the_margin_is_as_wide_as_it_must_be(monkeypatch):
    """With one position less, tiles show at their seams."""
    module = tokenizer((1, 1, 2), (2,))
    variables, codes = random_variables(module), random_codes(1, 20, 16)
    needed = Stage.margins

    def less(stage):
        return {level: margin - 1 for level, margin in needed(stage).items()}

    monkeypatch.setattr(Stage, "margins", less)
    whole, in_tiles = decode_both_ways(module, variables, codes, 2**11, 0)
    assert np.abs(whole - in_tiles).max() > 1e-3 * np.abs(whole).max()


@pytest.mark.slow
def test_mean_far_from_zero_does_not_harm_the_variance():
    """The first norm in tiles sees a map whose mean is 1,000 times its deviation."""
    module = tokenizer((1, 1))
    variables = random_variables(module)
    variables["params"]["decoder"]["mid"]["block_2"]["conv2"]["bias"] += 1000.0
    whole, in_tiles = decode_both_ways(module, variables, random_codes(1, 24, 24), 2**10, 0)
    assert np.abs(whole - in_tiles).max() <= 1e-3 * np.abs(whole).max()


# ---- Which way is taken.


def test_plan_of_the_published_models():
    def planned(module, size):
        first, stages = plan(module.decoder, size, size, *tiles.limits(module.decoder.norm))
        return first, [(stage.source, stage.levels) for stage in stages]

    f16, f8 = published(), published((1, 1, 2, 4), (32,))
    assert planned(f16, 128) == (4, [(4, (3,)), (3, (2,)), (2, (1,)), (1, (0,))])
    assert planned(f16, 256) == (4, [(4, (3,)), (3, (2, 1, 0))])
    assert planned(f8, 256) == (3, [(3, (2,)), (2, (1,)), (1, (0,))])


def test_large_grids_go_in_tiles_by_themselves(monkeypatch):
    module = tokenizer((1, 1))
    variables = random_variables(module)
    monkeypatch.setattr(tiles, "LARGEST_MAP", 40 * 40 * 8)
    for size, is_tiled in ((20, False), (21, True)):
        decode = jax.jit(functools.partial(tiled_decoding.decode_codes, module))
        codes = jax.ShapeDtypeStruct((1, size, size), jnp.int32)
        assert ("while" in decode.lower(variables, codes).as_text()) == is_tiled


# ---- Attention.


def test_attention_in_blocks_is_attention(monkeypatch, float64):
    x = np.random.default_rng(0).standard_normal((2, 9, 11, 8))
    block = AttentionBlock(functools.partial(layers.GroupNorm, 4), jnp.float64)
    variables = jax.tree.map(lambda leaf: 3.0 * leaf, block.init(jax.random.key(0), x))

    def output_and_gradient():
        def loss(variables):
            output = block.apply(variables, x)
            return jnp.square(output).mean(), output

        return jax.jit(jax.grad(loss, has_aux=True))(variables)

    plain = output_and_gradient()
    monkeypatch.setattr(layers, "LARGE_GRID", 98)
    monkeypatch.setattr(layers, "BLOCK_LOGITS", 2 * 99 * 10)
    in_blocks = output_and_gradient()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), plain, in_blocks)


def test_memory_of_attention_grows_with_the_grid_and_not_its_square():
    def memory(size):
        queries = jax.ShapeDtypeStruct((1, size**2, 8), jnp.float32)
        return working_memory(layers.attend_to_all, queries, queries, queries)

    logits = 4 * layers.BLOCK_LOGITS
    assert logits <= memory(128) <= 4 * logits
    assert memory(256) <= memory(128) + 8 * 4 * 8 * 256**2
    assert memory(256) < 4 * 256**4 / 100


# ---- Memory.


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(monkeypatch):
    """Only what is kept whole does: the lowest level, at a quarter of the image's height."""
    monkeypatch.setattr(layers, "BLOCK_LOGITS", 2**20)
    monkeypatch.setattr(layers, "BLOCK_QUERIES", 1)
    module = tokenizer((1, 1, 1))
    variables = jax.eval_shape(lambda: random_variables(module))

    def memory(decode, size):
        codes = jax.ShapeDtypeStruct((1, size // 4, size // 4), jnp.int32)
        return working_memory(decode, variables, codes)

    def in_tiles(variables, codes):
        return decode_in_tiles(module, variables, codes, 2**14, 0)

    def whole(variables, codes):
        return module.apply(variables, codes, method="decode")

    small, large = memory(in_tiles, 1024), memory(in_tiles, 2048)
    lowest_maps = [4 * 8 * (size // 4) ** 2 for size in (1024, 2048)]
    assert large - small <= 8 * (lowest_maps[1] - lowest_maps[0])
    assert large < 0.2 * memory(whole, 2048)


def test_a_larger_image_needs_no_more_memory_where_norms_are_of_each_position(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_MAP", 2**18)
    module = tokenizer((1, 1, 1), norm="layer", middle_attention=False)
    variables = jax.eval_shape(lambda: random_variables(module))

    def memory(size):
        codes = jax.ShapeDtypeStruct((1, size // 4, size // 4), jnp.int32)
        return working_memory(
            lambda variables, codes: tiled_decoding.decode_codes(module, variables, codes),
            variables,
            codes,
        )

    # Up to 362x362 positions of 8 channels are decoded at once.
    assert memory(720) < memory(360)
    assert memory(1440) < 1.5 * memory(360)  # at once it would be 16 times
