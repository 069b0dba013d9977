"""Images reconstructed by a tokenizer, and the figures of the reconstructions.

The output holds a PNG for each image, the input on the left and its reconstruction on the right;
the overview `grid.png`; and `metrics.json` with PSNR, SSIM and LPIPS of each image, their means,
and how much of the codebook the images use. Of a label-map tokenizer, the inputs are label maps;
they come back in colours, and the figure is the share of pixels whose label is right.

Images may have any size. The time and memory of the attention grow with the square of an image's
area.
"""

import collections
import copy
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vqgan_jax.checkpoints.directory_lock import is_empty, locked
from vqgan_jax.configuration.memory import require_memory
from vqgan_jax.data.images import prepare_images, to_uint8
from vqgan_jax.data.inputs import Picture, list_pictures
from vqgan_jax.errors import DataError
from vqgan_jax.inference import Tokenizer, load_tokenizer
from vqgan_jax.interop.lpips import check_lpips, load_lpips
from vqgan_jax.metrics.codebook import code_counts, perplexity, usage
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.training.compilation import compile_options
from vqgan_jax.training.evaluation import reconstruction_figures
from vqgan_jax.training.game import Game
from vqgan_jax.training.pictures import label_colors
from vqgan_jax.training.progress import format_duration

GRID, METRICS = "grid.png", "metrics.json"
FIGURES = ("psnr", "ssim", "lpips", "pixel_accuracy")
SMALLEST = 32  # pixels: on fewer, the windows of SSIM and the poolings of LPIPS do not fit
GRID_PAIRS, GRID_COLUMNS, GRID_SIDE, GRID_GAP = 16, 4, 256, 2
TABLE_ROWS = 40  # of more pictures the terminal has the means only
PROGRESS_SECONDS = 10.0
THREADS = 8


