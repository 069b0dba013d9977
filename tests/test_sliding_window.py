"""Grids larger than the window: the rule in plain NumPy, both orders, noise, completion, chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from test_transformer import MODERN, REFERENCE, random_params
from vqgan_jax.models.transformer import Transformer
from vqgan_jax.sampling.decoding import sample_codes
from vqgan_jax.sampling.filters import Filters
from vqgan_jax.sampling.sliding_window import num_steps, sample_steps

CODES = 24
GREEDY = Filters(temperature=0.0)


class Model:
    """A tiny transformer with the parts of its condition: a grid of codes, then a class."""

    def __init__(self, form, window):
        self.window = window
        num_conditions = window[0] * window[1] + 1
        self.transformer = Transformer(
            codebook_size=CODES,
            grid=window,
            num_conditions=num_conditions,
            condition_size=0,
            max_length=num_conditions + window[0] * window[1] - 1,
            num_layers=2,
            num_heads=4,
            width=32,
            **form,
        )
        tokens = np.zeros((1, num_conditions), np.int32)
        self.params = random_params(self.transformer, tokens, tokens[:, :-1])
        self.apply = jax.jit(self.transformer.apply)
        self.compiled = {}

    def sample(
        self,
        parts,
        codes,
        mask=None,
        filters=GREEDY,
        steps=None,
        lag=None,
        indices=None,
        middle=None,
        **options,
    ):
        """`sample_steps`; `steps` are the first and how many."""
        batch, height, width = codes.shape
        count = num_steps(height, width, self.window[1] if lag is None else lag)
        mask = np.zeros(codes.shape, bool) if mask is None else mask
        sample = self.compiled.setdefault(
            (lag, middle),
            jax.jit(functools.partial(sample_steps, self.transformer, lag=lag, middle=middle)),
        )
        indices = np.arange(batch) if indices is None else indices
        first, count = steps or (0, count)
        key = jax.random.key(3)
        return np.asarray(
            sample(self.params, parts, key, indices, filters, codes, mask, first, count, **options)
        )

    def by_the_rule(self, parts, codes, mask, null=None, scales=None, middle=None):
        """Greedy codes, one full forward pass over the window for each."""
        middle = middle or tuple(size // 2 for size in self.window)
        (window_rows, window_columns), (_, height, width) = self.window, codes.shape
        codes = codes.copy()

        def offset(i, size, window, center):
            if i <= center:
                return i
            return window - (size - i) if size - i < window - center else center

        for i, j in np.ndindex(height, width):
            row = offset(i, height, window_rows, middle[0])
            column = offset(j, width, window_columns, middle[1])
            within = np.s_[
                :,
                i - row : i - row + window_rows,
                j - column : j - column + window_columns,
            ]

            def predict(parts, within=within, row=row, column=column, place=(i - row, j - column)):
                parts = [p[:, *place] if p.ndim == 4 else p for p in parts]
                flat = [p[within].reshape(len(p), -1) if p.ndim == 3 else p for p in parts]
                seen = codes[within].reshape(len(codes), -1)
                logits = self.apply({"params": self.params}, np.concatenate(flat, axis=1), seen)
                return np.asarray(logits)[:, row * window_columns + column]

            logits = predict(parts)
            if null is not None:
                without = predict(null)
                logits = without + scales[i, j] * (logits - without)
            codes[:, i, j] = np.where(mask[:, i, j], codes[:, i, j], logits.argmax(axis=-1))
        return codes


@pytest.fixture(scope="module")
def reference():
    return Model(REFERENCE, (4, 6))


@pytest.fixture(scope="module")
def modern():
    return Model(MODERN, (5, 3))


def inputs(batch, height, width, seed=0):
    """The parts of a condition, codes, and a mask of half of them."""
    random = np.random.default_rng(seed)
    grid, codes = random.integers(0, CODES, (2, batch, height, width)).astype(np.int32)
    parts = [grid, random.integers(0, CODES, (batch, 1)).astype(np.int32)]
    return parts, codes, random.random(codes.shape) < 0.5


def test_steps_of_a_large_image():
    assert num_steps(64, 128, lag=16) == 1136
    assert num_steps(64, 128, lag=128) == 64 * 128
    assert num_steps(16, 16, lag=16) == 256


@pytest.mark.slow
@pytest.mark.parametrize("size", [(9, 14), (4, 6), (4, 13), (7, 6)], ids=str)
def test_codes_are_those_of_the_rule(reference, size):
    parts, codes, half = inputs(3, *size)
    for mask in (half, np.zeros_like(half)):  # known codes make the rest more various
        expected = reference.by_the_rule(parts, codes, mask)
        assert len(np.unique(expected[~mask])) > CODES // 4
        for lag in (None, size[1]):
            drawn = reference.sample(parts, codes, mask, lag=lag)
            np.testing.assert_array_equal(drawn, expected)


@pytest.mark.slow
def test_codes_are_those_of_the_rule_with_odd_windows_guidance_and_known_codes(modern):
    parts, codes, mask = inputs(2, 8, 7)
    null = [np.zeros_like(part) for part in parts]
    scales = np.random.default_rng(1).uniform(1.0, 3.0, codes.shape[1:]).astype(np.float32)
    expected = modern.by_the_rule(parts, codes, mask, null, scales)
    for lag in (None, 7):
        drawn = modern.sample(parts, codes, mask, lag=lag, null_conditions=null, scales=scales)
        np.testing.assert_array_equal(drawn, expected)
    np.testing.assert_array_equal(drawn[mask], codes[mask])
    unguided = modern.sample(parts, codes, mask)
    assert np.any(unguided != drawn)
    np.testing.assert_array_equal(unguided, modern.by_the_rule(parts, codes, mask))
    without = modern.sample(parts, codes)
    assert np.any((without != unguided)[~mask])


@pytest.mark.slow
def test_every_lag_draws_the_same_codes_with_noise(reference):
    parts, junk, _ = inputs(3, 9, 14)
    filters = Filters(temperature=1.5, top_p=0.95, top_k=20)
    rows, wavefront, between = (
        reference.sample(parts, junk, filters=filters, lag=lag) for lag in (14, None, 9)
    )
    np.testing.assert_array_equal(wavefront, rows)
    np.testing.assert_array_equal(between, rows)
    assert np.mean(rows != reference.sample(parts, junk)) > 0.5
    alone = reference.sample(
        [part[2:] for part in parts], junk[2:], filters=filters, indices=np.array([2])
    )
    np.testing.assert_array_equal(alone, rows[2:])


def test_a_grid_of_the_windows_size_is_that_of_cached_decoding(reference):
    parts, codes, mask = inputs(3, 4, 6)
    null = [np.zeros_like(part) for part in parts]
    scales = np.linspace(1.0, 3.0, 24, dtype=np.float32)
    filters = Filters(temperature=1.2)

    def flat(parts):
        return np.concatenate([part.reshape(3, -1) for part in parts], axis=1)

    expected = jax.jit(functools.partial(sample_codes, reference.transformer))(
        reference.params,
        flat(parts),
        jax.random.key(3),
        np.arange(3),
        filters,
        codes.reshape(3, -1),
        mask.reshape(3, -1),
        flat(null),
        scales,
    )
    drawn = reference.sample(
        parts, codes, mask, filters, null_conditions=null, scales=scales.reshape(4, 6)
    )
    np.testing.assert_array_equal(drawn.reshape(3, -1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("middle", [(1, 2), (3, 0)])
def test_any_code_of_the_window_can_be_its_middle(reference, middle):
    """Among them the earlier one of the two in the middle, as scenes with a layout have it."""
    parts, codes, mask = inputs(2, 7, 11)
    drawn = reference.sample(parts, codes, mask, middle=middle)
    rule = reference.by_the_rule(parts, codes, mask, middle=middle)
    np.testing.assert_array_equal(drawn, rule)
    assert np.any(rule != reference.by_the_rule(parts, codes, mask))


def test_tokens_of_each_window(reference):
    """25 tokens for each of the window's 4 x 6 places over a grid of 7 x 11."""
    _, codes, mask = inputs(2, 7, 11)
    own = np.random.default_rng(1).integers(0, CODES, (2, 4, 6, 25)).astype(np.int32)
    scales = np.linspace(1.0, 3.0, 77, dtype=np.float32).reshape(7, 11)
    null = [np.zeros_like(own)]
    drawn = reference.sample([own], codes, mask, null_conditions=null, scales=scales)
    rule = reference.by_the_rule([own], codes, mask, null, scales)
    np.testing.assert_array_equal(drawn, rule)
    same = np.broadcast_to(own[:, :1, :1], own.shape)
    assert np.any(rule != reference.by_the_rule([same], codes, mask, null, scales))


