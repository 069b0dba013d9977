"""Beginning a run from the weights of another: fine-tuning."""

from collections.abc import Mapping

import jax

from vqgan_jax.inference import Tokenizer
from vqgan_jax.training.checkpoints import CheckpointError, read_variables, shapes
from vqgan_jax.training.freezing import CODING
from vqgan_jax.training.game import Game
from vqgan_jax.training.states import TokenizerState


def start_from(path: str, game: Game, state: TokenizerState, layout) -> TokenizerState:
    """`state` with the weights of the run, checkpoint or export at `path`, optimisers fresh.

    The discriminator's weights are taken where `path` has those of the same discriminator. Where
    the config freezes parts, a decoder of another size than at `path` stays as it is in `state`.

    Raises:
        CheckpointError: the tokenizer at `path` has other shapes than the config's, or frozen parts
            would give other codes than there.
    """
    theirs, variables, discriminator = read_variables(path)
    ours = {"params": state.generator.params}
    if state.generator.codebook:
        ours["codebook"] = state.generator.codebook
    loaded, fresh = variables, {}
    if game.config.training.freeze and shapes(ours) != shapes(variables):
        loaded = variables | {"params": _coding(variables["params"])}
        fresh = {k: v for k, v in ours["params"].items() if k not in CODING}
        ours = ours | {"params": _coding(ours["params"])}
    different = sorted(shapes(loaded).items() ^ shapes(ours).items())
    if different:
        raise CheckpointError(
            f"config.training.initialize_from {path} holds another model; the first difference is "
            f"at {different[0][0]} {different[0][1]}."
        )
    if set(game.config.training.freeze) == {"encoder", "quantizer"}:
        before, after = (Tokenizer(config, variables) for config in (theirs, game.config))
        if before.fingerprint != after.fingerprint:
            raise CheckpointError(
                "config.training.freeze is to keep codes, and with this config they would be "
                f"others than those of {path}: all of config.model but the decoder's size, and "
                "config.data.num_labels, must be as there."
            )

    def begin(variables, fresh, discriminator):
        variables = variables | {"params": variables["params"] | fresh}
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
        jax.device_get(loaded), fresh, jax.device_get(discriminator)
    )
    return state.replace(**players)


def _coding(params: Mapping) -> dict:
    """The parameters that codes depend on."""
    return {name: params[name] for name in params if name in CODING}


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
