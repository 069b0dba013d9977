"""Data sets of tensorflow-datasets, `earth` among them, read without TensorFlow.

They are stored in ArrayRecord files, which give any example by its index. Reading these needs no
TensorFlow; preparing some data sets does, once, and can be done in another environment.
"""

import difflib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vqgan_jax.conditions.layouts import SceneObject
from vqgan_jax.data.decoding import (
    DEFAULT_OPTIONS,
    DecodeOptions,
    decode_depth,
    decode_image,
    decode_label_map,
)
from vqgan_jax.data.earth import prepare_earth, resolve_earth
from vqgan_jax.data.packages import default_data_dir
from vqgan_jax.data.sources import Feature
from vqgan_jax.errors import DataError

# Attributes of objects by the names that data sets have for them.
_ATTRIBUTES = {
    "is_group_of": "group",
    "is_crowd": "group",
    "is_occluded": "occluded",
    "is_depiction": "depiction",
    "is_inside": "inside",
}


class NamedSource:
    """The images of one split of a prepared builder."""

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        image_key: str = "image",
        label_map: bool = False,
        features: Mapping[str, Feature] | None = None,
        options: DecodeOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Opens a split; `features` are others that are read, and what they are.

        What is called `depth` is read by `decode_depth`.

        Objects are those of the data set's feature with boxes, such as `objects` of `coco/2017` and
        `bobjects` of `open_images_v4`, whatever their key here.

        Raises:
          DataError: when there is no such split or no such feature, or when it is a label map and
            is not to be read as one.
        """
        known = builder.info.features
        images = sorted(key for key in known if isinstance(known[key], tfds.features.Image))
        self._features, self._options = dict(features or {}), options
        _check_features(builder, images, image_key, label_map, self._features)
        self.object_names: tuple[str, ...] = ()
        if Feature.OBJECTS in self._features.values():
            self._objects_key, labels = _find_objects(builder)
            self.object_names = tuple(labels.names or ())
        # Encoded images come as bytes, and those that are not asked for stay so.
        decoders = dict.fromkeys(images, tfds.decode.SkipDecoding())
        try:
            self._examples = builder.as_data_source(split=split, decoders=decoders)
        except (ValueError, KeyError) as error:
            raise DataError(
                f"{builder.name} has no split {split!r}; it has {', '.join(builder.info.splits)}, "
                "and parts of these such as train[:90%]. "
                "Set config.data.train_split and validation_split."
            ) from error
        self._name, self._split, self._image_key = builder.info.name, split, image_key
        self._label_map = label_map
        self.dataset_length = sum(info.num_examples for info in builder.info.splits.values())
        label = dict(known).get("label")
        self._has_classes = isinstance(label, tfds.features.ClassLabel)
        self.class_names = tuple(label.names) if self._has_classes else None

    def __len__(self) -> int:
        """Number of images."""
        return len(self._examples)

    def read(self, index: int) -> dict[str, Any]:
        """One example, as in `ImageSource.read`."""
        example = self._examples[index]

        def read_one(key: str, kind: Feature, name: str = "") -> Any:
            if kind is Feature.OBJECTS:
                return _scene_objects(example[self._objects_key])
            decode = decode_depth if key == "depth" else decode_image
            try:
                if kind is Feature.LABEL_MAP:
                    return decode_label_map(example[key], self._options)
                return decode(example[key], self._options)
            except DataError as error:
                raise type(error)(f"{self.describe(index, name)}: {error}") from error

        kind = Feature.LABEL_MAP if self._label_map else Feature.PICTURE
        return {
            "image": read_one(self._image_key, kind),
            "label": int(example["label"]) if self._has_classes else -1,
            "features": {key: read_one(key, kind, key) for key, kind in self._features.items()},
        }

    def stored(self, index: int) -> tuple[bytes, int]:
        """The image as it is stored, encoded, and its class, -1 where it has none."""
        example = self._examples[index]
        return example[self._image_key], int(example["label"]) if self._has_classes else -1

    def describe(self, index: int, feature: str = "") -> str:
        """The data set, split and index, and the feature if one is given."""
        return f"{self._name} {self._split}[{index}]" + (f" {feature}" if feature else "")


def _check_features(
    builder: tfds.core.DatasetBuilder,
    images: list[str],
    image_key: str,
    label_map: bool,
    features: Mapping[str, Feature],
) -> None:
    """Raises `DataError` for a feature that is none of `images`, or cannot be read like that.

    Objects are left to `_find_objects`.
    """
    if image_key not in images:
        raise DataError(
            f"config.data.image_key is {image_key!r}, but the images of {builder.name} are "
            f"{', '.join(images) or 'none'}."
        )
    images_beside = {k: kind for k, kind in features.items() if kind is not Feature.OBJECTS}
    for key, kind in images_beside.items():
        if kind is Feature.KEYPOINTS:
            raise DataError(
                f"{builder.name} has no keypoints that can be read; only folders have, as JSON "
                "files. Set config.data.name=folder:PATH."
            )
        if key not in images:
            raise DataError(
                f"The images of {builder.name} that can be conditions are "
                f"{', '.join(images)}; there is no {key!r}."
            )
    if builder.name != "earth":
        return
    if (image_key == "segmentation") != label_map:
        classes = builder.info.features["label"].num_classes
        needed = classes if image_key == "segmentation" else 0
        raise DataError(
            f"{image_key!r} of earth is {'a' if needed else 'no'} label map: set "
            f"config.data.num_labels={needed}."
        )
    for key, kind in images_beside.items():
        maps = kind is Feature.LABEL_MAP
        if (key == "segmentation") != maps:
            what = "pictures" if maps else "label maps"
            raise DataError(f"The condition {key!r} of earth needs a tokenizer of {what}.")


def _find_objects(
    builder: tfds.core.DatasetBuilder,
) -> tuple[str, tfds.features.ClassLabel]:
    """The key of the feature that has objects with boxes and classes, and these classes.

    Raises:
      DataError: the data set has no such feature.
    """
    for key, feature in builder.info.features.items():
        if not isinstance(feature, tfds.features.Sequence):
            continue
        parts = feature.feature
        if not isinstance(parts, tfds.features.FeaturesDict) or "bbox" not in parts:
            continue
        label = dict(parts).get("label")
        if isinstance(label, tfds.features.ClassLabel):
            return key, label
    raise DataError(
        f"{builder.name} has no objects with boxes, which the condition layout needs; coco/2017 "
        "and open_images_v4 have, and folder:PATH with JSON files in PATH/layout."
    )


def _scene_objects(found: Mapping[str, np.ndarray]) -> tuple[SceneObject, ...]:
    """From boxes (N, 4) of ymin, xmin, ymax, xmax, in shares, and what else there is of objects."""
    objects = []
    boxes = np.asarray(found["bbox"], np.float64).reshape(-1, 4)
    for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
        # An attribute may also be -1: nobody knows.
        true = frozenset(
            name for key, name in _ATTRIBUTES.items() if key in found and found[key][i] > 0
        )
        box = (left, top, right - left, bottom - top)
        objects.append(SceneObject(int(found["label"][i]), box, true))
    return tuple(objects)


def open_builder(
    name: str, data_dir: str | os.PathLike = "", resolution: int = 64
) -> tfds.core.DatasetBuilder:
    """The builder of a data set that is prepared in `data_dir` as ArrayRecord files.

    Only `earth` is prepared here. The others may be hundreds of gigabytes to download, and most
    need TensorFlow for it.

    Raises:
      DataError: when there is no such data set, or it is not prepared; the message then has the
        commands that do it.
    """
    if name.partition("/")[0] == "earth":
        return prepare_earth(resolve_earth(name, resolution), data_dir)
    root = default_data_dir(data_dir).absolute()
    try:
        # From the files alone: the code of some builders cannot be imported without TensorFlow.
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=root)
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(_not_prepared(name, root)) from error
    if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        raise DataError(
            f"{builder.data_path} is stored as {builder.info.file_format.value}, which has no "
            f"random access. Set config.data.data_dir to another folder.\n"
            f"{_commands(name, 'OTHER_FOLDER')}"
        )
    return builder


def _not_prepared(name: str, root: pathlib.Path) -> str:
    """Why a data set cannot be opened and what to do: a name is unknown or not prepared yet."""
    base_name = name.partition("/")[0].partition(":")[0]
    # Without those of the community, whose list would be downloaded.
    known = tfds.list_builders(with_community_datasets=False)
    if base_name not in known:
        near = difflib.get_close_matches(base_name, [*known, "earth", "folder:PATH"], n=4)
        meant = f" Near it are {', '.join(near)}." if near else ""
        return (
            f"There is no data set called {name!r}.{meant} config.data.name can be earth, "
            "folder:PATH, or a name of tensorflow-datasets."
        )
    by_hand = tfds.builder_cls(base_name).MANUAL_DOWNLOAD_INSTRUCTIONS
    first = ""
    if by_hand:
        first = (
            f"Its archives must be downloaded by hand into {root / 'downloads' / 'manual'}: "
            f"{' '.join(by_hand.split())}\n"
        )
    return f"{name} is not prepared in {root}.\n{first}{_commands(name, root)}"


def _commands(name: str, root: str | os.PathLike) -> str:
    """How to prepare a data set once, in an environment with TensorFlow."""
    code = (
        f"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{root}')"
        ".download_and_prepare(file_format='array_record')"
    )
    return (
        "Prepare it once, in an environment of its own because that needs TensorFlow:\n"
        "  python -m venv prepare_environment\n"
        "  prepare_environment/bin/pip install tensorflow tensorflow-datasets importlib_resources\n"
        f'  prepare_environment/bin/python -c "{code}"'
    )
