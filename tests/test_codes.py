"""Codes on disk: shards, manifest, whole batches by (seed, step), and what is refused."""

import dataclasses
import itertools
import json
import resource
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.data.augmentations import AllViews, list_views
from vqgan_jax.data.code_batches import evaluation_code_batches, training_code_batches
from vqgan_jax.data.code_manifest import CodesInfo, ConditionInfo
from vqgan_jax.data.code_writer import CodeWriter
from vqgan_jax.data.codes import check_codes, open_codes
from vqgan_jax.data.transforms import Transform
from vqgan_jax.errors import DataError

COUNT, VIEWS = 50, 3
FACTS = CodesInfo(
    dataset="folder:photographs",
    split="train",
    image_key="image",
    count=COUNT,
    class_names=("cat", "dog"),
    resolution=32,
    resize=32,
    augmentations=("a", "b", "c"),
    grid=(2, 4),
    codebook_size=1000,
    fingerprint="5" * 64,
    dtype="float32",
    images_per_shard=16,
)


def random_codes(info, seed=0):
    """Codes and labels of a whole split."""
    random = np.random.default_rng(seed)
    shape = (info.count, len(info.augmentations), info.grid[0] * info.grid[1])
    labels = random.integers(0, max(info.num_classes, 1), info.count)
    return random.integers(0, info.codebook_size, shape), labels


def write(directory, info=FACTS, shards=None, codes=None, labels=None):
    """A pass that writes `shards`, or all of them and the manifest."""
    random = random_codes(info)
    codes = random[0] if codes is None else codes
    labels = random[1] if labels is None else labels
    writer = CodeWriter(directory, info)
    writer.begin()
    for shard in writer.unfinished() if shards is None else shards:
        images = info.images_of(shard)
        writer.write(shard, codes[images], labels[images])
    if shards is None:
        writer.finish()
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write(tmp_path_factory.mktemp("codes") / "train")


def contents(directory):
    """Every file below a directory."""
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ---- Views.


def test_views_are_named_and_each_is_there_once():
    def names(*augmentations):
        return [view.name for view in list_views(augmentations)]

    assert names() == ["centre"]
    assert names("flip") == ["centre", "centre_flip"]
    assert names("ten_crop")[:4] == [
        "centre",
        "1.10_top_left",
        "1.10_top_left_flip",
        "1.10_top_right",
    ]
    assert len(names("ten_crop")) == len(set(names("ten_crop"))) == 21
    both = names("ten_crop", "flip")
    assert both == names("flip", "ten_crop") and len(both) == len(set(both)) == 22
    assert both[-1] == "1.05_centre_flip"
    with pytest.raises(DataError, match="no augmentation 'rotate'; there are flip and ten_crop"):
        list_views(["rotate"])


