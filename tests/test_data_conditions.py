"""Conditions beside images: the same resizing, crop and mirroring, pixel for pixel."""

import itertools
import logging

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from vqgan_jax.conditions.derived import canny_edges, low_resolution
from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.data.augmentations import AllViews, list_views
from vqgan_jax.data.condition_sources import ConditionImage, Coordinates
from vqgan_jax.data.pipeline import evaluation_batches, open_reader, training_batches
from vqgan_jax.data.transforms import Transform
from vqgan_jax.errors import DataError

COUNT, HEIGHT, WIDTH, LABELS = 110, 24, 28, 7
ALL = (
    ConditionImage("inverse", image_key="negative"),
    ConditionImage("segmentation", image_key="maps", num_labels=LABELS),
    ConditionImage("edges", derive="edges"),
    ConditionImage("low_resolution", derive="low_resolution", scale=2),
    Coordinates(factor=4, intervals=100),
)


def labels_of(images):
    """The label that belongs to each pixel, which tells its place in green and blue."""
    return (3 * images[..., 1].astype(int) + images[..., 2]) % LABELS


def write(root, number, split="train"):
    """An image of which each pixel tells its place, and two other pictures of the same."""
    rows, columns = np.indices((HEIGHT, WIDTH))
    squares = (rows // 6 + columns // 6) % 2  # whose edges can be seen
    pixels = np.dstack([number + 110 * squares, rows, columns]).astype(np.uint8)
    others = {"negative": 255 - pixels, "maps": labels_of(pixels).astype(np.uint8)}
    for key, picture in ({"": pixels} | others).items():
        path = root / key / split / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for number in range(COUNT):
        write(root, number, "train" if number < 100 else "val")
    return root


def make_config(folder, **data):
    config = tokenizer_config()
    config.model.resolution = 16
    config.training.batch_size = 8
    config.data.update({"name": f"folder:{folder}", "resize": -1, "threads": 2} | data)
    return config


def make_sharding(count=1):
    mesh = jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )
    return NamedSharding(mesh, PartitionSpec("data"))


def take(config, count, conditions=ALL, **options):
    batches = training_batches(config, make_sharding(), conditions=conditions, **options)
    taken = [jax.tree.map(np.asarray, batch) for batch in itertools.islice(batches, count)]
    batches.close()
    return {key: np.concatenate([batch[key] for batch in taken]) for key in taken[0]}


def assert_belongs_together(batch):
    """Every condition is the function of the image's pixels that it was before the crop."""
    images = batch["image"]
    np.testing.assert_array_equal(batch["inverse"], 255 - images)
    np.testing.assert_array_equal(batch["segmentation"], labels_of(images))
    for key, derive in (("edges", canny_edges), ("low_resolution", lambda x: low_resolution(x, 2))):
        np.testing.assert_array_equal(batch[key], [derive(image) for image in images])
    # Green and blue say where in the whole image each pixel was.
    numbers = images[..., 1].astype(float) * WIDTH + images[..., 2]
    squares = numbers.reshape(-1, 4, 4, 4, 4).mean(axis=(2, 4)).reshape(-1, 16)
    assert batch["coordinates"].shape == squares.shape
    assert batch["coordinates"].dtype == np.int32
    error = batch["coordinates"] - squares / (HEIGHT * WIDTH) * 100
    assert np.abs(error).max() < 0.5 + 1e-4


def test_random_crops_and_mirroring_are_those_of_the_image(pictures):
    batch = take(make_config(pictures), 25)
    assert_belongs_together(batch)
    images = batch["image"]
    corners = {tuple(image[0, :, 1:].min(axis=0)) for image in images}
    mirrored = images[:, 0, 0, 2] > images[:, 0, 1, 2]
    assert len(corners) > 60 and 0.35 < mirrored.mean() < 0.65
    assert len({tuple(tokens) for tokens in batch["coordinates"]}) > 60
    assert 0.02 < np.mean(batch["edges"] > 0) < 0.5


def test_conditions_change_nothing_of_the_images(pictures):
    config = make_config(pictures)
    alone, beside = take(config, 15, conditions=()), take(config, 15)
    assert alone.keys() == {"image", "label"}
    for key in alone:
        np.testing.assert_array_equal(beside[key], alone[key])


def test_a_batch_depends_on_seed_and_step_alone(pictures):
    config = make_config(pictures, processes=1)
    later = take(config, 2, start_step=12)
    config.data.processes = 0
    whole = take(config, 14)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[12 * 8 :]), later, whole)


def test_resizing_is_that_of_the_image(tmp_path):
    random = np.random.default_rng(0)
    for number in range(20):
        height, width = random.integers(20, 60, 2)
        small = Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8))
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        columns = np.tile(np.arange(width, dtype=np.uint8) * 4, (height, 1))
        image = np.dstack([np.asarray(image)[..., :2], columns])
        for key, picture in (("", image), ("copy", image), ("columns", columns)):
            (tmp_path / key / "train").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / key / "train" / f"{number}.png")
    conditions = (ConditionImage("copy", "copy"), ConditionImage("columns", "columns", 256))
    batch = take(make_config(tmp_path, resize=24), 10, conditions)
    np.testing.assert_array_equal(batch["copy"], batch["image"])
    inner = np.s_[:, 2:-2, 2:-2]  # where the bicubic filter sees the whole ramp
    difference = batch["columns"][inner] - batch["image"][inner][..., 2].astype(int)
    assert np.abs(difference).max() <= 6  # of 4 a column: the nearest one


