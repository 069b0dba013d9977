"""How the steps are compiled: options by backend, layouts and donation."""

import functools
from collections.abc import Callable

import jax

from vqgan_jax.training.discriminator_step import discriminator_step
from vqgan_jax.training.game import Game
from vqgan_jax.training.generator_step import generator_step


@functools.cache
def compile_options() -> dict[str, str] | None:
    """Options for `jax.jit(..., compiler_options=)` of convolutional networks on this backend.

    None for the defaults. On the CPU, XLA's YNNPACK fusions are off: convolutions in them hardly
    use a second core. Matrix products are faster in them, so transformers go without this.
    Options come and go with the compiler's version, so it is asked first.
    """
    if jax.default_backend() != "cpu":
        return None
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(0)
    except Exception:  # the kind of error differs between versions
        return None
    return options


def compile_players(game: Game, state_layout, rows, whole) -> tuple[Callable, Callable]:
    """`generator_step` and `discriminator_step` of a game as training runs them.

    The state given to each is donated to it.

    Args:
        game: what does not change from step to step.
        state_layout: a sharding for each array of the state.
        rows: the sharding of batches.
        whole: the sharding of metrics, replicated.
    """
    compiled = functools.partial(jax.jit, donate_argnums=0, compiler_options=compile_options())
    return (
        compiled(
            functools.partial(generator_step, game),
            static_argnames="playing",
            out_shardings=(state_layout, whole, rows),
        ),
        compiled(
            functools.partial(discriminator_step, game),
            static_argnames=("playing", "regularizing"),
            out_shardings=(state_layout, whole),
        ),
    )
