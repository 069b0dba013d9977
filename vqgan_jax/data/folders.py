"""Images in a folder: `folder:PATH`.

Classes are the first-level sub-folders in sorted order; an image in no sub-folder has class -1.
Where every sub-folder is called `train`, `validation` (or `val`) or `test`, these are the splits.
Otherwise `validation` is every 20th image of the sorted paths (the 1st, the 21st, ...), `train`
the others, and `all` every image.

Folders of splits can have other pictures of the same things beside them, such as label maps. They
are in a folder called like the feature, which has folders of the splits in turn, and each picture
has the place and name of its image, with any of the suffixes:

    PATH/train/town/a.jpg    PATH/segmentation/train/town/a.png
    PATH/val/b.jpg           PATH/segmentation/val/b.png

`image_key="segmentation"` takes these for the images, and as `features` they are read beside them.
Every image must have one. Classes are those of the images, `town` in the example.

Objects and keypoints in an image are in JSON files in the same way, as `conditions.layout_files`
and `conditions.keypoint_files` describe them; the names of the objects' classes, one a line in the
order of their numbers, may be in `classes.txt`:

    PATH/layout/classes.txt    PATH/layout/train/town/a.json    PATH/skeleton/train/town/a.json
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from vqgan_jax.conditions.keypoint_files import read_keypoints
from vqgan_jax.conditions.layout_files import read_objects
from vqgan_jax.data.decoding import decode_image, decode_label_map
from vqgan_jax.data.errors import DataError
from vqgan_jax.data.sources import Feature

CLASSES = "classes.txt"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
HOLD_OUT = 20  # one image of so many is for validation
_JSON = (".json",)
_SUFFIXES = {Feature.OBJECTS: _JSON, Feature.KEYPOINTS: _JSON}  # of others, those of images
_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


class FolderSource:
    """The images of one split of a folder; see the module for what the splits are."""

    def __init__(
        self,
        path: str,
        split: str,
        image_key: str = "image",
        label_map: bool = False,
        features: Mapping[str, Feature] | None = None,
    ) -> None:
        """Lists the folder, without opening the images.

        `features` are others that are read, and what they are.

        Raises:
          DataError: when the folder or the split does not exist, or holds no image, or an image has
            no file of a feature, or the names of objects' classes cannot be read.
        """
        root = pathlib.Path(path).expanduser()
        if not root.is_dir():
            raise DataError(f"The folder {root} of config.data.name does not exist.")
        self._image_key, self._label_map = image_key, label_map
        self._features = dict(features or {})
        folders = _split_folders(root)
        files = _files(folders or {"all": root})
        names = {name for split_files in files.values() for _, name in split_files if name}
        self.class_names = tuple(sorted(names)) or None
        if not folders:
            everything = files["all"]
            files["validation"] = everything[::HOLD_OUT]
            files["train"] = [file for i, file in enumerate(everything) if i % HOLD_OUT]
        if split not in files:
            raise DataError(f"{root} has no split {split!r}; it has {', '.join(sorted(files))}.")
        if not files[split]:
            raise DataError(f"The split {split!r} of {root} has no images ({', '.join(SUFFIXES)}).")
        numbers = {name: number for number, name in enumerate(self.class_names or ())}
        images = [path for path, _ in files[split]]
        self._labels = [numbers.get(name, -1) for _, name in files[split]]
        self._paths = {"image": images}  # by feature
        self.object_names: tuple[str, ...] = ()
        for key, kind in {image_key: Feature.PICTURE, **self._features}.items():
            if key != "image":
                suffixes = _SUFFIXES.get(kind, SUFFIXES)
                self._paths[key] = _partners(root, folders.get(split), split, key, images, suffixes)
            if kind is Feature.OBJECTS:
                self.object_names = _read_names(root / key / CLASSES)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._labels)

    def read(self, index: int) -> dict[str, Any]:
        """One example, as in `ImageSource.read`."""

        def read_one(key: str, kind: Feature) -> Any:
            path = self._paths[key][index]
            if kind is Feature.OBJECTS:
                return read_objects(path, self.object_names)
            if kind is Feature.KEYPOINTS:
                return read_keypoints(path)
            return decode_label_map(path) if kind is Feature.LABEL_MAP else decode_image(path)

        kind = Feature.LABEL_MAP if self._label_map else Feature.PICTURE
        return {
            "image": read_one(self._image_key, kind),
            "label": self._labels[index],
            "features": {key: read_one(key, kind) for key, kind in self._features.items()},
        }

    def describe(self, index: int, feature: str = "") -> str:
        """The file's path."""
        return self._paths[feature or self._image_key][index]


