"""Says what a thing is: images, a run, a checkpoint, an export or codes.

    python -m vqgan_jax.describe photos
    python -m vqgan_jax.describe photos --json=photos.json --picture=photos.png --decode
    python -m vqgan_jax.describe earth
    python -m vqgan_jax.describe runs/quickstart

Of a data set (a folder of images, `earth` or a name of tensorflow-datasets) it lists the splits and
classes and reads the header of every image: sizes, modes, damage, and what is left out and why.
`--decode` reads every pixel, and so finds damage behind the headers too. `--picture` shows 64
examples of the first split, class by class.
"""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

from absl import flags

from vqgan_jax import command_line
from vqgan_jax.command_line.help import group
from vqgan_jax.errors import DataError, UnreadableImage

if TYPE_CHECKING:
    from vqgan_jax.data.dataset_report import DatasetListing

COLUMNS, SIDE = 8, 96  # of the picture


def describe(what: str, data_dir: str = "", decode: bool = False, picture: str = "") -> dict:
    """What a thing is.

    Args:
        what: a path, or the name of a data set.
        data_dir: where data sets are; empty as in `packages.default_data_dir`.
        decode: decode every image of a data set, and not its header alone.
        picture: a PNG file for examples of a data set; empty for none.

    Returns:
        The report that `--json` writes: `kind` is "dataset", "run", "checkpoint", "export" or
        "codes"; for the rest see `describe_dataset`, `describe_model` and `describe_codes`.

    Raises:
        DataError, CheckpointError: there is no such thing, or it is damaged.
    """
    report, _ = _report(what, data_dir, decode, picture)
    return report


def _report(what: str, data_dir: str, decode: bool, picture: str) -> tuple[dict, list[str]]:
    """The report, and the same as lines of text."""
    from vqgan_jax.data import code_report, dataset_report
    from vqgan_jax.data.code_manifest import find_codes
    from vqgan_jax.data.splits import expand_user

    path = pathlib.Path(expand_user(what.removeprefix("folder:")))
    if not what.startswith("folder:") and path.is_dir() and not picture and not decode:
        if find_codes(path):
            report = code_report.describe_codes(path)
            return report, code_report.lines(report)
        from vqgan_jax.training import (
            model_report,  # imports JAX, which data sets need not wait for
        )

        if model_report.kind_of(path):
            report = model_report.describe_model(path)
            return report, model_report.lines(report)
    if path.is_file():
        raise DataError(f"{path} is a file; describe takes a folder, or the name of a data set.")
    is_folder = path.is_dir() or what.startswith("folder:")
    if not is_folder and "/" in what and not what.partition("/")[0].isidentifier():
        raise DataError(f"There is no {path}.")
    try:
        listing = dataset_report.list_dataset(f"folder:{path}" if is_folder else what, data_dir)
    except DataError as error:
        if is_folder:
            raise
        raise DataError(f"There is no file or folder {path}. {error}") from error
    report = dataset_report.describe_dataset(listing, decode)
    if picture:
        write_picture(listing, pathlib.Path(picture))
    return report, dataset_report.lines(report)


def write_picture(listing: DatasetListing, path: pathlib.Path) -> None:
    """Writes examples of the first split that has images, class by class, as a PNG."""
    import numpy as np
    from PIL import Image

    from vqgan_jax.data.dataset_report import choose_examples
    from vqgan_jax.data.decoding import decode_image
    from vqgan_jax.sample_files import labelled_grid

    def thumbnail(image: np.ndarray) -> np.ndarray:
        """The square in the centre of uint8 (H, W, 3), at 96 pixels."""
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = Image.fromarray(image[top : top + side, left : left + side])
        return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC))

    splits = [split for split, images in listing.splits.items() if len(images)]
    if not splits:
        raise DataError(f"{listing.name} has no images to show.")
    rows: list[tuple[str, list[np.ndarray]]] = []
    for image in choose_examples(listing, splits[0]):
        try:
            square = thumbnail(decode_image(image.encoded))
        except UnreadableImage:
            continue
        if not rows or rows[-1][0] != image.class_name or len(rows[-1][1]) == COLUMNS:
            rows.append((image.class_name, []))
        rows[-1][1].append(square)
    if not rows:
        raise DataError(f"None of the images of {listing.name} can be decoded.")
    numbers = np.repeat(np.arange(len(rows)), [len(images) for _, images in rows])
    images = [image for _, own in rows for image in own]
    labels = numbers if any(name for name, _ in rows) else None
    labelled_grid(images, labels, [name for name, _ in rows]).save(path)


def main(what: str) -> None:
    """Describes what the command line names."""
    options = flags.FLAGS
    for name, suffix in (("json", ".json"), ("picture", ".png")):
        if options[name].value and not options[name].value.endswith(suffix):
            raise DataError(f"--{name}={options[name].value} must end in {suffix}.")
    report, lines = _report(what, options.data_dir, options.decode, options.picture)
    print(*lines, sep="\n")
    if options.json:
        text = json.dumps(report, indent=1, default=_plain, ensure_ascii=False)
        pathlib.Path(options.json).write_text(text + "\n", encoding="utf-8", errors="replace")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value)


def define_flags() -> None:
    """The flags of this command."""
    with group("Flags"):
        flags.DEFINE_string("json", "", "A file X.json that the whole description is written to.")
        flags.DEFINE_string("picture", "", "A file X.png for 64 examples of a data set, by class.")
        flags.DEFINE_boolean(
            "decode", False, "Decodes every image, which finds damage behind its header too."
        )
        flags.DEFINE_string("data_dir", "", "Where data sets are.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main, arguments=("PATH_OR_NAME",))
