"""The reference's conditional transformers: one export that draws, its numbers, the way back."""

import numpy as np
import pytest
import yaml

import tiny
import vqgan_jax
from test_taming_transformer import (
    DUMMY,
    GOLDEN,
    description_of,
    logits_of,
    own_run,
    state_dict_of,
    tokenizer_config,
)
from vqgan_jax.conditions.coordinates import coordinate_tokens
from vqgan_jax.conditions.layouts import Layout, LayoutEncoding, SceneObject
from vqgan_jax.interop import conversion, taming
from vqgan_jax.interop.taming_options import ConversionError
from vqgan_jax.interop.taming_transformer_yaml import transformer_from_yaml
from vqgan_jax.interop.taming_yaml import yaml_from_config
from vqgan_jax.interop.torch_file import read_checkpoint
from vqgan_jax.interop.torch_writer import write_checkpoint

SIDE = 4  # codes of 2 x 2 pixels; with as many in front, the golden's 40 positions are enough
COORDINATES = {"target": "taming.modules.misc.coord.CoordStage"}


def first_stage(side=SIDE):
    config = tokenizer_config()
    config.model.resolution = 2 * side
    return config


def second_stage(channels=3, factor=2, labels=0, codebook_size=48):
    """A tokenizer of conditions."""
    config = tokenizer_config(codebook_size)
    config.model.resolution = 2 * SIDE
    config.model.in_channels = config.model.out_channels = channels
    config.model.channel_multipliers = (1,) * factor.bit_length()
    if labels:
        config.data.num_labels = labels
        config.loss.l1 = config.loss.perceptual = 0.0
        config.loss.binary_cross_entropy = 1.0
    return config


def stage_of(config, **params):
    stage = yaml_from_config(config)["model"]
    stage["params"] |= {"lossconfig": {"target": DUMMY}} | params
    return {key: stage[key] for key in ("target", "params")}


def write_inputs(directory, stage=None, data=None, side=SIDE, **changes):
    """`x.ckpt` and `x.yaml` of a transformer; `stage` configures its condition's tokenizer."""
    state_dict = dict(state_dict_of())
    if stage is not None:
        own = taming.state_dict_from_variables(tiny.initial_variables(stage), stage)
        state_dict |= {f"cond_stage_model.{name}": value for name, value in own.items()}
    write_checkpoint(directory / "x.ckpt", {"state_dict": state_dict})
    description = description_of(first_stage(side), **changes)
    description["data"]["params"] |= data or {}
    (directory / "x.yaml").write_text(yaml.safe_dump(description))


def converted(directory, stage=None, **changes):
    """The export of such inputs, loaded."""
    write_inputs(directory, stage, **changes)
    conversion.convert(directory / "x.ckpt", directory / "x.yaml", directory / "export")
    return vqgan_jax.load(directory / "export")


def check_numbers(generator, num_conditions):
    """Logits are those that the reference computes of its one sequence of tokens."""
    last = num_conditions + SIDE**2
    tokens, codes = np.split(GOLDEN["idx"][:, :last], [num_conditions], axis=1)
    logits = logits_of(generator)(tokens, codes)
    np.testing.assert_allclose(
        logits, GOLDEN["logits"][:, num_conditions - 1 : last - 1], atol=1e-5
    )


def check_drawing(generator, condition, tokens):
    """What is drawn after a condition is what plain forward passes after its tokens say."""
    count, logits = len(tokens), logits_of(generator)
    drawn = generator.sample_codes(num_samples=count, condition=condition, temperature=0.0)
    codes = np.zeros((count, SIDE**2), np.int32)
    for n in range(SIDE**2):
        codes[:, n] = np.argmax(logits(tokens, codes)[:, n], axis=-1)
    np.testing.assert_array_equal(drawn, codes)
    images = generator.sample(num_samples=count, condition=condition)
    assert images.shape == (count, 2 * SIDE, 2 * SIDE, 3) and images.std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_another_kind(tmp_path, capsys, channels):
    stage = second_stage(channels)
    changes = {"cond_stage_key": "depth", "cond_stage_config": stage_of(stage)}
    generator = converted(tmp_path, stage, **changes)
    assert "depth, an image of 4x4 codes" in capsys.readouterr().out
    condition = generator.config.condition
    assert condition.kinds == ("depth",) and not condition.own_table
    assert condition.images.depth.codebook_size == 48
    assert condition.images.depth.image_key == "depth"
    check_numbers(generator, SIDE**2)

    levels = np.random.default_rng(0).integers(0, 256, (2, 2 * SIDE, 2 * SIDE, 1), np.uint8)
    variables = tiny.initial_variables(stage)
    floats = np.broadcast_to(levels / np.float32(127.5) - 1, (*levels.shape[:3], channels))
    tokens = vqgan_jax.inference.Tokenizer(stage, variables).encode(floats)
    check_drawing(generator, np.repeat(levels, 3, axis=-1), np.reshape(tokens, (2, -1)))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["VQSegmentationModel", "VQModel"])