def test_ten_crops_are_cut_from_the_centre_square_of_a_larger_image():
    image = np.random.default_rng(0).integers(0, 256, (80, 120, 3)).astype(np.uint8)
    views = list_views(("flip", "ten_crop"))
    crops = AllViews(Transform(40, 40), views)(image)
    assert crops.shape == (22, 40, 40, 3)
    crops = dict(zip((view.name for view in views), crops, strict=True))
    for scale, side in (("", 40), ("1.10_", 44), ("1.05_", 42)):
        width = round(120 * side / 80)
        resized = Image.fromarray(image).resize((width, side), Image.Resampling.BICUBIC)
        left = (width - side) // 2
        square = np.asarray(resized)[:, left : left + side]
        margin = side - 40
        places = {"centre": (margin // 2, margin // 2)}
        if scale:
            places |= {"top_left": (0, 0), "bottom_right": (margin, margin)}
            places |= {"top_right": (0, margin), "bottom_left": (margin, 0)}
        for place, (y, x) in places.items():
            expected = square[y : y + 40, x : x + 40]
            np.testing.assert_array_equal(crops[scale + place], expected)
            np.testing.assert_array_equal(crops[f"{scale}{place}_flip"], expected[:, ::-1])


def test_pixels_that_are_taken_as_they_are_are_not_scaled():
    labels = np.arange(60 * 60).reshape(60, 60).astype(np.uint8)  # of a map
    views = AllViews(Transform(40, -1), list_views(["ten_crop"]))(labels)
    np.testing.assert_array_equal(views[0], labels[10:50, 10:50])
    np.testing.assert_array_equal(views[1], labels[8:48, 8:48])  # of a square of 44
    with pytest.raises(DataError, match="42 x 42 pixels are too few for a crop of 44"):
        AllViews(Transform(40, -1), list_views(["ten_crop"]))(labels[:42, :42])


# ---- Reading.


def test_gather_is_indexing(directory):
    codes, labels = random_codes(FACTS)
    opened = open_codes(directory, verify=True)
    assert len(opened) == COUNT and opened.grid == (2, 4) and opened.codebook_size == 1000
    assert opened.num_classes == 2 and opened.class_names == ("cat", "dog")
    assert opened.fingerprint == FACTS.fingerprint and opened.num_replaced == 0
    np.testing.assert_array_equal(opened.labels, labels)
    random = np.random.default_rng(1)
    images, views = random.integers(0, COUNT, 200), random.integers(0, VIEWS, 200)
    gathered = opened.gather(images, views)
    np.testing.assert_array_equal(gathered, codes[images, views])
    assert gathered.dtype == np.int32


def test_files_are_plain_arrays_of_the_smallest_type(directory, tmp_path):
    shard = np.load(directory / "codes-00003-of-00004.npy")
    np.testing.assert_array_equal(shard, random_codes(FACTS)[0][48:])
    assert shard.dtype == np.uint16 and shard.shape == (2, VIEWS, 8)
    labels = np.load(directory / "labels-00000-of-00004.npy")
    assert labels.dtype == np.int32 and labels.shape == (16,)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert [shard["n"] for shard in manifest["shards"]] == [16, 16, 16, 2]
    assert {p.name for p in directory.iterdir()} == {"manifest.json"} | {
        f"{kind}-{i:05}-of-00004.npy" for kind in ("codes", "labels") for i in range(4)
    }

    for size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        info = dataclasses.replace(FACTS, codebook_size=size)
        codes = random_codes(info)[0]
        codes[0] = size - 1
        large = open_codes(write(tmp_path / str(size), info, codes=codes), verify=True)
        assert np.load(tmp_path / str(size) / "codes-00000-of-00004.npy").dtype == dtype
        np.testing.assert_array_equal(large.gather(np.arange(COUNT)), codes[:, 0])


def test_a_pass_has_every_image_once_with_its_label(directory):
    codes, labels = random_codes(FACTS)
    opened = open_codes(directory)
    batches = [opened.batch(seed=3, step=step, batch_size=8) for step in range(25)]
    sequences = np.concatenate([batch["codes"] for batch in batches])
    assert sequences.dtype == np.int32 and batches[0]["label"].dtype == np.int32
    # Which image and view a sequence is: random sequences of eight codes are all different.
    matches = (sequences[:, None, None] == codes[None]).all(-1)
    assert (matches.sum((1, 2)) == 1).all()
    _, images, views = matches.nonzero()
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]), labels[images])
    passes = images.reshape(4, COUNT)
    np.testing.assert_array_equal(np.sort(passes), np.tile(np.arange(COUNT), (4, 1)))
    for one, other in itertools.combinations(passes, 2):
        assert np.mean(one == other) < 0.2
    assert (np.bincount(views, minlength=VIEWS) > 45).all()  # of 200 / 3
    assert len({(image, view) for image, view in zip(images, views, strict=True)}) > 2 * COUNT


def test_a_batch_depends_on_seed_and_step_alone(directory):
    opened, again = open_codes(directory), open_codes(directory)
    for step in (0, 5, 6, 1000):  # in one pass, and across the end of one
        whole = opened.batch(7, step, 10)
        jax.tree.map(np.testing.assert_array_equal, again.batch(7, step, 10), whole)
        for rows in (np.arange(5), np.array([1, 4, 9])):
            part = opened.batch(7, step, 10, rows)
            np.testing.assert_array_equal(part["codes"], whole["codes"][rows])
            np.testing.assert_array_equal(part["label"], whole["label"][rows])
        assert (opened.batch(8, step, 10)["codes"] != whole["codes"]).any()


def test_the_order_stays_what_it_is(directory):
    """Runs that go on with a newer program must meet the same batches."""
    codes, _ = random_codes(FACTS)
    batch = open_codes(directory).batch(seed=0, step=6, batch_size=8)["codes"]
    found = [tuple(np.argwhere((codes == row).all(-1))[0].tolist()) for row in batch]
    assert found == [(27, 0), (26, 0), (32, 0), (30, 2), (7, 1), (6, 1), (26, 0), (42, 2)]


