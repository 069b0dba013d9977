"""Gradients past the codes, SimVQ, FSQ, LFQ, residual and product codes, all against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from vqgan_jax.losses.quantization import vector_quantization
from vqgan_jax.models.quantizers import make_quantizer
from vqgan_jax.models.quantizers.quantized import rotation

SIZE, DIM = 16, 4


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def make(kind, size=SIZE, dim=DIM, l2=False, kmeans=False, **options):
    return make_quantizer(kind, size, dim, l2, kmeans, 0.99, 0.0, **options)


def brute_force(latents, codebook):
    differences = latents[..., None, :].astype(np.float64) - codebook
    return np.argmin(np.sum(differences**2, axis=-1), axis=-1)


def run(module, latents, seed=0):
    """The module's variables, and what it makes of latents."""

    @jax.jit
    def init_and_apply(latents):
        variables = module.init(jax.random.key(seed), latents)
        return variables, module.apply(variables, latents)

    return init_and_apply(latents)


def lookup(module, variables, codes):
    return tiny.run(module, variables, codes, method="lookup")


KINDS = {
    "nearest": dict(kind="nearest"),
    "unit_length": dict(kind="nearest", l2=True),
    "ema": dict(kind="ema"),
    "gumbel": dict(kind="gumbel"),
    "simvq": dict(kind="simvq"),
    "fsq": dict(kind="fsq", levels=(4, 2, 3, 5), size=120),
    "lfq": dict(kind="lfq"),
    "residual": dict(kind="residual", depth=3),
    "residual_shared": dict(kind="residual", depth=3, shared_codebook=True),
    "product": dict(kind="product", depth=2),
    "product_shared": dict(kind="product", depth=2, shared_codebook=True, l2=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_looked_up_codes_are_what_the_decoder_saw(name):
    """And codes are integers within the codebook, several a position where there is a depth."""
    options = KINDS[name]
    module, latents = make(**options), normal(2, 3, 5, DIM)
    variables, result = run(module, latents)
    depth = options.get("depth", 1)
    assert result.codes.dtype == jnp.int32
    assert result.codes.shape == ((2, 3, 5) if depth == 1 else (2, 3, 5, depth))
    assert np.min(result.codes) >= 0 and np.max(result.codes) < options.get("size", SIZE)
    found = lookup(module, variables, result.codes)
    assert found.shape == latents.shape and found.dtype == jnp.float32
    np.testing.assert_allclose(found, result.quantized, atol=2e-6)


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'vector'; it must be nearest, ema"):
        make("vector")


# ---- The rotation trick.


def rotation_matrix(z, q):
    """R and the scale of Fifty et al. 2024, as matrices."""
    z_unit, q_unit = z / np.linalg.norm(z), q / np.linalg.norm(q)
    r = (z_unit + q_unit) / np.linalg.norm(z_unit + q_unit)
    matrix = np.eye(len(z)) - 2 * np.outer(r, r) + 2 * np.outer(q_unit, z_unit)
    return matrix, np.linalg.norm(q) / np.linalg.norm(z)


def test_gradient_of_the_rotation_trick_is_that_of_the_matrix():
    z, q, weights = (normal(20, 5, seed=seed, scale=1 + seed) for seed in range(3))

    def loss(z, q):
        value = rotation(z, q)
        return jnp.sum(weights * value), value

    (_, value), (to_z, to_q) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(z, q)
    np.testing.assert_allclose(value, q, rtol=1e-5, atol=1e-6)
    for i in range(len(z)):
        matrix, scale = rotation_matrix(z[i].astype(np.float64), q[i].astype(np.float64))
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(5), atol=1e-6)  # it is a rotation
        np.testing.assert_allclose(scale * matrix @ z[i], q[i], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(to_z[i], scale * matrix.T @ weights[i], rtol=1e-3, atol=1e-4)
    assert not np.any(to_q)


def test_rotation_of_what_has_no_direction_is_finite():
    z = np.array([[0, 0, 0], [1, 0, 0], [1, 2, 3]], np.float32)
    q = np.array([[1, 0, 0], [-1, 0, 0], [0, 0, 0]], np.float32)  # the second one turns round
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(rotation(z, q) * jnp.arange(3.0))))(z)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", ["nearest", "unit_length", "ema", "simvq", "residual", "product"])
def test_rotation_is_an_option_of_all_that_look_codes_up(name):
    """Values and codes stay; the gradient is the matrix's, for each group of a product."""
    options = KINDS[name]
    latents, weights = normal(1, 2, 3, DIM, seed=3), normal(1, 2, 3, DIM, seed=4)
    module = make(**options, gradient="rotation")
    variables, straight = run(make(**options), latents)

    @jax.jit
    def value_and_gradient(latents):
        def loss(latents):
            result = module.apply(variables, latents)
            return jnp.sum(weights * result.quantized), result

        return jax.value_and_grad(loss, has_aux=True)(latents)

    (_, result), found = value_and_gradient(latents)
    np.testing.assert_array_equal(result.codes, straight.codes)
    np.testing.assert_allclose(result.quantized, straight.quantized, atol=1e-6)
    groups = 2 if name == "product" else 1
    z, q, w, found = (
        np.asarray(array, np.float64).reshape(-1, DIM // groups)
        for array in (latents, straight.quantized, weights, found)
    )
    for i in range(len(z)):
        unit = z[i] / np.linalg.norm(z[i])
        matrix, scale = rotation_matrix(unit if name == "unit_length" else z[i], q[i])
        expected = scale * matrix.T @ w[i]
        if name == "unit_length":  # through the normalisation too
            expected = (expected - unit * (unit @ expected)) / np.linalg.norm(z[i])
        np.testing.assert_allclose(found[i], expected, rtol=1e-3, atol=1e-6)


# ---- SimVQ.


def test_codes_of_simvq_are_the_rows_of_a_product():
    module, latents = make("simvq", size=64), normal(2, 4, 4, DIM)
    variables, result = run(module, latents)
    assert set(variables["params"]) == {"map"} and set(variables["codebook"]) == {"embedding"}
    frozen = np.asarray(variables["codebook"]["embedding"], np.float64)
    matrix = np.asarray(variables["params"]["map"], np.float64)
    assert frozen.shape == (64, DIM) and matrix.shape == (DIM, DIM)
    assert abs(frozen.std() - DIM**-0.5) < 0.1
    codes = brute_force(latents, frozen @ matrix)
    np.testing.assert_array_equal(result.codes, codes)
    np.testing.assert_allclose(result.vectors, (frozen @ matrix)[codes], atol=1e-6)

    def loss(params):
        result, updates = module.apply(
            variables | {"params": params}, latents, train=True, mutable=["codebook"]
        )
        value = vector_quantization(result.latents, result.vectors, beta=0.25, legacy=False)
        return value, updates["codebook"]

    gradient, after = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    np.testing.assert_array_equal(after["embedding"], variables["codebook"]["embedding"])
    rows = frozen[codes].reshape(-1, DIM)
    error = rows @ matrix - latents.reshape(-1, DIM)
    np.testing.assert_allclose(gradient["map"], 2 * rows.T @ error / error.size, rtol=1e-4)
    moved = np.abs(frozen @ np.asarray(gradient["map"])).max(axis=1)
    assert np.all(moved > 0)  # one step moves every code, used or not
    assert len(np.unique(codes)) < 64


# ---- FSQ.


def fsq_of_numpy(z, levels):
    """Grid points and codes by the nearest of each dimension's values to the bounded latent."""
    vectors, codes, weight = np.zeros_like(z), np.zeros(z.shape[:-1], np.int64), 1
    for i, size in enumerate(levels):
        half = (size - 1) * 0.999 / 2
        offset = 0.5 * (size % 2 == 0)
        bounded = np.tanh(z[..., i] + np.tan(offset / half)) * half - offset
        grid = np.arange(size) - size // 2
        digit = np.argmin(np.abs(bounded[..., None] - grid), axis=-1)
        vectors[..., i] = grid[digit] / (size // 2)
        codes += weight * digit
        weight *= size
    return vectors, codes


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 2, 7, 4)])
def test_fsq_rounds_to_its_grid_and_numbers_it(levels):
    size = int(np.prod(levels))
    module, latents = make("fsq", size=size, levels=levels), normal(4, 16, 16, 4, scale=1.5)
    variables, result = run(module, latents)
    assert not variables
    vectors, codes = fsq_of_numpy(latents.astype(np.float64), levels)
    np.testing.assert_array_equal(result.codes, codes)
    np.testing.assert_allclose(result.quantized, vectors, atol=1e-6)

    every = np.arange(size)[None, None]
    grid = np.asarray(lookup(module, {}, every))[0, 0]
    counted = [
        [
            (digit - size // 2) / (size // 2)
            for digit, size in zip(digits[::-1], levels, strict=True)
        ]
        for digits in itertools.product(*(range(size) for size in levels[::-1]))
    ]
    np.testing.assert_allclose(grid, counted, atol=1e-6)  # the first dimension counts fastest


def test_far_latents_reach_all_levels_of_fsq_and_no_others():
    levels = (4, 5, 2, 3)
    steps = np.linspace(-9, 9, 4001, dtype=np.float32)[None, None, :, None].repeat(4, axis=-1)
    _, result = run(make("fsq", size=120, levels=levels), steps)
    for i, size in enumerate(levels):
        values = np.unique(np.round(np.asarray(result.vectors)[..., i], 5))
        expected = (np.arange(size) - size // 2) / (size // 2)
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_gradient_of_fsq_is_that_of_the_bound():
    levels, latents = (8, 5, 5, 3), normal(1, 3, 3, 4)
    module, weights = make("fsq", size=600, levels=levels), normal(1, 3, 3, 4, seed=1)
    loss = jax.jit(jax.grad(lambda z: jnp.sum(weights * module.apply({}, z).quantized)))
    sizes = np.array(levels)
    half = (sizes - 1) * 0.999 / 2
    shift = np.tan(np.where(sizes % 2 == 0, 0.5, 0) / half)
    slope = half * (1 - np.tanh(latents + shift) ** 2) / (sizes // 2)
    np.testing.assert_allclose(loss(latents), weights * slope, rtol=1e-4, atol=1e-6)


# ---- LFQ.


def test_lfq_is_the_sign_and_numbers_bits_from_the_first():
    module, latents = make("lfq", size=32, dim=5), normal(2, 4, 4, 5)
    latents[0, 0, 0] = 0  # counts as negative
    variables, result = run(module, latents)
    assert not variables
    bits = latents > 0
    codes = [int("".join("01"[int(bit)] for bit in row[::-1]), 2) for row in bits.reshape(-1, 5)]
    np.testing.assert_array_equal(np.ravel(result.codes), codes)
    np.testing.assert_array_equal(result.vectors, np.where(bits, 1, -1))
    assert result.codes[0, 0, 0] == 0
    five = lookup(module, {}, np.full((1, 1, 1), 0b00101))
    np.testing.assert_array_equal(five[0, 0, 0], [1, -1, 1, -1, -1])
    weights = normal(2, 4, 4, 5, seed=1)
    found = jax.jit(jax.grad(lambda z: jnp.sum(weights * module.apply({}, z).quantized)))(latents)
    np.testing.assert_allclose(found, weights, rtol=1e-5)  # straight through


# ---- Residual codes.


def codebooks_of(variables, depth):
    own = [np.asarray(own["codebook"], np.float64) for own in variables["params"].values()]
    return own * depth if len(own) == 1 else own


@pytest.mark.parametrize("shared", [False, True])
def test_residual_codes_are_greedy_steps(shared):
    module = make("residual", depth=3, shared_codebook=shared, kmeans=True)
    latents = normal(2, 4, 4, DIM)
    variables, result = run(module, latents)
    assert len(variables["params"]) == (1 if shared else 3)
    residual, total = latents.astype(np.float64), 0.0
    for step, codebook in enumerate(codebooks_of(variables, 3)):
        codes = brute_force(residual, codebook)
        np.testing.assert_array_equal(result.codes[..., step], codes)
        np.testing.assert_allclose(result.latents[..., step, :], residual, atol=1e-5)
        np.testing.assert_allclose(result.vectors[..., step, :], codebook[codes], atol=1e-6)
        total = total + codebook[codes]
        residual = residual - codebook[codes]
    np.testing.assert_allclose(result.quantized, total, atol=1e-5)
    errors = np.mean(np.square(result.latents), axis=(0, 1, 2, 4))
    if not shared:  # k-means found each step's centres on what was left
        assert errors[0] > 2 * errors[1] > 3 * errors[2] > 0


def test_gradients_of_the_residual_loss():
    """mean_d |sg[r_d] - e_d|^2 + beta |r_d - sg[e_d]|^2, each r_d = z - constants."""
    module, latents = make("residual", depth=2), normal(1, 4, 4, DIM, scale=0.1)
    variables, result = run(module, latents)

    def loss(latents, variables):
        result = module.apply(variables, latents)
        return vector_quantization(result.latents, result.vectors, beta=0.25, legacy=False)

    to_latents, gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(latents, variables)
    books, residual, expected = codebooks_of(variables, 2), latents.astype(np.float64), 0.0
    for step, name in enumerate(sorted(variables["params"])):
        codes = np.asarray(result.codes)[..., step]
        error = residual - books[step][codes]
        base = 2 * error / (2 * error.size)
        expected = expected + 0.25 * base
        to_codebook = np.zeros_like(books[step])
        np.add.at(to_codebook, codes.ravel(), -base.reshape(-1, DIM))
        found = gradient["params"][name]["codebook"]
        np.testing.assert_allclose(found, to_codebook, rtol=1e-3, atol=1e-8)
        residual = error
    np.testing.assert_allclose(to_latents, expected, rtol=1e-3, atol=1e-8)


# ---- Product codes.


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("l2", [False, True])
def test_product_codes_are_nearest_in_each_group(shared, l2):
    module = make("product", dim=6, depth=3, l2=l2, shared_codebook=shared)
    latents = normal(2, 3, 3, 6, scale=0.05)
    variables, result = run(module, latents)
    assert len(variables["params"]) == (1 if shared else 3)
    for group, codebook in enumerate(codebooks_of(variables, 3)):
        part = latents[..., 2 * group : 2 * group + 2].astype(np.float64)
        assert codebook.shape == (SIZE, 2)
        if l2:
            part, codebook = (
                x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (part, codebook)
            )
        codes = brute_force(part, codebook)
        np.testing.assert_array_equal(result.codes[..., group], codes)
        found = np.asarray(result.quantized)[..., 2 * group : 2 * group + 2]
        np.testing.assert_allclose(found, codebook[codes], atol=1e-6)
        own = np.asarray(result.latents)[..., 2 * group : 2 * group + 2]
        np.testing.assert_allclose(own, part, atol=1e-6)
