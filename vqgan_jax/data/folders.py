"""Images in a folder: `folder:PATH`, whose splits and classes `splits` finds by their names.

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

import collections
import functools
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from vqgan_jax.conditions.keypoint_files import read_keypoints
from vqgan_jax.conditions.layout_files import read_objects
from vqgan_jax.configuration.documents import read_bytes
from vqgan_jax.data.decoding import (
    DEFAULT_OPTIONS,
    SUFFIXES,
    DecodeOptions,
    decode_depth,
    decode_image,
    decode_label_map,
)
from vqgan_jax.data.listing import list_files
from vqgan_jax.data.sources import Feature
from vqgan_jax.data.splits import RULES, FolderListing, held_out_stride, list_folder, split_of
from vqgan_jax.errors import DataError

logger = logging.getLogger(__name__)

CLASSES = "classes.txt"
MAX_NAMES_BYTES = 2**24  # of that file
_JSON = (".json",)
_SUFFIXES = {Feature.OBJECTS: _JSON, Feature.KEYPOINTS: _JSON}  # of others, those of images


class FolderSource:
    """The images of one split of a folder; see the module for what the splits are."""

    def __init__(
        self,
        path: str,
        split: str,
        image_key: str = "image",
        label_map: bool = False,
        features: Mapping[str, Feature] | None = None,
        rules: int = RULES,
        options: DecodeOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Lists the folder, without opening the images.

        `features` are others that are read, and what they are; `rules` are those of `list_folder`.
        What is called `depth` is read by `decode_depth`.

        Raises:
          DataError: when the folder or the split does not exist, or holds no image, or an image has
            no file of a feature, or the names of objects' classes cannot be read.
        """
        self._image_key, self._label_map, self._options = image_key, label_map, options
        self._features = dict(features or {})
        listing = list_folder(path, rules, [*self._features, image_key])
        for note in listing.notes:
            _warn_once(note)
        if split not in listing.splits:
            known = ", ".join(sorted(listing.splits))
            hint = ""
            if "train" in listing.split_folders and split == "validation":
                hint = (
                    " Set config.data.validation_split to one of these; or name the folder of "
                    "training images itself, of which one of 20 is then for validation."
                )
            raise DataError(f"{listing.base} has no split {split!r}; it has {known}.{hint}")
        if not listing.splits[split]:
            raise DataError(_why_empty(listing, split))
        images_of = {path for images in listing.splits.values() for path, _ in images}
        self.dataset_length = len(images_of)
        self.class_names = listing.class_names or None
        numbers = {name: number for number, name in enumerate(listing.class_names)}
        images = [path for path, _ in listing.splits[split]]
        self._labels = [numbers.get(name, -1) for _, name in listing.splits[split]]
        self._paths = {"image": images}  # by feature
        self.object_names: tuple[str, ...] = ()
        root = pathlib.Path(listing.base)
        for key, kind in {image_key: Feature.PICTURE, **self._features}.items():
            if key != "image":
                suffixes = _SUFFIXES.get(kind, SUFFIXES)
                self._paths[key] = _partners(listing, split, key, images, suffixes)
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
            if kind is Feature.LABEL_MAP:
                return decode_label_map(path, self._options)
            return (decode_depth if key == "depth" else decode_image)(path, self._options)

        kind = Feature.LABEL_MAP if self._label_map else Feature.PICTURE
        return {
            "image": read_one(self._image_key, kind),
            "label": self._labels[index],
            "features": {key: read_one(key, kind) for key, kind in self._features.items()},
        }

    def describe(self, index: int, feature: str = "") -> str:
        """The file's path."""
        return self._paths[feature or self._image_key][index]


@functools.cache
def _warn_once(note: str) -> None:
    """A run opens its data set several times, and says what was found once."""
    logger.warning("%s", note)


def _why_empty(listing: FolderListing, split: str) -> str:
    """The message for a split without images, with the arithmetic where it was cut from others."""
    everything = listing.splits.get("all", ())
    if not everything or split not in ("train", "validation"):
        return f"The split {split!r} of {listing.base} has no images ({', '.join(SUFFIXES)})."
    held_out, stride = len(listing.splits["validation"]), held_out_stride(len(everything))
    return (
        f"The split {split!r} of {listing.base} has no images: of {len(everything)} in all, one of "
        f"{stride}, from the first on, is for validation ({held_out}), and "
        f"{len(everything) - held_out} are for training. To train on all of them and see how well "
        "they can be learned by heart, set config.data.train_split=all and "
        "config.data.validation_split=all."
    )


def _partners(
    listing: FolderListing,
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
    own, root = listing.split_folders.get(split), os.path.join(listing.base, key)
    if own is None:
        raise DataError(
            f"{listing.base} has no {what}s of the feature {key!r}: they belong into "
            f"{root}/SPLIT, beside the images in {listing.base}/SPLIT, where SPLIT is train, "
            "validation or test."
        )
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    folders = [os.path.join(root, name) for name in names if split_of(name) == split]
    if not folders:
        raise DataError(
            f"{listing.base} has no {what}s of the feature {key!r}: there is no folder "
            f"{os.path.join(root, os.path.basename(own[0]))}."
        )
    found = {
        _stem(path, folder): path
        for folder in folders
        for path in list_files(folder, suffixes).files
    }
    stems = [
        _stem(path, folder) for path in images for folder in own if path.startswith(folder + os.sep)
    ]
    for stem, image in zip(stems, images, strict=True):
        if stem not in found:
            raise DataError(
                f"{image} has no {what} of the feature {key!r}; it would be "
                f"{os.path.join(folders[0], stem)} with "
                f"{'one of ' if len(suffixes) > 1 else ''}{', '.join(suffixes)}."
            )
    return [found[stem] for stem in stems]


def _stem(path: str, folder: str) -> str:
    """The path in a folder, without its suffix."""
    return os.path.splitext(path[len(folder) + 1 :])[0]


def _read_names(path: pathlib.Path) -> tuple[str, ...]:
    """The lines of a file, none where there is no file.

    Raises:
      DataError: it cannot be read, or has a name twice.
    """
    if not path.exists():
        return ()
    try:
        lines = read_bytes(path, MAX_NAMES_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    names = tuple(line.strip() for line in lines if line.strip())
    counts = collections.Counter(names)
    twice = [name for name in names if counts[name] > 1]
    if twice or not names:
        problem = f"has the class {twice[0]!r} twice" if twice else "has no classes"
        raise DataError(f"{path} {problem}; it must have a name a line, in order of the numbers.")
    return names
