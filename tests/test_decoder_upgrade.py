"""A larger decoder for a tokenizer whose codes stay: frozen parts, what is loaded, fingerprints."""

import functools

import jax
import numpy as np
import pytest

import small_generator as small
import tiny
import training_runs as runs
import vqgan_jax
from vqgan_jax.configuration import ConfigError, tokenizer_config, validate
from vqgan_jax.inference import Tokenizer
from vqgan_jax.training.checkpoints import CheckpointError, shapes, write_export
from vqgan_jax.training.game import Game, make_vqgan
from vqgan_jax.training.generator_step import generator_step
from vqgan_jax.training.loop import train
from vqgan_jax.training.warm_start import start_from

CODING = ("encoder", "quant_conv", "quantize")


def make_config(images="", kind="ema", **decoder):
    """Vision transformers with patches of 4 pixels, without dropout."""
    config = tokenizer_config()
    config.model.update(dtype="float32", architecture="vit", resolution=16)
    config.model.vit.patch = 4
    for network in (config.model.vit.encoder, config.model.vit.decoder):
        network.update(layers=1, heads=2, width=16)
    config.model.vit.decoder.update(decoder)
    config.model.quantizer.update(kind=kind, codebook_size=12, code_dim=4)
    config.loss.update(l1=0.0, l2=1.0, perceptual=0.0)
    config.discriminator.enabled = False
    config.optimizer.update(learning_rate=1e-2, ema_decay=0.9, weight_decay=0.1)
    config.data.update(name=f"folder:{images}", threads=1)
    config.training.update(batch_size=4, num_steps=1, evaluate_every=5, checkpoint_every=1)
    config.training.update(log_every=1, grid_images=2, evaluation_images=4, keep_latest=5)
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with images and an untrained tokenizer, `tokenizer`."""
    directory = tmp_path_factory.mktemp("base")
    small.write_images(directory / "images")
    config = make_config(directory / "images")
    variables = tiny.initial_variables(config, seed=7)
    # Zeros of both signs have the same value, and are not the same bytes.
    kernel = variables["params"]["encoder"]["embedding"]["kernel"].at[0].set(-0.0)
    variables["params"]["encoder"]["embedding"]["kernel"] = kernel
    write_export(directory / "tokenizer", config, variables)
    return directory


def upgraded(base, freeze=("encoder", "quantizer"), **decoder):
    config = make_config(base / "images", **decoder)
    config.training.initialize_from = str(base / "tokenizer")
    config.training.freeze = freeze
    return config


def start(config):
    """Game and state, begun from another tokenizer."""
    game = Game.from_config(config)
    images = tiny.random_images(4, 16, 16, 3)
    state = jax.jit(game.init)(images)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    return game, start_from(config.training.initialize_from, game, state, layout), images


@pytest.mark.slow
def test_codes_stay_and_the_decoder_learns(base, tmp_path):
    """By a run that is stopped and goes on, with a wider and deeper decoder."""
    before = vqgan_jax.load(base / "tokenizer")
    config = upgraded(base, layers=2, width=32)
    train(config, tmp_path / "run", jax.devices()[:1])
    config.training.num_steps = 2
    train(config, tmp_path / "run", jax.devices()[:1])
    after = vqgan_jax.load(tmp_path / "run")
    assert after.fingerprint == before.fingerprint
    images = tiny.random_images(3, 16, 16, 3)
    np.testing.assert_array_equal(after.encode(images), before.encode(images))
    assert after.variables["params"]["decoder"]["trunk"]["positions"].shape[-1] == 32

    first, second = (runs.state(tmp_path / "run", step) for step in (1, 2))
    stored = tiny.leaves(before.variables)
    for name, leaf in second.items():
        player, _, path = name.partition("/")
        assert player == "generator" or name == "step"
        part = path.partition("/")[2].partition("/")[0]
        if path.startswith(("params/", "ema_params/")) and part in CODING:
            whole = stored["params/" + path.partition("/")[2]]
            assert np.asarray(leaf).tobytes() == np.asarray(whole).tobytes(), name
        elif path.startswith("codebook/"):
            np.testing.assert_array_equal(leaf, stored[path], err_msg=name)
        elif path.startswith(("params/", "ema_params/")) and path.endswith("kernel"):
            assert np.any(leaf != first[name]), name
        elif path.startswith("opt_state/"):
            assert not any(f"/{frozen}/" in path for frozen in CODING), name
    moments = [name for name in second if "opt_state" in name and "decoder/" in name]
    assert len(moments) == 2 * sum("params/decoder/" in n and "ema_" not in n for n in second)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nearest", "gumbel"])
def test_a_decoder_learns_as_without_frozen_parts(base, tmp_path, kind):
    """Of the same size, in one step: its gradient is the same, and all else stands still."""
    config = make_config(base / "images", kind)
    images = tiny.random_images(4, 16, 16, 3)
    variables = tiny.initial_variables(config, seed=7)
    write_export(tmp_path / "tokenizer", config, variables)
    states = {}
    for freeze in ((), ("quantizer",), ("encoder", "quantizer")):
        config.training.initialize_from = str(tmp_path / "tokenizer")
        config.training.freeze = freeze
        game, state, _ = start(config)
        step = jax.jit(functools.partial(generator_step, game, playing=False))
        states[freeze], metrics, shown = step(state, images, None)
        if len(freeze) == 2:
            expected, _ = make_vqgan(config.model).apply(variables, images)  # not in training
            np.testing.assert_allclose(shown, expected, atol=1e-5)
            assert np.isfinite(float(metrics["gradient_norm/generator"]))
    after = {freeze: state.generator.params for freeze, state in states.items()}
    both = ("encoder", "quantizer")
    for name in CODING:
        jax.tree.map(np.testing.assert_array_equal, after[both][name], variables["params"][name])
    jax.tree.map(
        np.testing.assert_array_equal,
        after["quantizer",]["quantize"],
        variables["params"]["quantize"],
    )
    kernel = after["quantizer",]["encoder"]["embedding"]["kernel"]
    assert np.any(kernel != variables["params"]["encoder"]["embedding"]["kernel"])
    if kind == "nearest":  # the noise of Gumbel's is in training alone
        for name in ("decoder", "post_quant_conv"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
                after[both][name],
                after[()][name],
            )


@pytest.mark.slow
def test_weights_are_loaded_where_they_fit(base):
    theirs = vqgan_jax.load(base / "tokenizer").variables["params"]
    _, same, _ = start(upgraded(base))
    jax.tree.map(np.testing.assert_array_equal, same.generator.params, theirs)
    _, larger, _ = start(upgraded(base, width=32))
    params = larger.generator.params
    assert shapes(params["decoder"]) != shapes(theirs["decoder"])
    for name in CODING:
        if name in theirs:
            jax.tree.map(np.testing.assert_array_equal, params[name], theirs[name])


@pytest.mark.slow
def test_what_does_not_fit_is_refused(base):
    def change(**changes):
        config = upgraded(base)
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            target = config
            for part in section.split("__"):
                target = target[part]
            target[name] = value
        return config

    for config, words in (
        (upgraded(base, freeze=(), width=32), "holds another model; the first difference is at"),
        (change(model__vit__encoder__width=32), "holds another model; the first difference is at"),
        (change(model__quantizer__l2_normalize=True), "config.training.freeze is to keep codes"),
        (change(model__vit__encoder__heads=4), "config.training.freeze is to keep codes"),
    ):
        with pytest.raises(CheckpointError) as error:
            start(config)
        assert words in str(error.value) and "\n" not in str(error.value)

    config = upgraded(base, freeze=("decoder",))
    with pytest.raises(ConfigError, match="freeze has 'decoder'; it takes encoder and quantizer"):
        validate(config)
    config = upgraded(base)
    config.training.initialize_from = ""
    with pytest.raises(ConfigError, match="set config.training.initialize_from"):
        validate(config)


def test_the_fingerprint_sees_what_is_frozen(base):
    """Else the other tests would say nothing."""
    tokenizer = vqgan_jax.load(base / "tokenizer")
    for name in ("encoder", "decoder"):
        params = dict(tokenizer.variables["params"])
        params[name] = jax.tree.map(lambda leaf: leaf + 1e-3, params[name])
        other = Tokenizer(tokenizer.config, tokenizer.variables | {"params": params})
        assert (other.fingerprint == tokenizer.fingerprint) == (name == "decoder")


@pytest.mark.slow
def test_a_transformer_draws_with_another_decoder(tmp_path):
    small.write_models(tmp_path)
    own = vqgan_jax.load(tmp_path / "tokenizer")

    def write(name):
        params = dict(own.variables["params"])
        params[name] = jax.tree.map(lambda leaf: 1.5 * leaf, params[name])
        write_export(tmp_path / name, own.config, own.variables | {"params": params})
        return tmp_path / name

    before = vqgan_jax.load(tmp_path / "transformer")
    after = vqgan_jax.load(tmp_path / "transformer", tokenizer=write("decoder"))
    codes = before.sample_codes(0, 4)
    np.testing.assert_array_equal(after.sample_codes(0, 4), codes)
    shown = (np.asarray(after.tokenizer.decode(codes.reshape(4, 4, 4))) + 1) * 127.5
    drawn = after.sample(0, 4).astype(np.float32)
    np.testing.assert_allclose(drawn, shown, atol=1.0)
    assert np.abs(drawn - before.sample(0, 4)).max() > 10
    assert after.fingerprint != before.fingerprint
    with pytest.raises(CheckpointError, match="gives other codes than the tokenizer of"):
        vqgan_jax.load(tmp_path / "transformer", tokenizer=write("encoder"))
    with pytest.raises(CheckpointError, match="is a tokenizer itself"):
        vqgan_jax.load(tmp_path / "tokenizer", tokenizer=tmp_path / "decoder")
