"""Configs: JSON and back, checks that name the key, and every file of configs/."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from vqgan_jax.configuration import (
    ConfigError,
    downsampling_factor,
    from_json,
    parse_argument,
    to_json,
    tokenizer_config,
    validate,
)
from vqgan_jax.data.images import prepare_images
from vqgan_jax.training.game import Game
from vqgan_jax.training.learner import Learner

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def module_of(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = sorted(CONFIGS.glob("*.py"))
VARIANTS = [(path, argument) for path in FILES for argument in module_of(path).VARIANTS]
# The others have the same networks in other sizes, or for other data.
BUILT = ("quickstart:", "vqgan_segmentation:earth", "transformer_conditional:drin", "vim:earth")


@pytest.mark.parametrize(("path", "argument"), VARIANTS)
def test_config_file_validates(path, argument):
    config = module_of(path).get_config(argument)
    assert config.is_locked
    validate(config)
    assert from_json(to_json(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("path", "argument"),
    [
        pytest.param(
            path,
            argument,
            id=f"{path.stem}:{argument}",
            marks=() if f"{path.stem}:{argument}" in BUILT else pytest.mark.slow,
        )
        for path, argument in VARIANTS
    ],
)
def test_config_file_builds(path, argument):
    config = module_of(path).get_config(argument)
    values = config.to_dict() | {"data": config.data.to_dict() | {"name": ""}}
    built = json.dumps(values, sort_keys=True, default=str)
    if built in _BUILT:  # those that differ by where images are alone
        return
    _BUILT.add(built)
    if config.stage == "tokenizer":
        assert_tokenizer_builds(config)
    else:
        assert_transformer_builds(config)


def assert_transformer_builds(config):
    config.model.codebook_size, config.model.grid, config.condition.num_classes = 1024, (16, 16), 10
    config.condition.layout.num_classes = 10
    for image in config.condition.images.values():
        image.codebook_size, image.grid = 256, (16, 16)
    state = jax.eval_shape(Learner.from_config(config).init)
    assert state.params["blocks"]["attention"]["out"]["kernel"].shape == (
        config.model.num_layers,
        config.model.width,
        config.model.width,
    )


def assert_tokenizer_builds(config):
    game, side = Game.from_config(config), config.model.resolution
    label_map = config.data.num_labels > 0
    shape = (config.training.batch_size, side, side, *([] if label_map else [3]))
    raw = jax.ShapeDtypeStruct(shape, jnp.uint8)
    state = jax.eval_shape(lambda x: game.init(prepare_images(config, x)), raw)
    reconstructions, quantized = jax.eval_shape(
        lambda state, x: game.tokenizer.apply(
            state.generator.inference_variables, prepare_images(config, x)
        ),
        state,
        raw,
    )
    codes_side = side // downsampling_factor(config.model)
    assert reconstructions.shape == (*shape[:3], config.model.out_channels)
    assert quantized.codes.shape[:3] == (shape[0], codes_side, codes_side)


_BUILT = set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_file_refuses_an_argument_that_it_does_not_know(path):
    with pytest.raises(ConfigError, match="'colour=red' is unknown; it takes data="):
        module_of(path).get_config("earth,colour=red")


def test_arguments_take_the_type_of_their_defaults():
    parsed = parse_argument("folder=a/b,codes=16", data="earth", codes=8)
    assert parsed.to_dict() == {"data": "folder:a/b", "codes": 16}
    parsed = parse_argument("codes=16,data=imagenet2012", data="earth", codes=8, rate=0.5)
    assert parsed.to_dict() == {"data": "imagenet2012", "codes": 16, "rate": 0.5}
    assert parse_argument("", data="earth").data == "earth"
    assert parse_argument("cifar10", data="earth").data == "cifar10"
    with pytest.raises(ConfigError, match="'codes=many' needs a value like 8"):
        parse_argument("codes=many", codes=8)


def test_json_and_back_gives_the_same_config():
    config = tokenizer_config()
    config.model.channel_multipliers = (1, 2)
    config.discriminator.warmup_steps = 7
    config.sharding_rules = (("kernel$", (None, "fsdp")),)
    restored = from_json(to_json(config))
    assert restored.to_dict() == config.to_dict()
    assert restored.model.channel_multipliers == (1, 2)
    assert restored.sharding_rules == (("kernel$", (None, "fsdp")),)
    assert restored.is_locked and restored.is_type_safe
    assert isinstance(restored.model.quantizer, ConfigDict)


def test_config_of_an_older_version_gets_todays_defaults():
    stored = json.loads(to_json(tokenizer_config()))
    del stored["optimizer"]["accumulate"], stored["mesh"]
    stored["model"]["channels"] = 64
    config = from_json(json.dumps(stored))
    assert (config.optimizer.accumulate, config.mesh.data, config.model.channels) == (1, -1, 64)


def test_misspelt_keys_and_wrong_types_are_errors():
    config = tokenizer_config()
    with pytest.raises(AttributeError, match="chanels"):
        config.model.chanels = 3
    with pytest.raises(TypeError):
        config.training.batch_size = "many"
    with pytest.raises(TypeError):
        config.model.remat = 0.5


def test_defaults_are_the_f16_model_of_the_paper():
    config = tokenizer_config()
    validate(config)
    assert downsampling_factor(config.model) == 16
    assert config.loss.commitment == 0.25 and config.discriminator.start == 250_001


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.quantizer.kind", "vector", "'vector'; it must be one of nearest, ema, gumbel"),
        ("model.dtype", "float16", "'float16'; it must be one of auto, float32, bfloat16"),
        ("discriminator.kind", "dino", "'dino'; it must be one of patch, stylegan"),
        ("discriminator.group_size", 0, "is 0; it must be at least 1"),
        ("discriminator.r1_interval", 0, "is 0; it must be at least 1"),
        ("loss.logit_laplace", 0.1, "set config.model.logit_laplace"),
        ("optimizer.first_moment", "int8", "float32, bfloat16"),
        ("optimizer.decay_start", -1, "must be at least 0"),
        ("discriminator.norm", "layer", "'layer'; it must be one of batch, act, group"),
        ("discriminator.loss", "wasserstein", "hinge, vanilla, non_saturating"),
        ("loss.perceptual_network.backbone", "resnet", "vgg16, alexnet"),
        ("optimizer.schedule", "linear", "constant, cosine"),
        ("model.resolution", 100, "factor 16 does not divide; take 96"),
        ("model.resolution", 8, "take 16"),
        ("model.resolution", 0, "is 0; it must be at least 1"),
        (
            "model.channels",
            48,
            "48 channels, which config.model.num_groups 32",
        ),
        ("loss.binary_cross_entropy", 1.0, "set config.data.num_labels"),
        ("data.num_labels", 7, "a channel for each label"),
        ("model.in_channels", 4, "and out_channels are 4 and 3, and the data has 4 channels"),
        ("optimizer.accumulate", 5, "batch_size 12 is not divisible by"),
        ("optimizer.accumulate", 0, "is 0; it must be at least 1"),
        ("training.batch_size", 0, "is 0; it must be at least 1"),
        ("training.num_steps", -1, "is -1; it must be at least 1"),
        ("training.log_every", 0, "is 0; it must be at least 1"),
        ("training.evaluate_every", 0, "is 0; it must be at least 1"),
        ("training.checkpoint_every", 0, "is 0; it must be at least 1"),
        ("training.keep_latest", 0, "is 0; it must be at least 1"),
        ("training.grid_images", 0, "is 0; it must be at least 1"),
        ("model.quantizer.codebook_size", 0, "is 0; it must be at least 1"),
        ("model.quantizer.code_dim", 0, "is 0; it must be at least 1"),
    ],
)
def test_message_names_the_key(key, value, message):
    config = tokenizer_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert f"config.{key}" in str(caught.value) and message in str(caught.value)


def test_label_map_needs_its_loss_and_its_channels():
    config = tokenizer_config()
    config.data.num_labels = config.model.in_channels = config.model.out_channels = 7
    with pytest.raises(ConfigError, match="config.loss.binary_cross_entropy"):
        validate(config)
    config.loss.binary_cross_entropy = 1.0
    validate(config)
    config.model.out_channels = 3
    with pytest.raises(ConfigError, match="are 7 and 3, and the data has 7 channels"):
        validate(config)


def test_label_maps_have_a_loss_of_their_own():
    config = tokenizer_config()
    config.update_from_flattened_dict(
        {"data.num_labels": 7, "model.in_channels": 7, "model.out_channels": 7}
    )
    with pytest.raises(ConfigError, match=r"config\.loss\.binary_cross_entropy: set it to 1"):
        validate(config)