@pytest.mark.parametrize("known", ["top", "left", "middle", "all"])
def test_completion_keeps_what_is_given(reference, known):
    parts, codes, _ = inputs(2, 9, 14)
    rows, columns = np.indices((9, 14))
    place = {"top": rows < 4, "left": columns < 7, "all": rows < 9}
    place["middle"] = (abs(rows - 4) < 2) & (abs(columns - 6) < 3)
    mask = np.broadcast_to(place[known], codes.shape)
    other = np.where(mask, codes, (codes + 5) % CODES)
    wavefront, by_rows, from_other = (
        reference.sample(parts, start, mask, Filters(), lag=lag)
        for start, lag in ((codes, None), (codes, 14), (other, None))
    )
    np.testing.assert_array_equal(wavefront[mask], codes[mask])
    np.testing.assert_array_equal(by_rows, wavefront)
    np.testing.assert_array_equal(from_other, wavefront)
    assert known == "all" or np.mean((wavefront != codes)[~mask]) > 0.5


@pytest.mark.parametrize("lag", [None, 14])
def test_steps_draw_what_they_say_and_compile_once(lag):
    model = Model(REFERENCE, (4, 6))
    parts, junk, _ = inputs(2, 6, 14)
    whole = model.sample(parts, junk, lag=lag)
    rows, columns = np.indices((6, 14))
    step_of = (lag or 6) * rows + columns
    total = num_steps(6, 14, lag or 6)
    assert step_of.max() == total - 1
    codes, first = junk, 0
    for count in (1, 20, 0, 15, total - 37):
        codes = model.sample(parts, codes, lag=lag, steps=(first, count))
        first += count
        np.testing.assert_array_equal(codes, np.where(step_of < first, whole, junk))
    assert first == total - 1
    assert np.sum(codes != whole, axis=(1, 2)).max() <= 1
    codes = model.sample(parts, codes, lag=lag, steps=(first, 25))
    np.testing.assert_array_equal(codes, whole)
    assert model.compiled[lag, None]._cache_size() == 1