def reconstruct(
    checkpoint: str,
    inputs: Sequence[str],
    output: str | Path,
    batch_size: int = 8,
    resize: int | None = None,
    validation_images: int = 16,
    data_dir: str = "",
) -> dict:
    """Writes the pictures, overview and figures of `inputs` into the directory `output`.

    Args:
        checkpoint: a run directory, a checkpoint or an export.
        inputs: files, folders, or the word "validation" for the run's own validation split.
        output: a directory that does not exist or is empty.
        batch_size: pictures of one size that go through the networks together.
        resize: shorter side in pixels; None takes pictures as they are.
        validation_images: how many of the validation split.
        data_dir: where the data set and the LPIPS weights are; empty as the run had it.

    Returns:
        What `metrics.json` holds.

    Raises:
        CheckpointError: of `load_tokenizer`.
        DataError: the output is in use, an input does not exist, or no picture can be used.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and is_empty(output)):
        raise DataError(f"{output} exists and is not empty; choose another --output.")
    if batch_size < 1 or validation_images < 1:
        raise DataError("--batch_size and --validation_images must be at least 1.")
    tokenizer = load_tokenizer(checkpoint)
    config = tokenizer.config
    side = resize or config.model.resolution
    require_memory(
        batch_size * side**2 * 3 * 4,
        f"A batch of {batch_size} images of {side} x {side} pixels",
        "take a smaller --batch_size or --resize",
    )
    if data_dir:
        config.data.data_dir = data_dir
    smallest = tokenizer.factor if config.data.num_labels else max(SMALLEST, tokenizer.factor)
    pictures = list_pictures(
        inputs, config, smallest, resize, validation_images, reserved=(GRID, METRICS)
    )
    with locked(output), ThreadPoolExecutor(THREADS) as pool:
        groups, skipped = group_by_shape(pictures, pool)
        for error in skipped.values():
            print(f"skipped: {error}", file=sys.stderr)
        if not groups:
            raise DataError(f"None of the {len(pictures)} images can be reconstructed.")
        usable = [picture.name for picture in pictures if picture.name not in skipped]
        sizes = f"{len(groups)} sizes, compiling once for each" if groups[1:] else "one size"
        print(f"{len(usable)} images of {sizes}.", flush=True)
        lpips = lpips_parameters(config)
        results = reconstruct_groups(tokenizer, lpips, groups, batch_size, output, pool)

        entries = [results.entries[name] for name in usable]
        shown = [results.thumbnails[name] for name in usable if name in results.thumbnails]
        overview(shown).save(output / GRID)
        summary = summarize(entries, results.code_counts) | {
            "lpips_network": config.loss.perceptual_network.backbone if lpips else None,
            "checkpoint": str(checkpoint),
            "skipped": [str(error) for error in skipped.values()],
            "pictures": entries,
        }
        (output / METRICS).write_text(json.dumps(without_infinity(summary), indent=2) + "\n")
        print_table(summary)
        print(f"Wrote {output}: the pictures, {GRID} and {METRICS}.")
        return summary


# ---- Pictures in, figures out.


@dataclasses.dataclass
class Results:
    """What is known of the pictures that are done, by name; of the first few a thumbnail."""

    code_counts: np.ndarray  # as of `metrics.codebook.code_counts`
    entries: dict[str, dict] = dataclasses.field(default_factory=dict)
    thumbnails: dict[str, Image.Image] = dataclasses.field(default_factory=dict)


def reconstruct_groups(
    tokenizer: Tokenizer,
    lpips: dict | None,
    groups: Sequence[Sequence[Picture]],
    batch_size: int,
    output: Path,
    pool: Executor,
) -> Results:
    """Writes the pairs of all pictures below `output`, and measures them."""
    total = sum(len(group) for group in groups)
    run_batch, progress = make_reconstruction(tokenizer, lpips), Progress(total)
    results = Results(np.zeros((), np.int64))
    for group, images in batches(groups, batch_size, pool):
        pairs, figures, codes = run_batch(images)
        pairs, codes = pairs[: len(group)], codes[: len(group)]
        counts = code_counts(codes, tokenizer.codebook_size, depth=tokenizer.depth)
        results.code_counts = results.code_counts + np.asarray(counts, np.int64)
        list(pool.map(write_png, [output / picture.name for picture in group], pairs))
        for i, picture in enumerate(group):
            results.entries[picture.name] = describe(picture, images[i], figures, i)
            if len(results.thumbnails) < GRID_PAIRS:
                results.thumbnails[picture.name] = thumbnail(pairs[i])
        progress.report(len(results.entries))
    return results


# ---- Pictures in, figures out.


def group_by_shape(
    pictures: Sequence[Picture], pool: Executor
) -> tuple[list[list[Picture]], dict[str, DataError]]:
    """Reads every picture once, so that sizes and damage are known before anything compiles.

    The pixels are read again when they are needed, as all of them may not fit into memory.

    Returns:
        Pictures of equal shape together, the largest first: should they not fit into the device's
        memory, nothing is written yet. And by name, why the others cannot be used.
    """

    def shape_of(picture):
        try:
            return picture.read().shape
        except DataError as error:
            return error

    groups, skipped = collections.defaultdict(list), {}
    for picture, result in zip(pictures, pool.map(shape_of, pictures), strict=True):
        if isinstance(result, DataError):
            skipped[picture.name] = result
        else:
            groups[result].append(picture)
    largest_first = sorted(groups, key=math.prod, reverse=True)
    return [groups[shape] for shape in largest_first], skipped


def batches(
    groups: Sequence[Sequence[Picture]], batch_size: int, pool: Executor
) -> Iterator[tuple[Sequence[Picture], np.ndarray]]:
    """(pictures, their images `(B, ...)`); the last image is repeated where a batch is not full.

    All batches of a group have one shape.
    """
    for group in groups:
        size = min(batch_size, len(group))
        for first in range(0, len(group), size):
            part = group[first : first + size]
            images = list(pool.map(lambda picture: picture.read(), part))
            yield part, np.stack(images + images[-1:] * (size - len(part)))


def lpips_parameters(config: ConfigDict) -> dict | None:
    """The weights of the config's perceptual network; None for label maps.

    Where they cannot be had, None and a warning: the other figures do not need them.
    """
    if config.data.num_labels:
        return None
    network = config.loss.perceptual_network
    try:
        params = load_lpips(network, config.data.data_dir)
        check_lpips(LPIPS(network.backbone), params)
    except DataError as error:
        print(f"warning: LPIPS is left out. {error}", file=sys.stderr)
        return None
    return params


def measuring_game(config: ConfigDict, with_lpips: bool) -> Game:
    """The config's networks, with the terms that are to be measured instead of those trained on."""
    config = copy.deepcopy(config)
    config.loss.binary_cross_entropy = float(config.data.num_labels > 0)
    config.loss.perceptual = float(with_lpips)
    return Game.from_config(config)


