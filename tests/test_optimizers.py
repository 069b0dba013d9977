"""Learning rates, Adam, clipping, decay, moving averages and accumulation against formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.training.accumulation import accumulate
from vqgan_jax.training.optimizers import (
    learning_rate_schedule,
    make_optimizer,
    peak_learning_rate,
    temperature_schedule,
    update_moving_average,
)


def optimizer_config(**changes):
    optimizer = tokenizer_config().optimizer
    optimizer.update(changes)
    return optimizer


# ---- Schedules.


def test_learning_rate_is_the_rule_of_the_reference_or_the_one_given():
    assert peak_learning_rate(optimizer_config(), 12) == pytest.approx(5.4e-5)
    assert peak_learning_rate(optimizer_config(base_learning_rate=1e-6), 256) == pytest.approx(
        2.56e-4
    )
    assert peak_learning_rate(optimizer_config(learning_rate=3e-4), 256) == 3e-4


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_learning_rate_schedule(kind, warmup):
    optimizer = optimizer_config(schedule=kind, warmup_steps=warmup, end_factor=0.1)
    schedule = learning_rate_schedule(optimizer, 2e-4, 110)
    for step in (0, 1, 5, 9, 10, 35, 60, 109, 110, 500):
        if step < warmup:
            expected = 2e-4 * step / warmup
        elif kind == "constant":
            expected = 2e-4
        else:
            done = min(1.0, (step - warmup) / (110 - warmup))
            expected = 2e-4 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * done)))
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "num_steps", "expected"),
    [
        (  # ViT-VQGAN, stage 1: warm-up, then a cosine to half of it
            dict(learning_rate=1e-4, warmup_steps=50_000, schedule="cosine", end_factor=0.5),
            500_000,
            {0: 0, 25_000: 5e-5, 50_000: 1e-4, 275_000: 7.5e-5, 500_000: 5e-5, 900_000: 5e-5},
        ),
        (  # ViT-VQGAN, stage 2: the peak until 80,000, then exponentially to 1e-5
            dict(
                learning_rate=4.5e-4,
                warmup_steps=5_000,
                schedule="exponential",
                decay_start=80_000,
                end_factor=1e-5 / 4.5e-4,
            ),
            450_000,
            {
                2_500: 2.25e-4,
                5_000: 4.5e-4,
                79_999: 4.5e-4,
                80_000: 4.5e-4,
                265_000: np.sqrt(4.5e-4 * 1e-5),
                450_000: 1e-5,
                500_000: 1e-5,
            },
        ),
        (
            dict(schedule="exponential", end_factor=0.01),
            100,
            {0: 5.4e-5, 50: 5.4e-6, 99: 5.6547e-7},
        ),
        (
            dict(schedule="cosine", decay_start=20),
            100,
            {0: 5.4e-5, 19: 5.4e-5, 20: 5.4e-5, 60: 2.7e-5, 100: 0},
        ),
    ],
    ids=["vit_vqgan", "vim", "exponential", "late_cosine"],
)
def test_schedules_of_vit_vqgan(given, num_steps, expected):
    optimizer = optimizer_config(**given)
    schedule = learning_rate_schedule(optimizer, peak_learning_rate(optimizer, 12), num_steps)
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(step), value, rtol=2e-4, atol=1e-12, err_msg=str(step))


def test_warm_up_longer_than_the_run_is_no_error():
    schedule = learning_rate_schedule(optimizer_config(schedule="cosine", warmup_steps=50), 1.0, 20)
    np.testing.assert_allclose([schedule(0), schedule(20)], [0, 0.4], rtol=1e-6)


def test_temperature_schedule():
    temperature = tokenizer_config().temperature
    temperature.update(dict(warmup_steps=100, decay_steps=1100, start=0.5, peak=0.9, end=0.1))
    schedule = temperature_schedule(temperature)
    expected = {0: 0.5, 50: 0.7, 100: 0.9, 600: 0.5, 1100: 0.1, 9999: 0.1}
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(step), value, rtol=1e-5)


def test_temperature_of_the_reference_starts_at_its_peak():
    """LambdaWarmUpCosineScheduler of its Gumbel config: no warm-up, 0.9 down to 1e-6."""
    schedule = temperature_schedule(tokenizer_config().temperature)
    done = 250_000 / 1_000_001
    half_way = 1e-6 + 0.5 * (0.9 - 1e-6) * (1 + np.cos(np.pi * done))
    np.testing.assert_allclose(schedule(0), 0.9, rtol=1e-6)
    np.testing.assert_allclose(schedule(250_000), half_way, rtol=1e-5)


# ---- The update.

GRADIENTS = [np.random.default_rng(i).standard_normal((3, 2)).astype(np.float32) for i in range(3)]


def updates_of(optimizer, rate, gradients=GRADIENTS, name="kernel"):
    transformation = make_optimizer(optimizer, optax.constant_schedule(rate))
    params = {name: jnp.ones((3, 2))}
    state = transformation.init(params)
    for gradient in gradients:
        updates, state = transformation.update({name: jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params[name])


def adam(rate, gradients, decay=0.0, b1=0.5, b2=0.9, eps=1e-8):
    x, m, v = np.ones((3, 2)), 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        x = x - rate * (step + decay * x)
    return x


def test_adam_of_the_reference_for_three_steps():
    np.testing.assert_allclose(updates_of(optimizer_config(), 0.1), adam(0.1, GRADIENTS), rtol=1e-5)


def test_first_moment_in_bfloat16():
    """Rounded where it is kept, and not where it is used: Adam with m as bfloat16 holds it."""
    optimizer = optimizer_config(first_moment="bfloat16", b1=0.9, b2=0.96)
    state = make_optimizer(optimizer, optax.constant_schedule(0.1)).init({"kernel": jnp.ones(3)})
    assert (
        state[0].mu["kernel"].dtype == jnp.bfloat16 and state[0].nu["kernel"].dtype == jnp.float32
    )
    x, m, v = np.ones((3, 2)), np.zeros((3, 2), jnp.bfloat16), 0.0
    for t, gradient in enumerate(GRADIENTS, start=1):
        m = 0.9 * m.astype(np.float64) + 0.1 * gradient
        v = 0.96 * v + 0.04 * gradient**2
        x = x - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.96**t)) + 1e-8)
        m = m.astype(jnp.bfloat16)
    exact = adam(0.1, GRADIENTS, b1=0.9, b2=0.96)
    found = updates_of(optimizer, 0.1)
    np.testing.assert_allclose(found, x, atol=1e-3)
    assert 0 < np.abs(found - exact).max() < 2e-3


@pytest.mark.parametrize("name", ["kernel", "bias", "scale", "codebook"])
def test_weight_decay_is_for_kernels_only(name):
    found = updates_of(optimizer_config(weight_decay=0.2), 0.1, name=name)
    decay = 0.2 if name == "kernel" else 0.0
    np.testing.assert_allclose(found, adam(0.1, GRADIENTS, decay), rtol=1e-5)


def test_clipping_is_by_the_norm_of_all_gradients():
    clipped = [g * min(1.0, 0.5 / np.linalg.norm(g)) for g in GRADIENTS]
    small = [1e-3 * g for g in GRADIENTS]
    clip = optimizer_config(clip_norm=0.5, eps=1e-1)
    np.testing.assert_allclose(updates_of(clip, 0.1), adam(0.1, clipped, eps=1e-1), rtol=1e-5)
    np.testing.assert_allclose(updates_of(clip, 0.1, small), adam(0.1, small, eps=1e-1), rtol=1e-5)


def test_moving_average_of_parameters_starts_fast():
    """At update t (from 0) the decay is min(decay, (1 + t) / (10 + t))."""
    values = np.random.default_rng(0).standard_normal(200)
    average, expected = {"x": jnp.zeros(())}, 0.0
    for t, value in enumerate(values):
        average = update_moving_average(average, {"x": jnp.asarray(value)}, jnp.asarray(t), 0.95)
        decay = min(0.95, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value
    np.testing.assert_allclose(average["x"], expected, rtol=1e-4)
    first = update_moving_average({"x": jnp.zeros(())}, {"x": jnp.ones(())}, jnp.asarray(0), 0.9999)
    np.testing.assert_allclose(first["x"], 0.9, rtol=1e-6)


# ---- Accumulation.


def least_squares(params, carry, batch, index):
    """A micro-batch, where the gradient of the whole is the mean of those of equal parts."""
    x, y = batch

    def loss(params):
        output = x @ params["kernel"]
        return jnp.mean((output - y) ** 2), output

    (value, output), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return carry + jnp.sum(x), gradients, {"loss": value, "index": index + 0.0}, (output, x)


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_accumulation_is_the_whole_batch(count):
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((12, width)).astype(np.float32) for width in (5, 2))
    params = {"kernel": jnp.asarray(random.standard_normal((5, 2)).astype(np.float32))}
    run = jax.jit(
        lambda batch: accumulate(
            functools.partial(least_squares, params), jnp.zeros(()), params, batch, count
        )
    )
    carry, gradients, metrics, (outputs, rows) = run((x, y))
    error = x @ np.asarray(params["kernel"]) - y
    np.testing.assert_allclose(
        gradients["kernel"], 2 * x.T @ error / error.size, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["index"], (count - 1) / 2)
    np.testing.assert_array_equal(rows, x)  # outputs come back in the order of the batch
    np.testing.assert_allclose(outputs, x @ np.asarray(params["kernel"]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(carry, x.sum(), rtol=1e-4)


def test_micro_batches_take_every_so_manyth_row():
    """So that each device's rows of a batch stay on it."""
    batch = jnp.arange(12)

    def micro_batch(carry, rows, index):
        return carry.at[index].set(rows), {}, {}, rows

    carry, _, _, outputs = accumulate(micro_batch, jnp.zeros((3, 4), jnp.int32), {}, batch, 3)
    np.testing.assert_array_equal(carry, np.arange(12).reshape(4, 3).T)
    np.testing.assert_array_equal(outputs, np.arange(12))