def test_evaluation_takes_the_centre_and_masks_padding(pictures):
    batches = evaluation_batches(make_config(pictures), make_sharding(4), 8, conditions=ALL)
    found = [jax.tree.map(np.asarray, batch) for batch in batches]
    batch = {key: np.concatenate([one[key] for one, _ in found]) for key in found[0][0]}
    mask = np.concatenate([mask for _, mask in found])
    assert mask.tolist() == [1] * 10 + [0] * 6
    assert_belongs_together(jax.tree.map(lambda values: values[:10], batch))
    assert batch["image"][0, 0, 0].tolist() == [210, 4, 6]
    assert {key: values.dtype for key, values in batch.items()} == {
        **{"image": np.uint8, "inverse": np.uint8, "segmentation": np.uint8, "edges": np.uint8},
        **{"low_resolution": np.uint8, "coordinates": np.int32, "label": np.int32},
    }


@pytest.mark.parametrize("resize", [-1, 20])
def test_views_are_those_of_the_image(pictures, resize):
    views = AllViews(Transform(16, resize), list_views(("flip", "ten_crop")))
    read = open_reader(make_config(pictures).data, "train", views, ALL)
    example = read.exactly(3)
    assert example["image"].shape == (22, 16, 16, 3)
    assert example["coordinates"].shape == (22, 16)
    assert {k: v.shape for k, v in read.blank().items()} == {k: v.shape for k, v in example.items()}
    if resize == -1:  # scaling would blur what pixels tell
        assert_belongs_together(example)
    for key in ("inverse", "segmentation"):
        np.testing.assert_array_equal(example[key][1], example[key][0][:, ::-1])
    flipped = example["coordinates"].reshape(22, 4, 4)
    np.testing.assert_array_equal(flipped[3], flipped[2][:, ::-1])


def test_a_damaged_condition_is_a_damaged_example(tmp_path, caplog):
    for number in range(COUNT):
        write(tmp_path, number)
    damaged = tmp_path / "maps" / "train" / "057.png"
    damaged.write_bytes(b"damaged")
    config = make_config(tmp_path, validation_split="train")
    with caplog.at_level(logging.WARNING):
        batch = take(config, 2 * COUNT // 8)
    assert_belongs_together(batch)
    assert 57 not in batch["image"][..., 0] and 58 in batch["image"][..., 0]
    warnings = [record.getMessage() for record in caplog.records]
    assert sum(f"{damaged} cannot be decoded" in warning for warning in warnings) == 1
    batches = evaluation_batches(config, make_sharding(), COUNT, conditions=ALL)
    ((_, mask),) = batches
    assert np.flatnonzero(np.asarray(mask) == 0).tolist() == [57]
    (tmp_path / "negative" / "train" / "003.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 images or more of 110 .*003.png.*057.png"):
        list(itertools.islice(evaluation_batches(config, make_sharding(), 8, conditions=ALL), 20))


def test_what_does_not_fit_is_one_line(tmp_path):
    for number in range(3):
        write(tmp_path, number)
    config = make_config(tmp_path)

    def refused(*conditions, **options):
        with pytest.raises(DataError) as error:
            take(make_config(tmp_path, **options), 2, conditions)
        assert "\n" not in str(error.value)
        return str(error.value)

    few = ConditionImage("segmentation", "maps", num_labels=5)
    line = refused(few)
    assert f"{tmp_path}/maps/train/00" in line and "has the label 6" in line
    assert "condition segmentation knows 0 to 4" in line
    assert "is no label map: its mode is RGB" in refused(ConditionImage("negative", "negative", 9))
    assert "there is no folder" in refused(ConditionImage("depth", "depth"))
    assert "is there twice" in refused(ALL[0], ALL[0])
    assert "cannot be called 'label'" in refused(ConditionImage("label", "maps"))
    assert "cannot be called '../x'" in refused(ConditionImage("../x", "maps"))
    both = (ALL[1], ConditionImage("again", "maps"))
    assert "'maps' cannot be a label map for one" in refused(*both)
    assert "derived as 'depth'; there are edges, low_resolution" in refused(
        ConditionImage("a", derive="depth")
    )
    small = ConditionImage("small", derive="low_resolution", scale=17)
    assert "17 times smaller; it must be 1 to 16 times" in refused(small)
    assert "here the images are label maps" in refused(ALL[2], image_key="maps", num_labels=7)
    assert "here the tokenizer is one of label maps" in refused(
        ConditionImage("edges", derive="edges", num_labels=3)
    )
    assert "one a 3 pixels" in refused(Coordinates(3, 10))

    path = tmp_path / "negative" / "train" / "001.png"
    Image.new("RGB", (20, 20)).save(path)
    line = refused(ALL[0])
    assert f"{path} has 20 x 20 pixels, and its image has 28 x 24" in line
    path.unlink()
    assert f"001.png has no picture of the feature 'negative'; it would be {path.parent}" in (
        refused(ALL[0])
    )
    assert take(config, 1, (ALL[1],))["segmentation"].shape == (8, 16, 16)
