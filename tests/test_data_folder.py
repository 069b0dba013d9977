import pickle

import numpy as np
import pytest
from PIL import Image

from vqgan_jax.data.sources import Feature, open_source
from vqgan_jax.errors import DataError, UnreadableImage


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 0)).save(path)


def values(source):
    return [int(source.read(i)["image"][0, 0, 0]) for i in range(len(source))]


def test_every_twentieth_image_is_held_out(tmp_path):
    for i in range(45):
        write(tmp_path / f"{i:02d}.png", i)
    name = f"folder:{tmp_path}"
    assert values(open_source(name, "validation")) == [0, 20, 40]
    assert values(open_source(name, "train")) == [i for i in range(45) if i % 20]
    source = open_source(name, "all")
    assert values(source) == list(range(45))
    assert source.class_names is None and source.read(3)["label"] == -1
    assert source.describe(3) == str(tmp_path / "03.png")
    assert values(pickle.loads(pickle.dumps(source))) == list(range(45))
    with pytest.raises(DataError, match="no split 'test'; it has all, train, validation"):
        open_source(name, "test")


def test_classes_are_the_first_sub_folders(tmp_path):
    for i, path in enumerate(("cat/a.PNG", "ant/deep/b.png", "cat/c.png", "d.png", ".hid/e.png")):
        write(tmp_path / path, i)
    (tmp_path / "cat/notes.txt").write_text("no image")
    source = open_source(f"folder:{tmp_path}", "all")
    assert source.class_names == ("ant", "cat")
    found = {value: source.read(i)["label"] for i, value in enumerate(values(source))}
    assert found == {0: 1, 1: 0, 2: 1, 3: -1}


def test_split_folders_share_their_classes(tmp_path):
    write(tmp_path / "train/dog/a.png", 1)
    write(tmp_path / "val/dog/b.png", 2)
    write(tmp_path / "val/cat/c.png", 3)
    name = f"folder:{tmp_path}"
    train, validation = open_source(name, "train"), open_source(name, "validation")
    assert (values(train), values(validation)) == ([1], [3, 2])
    assert train.class_names == validation.class_names == ("cat", "dog")
    assert train.read(0)["label"] == 1
    with pytest.raises(DataError, match="it has train, validation"):
        open_source(name, "test")


def test_a_class_called_train_is_no_split(tmp_path):
    write(tmp_path / "train/a.png")
    write(tmp_path / "bus/b.png")
    assert open_source(f"folder:{tmp_path}", "all").class_names == ("bus", "train")


def test_errors_say_what_and_where(tmp_path):
    with pytest.raises(DataError, match="nowhere of config.data.name does not exist"):
        open_source(f"folder:{tmp_path / 'nowhere'}", "train")
    with pytest.raises(DataError, match="has no images"):
        open_source(f"folder:{tmp_path}", "train")
    write(tmp_path / "a.png")
    with pytest.raises(DataError, match="no pictures of the feature 'depth'"):
        open_source(f"folder:{tmp_path}", "all", image_key="depth")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="a.png"):
        open_source(f"folder:{tmp_path}", "all").read(0)


def test_label_maps(tmp_path):
    labels = np.array([[0, 5], [2, 1]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "a.png")
    source = open_source(f"folder:{tmp_path}", "all", label_map=True)
    np.testing.assert_array_equal(source.read(0)["image"], labels)


def test_features_are_in_folders_of_their_own(tmp_path):
    for i, name in enumerate(("train/dog/a", "train/dog/deep/b", "val/cat/c", "train/d")):
        write(tmp_path / f"{name}.png", i)
        write(tmp_path / "relief" / f"{name}.jpg", 100 + i)
    (tmp_path / "relief" / "notes.txt").write_text("no picture")
    write(tmp_path / "relief/train/dog/unused.png", 9)
    name = f"folder:{tmp_path}"
    source = open_source(name, "train", features={"relief": Feature.PICTURE})
    assert values(source) == [3, 0, 1] and source.class_names == ("cat", "dog")
    source = pickle.loads(pickle.dumps(source))
    for i, value in enumerate((103, 100, 101)):
        assert abs(int(source.read(i)["features"]["relief"][0, 0, 0]) - value) < 4  # JPEG
    assert source.describe(1) == str(tmp_path / "train/dog/a.png")
    assert source.describe(1, "relief") == str(tmp_path / "relief/train/dog/a.jpg")

    relief = open_source(name, "validation", image_key="relief")
    assert abs(values(relief)[0] - 102) < 4 and relief.class_names == ("cat", "dog")
    assert relief.read(0)["label"] == 0
    assert relief.describe(0) == str(tmp_path / "relief/val/cat/c.jpg")


def test_a_picture_that_a_feature_lacks_is_named(tmp_path):
    write(tmp_path / "train/dog/a.png")
    write(tmp_path / "relief/train/dog/b.png")
    name = f"folder:{tmp_path}"
    with pytest.raises(DataError) as error:
        open_source(name, "train", image_key="relief")
    assert str(tmp_path / "train/dog/a.png") in str(error.value)
    assert str(tmp_path / "relief/train/dog/a") in str(error.value)
    assert "\n" not in str(error.value)
    write(tmp_path / "val/c.png")
    with pytest.raises(DataError, match="there is no folder .*relief/val"):
        open_source(name, "validation", features={"relief": Feature.PICTURE})


def test_classes_with_folders_of_other_names_are_no_features(tmp_path):
    write(tmp_path / "train/a.png")
    write(tmp_path / "bus/train/b.png")
    write(tmp_path / "bus/red/c.png")
    assert open_source(f"folder:{tmp_path}", "all").class_names == ("bus", "train")
