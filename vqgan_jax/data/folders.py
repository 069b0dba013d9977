"""Images in a folder: `folder:PATH`.

Classes are the first-level sub-folders in sorted order; an image in no sub-folder has class -1.
Where every sub-folder is called `train`, `validation` (or `val`) or `test`, these are the splits.
Otherwise `validation` is every 20th image of the sorted paths (the 1st, the 21st, ...), `train`
the others, and `all` every image.
"""

import os
import pathlib

import numpy as np

from vqgan_jax.data.decoding import decode_image, decode_label_map
from vqgan_jax.data.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
HOLD_OUT = 20  # one image of so many is for validation


class FolderSource:
    """The images of one split of a folder; see the module for what the splits are."""

    def __init__(
        self, path: str, split: str, image_key: str = "image", label_map: bool = False
    ) -> None:
        """Lists the folder, without opening the images.

        Raises:
          DataError: when the folder or the split does not exist, or holds no image.
        """
        root = pathlib.Path(path).expanduser()
        if not root.is_dir():
            raise DataError(f"The folder {root} of config.data.name does not exist.")
        if image_key != "image":
            raise DataError(
                f"config.data.image_key is {image_key!r}; a folder has no features but 'image'."
            )
        self._label_map = label_map
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
        self._paths = [path for path, _ in files[split]]
        self._labels = [numbers.get(name, -1) for _, name in files[split]]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._paths)

    def read(self, index: int) -> dict[str, np.ndarray | int]:
        """One example, as in `ImageSource.read`."""
        decode = decode_label_map if self._label_map else decode_image
        return {"image": decode(self._paths[index]), "label": self._labels[index]}

    def describe(self, index: int) -> str:
        """The file's path."""
        return self._paths[index]


def _split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folders of the splits by name; none where the sub-folders are anything else."""
    splits = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
    folders = [item for item in root.iterdir() if item.is_dir() and item.name[0] != "."]
    if not folders or any(folder.name not in splits for folder in folders):
        return {}
    return {splits[folder.name]: folder for folder in folders}


def _files(folders: dict[str, pathlib.Path]) -> dict[str, list[tuple[str, str]]]:
    """(path, first sub-folder or "") of the image files under each folder, sorted by path."""
    found = {}
    for split, root in folders.items():
        found[split] = []
        for folder, subfolders, names in os.walk(root, followlinks=True):
            subfolders[:] = [name for name in subfolders if name[0] != "."]
            first = pathlib.Path(folder).relative_to(root).parts[:1]
            found[split] += [
                (os.path.join(folder, name), "".join(first))
                for name in names
                if name.lower().endswith(SUFFIXES) and name[0] != "."
            ]
        found[split].sort()
    return found
