"""How the steps are compiled: options by backend, layouts and donation."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from vqgan_jax.models.target import backend, rows_split_over
from vqgan_jax.training.discriminator_step import discriminator_step
from vqgan_jax.training.evaluation import evaluation_step
from vqgan_jax.training.game import Game
from vqgan_jax.training.generator_step import generator_step
from vqgan_jax.training.learner import Learner
from vqgan_jax.training.sharding import BATCH_AXES, image_sharding, replicated
from vqgan_jax.training.transformer_step import transformer_step


def compile_options() -> dict[str, str] | None:
    """Options for `jax.jit(..., compiler_options=)` of convolutional networks on this backend.

    None for the defaults. On the CPU, XLA's YNNPACK fusions are off: convolutions in them hardly
    use a second core. Matrix products are faster in them, so transformers go without this.
    Options come and go with the compiler's version, so it is asked first.
    """
    return _on_cpu("xla_cpu_experimental_ynn_fusion_type", "")


def _on_cpu(name: str, value: str | int) -> dict[str, str | int] | None:
    return {name: value} if backend() == "cpu" and _is_option(name, value) else None


@functools.cache
def _is_option(name: str, value: str | int) -> bool:
    try:
        jax.jit(lambda x: x + 1, compiler_options={name: value})(0)
    except Exception:  # the kind of error differs between versions
        return False
    return True


def compile_init(init: Callable, state_layout) -> Callable:
    """What makes a state, each array where it lies.

    It runs once: on the CPU it is not optimised, which would take many times what it then saves.
    """
    options = _on_cpu("xla_backend_optimization_level", 0)
    return jax.jit(init, out_shardings=state_layout, compiler_options=options)


def with_rows_of(mesh: Mesh, function: Callable) -> Callable:
    """A function whose batches are split by rows over a mesh, whatever its parameters are."""

    @functools.wraps(function)
    def split(*arguments, **options):
        with rows_split_over(mesh, BATCH_AXES):
            return function(*arguments, **options)

    return split


def compile_players(game: Game, state_layout, mesh: Mesh) -> tuple[Callable, Callable]:
    """`generator_step` and `discriminator_step` of a game as training runs them.

    The state given to each is donated to it. Images arrive split by rows of the batch; within the
    steps they are split as `image_sharding` says, and the reconstructions with them.

    Args:
        game: what does not change from step to step.
        state_layout: a sharding for each array of the state.
        mesh: of the devices.
    """
    split, whole = image_sharding(mesh), replicated(mesh)

    def generator(state, images, perceptual_params, **options):
        images = jax.lax.with_sharding_constraint(images, split)
        return generator_step(game, state, images, perceptual_params, **options)

    def discriminator(state, images, reconstructions, **options):
        images = jax.lax.with_sharding_constraint(images, split)
        return discriminator_step(game, state, images, reconstructions, **options)

    compiled = functools.partial(jax.jit, donate_argnums=0, compiler_options=compile_options())
    return (
        compiled(
            with_rows_of(mesh, generator),
            static_argnames="playing",
            out_shardings=(state_layout, whole, split),
        ),
        compiled(
            with_rows_of(mesh, discriminator),
            static_argnames=("playing", "regularizing"),
            out_shardings=(state_layout, whole),
        ),
    )


def compile_judge(game: Game, mesh: Mesh) -> Callable:
    """`evaluation_step` of a game, with images split as in training."""

    def judge(variables, perceptual_params, images, mask):
        images = jax.lax.with_sharding_constraint(images, image_sharding(mesh))
        return evaluation_step(game, variables, perceptual_params, images, mask)

    return jax.jit(
        with_rows_of(mesh, judge),
        out_shardings=replicated(mesh),
        compiler_options=compile_options(),
    )


def compile_update(learner: Learner, state_layout, mesh: Mesh) -> Callable:
    """`transformer_step` of a learner as training runs it; the state given to it is donated.

    Args:
        learner: what does not change from step to step.
        state_layout: a sharding for each array of the state.
        mesh: of the devices.
    """
    return jax.jit(
        with_rows_of(mesh, functools.partial(transformer_step, learner)),
        donate_argnums=0,
        out_shardings=(state_layout, replicated(mesh)),
    )
