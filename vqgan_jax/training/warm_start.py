"""Beginning a run from the weights of another: fine-tuning."""

import jax

from vqgan_jax.training.checkpoints import CheckpointError, read_variables, shapes
from vqgan_jax.training.game import Game
from vqgan_jax.training.states import TokenizerState


def start_from(path: str, game: Game, state: TokenizerState, layout) -> TokenizerState:
    """`state` with the weights of the run, checkpoint or export at `path`, optimisers fresh.

    The discriminator's weights are taken where `path` has those of the same discriminator.

    Raises:
        CheckpointError: the tokenizer at `path` has other shapes than the config's.
    """
    _, variables, discriminator = read_variables(path)
    ours = {"params": state.generator.params}
    if state.generator.codebook:
        ours["codebook"] = state.generator.codebook
    different = sorted(shapes(variables).items() ^ shapes(ours).items())
    if different:
        raise CheckpointError(
            f"config.training.initialize_from {path} holds another model; the first difference is "
            f"at {different[0][0]} {different[0][1]}."
        )

    def begin(variables, discriminator):
        players = {"generator": game.init_generator(variables)}
        if discriminator is not None:
            players["discriminator"] = game.init_discriminator(discriminator)
        return players

    if state.discriminator is None or (
        discriminator is not None
        and shapes(discriminator["params"]) != shapes(state.discriminator.params)
    ):
        discriminator = None
    player_layout = {"generator": layout.generator}
    if discriminator is not None:
        player_layout["discriminator"] = layout.discriminator
    players = jax.jit(begin, out_shardings=player_layout)(
        jax.device_get(variables), jax.device_get(discriminator)
    )
    return state.replace(**players)


def initial_params(path: str, abstract_params):
    """The parameters of another transformer on the host, to begin from.

    Raises:
        CheckpointError: there is none at `path`, or it has other shapes than `abstract_params`.
    """
    config, variables, _ = read_variables(path)
    if config.stage != "transformer":
        raise CheckpointError(
            f"config.training.initialize_from {path} is a {config.stage}; a transformer is needed "
            "here."
        )
    ours, theirs = shapes(abstract_params), shapes(variables["params"])
    different = sorted(ours.items() ^ theirs.items())
    if different:
        name = different[0][0]
        raise CheckpointError(
            f"config.training.initialize_from {path} holds another model: the shape of {name} is "
            f"{theirs.get(name, 'not')} there and {ours.get(name, 'not')} here."
        )
    return jax.device_get(variables["params"])
