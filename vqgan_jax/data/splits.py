"""Which folder of a data set is which split, and which class an image has.

Folders are splits by their names, in any case, with a year or a word such as "images" behind them:

    train, training                       train
    validation, val, valid, dev, eval     validation
    test, testing                         test

Where there are two or more of them, or one whose neighbours hold no image, these are the splits;
what else lies beside them is named and left out. Where none of them is for training, the other
folders and images are. Folders such as `images`, in front of the splits or behind them, are looked
through.

Where no folder is a split, every 20th image of the sorted paths (the 1st, the 21st, ...) is for
`validation`, the others for `train`, and `all` has both.

Classes are the first sub-folders in a split, in the order of their names, and where names are
digits in the order of the numbers.
"""

import bisect
import collections
import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence

from vqgan_jax.data.decoding import SUFFIXES
from vqgan_jax.data.listing import FolderFiles, list_files
from vqgan_jax.errors import DataError

HOLD_OUT = 20  # one image of so many is for validation
FEWEST_HELD_OUT, ENOUGH_IMAGES = 16, 64  # at least so many of them, where there are so many in all
# Those above. 2 always hold out one of 20; 1 are those of runs and codes that were made before
# there were others.
RULES = 3
SPLITS = ("train", "validation", "test")
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "eval"),
    "test": ("test", "testing"),
}
_WORD_BEHIND = r"(?:[-_ ]?(?:set|split|data|images?|imgs?|\d{4}))?"
_PATTERNS = {
    split: re.compile(rf"(?:images?[-_ ]?)?(?:{'|'.join(words)}){_WORD_BEHIND}", re.IGNORECASE)
    for split, words in _WORDS.items()
}
_CONTAINERS = ("images", "image", "imgs", "img", "jpegimages", "data")
_OLD_NAMES = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class FolderListing:
    """A folder as a data set, from the names of its files alone.

    Attributes:
      base: the folder that has the splits or classes: the one asked for, or one within it.
      splits: (path, class name or "") of the images of each split, sorted by path; `all` beside
        `train` and `validation` where no folder is a split.
      class_names: in the order of their numbers, over all splits.
      split_folders: the folders that were taken for a split, by split; none where there are none.
      left_out: number of files that are no images, by suffix.
      ignored_folders: folders, relative to the one asked for, whose images belong to no split.
      notes: lines that a person should see: what was decided, and circles of links.
    """

    base: str
    splits: dict[str, tuple[tuple[str, str], ...]]
    class_names: tuple[str, ...]
    split_folders: dict[str, tuple[str, ...]]
    left_out: dict[str, int]
    ignored_folders: tuple[str, ...]
    notes: tuple[str, ...]

    def line(self, name: str) -> str:
        """One line that says what was taken for what."""
        parts = []
        for split, images in self.splits.items():
            if split == "all":
                continue
            folders = self.split_folders.get(split, ())
            source = f" (from {', '.join(map(os.path.basename, folders))})" if folders else ""
            parts.append(f"{split} {len(images)} images{source}")
        count = len(self.class_names)
        classes = "1 class" if count == 1 else f"{count or 'no'} classes"
        left_out = [f"{folder}/" for folder in self.ignored_folders]
        left_out += [
            f"{count} {'file' if count == 1 else 'files'} ({suffix or 'no suffix'})"
            for suffix, count in self.left_out.items()
        ]
        behind = f"; left out: {', '.join(left_out)}" if left_out else ""
        return f"{name}: {', '.join(parts)}, {classes}{behind}"


def split_of(name: str) -> str | None:
    """The split that a folder of this name is; None for any other name."""
    for split, pattern in _PATTERNS.items():
        if pattern.fullmatch(name):
            return split
    return None


