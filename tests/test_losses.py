"""Every loss against NumPy; the adaptive weight against finite differences of a whole tokenizer."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import tiny
from vqgan_jax.configuration import validate
from vqgan_jax.losses import adversarial, quantization, reconstruction
from vqgan_jax.models.logit_laplace import to_images
from vqgan_jax.models.quantizers import Quantized
from vqgan_jax.training.evaluation import evaluation_step
from vqgan_jax.training.game import Game
from vqgan_jax.training.generator_step import Running, generator_gradients
from vqgan_jax.training.objectives import quantization_objective, weighted_sum
from vqgan_jax.training.sharding import make_mesh
from vqgan_jax.training.states import TokenizerState
from vqgan_jax.training.tokenizer_stage import perceptual_parameters


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# ---- Reconstruction.


def test_pixel_losses():
    x, y = normal(2, 4, 5, 3), normal(2, 4, 5, 3, seed=1)
    close(reconstruction.l1(x, y), np.abs(x - y).mean())
    close(reconstruction.l2(x, y), ((x - y) ** 2).mean())


def test_binary_cross_entropy_is_the_definition_and_finite_for_large_logits():
    labels = np.eye(4)[np.random.default_rng(0).integers(0, 4, (2, 3, 3))]
    logits = normal(2, 3, 3, 4, scale=3).astype(np.float64)
    p = 1 / (1 + np.exp(-logits))
    expected = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    close(reconstruction.binary_cross_entropy(labels, logits.astype(np.float32)), expected)
    far = np.where(labels > 0, -1e4, 1e4).astype(np.float32)
    close(reconstruction.binary_cross_entropy(labels, far), 1e4)


def laplace_inputs():
    images = np.random.default_rng(2).uniform(-1, 1, (2, 4, 5, 3))
    images[0, 0] = np.array([[-1.0], [1.0], [0.0], [-1.0], [1.0]])
    return images, normal(2, 4, 5, 6, seed=3).astype(np.float64)


def test_logit_laplace_is_the_density_of_its_authors():
    """-log of p(x) = exp(-|logit x - mu| / b) / (2 b x (1 - x)), x = 0.8 (image + 1) / 2 + 0.1."""
    images, output = laplace_inputs()
    x = 0.8 * (images + 1) / 2 + 0.1
    mu, b = output[..., :3], np.exp(output[..., 3:])
    density = np.exp(-np.abs(np.log(x / (1 - x)) - mu) / b) / (2 * b * x * (1 - x))
    found = reconstruction.logit_laplace(images.astype(np.float32), output.astype(np.float32))
    np.testing.assert_allclose(found, -np.log(density), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mu", "log_b"), [(0.0, 0.0), (-1.5, -1.0), (0.7, 0.3)])
def test_logit_laplace_integrates_to_one(float64, mu, log_b):
    """Over x from 0 to 1; from 0.1 to 0.9, where images lie, to what the Laplace law gives."""
    unit = (np.arange(200_000) + 0.5) / 200_000
    images = jnp.asarray((unit - 0.1) / 0.8 * 2 - 1)[:, None]
    output = jnp.broadcast_to(jnp.asarray([mu, log_b]), (len(unit), 2))
    density = np.exp(-np.asarray(reconstruction.logit_laplace(images, output)))[:, 0]
    inside = density[(unit > 0.1) & (unit < 0.9)]
    edges = scipy.stats.laplace(mu, np.exp(log_b)).cdf([-np.log(9), np.log(9)])
    np.testing.assert_allclose(inside.sum() / 200_000, edges[1] - edges[0], rtol=1e-3)
    np.testing.assert_allclose(density.sum() / 200_000, 1.0, rtol=2e-3)


def test_images_of_a_logit_laplace_distribution():
    images, output = laplace_inputs()
    x = 0.8 * (images + 1) / 2 + 0.1
    exact = np.concatenate([np.log(x / (1 - x)), output[..., 3:]], axis=-1)
    np.testing.assert_allclose(to_images(exact.astype(np.float32)), images, atol=1e-6)
    sigmoid = 1 / (1 + np.exp(-3 * output[..., :3]))
    expected = (sigmoid - 0.1) / 0.8 * 2 - 1
    found = to_images((3 * output).astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.min() < -1.1 and found.max() > 1.1  # not clipped: gradients go on


@pytest.mark.slow
def test_generator_gradients_of_the_losses_of_vit_vqgan():
    """L_2, logit-Laplace and a non-saturating game of fixed weight, against their plain sum."""
    config = tiny.config_of_tiny_model()
    config.model.logit_laplace = True
    config.loss.update(l1=0.0, l2=1.0, perceptual=0.0, logit_laplace=0.1, legacy_codebook=False)
    config.discriminator.update(start=0, weight=0.1, adaptive_weight=False, loss="non_saturating")
    validate(config)
    game = dataclasses.replace(Game.from_config(config), discriminator=QuadraticCritic())
    images = jnp.asarray(tiny.random_images(2, 8, 8, 3))
    variables = tiny.initial_variables(config)
    critic = game.discriminator.init(jax.random.key(1), images)
    state = TokenizerState(
        jnp.zeros((), jnp.int32), game.init_generator(variables), game.init_discriminator(critic)
    )
    _, gradients, metrics, _ = jax.jit(
        lambda state, images: generator_gradients(
            game, state, Running({}, {}), images, 0, None, playing=True
        )
    )(state, images)

    def total(params):
        output, quantized = game.tokenizer.apply(
            {"params": params}, images, train=True, method="predict"
        )
        mu, log_b = output[..., :3], output[..., 3:]
        made = (jax.nn.sigmoid(mu) - 0.1) / 0.8 * 2 - 1
        x = 0.4 * images + 0.5
        distance = jnp.abs(jnp.log(x) - jnp.log(1 - x) - mu) / jnp.exp(log_b)
        z, e = quantized.latents, quantized.vectors
        sg = jax.lax.stop_gradient
        return (
            jnp.mean((made - images) ** 2)
            + 0.1 * jnp.mean(distance + log_b + jnp.log(2 * x * (1 - x)))
            + 0.1 * jnp.mean(jnp.log1p(jnp.exp(-game.discriminator.apply(critic, made))))
            + jnp.mean((sg(z) - e) ** 2)
            + 0.25 * jnp.mean((z - sg(e)) ** 2)
        )

    value, expected = jax.jit(jax.value_and_grad(total))(state.generator.params)
    close(metrics["loss/total"], value)
    close(metrics["weighted/logit_laplace"], 0.1 * metrics["raw/logit_laplace"])
    for name, leaf in tiny.leaves(expected).items():
        atol = 1e-4 * max(np.abs(leaf).max(), 1e-2)
        found = tiny.leaves(gradients)[name]
        np.testing.assert_allclose(found, leaf, rtol=1e-3, atol=atol, err_msg=name)


@pytest.mark.slow
def test_evaluation_has_the_logit_laplace_term():
    config = tiny.config_of_tiny_model()
    config.model.logit_laplace = True
    config.loss.update(l1=0.0, l2=1.0, perceptual=0.0, logit_laplace=0.1)
    game = Game.from_config(config)
    variables, images = tiny.initial_variables(config), tiny.random_images(2, 16, 16, 3)
    judge = jax.jit(lambda *arguments: evaluation_step(game, variables, None, *arguments))
    sums, _ = judge(images, jnp.ones(2))
    predict = jax.jit(lambda images: game.tokenizer.apply(variables, images, method="predict")[0])
    output = np.asarray(predict(images), np.float64)
    x, mu, log_b = 0.4 * images + 0.5, output[..., :3], output[..., 3:]
    nats = np.abs(np.log(x / (1 - x)) - mu) / np.exp(log_b) + log_b + np.log(2 * x * (1 - x))
    np.testing.assert_allclose(sums["logit_laplace"] / 2, nats.mean(), rtol=1e-4)
    np.testing.assert_allclose(
        sums["reconstruction_loss"], sums["l2"] + 0.1 * sums["logit_laplace"], rtol=1e-5
    )


def test_no_perceptual_weights_are_loaded_without_the_perceptual_loss(tmp_path):
    config = tiny.config_of_tiny_model()
    config.loss.perceptual_network.path = str(tmp_path / "none")
    config.loss.perceptual_network.sha256 = "0" * 64
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with pytest.raises((OSError, ValueError), match="none"):
        perceptual_parameters(Game.from_config(config), mesh)
    config.loss.perceptual = 0.0
    assert perceptual_parameters(Game.from_config(config), mesh) is None


# ---- Quantisation.


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        (dict(beta=0.25, legacy=True), 1.25),
        (dict(beta=0.25, legacy=False), 1.25),
        (dict(beta=0.4, legacy=False, codebook_learns=False), 0.4),
    ],
)
def test_vector_quantization_value(options, factor):
    z, e = normal(2, 3, 3, 4), normal(2, 3, 3, 4, seed=1)
    close(quantization.vector_quantization(z, e, **options), factor * np.mean((z - e) ** 2))


def test_each_term_moves_one_side_only():
    z, e = normal(3, 4), normal(3, 4, seed=1)
    base = 2 * (z - e) / z.size
    of_codebook = jax.grad(quantization.codebook, argnums=(0, 1))(z, e)
    of_commitment = jax.grad(quantization.commitment, argnums=(0, 1))(z, e)
    np.testing.assert_allclose(of_codebook, (np.zeros_like(z), -base), rtol=1e-5)
    np.testing.assert_allclose(of_commitment, (base, np.zeros_like(z)), rtol=1e-5)


def test_divergence_from_uniform():
    logits = normal(2, 3, 3, 8, scale=2).astype(np.float64)
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    close(quantization.divergence_from_uniform(logits), np.mean(np.sum(q * np.log(8 * q), -1)))
    assert abs(quantization.divergence_from_uniform(jnp.ones((4, 8)))) < 1e-6
    certain = 1e3 * jnp.eye(8)
    close(quantization.divergence_from_uniform(certain), np.log(8))
    gradient = jax.jit(jax.grad(quantization.divergence_from_uniform))(certain)
    assert np.all(np.isfinite(gradient))


# ---- The two players.

REAL, FAKE = normal(2, 3, 3, 1, scale=2), normal(2, 3, 3, 1, seed=1, scale=2)


def softplus(x):
    return np.log1p(np.exp(x.astype(np.float64)))


@pytest.mark.parametrize(
    ("kind", "generator", "discriminator"),
    [
        (
            "hinge",
            -FAKE.mean(),
            (np.maximum(1 - REAL, 0).mean() + np.maximum(1 + FAKE, 0).mean()) / 2,
        ),
        ("vanilla", -FAKE.mean(), (softplus(-REAL).mean() + softplus(FAKE).mean()) / 2),
        (
            "non_saturating",
            softplus(-FAKE).mean(),
            softplus(-REAL).mean() + softplus(FAKE).mean(),
        ),
    ],
)
def test_adversarial_losses(kind, generator, discriminator):
    close(adversarial.generator_loss(kind, FAKE), generator)
    close(adversarial.discriminator_loss(kind, REAL, FAKE), discriminator)


@pytest.mark.parametrize(
    ("kind", "value"), [("hinge", 1.0), ("vanilla", np.log(2)), ("non_saturating", np.log(4))]
)
def test_undecided_discriminator(kind, value):
    close(adversarial.discriminator_loss(kind, jnp.zeros(5), jnp.zeros(5)), value)


@pytest.mark.parametrize("loss", [adversarial.generator_loss, adversarial.discriminator_loss])
def test_unknown_kind_is_named(loss):
    with pytest.raises(ValueError, match="'wasserstein'"):
        loss(*["wasserstein", REAL, FAKE][: 2 if loss is adversarial.generator_loss else 3])


def test_lecam_is_equation_3():
    real_average, fake_average = 0.7, -0.4
    expected = np.mean(np.maximum(REAL + 0.4, 0) ** 2) + np.mean(np.maximum(0.7 - FAKE, 0) ** 2)
    close(adversarial.lecam(REAL, FAKE, real_average, fake_average), expected)


@pytest.mark.parametrize(
    ("scale", "expected"), [(1.0, None), (1e9, 1e4), (0.0, 0.0)], ids=["ratio", "clipped", "zero"]
)
def test_adaptive_weight_is_a_ratio_of_norms(scale, expected):
    a, b = scale * normal(3, 3, 4, 2), normal(3, 3, 4, 2, seed=1)
    if expected is None:
        expected = np.linalg.norm(a) / (np.linalg.norm(b) + 1e-4)
    close(adversarial.adaptive_weight(a, b, 1e-4, 1e4), expected)
    if scale == 1:
        gradient = jax.grad(lambda a: adversarial.adaptive_weight(a, b, 1e-4, 1e4))(a)
        assert not np.any(gradient)  # the weight is a constant to both losses


def test_ramp_at_its_corners():
    at = [adversarial.ramp(step, 10, 0) for step in (0, 9, 10, 11)]
    np.testing.assert_array_equal(at, [0, 0, 1, 1])
    at = [adversarial.ramp(step, 10, 4) for step in (9, 10, 11, 13, 14, 99)]
    np.testing.assert_allclose(at, [0, 0.25, 0.5, 1, 1, 1])


class QuadraticCritic(nn.Module):
    """Stands for the discriminator: central differences of a quadratic are exact."""

    @nn.compact
    def __call__(self, images, train=False):
        weight = self.param("weight", nn.initializers.normal(1.0), images.shape[1:])
        return jnp.sum(images * weight + 0.3 * images**2, axis=-1, keepdims=True)


def test_adaptive_weight_by_finite_differences_of_the_last_layer():
    """Every one of the 864 values of the last kernel is moved both ways, for both losses."""
    config = tiny.config_of_tiny_model()
    config.loss.l1, config.loss.l2, config.loss.perceptual = 0.0, 1.0, 0.0
    config.discriminator.start, config.discriminator.weight = 0, 0.8
    game = dataclasses.replace(Game.from_config(config), discriminator=QuadraticCritic())
    images = jnp.asarray(tiny.random_images(2, 8, 8, 3))
    variables = tiny.initial_variables(config)
    critic = game.discriminator.init(jax.random.key(1), images)
    state = TokenizerState(
        jnp.zeros((), jnp.int32), game.init_generator(variables), game.init_discriminator(critic)
    )
    run = jax.jit(
        lambda state, images: generator_gradients(
            game, state, Running({}, {}), images, 0, None, playing=True
        )
    )
    _, gradients, metrics, reconstructions = run(state, images)
    features, _ = jax.jit(lambda v, x: game.tokenizer.apply(v, x, method="features"))(
        variables, images
    )
    layer = variables["params"]["decoder"]["conv_out"]

    def losses(kernel):
        only = {"decoder": {"conv_out": {"kernel": kernel, "bias": layer["bias"]}}}
        output = game.tokenizer.apply({"params": only}, features, method="head")
        fooled = -jnp.mean(game.discriminator.apply(critic, output))
        return jnp.stack([jnp.mean((output - images) ** 2), fooled])

    size, step = layer["kernel"].size, 0.5

    def difference(i):
        move = step * jax.nn.one_hot(i, size).reshape(layer["kernel"].shape)
        return (losses(layer["kernel"] + move) - losses(layer["kernel"] - move)) / (2 * step)

    differences = np.asarray(jax.jit(lambda: jax.lax.map(difference, jnp.arange(size)))())
    norms = np.linalg.norm(differences, axis=0)
    weight = 0.8 * norms[0] / (norms[1] + config.discriminator.adaptive_delta)
    np.testing.assert_allclose(metrics["adversarial_weight"], weight, rtol=1e-3)
    combined = differences[:, 0] + weight * differences[:, 1]
    found = np.asarray(gradients["decoder"]["conv_out"]["kernel"]).ravel()
    np.testing.assert_allclose(found, combined, atol=1e-3 * np.abs(combined).max())
    close(metrics["raw/adversarial"], losses(layer["kernel"])[1])
    close(metrics["raw/l2"], np.mean((reconstructions - images) ** 2))


# ---- Sums.


def test_weighted_sum_reports_raw_and_weighted_terms():
    total, metrics = weighted_sum({"a": jnp.float32(3), "b": jnp.float32(5)}, {"a": 2.0, "b": 0.5})
    assert total == 8.5
    assert metrics == {"raw/a": 3, "raw/b": 5, "weighted/a": 6, "weighted/b": 2.5}


@pytest.mark.parametrize("kind", ["nearest", "ema", "gumbel"])
def test_quantization_objective_by_kind(kind):
    loss = tiny.config_of_tiny_model().loss
    loss.codebook, loss.commitment, loss.kl = 2.0, 0.25, 0.5
    z, e, logits = normal(1, 2, 2, 4), normal(1, 2, 2, 4, seed=1), normal(1, 2, 2, 6, seed=2)
    total, _ = quantization_objective(loss, kind, Quantized(e, None, z, e, logits))
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = {
        "nearest": 1.25 * np.mean((z - e) ** 2),
        "ema": 0.25 * np.mean((z - e) ** 2),
        "gumbel": 0.5 * np.mean(np.sum(q * np.log(6 * q), -1)),
    }
    close(total, 2 * expected[kind])
