"""What a directory of codes holds and how it was made: `manifest.json`, and the shards' names.

A directory has for each shard `codes-00000-of-00016.npy`, (n, augmentations, h * w * depth) uint16
or uint32, all codes of a position together; `labels-00000-of-00016.npy`, (n,) int32; for each
condition that is stored beside them `condition-NAME-00000-of-00016.npy`, (n, augmentations, tokens)
uint16 or uint32; and for all of them `manifest.json`. Nothing in them depends on when, where and on
how many machines they were made.

Version 1 of the format had no conditions, and version 2 one code a position.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Annotated, Any

import msgspec
import numpy as np

from vqgan_jax.conditions.layouts import LayoutEncoding
from vqgan_jax.configuration.documents import convert, parse_json, read_bytes
from vqgan_jax.errors import DataError

FORMAT, VERSION = "vqgan_jax codes", 3
READABLE = (1, 2, VERSION)
MANIFEST = "manifest.json"
PARTIAL = "partial"  # the folder of a pass that is under way
ORIGIN = "tokenizer_origin.json"  # which run and step the copy of the tokenizer is of
MOST_SHARDS, MOST_TOKENS = 2**24, 2**24
MOST_BYTES = 2**30  # of a manifest; a hundred million images have some 25,000 shards, 15 MB

# The ranges of what is read back.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**48)]
Side = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
Vocabulary = Annotated[int, msgspec.Meta(ge=1, le=2**32)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Name = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_.-]{1,200}$")]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


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

    name: Name
    num_tokens: Side
    vocabulary: Vocabulary
    grid: tuple[Side, Side] | None = None
    fingerprint: Text = ""
    dtype: Text = ""
    image_key: Text = ""
    derive: Text = ""
    scale: Count = 0
    layout: LayoutEncoding | None = None
    min_area: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
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
      folder_rules: which folders were splits, of `splits.list_folder`.
    """

    dataset: Text
    split: Text
    image_key: Text
    count: Positive
    class_names: tuple[str, ...] | None
    resolution: Side
    resize: Annotated[int, msgspec.Meta(ge=-1, le=2**20)]
    augmentations: Annotated[tuple[Text, ...], msgspec.Meta(min_length=1, max_length=4096)]
    grid: tuple[Side, Side]
    codebook_size: Vocabulary
    fingerprint: Text
    dtype: Text
    images_per_shard: Positive
    conditions: tuple[ConditionInfo, ...] = ()
    depth: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    folder_rules: Annotated[int, msgspec.Meta(ge=1, le=3)] = 1

    def __post_init__(self) -> None:
        """Raises `ValueError` for what no pass writes."""
        if self.num_shards > MOST_SHARDS or math.prod(self.grid) * self.depth > MOST_TOKENS:
            raise ValueError(
                f"it has {self.num_shards} shards and {self.grid} codes of an image; at most "
                f"{MOST_SHARDS} and {MOST_TOKENS} are read"
            )
        if len({condition.name for condition in self.conditions}) < len(self.conditions):
            raise ValueError("it has a condition twice")

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
        version = values.get("version")
        if isinstance(version, bool) or version not in READABLE:
            raise DataError(
                f"{path} has the format's version {str(version)[:40]}; this program reads "
                f"versions {READABLE[0]} to {VERSION}. Make the codes again, or use the program "
                "they were made with."
            )
        names = {field.name for field in dataclasses.fields(cls)}
        missing = {"conditions": (), "depth": 1, "folder_rules": 1}  # of older versions
        found = missing | {name: value for name, value in values.items() if name in names}
        return convert(found, cls, str(path))


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

    codes: Name
    codes_sha256: Sha256
    labels: Name
    labels_sha256: Sha256
    n: Positive
    replaced: tuple[Count, ...] = ()
    conditions: dict[Name, Sha256] = dataclasses.field(default_factory=dict)

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
        """As it stands in the file, with the SHA-256 of all of it."""
        values = self.info.to_json()
        values |= {"shards": [dataclasses.asdict(shard) for shard in self.shards]}
        return values | {"sha256": _digest(values)}


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      DataError: there is none in it, or its values have another SHA-256 than it says.
    """
    values = parse_json(read_bytes(path, MOST_BYTES), str(path))
    if not isinstance(values, dict):
        raise DataError(f"{path} is damaged: it holds no JSON object.")
    if "sha256" in values and values.pop("sha256") != _digest(values):
        raise DataError(f"{path} is damaged: its SHA-256 is not that of its values.")
    return values


def read_record(values: Any, info: CodesInfo, shard: int, path: pathlib.Path) -> ShardRecord:
    """What is recorded of a shard; `DataError` for anything else, which names the file `path`."""
    record = convert(values, ShardRecord, str(path))
    expected = {info.file_name(kind, shard) for kind in info.arrays(shard)}
    if record.files.keys() != expected or record.n != len(info.images_of(shard)):
        raise DataError(f"{path} is damaged: what it says of shard {shard} is of another one.")
    return record


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
    records = enumerate(values["shards"])
    return Manifest(info, tuple(read_record(record, info, i, path) for i, record in records))


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
