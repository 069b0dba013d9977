"""Images by name and index: `earth`, `folder:PATH`, or a tensorflow-datasets name."""

import enum
import os
from collections.abc import Mapping
from typing import Any, Protocol

from ml_collections import ConfigDict

from vqgan_jax.data.decoding import DEFAULT_OPTIONS, DecodeOptions
from vqgan_jax.data.splits import RULES


class Feature(enum.Enum):
    """What can be read beside an image, and how it is called in messages."""

    PICTURE = "picture"
    LABEL_MAP = "label map"
    OBJECTS = "list of objects"
    KEYPOINTS = "list of keypoints"


class ImageSource(Protocol):
    """Random access to the images of one split; picklable, for worker processes.

    Attributes:
      dataset_length: number of images of all splits together.
      class_names: None where images have no classes.
      object_names: of the classes of objects; empty where there are none or they have numbers only.
    """

    dataset_length: int
    class_names: tuple[str, ...] | None
    object_names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> dict[str, Any]:
        """One example.

        Returns:
          `image`: uint8 (H, W, 3), or (H, W) for a label map; `label`: int, the class or -1;
          `features`: a dict of the others that were asked for: pictures and label maps as `image`;
          objects, a tuple of `SceneObject` in shares of the image; keypoints, float64 (P, N, 3) of
          people, in pixels of the image.

        Raises:
          UnreadableImage: when one of the images is damaged.
          DataError: when objects or keypoints are not what they should be.
        """

    def describe(self, index: int, feature: str = "") -> str:
        """Where the image or another feature is, for messages: a path, or `name split[index]`."""


def open_configured(
    data: ConfigDict,
    split: str,
    resolution: int,
    features: Mapping[str, Feature] | None = None,
    num_labels: int | None = None,
) -> ImageSource:
    """A split of the images that `config.data` names; errors as of `open_source`.

    `num_labels` stands for that of the config where it is given.
    """
    label_map = (data.num_labels if num_labels is None else num_labels) > 0
    return open_source(
        data.name,
        split,
        data.data_dir,
        data.image_key,
        resolution,
        label_map,
        features,
        data.folder_rules,
        DecodeOptions.from_config(data),
    )


def open_source(
    name: str,
    split: str,
    data_dir: str | os.PathLike = "",
    image_key: str = "image",
    resolution: int = 64,
    label_map: bool = False,
    features: Mapping[str, Feature] | None = None,
    folder_rules: int = RULES,
    options: DecodeOptions = DEFAULT_OPTIONS,
) -> ImageSource:
    """Opens a split of a data set; `earth` is prepared on first use.

    Args:
      name: `earth` (`earth/64`, `earth/128`, `earth/256`), `folder:PATH`, or the name of an image
        data set of tensorflow-datasets (`cifar10`, `imagenette/320px-v2`).
      split: the split's name; for named data sets also an expression such as `train[:10%]`.
      data_dir: where data sets are; empty as in `packages.default_data_dir`.
      image_key: the feature that holds the image; `earth` has `image`, `segmentation`, `relief`
        and `elevation`. For what folders have see `folders`.
      resolution: the side of the crops to come; chooses the size of `earth`.
      label_map: whether pixel values are labels, read as (H, W).
      features: others that are read too, by key, and what each is.
      folder_rules: which folders are splits, of `splits.list_folder`.
      options: how images are decoded.

    Raises:
      DataError: when there is no such data set, split or feature.
    """
    if name.startswith("folder:"):
        from vqgan_jax.data.folders import FolderSource

        path = name.removeprefix("folder:")
        return FolderSource(path, split, image_key, label_map, features, folder_rules, options)
    # tensorflow-datasets takes half a second to import, which folders need not wait for.
    from vqgan_jax.data.named import NamedSource, open_builder

    builder = open_builder(name, data_dir, resolution)
    return NamedSource(builder, split, image_key, label_map, features, options)
