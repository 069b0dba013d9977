"""Tokenizers of all quantizers: configs, fingerprints, several codes a position from end to end."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image

import tiny
from vqgan_jax.configuration import (
    ConfigError,
    from_json,
    to_json,
    tokenizer_config,
    transformer_config,
    validate,
)
from vqgan_jax.data import code_report
from vqgan_jax.data.code_manifest import CodesInfo
from vqgan_jax.data.code_report import verify
from vqgan_jax.data.code_writer import CodeWriter
from vqgan_jax.data.codes import open_codes
from vqgan_jax.errors import DataError
from vqgan_jax.inference import Tokenizer, load_tokenizer
from vqgan_jax.inference.reconstruct import reconstruct
from vqgan_jax.inference.tokenize import tokenize
from vqgan_jax.interop import taming
from vqgan_jax.interop.taming_yaml import ConversionError, yaml_from_config
from vqgan_jax.metrics.codebook import code_counts, perplexity, usage
from vqgan_jax.stored_conditions import open_condition
from vqgan_jax.training.checkpoints import write_export
from vqgan_jax.training.game import Game
from vqgan_jax.training.generator_step import Running, generator_gradients
from vqgan_jax.training.run_tokenizers import tokenizers_of_run
from vqgan_jax.training.states import TokenizerState

COUNT, SIDE = 6, 32

# ---- Configs.


def print_codes(directory):
    print(*code_report.lines(code_report.describe_codes(pathlib.Path(directory))), sep="\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(kind="fsq", levels=(8, 5), code_dim=2),
            "FSQ levels do not multiply to codebook_size",
        ),
        (dict(kind="fsq", levels=(32, 32)), "levels has 2, and config.model.quantizer.code_dim is"),
        (dict(kind="fsq"), "FSQ needs whole numbers above 1"),
        (dict(kind="fsq", levels=(1024, 1), code_dim=2), "each number must be at least 2"),
        (dict(kind="lfq", code_dim=9), "LFQ needs codebook_size = 2^code_dim"),
        (dict(kind="lfq", code_dim=10), "set config.loss.entropy"),
        (dict(kind="lfq", codebook_size=2**40, code_dim=40), "at least 1 and at most 16777216"),
        (dict(restart_below=0.2), "restart_below is for ema"),
        (dict(kind="lfq", code_dim=10, gradient="rotation"), "nearest, ema, simvq, residual, prod"),
        (dict(kind="residual"), "depth above 1; with one code a position it is nearest"),
        (dict(kind="residual", depth=2, l2_normalize=True), "l2_normalize is for nearest, ema"),
        (dict(kind="product", depth=3), "code_dim 256 is not divisible into"),
        (dict(depth=2), "depth=2 is for residual, product; config.model.quantizer.kind is nearest"),
        (dict(shared_codebook=True), "shared_codebook is for residual, product"),
        (dict(levels=(8, 8)), "levels is for fsq"),
        (
            dict(kind="simvq", kmeans_init=True),
            "kmeans_init is for nearest, ema, residual, product",
        ),
        (dict(gradient="rotated"), "must be one of straight_through, rotation"),
        (dict(depth=0), "depth is 0; it must be at least 1"),
    ],
)
def test_wrong_combinations_are_one_line(changes, message):
    config = tokenizer_config()
    config.model.quantizer.update(changes)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_entropy_is_for_quantizers_with_one_codebook():
    config = tokenizer_config()
    config.loss.entropy = 0.1
    validate(config)
    config.model.quantizer.kind = "ema"
    with pytest.raises(ConfigError, match="config.loss.entropy is for nearest, simvq, lfq"):
        validate(config)


@pytest.mark.parametrize(
    "changes",
    [
        dict(kind="fsq", levels=(8, 5, 5, 5), codebook_size=1000, code_dim=4),
        dict(kind="lfq", codebook_size=2**18, code_dim=18),
        dict(kind="simvq", gradient="rotation", l2_normalize=True),
        dict(kind="residual", depth=4, shared_codebook=True, kmeans_init=True),
        dict(kind="product", depth=8, l2_normalize=True),
    ],
)
def test_right_combinations_come_back_from_json(changes):
    config = tokenizer_config()
    config.model.quantizer.update(changes)
    config.loss.entropy = 0.1 if changes["kind"] == "lfq" else 0.0
    validate(config)
    assert from_json(to_json(config)).to_dict() == config.to_dict()


def test_configs_from_before_these_keys_are_read():
    values = json.loads(to_json(tokenizer_config()))
    old = ("kind", "codebook_size", "code_dim", "l2_normalize")
    old += ("kmeans_init", "ema_decay", "restart_below")
    values["model"]["quantizer"] = {key: values["model"]["quantizer"][key] for key in old}
    for key in ("entropy", "entropy_temperature", "entropy_bits"):
        del values["loss"][key]
    assert from_json(json.dumps(values)).to_dict() == tokenizer_config().to_dict()


@pytest.mark.parametrize("kind", ["simvq", "fsq", "lfq", "residual", "product"])
def test_the_reference_has_no_such_quantizer(kind):
    config = tiny.config_of_tiny_model(kind=kind)
    for convert in (
        lambda: yaml_from_config(config),
        lambda: taming.state_dict_from_variables({"params": {}}, config),
    ):
        with pytest.raises(ConversionError, match=f"no quantizer of the kind {kind}"):
            convert()


# ---- Training.

TINY = {
    "simvq": dict(kind="simvq", gradient="rotation"),
    "fsq": dict(kind="fsq", levels=(4, 4, 2), code_dim=3),
    "lfq": dict(kind="lfq", code_dim=5),
    "residual": dict(kind="residual", depth=3),
    "product": dict(kind="product", depth=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_gradients_have_the_shapes_of_the_parameters(name):
    """Traced, not run: whatever a quantizer learns, and be it nothing, goes through the step."""
    config = tiny.config_of_tiny_model(**TINY[name])
    config.loss.perceptual, config.discriminator.enabled = 0.0, False
    config.loss.entropy = 0.1 if name in ("simvq", "lfq") else 0.0
    validate(config)
    game, images = Game.from_config(config), jnp.asarray(tiny.random_images(2, 8, 8, 3))

    def step(images):
        generator = game.init_generator(game.tokenizer.init(jax.random.key(0), images))
        state = TokenizerState(jnp.zeros((), jnp.int32), generator, None)
        running = Running(generator.codebook, {})
        running, gradients, metrics, _ = generator_gradients(
            game, state, running, images, 0, None, playing=False
        )
        return generator, gradients, running.codebook, metrics

    generator, gradients, codebook, metrics = jax.eval_shape(step, images)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (gradients, codebook)]
    assert shapes == [jax.tree.map(jnp.shape, t) for t in (generator.params, generator.codebook)]
    assert ("raw/quantization" in metrics) == (name != "fsq")
    assert ("weighted/entropy" in metrics) == (config.loss.entropy > 0)
    assert metrics["batch_codebook/usage"].shape == metrics["loss/quantization"].shape == ()


# ---- Figures of several codes a position.


def test_each_step_counts_its_codes_by_itself():
    codes = np.random.default_rng(0).integers(0, 5, (4, 3, 3, 2))
    codes[..., 1] = np.where(codes[..., 1] > 2, 0, codes[..., 1])
    mask = np.array([True, True, False, True])
    counts = np.asarray(code_counts(codes, 7, mask, depth=2))
    expected = [np.bincount(codes[mask][..., d].ravel(), minlength=7) for d in range(2)]
    np.testing.assert_array_equal(counts, expected)
    assert usage(counts) == pytest.approx((5 / 7 + 3 / 7) / 2)
    entropies = [scipy.stats.entropy(own) for own in expected]
    assert perplexity(counts) == pytest.approx(np.exp(np.mean(entropies)), rel=1e-5)


# ---- Codes on disk.


def info_of(depth):
    return CodesInfo(
        dataset="folder:photographs",
        split="train",
        image_key="image",
        count=10,
        class_names=None,
        resolution=32,
        resize=32,
        augmentations=("centre", "flip"),
        grid=(2, 4),
        codebook_size=1000,
        fingerprint="5" * 64,
        dtype="float32",
        images_per_shard=4,
        depth=depth,
    )


def test_codes_of_a_position_stay_together_on_disk(tmp_path, capsys):
    info, random = info_of(3), np.random.default_rng(0)
    codes = random.integers(0, 1000, (10, 2, 2, 4, 3))
    writer = CodeWriter(tmp_path / "train", info)
    writer.begin()
    for shard in writer.unfinished():
        own = codes[info.images_of(shard)]
        writer.write(shard, own.reshape(len(own), 2, -1), np.full(len(own), -1))
    writer.finish()
    assert json.loads((tmp_path / "train/manifest.json").read_text())["depth"] == 3
    assert np.load(tmp_path / "train/codes-00000-of-00003.npy").shape == (4, 2, 24)
    opened = open_codes(tmp_path / "train", verify=True)
    assert opened.depth == 3 and opened.grid == (2, 4)
    np.testing.assert_array_equal(opened.gather(np.arange(10), 1).reshape(10, 2, 4, 3), codes[:, 1])
    print_codes(str(tmp_path / "train"))
    used = np.mean([len(np.unique(codes[:, 0, ..., d])) / 1000 for d in range(3)])
    printed = capsys.readouterr().out
    assert "2x4x3 a view" in printed and f"{used:.1%} used" in printed
    with pytest.raises(DataError, match="its depth is 3, and here it is 1"):
        CodeWriter(tmp_path / "train", info_of(1))


# ---- A tokenizer with several codes a position.


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for i in range(COUNT):
        small = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8))
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    config = tiny.config_of_tiny_model(kind="residual", depth=3, kmeans_init=True)
    config.loss.perceptual_network.path = "missing"
    path = tmp_path_factory.mktemp("exports") / "residual"
    write_export(path, config, tiny.initial_variables(config))
    return path


def images_of(folder):
    pixels = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    return np.stack(pixels) / np.float32(127.5) - 1


@pytest.mark.slow
def test_several_codes_a_position_from_images_to_disk_and_back(
    export, photographs, tmp_path, capsys
):
    tokenizer = load_tokenizer(export)
    images = images_of(photographs)
    codes = tokenizer.encode(images)
    assert codes.shape == (COUNT, 16, 16, 3) and tokenizer.depth == 3
    whole, quantized = jax.jit(tokenizer.module.apply)(tokenizer.variables, images)
    np.testing.assert_array_equal(codes, quantized.codes)
    decoded = tokenizer.decode(np.asarray(codes))
    np.testing.assert_allclose(decoded, np.clip(whole, -1, 1), atol=2e-5)
    for wrong in (codes[..., 0], codes[..., :2]):
        with pytest.raises(ValueError, match=r"they must be integers \(B, h, w, 3\)"):
            tokenizer.decode(wrong)

    tokenize(str(export), tmp_path / "codes", f"folder:{photographs}", ["all"], batch_size=1)
    verify(str(tmp_path / "codes"))
    opened = open_codes(tmp_path / "codes" / "all")
    stored = opened.gather(np.arange(COUNT)).reshape(COUNT, *opened.grid, opened.depth)
    assert np.mean(stored == codes) > 0.99  # rounding decides ties

    summary = reconstruct(str(export), [str(photographs)], tmp_path / "seen", batch_size=COUNT)
    used = [len(np.unique(codes[..., d])) / 32 for d in range(3)]
    assert summary["codebook_usage"] == pytest.approx(np.mean(used), abs=0.03)
    assert 1 < summary["codebook_perplexity"] <= 32


@pytest.mark.slow
def test_transformers_refuse_several_codes_a_position(export, tmp_path):
    config = transformer_config()
    config.tokenizer.path = str(export)
    with pytest.raises(DataError) as error:
        tokenizers_of_run(config, tmp_path)
    message = "tokenizer gives 3 codes a position (config.model.quantizer.kind is residual)"
    assert message in str(error.value) and "\n" not in str(error.value)
    data = tokenizer_config().data
    with pytest.raises(DataError, match="tokenizer of the condition edges gives 3 codes"):
        open_condition(f"edges={export}", 2, data, "train", SIDE)


# ---- Fingerprints.


def fingerprint(changes, variables):
    return Tokenizer(tiny.config_of_tiny_model(**changes), variables).fingerprint


def test_fingerprints_cover_what_quantizers_learn_and_what_they_do_not():
    def simvq(matrix=1.0, codebook=2.0, decoder=3.0):
        variables = {
            "params": {
                "quantize": {"map": np.full((8, 8), matrix)},
                "decoder": {"kernel": np.full(3, decoder)},
            },
            "codebook": {"quantize": {"embedding": np.full((32, 8), codebook)}},
        }
        return fingerprint(dict(kind="simvq"), variables)

    assert simvq() == simvq(decoder=4.0)
    assert len({simvq(), simvq(matrix=1.1), simvq(codebook=2.1)}) == 3

    def several(second=0.0, **changes):
        books = {f"codebooks_{i}": {"codebook": np.full((32, 8), second * i)} for i in range(2)}
        variables = {"params": {"quantize": books}}
        return fingerprint(dict(kind="residual", depth=2) | changes, variables)

    assert len({several(), several(second=1.0), several(depth=3)}) == 3
    assert several() == several(gradient="rotation", kmeans_init=True)  # of training alone

    levels = [dict(kind="fsq", levels=levels, code_dim=3) for levels in ((4, 4, 2), (2, 4, 4))]
    assert len({fingerprint(changes, {"params": {}}) for changes in levels}) == 2


def test_fingerprints_of_older_kinds_are_as_they_were():
    """Codes on disk name them; the value was computed before there were other quantizers."""
    variables = {"params": {"quantize": {"codebook": np.arange(256).reshape(32, 8) / 256}}}
    assert fingerprint(dict(kind="nearest"), variables) == GOLDEN


GOLDEN = "b5d07f16996412c8de7b81530a3b0a17ea426f627109cc2194a7014004b18551"
