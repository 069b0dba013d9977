"""Quantisers against NumPy: nearest codes, gradients, moving averages, k-means, Gumbel samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from vqgan_jax.losses.quantization import vector_quantization
from vqgan_jax.models import nearest
from vqgan_jax.models.nearest import kmeans, l2_normalize, nearest_codes
from vqgan_jax.models.quantizers import (
    EMAQuantizer,
    GumbelQuantizer,
    NearestQuantizer,
    make_quantizer,
)

SIZE, DIM = 16, 4


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def brute_force(latents, codebook):
    differences = latents[..., None, :].astype(np.float64) - codebook
    return np.argmin(np.sum(differences**2, axis=-1), axis=-1)


# ---- Nearest codes.


@pytest.mark.parametrize("max_distances", [2**25, 40 * 128, 1])
@pytest.mark.parametrize("size", [1, 128, 300, 1024])
def test_nearest_codes_are_those_of_brute_force(monkeypatch, size, max_distances):
    """With few distances at a time, the codebook goes in blocks of 128, the last one padded."""
    monkeypatch.setattr(nearest, "MAX_DISTANCES", max_distances)
    latents, codebook = normal(2, 5, 4, 8), normal(size, 8, seed=1)
    codes = jax.jit(lambda *x: nearest_codes(*x))(latents, codebook)
    assert codes.shape == (2, 5, 4) and codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, brute_force(latents, codebook))


@pytest.mark.parametrize("max_distances", [2**25, 1])
def test_lowest_index_wins_a_tie_also_across_blocks(monkeypatch, max_distances):
    monkeypatch.setattr(nearest, "MAX_DISTANCES", max_distances)
    once = np.random.default_rng(0).integers(-3, 4, (100, 3)).astype(np.float32)
    once = np.unique(once, axis=0)[:60]
    codebook = np.concatenate([once, once, once, once, once])  # exact in float32
    codes = nearest_codes(jnp.asarray(once), jnp.asarray(codebook))
    np.testing.assert_array_equal(codes, np.arange(60))


def test_padding_of_the_last_block_is_never_taken(monkeypatch):
    """Padding is zeros, and would be the nearest to latents at zero."""
    monkeypatch.setattr(nearest, "MAX_DISTANCES", 1)
    codebook = 5 + np.abs(normal(130, 4))
    codes = nearest_codes(jnp.zeros((7, 4)), jnp.asarray(codebook))
    np.testing.assert_array_equal(codes, np.full(7, np.argmin(np.sum(codebook**2, axis=1))))


def test_memory_does_not_grow_with_the_codebook():
    """65,536 latents of 256 against 262,144 codes: the distances alone would be 64 GiB."""

    def temporary_bytes(size):
        latents = jax.ShapeDtypeStruct((65_536, 256), jnp.float32)
        codebook = jax.ShapeDtypeStruct((size, 256), jnp.float32)
        compiled = jax.jit(nearest_codes).lower(latents, codebook).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(16_384), temporary_bytes(262_144)
    assert 0 < small <= 400e6
    assert large < 400e6 and large <= 1.05 * small


# ---- The codebook's gradients.


@pytest.fixture
def quantizer():
    module = NearestQuantizer(SIZE, DIM)
    latents = normal(2, 3, 3, DIM, scale=0.05)
    return module, tiny.initialized(module, latents), latents


def test_codebook_starts_uniform(quantizer):
    codebook = np.asarray(quantizer[1]["params"]["codebook"])
    assert codebook.shape == (SIZE, DIM)
    assert 0.9 / SIZE < np.abs(codebook).max() <= 1 / SIZE
    assert abs(codebook.mean()) < 0.3 / SIZE


def test_gradients_pass_straight_through(quantizer):
    module, variables, latents = quantizer
    weights = normal(*latents.shape, seed=2)

    def loss(latents, variables):
        return jnp.sum(weights * module.apply(variables, latents).quantized ** 2)

    to_latents, to_codebook = jax.jit(jax.grad(loss, argnums=(0, 1)))(latents, variables)
    result = tiny.run(module, variables, latents)
    codebook = np.asarray(variables["params"]["codebook"])
    np.testing.assert_allclose(result.quantized, codebook[np.asarray(result.codes)], atol=1e-7)
    np.testing.assert_allclose(to_latents, 2 * weights * result.vectors, rtol=1e-4, atol=1e-7)
    assert not np.any(to_codebook["params"]["codebook"])  # the decoder does not move codes


@pytest.mark.parametrize(("legacy", "shares"), [(True, (1.0, 0.25)), (False, (0.25, 1.0))])
def test_legacy_loss_has_beta_on_the_other_term(quantizer, legacy, shares):
    """d/dz mean (z - e)^2 = 2 (z - e) / n, once with each weight; the value is the same."""
    module, variables, latents = quantizer

    def loss(latents, variables):
        result = module.apply(variables, latents)
        return vector_quantization(result.latents, result.vectors, beta=0.25, legacy=legacy)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (to_latents, to_codebook) = gradient(latents, variables)
    codebook = np.asarray(variables["params"]["codebook"], np.float64)
    codes = brute_force(latents, codebook)
    difference = latents - codebook[codes]
    np.testing.assert_allclose(value, 1.25 * np.mean(difference**2), rtol=1e-5)
    base = 2 * difference / difference.size
    expected = np.zeros_like(codebook)
    np.add.at(expected, codes.ravel(), -shares[1] * base.reshape(-1, DIM))
    np.testing.assert_allclose(to_latents, shares[0] * base, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(to_codebook["params"]["codebook"], expected, rtol=1e-4, atol=1e-8)


def test_lookup_gives_the_vectors_of_codes(quantizer):
    module, variables, latents = quantizer
    result = tiny.run(module, variables, latents)
    np.testing.assert_array_equal(
        tiny.run(module, variables, result.codes, method="lookup"), result.vectors
    )


@pytest.mark.parametrize("kind", ["nearest", "ema"])
def test_unit_length_makes_the_distance_the_cosine(kind):
    module = make_quantizer(kind, SIZE, DIM, True, False, 0.99, 0.0)
    latents = normal(2, 3, 3, DIM) * np.exp(normal(2, 3, 3, 1, seed=3))
    variables = tiny.initialized(module, latents)
    result = tiny.run(module, variables, latents)
    codebook = np.asarray(
        variables["params"]["codebook"] if kind == "nearest" else variables["codebook"]["embedding"]
    )
    unit = codebook / np.linalg.norm(codebook, axis=-1, keepdims=True)
    cosines = (latents / np.linalg.norm(latents, axis=-1, keepdims=True)) @ unit.T
    np.testing.assert_array_equal(result.codes, cosines.argmax(-1))
    np.testing.assert_allclose(np.linalg.norm(result.quantized, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(result.vectors, unit[np.asarray(result.codes)], atol=1e-6)


def test_unit_length_of_zero_is_zero_with_a_finite_gradient():
    np.testing.assert_array_equal(l2_normalize(jnp.zeros(3)), 0)
    assert np.all(np.isfinite(jax.jit(jax.jacobian(l2_normalize))(jnp.zeros(3))))


# ---- Moving averages.


def ema_step(module, variables, latents, seed=0):
    rngs = {"codebook": jax.random.key(seed)}
    step = functools.partial(module.apply, train=True, mutable=["codebook"])
    return jax.jit(step)(variables, latents, rngs=rngs)


def test_moving_average_is_the_formula_of_the_paper():
    """Van den Oord et al. 2017, equations 6 to 8, with Laplace smoothing."""
    module = EMAQuantizer(SIZE, DIM, decay=0.9, epsilon=1e-5)
    latents = normal(2, 3, 3, DIM, scale=0.05)
    variables = tiny.initialized(module, latents)
    assert "params" not in variables  # nothing for an optimiser
    embedding = np.asarray(variables["codebook"]["embedding"], np.float64)
    counts, sums = np.ones(SIZE), embedding.copy()
    for seed in range(3):
        latents = normal(2, 3, 3, DIM, seed=seed, scale=0.05)
        codes = brute_force(latents, embedding)
        result, variables = ema_step(module, variables, latents)
        np.testing.assert_array_equal(result.codes, codes)
        np.testing.assert_allclose(result.vectors, embedding[codes], atol=1e-6)
        one_hot = np.eye(SIZE)[codes.ravel()]
        counts = 0.9 * counts + 0.1 * one_hot.sum(0)
        sums = 0.9 * sums + 0.1 * one_hot.T @ latents.reshape(-1, DIM)
        smoothed = (counts + 1e-5) / (counts.sum() + SIZE * 1e-5) * counts.sum()
        embedding = sums / smoothed[:, None]
        np.testing.assert_allclose(variables["codebook"]["counts"], counts, rtol=1e-5)
        np.testing.assert_allclose(
            variables["codebook"]["embedding"], embedding, rtol=1e-4, atol=1e-7
        )


def test_evaluation_moves_nothing():
    module = EMAQuantizer(SIZE, DIM)
    latents = normal(1, 4, 4, DIM)
    variables = tiny.initialized(module, latents)
    _, after = module.apply(variables, latents, mutable=["codebook"])
    jax.tree.map(np.testing.assert_array_equal, variables["codebook"], after["codebook"])


def test_dead_codes_start_again_on_latents_of_the_batch():
    module = EMAQuantizer(SIZE, DIM, decay=0.5, restart_below=0.1)
    latents = 10 + normal(4, 5, 5, DIM)
    variables = tiny.initialized(module, latents)
    used = []
    for seed in range(6):
        result, variables = ema_step(module, variables, latents, seed)
        used.append(len(np.unique(result.codes)))
    assert used[0] == 1 and used[-1] > SIZE // 2
    assert codes_used_without_restarts(latents) < SIZE // 4

    variables["codebook"]["counts"] = jnp.full(SIZE, 5.0).at[3].set(1e-3)
    before = np.asarray(variables["codebook"]["embedding"])
    far = np.full((1, 1, 1, DIM), -99.0, np.float32)  # far from code 3 and all others alike
    variables["codebook"]["embedding"] = jnp.asarray(before).at[3].set(1e3)
    _, after = ema_step(module, variables, far)
    np.testing.assert_array_equal(after["codebook"]["embedding"][3], far.ravel())
    assert after["codebook"]["counts"][3] == 1


def codes_used_without_restarts(latents):
    module = EMAQuantizer(SIZE, DIM, decay=0.5)
    variables = tiny.initialized(module, latents)
    for _ in range(6):
        result, variables = ema_step(module, variables, latents)
    return len(np.unique(result.codes))


# ---- k-means.


def test_kmeans_lowers_the_error_and_is_deterministic():
    points = normal(400, DIM) + 4 * normal(8, DIM, seed=1)[np.arange(400) % 8]
    centres = {n: np.asarray(kmeans(jax.random.key(0), points, 8, n)) for n in (0, 1, 3, 10)}
    errors = []
    for n in (0, 1, 3, 10):
        codes = brute_force(points, centres[n])
        errors.append(np.mean((points - centres[n][codes]) ** 2))
    assert errors[0] > errors[1] > errors[2] >= errors[3]
    np.testing.assert_array_equal(kmeans(jax.random.key(0), points, 8, 10), centres[10])
    assert {tuple(row) for row in centres[0]} <= {tuple(row) for row in points}
    fixed = brute_force(points, np.asarray(kmeans(jax.random.key(0), points, 8, 100)))
    means = np.stack([points[fixed == k].mean(0) for k in range(8)])
    np.testing.assert_allclose(kmeans(jax.random.key(0), points, 8, 100), means, atol=1e-4)


def test_kmeans_of_fewer_points_than_centres_has_no_two_alike():
    points = normal(5, DIM)
    centres = np.asarray(kmeans(jax.random.key(0), jnp.asarray(points), 12, 0))
    assert len(np.unique(centres, axis=0)) == 12
    assert np.linalg.norm(centres[:, None] - points, axis=-1).min(axis=1).max() < 0.2


@pytest.mark.parametrize("kind", ["nearest", "ema"])
def test_codebook_can_start_at_the_centres_of_the_first_batch(kind):
    latents = normal(4, 5, 5, DIM) + 10
    errors = {}
    for start in (False, True):
        module = make_quantizer(kind, SIZE, DIM, False, start, 0.99, 0.0)
        result = module.apply(tiny.initialized(module, latents), latents)
        errors[start] = np.mean(np.square(result.vectors - latents))
        used = len(np.unique(result.codes))
    assert errors[True] < 1 < 50 < errors[False] and used == SIZE


# ---- Gumbel.


@pytest.fixture
def gumbel():
    module = GumbelQuantizer(SIZE, DIM)
    latents = normal(2, 3, 3, 6)
    return module, tiny.initialized(module, latents), latents


def test_evaluation_takes_the_most_probable_code(gumbel):
    module, variables, latents = gumbel
    params = jax.tree.map(np.asarray, variables["params"])
    logits = latents @ params["projection"]["kernel"][0, 0] + params["projection"]["bias"]
    result = module.apply(variables, latents)  # needs no random stream
    np.testing.assert_allclose(result.logits, logits, atol=1e-5)
    np.testing.assert_array_equal(result.codes, logits.argmax(-1))
    np.testing.assert_array_equal(result.quantized, params["codebook"][logits.argmax(-1)])


def test_training_draws_codes_by_their_probability():
    """The Gumbel-max trick: argmax(logits + noise) has the distribution softmax(logits)."""
    module = GumbelQuantizer(5, 2)
    latents = np.zeros((1, 100, 100, 1), np.float32)
    variables = tiny.initialized(module, latents)
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32)
    variables["params"]["projection"]["bias"] = jnp.asarray(logits)
    result = module.apply(
        variables, latents, train=True, temperature=0.7, rngs={"gumbel": jax.random.key(3)}
    )
    expected = np.exp(logits) / np.exp(logits).sum()
    frequencies = np.bincount(np.asarray(result.codes).ravel(), minlength=5) / 10_000
    np.testing.assert_allclose(frequencies, expected, atol=4 * 0.5 / 100)


def test_training_hands_on_rows_of_the_codebook(gumbel):
    module, variables, latents = gumbel
    result = module.apply(
        variables, latents, train=True, temperature=0.9, rngs={"gumbel": jax.random.key(1)}
    )
    rows = np.asarray(variables["params"]["codebook"])[np.asarray(result.codes)]
    np.testing.assert_allclose(result.quantized, rows, atol=1e-5)
    other = module.apply(
        variables, latents, train=True, temperature=0.9, rngs={"gumbel": jax.random.key(2)}
    )
    assert np.any(np.asarray(other.codes) != np.asarray(result.codes))


def test_gradient_is_that_of_the_relaxed_sample(gumbel):
    module, variables, latents = gumbel
    weights, key = normal(2, 3, 3, DIM, seed=5), jax.random.key(1)

    def loss(latents, temperature):
        result = module.apply(
            variables, latents, train=True, temperature=temperature, rngs={"gumbel": key}
        )
        return jnp.sum(weights * result.quantized)

    for temperature in (0.5, 2.0):
        noise = noise_of(module, variables, latents, key)
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
        kernel, bias = params["projection"]["kernel"][0, 0], params["projection"]["bias"]
        scaled = (latents @ kernel + bias + noise) / temperature
        soft = np.exp(scaled - scaled.max(-1, keepdims=True))
        soft /= soft.sum(-1, keepdims=True)
        pulled = weights @ params["codebook"].T
        to_logits = soft * (pulled - np.sum(soft * pulled, -1, keepdims=True)) / temperature
        found = jax.grad(loss)(jnp.asarray(latents), temperature)
        np.testing.assert_allclose(found, to_logits @ kernel.T, rtol=1e-3, atol=1e-5)


def noise_of(module, variables, latents, key):
    """The noise that the module draws, by a probe that asks for its stream."""
    bound = module.bind(variables, rngs={"gumbel": key})
    shape = (*latents.shape[:-1], SIZE)
    return np.asarray(jax.random.gumbel(bound.make_rng("gumbel"), shape), np.float64)


def test_low_temperature_makes_the_relaxed_sample_hard(gumbel):
    """Then the gradient vanishes almost everywhere."""
    module, variables, latents = gumbel

    def loss(latents, temperature):
        result = module.apply(
            variables,
            latents,
            train=True,
            temperature=temperature,
            rngs={"gumbel": jax.random.key(1)},
        )
        return jnp.sum(result.quantized * normal(2, 3, 3, DIM, seed=5))

    norms = [np.linalg.norm(jax.grad(loss)(jnp.asarray(latents), t)) for t in (1.0, 1e-4)]
    assert norms[1] < 1e-6 * norms[0] + 1e-12
