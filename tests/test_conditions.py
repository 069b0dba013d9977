"""Conditions of every kind: as tokens, as users give them, and through training and sampling."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image

import tiny
import transformer_runs as stage2
import vqgan_jax
from transformer_runs import CODEBOOK, SIDE, assert_one_line, tiny_config
from vqgan_jax.conditions.class_labels import ClassLabel
from vqgan_jax.conditions.coordinates import Coordinates, coordinate_tokens
from vqgan_jax.conditions.files import read_known_part
from vqgan_jax.conditions.image_codes import ImageCodes
from vqgan_jax.conditions.kinds import Conditions
from vqgan_jax.configuration import ConfigError, add_condition_image
from vqgan_jax.errors import DataError
from vqgan_jax.inference.sample import sample
from vqgan_jax.inference.tokenize import tokenize
from vqgan_jax.sample import split_conditions
from vqgan_jax.training.checkpoints import write_export

LABELS = 3

# ---- From batches to tokens.

KINDS = (Coordinates((2, 2), 4), ImageCodes("edges", (1, 2), 7), ClassLabel(3))
BATCH = {
    "label": np.array([2, -1], np.int32),
    "edges": np.array([[6, 0], [3, 4]], np.int32),
    "coordinates": np.array([[0, 1, 2, 4], [4, 3, 2, 1]], np.int32),
}


def test_each_kind_has_its_part_of_the_table():
    conditions = Conditions(KINDS)
    assert conditions.num_tokens == 7 and conditions.table_size == (5 + 1) + (7 + 1) + (3 + 1)
    expected = [[0, 1, 2, 4, 6 + 6, 6 + 0, 14 + 2], [4, 3, 2, 1, 6 + 3, 6 + 4, 14 + 3]]
    np.testing.assert_array_equal(conditions.tokens(BATCH), expected)
    dropped = conditions.tokens(BATCH, jnp.array([False, True]))
    np.testing.assert_array_equal(dropped, [expected[0], [5] * 4 + [6 + 7] * 2 + [14 + 3]])


def test_in_the_codes_table_numbers_stay_as_they_are():
    conditions = Conditions(KINDS, own_table=False)
    assert conditions.table_size == 0
    expected = [[0, 1, 2, 4, 6, 0, 2], [4, 3, 2, 1, 3, 4, 3]]
    np.testing.assert_array_equal(conditions.tokens(BATCH), expected)


@pytest.mark.parametrize(("own_table", "token"), [(True, 0), (False, 9)])
def test_a_start_token_stands_for_no_condition(own_table, token):
    conditions = Conditions((), own_table, start_token=9)
    assert (conditions.num_tokens, conditions.table_size) == (1, int(own_table))
    np.testing.assert_array_equal(conditions.tokens(BATCH), [[token], [token]])


def test_parts_of_larger_images_keep_their_shape():
    larger = BATCH | {"coordinates": np.zeros((2, 3, 4), np.int32)}
    shapes = [part.shape for part in Conditions(KINDS).parts(larger)]
    assert shapes == [(2, 3, 4), (2, 1, 2), (2, 1)]


# ---- A model of several conditions.


@pytest.fixture(scope="module")
def inputs(transformer_inputs, tmp_path_factory):
    """The inputs of stage 2, with label maps of the images and a tokenizer for these."""
    directory = tmp_path_factory.mktemp("conditions") / "inputs"
    shutil.copytree(transformer_inputs.directory, directory)
    for path in sorted((directory / "images").rglob("*.png")):
        grey = np.asarray(Image.open(path).convert("L"))
        target = directory / "images" / "segmentation" / path.relative_to(directory / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((grey // 86).astype(np.uint8)).save(target)
    config = tiny.config_of_tiny_model(codebook_size=CODEBOOK, kmeans_init=True)
    config.model.resolution, config.model.channel_multipliers = SIDE, (1, 1, 1)
    config.model.in_channels = config.model.out_channels = config.data.num_labels = LABELS
    config.data.image_key = "segmentation"
    maps = sorted((directory / "images" / "segmentation" / "train").rglob("*.png"))
    one_hot = np.eye(LABELS, dtype=np.float32)[[np.asarray(Image.open(path)) for path in maps]]
    variables = tiny.variables_with_centres(config, one_hot, seed=1)
    write_export(directory / "labels", config, variables)
    tokenize(
        str(directory / "tokenizer"),
        directory / "conditioned",
        f"folder:{directory / 'images'}",
        list(stage2.COUNTS),
        conditions=conditions_flag(directory),
    )
    return stage2.Inputs(directory)


def conditions_flag(directory):
    return [
        "coordinates=100",
        f"segmentation={directory / 'labels'}",
        f"edges={directory / 'tokenizer'}",
    ]


def config_of(inputs, kinds=("coordinates", "segmentation", "edges", "class"), **sections):
    """Two steps of the tiny config with these conditions."""
    config = tiny_config(
        training={"num_steps": 2, "evaluate_every": 2, "checkpoint_every": 2}, **sections
    )
    config.data.codes = str(inputs.directory / "conditioned")
    config.data.name = f"folder:{inputs.images}"
    config.condition.coordinates.intervals = 100
    config.condition.kinds = ()
    add_condition_image(config, "segmentation", str(inputs.directory / "labels"))
    add_condition_image(config, "edges", str(inputs.tokenizer), derive="edges")
    config.condition.kinds = kinds
    return config


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    stage2.train_alone(config_of(inputs), workdir)
    return workdir


@pytest.fixture(scope="module")
def generator(trained):
    return vqgan_jax.load(trained)


def metrics_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss/cross_entropy", "validation/bits_per_code")
    return [[line[name] for line in lines if name in line] for name in names]


@pytest.mark.slow
def test_images_and_stored_codes_train_the_same(inputs, trained, tmp_path):
    """The same conditions by way of the disk and by way of the frozen tokenizers."""
    config = stage2.from_images(config_of(inputs))
    stage2.train_alone(config, tmp_path / "run")
    ours, theirs = vqgan_jax.load(tmp_path / "run"), vqgan_jax.load(trained)
    assert ours.config.condition == theirs.config.condition
    assert ours.config.condition.images.segmentation.num_labels == LABELS
    assert metrics_of(trained)[1] and len(metrics_of(trained)[0]) == 2
    assert (trained / "images" / "samples_00000002.png").stat().st_size > 1000
    # Their training orders differ; what the validation split costs a model does not.
    logs = []
    for generator in (ours, theirs):
        codes, given = rows_of(inputs, generator)
        logs.append(generator.log_likelihood(codes, given))
    assert np.abs(logs[0] - logs[1]).max() > 0
    bits = -logs[1].mean() / np.log(2)
    assert metrics_of(trained)[1][-1] == pytest.approx(bits, rel=1e-5)
    bits = -logs[0].mean() / np.log(2)
    assert metrics_of(tmp_path / "run")[1][-1] == pytest.approx(bits, rel=1e-5)


def rows_of(inputs, generator):
    """The validation images' codes, and their conditions as a user gives them."""
    paths = sorted((inputs.images / "validation").rglob("*.png"))
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    root = inputs.images / "segmentation" / "validation"
    maps = np.stack([np.asarray(Image.open(path)) for path in sorted(root.rglob("*.png"))])
    from vqgan_jax.conditions.derived import canny_edges

    codes = generator.tokenizer.encode(images / np.float32(127.5) - 1)
    edges = np.stack([canny_edges(image) for image in images])
    names = [path.parent.name for path in paths]
    return codes, {"segmentation": maps, "edges": edges, "class": names}


