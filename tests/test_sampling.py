"""Drawing codes: filters against NumPy, frequencies, guidance, completion, noise by sample."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from test_transformer import MODERN, REFERENCE, inputs, random_params, tiny_transformer
from vqgan_jax.sampling.decoding import sample_codes
from vqgan_jax.sampling.filters import Filters, draw, keep_top_k, keep_top_p
from vqgan_jax.sampling.guidance import guidance_scales, guide
from vqgan_jax.sampling.likelihood import log_likelihood


def test_top_k_keeps_ties():
    logits = jnp.asarray([[3.0, 1.0, 2.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    kept = np.isfinite(keep_top_k(logits, 2))
    np.testing.assert_array_equal(kept, [[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(keep_top_k(logits, 0), logits)


@pytest.mark.parametrize("k", [1, 7, 39])
def test_top_k_is_that_of_numpy(k):
    """With ties, signs, both zeros, infinities and numbers too small for a normal float."""
    rows = np.random.default_rng(0).standard_normal((6, 40)).round(1).astype(np.float32)
    rows[0] = -np.abs(rows[0])
    rows[1, :20], rows[2, ::2], rows[3, ::2] = 0.0, -0.0, 1e-42
    rows[2, 1::2], rows[4, :10] = 0.0, -np.inf
    kth = np.sort(rows, axis=-1)[:, -k, None]
    expected = np.where(rows >= kth, rows, -np.inf)
    np.testing.assert_array_equal(keep_top_k(jnp.asarray(rows), k), expected)


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 1.0])
def test_top_p_is_that_of_numpy(p):
    """The code that passes the threshold stays, as do all before it."""
    logits = np.random.default_rng(0).standard_normal((5, 40)) * 2
    kept = np.isfinite(keep_top_p(jnp.asarray(logits, jnp.float32), p))
    for row, row_kept in zip(logits, kept, strict=True):
        order = np.argsort(-row)
        share = np.cumsum(np.exp(row[order]) / np.exp(row).sum())
        count = 1 + np.sum(share < p * (1 - 1e-6))
        np.testing.assert_array_equal(np.sort(np.flatnonzero(row_kept)), np.sort(order[:count]))


def test_draws_have_the_probabilities():
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    keys = jax.random.split(jax.random.key(0), 40_000)
    rows = jnp.broadcast_to(logits, (len(keys), 4))
    codes = jax.jit(draw)(rows, Filters(temperature=2.0), keys)
    expected = np.exp(logits / 2) / np.exp(logits / 2).sum()
    frequencies = np.bincount(codes, minlength=4) / len(keys)
    np.testing.assert_allclose(frequencies, expected, atol=4 * np.sqrt(0.25 / len(keys)))
    filtered = jax.jit(draw)(rows, Filters(top_k=2), keys)
    assert set(np.unique(filtered)) == {1, 2}
    assert np.all(draw(rows[:5], Filters(temperature=0.0), keys[:5]) == 2)


def test_guidance():
    conditional, unconditional = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[0.5, 3.0]])
    both = jnp.concatenate([conditional, unconditional])
    np.testing.assert_allclose(guide(both, 1.0), conditional)
    np.testing.assert_allclose(guide(both, 0.0), unconditional)
    np.testing.assert_allclose(guide(both, 3.0), [[2.0, 0.0]])
    np.testing.assert_array_equal(guidance_scales(3.0, 4), [3, 3, 3, 3])
    np.testing.assert_allclose(guidance_scales(3.0, 3, "linear"), [1, 2, 3])
    np.testing.assert_allclose(guidance_scales(3.0, 3, "cosine"), [1, 2, 3], atol=1e-6)
    with pytest.raises(ValueError, match="no guidance schedule 'sine'"):
        guidance_scales(3.0, 3, "sine")


PLAIN = Filters()


def sampler(transformer, params):
    """`sample(indices, ...)` of a tiny transformer, everything else given."""
    jitted = jax.jit(functools.partial(sample_codes, transformer))

    def sample(indices, conditions, filters=PLAIN, known=None, mask=None, scale=None):
        shape = (len(indices), 15)
        known = np.zeros(shape, np.int32) if known is None else known
        mask = np.zeros(shape, bool) if mask is None else mask
        null = scales = None
        if scale is not None:
            null, scales = np.full_like(conditions, 5), guidance_scales(scale, 15)
        return np.asarray(
            jitted(
                params,
                conditions,
                jax.random.key(7),
                np.asarray(indices),
                filters,
                known,
                mask,
                null,
                scales,
            )
        )

    return sample, jitted


@pytest.mark.parametrize("form", [REFERENCE, MODERN], ids=["reference", "modern"])
def test_greedy_codes_are_the_likeliest_of_the_full_forward_pass(form):
    transformer = tiny_transformer(**form)
    conditions, codes = inputs()
    params = random_params(transformer, conditions, codes)
    sample, _ = sampler(transformer, params)
    for scale in (None, 2.5):
        drawn = sample([0, 1], conditions, Filters(temperature=0.0), scale=scale)
        logits = tiny.run(transformer, {"params": params}, conditions, drawn)
        if scale is not None:
            null = np.full_like(conditions, 5)
            null = tiny.run(transformer, {"params": params}, null, drawn)
            logits = guide(jnp.concatenate([logits, null]), scale)
        np.testing.assert_array_equal(np.argmax(logits, axis=-1), drawn)


def test_noise_belongs_to_the_sample_and_not_to_the_batch():
    transformer = tiny_transformer(**MODERN)
    conditions, codes = inputs(batch=8)
    params = random_params(transformer, conditions, codes)
    sample, _ = sampler(transformer, params)
    whole = sample(range(8), conditions)
    parts = [sample(range(i, i + 2), conditions[i : i + 2]) for i in range(0, 8, 2)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    order = np.array([3, 1, 7, 0, 5, 2, 6, 4])
    np.testing.assert_array_equal(sample(order, conditions[order]), whole[order])
    assert len(np.unique(whole, axis=0)) == 8


def test_known_codes_stay_and_lead_the_rest():
    transformer = tiny_transformer(**MODERN)
    conditions, codes = inputs(batch=2)
    params = random_params(transformer, conditions, codes)
    sample, _ = sampler(transformer, params)
    mask = np.random.default_rng(1).random(codes.shape) < 0.5
    drawn = sample([0, 1], conditions, Filters(temperature=0.0), known=codes, mask=mask)
    np.testing.assert_array_equal(drawn[mask], codes[mask])
    logits = tiny.run(transformer, {"params": params}, conditions, drawn)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1)[~mask], drawn[~mask])


def test_temperature_classes_and_scales_compile_nothing_anew():
    transformer = tiny_transformer(**MODERN)
    conditions, codes = inputs()
    params = random_params(transformer, conditions, codes)
    sample, jitted = sampler(transformer, params)
    for temperature, shift, scale in ((1.0, 0, 2.0), (0.5, 1, 1.5), (0.0, 2, 4.0)):
        filters = Filters(temperature=np.float32(temperature), top_p=np.float32(0.9), top_k=10)
        sample([shift, 9], (conditions + shift) % 5, filters, scale=scale)
    assert jitted._cache_size() == 1


def test_likelihoods_of_all_sequences_add_up_to_one():
    transformer = tiny_transformer(**REFERENCE)
    conditions, codes = inputs(batch=1)
    params = random_params(transformer, conditions, codes)
    last = np.repeat(codes, 24 * 24, axis=0)
    last[:, -2], last[:, -1] = np.divmod(np.arange(24 * 24), 24)
    conditions = np.repeat(conditions, len(last), axis=0)
    likelihood = jax.jit(functools.partial(log_likelihood, transformer))
    logs = np.asarray(likelihood(params, conditions, last), np.float64)
    assert np.exp(logs[:, -2:].sum(axis=1)).sum() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(logs[:, :-2], np.broadcast_to(logs[:1, :-2], (576, 13)), atol=1e-5)
