"""The reference's transformers: an export that draws, its numbers, the way back, refusals."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import programs
import tiny
import vqgan_jax
from vqgan_jax.configuration import transformer_config
from vqgan_jax.interop import conversion, taming
from vqgan_jax.interop.taming_options import ConversionError
from vqgan_jax.interop.taming_transformer import (
    transformer_from_state_dict,
    transformer_state_dict_of,
)
from vqgan_jax.interop.taming_transformer_yaml import transformer_from_yaml
from vqgan_jax.interop.taming_yaml import yaml_from_config
from vqgan_jax.interop.torch_file import read_checkpoint
from vqgan_jax.interop.torch_writer import write_checkpoint
from vqgan_jax.training.checkpoints import write_export
from vqgan_jax.training.learner import make_transformer

GOLDENS = pathlib.Path(__file__).parent / "goldens"
GOLDEN = np.load(GOLDENS / "taming_gpt.npz")  # 48 tokens, 40 positions, 3 layers of 64
SIDE = 6  # codes
DUMMY = "taming.modules.losses.vqperceptual.DummyLoss"
LABELATOR = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 48}}


def tokenizer_config(codebook_size=48):
    config = tiny.config_of_tiny_model(codebook_size=codebook_size)
    config.model.resolution = 2 * SIDE
    config.discriminator.enabled = False
    return config


def description_of(tokenizer, **changes):
    """A project's yaml; changes are of `model.params`, the GPT's with `gpt_` before them."""
    gpt = {"vocab_size": 48, "block_size": 40, "n_layer": 3, "n_head": 4, "n_embd": 64}
    gpt |= {"embd_pdrop": 0.1, "resid_pdrop": 0.2, "attn_pdrop": 0.3}
    gpt |= {name[4:]: value for name, value in changes.items() if name.startswith("gpt_")}
    first_stage = yaml_from_config(tokenizer)["model"]
    first_stage["params"] |= {"ckpt_path": "logs/last.ckpt", "lossconfig": {"target": DUMMY}}
    params = {
        "first_stage_key": "image",
        "cond_stage_key": "class_label",
        "pkeep": 0.9,
        "transformer_config": {
            "target": "taming.modules.transformer.mingpt.GPT",
            "params": gpt,
        },
        "first_stage_config": {key: first_stage[key] for key in ("target", "params")},
        "cond_stage_config": LABELATOR,
    }
    params |= {name: value for name, value in changes.items() if not name.startswith("gpt_")}
    target = "taming.models.cond_transformer.Net2NetTransformer"
    model = {"base_learning_rate": 4.5e-6, "target": target, "params": params}
    return {"model": model, "data": {"params": {"batch_size": 5}}}


@functools.cache
def state_dict_of(codebook_size=48):
    """Both stages; the reference's GPT, and a tokenizer before its first step."""
    tokenizer = tokenizer_config(codebook_size)
    first_stage = taming.state_dict_from_variables(tiny.initial_variables(tokenizer), tokenizer)
    state_dict = {f"first_stage_model.{name}": value for name, value in first_stage.items()}
    state_dict |= {key[7:]: GOLDEN[key] for key in GOLDEN.files if key.startswith("params/")}
    mask = np.tril(np.ones((1, 1, 40, 40), np.float32))
    return state_dict | {f"transformer.blocks.{i}.attn.mask": mask for i in range(3)}


def write_inputs(directory, codebook_size=48, **changes):
    """`X.ckpt` as Lightning writes it, and `X.yaml`."""
    checkpoint = {"epoch": 3, "global_step": 99, "callbacks": {}, "optimizer_states": []}
    write_checkpoint(
        directory / "x.ckpt", checkpoint | {"state_dict": state_dict_of(codebook_size)}
    )
    description = description_of(tokenizer_config(codebook_size), **changes)
    (directory / "x.yaml").write_text(yaml.safe_dump(description))


def command(*arguments):
    line = [sys.executable, "-m", "vqgan_jax.convert", "--source=taming", *arguments]
    return programs.run(line)


def logits_of(generator):
    """A function of conditions and codes, by full forward passes."""
    apply = jax.jit(make_transformer(generator.config).apply)
    return functools.partial(apply, {"params": generator.params})


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    directory = tmp_path_factory.mktemp("classes")
    write_inputs(directory)
    arguments = (f"--input={directory / 'x.ckpt'}", f"--config={directory / 'x.yaml'}")
    result = command(*arguments, f"--output={directory / 'export'}")
    assert result.returncode == 0, result.stderr
    assert "3 layers of 64 channels, 4 heads" in result.stdout
    assert "one of 48 classes" in result.stdout and "VQModel f2, 48 codes" in result.stdout
    return directory / "export"


