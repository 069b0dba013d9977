"""What a data set holds, for people: images by split and class, sizes, damage, what is left out."""

import collections
import dataclasses
import heapq
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from vqgan_jax.data.decoding import decode_image, open_image
from vqgan_jax.data.elements import spaced_indices
from vqgan_jax.data.splits import list_folder
from vqgan_jax.errors import DataError, UnreadableImage

THREADS = 8
CHUNK = 1024  # images that are handed to the threads at once
PREVIEW_IMAGES = 64
MOST_LOOKED_AT = 4096  # images of a split for the preview: all could be hours of reading


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """One image of a data set, as it is stored.

    Attributes:
      where: its path, or data set, split and index.
      class_name: empty where it has no class.
      encoded: a path or bytes, for `decoding.decode_image`.
    """

    where: str
    class_name: str
    encoded: str | bytes


@dataclasses.dataclass(frozen=True)
class DatasetListing:
    """A data set of any kind as its listing gives it, without opening an image.

    Attributes:
      name: as it was asked for.
      splits: the images of each, read when they are asked for.
      class_names: in the order of their numbers; empty where images have no classes.
      left_out: number of files that are no images, by suffix.
      ignored_folders: folders whose images belong to no split.
      notes: lines on what was taken for a split, and on circles of links.
    """

    name: str
    splits: dict[str, Sequence[StoredImage]]
    class_names: tuple[str, ...] = ()
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    ignored_folders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def list_dataset(name: str, data_dir: str | os.PathLike = "") -> DatasetListing:
    """Lists a data set: `folder:PATH`, `earth` or a name of tensorflow-datasets.

    Raises:
      DataError: there is none of that name, or it is not prepared.
    """
    if not name.startswith("folder:"):
        return _list_named(name, data_dir)
    found = list_folder(name.removeprefix("folder:"))
    splits = {
        split: tuple(StoredImage(file, class_name, file) for file, class_name in files)
        for split, files in found.splits.items()
        if split != "all"  # the other splits together
    }
    return DatasetListing(
        name,
        splits,
        found.class_names,
        found.left_out,
        found.ignored_folders,
        found.notes,
    )


def _list_named(name: str, data_dir: str | os.PathLike) -> DatasetListing:
    # tensorflow-datasets takes half a second to import, which folders need not wait for.
    from vqgan_jax.data.named import NamedSource, open_builder

    builder = open_builder(name, data_dir)
    sources = {split: NamedSource(builder, split) for split in builder.info.splits}
    class_names = next((source.class_names for source in sources.values()), None) or ()
    return DatasetListing(
        name, {split: _NamedImages(source) for split, source in sources.items()}, class_names
    )