def test_batches_on_devices_are_those_of_the_reader(directory):
    codes = open_codes(directory)
    config = tokenizer_config()
    config.seed, config.training.batch_size = 5, 16
    for axes in ((1, 1), (4, 2)):
        sharding = make_sharding(*axes)
        batches = training_code_batches(codes, config, sharding, start_step=2)
        for step, batch in zip(range(2, 6), batches, strict=False):
            assert batch["codes"].sharding.is_equivalent_to(sharding, 2)
            jax.tree.map(np.testing.assert_array_equal, batch, codes.batch(5, step, 16))
        batches.close()


def make_sharding(data, fsdp):
    devices = jax.devices()[: data * fsdp]
    axis_types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=axis_types, devices=devices)
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


@pytest.mark.parametrize(("limit", "indices"), [(0, range(COUNT)), (7, [0, 7, 14, 21, 28, 35, 42])])
def test_evaluation_has_each_image_once_as_it_is(directory, limit, indices):
    codes, labels = random_codes(FACTS)
    opened, config = open_codes(directory), tokenizer_config()
    batches = list(evaluation_code_batches(opened, config, make_sharding(4, 1), 16, limit))
    assert len(batches) == -(-len(indices) // 16)
    masks = np.concatenate([mask for _, mask in batches])
    assert masks.dtype == np.float32 and masks.tolist() == sorted(masks, reverse=True)
    sequences = np.concatenate([batch["codes"] for batch, _ in batches])[masks > 0]
    np.testing.assert_array_equal(sequences, codes[list(indices), 0])
    found = np.concatenate([batch["label"] for batch, _ in batches])[masks > 0]
    np.testing.assert_array_equal(found, labels[list(indices)])


def test_reading_feeds_100_000_sequences_a_second(tmp_path):
    """On one core, of 256 codes, in batches of 256 from 40 files."""
    info = dataclasses.replace(
        FACTS, count=10_000, images_per_shard=250, grid=(16, 16), augmentations=("a", "b")
    )
    codes = open_codes(write(tmp_path / "many", info))
    rates = []
    for repeat in range(5):  # the best, as other processes may be at work on the same core
        start = time.perf_counter()
        for step in range(100):
            codes.batch(repeat, step, 256)
        rates.append(100 * 256 / (time.perf_counter() - start))
    print(f"{max(rates):,.0f} sequences a second")
    assert max(rates) > 100_000


# ---- Conditions.

RELIEF = ConditionInfo(
    "relief", 6, 300, (2, 3), fingerprint="7" * 64, dtype="float32", image_key="relief"
)
PLACE = ConditionInfo("coordinates", 8, 2**16 + 1, (2, 4))
SMALL = ConditionInfo(
    "low_resolution", 8, 50, (2, 4), fingerprint="8" * 64, derive="low_resolution", scale=4
)
WITH_CONDITIONS = dataclasses.replace(FACTS, conditions=(RELIEF, PLACE, SMALL))


def write_conditions(directory, tokens=None):
    """Codes with three conditions; returns their tokens."""
    random, (codes, labels) = np.random.default_rng(2), random_codes(FACTS)
    tokens = tokens or {
        c.name: random.integers(0, c.vocabulary, (COUNT, VIEWS, c.num_tokens))
        for c in WITH_CONDITIONS.conditions
    }
    writer = CodeWriter(directory, WITH_CONDITIONS)
    writer.begin()
    for shard in writer.unfinished():
        images = WITH_CONDITIONS.images_of(shard)
        parts = {name: values[images] for name, values in tokens.items()}
        writer.write(shard, codes[images], labels[images], conditions=parts)
    writer.finish()
    return tokens


def test_conditions_are_of_the_same_image_and_view(tmp_path):
    tokens = write_conditions(tmp_path / "train")
    opened = open_codes(tmp_path / "train", verify=True)
    assert opened.conditions == {"relief": RELIEF, "coordinates": PLACE, "low_resolution": SMALL}
    for name, dtype in (("relief", np.uint16), ("coordinates", np.uint32)):
        stored = np.load(tmp_path / "train" / f"condition-{name}-00001-of-00004.npy")
        np.testing.assert_array_equal(stored, tokens[name][16:32])
        assert stored.dtype == dtype

    codes, labels = random_codes(FACTS)
    sharding, config = make_sharding(4, 2), tokenizer_config()
    config.training.batch_size = 16
    batches = training_code_batches(opened, config, sharding)
    for _, batch in zip(range(8), batches, strict=False):
        batch = jax.tree.map(np.asarray, batch)
        found = (batch["codes"][:, None, None] == codes[None]).all(-1)
        _, images, views = found.nonzero()
        assert len(images) == 16 and batch.keys() == {"codes", "label", *tokens}
        for name, values in tokens.items():
            np.testing.assert_array_equal(batch[name], values[images, views])
            assert batch[name].dtype == np.int32
    batches.close()
    for batch, _ in evaluation_code_batches(opened, config, sharding, COUNT + 14):
        np.testing.assert_array_equal(batch["relief"][:COUNT], tokens["relief"][:, 0])
        np.testing.assert_array_equal(batch["label"][:COUNT], labels)


def test_codes_of_the_first_version_are_read(directory, copy):
    """They had no conditions and no depth, and neither had a pass that was under way."""
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("conditions") == [] and manifest.pop("depth") == 1
    assert manifest.pop("sha256") and manifest.pop("folder_rules") == 1
    for shard in manifest["shards"]:
        assert shard.pop("conditions") == {}
    path.write_text(json.dumps(manifest | {"version": 1}, indent=1))
    opened = open_codes(copy, verify=True)
    assert opened.conditions == {} and opened.batch(0, 0, 4).keys() == {"codes", "label"}
    (copy / "labels-00003-of-00004.npy").unlink()
    writer = CodeWriter(copy, FACTS)
    writer.begin()
    plan = copy / "partial" / "plan.json"
    values = json.loads(plan.read_text())
    del values["conditions"], values["depth"]
    plan.write_text(json.dumps(values | {"version": 1}))
    assert CodeWriter(copy, FACTS).unfinished() == [3]
    write(copy)
    assert contents(copy) == contents(directory)


def test_damage_in_a_condition_is_found_and_named(tmp_path):
    tokens = write_conditions(tmp_path / "train")
    path = tmp_path / "train" / "condition-relief-00002-of-00004.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
    open_codes(tmp_path / "train")
    with pytest.raises(DataError) as error:
        open_codes(tmp_path / "train", verify=True)
    assert "condition-relief-00002-of-00004.npy has another SHA-256" in str(error.value)
    assert "\n" not in str(error.value) and "1 of the files" in str(error.value)
    path.unlink()
    with pytest.raises(DataError, match="condition-relief-00002-of-00004.npy is missing"):
        open_codes(tmp_path / "train")
    writer = CodeWriter(tmp_path / "train", WITH_CONDITIONS)
    writer.begin()
    assert writer.unfinished() == [2]
    write_conditions(tmp_path / "train", tokens)
    assert path.read_bytes() == whole

    tokens["relief"][20, 1, 3] = 300
    write_conditions(tmp_path / "other", tokens)
    words = "condition-relief-00001-of-00004.npy has the code 300 of a vocabulary of 300"
    with pytest.raises(DataError, match=words):
        open_codes(tmp_path / "other", verify=True)


def test_conditions_of_something_else_are_refused(tmp_path, directory):
    write_conditions(tmp_path / "train")
    fits = dict(fingerprint="5" * 64, grid=(2, 4), codebook_size=1000)
    codes, change = open_codes(tmp_path / "train"), dataclasses.replace
    check_codes(codes, **fits, conditions=[SMALL, PLACE, change(RELIEF, dtype="bfloat16")])
    for where, wanted, words in (
        (codes, change(RELIEF, name="depth"), "no tokens of the condition depth; it has relief, c"),
        (open_codes(directory), RELIEF, "no tokens of the condition relief; it has none of any"),
        (codes, change(RELIEF, fingerprint="6" * 64), "fingerprint is 7{12}, and 6{12} is exp"),
        (codes, change(RELIEF, num_tokens=4, grid=(2, 2)), "num_tokens is 6; 4 is expected"),
        (codes, change(PLACE, vocabulary=1025), "vocabulary is 65537; 1025 is expected"),
        (codes, change(RELIEF, image_key="elevation"), "image_key is 'relief'; 'elevation' is"),
        (codes, change(SMALL, scale=2), "low_resolution whose scale is 4; 2 is expected"),
    ):
        with pytest.raises(DataError, match=words) as error:
            check_codes(where, **fits, conditions=[wanted])
        assert "\n" not in str(error.value) and "another --output" in str(error.value)


def test_a_pass_with_other_conditions_is_refused(tmp_path):
    write_conditions(tmp_path / "train")
    before = contents(tmp_path)
    for conditions, words in (
        ((), "its conditions is relief, coordinates, low_resolution, and here it is none"),
        ((RELIEF, PLACE), "and here it is relief, coordinates"),
        (
            (dataclasses.replace(RELIEF, fingerprint="6" * 64), PLACE, SMALL),
            "its tokenizer of the condition relief is 777.*, and here it is 666",
        ),
    ):
        with pytest.raises(DataError, match=words):
            CodeWriter(tmp_path / "train", dataclasses.replace(FACTS, conditions=conditions))
    assert contents(tmp_path) == before


# ---- What is refused.


@pytest.fixture
def copy(tmp_path):
    return write(tmp_path / "train")


def test_a_flipped_byte_is_found_and_named(copy):
    for name in ("codes-00002-of-00004.npy", "labels-00001-of-00004.npy"):
        path = copy / name
        content = bytearray(path.read_bytes())
        content[-4] ^= 1
        path.write_bytes(content)
    open_codes(copy)  # the labels are still in range
    with pytest.raises(DataError) as error:
        open_codes(copy, verify=True)
    assert "\n" not in str(error.value)
    assert "codes-00002-of-00004.npy has another SHA-256" in str(error.value)
    assert "labels-00001-of-00004.npy has another SHA-256" in str(error.value)
    assert "codes-00001" not in str(error.value)


def test_codes_outside_the_codebook_are_found(tmp_path):
    codes, _ = random_codes(FACTS)
    codes[20, 1, 3] = 1000
    write(tmp_path / "train", codes=codes)
    with pytest.raises(DataError, match="codes-00001-of-00004.npy has the code 1000 of a codebook"):
        open_codes(tmp_path / "train", verify=True)


def test_missing_and_truncated_files_are_named(copy):
    path = copy / "codes-00001-of-00004.npy"
    content = path.read_bytes()
    for damaged in (b"", content[:50], content[:-1], b"\0" * len(content)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="codes-00001-of-00004.npy is damaged or truncated"):
            open_codes(copy)
    np.save(path, np.zeros((16, VIEWS, 9), np.uint16))
    with pytest.raises(DataError, match=r"the shape \(16, 3, 9\) .* instead of \(16, 3, 8\)"):
        open_codes(copy)
    path.unlink()
    with pytest.raises(DataError, match="codes-00001-of-00004.npy is missing"):
        open_codes(copy)


def test_manifests_that_cannot_be_used(copy, tmp_path):
    path = copy / "manifest.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"count": good["count"] - 1}))
    with pytest.raises(DataError, match="its SHA-256 is not that of its values"):
        open_codes(copy)
    del good["sha256"]  # as in older ones

    def refused(text):
        path.write_text(text)
        with pytest.raises(DataError) as error:
            open_codes(copy)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    line = refused(json.dumps(good | {"version": 4}))
    assert "version 4; this program reads versions 1 to 3" in line
    assert "is damaged" in refused(json.dumps(good | {"conditions": [{"name": "edges"}]}))
    assert "describes no codes" in refused(json.dumps({"a": 1}))
    assert "is damaged" in refused("{")
    assert "is damaged" in refused("[]")
    without_grid = {key: value for key, value in good.items() if key != "grid"}
    line = refused(json.dumps(without_grid))
    assert "is damaged: Object missing required field `grid`" in line
    assert "its 4 shards" in refused(json.dumps(good | {"shards": good["shards"][:3]}))
    path.unlink()
    with pytest.raises(DataError, match="holds no codes: it has no manifest.json"):
        open_codes(copy)
    with pytest.raises(DataError, match="There is no directory .*nowhere"):
        open_codes(tmp_path / "nowhere")


def test_a_directory_of_splits_names_them(copy):
    with pytest.raises(DataError, match="Choose one below it: train"):
        open_codes(copy.parent)


def test_codes_of_something_else_are_refused(directory, tmp_path):
    codes = open_codes(directory)
    fits = dict(fingerprint="5" * 64, grid=(2, 4), codebook_size=1000, num_classes=2)
    check_codes(codes, **fits)
    check_codes(codes, **fits | {"num_classes": 0})
    for change, words in (
        ({"fingerprint": "6" * 64}, "codes of another tokenizer"),
        ({"grid": (4, 2)}, "grids of 2x4 codes; 4x2 are expected"),
        ({"codebook_size": 512}, "a codebook of 1000; 512 are expected"),
        ({"num_classes": 1}, "has the class 1; the transformer has 1, 0 to 0"),
    ):
        with pytest.raises(DataError, match=words) as error:
            check_codes(codes, **fits | change)
        assert "\n" not in str(error.value) and str(directory) in str(error.value)
    without = dataclasses.replace(FACTS, class_names=None)
    codes = open_codes(write(tmp_path / "without", without, labels=np.full(COUNT, -1)))
    check_codes(codes, **fits | {"num_classes": 0})
    with pytest.raises(DataError, match="has images without a class"):
        check_codes(codes, **fits)


def test_labels_beyond_the_classes_are_refused(tmp_path):
    write(tmp_path / "train", labels=np.arange(COUNT) % 3)
    with pytest.raises(DataError, match="labels from 0 to 2, but its manifest names 2 classes"):
        open_codes(tmp_path / "train")


# ---- Going on.


def test_a_pass_goes_on_with_the_shards_that_are_missing(directory, tmp_path):
    path = write(tmp_path / "train", shards=[0, 2])
    with pytest.raises(DataError, match="the pass is not finished. Run the same tokenize command"):
        open_codes(path)
    (path / "codes-00002-of-00004.npy").write_bytes(b"")  # as if the disk had lost it
    (path / "partial" / "codes-00001-of-00004.npy.123").write_bytes(b"of a killed process")
    writer = CodeWriter(path, FACTS)
    writer.begin()
    assert writer.unfinished() == [1, 2, 3] and not writer.is_complete
    kept = (path / "codes-00000-of-00004.npy").stat()
    write(path)
    assert (path / "codes-00000-of-00004.npy").stat().st_ino == kept.st_ino
    assert contents(path) == contents(directory)
    assert CodeWriter(path, FACTS).is_complete


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(directory, tmp_path):
    """The limit on a file's size stands for the disk's end."""
    path = write(tmp_path / "train", shards=[0])
    writer, (codes, labels) = CodeWriter(path, FACTS), random_codes(FACTS)
    writer.begin()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(DataError) as error:
            writer.write(1, codes[16:32], labels[16:32])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"Cannot write codes to {path}: File too large. Finished")
    assert writer.unfinished() == [1, 2, 3] and not (path / "codes-00001-of-00004.npy").exists()
    write(path)
    assert contents(path) == contents(directory)