@pytest.mark.slow
def test_devices_draw_their_own_samples_without_each_other(reference):
    parts, codes, mask = inputs(8, 6, 14)
    expected = reference.sample(parts, codes, mask, Filters())

    def draw(params, parts, indices, codes, mask):
        return sample_steps(
            reference.transformer,
            params,
            parts,
            jax.random.key(3),
            indices,
            Filters(),
            codes,
            mask,
            0,
            num_steps(6, 14, 6),
        )

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    on_each_device = jax.shard_map(
        draw,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows, rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )
    drawn = jax.jit(on_each_device)(reference.params, parts, np.arange(8), codes, mask)
    np.testing.assert_array_equal(drawn, expected)


def test_conditions_of_larger_and_smaller_tokens_are_those_below_the_window():
    """Of 2 x 2 codes each and of half a code; some windows begin within one of the larger."""
    transformer = Transformer(
        codebook_size=CODES,
        grid=(2, 4),
        num_conditions=1 * 2 + 4 * 8,
        condition_size=0,
        max_length=41,
        num_layers=2,
        num_heads=4,
        width=32,
        **REFERENCE,
    )
    random = np.random.default_rng(0)
    coarse, fine = (random.integers(0, CODES, (2, *s)).astype(np.int32) for s in ((2, 3), (8, 12)))
    codes = random.integers(0, CODES, (2, 4, 6)).astype(np.int32)
    mask = random.random(codes.shape) < 0.5  # known codes make the rest more various
    tokens = np.zeros((2, 34), np.int32)
    params = random_params(transformer, tokens, tokens[:, :8])
    params["code_embedding"]["embedding"] *= 5.0  # single tokens have a say among many
    sample = jax.jit(functools.partial(sample_steps, transformer))

    def draw(coarse, fine):
        rest = jax.random.key(0), np.arange(2), GREEDY, codes, mask, 0, num_steps(4, 6, 4)
        return np.asarray(sample(params, [coarse, fine], *rest))

    apply, expected = jax.jit(transformer.apply), codes.copy()
    for i, j in np.ndindex(4, 6):
        top, left = np.clip([i - 1, j - 2], 0, 2)
        given = [
            coarse[:, top // 2 :, left // 2 :][:, :1, :2],
            fine[:, 2 * top :, 2 * left :][:, :4, :8],
        ]
        given = np.concatenate([part.reshape(2, -1) for part in given], axis=1)
        seen = expected[:, top:, left:][:, :2, :4].reshape(2, -1)
        logits = apply({"params": params}, given, seen)[:, 4 * (i - top) + j - left]
        expected[:, i, j] = np.where(mask[:, i, j], codes[:, i, j], np.argmax(logits, axis=-1))
    np.testing.assert_array_equal(draw(coarse, fine), expected)
    assert len(np.unique(expected[~mask])) > CODES // 4
    assert np.any(draw(coarse[:, ::-1], fine) != expected)
    assert np.any(draw(coarse, fine[:, :, ::-1]) != expected)
    for grid, words in (((4, 4), "one must be a multiple"), ((1, 3), "whole tokens of the cond")):
        with pytest.raises(ValueError, match=words):
            draw(np.zeros((2, *grid), np.int32), fine)


def test_what_cannot_be_is_said(reference):
    (grid, label), codes, mask = inputs(1, 6, 8)
    sample = functools.partial(reference.sample, [grid, label], codes, mask)
    small = np.zeros((1, 3, 8), np.int32)
    with pytest.raises(ValueError, match="3x8 codes is smaller than the transformer's window of 4"):
        reference.sample([small, label], small)
    with pytest.raises(ValueError, match="lag is 5; below the window's 6 columns"):
        sample(lag=5)
    with pytest.raises(ValueError, match="24 tokens a window; the transformer was made for 25"):
        reference.sample([grid], codes)
    with pytest.raises(ValueError, match=r"middle is \(4, 2\), outside of the window of 4x6 codes"):
        sample(middle=(4, 2))
    places = np.zeros((1, 3, 2, 25), np.int32)
    with pytest.raises(ValueError, match="tokens for 3x2 places of the window; there are 3x3"):
        reference.sample([places], codes)
    with pytest.raises(ValueError, match=r"grid has shape \(1, 6, 7\); the codes' is \(1, 6, 8\)"):
        sample(null_conditions=[grid[:, :, 1:], label], scales=jnp.ones((6, 8)))