def test_an_export_computes_what_the_reference_computes(export):
    generator = vqgan_jax.load(export)
    conditions, codes = GOLDEN["idx"][:, :1], GOLDEN["idx"][:, 1 : SIDE**2 + 1]
    expected = GOLDEN["logits"][:, : SIDE**2]
    logits = logits_of(generator)(conditions, codes)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    logs = expected - np.log(np.exp(expected).sum(axis=-1, keepdims=True))
    logs = np.take_along_axis(logs, codes[..., None], axis=-1)[..., 0]
    found = generator.log_likelihood(codes, conditions[:, 0])
    np.testing.assert_allclose(found, logs, atol=1e-5)

    images = tiny.random_images(2, 2 * SIDE, 2 * SIDE, 3)
    config = tokenizer_config()
    variables, _ = taming.variables_from_state_dict(
        {k[18:]: v for k, v in state_dict_of().items() if k.startswith("first_stage_model.")},
        config,
    )
    expected = vqgan_jax.inference.Tokenizer(config, variables).encode(images)
    np.testing.assert_array_equal(generator.tokenizer.encode(images), expected)


@pytest.mark.slow
def test_an_export_draws(export):
    generator = vqgan_jax.load(export)
    images = generator.sample(seed=1, num_samples=3, condition=[0, 5, 47], top_k=10)
    assert images.shape == (3, 2 * SIDE, 2 * SIDE, 3) and images.dtype == np.uint8
    assert images.std() > 0
    codes = generator.sample_codes(seed=1, num_samples=8, condition=5)
    assert codes.min() >= 0 and codes.max() < 48 and len(np.unique(codes, axis=0)) == 8

    classes = np.array([3, 41])
    drawn = generator.sample_codes(num_samples=2, condition=classes, temperature=0.0)
    codes, logits = np.zeros((2, SIDE**2), np.int32), logits_of(generator)
    for n in range(SIDE**2):
        codes[:, n] = np.argmax(logits(classes[:, None], codes)[:, n], axis=-1)
    np.testing.assert_array_equal(drawn, codes)
    with pytest.raises(ValueError, match="no class 48"):
        generator.sample_codes(num_samples=1, condition=48)


def test_the_yaml_sets_every_key():
    description = transformer_from_yaml(description_of(tokenizer_config(), gpt_n_unmasked=1))
    config = description.config
    assert config.model.to_dict() == transformer_config().model.to_dict() | dict(
        codebook_size=48,
        grid=(SIDE, SIDE),
        num_layers=3,
        num_heads=4,
        width=64,
        max_length=40,
        num_unmasked=1,
        embedding_dropout=0.1,
        dropout=0.2,
        attention_dropout=0.3,
    )
    assert (config.condition.kinds, config.condition.num_classes) == (("class",), 48)
    assert not config.condition.own_table
    assert config.training.pkeep == 0.9 and config.training.batch_size == 5
    assert config.optimizer.base_learning_rate == 4.5e-6
    assert config.tokenizer.path == "tokenizer" and config.tokenizer.resolution == 0
    assert description.tokenizer.to_dict()["model"] == tokenizer_config().to_dict()["model"] | {
        "dtype": "auto"
    }
    smaller = transformer_from_yaml(description_of(tokenizer_config(), gpt_block_size=16)).config
    assert smaller.model.grid == (4, 4) and smaller.tokenizer.resolution == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"cond_stage_config": "__is_unconditional__", "sos_token": 7},
        {"unconditional": True, "sos_token": 7},
        {
            "cond_stage_config": {
                "target": "taming.modules.util.SOSProvider",
                "params": {"sos_token": 7},
            }
        },
    ],
    ids=["word", "flag", "provider"],
)
def test_three_ways_to_say_that_there_is_no_condition(changes):
    condition = transformer_from_yaml(description_of(tokenizer_config(), **changes)).config
    condition = condition.condition.to_dict()
    expected = transformer_config().condition.to_dict()
    assert condition == expected | {"own_table": False, "start_token": 7}


