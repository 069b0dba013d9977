"""Objects beside images: read from folders and named data sets, cropped, mirrored and filtered."""

import io
import itertools
import json
import pickle

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from vqgan_jax.conditions.layouts import Layout, LayoutEncoding, SceneObject
from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.data.augmentations import AllViews, list_views
from vqgan_jax.data.condition_sources import Layouts
from vqgan_jax.data.pipeline import evaluation_batches, open_reader, training_batches
from vqgan_jax.data.sources import Feature, open_source
from vqgan_jax.data.transforms import Transform
from vqgan_jax.errors import DataError

NAMES = ("red", "green", "blue")
COLORS = 255 * np.eye(3, dtype=np.uint8)
ENCODING = LayoutEncoding(3, num_tokens=40_000, max_objects=4, attributes=("group",))
PAD = ENCODING.pad_token


def scene(random, count=3):
    """An image of 24 x 40 pixels, later objects over earlier ones, and its objects in pixels."""
    pixels, objects = np.zeros((24, 40, 3), np.uint8), []
    for label in random.permutation(3)[:count]:
        left, top = int(random.integers(34)), int(random.integers(18))
        width, height = (
            int(random.integers(4, 40 - left + 1)),
            int(random.integers(4, 24 - top + 1)),
        )
        pixels[top : top + height, left : left + width, label] = 255
        objects.append((int(label), left, top, width, height))
    return pixels, objects


def in_shares(objects):
    return [
        {"class": NAMES[label], "box": [x / 40, y / 24, width / 40, height / 24]}
        for label, x, y, width, height in objects
    ]


def write(root, name, pixels, objects, split="train"):
    for folder in (root / split, root / "layout" / split):
        folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / split / f"{name}.png")
    (root / "layout" / split / f"{name}.json").write_text(json.dumps(objects))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for number in range(40):
        pixels, objects = scene(random)
        split = "train" if number < 30 else "validation"
        write(root, f"{number:02}", pixels, {"objects": in_shares(objects)}, split)
    (root / "layout" / "classes.txt").write_text("red\ngreen\n\n blue\n")
    return root


def make_config(folder, **data):
    config = tokenizer_config()
    config.model.resolution = 16
    config.training.batch_size = 8
    config.data.update({"name": f"folder:{folder}", "resize": -1, "threads": 2} | data)
    return config


def make_sharding():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return NamedSharding(mesh, PartitionSpec("data"))


def take(config, count, layouts=None, **options):
    conditions = (layouts or Layouts(ENCODING, class_names=NAMES),)
    batches = training_batches(config, make_sharding(), conditions=conditions, **options)
    taken = [jax.tree.map(np.asarray, batch) for batch in itertools.islice(batches, count)]
    batches.close()
    return {key: np.concatenate([batch[key] for batch in taken]) for key in taken[0]}


def drawn_boxes(image):
    """By class, the rows and columns (top, bottom, left, right) of the pixels of its colour."""
    found = {}
    for label in range(3):
        rows, columns = np.nonzero(image[..., label])
        if len(rows):
            found[label] = (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)
    return found


def test_boxes_are_where_the_objects_are_in_crops_and_mirror_images(scenes):
    """From the pixels alone: each class has a colour channel of its own."""
    batch = take(make_config(scenes), 40)
    seen = 0
    for image, tokens in zip(batch["image"], batch["layout"], strict=True):
        layout = ENCODING.decode(tokens)
        left, top = layout.crop[0] * 40, layout.crop[1] * 24
        found = {}
        for item in layout.objects:
            x, y, width, height = np.array(item.box) * (40, 24, 40, 24) - (left, top, 0, 0)
            edges = np.clip([y, y + height, x, x + width], 0, 16)
            if min(edges[1] - edges[0], edges[3] - edges[2]) > 0.25:
                found[item.label] = edges  # not what touches the crop from outside
        expected = drawn_boxes(image)
        assert found.keys() == expected.keys()
        for label, edges in expected.items():
            np.testing.assert_allclose(found[label], edges, atol=0.25)
            seen += 1
    assert seen > 500
    crops = {tuple(tokens[-2:]) for tokens in batch["layout"]}
    assert len(crops) > 60