def make_reconstruction(tokenizer: Tokenizer, lpips: dict | None) -> Callable:
    """The function that takes raw images `(B, ...)` to pairs, figures and codes, on the host.

    Pairs are uint8 `(B, H, 2 W, 3)`, figures `(B,)` by name, codes `(B, h, w)`.
    """
    game = measuring_game(tokenizer.config, lpips is not None)
    num_labels = tokenizer.config.data.num_labels

    def on_device(variables, lpips, raw):
        images = prepare_images(game.config, raw)
        reconstructions, quantized = game.tokenizer.apply(variables, images)
        figures = reconstruction_figures(game, lpips, images, reconstructions)
        if num_labels:
            reconstructions = jnp.argmax(reconstructions, axis=-1)
        return reconstructions, figures, quantized.codes

    compiled = jax.jit(on_device, compiler_options=compile_options())

    def run_batch(raw):
        try:
            results = jax.device_get(compiled(tokenizer.variables, lpips, raw))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            count, height, width = raw.shape[:3]
            raise DataError(
                f"{count} images of {width} x {height} pixels at a time are too much for the "
                "device's memory; set a smaller --batch_size or --resize."
            ) from error
        reconstructions, figures, codes = results
        right = reconstructions if num_labels else to_uint8(reconstructions)
        pairs = np.concatenate([raw, right], axis=2)
        if num_labels:
            return label_colors(num_labels)[pairs], figures, codes
        return np.broadcast_to(pairs, (*pairs.shape[:3], 3)), figures, codes

    return run_batch


# ---- What is written.


def describe(picture: Picture, image: np.ndarray, figures: Mapping, row: int) -> dict:
    """A picture's entry in `metrics.json`, from its row of a batch's figures."""
    height, width = image.shape[:2]
    entry = {"name": picture.name, "input": picture.origin, "height": height, "width": width}
    return entry | {name: float(figures[name][row]) for name in FIGURES if name in figures}


def summarize(entries: Sequence[Mapping], counts: np.ndarray) -> dict:
    """The means of the figures over all pictures, and how they use the codebook."""
    names = [name for name in FIGURES if name in entries[0]]
    return {
        "images": len(entries),
        "means": {name: float(np.mean([entry[name] for entry in entries])) for name in names},
        "codebook_usage": float(usage(counts)),
        "codebook_perplexity": float(perplexity(counts)),
    }


def without_infinity(value):
    """`value` for JSON, which has no infinity: the PSNR of a perfect reconstruction is null."""
    if isinstance(value, dict):
        return {key: without_infinity(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes uint8 `(H, W, 3)`, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def thumbnail(pair: np.ndarray) -> Image.Image:
    """A pair for the overview: made smaller where it is large."""
    image = Image.fromarray(pair)
    image.thumbnail((2 * GRID_SIDE, GRID_SIDE))
    return image


def overview(pairs: Sequence[Image.Image]) -> Image.Image:
    """A grid of pairs, each in the middle of a cell that the largest fits."""
    width = max(pair.width for pair in pairs) + GRID_GAP
    height = max(pair.height for pair in pairs) + GRID_GAP
    columns = min(GRID_COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    grid = Image.new("RGB", (columns * width - GRID_GAP, rows * height - GRID_GAP), "white")
    for i, pair in enumerate(pairs):
        left = i % columns * width + (width - GRID_GAP - pair.width) // 2
        top = i // columns * height + (height - GRID_GAP - pair.height) // 2
        grid.paste(pair, (left, top))
    return grid


# ---- What is printed.


class Progress:
    """A line every so often on how many pictures are done."""

    def __init__(self, total: int):
        self._total = total
        self._start = self._last = time.perf_counter()

    def report(self, done: int) -> None:
        """Prints the line where it is time for one."""
        now = time.perf_counter()
        if now - self._last < PROGRESS_SECONDS:
            return
        self._last = now
        rate = done / (now - self._start)
        left = format_duration((self._total - done) / rate)
        print(f"{done}/{self._total} images  {rate:.1f} images/s  left {left}", flush=True)


def print_table(summary: Mapping) -> None:
    """The figures of each picture where they are few, their means, and the use of the codebook."""
    means = summary["means"]
    entries = summary["pictures"] if summary["images"] <= TABLE_ROWS else []
    mean = f"mean of {summary['images']}"
    width = max(len(name) for name in [mean, *(entry["name"] for entry in entries)])

    def line(name, size, figures):
        cells = "".join(f"  {figure:>{max(8, len(key))}}" for key, figure in figures.items())
        print(f"{name:<{width}}  {size:>11}{cells}")

    line("", "size", {name: name for name in means})
    for entry in entries:
        size = f"{entry['width']} x {entry['height']}"
        line(entry["name"], size, {name: f"{entry[name]:.4f}" for name in means})
    line(mean, "", {name: f"{value:.4f}" for name, value in means.items()})
    if summary["lpips_network"]:
        print(f"LPIPS is that of {summary['lpips_network']}; lower is better.")
    used, effective = summary["codebook_usage"], summary["codebook_perplexity"]
    print(f"{used:.1%} of the codebook is used, with a perplexity of {effective:.1f}.")


# ---- The command.
