"""A data set encoded by a tokenizer, its codes stored shard by shard.

Several processes, joined as in training, share the work; the output must be a directory that all of
them see. Files do not depend on how many processes and devices made them. A pass that is stopped is
resumed from the shards that it has written.
"""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vqgan_jax import distributed
from vqgan_jax.checkpoints.directory_lock import locked
from vqgan_jax.configuration import dataset_name
from vqgan_jax.configuration.memory import require_memory
from vqgan_jax.data.augmentations import AllViews, list_views
from vqgan_jax.data.code_manifest import ORIGIN, CodesInfo
from vqgan_jax.data.code_writer import CodeWriter, ShardImages, stored_rules
from vqgan_jax.data.elements import ReadTransformed
from vqgan_jax.data.pipeline import DamageCount, Prefetched, open_reader, read_batches
from vqgan_jax.data.splits import RULES, expand_user, opening_line
from vqgan_jax.data.transforms import evaluation_transform
from vqgan_jax.errors import DataError
from vqgan_jax.inference import Tokenizer, load_tokenizer
from vqgan_jax.stored_conditions import ConditionTokens, open_condition
from vqgan_jax.training.checkpoints import TOKENIZER, checkpoint_step
from vqgan_jax.training.encoding import (
    HostEncoder,
    check_channels,
    describe_condition,
    encode_batches,
)
from vqgan_jax.training.phases import DATA
from vqgan_jax.training.progress import Progress
from vqgan_jax.training.run_tokenizers import keep_tokenizers
from vqgan_jax.training.stopping import Preempted, StopSignal

PROGRESS_SECONDS = 10.0
POLL_SECONDS = 0.5


def tokenize(
    checkpoint: str,
    output: str | pathlib.Path,
    dataset: str = "",
    splits: Sequence[str] = ("train", "validation"),
    augmentations: Sequence[str] = (),
    resolution: int | None = None,
    resize: int | None = None,
    image_key: str = "",
    data_dir: str = "",
    batch_size: int = 32,
    images_per_shard: int = 4096,
    conditions: Sequence[str] = (),
) -> None:
    """Writes the codes of each split into a directory of its name below `output`.

    Args:
        checkpoint: the tokenizer's run, checkpoint or export.
        output: a directory; what is in it of the same pass is kept and gone on with.
        dataset: name as `data.sources.open_source` takes it; empty = the tokenizer's own.
        splits: of the data set.
        augmentations: of `data.augmentations.AUGMENTATIONS`.
        resolution: side of the images in pixels; None = that of the tokenizer's training.
        resize: shorter side before the crop, as `config.data.resize`; None = as in training.
        image_key: the feature that holds the images; empty = the tokenizer's own, or "image".
        data_dir: where data sets are; empty = as in training.
        batch_size: images that go through a device together.
        images_per_shard: of all shards but the last.
        conditions: whose tokens are written too, each as in the flag: "NAME=TOKENIZER",
            "low_resolution:SCALE=TOKENIZER", "coordinates=INTERVALS" or "layout=CONFIG".

    Raises:
        CheckpointError: of `load_tokenizer`.
        DataError: there is no such data set, split or feature, a tokenizer is not for it, or the
            output holds other codes. Nothing is written then.
        Preempted: asked to stop by SIGTERM or SIGINT.
    """
    output = pathlib.Path(expand_user(output))
    tokenizer = load_tokenizer(checkpoint)
    set_data(tokenizer.config.data, dataset, image_key, data_dir, resize, resolution)
    resolution = resolution or tokenizer.config.model.resolution
    if resolution % tokenizer.factor:
        raise DataError(
            f"--resolution={resolution} is not divisible by the tokenizer's factor "
            f"{tokenizer.factor}."
        )
    check_channels("tokenizer", tokenizer)
    num_views = len(list_views(augmentations))
    require_memory(
        batch_size * num_views * resolution**2 * 3,
        f"A batch of {batch_size} images at {resolution} pixels in {num_views} views",
        "take a smaller --batch_size",
    )
    data = tokenizer.config.data
    sources = [
        open_condition(text, tokenizer.factor, data, splits[0], resolution) for text in conditions
    ]
    views = AllViews(evaluation_transform(tokenizer.config, resolution), list_views(augmentations))
    if line := opening_line(data.name, data.folder_rules):
        say(line)
    passes = []
    for split in dict.fromkeys(splits):
        data.folder_rules = stored_rules(output / split) or data.folder_rules
        read = open_reader(tokenizer.config.data, split, views, [s.condition for s in sources])
        info = describe(tokenizer, sources, read, split, images_per_shard)
        writer = CodeWriter(output / split, info)
        if writer.is_complete:
            say(f"{writer.directory} is complete.")
            if jax.process_index() == 0:
                writer.clean()
        else:
            passes.append((read, writer))

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        if jax.process_index() == 0:
            for _, writer in passes:
                stack.enter_context(locked(writer.directory))
            keep_copies(tokenizer, sources, checkpoint, output)
        begin([writer for _, writer in passes])
        encoders = {"image": HostEncoder(tokenizer, batch_size)}
        for source in sources:
            if source.tokenizer is not None:
                encoders[source.condition.name] = HostEncoder(source.tokenizer, batch_size)
        for read, writer in passes:
            encode_split(encoders, read, writer, stop)
            finish(writer, stop)
            say(f"Wrote {writer.directory}: {writer.info.count} images.")


