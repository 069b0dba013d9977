"""The reference's checkpoints: forward passes against its numbers, and the way back."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import programs
import tiny
from vqgan_jax.configuration import ConfigError, from_json, to_json, tokenizer_config
from vqgan_jax.interop import conversion, taming
from vqgan_jax.interop.taming_options import ConversionError
from vqgan_jax.interop.taming_yaml import config_from_yaml, yaml_from_config
from vqgan_jax.interop.torch_file import read_checkpoint
from vqgan_jax.interop.torch_writer import write_checkpoint
from vqgan_jax.models.discriminator import PatchDiscriminator
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.training.checkpoints import read_variables

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CHECKPOINT, DESCRIPTION = GOLDENS / "taming_vqgan.ckpt", GOLDENS / "taming_vqgan.yaml"
CLASSES = {
    "taming_vqgan": "VQModel",
    "taming_gumbel": "GumbelVQ",
    "taming_segmentation": "VQSegmentationModel",
}


def description_of(golden):
    meta = json.loads(str(golden["meta"]))
    params = {key: meta[key] for key in ("ddconfig", "n_embed", "embed_dim")}
    if "n_labels" in meta:
        params["n_labels"] = meta["n_labels"]
    return params


def vqgan(config):
    return VQGAN.from_config(config.model.to_dict(), jnp.float32)


def nhwc(images):
    return np.transpose(images, (0, 2, 3, 1))


def relative_error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def description():
    return yaml.safe_load(DESCRIPTION.read_text())


@pytest.fixture(scope="module")
def state_dict():
    return taming.state_dict_of(read_checkpoint(CHECKPOINT))


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_converted_models_compute_what_the_reference_computes(name):
    golden = np.load(GOLDENS / f"{name}.npz")
    params = description_of(golden)
    config = config_from_yaml({"target": f"taming.models.vqgan.{CLASSES[name]}", "params": params})
    weights = {key[7:]: golden[key] for key in golden.files if key.startswith("params/")}
    variables, report = taming.variables_from_state_dict(weights, config)
    if name == "taming_segmentation":
        images = np.eye(params["n_labels"], dtype=np.float32)[golden["labels"]]
        expected = golden["fwd/logits"]
    else:
        images = nhwc(golden["x"][0] if golden["x"].ndim == 5 else golden["x"])
        expected = golden["fwd/reconstruction"]
    reconstructions, quantized = jax.jit(vqgan(config).apply)(variables, images)
    assert relative_error(reconstructions, nhwc(expected)) < 1e-4
    np.testing.assert_array_equal(quantized.codes, golden["fwd/indices"])

    assert report.model == CLASSES[name]
    assert report.codebook == (params["n_embed"], params["embed_dim"])
    assert report.parameters == sum(
        value.size for key, value in weights.items() if not key.startswith("loss.")
    )


@pytest.mark.parametrize("name", CLASSES)
def test_there_and_back_is_the_same_state_dict(name):
    golden = np.load(GOLDENS / f"{name}.npz")
    target = f"taming.models.vqgan.{CLASSES[name]}"
    description = {"target": target, "params": description_of(golden)}
    weights = {key[7:]: golden[key] for key in golden.files if key.startswith("params/")}
    if name == "taming_vqgan":
        description = yaml.safe_load(DESCRIPTION.read_text())
    config = config_from_yaml(description)
    variables, _ = taming.variables_from_state_dict(weights, config)
    discriminator = taming.discriminator_from_state_dict(weights, config)
    back = taming.state_dict_from_variables(variables, config, discriminator)
    if name == "taming_segmentation":
        assert back.pop("colorize").shape == (3, 5, 1, 1)
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert back[key].dtype == value.dtype and back[key].flags.c_contiguous
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(back[key], value, key)
    assert config_from_yaml(yaml_from_config(config)).to_dict() == config.to_dict()


def test_the_full_size_model_has_the_names_and_counts_of_the_published_files():
    # "imagenet f16": parameters and tensor names as documented for the reference's code
    config = tokenizer_config()
    tensors = taming._generator_tensors(config)
    sizes = {name: int(np.prod(tensor.shape)) for name, tensor in tensors.items()}

    def count(prefix):
        return sum(size for name, size in sizes.items() if name.startswith(prefix))

    assert count("encoder.") == 29_298_176
    assert count("decoder.") == 42_449_795
    assert count("") == 72_141_699
    assert tensors["encoder.down.2.block.0.nin_shortcut.weight"].shape == (256, 128, 1, 1)
    assert tensors["encoder.down.4.attn.1.proj_out.weight"].shape == (512, 512, 1, 1)
    assert tensors["decoder.up.4.attn.2.q.bias"].shape == (512,)
    assert tensors["decoder.up.3.upsample.conv.weight"].shape == (256, 256, 3, 3)
    assert tensors["decoder.conv_out.weight"].shape == (3, 128, 3, 3)
    assert tensors["quantize.embedding.weight"].shape == (1024, 256)
    discriminator = taming._discriminator_tensors(config)
    assert discriminator["loss.discriminator.main.8.weight"].shape == (512, 256, 4, 4)
    assert discriminator["loss.discriminator.main.9.running_var"].shape == (512,)
    statistics = [name for name in discriminator if "running" in name]
    assert (
        sum(
            int(np.prod(tensor.shape))
            for name, tensor in discriminator.items()
            if name not in statistics
        )
        == 2_765_633
    )


def numpy_discriminator(state_dict, images):
    """Evaluation mode; convolutions as sums over windows, NCHW."""
    x = images.astype(np.float64)
    for position, stride in ((0, 2), (2, 2), (5, 1), (8, 1)):
        layer = f"loss.discriminator.main.{position}"
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (4, 4), axis=(2, 3))
        windows = windows[:, :, ::stride, ::stride]
        x = np.einsum("bchwij,ocij->bohw", windows, state_dict[f"{layer}.weight"])
        if f"{layer}.bias" in state_dict:
            x = x + state_dict[f"{layer}.bias"][:, None, None]
        norm = f"loss.discriminator.main.{position + 1}"
        if f"{norm}.running_mean" in state_dict:
            mean, variance, scale, bias = (
                state_dict[f"{norm}.{name}"][:, None, None].astype(np.float64)
                for name in ("running_mean", "running_var", "weight", "bias")
            )
            x = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias
        if f"{norm}.loc" in state_dict:
            x = state_dict[f"{norm}.scale"] * (x + state_dict[f"{norm}.loc"])
        if position < 8:
            x = np.where(x > 0, x, 0.2 * x)
    return x


@pytest.mark.parametrize("norm", ["batch", "act"])
def test_the_discriminator_computes_what_numpy_does(state_dict, description, norm):
    config = config_from_yaml(description)
    config.discriminator.norm = norm
    images = np.load(GOLDENS / "taming_vqgan.npz")["x"][0]
    module = PatchDiscriminator(16, 2, norm)
    if norm == "act":
        random = np.random.default_rng(0)
        variables = jax.tree.map(
            lambda leaf: random.standard_normal(leaf.shape, np.float32),
            jax.eval_shape(module.init, jax.random.key(0), nhwc(images)),
        )
        generator, _ = taming.variables_from_state_dict(state_dict, config)
        state_dict = taming.state_dict_from_variables(generator, config, variables)
        assert state_dict["loss.discriminator.main.3.loc"].shape == (1, 32, 1, 1)
        assert state_dict["loss.discriminator.main.3.initialized"] == 1
        again = taming.discriminator_from_state_dict(state_dict, config)
        jax.tree.map(np.testing.assert_array_equal, again, dict(variables))
    variables = taming.discriminator_from_state_dict(state_dict, config)
    expected = numpy_discriminator(state_dict, images)
    assert relative_error(module.apply(variables, nhwc(images)), nhwc(expected)) < 1e-5


@pytest.mark.slow
def test_a_normalised_moving_average_codebook_gives_the_same_codes_as_a_plain_one(
    state_dict, description
):
    config = config_from_yaml(description)
    variables, _ = taming.variables_from_state_dict(state_dict, config)
    config.model.quantizer.kind = "ema"
    config.model.quantizer.l2_normalize = True
    del variables["params"]["quantize"]
    scales = np.linspace(0.1, 3, 64, dtype=np.float32)[:, None]
    codebook = scales * np.random.default_rng(0).standard_normal((64, 16), np.float32)
    variables["codebook"] = {
        "quantize": {"embedding": codebook, "counts": np.ones(64), "sums": codebook}
    }
    images = nhwc(np.load(GOLDENS / "taming_vqgan.npz")["x"][0])
    reconstructions, quantized = jax.jit(vqgan(config).apply)(variables, images)

    plain = config_from_yaml(yaml_from_config(config))
    assert plain.model.quantizer.kind == "nearest" and not plain.model.quantizer.l2_normalize
    exported = taming.state_dict_from_variables(variables, config)
    variables, _ = taming.variables_from_state_dict(exported, plain)
    plain_reconstructions, plain_quantized = jax.jit(vqgan(plain).apply)(variables, images)
    assert len(np.unique(quantized.codes)) > 20
    np.testing.assert_array_equal(plain_quantized.codes, quantized.codes)
    assert relative_error(plain_reconstructions, np.asarray(reconstructions)) < 1e-4


def test_half_precision_weights_and_training_extras_are_taken_in_stride(state_dict, description):
    config = config_from_yaml(description)
    extended = {name: np.float16(value) for name, value in state_dict.items()}
    extended["loss.perceptual_loss.lin0.model.1.weight"] = np.ones((1, 64, 1, 1))
    extended["colorize"] = np.ones((3, 5, 1, 1))
    variables, report = taming.variables_from_state_dict(extended, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert report.left_out == {
        "loss.discriminator": 16,
        "loss.perceptual_loss": 1,
        "colorize": 1,
    }


def test_the_yaml_sets_every_key(description):
    config = config_from_yaml({**description, "data": {"params": {"batch_size": 5}}})
    assert config.model.channel_multipliers == (1, 2)
    assert config.model.attention_resolutions == (16,)
    assert config.model.quantizer.to_dict()["codebook_size"] == 64
    assert (config.discriminator.start, config.discriminator.channels) == (1, 16)
    assert config.training.batch_size == 5
    assert from_json(to_json(config)).to_dict() == config.to_dict()

    gumbel = json.loads(json.dumps(description["model"]))
    gumbel["target"] = "taming.models.vqgan.GumbelVQ"
    gumbel["params"] |= {
        "embed_dim": 32,
        "kl_weight": "1e-8",  # what plain yaml makes of 1e-8
        "temperature_scheduler_config": {
            "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
            "params": dict(
                warm_up_steps=7, max_decay_steps=99, lr_start=0.5, lr_max=0.9, lr_min="1e-6"
            ),
        },
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
    }
    config = config_from_yaml(gumbel)
    assert config.model.quantizer.kind == "gumbel" and config.loss.kl == 1e-8
    assert config.temperature.to_dict() == dict(
        warmup_steps=7, decay_steps=99, start=0.5, peak=0.9, end=1e-6
    )
    assert not config.discriminator.enabled
    assert config_from_yaml(yaml_from_config(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (
            "target",
            "taming.models.cond_transformer.Net2NetTransformer",
            "supported are VQModel, GumbelVQ",
        ),
        ("target", "somewhere.Else", "supported are VQModel"),
        ("params.ddconfig.double_z", True, "ddconfig.double_z is True"),
        ("params.ddconfig.resamp_with_conv", False, "ddconfig.resamp_with_conv is False"),
        ("params.ddconfig.ch", 20, "num_groups 32 does not divide"),
        ("params.ddconfig.ch", "many", "ch is 'many'"),
        ("params.ddconfig.ch_mult", 4, "list of whole numbers"),
        ("params.ddconfig.z_channels", None, "z_channels is None"),
        ("params.remap", "used.npy", "remap"),
        ("params.n_embed", 0.5, "n_embed is 0.5"),
        ("params.lossconfig.target", "my.Loss", "lossconfig.target is 'my.Loss'"),
        ("params.lossconfig.params.disc_conditional", True, "disc_conditional is True"),
        ("params.lossconfig.params.disc_in_channels", 6, "disc_in_channels is 6"),
        ("params.lossconfig.params.disc_loss", "wasserstein", "discriminator.loss"),
        ("params.lossconfig.params.lambda", 1, "lossconfig.params.lambda is not supported"),
        ("params.ddconfig", None, "model.params.ddconfig is missing"),
    ],
)
def test_what_the_yaml_may_not_say(description, path, value, problem):
    model = json.loads(json.dumps(description["model"]))
    *parents, key = path.split(".")
    part = model
    for parent in parents:
        part = part[parent]
    part[key] = value
    with pytest.raises((ConversionError, ConfigError), match=problem) as caught:
        config_from_yaml(model)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_named(state_dict, description):
    config = config_from_yaml(description)

    def problem(**changes):
        changed = dict(state_dict)
        for name, value in changes.items():
            if value is None:
                del changed[name]
            else:
                changed[name] = value
        with pytest.raises(ConversionError) as caught:
            taming.variables_from_state_dict(changed, config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "1 missing (quant_conv.bias (16,))" in problem(**{"quant_conv.bias": None})
    assert "1 unexpected (new (2,))" in problem(new=np.zeros(2))
    assert "quant_conv.bias (3,) instead of (16,)" in problem(**{"quant_conv.bias": np.zeros(3)})
    codebook = problem(**{"quantize.embedding.weight": np.zeros((99, 16))})
    assert "n_embed is 64" in codebook and "must be 99" in codebook
    codebook = problem(**{"quantize.embedding.weight": np.zeros((64, 7))})
    assert "embed_dim is 16" in codebook and "must be 7" in codebook
    assert "ddconfig.ch is 32" in problem(**{"encoder.conv_in.weight": np.zeros((64, 3, 3, 3))})
    assert "GumbelVQ" in problem(**{"quantize.proj.weight": np.zeros((64, 32, 1, 1))})
    assert "remapped" in problem(**{"quantize.used": np.zeros(3)})
    broken = np.full(16, np.nan, np.float32)
    assert "not finite (params.quant_conv.bias)" in problem(**{"quant_conv.bias": broken})
    with pytest.raises(ConversionError, match="holds no tokenizer"):
        taming.state_dict_of({"weight": np.zeros(1)})
    with pytest.raises(ConversionError, match="is a transformer's"):
        taming.state_dict_of({"state_dict": {"first_stage_model.quant_conv.bias": np.zeros(1)}})
    config.discriminator.num_layers = 3
    with pytest.raises(ConversionError, match=r"main\.11\.weight"):
        taming.discriminator_from_state_dict(state_dict, config)


def test_the_command_there_and_back(tmp_path, capsys, state_dict):
    export, back = tmp_path / "export", tmp_path / "back.ckpt"
    conversion.convert(CHECKPOINT, DESCRIPTION, export)
    printed = capsys.readouterr().out
    assert "VQModel f2" in printed and "740,659" in printed and "64 codes of 16" in printed
    config, variables, discriminator = read_variables(export)
    assert discriminator is not None
    images = nhwc(np.load(GOLDENS / "taming_vqgan.npz")["x"][0])
    codes = tiny.run(vqgan(config), variables, images, method="encode")
    np.testing.assert_array_equal(codes, np.load(GOLDENS / "taming_vqgan.npz")["fwd/indices"])

    conversion.convert_back(export, back)
    found = read_checkpoint(back)["state_dict"]
    assert found.keys() == state_dict.keys()
    for name, value in state_dict.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(found[name], value, name)
    assert config_from_yaml(back.with_suffix(".yaml")).to_dict() == config.to_dict()


def test_the_command_says_errors_in_one_line_and_overwrites_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious.txt").write_text("mine")
    write_checkpoint(tmp_path / "there.ckpt", {})
    good = [f"--input={CHECKPOINT}", f"--config={DESCRIPTION}"]
    for arguments, problem in (
        ([*good, f"--output={tmp_path / 'there'}"], "exists already"),
        (["--reverse", f"--input={tmp_path}", f"--output={tmp_path / 'there.ckpt'}"], "exists"),
        ([f"--input={DESCRIPTION}", good[1], f"--output={tmp_path / 'new'}"], "no PyTorch"),
        ([good[0], f"--output={tmp_path / 'new'}"], "--config is missing"),
    ):
        command = [sys.executable, "-m", "vqgan_jax.convert", *arguments]
        result = programs.run(command)
        assert result.returncode == 1, result
        assert result.stderr.startswith("error: ") and problem in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
    assert (tmp_path / "there" / "precious.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "there.ckpt"]