@pytest.mark.slow
def test_larger_images_see_their_own_conditions(generator):
    """Through the sliding window, by a label map and edges of the whole image."""
    label_map = np.arange(24 * 40).reshape(24, 40) % LABELS
    edges = np.zeros((24, 40, 3), np.uint8)
    condition = {"segmentation": label_map, "edges": edges, "class": "sea"}
    options = dict(condition=condition, height=24, width=40, guidance_scale=1.0)
    steps = []
    codes = generator.sample_codes(
        num_samples=2, on_progress=lambda *state: steps.append(state[:2]), **options
    )
    assert codes.shape == (2, 6 * 10) and steps[-1] == (30, 30)  # 10 + 4 (6 - 1) steps
    images = generator.sample(num_samples=2, **options)
    assert images.shape == (2, 24, 40, 3)
    np.testing.assert_array_equal(images, generator.decode(codes.reshape(2, 6, 10)))
    rows = generator.given.batch(condition, 2, (6, 10))
    np.testing.assert_array_equal(rows["coordinates"][1], coordinate_tokens(24, 40, 4, 100))
    other = generator.sample_codes(
        num_samples=2, **options | {"condition": condition | {"class": 0}}
    )
    assert np.any(codes != other)


@pytest.mark.slow
def test_completion_keeps_what_is_known(generator):
    label_map, edges = np.zeros((24, 16), int), np.zeros((24, 16, 3), np.uint8)
    known = np.arange(24, dtype=np.int32) % CODEBOOK
    mask = np.arange(24) < 12
    codes = generator.sample_codes(
        num_samples=3,
        condition={"segmentation": label_map, "edges": edges, "class": 1},
        height=24,
        known=known,
        known_mask=mask,
    )
    np.testing.assert_array_equal(codes[:, mask], np.broadcast_to(known[mask], (3, 12)))
    assert len(np.unique(codes[:, ~mask], axis=0)) == 3


