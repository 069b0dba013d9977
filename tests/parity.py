"""Replays outputs of the reference system (CompVis/taming-transformers) and compares.

    python tests/parity.py [--float32] FILE...

A file is an `.npz` of a small random model's parameters, inputs and outputs, in the reference's own
layout; what it holds is told by its keys and its `meta`. For each key the largest relative error,
max|a - b| / max|b|, is printed beside its tolerance; the last line names the worst. The exit code
is 1 where a tolerance is not met.

The replay is in float64, so that all rounding is the reference's: after the first update, Adam's
division by gradients near zero and the kinks of the discriminator turn rounding of 1e-7 into
differences of 1e-2 every few thousand activations, whatever implementation rounds. `--float32`
replays in the precision of training.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from parity_sliding_window import replay_sliding_window
from vqgan_jax.conditions.coordinates import coordinate_tokens
from vqgan_jax.interop.taming import (
    discriminator_from_state_dict,
    state_dict_from_variables,
    variables_from_state_dict,
)
from vqgan_jax.interop.taming_gpt import gpt_params_from_state_dict, state_dict_from_gpt_params
from vqgan_jax.interop.taming_yaml import config_from_yaml
from vqgan_jax.models.lpips import HEAD_WIDTHS, VGG16_WIDTHS
from vqgan_jax.models.transformer import Transformer
from vqgan_jax.training import discriminator_step, generator_step
from vqgan_jax.training.compilation import compile_options
from vqgan_jax.training.game import Game
from vqgan_jax.training.states import TokenizerState

MODELS = "taming.models.vqgan."
LOSSES = "taming.modules.losses."
GOLDENS = pathlib.Path(__file__).parent / "goldens"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One key's largest error, relative except where noted, and what it may be."""

    key: str
    error: float
    tolerance: float

    @property
    def share(self) -> float:
        """The error as a share of the tolerance; above 1 it fails."""
        if np.isnan(self.error):
            return np.inf
        if self.tolerance == 0:
            return np.inf if self.error > 0 else 0.0
        return self.error / self.tolerance


# ---- Tolerances.


def compare(golden: Mapping[str, np.ndarray], results: Mapping[str, np.ndarray]):
    """A `Comparison` for each result that stands in the golden file too.

    Of a result that there are several ways to, each has a key with the way behind an @.
    """
    vanishing = vanishing_gradients(golden)
    for key, ours in results.items():
        theirs_key = key.partition("@")[0]
        if theirs_key not in golden or key.endswith(INERT):
            continue
        theirs, ours = np.asarray(golden[theirs_key]), np.asarray(ours)
        if theirs.shape != ours.shape:
            if theirs.size != ours.size:
                raise ValueError(f"{key}: {ours.shape} here, {theirs.shape} in the file")
            ours = ours.reshape(theirs.shape)
        if np.issubdtype(theirs.dtype, np.integer):
            yield Comparison(key, float(np.sum(ours != theirs)), 0.0)
            continue
        error, size = np.max(np.abs(ours - theirs)), np.max(np.abs(theirs))
        if key in vanishing:  # zero in theory: rounding alone, against the largest of its group
            yield Comparison(key, float(error / vanishing[key]), 1e-6)
        elif size == 0:
            yield Comparison(key, float(error), 1e-6)
        else:
            yield Comparison(key, float(error / size), tolerance(key, vanishing))


def tolerance(key: str, vanishing: Mapping[str, float]) -> float:
    """The largest relative error that a key may have."""
    later = re.match(r"step(\d+)/", key)
    if later and int(later[1]) > 0:
        if "/grad_norm/" in key:
            return 2e-3
        return 5e-3 if "/grad/" in key else 5e-4
    if key.startswith("final/norm/"):
        name = key.removeprefix("final/norm/")
        return 5e-3 if any(other.endswith("/" + name) for other in vanishing) else 1e-3
    return 1e-3 if key.startswith("final/") else 1e-4


