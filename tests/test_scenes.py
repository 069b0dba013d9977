"""Layouts and skeletons through tokenizing, training and sampling, larger scenes among them."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import transformer_runs as stage2
import vqgan_jax
from transformer_runs import CODEBOOK, assert_one_line, tiny_config
from vqgan_jax.conditions.keypoint_files import read_keypoints
from vqgan_jax.conditions.layout_files import read_objects
from vqgan_jax.conditions.layouts import Layout, LayoutEncoding, SceneObject
from vqgan_jax.configuration import ConfigError, add_condition_image
from vqgan_jax.data import code_report
from vqgan_jax.data.codes import open_codes
from vqgan_jax.errors import DataError
from vqgan_jax.inference.sample import sample
from vqgan_jax.inference.tokenize import tokenize

NAMES = ("tree", "boat", "house")
LAYOUT = {"num_tokens": 400, "max_objects": 4, "attributes": ("group",), "min_area": 0.01}
ENCODING = LayoutEncoding(3, num_tokens=400, max_objects=4, attributes=("group",))
CONFIG = """
from vqgan_jax.configuration import transformer_config

def get_config(arg=""):
    config = transformer_config()
    config.condition.layout.update({layout!r})
    if arg:
        config.condition.layout.places = arg
    return config
"""


@pytest.fixture(scope="module")
def inputs(transformer_inputs, tmp_path_factory):
    """The inputs of stage 2, with objects and keypoints of the images, and codes with both."""
    directory = tmp_path_factory.mktemp("scenes") / "inputs"
    shutil.copytree(transformer_inputs.directory, directory)
    random, images = np.random.default_rng(0), directory / "images"
    for path in sorted(images.rglob("*.png")):
        objects = [
            {"class": NAMES[i], "box": [*map(float, 0.4 * random.random(2)), 0.1 + 0.1 * i, 0.5]}
            | ({"group": True} if random.random() < 0.5 else {})
            for i in random.permutation(3)
        ]
        objects.append({"class": "boat", "box": [0, 0, 0.1, 0.05]})  # too small
        write_beside(images, "layout", path, {"objects": objects})
        keypoints = np.column_stack([16 * random.random((17, 2)), np.full(17, 2)])
        write_beside(images, "skeleton", path, {"keypoints": keypoints.ravel().tolist()})
    (images / "layout" / "classes.txt").write_text("\n".join(NAMES))
    (directory / "config.py").write_text(CONFIG.format(layout=LAYOUT))
    write_codes(directory, "scenes")
    return stage2.Inputs(directory)


def write_beside(images, key, path, content):
    target = (images / key / path.relative_to(images)).with_suffix(".json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content))


def write_codes(directory, name, conditions=("layout=config.py", "skeleton=tokenizer"), **options):
    tokenize(
        str(directory / "tokenizer"),
        directory / name,
        f"folder:{directory / 'images'}",
        list(stage2.COUNTS),
        ["flip"],
        conditions=[text.replace("=", f"={directory}/") for text in conditions],
        **options,
    )


def config_of(inputs, kinds, **sections):
    training = {"num_steps": 2, "evaluate_every": 2, "checkpoint_every": 2}
    config = tiny_config(training=training, **sections)
    config.data.codes = str(inputs.directory / "scenes")
    config.data.name = f"folder:{inputs.images}"
    config.condition.layout.update(LAYOUT)
    config.condition.kinds = ()
    add_condition_image(config, "skeleton", str(inputs.tokenizer), derive="skeleton")
    config.condition.kinds = kinds
    return config


@pytest.fixture(scope="module")
def of_layouts(inputs, tmp_path_factory):
    """A run from stored codes."""
    workdir = tmp_path_factory.mktemp("of_layouts") / "run"
    stage2.train_alone(config_of(inputs, ("layout",)), workdir)
    return workdir


@pytest.fixture(scope="module")
def of_both(inputs, tmp_path_factory):
    """A run from images."""
    workdir = tmp_path_factory.mktemp("of_both") / "run"
    config = stage2.from_images(config_of(inputs, ("layout", "skeleton")))
    stage2.train_alone(config, workdir)
    return workdir


def validation_paths(inputs, key=""):
    suffix = "json" if key else "png"
    return sorted((inputs.images / key / "validation").rglob(f"*.{suffix}"))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["of_layouts", "of_both"])
def test_validation_is_what_users_layouts_and_keypoints_give(inputs, run, request):
    """By way of the disk and of the pipeline of images, and drawn from the files by hand."""
    workdir = request.getfixturevalue(run)
    generator = vqgan_jax.load(workdir)
    layout = generator.config.condition.layout
    assert (layout.num_classes, layout.class_names) == (3, NAMES)
    images = [np.asarray(Image.open(path)) for path in validation_paths(inputs)]
    codes = generator.tokenizer.encode(np.stack(images) / np.float32(127.5) - 1)
    given = {
        "layout": [
            Layout(read_objects(path, NAMES)[:3]) for path in validation_paths(inputs, "layout")
        ]
    }
    if run == "of_both":
        given["skeleton"] = [read_keypoints(p) for p in validation_paths(inputs, "skeleton")]
    bits = -generator.log_likelihood(codes, given).mean() / np.log(2)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [x["validation/bits_per_code"] for x in lines if "validation/bits_per_code" in x]
    assert found[-1] == pytest.approx(bits, rel=1e-5)
    assert (workdir / "images" / "samples_00000002.png").stat().st_size > 1000


def test_stored_layouts_are_those_of_the_views_and_shuffled_in_training(inputs, capsys):
    codes = open_codes(inputs.directory / "scenes" / "train", verify=True)
    info = codes.conditions["layout"]
    assert (info.layout, info.min_area, info.class_names) == (ENCODING, 0.01, NAMES)
    paths = sorted((inputs.images / "layout" / "train").rglob("*.json"))
    objects = [read_objects(path, NAMES)[:3] for path in paths]
    for view, flip in enumerate((False, True)):
        expected = [ENCODING.encode(Layout(own), flip=flip) for own in objects]
        np.testing.assert_array_equal(codes.rows(np.arange(64), view)["layout"], expected)

    batches = [codes.batch(3, step, 32) for step in range(6)]
    part = codes.batch(3, 4, 32, np.array([5, 9, 30]))
    jax.tree.map(
        np.testing.assert_array_equal, part, {k: v[[5, 9, 30]] for k, v in batches[4].items()}
    )
    stored = {}  # by image and view, which have codes of their own
    for view in (0, 1):
        rows = codes.rows(np.arange(64), view)
        stored |= {c.tobytes(): row for c, row in zip(rows["codes"], rows["layout"], strict=True)}
    orders = set()
    for batch in batches:
        for own, row in zip(batch["codes"], batch["layout"], strict=True):
            kept, moved = (tokens[:9].reshape(3, 3) for tokens in (stored[own.tobytes()], row))
            order = [kept.tolist().index(triple) for triple in moved.tolist()]
            orders.add(tuple(order))
            np.testing.assert_array_equal(row[9:], stored[own.tobytes()][9:])
    assert len(orders) == 6  # all orders of three objects
    print(*code_report.lines(code_report.describe_codes(inputs.directory / "scenes" / "train")))
    assert "up to 4 objects of 3 classes, as boxes" in capsys.readouterr().out


SCENE = Layout(
    (
        SceneObject(0, (0.0, 0.0, 0.3, 0.4), frozenset({"group"})),
        SceneObject(2, (0.5, 0.3, 0.5, 0.7)),
        SceneObject(1, (0.2, 0.6, 0.2, 0.3)),
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_larger_scenes_are_drawn_window_by_window(of_layouts, scale):
    """Greedily, code by code: the likeliest one by the likelihoods of all, each in its window.

    As in the reference, the window's middle is the earlier one of two codes, and the layout's crop
    is the window. Guidance leads away from what is likely without a layout.
    """
    generator = vqgan_jax.load(of_layouts)
    random = np.random.default_rng(0)  # parameters that the layout matters to
    params = jax.tree.map(
        lambda x: (x + 0.3 * random.standard_normal(x.shape)).astype(np.float32), generator.params
    )
    generator = generator.with_params(params)
    options = dict(height=24, width=28, temperature=0.0, top_k=0, guidance_scale=scale)
    drawn = generator.sample_codes(num_samples=2, condition=SCENE, **options).reshape(2, 6, 7)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    for i, j in [(0, 0), (1, 6), (2, 3), (3, 2), (4, 4), (5, 0), (5, 6)]:
        top, left = np.clip(i - 1, 0, 2), np.clip(j - 1, 0, 3)
        crop = (left / 7, top / 6, 4 / 7, 4 / 6)
        window = np.repeat(drawn[:1, top : top + 4, left : left + 4], CODEBOOK, axis=0)
        window[:, i - top, j - left] = np.arange(CODEBOOK)
        likelihoods = scale * generator.log_likelihood(window, Layout(SCENE.objects, crop))
        likelihoods += (1.0 - scale) * generator.log_likelihood(window)
        position = 4 * (i - top) + j - left
        assert likelihoods[:, position].argmax() == drawn[0, i, j]
    elsewhere = Layout(SCENE.objects, (0.0, 0.0, 0.5, 0.5))
    other = generator.sample_codes(num_samples=1, condition=elsewhere, **options)
    assert np.any(other != drawn[0].reshape(-1))


@pytest.mark.slow
def test_command_takes_files_of_layouts_and_keypoints(of_both, inputs, tmp_path):
    (tmp_path / "layout.json").write_text('[{"class": "boat", "box": [0.1, 0.1, 0.5, 0.5]}]')
    poses = tmp_path / "poses"
    poses.mkdir()
    keypoints = validation_paths(inputs, "skeleton")[0].read_text()
    (poses / "a.json").write_text(json.dumps([json.loads(keypoints)] * 2))  # two people
    (poses / "b.json").write_text(keypoints)
    conditions = {"layout": str(tmp_path / "layout.json"), "skeleton": str(poses)}
    options = dict(guidance_scale=1.0, height=20)
    sample(str(of_both), tmp_path / "output", 3, conditions=conditions, **options)
    drawn = [np.asarray(Image.open(tmp_path / "output" / f"{i:06}.png")) for i in range(3)]
    layout = Layout((SceneObject(1, (0.1, 0.1, 0.5, 0.5)),))
    people = [read_keypoints(poses / f"{name}.json") for name in "aba"]
    assert [len(p) for p in people] == [2, 1, 2]
    images = vqgan_jax.load(of_both).sample(
        num_samples=3, condition={"layout": layout, "skeleton": people}, **options
    )
    assert np.abs(np.stack(drawn).astype(int) - images).max() <= 1

    def refused(kind, path, content):
        path.write_text(content)
        with pytest.raises(DataError) as error:
            given = conditions | {kind: str(path)}
            sample(str(of_both), tmp_path / "none", 1, conditions=given, **options)
        assert not (tmp_path / "none").exists()
        return assert_one_line(error)

    line = refused("layout", tmp_path / "other.json", '[{"class": "bot", "box": [0, 0, 1, 1]}]')
    assert "other.json: objects[0]: there is no class 'bot'; is 'boat' meant?" in line
    line = refused("skeleton", tmp_path / "pose.json", "[[1, 2, 3]]")
    assert "pose.json: people[0] has 1 keypoints" in line


# ---- What does not fit.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"places": "centers"}, "condition layout whose num_tokens is 14; 10 is expected"),
        ({"min_area": 0.1}, "whose min_area is 0.01; 0.1 is expected"),
        ({"attributes": ()}, "whose layout.attributes is ('group',); () is expected"),
        ({"num_classes": 4}, "layout.num_classes is 4, but the tokenizer and the data have 3"),
        ({"class_names": ("a", "b", "c")}, "class_names is ('a', 'b', 'c'), but the"),
        ({"places": "points"}, 'config.condition.layout: places of a layout are "boxes" or'),
        ({"num_tokens": 6}, "config.condition.layout: 3 classes with the attributes (group)"),
    ],
)
def test_layouts_that_were_encoded_otherwise_are_refused(inputs, tmp_path, change, words):
    config = config_of(inputs, ("layout",))
    config.condition.layout.update(change)
    with pytest.raises((ConfigError, DataError)) as error:
        stage2.train_alone(config, tmp_path / "run")
    assert words in assert_one_line(error)
    assert not (tmp_path / "run").exists()


def test_data_without_layouts_or_names(inputs, transformer_inputs, tmp_path):
    config = config_of(inputs, ("layout",))
    config.data.codes = str(transformer_inputs.codes)
    with pytest.raises(DataError) as error:
        stage2.train_alone(config, tmp_path / "run")
    assert "no tokens of the condition layout; it has none of any. Tokenize" in str(error.value)
    stage2.from_images(config).data.name = f"folder:{transformer_inputs.images}"
    with pytest.raises(DataError) as error:
        stage2.train_alone(config, tmp_path / "run")
    assert "has no JSON files of the feature 'layout'" in assert_one_line(error)
    copy = tmp_path / "images"
    shutil.copytree(inputs.images, copy)
    (copy / "layout" / "classes.txt").unlink()
    config.data.name = f"folder:{copy}"
    with pytest.raises(ConfigError) as error:
        stage2.train_alone(config, tmp_path / "run")
    assert "have no names in the data: write them to PATH/layout/classes.txt" in str(error.value)


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("layout=nothing.py", "nothing.py is no config file; layout=CONFIG takes that of"),
        ("layout=config.py:points", 'places of a layout are "boxes" or "centers"'),
        ("layout=broken.py", "broken.py: ZeroDivisionError: division by zero"),
        ("layout=tokenizer.py", "is no config of a transformer"),
        ("layout:3=config.py", "it takes NAME=TOKENIZER"),
    ],
)
def test_tokenize_names_what_is_wrong_with_the_config(inputs, condition, words):
    directory = inputs.directory
    (directory / "broken.py").write_text("1 / 0")
    (directory / "tokenizer.py").write_text(
        "from vqgan_jax.configuration import tokenizer_config\n\n"
        "def get_config(arg=''):\n    return tokenizer_config()\n"
    )
    with pytest.raises(DataError) as error:
        write_codes(directory, "never", (condition,))
    assert words in assert_one_line(error)
    assert not (directory / "never").exists()


def test_a_pass_with_another_encoding_is_another_pass(inputs):
    before = open_codes(inputs.directory / "scenes" / "train").info
    with pytest.raises(DataError) as error:
        write_codes(inputs.directory, "scenes", ("layout=config.py:centers", "skeleton=tokenizer"))
    assert "its num_tokens of the condition layout is 14, and here it is 10" in str(error.value)
    assert open_codes(inputs.directory / "scenes" / "train").info == before