@pytest.mark.slow
def test_no_condition_is_all_of_them_left_out(generator):
    """The tiny config leaves them out in training all together: all may be missing, not some."""
    assert generator.sample_codes(num_samples=2).shape == (2, 16)
    conditions = Conditions.from_config(generator.config)
    rows = generator.given.batch(None, 2, (4, 4))
    for given, dropped in zip(
        conditions.parts(rows), conditions.parts(rows, dropped=True), strict=True
    ):
        np.testing.assert_array_equal(given, dropped)
    with pytest.raises(ValueError) as error:
        generator.sample_codes(num_samples=2, condition={"class": 0})
    assert "needs the condition segmentation, edges" in assert_one_line(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segmentation": np.full((16, 16), 3)}, "the label 3; this model knows 0 to 2"),
        ({"segmentation": np.zeros((16, 16, 3), np.uint8)}, "segmentation is a label map"),
        ({"segmentation": np.zeros((16, 20), int)}, "20 x 16 pixels (width x height), and the"),
        ({"edges": np.zeros((16, 16), int)}, "edges is a picture, uint8 (H, W, 3)"),
        ({"edges": np.zeros((3, 16, 16, 3), np.uint8)}, "3 images for 2 samples"),
        ({"class": "river"}, "there is no class 'river'"),
        ({"relief": 0}, "no condition relief; it has segmentation, edges, class"),
    ],
)
def test_wrong_conditions_are_named(generator, change, words):
    given = {
        "segmentation": np.zeros((16, 16), int),
        "edges": np.zeros((16, 16, 3), np.uint8),
        "class": 0,
    }
    with pytest.raises(ValueError) as error:
        generator.sample_codes(num_samples=2, condition=given | change)
    assert words in assert_one_line(error)


