"""The entropy loss against the full softmax, finite differences, blocks and several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tiny
from vqgan_jax.losses.entropy import codebook_entropy, sign_entropy
from vqgan_jax.models import nearest
from vqgan_jax.models.quantizers import make_quantizer
from vqgan_jax.training.objectives import quantization_objective


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def entropy_of(p, axis=-1):
    return -np.sum(p * np.log(np.maximum(p, 1e-300)), axis=axis)


def all_codes(bits):
    """`(2^bits, bits)` of -1 and 1."""
    return np.array([[1 if k >> i & 1 else -1 for i in range(bits)] for k in range(2**bits)])


def full_loss(z, codebook, temperature):
    """From the whole matrix of probabilities, in float64."""
    distances = np.sum((z[:, None] - codebook) ** 2, axis=-1)
    logits = -(distances - distances.min(axis=1, keepdims=True)) / temperature
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.mean(entropy_of(p)) - entropy_of(p.mean(axis=0))


@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("max_distances", [2**25, 1])
def test_codebook_entropy_is_that_of_the_full_softmax(monkeypatch, temperature, max_distances):
    """With few distances at a time, the codebook goes in blocks of 128, the last one padded."""
    monkeypatch.setattr(nearest, "MAX_DISTANCES", max_distances)
    z, codebook = normal(2, 4, 5, 6), normal(300, 6, seed=1)
    found = jax.jit(lambda *x: codebook_entropy(*x, temperature))(
        z.astype(np.float32), codebook.astype(np.float32)
    )
    np.testing.assert_allclose(found, full_loss(z.reshape(-1, 6), codebook, temperature), rtol=1e-4)


def test_extremes_of_the_entropy_loss():
    """-log K where each code is taken surely and as often; 0 where all latents are one."""
    codebook = 10 * np.eye(8, dtype=np.float32)
    loss = jax.jit(lambda z: codebook_entropy(z, codebook, 0.01))
    np.testing.assert_allclose(loss(codebook), -np.log(8), rtol=1e-5)
    assert abs(loss(codebook[:1].repeat(8, axis=0))) < 1e-5
    signs = jax.jit(lambda z: sign_entropy(z, 0.01, 18))
    np.testing.assert_allclose(signs(all_codes(3).astype(np.float32)), -np.log(8), rtol=1e-5)
    assert abs(signs(np.ones((8, 3), np.float32))) < 1e-5


def directional(function, arguments, seed=7, step=1e-5):
    """The central difference along a random direction, and the direction."""
    directions = [normal(*x.shape, seed=seed + i) for i, x in enumerate(arguments)]
    high = function(*(x + step * d for x, d in zip(arguments, directions, strict=True)))
    low = function(*(x - step * d for x, d in zip(arguments, directions, strict=True)))
    return (float(high) - float(low)) / (2 * step), directions


def test_gradients_are_those_of_finite_differences(float64, monkeypatch):
    monkeypatch.setattr(nearest, "MAX_DISTANCES", 1)
    z, codebook = normal(30, 4), normal(150, 4, seed=1)
    for function, arguments in (
        (lambda z, e: codebook_entropy(z, e, 0.5), (z, codebook)),
        (lambda z: sign_entropy(z, 0.5, 2), (z,)),
    ):
        loss = jax.jit(function)
        difference, directions = directional(loss, arguments)
        gradients = jax.jit(jax.grad(function, argnums=tuple(range(len(arguments)))))(*arguments)
        found = sum(np.sum(g * d) for g, d in zip(gradients, directions, strict=True))
        assert found == pytest.approx(difference, rel=1e-6)


def test_gradients_of_codes_without_any_probability_are_finite():
    z, codebook = normal(10, 4).astype(np.float32), 100 * normal(40, 4, seed=1).astype(np.float32)
    gradients = jax.jit(jax.grad(lambda z, e: codebook_entropy(z, e, 0.01), (0, 1)))(z, codebook)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda z: sign_entropy(z, 1e-4, 4)))(z)))


def test_sign_entropy_is_the_full_sum_over_all_codes():
    z = normal(3, 5, 6, scale=0.5)
    found = jax.jit(lambda z: sign_entropy(z, 1.0, 18))(z.astype(np.float32))
    np.testing.assert_allclose(found, full_loss(z.reshape(-1, 6), all_codes(6), 1.0), rtol=1e-4)


def test_groups_of_bits_have_the_entropies_of_their_margins():
    z, temperature = normal(200, 7, scale=0.3), 0.5
    z[:, 3:] = 0.5 * z[:, 3:] + z[:, :1]  # bits that know of each other, over the batch
    codes = all_codes(7)
    distances = np.sum((z[:, None] - codes) ** 2, axis=-1)
    p = np.exp(-distances / temperature)
    p /= p.sum(axis=1, keepdims=True)
    of_groups = 0.0
    for part in (slice(0, 3), slice(3, 5), slice(5, 7)):  # 7 bits, at most 3 together
        _, member = np.unique(codes[:, part], axis=0, return_inverse=True)
        of_groups += entropy_of(np.bincount(member.ravel(), weights=p.mean(axis=0)))
    expected = np.mean(entropy_of(p)) - of_groups
    grouped = jax.jit(lambda z: sign_entropy(z, temperature, 3))(z.astype(np.float32))
    np.testing.assert_allclose(grouped, expected, rtol=1e-4)
    assert full_loss(z, codes, temperature) > expected + 0.1  # groups miss what bits share


def test_memory_does_not_grow_with_the_codebook():
    """65,536 latents against 262,144 codes: the probabilities alone would be 64 GiB."""
    latents = jax.ShapeDtypeStruct((65_536, 8), jnp.float32)
    codebook = jax.ShapeDtypeStruct((262_144, 8), jnp.float32)
    gradients = jax.jit(jax.grad(lambda z, e: codebook_entropy(z, e, 0.01), (0, 1)))
    memory = gradients.lower(latents, codebook).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2e9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nearest", "simvq", "lfq"])
def test_eight_devices_have_the_statistics_of_the_whole_batch(float64, kind):
    config = tiny.config_of_tiny_model(kind=kind, code_dim=4, codebook_size=16)
    config.loss.entropy, config.loss.entropy_temperature = 0.5, 0.3
    module = make_quantizer(**config.model.quantizer.to_dict())
    latents = normal(16, 2, 2, 4, scale=0.2)
    variables = module.init(jax.random.key(0), latents)

    def loss(latents, params):
        result = module.apply(variables | {"params": params}, latents)
        return quantization_objective(config.loss, kind, result)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    params = variables.get("params", {})
    spread = jax.device_put(latents, NamedSharding(mesh, PartitionSpec("data")))
    several = run(spread, jax.device_put(params, NamedSharding(mesh, PartitionSpec())))
    single = run(jax.device_put(latents, jax.devices()[0]), params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), several, single
    )
    terms = single[0][1]
    unweighted = terms["raw/quantization"] + 0.5 * terms["raw/entropy"]
    assert single[0][0] == pytest.approx(float(unweighted), rel=1e-12)
    parts = [float(run(latents[i : i + 2], params)[0][1]["raw/entropy"]) for i in range(0, 16, 2)]
    whole = float(terms["raw/entropy"])
    assert abs(np.mean(parts) - whole) > 0.05 * abs(whole)  # which parts do not have
