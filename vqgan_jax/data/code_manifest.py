"""What a directory of codes holds and how it was made: `manifest.json`, and the shards' names.

A directory has for each shard `codes-00000-of-00016.npy`, (n, augmentations, h * w * depth) uint16
or uint32, all codes of a position together; `labels-00000-of-00016.npy`, (n,) int32; for each
condition that is stored beside them `condition-NAME-00000-of-00016.npy`, (n, augmentations, tokens)
uint16 or uint32; and for all of them `manifest.json`. Nothing in them depends on when, where and on
how many machines they were made.

Version 1 of the format had no conditions, and version 2 one code a position.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from vqgan_jax.conditions.layouts import LayoutEncoding
from vqgan_jax.data.errors import DataError

FORMAT, VERSION = "vqgan_jax codes", 3
READABLE = (1, 2, VERSION)
MANIFEST = "manifest.json"
PARTIAL = "partial"  # the folder of a pass that is under way


@dataclasses.dataclass(frozen=True)
class ConditionInfo:
    """The facts that determine the tokens of a condition, and what they mean.

    Attributes:
      name: of the condition.
      num_tokens: of a view.
      vocabulary: how many different tokens there are: the size of the codebook, or for coordinates
        the intervals + 1.
      grid: (h, w) where the tokens lie over the image; None where they do not.
      fingerprint: of the condition's tokenizer; empty where it needs none.
      dtype: of that tokenizer's computation.
      image_key: the feature that the condition was read from.
      derive: how it was made from the image, as in `condition_sources.ConditionImage`.
      scale: how many times smaller the low resolution is; 0 for others.
      layout: how objects became tokens; None for all but layouts.
      min_area: objects not larger than this share of their image were left out.
      class_names: of the objects; empty where they have none.
    """

    name: str
    num_tokens: int
    vocabulary: int
    grid: tuple[int, int] | None = None
    fingerprint: str = ""
    dtype: str = ""
    image_key: str = ""
    derive: str = ""
    scale: int = 0
    layout: LayoutEncoding | None = None
    min_area: float = 0.0
    class_names: tuple[str, ...] = ()

    @classmethod
    def of_layout(
        cls, encoding: LayoutEncoding, min_area: float, class_names: tuple[str, ...]
    ) -> "ConditionInfo":
        """Those of tokens of layouts."""
        return cls(
            name="layout",
            num_tokens=encoding.length,
            vocabulary=encoding.num_tokens,
            layout=encoding,
            min_area=min_area,
            class_names=class_names,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ConditionInfo":
        """What `dataclasses.asdict` made; `TypeError` or `ValueError` for anything else."""
        found = dict(values)
        found["grid"] = found.get("grid") and tuple(found["grid"])
        found["class_names"] = tuple(found.get("class_names", ()))
        if layout := found.get("layout"):
            attributes = tuple(layout["attributes"])
            found["layout"] = LayoutEncoding(**layout | {"attributes": attributes})
        return cls(**found)

    @property
    def facts(self) -> dict[str, Any]:
        """All values by name, those of a layout's encoding as `layout.places` and so on."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        layout = facts.pop("layout")
        own = dataclasses.asdict(layout) if layout else {}
        return facts | {f"layout.{name}": value for name, value in own.items()}

    @property
    def kind(self) -> str:
        """Of its files, see `CodesInfo.arrays`."""
        return f"condition-{self.name}"


