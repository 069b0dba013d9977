"""R1 against finite differences, in the discriminator's update, and in a run that is resumed.

In float64, where a difference of rounding cannot decide on which side of a kink an activation lies.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import tiny
import training_runs as runs
from tiny_config import get_config
from vqgan_jax.losses import adversarial
from vqgan_jax.models.discriminator import PatchDiscriminator
from vqgan_jax.models.stylegan_discriminator import StyleGANDiscriminator
from vqgan_jax.training.discriminator_step import (
    Running,
    discriminator_gradients,
    discriminator_step,
)
from vqgan_jax.training.game import Game
from vqgan_jax.training.loop import train
from vqgan_jax.training.states import DiscriminatorState, TokenizerState

SIDE = 8


def images_of(count, seed=0):
    return jnp.asarray(tiny.random_images(count, SIDE, SIDE, 3, seed=seed), jnp.float64)


def stylegan(group_size=2):
    return StyleGANDiscriminator(64, 4, group_size, dtype=jnp.float64)


def patch(norm):
    return PatchDiscriminator(channels=16, num_layers=1, norm=norm, dtype=jnp.float64)


def initialized(model, images):
    """Variables in float64 whose biases are not zero."""
    variables = tiny.initialized(model, images, train=True)
    # Some are float32 even so, in which a small step would be lost.
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), variables["params"])
    flat, unflatten = ravel_pytree(wide)
    noise = 0.1 * np.random.default_rng(1).standard_normal(flat.shape)
    return variables | {"params": unflatten(flat + noise)}


# ---- The term.


@pytest.mark.slow
@pytest.mark.parametrize("model", [stylegan(), patch("batch")], ids=["stylegan", "patch"])
def test_r1_and_its_gradient_by_finite_differences(float64, model):
    """Every value of the images is moved both ways, then all parameters in one direction."""
    images = images_of(3)
    variables = initialized(model, images)
    flat, unflatten = ravel_pytree(variables["params"])

    def judge(flat, images):
        logits, _ = model.apply(
            variables | {"params": unflatten(flat)}, images, train=True, mutable=["batch_stats"]
        )
        return logits

    def by_differences(flat, step=1e-6):
        """The sum over images of the logit, the mean over an image's patches, by each value."""

        def moved(i, sign):
            move = sign * step * jax.nn.one_hot(i, images.size, dtype=images.dtype)
            return judge(flat, images + move.reshape(images.shape)).mean(axis=(1, 2, 3)).sum()

        slopes = jax.lax.map(
            lambda i: (moved(i, 1) - moved(i, -1)) / (2 * step), jnp.arange(images.size)
        )
        return jnp.sum(jnp.square(slopes)) / len(images)

    def by_program(flat):
        return adversarial.r1(lambda images: judge(flat, images), images)

    value, gradient = jax.jit(jax.value_and_grad(by_program))(flat)
    np.testing.assert_allclose(value, jax.jit(by_differences)(flat), rtol=1e-6)
    direction = jnp.asarray(np.random.default_rng(2).standard_normal(flat.shape))
    program, step = jax.jit(by_program), 1e-6
    slope = (program(flat + step * direction) - program(flat - step * direction)) / (2 * step)
    np.testing.assert_allclose(gradient @ direction, slope, rtol=1e-5)


def test_r1_of_a_linear_discriminator_at_any_batch_size():
    """D(x) = <w, x>, as the mean of 4 equal patches: |w|^2, for one image and for many."""
    weight = tiny.random_images(SIDE, SIDE, 3)

    def judge(images):
        logits = jnp.einsum("bhwc,hwc->b", images, weight)
        return jnp.broadcast_to(logits[:, None, None, None], (len(images), 2, 2, 1))

    for count in (1, 2, 5):
        images = jnp.asarray(tiny.random_images(count, SIDE, SIDE, 3))
        found = jax.jit(functools.partial(adversarial.r1, judge))(images)
        np.testing.assert_allclose(found, np.sum(weight.astype(np.float64) ** 2), rtol=1e-5)


# ---- The update.


def game_with(model, **discriminator):
    config = tiny.config_of_tiny_model()
    config.model.dtype = "float64"
    config.discriminator.start = 0
    config.discriminator.update(r1=3.0, r1_interval=5, loss="non_saturating", lecam=0.01)
    config.discriminator.update(discriminator)
    return dataclasses.replace(Game.from_config(config), discriminator=model)