def keep_copies(
    tokenizer: Tokenizer, sources: Sequence[ConditionTokens], checkpoint: str, output: pathlib.Path
) -> None:
    """Writes the tokenizers beside their codes, so that these can be decoded whatever becomes of
    the run, and which run and step they are of.

    Raises:
        DataError: there are codes of another tokenizer.
    """
    if (output / TOKENIZER).exists():
        kept = load_tokenizer(output / TOKENIZER)
        if kept.fingerprint != tokenizer.fingerprint:
            raise DataError(f"{output} has codes of another tokenizer; choose another --output.")
    else:
        output.mkdir(parents=True, exist_ok=True)
        origin = {"checkpoint": str(pathlib.Path(checkpoint).absolute())}
        origin["step"] = checkpoint_step(checkpoint)
        (output / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")
    of_conditions = {
        source.condition.name: source.tokenizer
        for source in sources
        if source.tokenizer is not None
    }
    keep_tokenizers(tokenizer, of_conditions, output)


def say(line: str) -> None:
    """Prints a line in process 0."""
    if jax.process_index() == 0:
        print(line, flush=True)


# ---- What is to be encoded.


def set_data(
    data: ConfigDict,
    dataset: str,
    image_key: str,
    data_dir: str,
    resize: int | None,
    resolution: int | None,
) -> None:
    """Changes a tokenizer's `config.data` to what is to be encoded; see `tokenize`."""
    dataset = dataset_name(dataset)
    if dataset and dataset != data.name:
        data.name, data.image_key, data.folder_rules = dataset, "image", RULES
    data.image_key = image_key or data.image_key
    data.data_dir = data_dir or data.data_dir
    if resize is not None:
        data.resize = resize
    elif resolution is not None and data.resize > 0:
        data.resize = 0  # it belonged to another resolution


def describe(
    tokenizer: Tokenizer,
    sources: Sequence[ConditionTokens],
    read: ReadTransformed,
    split: str,
    images_per_shard: int,
) -> CodesInfo:
    """All that determines the codes of a split."""
    views, data = read.transform, tokenizer.config.data
    side = views.resolution // tokenizer.factor
    return CodesInfo(
        dataset=data.name,
        split=split,
        image_key=data.image_key,
        count=len(read.source),
        class_names=read.source.class_names,
        resolution=views.resolution,
        resize=views.transform.resize,
        augmentations=tuple(view.name for view in views.views),
        grid=(side, side),
        codebook_size=tokenizer.codebook_size,
        depth=tokenizer.depth,
        fingerprint=tokenizer.fingerprint,
        dtype=jnp.dtype(tokenizer.module.dtype).name,
        images_per_shard=images_per_shard,
        folder_rules=data.folder_rules,
        conditions=tuple(
            describe_condition(source.condition, views.resolution, source.tokenizer)
            for source in sources
        ),
    )


# ---- The encoding.


def encode_split(
    encoders: Mapping[str, HostEncoder],
    read: ReadTransformed,
    writer: CodeWriter,
    stop: StopSignal,
) -> None:
    """Writes the shards of a split that this process is to write and that are not there yet.

    `encoders` are by the names that the images have in the examples of `read`.

    Raises:
        Preempted: asked to stop; finished shards are kept.
    """
    ours = range(jax.process_index(), writer.info.num_shards, jax.process_count())
    shards = sorted(set(writer.unfinished()).intersection(ours))
    sizes = [len(writer.info.images_of(shard)) for shard in shards]
    if len(shards) < len(ours):
        say(f"{writer.directory} goes on: {len(ours) - len(shards)} of {len(ours)} shards exist.")
    if not shards:
        return
    encoder = encoders["image"]
    images = ShardImages(read, [writer.info.images_of(i) for i in shards], encoder.batch_size)
    damage = DamageCount(read.source)

    def put(batch: dict) -> dict:
        damage.note(batch["index"], batch["skipped"])
        return batch | {key: own.put(batch[key]) for key, own in encoders.items()}

    elements = read_batches(grain.MapDataset.source(images), encoder.batch_size, encoder.data)
    total = len(images) // encoder.batch_size
    progress = Progress(total, encoder.batch_size * jax.process_count())
    step, last_report = 0, time.monotonic()
    with (
        contextlib.closing(Prefetched(elements.map(put), encoder.data.prefetch)) as batches,
        ThreadPoolExecutor(1) as disk,
    ):
        results, writing = encode_batches(encoders, timed(batches, progress)), None
        for shard, size in zip(shards, sizes, strict=True):
            parts = []
            for _ in range(math.ceil(size / encoder.batch_size)):
                parts.append(next(results))
                step += 1
                if step == 1:  # compiled for
                    progress.begin(step)
                if step == total or time.monotonic() - last_report > PROGRESS_SECONDS:
                    progress.report(step, {"shard": shard})
                    last_report = time.monotonic()
                if stop.received:
                    raise stopped(writer)
            shard_of = {
                key: np.concatenate([part[key] for part in parts])[:size] for key in parts[0]
            }
            if writing:
                writing.result()
            writing = disk.submit(
                writer.write,
                shard,
                shard_of["image"],
                shard_of["label"],
                shard_of["index"][shard_of["skipped"] > 0],
                {condition.name: shard_of[condition.name] for condition in read.conditions},
            )
        if writing:
            writing.result()


def timed(batches: Iterator[dict], progress: Progress) -> Iterator[dict]:
    """The batches, where their time counts as waiting for data."""
    while True:
        with progress.clock.phase(DATA):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


# ---- What the processes agree on.


def begin(writers: Sequence[CodeWriter]) -> None:
    """Makes the directories ready once all processes have looked at them.

    Raises:
        DataError: not all processes see the same directories.
    """
    distributed.barrier("tokenize: compared")
    if jax.process_index() == 0:
        for writer in writers:
            writer.begin()
    distributed.barrier("tokenize: begun")
    for writer in writers:
        if not writer.has_begun:
            raise DataError(
                f"{writer.directory} is not what the first process sees; --output must be a "
                "directory that all processes share."
            )


def finish(writer: CodeWriter, stop: StopSignal) -> None:
    """Writes the manifest in process 0 when all shards are there, and returns when it is there.

    Processes look for each other's files here: hosts may be done hours apart, for which a
    collective operation would not wait.
    """
    first = jax.process_index() == 0
    while writer.unfinished() if first else not writer.has_manifest:
        if stop.received:
            raise stopped(writer)
        time.sleep(POLL_SECONDS)
    if first:
        writer.finish()


def stopped(writer: CodeWriter) -> Preempted:
    """What to raise when the process was asked to stop."""
    return Preempted(f"Stopped in {writer.directory}; the same command goes on from there.")


# ---- The command.