def vanishing_gradients(golden: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Keys of gradients that are zero in theory, with the largest gradient norm of their group."""
    groups: dict[str, dict[str, float]] = {}
    for key in golden:
        prefix, separator, name = key.rpartition("grad_norm/")
        if separator:
            groups.setdefault(prefix, {})[name] = float(golden[key])
    result = {}
    for prefix, norms in groups.items():
        largest = max(norms.values())
        for name, norm in norms.items():
            if norm < 1e-6 * largest:
                result[f"{prefix}grad_norm/{name}"] = largest
                result[f"{prefix}grad/{name}"] = largest
    return result


# ---- From the file to our networks.


def describe(meta: Mapping, kind: str, loss: Mapping) -> dict:
    """The reference's yaml of the model that a golden file's `meta` describes."""
    params = {
        "ddconfig": meta["ddconfig"],
        "n_embed": meta["n_embed"],
        "embed_dim": meta["embed_dim"],
        "lossconfig": loss,
    }
    if "n_labels" in meta:
        params["n_labels"] = meta["n_labels"]
    return {"model": {"target": MODELS + kind, "params": params}}


def precision() -> np.dtype:
    """What the replay computes in: float64 where JAX is told to have it."""
    return jnp.zeros(()).dtype


def in_precision(tree):
    """Arrays in the precision of the replay."""
    return jax.tree.map(lambda x: jnp.asarray(x, precision()), tree)


def game_of(config: ConfigDict) -> Game:
    """The game of a config in the precision of the replay."""
    config.model.dtype = precision().name
    return Game.from_config(config)


def state_dict_in(golden: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under `params/`."""
    prefix = "params/"
    return {key.removeprefix(prefix): golden[key] for key in golden if key.startswith(prefix)}


def stand_in_lpips() -> dict:
    """Our LPIPS parameters with the golden files' stand-in weights (see their `README.md`)."""
    widths = [width for level in VGG16_WIDTHS for width in level]
    network, channels = {}, 3
    for i, width in enumerate(widths):
        random = np.random.default_rng(1000 + i)
        weight = random.standard_normal((width, channels, 3, 3)) * np.sqrt(2 / (9 * channels))
        bias = 0.01 * random.standard_normal(width)
        network[f"conv_{i}"] = {
            "kernel": jnp.asarray(weight.transpose(2, 3, 1, 0), jnp.float32),
            "bias": jnp.asarray(bias, jnp.float32),
        }
        channels = width
    heads = {}
    for k, width in enumerate(HEAD_WIDTHS["vgg16"]):
        weight = np.abs(np.random.default_rng(2000 + k).standard_normal((1, width, 1, 1)))
        heads[f"head_{k}"] = jnp.asarray(weight.ravel() / width * 10, jnp.float32)
    return {"network": network, "heads": heads}


def nhwc(x: np.ndarray) -> jax.Array:
    """`(B, C, H, W)` -> `(B, H, W, C)`."""
    return jnp.asarray(np.moveaxis(x, 1, -1), precision())


def nchw(x: jax.Array) -> np.ndarray:
    """`(B, H, W, C)` -> `(B, C, H, W)`."""
    return np.moveaxis(np.asarray(x), -1, 1)


def gradient_results(prefix: str, named: Mapping[str, np.ndarray]) -> Iterator[tuple]:
    """`grad_norm/NAME` and `grad/NAME` of gradients under the reference's names."""
    for name, value in named.items():
        yield f"{prefix}grad_norm/{name}", np.linalg.norm(np.asarray(value, np.float64).ravel())
        yield f"{prefix}grad/{name}", value


# ---- The replays.


def replay_training(golden: Mapping[str, np.ndarray], meta: Mapping) -> dict[str, np.ndarray]:
    """The forward pass, then the steps of both players, in the reference's order."""
    loss = {"target": LOSSES + "vqperceptual.VQLPIPSWithDiscriminator", "params": meta["loss"]}
    config = config_from_yaml(describe(meta, "VQModel", loss))
    config.discriminator.refresh_reconstruction = True
    config.optimizer.learning_rate = meta["lr"]
    config.optimizer.b1, config.optimizer.b2 = meta["betas"]
    game = game_of(config)
    perceptual = in_precision(stand_in_lpips())
    state_dict = state_dict_in(golden)
    variables = in_precision(variables_from_state_dict(state_dict, config)[0])
    discriminator = in_precision(discriminator_from_state_dict(state_dict, config))
    batches = [nhwc(x) for x in golden["x"]]

    found = jax.jit(lambda *arrays: forward(game, *arrays))(variables, perceptual, batches[0])
    results = {
        f"fwd/{key}": nchw(value) if value.ndim == 4 and key != "lpips" else value
        for key, value in found.items()
    }
    if any(k.endswith(".initialized") and not v.any() for k, v in state_dict.items()):
        # ActNorm meets its first batch in the generator's half of the first step.
        reconstructions = game.tokenizer.apply(variables, batches[0])[0]
        kept = {k: v for k, v in discriminator["params"].items() if not k.startswith("norm")}
        _, started = game.discriminator.apply(
            {"params": kept},
            reconstructions,
            mutable=["params"],
            rngs={"params": jax.random.key(0)},
        )
        discriminator = {"params": kept | started["params"]}

    state = TokenizerState(
        jnp.zeros((), jnp.int32),
        game.init_generator(variables),
        game.init_discriminator(discriminator),
    )
    step = jax.jit(
        lambda state, images: both_players(game, state, images, perceptual),
        compiler_options=compile_options(),
    )
    for s, images in enumerate(batches):
        state, logged, gradients = step(state, images)
        results |= {f"step{s}/{key}": value for key, value in logged.items()}
        named = state_dict_from_variables(
            {"params": gradients["g"]}, config, {"params": gradients["d"]} | zero_statistics(state)
        )
        for player, names in split_players(named).items():
            results |= dict(gradient_results(f"step{s}/{player}/", names))

    players = state.generator, state.discriminator
    final = state_dict_from_variables(
        {"params": players[0].params},
        config,
        {"params": players[1].params, "batch_stats": players[1].batch_stats},
    )
    for name, value in final.items():
        results[f"final/norm/{name}"] = np.linalg.norm(np.asarray(value, np.float64))
    reconstruct = jax.jit(lambda *arrays: game.tokenizer.apply(*arrays)[0])
    discriminate = jax.jit(lambda *arrays: game.discriminator.apply(*arrays))
    variables = {"params": players[1].params, "batch_stats": players[1].batch_stats}
    return results | {
        "final/reconstruction": nchw(reconstruct({"params": players[0].params}, batches[0])),
        "final/disc_eval": nchw(discriminate(variables, batches[0])),
    }


def both_players(game: Game, state: TokenizerState, images, perceptual):
    """One step of each, what the reference logs of it, and the gradients."""
    running = generator_step.Running(state.generator.codebook, state.discriminator.batch_stats)
    _, generator_gradients, _, _ = generator_step.generator_gradients(
        game, state, running, images, 0, perceptual, playing=True
    )
    state, g, reconstructions = generator_step.generator_step(
        game, state, images, perceptual, playing=True
    )
    running = discriminator_step.Running(
        state.discriminator.batch_stats, state.discriminator.logit_averages
    )
    refreshed = game.tokenizer.apply({"params": state.generator.params}, images)[0]
    _, discriminator_gradients, _, _ = discriminator_step.discriminator_gradients(
        game, state, state.step - 1, running, images, refreshed
    )
    state, d = discriminator_step.discriminator_step(
        game, state, images, reconstructions, playing=True
    )
    logged = {
        "g/total_loss": g["loss/total"],
        "g/quant_loss": g["raw/quantization"],
        "g/nll_loss": g["loss/reconstruction"],
        "g/rec_loss": g["loss/reconstruction"],
        "g/p_loss": g.get("raw/perceptual", jnp.zeros(())),
        "g/d_weight": g["adversarial_weight"],
        "g/disc_factor": g["adversarial_share"],
        "g/g_loss": g["raw/adversarial"],
        "d/disc_loss": d["loss/discriminator"],
        "d/logits_real": d["logits/real"],
        "d/logits_fake": d["logits/fake"],
    }
    return state, logged, {"g": generator_gradients, "d": discriminator_gradients}


def forward(game: Game, variables, perceptual, images) -> dict[str, jax.Array]:
    """What the reference computes between an image and its reconstruction, channels last."""
    bound = game.tokenizer.bind(variables)
    encoder = bound.encoder(images)
    reconstructions, quantized = bound(images)
    distance = game.perceptual.apply({"params": perceptual}, images, reconstructions)
    return {
        "encoder": encoder,
        "pre_quant": bound.latents(images),
        "indices": quantized.codes,
        "quant": quantized.vectors,
        "codebook_loss": 1.25 * jnp.mean(jnp.square(quantized.latents - quantized.vectors)),
        "reconstruction": reconstructions,
        "lpips": distance[:, None, None, None],
    }


def zero_statistics(state: TokenizerState) -> dict:
    """Stands where the names of a discriminator's statistics are asked for with its gradients."""
    statistics = state.discriminator.batch_stats
    return {"batch_stats": jax.tree.map(jnp.zeros_like, statistics)} if statistics else {}


def split_players(named: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The generator's tensors under "g", the discriminator's under "d" by their own names."""
    players: dict[str, dict] = {"g": {}, "d": {}}
    for name, value in named.items():
        own = name.removeprefix("loss.discriminator.")
        players["g" if own == name else "d"][own] = value
    return players


def replay_segmentation(golden: Mapping[str, np.ndarray], meta: Mapping) -> dict[str, np.ndarray]:
    """The label-map tokenizer: forward pass, losses and gradients."""
    loss = {"target": LOSSES + "segmentation.BCELossWithQuant", "params": meta.get("loss", {})}
    config = config_from_yaml(describe(meta, "VQSegmentationModel", loss))
    game = game_of(config)
    variables = in_precision(variables_from_state_dict(state_dict_in(golden), config)[0])
    state = TokenizerState(jnp.zeros((), jnp.int32), game.init_generator(variables), None)
    images = jax.nn.one_hot(golden["labels"], meta["n_labels"], dtype=precision())
    logits, quantized = game.tokenizer.apply(variables, images)
    _, gradients, metrics, _ = generator_step.generator_gradients(
        game, state, generator_step.Running({}, {}), images, 0, None, playing=False
    )
    named = state_dict_from_variables({"params": gradients}, config)
    return {
        "fwd/logits": nchw(logits),
        "fwd/indices": np.asarray(quantized.codes),
        "loss/bce": metrics["raw/binary_cross_entropy"],
        "loss/quant": metrics["raw/quantization"],
        "loss/total": metrics["loss/total"],
    } | dict(gradient_results("", named))


def replay_gumbel(golden: Mapping[str, np.ndarray], meta: Mapping) -> dict[str, np.ndarray]:
    """The Gumbel tokenizer at evaluation: the forward pass."""
    loss = {"target": LOSSES + "vqperceptual.DummyLoss"}
    config = config_from_yaml(describe(meta, "GumbelVQ", loss))
    game = game_of(config)
    variables = in_precision(variables_from_state_dict(state_dict_in(golden), config)[0])
    reconstructions, quantized = game.tokenizer.apply(variables, nhwc(golden["x"]))
    return {
        "fwd/logits": nchw(quantized.logits),
        "fwd/indices": np.asarray(quantized.codes),
        "fwd/quant": nchw(quantized.vectors),
        "fwd/reconstruction": nchw(reconstructions),
    }


def replay_gpt(golden: Mapping[str, np.ndarray], meta: Mapping) -> dict[str, np.ndarray]:
    """The transformer: logits, mean cross-entropy, gradient norms.

    The first token stands for the condition; the last target is a code that the model never sees.
    """
    shape = meta["cfg"]
    length = golden["idx"].shape[1]
    transformer = Transformer(
        codebook_size=shape["vocab_size"],
        grid=(1, length),
        num_conditions=1,
        condition_size=0,
        max_length=shape["block_size"],
        num_layers=shape["n_layer"],
        num_heads=shape["n_head"],
        num_kv_heads=shape["n_head"],
        width=shape["n_embd"],
        hidden=4 * shape["n_embd"],
        num_unmasked=shape.get("n_unmasked", 0),
        dtype=precision(),
    )
    params = in_precision(gpt_params_from_state_dict(state_dict_in(golden)))
    conditions = golden["idx"][:, :1]
    codes = np.concatenate([golden["idx"][:, 1:], golden["targets"][:, -1:]], axis=1)

    def objective(params):
        logits = transformer.apply({"params": params}, conditions, codes)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, golden["targets"])
        return losses.mean(), logits

    (loss, logits), gradients = jax.value_and_grad(objective, has_aux=True)(params)
    named = state_dict_from_gpt_params(gradients)
    if not any(key.startswith("grad_norm/transformer.") for key in golden):
        named = {name.removeprefix("transformer."): value for name, value in named.items()}
    return {"logits": logits, "loss": loss} | dict(gradient_results("", named))


def replay_coordinates(golden: Mapping[str, np.ndarray], meta: Mapping) -> dict[str, np.ndarray]:
    """Coordinate tokens of a whole image and of a crop of it."""
    del meta
    (top, bottom), (left, right) = golden["crop_rows"], golden["crop_columns"]
    arguments = 256, 256, int(golden["down_factor"]), int(golden["n_embed"])
    crop = int(top), int(left), int(bottom - top), int(right - left)
    return {
        "full_indices": coordinate_tokens(*arguments),
        "crop_indices": coordinate_tokens(*arguments, crop),
    }


def replay_of(golden: Mapping[str, np.ndarray]) -> Callable:
    """The replay for what a file holds, by its keys."""
    if "step0/g/total_loss" in golden:
        return replay_training
    if "labels" in golden:
        return replay_segmentation
    if "fwd/logits" in golden and "params/quantize.proj.weight" in golden:
        return replay_gumbel
    if "targets" in golden and "params/transformer.pos_emb" in golden:
        return replay_gpt
    if "start" in golden and "params/transformer.pos_emb" in golden:
        return replay_sliding_window
    if "crop_indices" in golden:
        return replay_coordinates
    raise ValueError("no replay for what it holds: " + ", ".join(sorted(golden)[:5]) + ", ...")


def replay(path: str | os.PathLike) -> list[Comparison]:
    """All comparisons of a golden file.

    Raises:
        ValueError: there is no replay for what the file holds, or it holds a key that the replay
            does not give.
    """
    with np.load(path) as file:
        golden = {key: file[key] for key in file.files}
    meta = json.loads(str(golden.pop("meta"))) if "meta" in golden else {}
    results = replay_of(golden)(golden, meta)
    replayed = {key.partition("@")[0] for key in results}
    missed = [k for k in golden if k not in replayed.union(INPUTS) and k[:7] != "params/"]
    missed = [k for k in missed if not k.endswith(INERT)]
    if missed:
        raise ValueError(f"{len(missed)} keys were not replayed: {', '.join(missed[:5])}")
    return list(compare(golden, results))


INPUTS = (
    *("x", "labels", "idx", "targets", "cond", "init", "start", "min_margin"),
    *("n_embed", "down_factor", "crop_rows", "crop_columns"),
)
# A counter of batches, a flag and random colours, which no output depends on.
INERT = (".num_batches_tracked", ".initialized", "colorize")


def main(paths: list[str]) -> int:
    """Prints every comparison of the files; returns the exit code."""
    if not paths:
        print(__doc__)
        return 2
    jax.config.update("jax_enable_x64", "--float32" not in paths)
    everything = []
    for path in [path for path in paths if path != "--float32"]:
        try:
            comparisons = replay(path)
        except (OSError, ValueError) as error:
            print(f"error: {path}: {error}")
            return 1
        for item in comparisons:
            mark = "" if item.share <= 1 else "  TOO LARGE"
            print(f"{item.error:9.2e} of {item.tolerance:7.0e}  {item.key}{mark}")
            everything.append((item.share, path, item))
    share, path, worst = max(everything, key=lambda entry: entry[0])
    failed = sum(entry[0] > 1 for entry in everything)
    print(f"{len(everything)} keys, {failed} outside their tolerance.")
    print(f"worst: {worst.key} of {path}, error {worst.error:.2e} of {worst.tolerance:.0e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