class _NamedImages(Sequence):
    """The images of a split of tensorflow-datasets, each read when it is asked for."""

    def __init__(self, source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> StoredImage:
        encoded, label = self._source.stored(index)
        class_name = self._source.class_names[label] if label >= 0 else ""
        return StoredImage(self._source.describe(index), class_name, encoded)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the header of an image says, or why it cannot be read."""

    image: StoredImage
    shape: tuple[int, int] = (0, 0)
    mode: str = ""
    why: str = ""


def _look(image: StoredImage, decode: bool) -> _Seen:
    try:
        with open_image(image.encoded) as opened:
            shape, mode = opened.size[::-1], opened.mode
        if decode:
            decode_image(image.encoded)
    except UnreadableImage as error:
        return _Seen(image, why=str(error))
    except DataError:
        pass  # a range of grey values that the config has to name
    return _Seen(image, shape, mode)


def _look_at_all(split: str, images: Sequence[StoredImage], decode: bool) -> Iterator[_Seen]:
    """In order; a bar on a terminal shows how far it is."""
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(images), desc=split, unit=" images", disable=None, leave=False) as bar,
    ):
        for first in range(0, len(images), CHUNK):
            places = range(first, min(first + CHUNK, len(images)))
            for seen in pool.map(lambda i: _look(images[i], decode), places):
                yield seen
                bar.update()


def describe_dataset(listing: DatasetListing, decode: bool = False) -> dict[str, Any]:
    """The figures of a data set, from the headers of all its images.

    Args:
      listing: of `list_dataset`.
      decode: also decode every image, to find damage behind the headers.

    Returns:
      What `python -m vqgan_jax.describe --json` writes: `kind`, `name`, `splits` (each `images` and
      the number of them by class), `classes`, `left_out` by suffix, `ignored_folders`, `damaged`
      (each `file` and `why`), `sizes` (height and width of the images with the fewest, the median
      and the most pixels) and `modes` as Pillow names them.
    """
    splits, modes, damaged = {}, collections.Counter(), []
    shapes = collections.Counter()
    for split, images in listing.splits.items():
        classes = collections.Counter()
        for seen in _look_at_all(split, images, decode):
            if seen.image.class_name:
                classes[seen.image.class_name] += 1
            if seen.why:
                damaged.append({"file": seen.image.where, "why": seen.why})
            else:
                shapes[seen.shape] += 1
                modes[seen.mode] += 1
        counts = {name: classes[name] for name in listing.class_names if name in classes}
        splits[split] = {"images": len(images), "classes": counts}
    return {
        "kind": "dataset",
        "name": listing.name,
        "splits": splits,
        "classes": list(listing.class_names),
        "left_out": dict(sorted(listing.left_out.items())),
        "ignored_folders": list(listing.ignored_folders),
        "notes": list(listing.notes),
        "damaged": damaged,
        "sizes": _sizes(shapes),
        "modes": dict(modes.most_common()),
    }


def _sizes(shapes: collections.Counter) -> dict[str, list[int]]:
    """Height and width of the images with the fewest, the median and the most pixels."""
    ordered = sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))
    if not ordered:
        return {}
    middle, so_far = (shapes.total() + 1) // 2, 0
    for median in ordered:
        so_far += shapes[median]
        if so_far >= middle:
            break
    return {"smallest": [*ordered[0]], "median": [*median], "largest": [*ordered[-1]]}


def choose_examples(listing: DatasetListing, split: str) -> list[StoredImage]:
    """At most `PREVIEW_IMAGES` images of a split, as many of each class as there are, in order.

    Classes have the order of their numbers, and images that of the split.
    """
    images = listing.splits[split]
    places = collections.defaultdict(list)
    for i in spaced_indices(len(images), MOST_LOOKED_AT):
        places[images[i].class_name].append(i)
    names = sorted(places, key=[*listing.class_names, ""].index)
    shares = dict.fromkeys(names, 0)
    waiting = [(0, order) for order in range(len(names))]
    for _ in range(PREVIEW_IMAGES):
        if not waiting:
            break
        _, order = heapq.heappop(waiting)
        name = names[order]
        shares[name] += 1
        if shares[name] < len(places[name]):
            heapq.heappush(waiting, (shares[name], order))
    chosen = []
    for name in names:
        found, share = places[name], shares[name]
        chosen += [found[k] for k in spaced_indices(len(found), share)]
    return [images[i] for i in chosen]


def lines(report: dict[str, Any]) -> list[str]:
    """A report of `describe_dataset` as text."""
    classes = report["classes"]
    count = "1 class" if len(classes) == 1 else f"{len(classes) or 'no'} classes"
    found = [f"{report['name']}: a data set of {count}"]
    for split, values in report["splits"].items():
        counts = values["classes"]
        by_class = ", ".join(f"{name} {count}" for name, count in [*counts.items()][:8])
        more = f", and {len(counts) - 8} more" if len(counts) > 8 else ""
        images = "image " if values["images"] == 1 else "images"
        found.append(f"  {split:12} {values['images']} {images}  {by_class}{more}")
    if report["sizes"]:
        small, median, large = (
            "x".join(map(str, report["sizes"][key])) for key in ("smallest", "median", "largest")
        )
        found.append(f"  sizes        {small} to {large} (height x width), the median {median}")
        modes = ", ".join(f"{mode} {count}" for mode, count in report["modes"].items())
        found.append(f"  modes        {modes}")
    if report["left_out"]:
        left_out = ", ".join(f"{suffix} {count}" for suffix, count in report["left_out"].items())
        found.append(f"  left out     files that are no images: {left_out}")
    if report["ignored_folders"]:
        found.append(f"  ignored      {', '.join(report['ignored_folders'])}")
    found += [f"  note         {note}" for note in report["notes"]]
    damaged = report["damaged"]
    found += [f"  damaged      {item['why']}" for item in damaged[:10]]
    if len(damaged) > 10:
        found.append(f"  damaged      and {len(damaged) - 10} more")
    if not damaged:
        found.append("  damaged      none")
    return found