# ---- What cannot be trained.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.condition.update(kinds=("relief",)), "has 'relief'; there are class"),
        (lambda c: c.condition.update(kinds=("class", "class")), "a kind twice"),
        (
            lambda c: (
                c.condition.images.edges.update(tokenizer="/nowhere"),
                c.data.update(codes=""),
            ),
            "There is no /nowhere",
        ),
        (lambda c: c.condition.coordinates.update(intervals=50), "vocabulary is 101; 51 is"),
        (lambda c: c.condition.images.edges.update(tokenizer=""), "needs the path of its"),
        (lambda c: c.condition.images.edges.update(derive="lines"), "derive is 'lines'"),
        (lambda c: c.condition.update(own_table=False), "coordinates needs 102 rows"),
        (lambda c: c.model.update(max_length=60), "config.model.max_length is 60"),
    ],
)
def test_errors_are_one_line_and_write_nothing(inputs, tmp_path, change, words):
    config = config_of(inputs)
    change(config)
    with pytest.raises((ConfigError, DataError, ValueError)) as error:
        stage2.train_alone(config, tmp_path / "run")
    assert words in assert_one_line(error)
    assert not (tmp_path / "run").exists()


def test_codes_without_the_condition(inputs, transformer_inputs, tmp_path):
    config = config_of(inputs)
    config.data.codes = str(transformer_inputs.codes)
    with pytest.raises(DataError) as error:
        stage2.train_alone(config, tmp_path / "run")
    assert "has no tokens of the condition coordinates" in assert_one_line(error)


# ---- The command.


@pytest.fixture
def files(tmp_path):
    """A label map, an edge picture, and a picture whose left is transparent, 16 x 24 pixels."""
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, LABELS, (24, 16), np.uint8)).save(tmp_path / "map.png")
    picture = random.integers(0, 256, (24, 16, 4), np.uint8)
    picture[..., 3], picture[:, :8, 3] = 255, 0
    Image.fromarray(picture[..., :3]).save(tmp_path / "edges.png")
    Image.fromarray(picture).save(tmp_path / "part.png")
    return tmp_path


@pytest.mark.slow
def test_command_completes_and_animates(trained, generator, files):
    conditions = {"segmentation": f"{files}/map.png", "edges": f"{files}/edges.png"}
    options = dict(classes=["sea"], batch_size=1, height=24, conditions=conditions)
    options |= dict(complete=f"{files}/part.png", animate=True)
    sample(str(trained), files / "output", 2, **options)
    images = [np.asarray(Image.open(files / "output" / f"{i:06}.png")) for i in range(2)]
    assert images[0].shape == (24, 16, 3) and np.any(images[0] != images[1])
    with Image.open(files / "output" / "animation.gif") as film:
        assert film.size == (16, 24) and film.n_frames == 12  # one for each code that is drawn
        first = np.asarray(film.convert("RGB")).astype(int)
    grey = np.abs(first - 128).max(axis=-1) < 8
    assert grey[4:, :8].all() and not grey[:, 8:].all()
    (files / "output" / "animation.gif").unlink()
    stored = (files / "output" / "000000.png").stat().st_mtime_ns
    sample(str(trained), files / "output", 2, **options)
    assert (files / "output" / "animation.gif").exists()
    assert (files / "output" / "000000.png").stat().st_mtime_ns == stored

    label_map = np.asarray(Image.open(files / "map.png"))
    pixels = np.asarray(Image.open(files / "part.png").convert("RGB"))
    codes = np.asarray(generator.tokenizer.encode(white_behind(files / "part.png")))[0]
    mask = np.zeros((6, 4), bool)
    mask[:, 2:] = True
    edges = np.asarray(Image.open(files / "edges.png"))
    drawn = generator.sample(
        num_samples=2,
        condition={"segmentation": label_map, "edges": edges, "class": "sea"},
        height=24,
        known=codes.reshape(-1),
        known_mask=mask.reshape(-1),
    )
    assert pixels.shape == images[0].shape
    for ours, theirs in zip(images, drawn, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    with pytest.raises(DataError, match="was begun with known"):
        sample(str(trained), files / "output", 2, **options | {"complete": ""})


def white_behind(path):
    picture = Image.open(path)
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return (np.asarray(white.convert("RGB"))[None] / np.float32(127.5) - 1).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segmentation": "edges.png"}, "is a label map, a grey or palette picture"),
        ({"edges": "none.png"}, "there is no such file"),
        ({"edges": ""}, "--condition=edges=: the path is missing"),
        (
            {"class": "map.png"},
            "that is a file; it has segmentation, edges. Classes are for --class.",
        ),
        ({"depth": "map.png"}, "'depth' that is a file; it has segmentation, edges."),
    ],
)
def test_files_that_are_not_the_condition(trained, files, change, words):
    conditions = {"segmentation": "map.png", "edges": "edges.png"} | change
    conditions = {kind: name and str(files / name) for kind, name in conditions.items()}
    with pytest.raises(DataError) as error:
        sample(str(trained), files / "output", 1, height=24, conditions=conditions)
    assert words in assert_one_line(error)
    assert not (files / "output").exists()