@pytest.mark.slow
def test_a_start_token_leads_to_what_the_reference_draws(tmp_path):
    start, codes = int(GOLDEN["idx"][1, 0]), GOLDEN["idx"][1:, 1 : SIDE**2 + 1]
    write_inputs(tmp_path, cond_stage_config="__is_unconditional__", sos_token=start)
    conversion.convert(tmp_path / "x.ckpt", tmp_path / "x.yaml", tmp_path / "export")
    generator = vqgan_jax.load(tmp_path / "export")
    expected = jax.nn.log_softmax(GOLDEN["logits"][1:, : SIDE**2])
    expected = np.take_along_axis(np.asarray(expected), codes[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(generator.log_likelihood(codes), expected, atol=1e-5)
    drawn = generator.sample_codes(num_samples=1, temperature=0.0)
    assert drawn[0, 0] == np.argmax(GOLDEN["logits"][1, 0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class", "none"])
def test_tokens_that_are_no_codes_are_conditions_and_never_drawn(tmp_path, capsys, kind):
    """A vocabulary of 48, of which 32 are codes; conditions 40 and 3 must find their rows."""
    changes = {}
    if kind == "none":
        changes = {"unconditional": True, "sos_token": 40}
    write_inputs(tmp_path, codebook_size=32, **changes)
    conversion.convert(tmp_path / "x.ckpt", tmp_path / "x.yaml", tmp_path / "export")
    assert "32 codes; 16 tokens that are none are never drawn" in capsys.readouterr().out
    generator = vqgan_jax.load(tmp_path / "export")

    whole = transformer_from_yaml(description_of(tokenizer_config()))
    params = transformer_from_state_dict(state_dict_of(), whole).params
    tokens = np.array([[40], [3]]) if kind == "class" else np.array([[40], [40]])
    codes = GOLDEN["idx"][:, 1 : SIDE**2 + 1] % 32
    logits = make_transformer(whole.config).apply({"params": params}, tokens, codes)[..., :32]
    expected = np.asarray(jax.nn.log_softmax(logits))
    expected = np.take_along_axis(expected, codes[..., None], axis=-1)[..., 0]
    condition = tokens[:, 0] if kind == "class" else None
    np.testing.assert_allclose(generator.log_likelihood(codes, condition), expected, atol=1e-5)
    drawn = generator.sample_codes(num_samples=2, condition=condition, temperature=3.0)
    assert 24 < drawn.max() < 32
    assert generator.sample(num_samples=2, condition=condition).std() > 0


def test_there_and_back_is_the_same_state_dict(export, tmp_path, capsys):
    back = tmp_path / "back.ckpt"
    conversion.convert_back(export, back)
    assert "Net2NetTransformer" in capsys.readouterr().out
    found = read_checkpoint(back)["state_dict"]
    assert found.keys() == state_dict_of().keys()
    for name, value in state_dict_of().items():
        np.testing.assert_array_equal(found[name], value, name)
    first = transformer_from_yaml(description_of(tokenizer_config()))
    second = transformer_from_yaml(back.with_suffix(".yaml"))
    first.config.training.batch_size = second.config.training.batch_size  # of the data's part
    assert second.config.to_dict() == first.config.to_dict()
    assert second.tokenizer.to_dict() == first.tokenizer.to_dict()


def own_run(directory, **options):
    """An export of our own making, of which options are keys of `model` or of `condition`."""
    config = transformer_config()
    model = dict(codebook_size=48, grid=(SIDE, SIDE), num_layers=2, num_heads=2, width=32)
    config.model.update(model | options.get("model", {}))
    config.condition.update(options.get("condition", {}))
    transformer = make_transformer(config)
    key, tokens = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(transformer.init)(key, tokens, tokens)["params"]
    params["position_embedding"] = jax.random.normal(key, (SIDE**2, 32))
    tokenizer = tokenizer_config()
    variables = tiny.initial_variables(tokenizer)
    tokenizers = {"tokenizer": (tokenizer, variables)}
    write_export(directory, config, {"params": params}, tokenizers=tokenizers)


@pytest.mark.slow
def test_the_start_token_of_an_own_table_comes_back_by_its_position(tmp_path):
    own_run(tmp_path / "run")
    before = vqgan_jax.load(tmp_path / "run")
    conversion.convert_back(tmp_path / "run", tmp_path / "x.ckpt")
    conversion.convert(tmp_path / "x.ckpt", tmp_path / "x.yaml", tmp_path / "again")
    after = vqgan_jax.load(tmp_path / "again")
    assert before.config.condition.own_table and not after.config.condition.own_table
    codes = GOLDEN["idx"][:, : SIDE**2]
    np.testing.assert_allclose(after.log_likelihood(codes), before.log_likelihood(codes), atol=1e-5)


@pytest.mark.slow
def test_forms_that_the_reference_does_not_have_stay_here(tmp_path):
    classes = {"condition": {"kinds": ("class",), "num_classes": 5}}
    own_run(tmp_path / "classes", **classes)
    with pytest.raises(ConversionError, match="table for them"):
        conversion.convert_back(tmp_path / "classes", tmp_path / "x.ckpt")
    own_run(tmp_path / "wide", model={"hidden": 96})
    with pytest.raises(ConversionError, match="no config.model.hidden=96"):
        conversion.convert_back(tmp_path / "wide", tmp_path / "x.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes", "wide"]


MINGPT = "taming.modules.transformer.mingpt."


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"cond_stage_config": {"target": "x.Else"}}, "target is 'x.Else', which is not supported"),
        ({"cond_stage_config": None}, "cond_stage_config is missing"),
        ({"cond_stage_config": LABELATOR | {"params": {}}}, "lacks cond_stage_config.params.n_cl"),
        ({"transformer_config": {"target": f"{MINGPT}CodeGPT"}}, "CodeGPT; only taming"),
        ({"first_stage_config": {"target": "x.KMeans", "params": {}}}, "In first_stage_config"),
        ({"first_stage_config": {"target": "x.VQSegmentationModel"}}, "label maps"),
        ({"gpt_n_head": 5}, "n_head is 5, which does not divide n_embd 64"),
        ({"gpt_vocab_size": 47}, "vocab_size is 47, and the first stage's n_embed 48"),
        ({"gpt_vocab_size": "many"}, "vocab_size is 'many'"),
        ({"gpt_block_size": 35}, "block_size is 35, which is neither enough for the 36 codes"),
        ({"gpt_block_size": 0}, "block_size is 0"),
        ({"gpt_n_unmasked": 4}, "n_unmasked is 4"),
        ({"gpt_causal": True}, "transformer_config.params.causal is not supported"),
        ({"unconditional": True, "sos_token": 48}, "sos_token needs token 48"),
        ({"cond_stage_config": LABELATOR | {"params": {"n_classes": 49}}}, "n_classes needs tok"),
        ({"pkeep": 1.5}, "config.training.pkeep"),
    ],
)
def test_what_the_yaml_may_not_say(changes, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        transformer_from_yaml(description_of(tokenizer_config(), **changes))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_named():
    def problem(gpt=None, **changes):
        state_dict = {name: value for name, value in state_dict_of().items() if name not in changes}
        state_dict |= {name: value for name, value in changes.items() if value is not None}
        description = transformer_from_yaml(description_of(tokenizer_config(), **(gpt or {})))
        with pytest.raises(ConversionError) as caught:
            transformer_from_state_dict(transformer_state_dict_of(state_dict), description)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "vocab_size must be 48" in problem({"gpt_vocab_size": 50})
    assert "block_size must be 40" in problem({"gpt_block_size": 256})
    assert "n_layer must be 3" in problem({"gpt_n_layer": 12})
    assert "n_embd must be 64" in problem({"gpt_n_embd": 128})
    head = "transformer.head.weight"
    assert f"1 missing ({head} (48, 64))" in problem(**{head: None})
    assert f"{head} (9, 64) instead of (48, 64)" in problem(**{head: np.zeros((9, 64))})
    assert "not finite (head.kernel)" in problem(**{head: np.full((48, 64), np.nan)})
    bias = "first_stage_model.quant_conv.bias"
    assert "In first_stage_model: The weights do not fit" in problem(**{bias: None})
    assert "condition stage with weights" in problem(**{"cond_stage_model.x": np.zeros(2)})
    assert "unknown tensors: ema.x" in problem(**{"ema.x": np.zeros(2)})
    with pytest.raises(ConversionError, match=r"no tensors transformer\.\*; it has weight"):
        transformer_state_dict_of({"weight": np.zeros(2)})


def test_a_yaml_of_the_other_stage_is_said_in_one_line(tmp_path):
    write_inputs(tmp_path)
    tokenizer = GOLDENS / "taming_vqgan"
    for checkpoint, description, problem in (
        (tmp_path / "x.ckpt", tokenizer.with_suffix(".yaml"), "the checkpoint is a transformer's"),
        (tokenizer.with_suffix(".ckpt"), tmp_path / "x.yaml", "the checkpoint is a tokenizer's"),
    ):
        result = command(
            f"--input={checkpoint}", f"--config={description}", f"--output={tmp_path / 'new'}"
        )
        assert result.returncode == 1 and problem in result.stderr, result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.ckpt", "x.yaml"]