def test_a_label_map(tmp_path, capsys, target):
    """Some published models of label maps are a VQModel with a channel for each label."""
    stage = second_stage(channels=5, factor=4, labels=5)
    description = stage_of(stage) | {"target": f"taming.models.vqgan.{target}"}
    if target == "VQModel":
        del description["params"]["n_labels"]
    changes = {"cond_stage_key": "segmentation", "cond_stage_config": description}
    generator = converted(tmp_path, stage, **changes)
    assert "segmentation, a map of 5 labels of 2x2 codes" in capsys.readouterr().out
    check_numbers(generator, 4)
    labels = np.random.default_rng(0).integers(0, 5, (2, 2 * SIDE, 2 * SIDE))
    variables = tiny.initial_variables(stage)
    one_hot = np.eye(5, dtype=np.float32)[labels]
    tokens = vqgan_jax.inference.Tokenizer(stage, variables).encode(one_hot)
    check_drawing(generator, labels, np.reshape(tokens, (2, -1)))
    with pytest.raises(ValueError, match="this model knows 0 to 4"):
        generator.sample_codes(num_samples=1, condition=labels[0] + 5)


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_the_first_stage_for_conditions_too(tmp_path, twice):
    changes = {"cond_stage_key": "lines", "cond_stage_config": "__is_first_stage__"}
    generator = converted(tmp_path, first_stage() if twice else None, **changes)
    check_numbers(generator, SIDE**2)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 2 * SIDE, 2 * SIDE, 3), np.uint8)
    tokens = generator.tokenizer.encode(pictures / np.float32(127.5) - 1)
    check_drawing(generator, pictures, np.reshape(tokens, (2, -1)))


@pytest.mark.slow
@pytest.mark.parametrize("intervals", [48, 47, 20])
def test_coordinates(tmp_path, intervals):
    """Of as many intervals as codes, the last coordinate has no row in the reference."""
    stage = COORDINATES | {"params": {"n_embed": intervals, "down_factor": 2}}
    generator = converted(tmp_path, cond_stage_config=stage)
    condition = generator.config.condition
    assert condition.kinds == ("coordinates",) and condition.own_table == (intervals == 48)
    check_numbers(generator, SIDE**2)
    tokens = coordinate_tokens(2 * SIDE, 2 * SIDE, 2, intervals).reshape(1, -1)
    check_drawing(generator, None, tokens)
    if intervals == 48:
        table = generator.params["condition_embedding"]["embedding"]
        assert table.shape == (50, 64)
        np.testing.assert_array_equal(table[48], table[47])


def layout_data(**changes):
    params = {"no_tokens": 48, "max_objects_per_image": 5, "encode_crop": True}
    params |= {"use_group_parameter": True, "no_object_classes": 7} | changes
    params = {key: value for key, value in params.items() if value is not None}
    return {"train": {"target": "x.AnnotatedObjectsOpenImages", "params": params}}


@pytest.mark.slow
@pytest.mark.parametrize(("key", "length"), [("objects_bbox", 17), ("objects_center_points", 12)])
def test_layouts(tmp_path, key, length):
    stage = {"target": "x.DummyCondStage", "params": {"conditional_key": key}}
    generator = converted(tmp_path, cond_stage_config=stage, data=layout_data())
    check_numbers(generator, length)
    scene = Layout((SceneObject(6, (0.1, 0.2, 0.5, 0.5)), SceneObject(2, (0.0, 0.5, 1.0, 0.5))))
    places = "boxes" if key == "objects_bbox" else "centers"
    encoding = LayoutEncoding(7, places, 48, 5, ("group",))
    check_drawing(generator, scene, encoding.encode(scene)[None])


def test_classes_of_objects_are_counted_where_they_are_known():
    stage = {"target": "x.DummyCondStage", "params": {"conditional_key": "objects_bbox"}}

    def layout(**changes):
        description = description_of(
            first_stage(), cond_stage_config=stage, gpt_vocab_size=8192, gpt_block_size=348
        )
        data = layout_data(no_tokens=8192, no_object_classes=None, **changes)
        data["train"]["target"] = "x.AnnotatedObjectsCoco"
        description["data"]["params"] |= data
        return transformer_from_yaml(description).config.condition.layout

    assert layout().num_classes == 171 and layout(use_stuff=False).num_classes == 80
    assert layout(use_additional_parameters=True).attributes == (
        "group",
        "occluded",
        "depiction",
        "inside",
    )


def test_the_grid_is_what_the_sequence_has_room_for(tmp_path):
    """A first stage of 6 x 6 codes and 31 or 32 tokens: 4 x 4 codes and as many in front."""
    stage = stage_of(second_stage())
    for length in (31, 32):
        config = transformer_from_yaml(
            description_of(
                first_stage(6),
                cond_stage_config=stage,
                cond_stage_key="depth",
                gpt_block_size=length,
            )
        ).config
        assert config.model.grid == config.condition.images.depth.grid == (4, 4)
        assert config.tokenizer.resolution == 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["depth", "gumbel", "coordinates"])