@dataclasses.dataclass(frozen=True)
class CodesInfo:
    """The facts that determine every code of a pass over a split.

    Attributes:
      dataset: name as `data.sources.open_source` takes it.
      split: of the data set.
      image_key: the feature that holds the images.
      count: number of images.
      class_names: None where images have no classes.
      resolution: side of the images in pixels.
      resize: shorter side before the crop; -1 = pixels as they were.
      augmentations: names of the views, the centre first.
      grid: (h, w) of the codes of a view.
      codebook_size: number of codes.
      fingerprint: of the tokenizer.
      dtype: of the tokenizer's computation, which rounding depends on.
      images_per_shard: of all shards but the last.
      conditions: whose tokens are stored beside the codes.
      depth: codes a position, of residual and product quantizers.
    """

    dataset: str
    split: str
    image_key: str
    count: int
    class_names: tuple[str, ...] | None
    resolution: int
    resize: int
    augmentations: tuple[str, ...]
    grid: tuple[int, int]
    codebook_size: int
    fingerprint: str
    dtype: str
    images_per_shard: int
    conditions: tuple[ConditionInfo, ...] = ()
    depth: int = 1

    @property
    def num_classes(self) -> int:
        """0 where images have no classes."""
        return len(self.class_names or ())

    @property
    def num_shards(self) -> int:
        """A number that depends on the images alone."""
        return -(-self.count // self.images_per_shard)

    def images_of(self, shard: int) -> range:
        """The indices of a shard's images."""
        first = shard * self.images_per_shard
        return range(first, min(first + self.images_per_shard, self.count))

    @property
    def vocabularies(self) -> dict[str, int]:
        """How many different tokens the files of a kind have: `codes`, `condition-NAME`."""
        conditions = {condition.kind: condition.vocabulary for condition in self.conditions}
        return {"codes": self.codebook_size} | conditions

    def arrays(self, shard: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of each of a shard's files: `codes`, `labels`, `condition-NAME`.

        Tokens have the smallest of uint16 and uint32 that holds each.
        """
        lengths = {condition.kind: condition.num_tokens for condition in self.conditions}
        lengths["codes"] = self.grid[0] * self.grid[1] * self.depth
        rows, views = len(self.images_of(shard)), len(self.augmentations)
        found = {}
        for kind, size in self.vocabularies.items():
            dtype = np.dtype(np.uint16 if size <= 2**16 else np.uint32)
            found[kind] = ((rows, views, lengths[kind]), dtype)
        return found | {"labels": ((rows,), np.dtype(np.int32))}

    def file_name(self, kind: str, shard: int) -> str:
        """A file of a shard; for the kinds see `arrays`."""
        return f"{kind}-{shard:05}-of-{self.num_shards:05}.npy"

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return {"format": FORMAT, "version": VERSION} | dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any], path: pathlib.Path) -> "CodesInfo":
        """What `to_json` made.

        Raises:
          DataError: for another format or version, or missing values; it names the file `path`.
        """
        if values.get("format") != FORMAT:
            raise DataError(f"{path} describes no codes of vqgan_jax.")
        if values.get("version") not in READABLE:
            raise DataError(
                f"{path} has the format's version {values.get('version')}; this program reads "
                f"versions {READABLE[0]} to {VERSION}. Make the codes again, or use the program "
                "they were made with."
            )
        try:
            if values["version"] < 3:
                values = {"conditions": ()} | values | {"depth": 1}
            found = {field.name: values[field.name] for field in dataclasses.fields(cls)}
            for name in ("class_names", "augmentations", "grid"):
                found[name] = None if found[name] is None else tuple(found[name])
            conditions = tuple(map(ConditionInfo.from_json, found["conditions"]))
            return cls(**found | {"conditions": conditions})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged: {error}.") from error


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """What is recorded of a shard that is on disk.

    Attributes:
      codes: file name.
      codes_sha256: of the file.
      labels: file name.
      labels_sha256: of the file.
      n: number of images.
      replaced: indices of damaged images, in whose place the next readable one is.
      conditions: the SHA-256 of each condition's file, by its name.
    """

    codes: str
    codes_sha256: str
    labels: str
    labels_sha256: str
    n: int
    replaced: tuple[int, ...] = ()
    conditions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def files(self) -> dict[str, str]:
        """The SHA-256 of each file, by its name."""
        own = {self.codes: self.codes_sha256, self.labels: self.labels_sha256}
        return own | self.conditions


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All that `manifest.json` says."""

    info: CodesInfo
    shards: tuple[ShardRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return self.info.to_json() | {"shards": [dataclasses.asdict(s) for s in self.shards]}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; `DataError` where there is none in it."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}.") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} is damaged: it holds no JSON object.")
    return values


def read_record(values: Any, path: pathlib.Path) -> ShardRecord:
    """What is recorded of a shard; `DataError` for anything else, which names the file `path`."""
    try:
        conditions = dict(values.get("conditions", {}))
        changed = {"replaced": tuple(values["replaced"]), "conditions": conditions}
        return ShardRecord(**values | changed)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}.") from error


def read_manifest(directory: pathlib.Path) -> Manifest:
    """The manifest of a directory of codes.

    Raises:
      DataError: there is none, because the pass is not finished or the directory is another; or it
        is damaged or of another version.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise DataError(_without_manifest(directory))
    values = read_json(path)
    info = CodesInfo.from_json(values, path)
    if not isinstance(values.get("shards"), list) or len(values["shards"]) != info.num_shards:
        raise DataError(f"{path} is damaged: it does not list its {info.num_shards} shards.")
    return Manifest(info, tuple(read_record(shard, path) for shard in values["shards"]))


def _without_manifest(directory: pathlib.Path) -> str:
    if not directory.is_dir():
        return f"There is no directory {directory}."
    if (directory / PARTIAL).is_dir():
        return (
            f"The codes in {directory} are not complete: the pass is not finished. Run the same "
            "tokenize command again; it goes on where it stopped."
        )
    splits = ", ".join(path.name for path in find_codes(directory))
    below = f" Choose one below it: {splits}." if splits else ""
    return f"{directory} holds no codes: it has no {MANIFEST}.{below}"


def find_codes(directory: pathlib.Path) -> list[pathlib.Path]:
    """`directory` itself where it holds codes, complete or not; else those below that do."""

    def holds_codes(path: pathlib.Path) -> bool:
        return (path / MANIFEST).exists() or (path / PARTIAL).is_dir()

    if holds_codes(directory):
        return [directory]
    return sorted(filter(holds_codes, directory.iterdir())) if directory.is_dir() else []
