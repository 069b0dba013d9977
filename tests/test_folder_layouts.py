"""What people's folders are taken for: splits, classes, what is left out; hostile file systems."""

import os
import pathlib
import socket
import stat

import pytest

from vqgan_jax import configuration
from vqgan_jax.conditions.given import GivenConditions
from vqgan_jax.configuration import (
    ConfigError,
    parse_argument,
    tokenizer_config,
    transformer_config,
)
from vqgan_jax.data.folders import FolderSource
from vqgan_jax.data.listing import list_files
from vqgan_jax.data.splits import RULES, list_folder, split_of
from vqgan_jax.describe import describe
from vqgan_jax.errors import DataError


def make(root, *names):
    """Empty files: nothing is opened to list them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix else path.mkdir(exist_ok=True)
    return root


def counts(listing):
    return {split: len(images) for split, images in listing.splits.items() if split != "all"}


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ("train", "Train", "TRAINING", "train_images", "training-set", "train2017")),
        ("validation", ("val", "VALID", "validation", "dev", "Eval", "val2017", "valid_set")),
        ("test", ("test", "Testing", "test_data", "images_test")),
        (None, ("trains", "value", "latest", "tested", "development", "cat", "8", "valley")),
    ],
)
def test_names_of_splits(split, names):
    assert {split_of(name) for name in names} == {split}


# Files; images by split; classes; folders that are left out.
LAYOUTS = {
    "valid": (("train/a.png", "valid/b.png"), {"train": 1, "validation": 1}, (), ()),
    "upper case": (("TRAIN/c/a.png", "Val/c/b.png"), {"train": 1, "validation": 1}, ("c",), ()),
    "three": (
        ("train/a.png", "dev/b.png", "test/c.png"),
        {"train": 1, "validation": 1, "test": 1},
        (),
        (),
    ),
    "annotations": (
        ("train/c/a.png", "val/c/b.png", "annotations/x.json"),
        {"train": 1, "validation": 1},
        ("c",),
        ("annotations",),
    ),
    "one more folder of images": (
        ("train/c/a.png", "val/c/b.png", "extra/z.png"),
        {"train": 1, "validation": 1},
        ("c",),
        ("extra",),
    ),
    "left by archives": (
        ("train/a.png", "val/b.png", "__MACOSX/train/x.png", ".git/y.png", "val/.hidden.png"),
        {"train": 1, "validation": 1},
        (),
        ("__MACOSX",),
    ),
    "both words": (
        ("train/a.png", "val/b.png", "valid/c.png"),
        {"train": 1, "validation": 2},
        (),
        (),
    ),
    "within another folder": (
        ("archive/data/train/c/a.png", "archive/data/val/c/b.png", "archive/readme.txt"),
        {"train": 1, "validation": 1},
        ("c",),
        (),
    ),
    "images and labels": (
        ("images/train/a.png", "images/val/b.png", "labels/train/a.txt", "labels/val/b.txt"),
        {"train": 1, "validation": 1},
        (),
        ("labels",),
    ),
    "images within splits": (
        ("train/images/a.png", "train/labels/a.txt", "valid/images/b.png", "valid/labels/b.txt"),
        {"train": 1, "validation": 1},
        (),
        (),
    ),
    "of different depth": (
        ("train/images/c/a.png", "val/c/b.png"),
        {"train": 1, "validation": 1},
        ("c",),
        (),
    ),
    "a class in one split": (
        ("train/c/a.png", "val/c/b.png", "val/d/e.png"),
        {"train": 1, "validation": 2},
        ("c", "d"),
        (),
    ),
    "test beside classes": (
        ("cat/a.png", "dog/b.png", "test/c.png"),
        {"train": 1, "validation": 1, "test": 1},
        ("cat", "dog"),
        (),
    ),
    "vehicles": (
        ("train/a.png", "bus/b.png", "car/c.png"),
        {"train": 2, "validation": 1},
        ("bus", "car", "train"),
        (),
    ),
    "numbers": (
        tuple(f"{name}/a.png" for name in (1, 10, 2, 8)),
        {"train": 3, "validation": 1},
        ("1", "2", "8", "10"),
        (),
    ),
    "loose": (("a.png", "c/b.png"), {"train": 1, "validation": 1}, ("c",), ()),
    "a folder without images": (
        ("c/a.png", "d/b.png", "notes/x.txt"),
        {"train": 1, "validation": 1},
        ("c", "d"),
        ("notes",),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    files, expected, classes, ignored = LAYOUTS[name]
    listing = list_folder(make(tmp_path, *files))
    if "test" in expected and "val" not in " ".join(files) and "dev" not in " ".join(files):
        expected = {"train": 2, "test": 1}  # nothing is cut from folders that have names
    assert counts(listing) == expected
    assert (listing.class_names, listing.ignored_folders) == (classes, ignored)
    assert "\n" not in listing.line("folder:x")


def test_what_was_begun_before_keeps_its_rules(tmp_path):
    make(tmp_path, "train/c/a.png", "valid/c/b.png", "10/a.png", "9/a.png")
    old, new = list_folder(tmp_path, rules=1), list_folder(tmp_path)
    assert old.class_names == ("10", "9", "train", "valid") and counts(old)["train"] == 3
    assert new.class_names == ("c",) and new.ignored_folders == ("10", "9")
    config = tokenizer_config()
    text = configuration.to_json(config)
    assert configuration.from_json(text).data.folder_rules == config.data.folder_rules == RULES
    assert configuration.from_json(text.replace('"folder_rules": 3,', "")).data.folder_rules == 1


def test_each_real_folder_once(tmp_path):
    make(tmp_path / "data", "a/0.png", "a/1.png", "b/2.png")
    make(tmp_path / "elsewhere", "3.png")
    for link, target in {
        "a/up": "..",
        "a/self": ".",
        "b/sibling": "../a",
        "out": "../elsewhere",
        "out_again": "../elsewhere",
        "nothing": "missing",
        "itself.png": "itself.png",
    }.items():
        (tmp_path / "data" / link).symlink_to(target)
    found = list_files(tmp_path / "data", (".png",))
    names = [os.path.relpath(path, tmp_path / "data") for path in found.files]
    assert names == ["a/0.png", "a/1.png", "b/2.png", "out/3.png"]
    assert len(found.notes) == 4 and all("is left out" in note for note in found.notes)
    assert sum(found.others.values()) == 2


def test_only_regular_files(tmp_path):
    make(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        if os.getuid() == 0:
            os.mknod(tmp_path / "device.png", 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
        listing = list_folder(tmp_path)
    assert sum(counts(listing).values()) == 1
    assert listing.left_out == {"no regular file": 3 if os.getuid() == 0 else 2}
    (tmp_path / os.fsdecode(b"\xff.png")).touch()
    assert sum(counts(list_folder(tmp_path)).values()) == 2


def test_splits_that_are_empty_by_arithmetic(tmp_path):
    make(tmp_path, "a.png")
    with pytest.raises(DataError) as error:
        FolderSource(str(tmp_path), "train")
    assert "of 1 in all, one of 20" in str(error.value)
    assert "config.data.train_split=all" in str(error.value)
    assert len(FolderSource(str(tmp_path), "all")) == 1
    make(tmp_path / "named", "train/a.png")
    with pytest.raises(DataError, match="Set config.data.validation_split to one of these"):
        FolderSource(str(tmp_path / "named"), "validation")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "is empty"),
        ("~nobody_of_this_name/x", "there is no user 'nobody_of_this_name'"),
        ("missing", "missing of config.data.name does not exist"),
        (__file__, "is no folder"),
    ],
)
def test_paths_that_cannot_be(path, words):
    with pytest.raises(DataError) as error:
        FolderSource(path, "train")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_commas_in_paths():
    found = parse_argument("folder='/a,b=c',labels=7", data="", labels=0)
    assert (found.data, found.labels) == ("folder:/a,b=c", 7)
    assert parse_argument("folder=/o'brien", data="").data == "folder:/o'brien"
    with pytest.raises(ConfigError, match="Quote a path that has a comma"):
        parse_argument("folder=/a,b", data="")


def test_a_class_is_a_name_before_it_is_a_place():
    config = transformer_config()
    config.condition.kinds, config.condition.num_classes = ("class",), 3

    def number_of(name, *names):
        config.condition.class_names = names
        given = GivenConditions.__new__(GivenConditions)
        given._condition = config.condition
        return given._class_number(name)

    assert number_of("10", "8", "9", "10") == 2
    assert number_of("#1", "8", "9", "10") == 1 and number_of(1, "8", "9", "10") == 1
    with pytest.raises(ValueError, match="'#1' is the class at place 1"):
        number_of("1", "8", "9", "10")
    assert number_of("1", "cat", "dog", "owl") == 1  # no name is a number
    assert number_of("2") == 2
    for wrong in ("#3", "3", "fox", "#"):
        with pytest.raises(ValueError, match="there is no class"):
            number_of(wrong, "cat", "dog", "owl")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    make(tmp_path, "secret/a.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"{pathlib.Path(tmp_path)} cannot be read: Permission"):
        list_folder(tmp_path)


def test_what_is_neither_a_path_nor_a_data_set():
    words = "There is no file or folder nowhere. There is no data set called 'nowhere'"
    with pytest.raises(DataError, match=words):
        describe("nowhere")


@pytest.mark.parametrize(
    ("count", "held_out"), [(20, 1), (63, 4), (64, 16), (100, 17), (319, 17), (320, 16), (1000, 50)]
)
def test_a_folder_without_splits_holds_out_enough(tmp_path, count, held_out):
    """5 %, and 16 images at least where there are 64; runs of before keep every 20th."""
    for index in range(count):
        (tmp_path / f"{index:04}.png").touch()
    splits = list_folder(tmp_path).splits
    assert (len(splits["validation"]), len(splits["train"])) == (held_out, count - held_out)
    assert not set(splits["validation"]) & set(splits["train"])
    for rules in (1, 2):
        before = list_folder(tmp_path, rules).splits
        assert before["validation"] == before["all"][::20]