def list_folder(
    root: str | os.PathLike, rules: int = RULES, features: Sequence[str] = ()
) -> FolderListing:
    """Lists a folder as a data set.

    Args:
      root: the folder.
      rules: 3; 2 hold out every 20th image of a folder without splits, however few that are; of 1,
        splits are folders of four exact names alone, any other sub-folder makes all of them
        classes, and classes are sorted as text.
      features: names of folders beside the splits that are read as other pictures of the images.

    Raises:
      DataError: there is no such folder, or one cannot be read.
    """
    root = expand_user(root).rstrip(os.sep) or os.sep
    if not os.path.isdir(root):
        what = "is no folder" if os.path.exists(root) else "does not exist"
        raise DataError(f"The folder {root} of config.data.name {what}.")
    found = list_files(root, SUFFIXES)
    tree = _Tree(root, found)
    notes = [*found.notes]
    base = _base(tree, notes) if rules > 1 else root
    folders = _split_folders(base, tree, notes) if rules > 1 else _old_split_folders(base, tree)
    if not folders and rules > 1:
        base = _contents(base, tree)
    splits = {
        split: sorted(
            image
            for folder in own
            for image in tree.images(_contents(folder, tree) if rules > 1 else folder)
        )
        for split, own in folders.items()
    }
    beside = _beside(base, folders, tree, features)
    if "train" not in splits and (rules > 1 or not folders):
        inside = tuple(path + os.sep for own in folders.values() for path in own)
        splits["train"] = [
            image
            for image in tree.images(base)
            if not image[0].startswith(inside) and image[1] not in features
        ]
        beside = [path for path in beside if not tree.has_images(path)]
        if folders:
            notes.append(f"{base} has no folder of training images: all beside {_named(folders)}.")
    if not folders:
        splits["all"] = splits["train"]
        stride = held_out_stride(len(splits["all"]), rules)
        splits["validation"] = splits["all"][::stride]
        splits["train"] = [image for i, image in enumerate(splits["all"]) if i % stride]
    names = {name for images in splits.values() for _, name in images if name}
    of_features = [os.path.join(base, key) for key in (*features, *_feature_names(base, tree))]
    left_out = collections.Counter()
    for (folder, suffix), count in found.others.items():
        if not any(folder == path or folder.startswith(path + os.sep) for path in of_features):
            left_out[suffix] += count
    ignored = [*beside, *found.junk, *_outside(root, base, tree)]
    return FolderListing(
        base,
        {split: tuple(images) for split, images in splits.items()},
        tuple(sorted(names, key=_as_number if rules > 1 else None)),
        {split: tuple(own) for split, own in folders.items()},
        dict(sorted(left_out.items())),
        tuple(sorted(os.path.relpath(path, root) for path in ignored)),
        tuple(notes),
    )