def test_deleted_files_alone_are_made_again(copy, directory):
    (copy / "labels-00003-of-00004.npy").unlink()
    writer = CodeWriter(copy, FACTS)
    assert not writer.is_complete
    writer.begin()
    assert writer.unfinished() == [3]
    write(copy)
    assert contents(copy) == contents(directory)


@pytest.mark.parametrize("finished", [True, False])
def test_another_pass_is_refused_and_changes_nothing(tmp_path, finished):
    path = write(tmp_path / "train", shards=None if finished else [1])
    before = contents(path)
    for change, words in (
        ({"fingerprint": "6" * 64}, "its tokenizer is 5555.* and here it is 666"),
        ({"dataset": "earth"}, "its dataset is folder:photographs, and here it is earth"),
        ({"augmentations": ("a",)}, "its augmentations is"),
        ({"resolution": 64}, "its resolution is 32, and here it is 64"),
        ({"count": 51}, "its count is 50, and here it is 51"),
    ):
        with pytest.raises(DataError, match=words) as error:
            CodeWriter(path, dataclasses.replace(FACTS, **change))
        assert "\n" not in str(error.value) and "another --output" in str(error.value)
    assert contents(path) == before


def test_a_directory_of_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty; choose another --output"):
        CodeWriter(tmp_path, FACTS)
    with pytest.raises(DataError, match="is no directory; choose another --output"):
        CodeWriter(tmp_path / "notes.txt", FACTS)
    assert contents(tmp_path) == {(tmp_path / "notes.txt").relative_to(tmp_path): b"mine"}