def test_there_and_back_is_the_same_state_dict(tmp_path, kind):
    stage = None if kind == "coordinates" else second_stage(channels=1)
    if kind == "gumbel":
        stage.model.quantizer.update(kind="gumbel", code_dim=stage.model.latent_channels)
    description = COORDINATES | {"params": {"n_embed": 48, "down_factor": 2}}
    if stage is not None:
        description = stage_of(stage)
    converted(tmp_path, stage, cond_stage_key="depth", cond_stage_config=description)
    conversion.convert_back(tmp_path / "export", tmp_path / "back.ckpt")
    before = read_checkpoint(tmp_path / "x.ckpt")["state_dict"]
    after = read_checkpoint(tmp_path / "back.ckpt")["state_dict"]
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, name)
    first, second = (transformer_from_yaml(tmp_path / f"{name}.yaml") for name in ("x", "back"))
    first.config.training.batch_size = second.config.training.batch_size  # of the data's part
    assert second.config.to_dict() == first.config.to_dict()
    assert [config.model.to_dict() for config in second.of_conditions.values()] == [
        config.model.to_dict() for config in first.of_conditions.values()
    ]


@pytest.mark.slow
def test_conditions_that_the_reference_does_not_have_stay_here(tmp_path):
    for name, condition, problem in (
        ("own", {"coordinates": {"intervals": 48}}, "coordinates are tokens of the codes' table"),
        ("more", {"coordinates": {"intervals": 49}}, "table for them"),
        ("both", {"kinds": ("class", "coordinates"), "num_classes": 5}, "has class, coordinates"),
        ("scene", {"kinds": ("layout",), "layout": {"num_classes": 3}}, "layouts is not supp"),
    ):
        own_run(tmp_path / name, condition={"kinds": ("coordinates",)} | condition)
        with pytest.raises(ConversionError, match=problem) as caught:
            conversion.convert_back(tmp_path / name, tmp_path / "x.ckpt")
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("x.*"))


def depth(**changes):
    return {"cond_stage_key": "depth", "cond_stage_config": stage_of(second_stage())} | changes


def scene(key="objects_bbox", **changes):
    stage = {"target": "x.DummyCondStage", "params": {"conditional_key": key}}
    return {"cond_stage_config": stage, "data": layout_data(**changes)}


def coordinates(**params):
    return {"cond_stage_config": COORDINATES | {"params": params}}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (depth(cond_stage_key="image"), "cond_stage_key: A condition cannot be called 'image'"),
        (depth(cond_stage_key="../up"), "cannot be called '../up'"),
        (depth(cond_stage_key="class"), "cond_stage_key is 'class', which is another kind"),
        (depth(downsample_cond_size=4), "downsample_cond_size is 4"),
        (depth(gpt_block_size=30), "block_size is 30, which is neither enough for the 16 codes"),
        (depth(cond_stage_config={"target": "x.VQModel"}), "cond_stage_config.params.ddconfig"),
        (
            depth(cond_stage_config=stage_of(second_stage(), remap="used.npy")),
            "In cond_stage_config: model.params.remap",
        ),
        (
            depth(cond_stage_config=stage_of(second_stage(codebook_size=64))),
            "cond_stage_config.params.n_embed needs token 63, and transformer_config",
        ),
        (coordinates(down_factor=2), "lacks cond_stage_config.params.n_embed"),
        (coordinates(n_embed=0), "n_embed is 0"),
        (coordinates(n_embed=49), "n_embed needs token 48"),
        (coordinates(n_embed=48, down_factor=4), "down_factor is 4, and a code"),
        (scene(["objects"] * 99), r"conditional_key is \['objects', .*\.\.\.; supported"),
        (depth(cond_stage_config={"target": "x" * 999}), r"target is 'x*\.\.\., which is not"),
        (scene("objects"), "conditional_key is 'objects'; supported are objects_bbox and"),
        (scene() | {"data": {}}, "data.params.train is missing"),
        (scene(no_tokens=None), "lacks data.params.train.params.no_tokens"),
        (scene(no_tokens=49), "no_tokens needs token 48"),
        (scene(encode_crop=None), "data.params.train.params.encode_crop is missing"),
        (scene(use_group_parameter="no"), "use_group_parameter is 'no'; it must be true"),
        (scene(no_object_classes=None), "lacks data.params.train.params.no_object_classes"),
        (scene(no_object_classes=24), "In data.params.train.params: 24 classes with the attr"),
    ],
)
def test_what_the_yaml_may_not_say(changes, problem):
    changes = dict(changes)
    data = changes.pop("data", {})
    description = description_of(first_stage(), **changes)
    description["data"]["params"] |= data
    with pytest.raises(ConversionError, match=problem) as caught:
        transformer_from_yaml(description)
    assert "\n" not in str(caught.value)


def test_a_condition_stage_without_its_weights_is_named(tmp_path):
    write_inputs(tmp_path, None, **depth())
    with pytest.raises(ConversionError, match="In cond_stage_model: The weights do not fit"):
        conversion.convert(tmp_path / "x.ckpt", tmp_path / "x.yaml", tmp_path / "export")
    assert not (tmp_path / "export").exists()