def _split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folders of the splits by name; none where the sub-folders are anything else.

    Beside them there may be those of features, in which there are folders of splits alone.
    """
    folders = [item for item in root.iterdir() if item.is_dir() and item.name[0] != "."]
    found = {_SPLITS[item.name]: item for item in folders if item.name in _SPLITS}
    others = [item for item in folders if item.name not in _SPLITS]
    return found if found and all(map(_is_feature, others)) else {}


def _is_feature(folder: pathlib.Path) -> bool:
    has_splits = False
    with os.scandir(folder) as items:
        for item in items:
            if item.name[0] == ".":
                continue
            if item.is_dir():
                if item.name not in _SPLITS:
                    return False
                has_splits = True
            elif item.name.lower().endswith(SUFFIXES):
                return False
    return has_splits


def _partners(
    root: pathlib.Path,
    split_folder: pathlib.Path | None,
    split: str,
    key: str,
    images: list[str],
    suffixes: tuple[str, ...],
) -> list[str]:
    """The file of a feature for each image of a split: a picture, or JSON.

    Raises:
      DataError: the folder has no such feature, or an image has no file.
    """
    what = "JSON file" if suffixes == _JSON else "picture"
    if split_folder is None:
        raise DataError(
            f"{root} has no {what}s of the feature {key!r}: they belong into {root / key}/SPLIT, "
            f"beside the images in {root}/SPLIT, where SPLIT is train, validation or test."
        )
    folder = _split_folders(root / key).get(split) if (root / key).is_dir() else None
    if folder is None:
        raise DataError(
            f"{root} has no {what}s of the feature {key!r}: there is no folder "
            f"{root / key / split_folder.name}."
        )
    found = {_stem(path, folder): path for path, _ in _files({split: folder}, suffixes)[split]}
    stems = [_stem(path, split_folder) for path in images]
    for stem, image in zip(stems, images, strict=True):
        if stem not in found:
            raise DataError(
                f"{image} has no {what} of the feature {key!r}; it would be {folder / stem} with "
                f"{'one of ' if len(suffixes) > 1 else ''}{', '.join(suffixes)}."
            )
    return [found[stem] for stem in stems]


def _stem(path: str, folder: pathlib.Path) -> str:
    """The path in a folder, without its suffix."""
    return os.path.splitext(path[len(os.fspath(folder)) + 1 :])[0]


def _read_names(path: pathlib.Path) -> tuple[str, ...]:
    """The lines of a file, none where there is no file.

    Raises:
      DataError: it cannot be read, or has a name twice.
    """
    if not path.exists():
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    names = tuple(line.strip() for line in lines if line.strip())
    twice = [name for name in names if names.count(name) > 1]
    if twice or not names:
        problem = f"has the class {twice[0]!r} twice" if twice else "has no classes"
        raise DataError(f"{path} {problem}; it must have a name a line, in order of the numbers.")
    return names


def _files(
    folders: dict[str, pathlib.Path], suffixes: tuple[str, ...] = SUFFIXES
) -> dict[str, list[tuple[str, str]]]:
    """(path, first sub-folder or "") of the files under each folder, sorted by path."""
    found = {}
    for split, root in folders.items():
        found[split] = []
        for folder, subfolders, names in os.walk(root, followlinks=True):
            subfolders[:] = [name for name in subfolders if name[0] != "."]
            first = pathlib.Path(folder).relative_to(root).parts[:1]
            found[split] += [
                (os.path.join(folder, name), "".join(first))
                for name in names
                if name.lower().endswith(suffixes) and name[0] != "."
            ]
        found[split].sort()
    return found