def held_out_stride(count: int, rules: int = RULES) -> int:
    """Of which number of images the first one is for validation, where no folder is.

    One of 20 (5 %); of 64 images or more at least 16, without which figures say little.
    """
    if rules < 3 or count < ENOUGH_IMAGES:
        return HOLD_OUT
    return min(HOLD_OUT, count // FEWEST_HELD_OUT)


def opening_line(name: str, rules: int) -> str | None:
    """What a data set's folders were taken for, in one line; None for one that is no folder.

    Raises:
      DataError: as of `list_folder`.
    """
    if not name.startswith("folder:"):
        return None
    return list_folder(name.removeprefix("folder:"), rules).line(name)


def expand_user(path: str | os.PathLike) -> str:
    """A path with `~` and `~user` replaced.

    Raises:
      DataError: there is no such user, or the path is empty.
    """
    path = os.fspath(path)
    if not path:
        raise DataError("The path of a folder is empty; config.data.name takes folder:PATH.")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise DataError(f"{path}: there is no user {path.split(os.sep)[0][1:]!r}.")
    return expanded


class _Tree:
    """The listed files and folders, by the folders that they are in."""

    def __init__(self, root: str, found: FolderFiles) -> None:
        self.root, self._files = root, found.files
        self.children: dict[str, list[str]] = collections.defaultdict(list)
        for path in found.folders:
            self.children[os.path.dirname(path)].append(path)
        self._direct = {os.path.dirname(path) for path in found.files}
        self._with_images = set()
        for path in self._direct:
            while path not in self._with_images and len(path) >= len(root):
                self._with_images.add(path)
                path = os.path.dirname(path)

    def has_images(self, folder: str) -> bool:
        """Whether there is an image in it, however deep."""
        return folder in self._with_images

    def has_direct_images(self, folder: str) -> bool:
        """Whether there is an image in it, and not in a folder in it."""
        return folder in self._direct

    def images(self, folder: str) -> list[tuple[str, str]]:
        """(path, first folder below `folder` or "") of the images in a folder."""
        start = folder.rstrip(os.sep) + os.sep
        first = bisect.bisect_left(self._files, start)
        found = []
        for path in itertools.islice(self._files, first, None):
            if not path.startswith(start):
                break
            name, separator, _ = path[len(start) :].partition(os.sep)
            found.append((path, name if separator else ""))
        return found


def _base(tree: _Tree, notes: list[str]) -> str:
    """The folder that has the splits: `root`, or the only one with images within it."""
    folder = tree.root
    while not tree.has_direct_images(folder):
        children = tree.children[folder]
        if any(split_of(os.path.basename(path)) for path in children):
            if folder != tree.root:
                notes.append(f"the splits are those in {folder}.")
            return folder
        with_images = [path for path in children if tree.has_images(path)]
        if len(with_images) != 1:
            break
        folder = with_images[0]
    return tree.root


def _split_folders(base: str, tree: _Tree, notes: list[str]) -> dict[str, list[str]]:
    """The folders of each split; none where sub-folders are classes."""
    found = collections.defaultdict(list)
    for path in tree.children[base]:
        if split := split_of(os.path.basename(path)):
            found[split].append(path)
    others = [
        path
        for path in tree.children[base]
        if not split_of(os.path.basename(path))
        and tree.has_images(path)
        and os.path.basename(path) not in _feature_names(base, tree)
    ]
    if [*found] == ["train"] and others:
        named = ", ".join(map(os.path.basename, others[:5]))
        (first, *_) = found["train"]
        notes.append(
            f"{first} is taken for a class like {named}: there is no folder of another split."
        )
        return {}
    for split, folders in found.items():
        if len(folders) > 1:
            notes.append(f"{', '.join(folders)} are one split, {split}.")
    return {split: found[split] for split in SPLITS if split in found}


def _old_split_folders(base: str, tree: _Tree) -> dict[str, list[str]]:
    """By the rules of before; see `list_folder`."""
    names = [os.path.basename(path) for path in tree.children[base]]
    found = {_OLD_NAMES[name]: [os.path.join(base, name)] for name in names if name in _OLD_NAMES}
    features = [
        path
        for path in tree.children[base]
        if tree.children[path]
        and all(os.path.basename(child) in _OLD_NAMES for child in tree.children[path])
        and not tree.has_direct_images(path)
    ]
    return found if len(found) + len(features) == len(names) and found else {}


def _feature_names(base: str, tree: _Tree) -> list[str]:
    """Folders that have folders of splits and no images of their own, such as `segmentation`."""
    return [
        os.path.basename(path)
        for path in tree.children[base]
        if tree.children[path]
        and all(split_of(os.path.basename(child)) for child in tree.children[path])
        and not tree.has_direct_images(path)
    ]


def _contents(folder: str, tree: _Tree) -> str:
    """The folder itself, or the one in it that merely holds the images, such as `images`."""
    while not tree.has_direct_images(folder):
        with_images = [path for path in tree.children[folder] if tree.has_images(path)]
        if len(with_images) != 1 or os.path.basename(with_images[0]).lower() not in _CONTAINERS:
            break
        folder = with_images[0]
    return folder


def _beside(
    base: str, folders: Mapping[str, Sequence[str]], tree: _Tree, features: Sequence[str]
) -> list[str]:
    """Folders that are neither splits, classes nor features."""
    if not folders:
        return [path for path in tree.children[base] if not tree.has_images(path)]
    own = {path for of_split in folders.values() for path in of_split}
    known = {*features, *_feature_names(base, tree)}
    return [
        path
        for path in tree.children[base]
        if path not in own and os.path.basename(path) not in known
    ]


def _outside(root: str, base: str, tree: _Tree) -> list[str]:
    """Folders beside those that lead from `root` to `base`."""
    found = []
    while base != root:
        parent = os.path.dirname(base)
        found += [path for path in tree.children[parent] if path != base]
        base = parent
    return found


def _named(folders: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(os.path.basename(path) for own in folders.values() for path in own)


def _as_number(name: str) -> tuple[int, int, str]:
    """Numbers as numbers, in front of other names."""
    return (0, int(name), name) if re.fullmatch("[0-9]{1,18}", name) else (1, 0, name)