def test_kinds_of_the_command_line():
    assert split_conditions(["a=b,c=d", "e=f=g"]) == {"a": "b,c=d", "e": "f=g"}
    for given, words in ((["a"], "must be KIND=PATH"), (["a=b", "a=c"], "is given twice")):
        with pytest.raises(DataError) as error:
            split_conditions(given)
        assert words in assert_one_line(error)


@pytest.mark.slow
def test_the_file_of_a_folder_that_is_wrong_is_named(trained, files):
    folder = files / "maps"
    folder.mkdir()
    for name, side in (("a.png", 24), ("b.png", 28)):
        Image.new("L", (16, side)).save(folder / name)
    conditions = {"segmentation": str(folder), "edges": f"{files}/edges.png"}
    with pytest.raises(DataError) as error:
        sample(str(trained), files / "output", 1, height=24, conditions=conditions)
    assert "b.png: the condition segmentation has 16 x 28" in assert_one_line(error)


KNOWN = np.arange(6 * 4).reshape(6, 4)
HALVES = {
    "top": KNOWN < 12,
    "bottom": KNOWN >= 12,
    "left": KNOWN % 4 < 2,
    "right": KNOWN % 4 >= 2,
}


@pytest.mark.parametrize("side", HALVES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_halves_of_an_image_without_transparent_parts(side, mode, tmp_path):
    Image.new(mode, (16, 24), "red").save(tmp_path / "image.png")
    pixels, known = read_known_part(str(tmp_path / "image.png"), side, (24, 16), 4)
    assert np.all(pixels == [255, 0, 0])
    np.testing.assert_array_equal(known, HALVES[side])


def test_transparent_parts_are_turned_with_the_image(tmp_path):
    """Orientation 6 says that the picture is stored as if turned left by a quarter."""
    upright = np.zeros((24, 16, 4), np.uint8)
    upright[:8, :, 3] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    stored.save(tmp_path / "image.png", exif=exif)
    _, known = read_known_part(str(tmp_path / "image.png"), "top", (24, 16), 4)
    np.testing.assert_array_equal(known, KNOWN < 8)


@pytest.mark.slow
def test_sizes_that_do_not_fit(trained, files):
    conditions = {"segmentation": f"{files}/map.png", "edges": f"{files}/edges.png"}
    with pytest.raises(DataError) as error:
        sample(str(trained), files / "output", 1, height=12, conditions=conditions)
    assert "height is 12; it must be a multiple of 4" in assert_one_line(error)
    with pytest.raises(DataError) as error:
        sample(str(trained), files / "output", 1, conditions=conditions)
    assert "16 x 24 pixels (width x height), and the image to draw 16 x 16" in str(error.value)
    Image.new("RGB", (20, 24)).save(files / "other.png")
    options = dict(height=24, conditions=conditions, complete=f"{files}/other.png")
    with pytest.raises(DataError) as error:
        sample(str(trained), files / "output", 1, **options)
    assert "other.png has 20 x 24 pixels (width x height)" in assert_one_line(error)
    assert not (files / "output").exists()