def test_shares_of_the_crop_without_its_tokens(scenes):
    encoding = LayoutEncoding(3, num_tokens=40_000, max_objects=4, with_crop=False)
    batch = take(make_config(scenes, random_flip=False), 10, Layouts(encoding))
    inside = 0
    for image, tokens in zip(batch["image"], batch["layout"], strict=True):
        boxes = {item.label: item.box for item in encoding.decode(tokens).objects}
        for label, (top, bottom, left, right) in drawn_boxes(image).items():
            x, y, width, height = np.array(boxes[label]) * 16
            np.testing.assert_allclose([x, y], [left, top], atol=0.1)
            if top > 0 and left > 0:  # boxes that begin outside keep their size, as the reference's
                inside += 1
                np.testing.assert_allclose([x + width, y + height], [right, bottom], atol=0.1)
    assert inside > 20


def test_training_shuffles_and_evaluation_keeps_the_order(scenes):
    layouts, sharding = Layouts(ENCODING, class_names=NAMES), make_sharding()
    config = make_config(scenes, random_crop=False, random_flip=False, resize=0)
    orders = {}
    for tokens in take(config, 100)["layout"]:
        labels = tuple(tokens[:9:3].tolist())
        if PAD not in labels:
            orders.setdefault(frozenset(map(tuple, tokens[:9].reshape(3, 3).tolist())), set()).add(
                labels
            )
    assert orders and all(len(own) == 6 for own in orders.values())  # all orders of three objects

    batches = evaluation_batches(config, sharding, 10, conditions=(layouts,))
    ((batch, mask),) = [jax.tree.map(np.asarray, batch) for batch in batches]
    assert mask.all()
    for number, tokens in enumerate(batch["layout"], 30):
        file = scenes / "layout" / "validation" / f"{number:02}.json"
        crop = (8 / 40, 0.0, 24 / 40, 1.0)  # of the scaled image, 16 x 27 pixels
        objects = tuple(
            SceneObject(NAMES.index(item["class"]), tuple(item["box"]))
            for item in json.loads(file.read_text())["objects"]
        )
        expected = ENCODING.decode(ENCODING.encode(Layout(objects, crop)))
        found = ENCODING.decode(tokens)
        assert [item.label for item in found.objects] == [item.label for item in expected.objects]
        np.testing.assert_allclose(found.crop, (5 / 27, 0, 16 / 27, 1), atol=0.006)


def test_a_batch_depends_on_seed_and_step_alone(scenes):
    config = make_config(scenes, processes=1)
    later = take(config, 2, start_step=3)
    config.data.processes = 0
    whole = take(config, 5)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[3 * 8 :]), later, whole)


def test_layouts_change_nothing_of_the_images(scenes):
    config = make_config(scenes)
    batches = training_batches(config, make_sharding())
    alone = np.concatenate([np.asarray(next(batches)["image"]) for _ in range(6)])
    batches.close()
    np.testing.assert_array_equal(take(config, 6)["image"], alone)