def state_of(game, images):
    variables = initialized(game.discriminator, images)
    player = DiscriminatorState(
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=game.discriminator_optimizer.init(variables["params"]),
        logit_averages=jnp.zeros(2),
    )
    return TokenizerState(jnp.asarray(5, jnp.int32), None, player)  # after the generator's fifth


def test_lazy_term_has_its_weight_and_moves_no_statistics(float64):
    game, images, fakes = game_with(patch("batch")), images_of(4), images_of(4, seed=1)
    state = state_of(game, images)
    running = Running(state.discriminator.batch_stats, state.discriminator.logit_averages)

    @jax.jit
    def both(state, running):
        return [
            discriminator_gradients(game, state, 4, running, images, fakes, regularizing)[:3]
            for regularizing in (False, True)
        ]

    (moved, plain, metrics), (moved_too, regularized, more) = both(state, running)
    jax.tree.map(np.testing.assert_array_equal, moved, moved_too)
    assert more.keys() - metrics.keys() == {"raw/r1", "weighted/r1"}
    np.testing.assert_allclose(more["weighted/r1"], 5 * 3.0 / 2 * more["raw/r1"], rtol=1e-12)
    np.testing.assert_allclose(
        more["loss/discriminator"], metrics["loss/discriminator"] + more["weighted/r1"], rtol=1e-12
    )

    def term(params):
        variables = {"params": params, "batch_stats": running.batch_stats}
        judge = lambda x: game.discriminator.apply(  # noqa: E731
            variables, x, train=True, mutable=["batch_stats"]
        )[0]
        return 5 * 3.0 / 2 * adversarial.r1(judge, images)

    expected = jax.jit(jax.grad(term))(state.discriminator.params)
    difference = jax.tree.map(jnp.subtract, regularized, plain)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), difference, expected
    )


def test_term_comes_at_every_so_manyth_update_of_the_game():
    game = game_with(stylegan(), start=7)
    assert [step for step in range(30) if game.regularizes(step)] == [9, 14, 19, 24, 29]
    assert not any(game_with(stylegan(), r1=0.0).regularizes(step) for step in range(30))
    assert not any(game_with(stylegan(), enabled=False).regularizes(step) for step in range(30))


@pytest.mark.slow
def test_accumulated_and_on_eight_devices_as_at_once(float64):
    """Groups of 2 lie within each of 4 micro-batches of 4, and across 8 devices."""
    images, fakes = images_of(16), images_of(16, seed=1)
    game = game_with(stylegan(), lecam=0.0)  # whose averages move from micro-batch to micro-batch
    state = state_of(game, images)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def updated(count, images, fakes):
        config = game.config.copy_and_resolve_references()
        config.optimizer.accumulate = count
        changed = dataclasses.replace(game, config=config)

        @jax.jit
        def step(state, images, fakes):
            after, metrics = discriminator_step(
                changed, state, images, fakes, playing=True, regularizing=True
            )
            return optax.tree.sub(after.discriminator.params, state.discriminator.params), metrics

        return step(state, images, fakes)

    reference, metrics = updated(1, images, fakes)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(reference))
    for count, placed in ((4, (images, fakes)), (1, jax.device_put((images, fakes), split))):
        update, more = updated(count, *placed)
        for name in ("raw/r1", "raw/discriminator", "gradient_norm/discriminator"):
            np.testing.assert_allclose(more[name], metrics[name], rtol=1e-9, err_msg=name)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12), update, reference
        )


# ---- A run.


@pytest.mark.slow
def test_resumed_run_is_the_same_bit_for_bit(run_inputs, tmp_path):
    config = get_config()
    config.discriminator.update(kind="stylegan", base_channels=128, max_channels=8, start=1)
    config.discriminator.update(loss="non_saturating", adaptive_weight=False, weight=0.1)
    config.discriminator.update(r1=10.0, r1_interval=3, lecam=0.001)
    config.training.update(num_steps=8, evaluate_every=100, checkpoint_every=2)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(config, whole, jax.devices()[:1])
    with_game, with_term = (
        [line["step"] for line in runs.metrics(whole) if name in line]
        for name in ("loss/discriminator", "raw/r1")
    )
    assert with_game == list(range(2, 9)) and with_term == [3, 6]
    runs.copy_until(whole, resumed, 4)
    train(config, resumed, jax.devices()[:1])
    runs.assert_same_run(resumed, whole, 8)