def test_small_objects_are_left_out_and_the_largest_kept(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    sizes = (0.01, 0.5, 0.1, 0.4, 0.3, 0.2)
    objects = [{"class": i % 3, "box": [0.0, 0.1 * i, size, 0.5]} for i, size in enumerate(sizes)]
    write(tmp_path, "many", pixels, objects)
    write(tmp_path, "one", pixels, objects[:1])
    write(tmp_path, "none", pixels, [])

    def labels(layouts):
        read = open_reader(make_config(tmp_path).data, "train", Transform(16, -1), [layouts])
        tokens = [read.exactly(index)["layout"] for index in range(3)]  # many, none, one
        assert read.blank()["layout"].shape == tokens[0].shape == (14,)
        return [[t for t in row[:-2:3].tolist() if t != PAD] for row in tokens]

    assert labels(Layouts(ENCODING)) == [[1, 0, 1, 2], [], [0]]  # not the first and the third
    assert labels(Layouts(ENCODING, min_area=0.1)) == [[1, 0, 1], [], []]  # 0.1 is not more
    assert labels(Layouts(ENCODING, min_area=0.3)) == [[], [], []]


def test_every_view_has_its_own_tokens(scenes):
    views = AllViews(Transform(16, 20), list_views(("flip", "ten_crop")))
    read = open_reader(make_config(scenes).data, "train", views, [Layouts(ENCODING)])
    example = read.exactly(3)
    assert example["layout"].shape == (22, ENCODING.length) == read.blank()["layout"].shape
    crops = [ENCODING.decode(tokens).crop for tokens in example["layout"]]
    assert len(set(crops)) >= 10
    straight, mirrored = crops[2], crops[3]  # of the upper left corner
    np.testing.assert_allclose(mirrored[0], 1 - straight[0] - straight[2], atol=1e-9)


def test_what_is_wrong_is_one_line(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    whole = [{"class": 2, "box": [0, 0, 1, 1]}]
    write(tmp_path, "a", pixels, whole)
    path = tmp_path / "layout" / "train" / "a.json"

    def refused(objects=whole, classes=None, encoding=ENCODING, **options):
        path.write_text(json.dumps(objects))
        if classes is not None:
            (tmp_path / "layout" / "classes.txt").write_text(classes)
        with pytest.raises(DataError) as error:
            take(make_config(tmp_path), 1, Layouts(encoding, **options))
        assert "\n" not in str(error.value)
        return str(error.value)

    line = refused(encoding=LayoutEncoding(2))
    assert str(path) in line and "objects[0] has the label 2, but config.condition.layout" in line
    assert f"{path}: objects[0]: the box [0.5, 0, 1, 1] leaves the frame" in refused(
        [{"class": 2, "box": [0.5, 0, 1, 1]}]
    )
    assert "classes have no names here; give a number from 0." in refused(
        [{"class": "dog", "box": [0, 0, 1, 1]}]
    )
    assert f"{path}: The layout has 'crop'; known here are objects" in refused(
        {"objects": whole, "crop": [0, 0, 1, 1]}
    )
    assert "smallest area of an object is 1.0" in refused(min_area=1.0)
    assert "there is no class 'dgo'; is 'dog' meant?" in refused(
        [{"class": "dgo", "box": [0, 0, 1, 1]}], classes="cat\ndog\n"
    )
    assert "the class 2 is outside of the numbers from 0 to 1" in refused()
    assert "classes.txt has the class 'cat' twice" in refused(classes="cat\ncat\n")
    assert "classes.txt has no classes" in refused(classes="\n")
    (tmp_path / "layout" / "classes.txt").unlink()
    path.rename(path.with_name("b.json"))
    config = make_config(tmp_path)
    with pytest.raises(DataError) as error:
        take(config, 1)
    assert f"a.png has no JSON file of the feature 'layout'; it would be {path.parent}/a with " in (
        str(error.value)
    )
    config.data.train_split = "validation"
    (tmp_path / "validation").mkdir()
    Image.fromarray(pixels).save(tmp_path / "validation" / "a.png")
    with pytest.raises(DataError, match="no JSON files of the feature 'layout': there is no folde"):
        take(config, 1)


# ---- Named data sets, of the features of coco/2017 and open_images_v4.

BOXES = np.array([[0.25, 0.5, 0.75, 1.0], [0.0, 0.125, 1.0, 0.25]], np.float32)  # top, left, ...
LABELS = tfds.features.ClassLabel(names=list(NAMES))


def image_bytes():
    content = io.BytesIO()
    Image.new("RGB", (40, 24)).save(content, "PNG")
    content.seek(0)
    return content


class TinyCoco(tfds.core.GeneratorBasedBuilder):
    """Two images, the second without objects."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        parts = {
            "id": np.int64,
            "area": np.int64,
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=list(NAMES)),
            "is_crowd": np.bool_,
        }
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "image/filename": tfds.features.Text(),
            "objects": tfds.features.Sequence(parts),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(2):
            objects = [
                {
                    "id": i,
                    "area": 1,
                    "bbox": tfds.features.BBox(*map(float, box)),
                    "label": 2 - i,
                    "is_crowd": i == 1,
                }
                for i, box in enumerate(BOXES if number == 0 else ())
            ]
            yield (
                number,
                {"image": image_bytes(), "image/filename": f"{number}.png", "objects": objects},
            )


class TinyOpenImages(tfds.core.GeneratorBasedBuilder):
    """One image; its other objects are of the image as a whole and have no boxes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        flags = ("is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside")
        parts = {
            "label": tfds.features.ClassLabel(names=list(NAMES)),
            "source": tfds.features.ClassLabel(names=["human"]),
            "bbox": tfds.features.BBoxFeature(),
        } | dict.fromkeys(flags, np.int8)
        whole = {"label": tfds.features.ClassLabel(names=["x"]), "confidence": np.int32}
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "objects": tfds.features.Sequence(whole),
            "bobjects": tfds.features.Sequence(parts),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        flags = [(1, 1, 0, -1, 1), (-1, 0, 1, 1, 0)]
        names = ("is_occluded", "is_truncated", "is_group_of", "is_depiction", "is_inside")
        objects = [
            {"label": i, "source": 0, "bbox": tfds.features.BBox(*map(float, BOXES[i]))}
            | dict(zip(names, flags[i], strict=True))
            for i in range(2)
        ]
        whole = [{"label": 0, "confidence": 1}]
        yield 0, {"image": image_bytes(), "objects": whole, "bobjects": objects}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    for builder in (TinyCoco, TinyOpenImages):
        builder(data_dir=data_dir).download_and_prepare(file_format="array_record")
    return data_dir


RIGHT, LEFT = (0.5, 0.25, 0.5, 0.5), (0.125, 0.0, 0.125, 1.0)  # x, y, width, height


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "tiny_coco",
            (SceneObject(2, RIGHT), SceneObject(1, LEFT, frozenset({"group"}))),
        ),
        (
            "tiny_open_images",
            (
                SceneObject(0, RIGHT, frozenset({"occluded", "inside"})),
                SceneObject(1, LEFT, frozenset({"group", "depiction"})),
            ),
        ),
    ],
)
def test_objects_of_named_data_sets(data_dir, name, expected):
    source = open_source(name, "train", data_dir, features={"layout": Feature.OBJECTS})
    source = pickle.loads(pickle.dumps(source))
    assert source.object_names == NAMES
    found = [source.read(i)["features"]["layout"] for i in range(len(source))]
    assert expected in found and all(objects in ((), expected) for objects in found)


def test_named_data_sets_give_batches(data_dir):
    config = make_config("", name="tiny_coco", data_dir=str(data_dir), resize=0)
    batch = take(config, 1)
    assert batch["layout"].shape == (8, ENCODING.length)
    kinds = {frozenset(tokens[:-2:3].tolist()) for tokens in batch["layout"]}
    assert frozenset({PAD}) in kinds and len(kinds) > 1


def test_named_data_sets_without_objects_or_keypoints(data_dir, tmp_path):
    from test_data_named import TinyPhotographs

    TinyPhotographs(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    with pytest.raises(DataError, match="tiny_photographs has no objects with boxes, which"):
        open_source("tiny_photographs", "train", tmp_path, features={"layout": Feature.OBJECTS})
    with pytest.raises(DataError, match="tiny_coco has no keypoints that can be read; only fold"):
        open_source("tiny_coco", "train", data_dir, features={"pose": Feature.KEYPOINTS})
