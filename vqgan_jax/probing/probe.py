"""Recognition: how well a linear classifier tells classes from what a model has learned.

Of a transformer, features are what a block gives, averaged over the codes, of an image of which no
condition is known; block 0 is what the first one sees. Of a tokenizer, and beside a transformer's,
they are the encoder's output and the latents in front of the codes; and for comparison an image's
pixels, averaged to 16x16. A linear classifier of each is fitted to the training split and evaluated
on the other one.

The output has `probe.json`; `probe.png`, accuracy over depth; and in `classifier/` the best one,
for `vqgan_jax.probing.classifiers.load_classifier`. Fine-tuning trains the transformer up to a
block further with its classifier, and leaves it in `finetuned/`.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from vqgan_jax.checkpoints.directory_lock import is_empty
from vqgan_jax.configuration import dataset_name
from vqgan_jax.errors import DataError

RESULTS, CHART, CLASSIFIER, FINETUNED = "probe.json", "probe.png", "classifier", "finetuned"
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Data:
    """The labelled images.

    Attributes:
        dataset: its name; empty for the model's own.
        train_split: that classifiers are fitted to.
        validation_split: that they are judged on.
        images: at most so many of each split, evenly spaced; 0 for all.
        batch_size: images at once.
        data_dir: where data sets are; empty as in `packages.default_data_dir`.
    """

    dataset: str = ""
    train_split: str = "train"
    validation_split: str = "validation"
    images: int = 0
    batch_size: int = 64
    data_dir: str = ""


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """See `finetuning.Schedule`; a number of epochs instead of steps."""

    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01


def probe(
    checkpoint: str,
    output: str | pathlib.Path,
    block: str = ALL,
    data: Data | None = None,
    memory: float = 4.0,
    finetuning: Finetuning | None = None,
) -> dict:
    """Fits classifiers to a model's features and writes how good they are.

    Args:
        checkpoint: a run directory, checkpoint or export.
        output: a directory that is new or empty.
        block: of a transformer, by number; or "all" of its blocks and other features.
        data: the labelled images; None for the model's own.
        memory: GiB that features may take; where they are more, they are made in several passes.
        finetuning: how to train the transformer up to `block`; None not to.

    Returns:
        What `probe.json` holds.

    Raises:
        CheckpointError: of `vqgan_jax.load`.
        DataError: the output is in use, there is no such block, or the data has no classes.
    """
    from vqgan_jax.generation import Generator
    from vqgan_jax.inference import load
    from vqgan_jax.probing.chart import depth_chart
    from vqgan_jax.probing.classifiers import write_classifier
    from vqgan_jax.probing.features import FeatureModel, block_name
    from vqgan_jax.probing.finetuning import Schedule, finetune, finetuned_accuracy

    output, data = pathlib.Path(output), data or Data()
    if output.exists() and not (output.is_dir() and is_empty(output)):
        raise DataError(f"{output} exists and is not empty; choose another --output.")
    loaded = load(checkpoint)
    model = FeatureModel(loaded)
    names = chosen_names(checkpoint, model, block)
    if finetuning is not None and (not model.num_blocks or block in (ALL, "0")):
        raise DataError(
            "--finetune needs a transformer and the --block behind which it ends, from 1 on."
        )
    if finetuning is not None and data.images:
        raise DataError("--finetune trains on the whole split; leave out --images.")
    class_names = open_data(model.config, data)

    if isinstance(loaded, Generator) and loaded.config.condition.kinds:
        kinds = ", ".join(loaded.config.condition.kinds)
        note = "" if loaded.config.condition.dropout else ", which it never was in training"
        print(f"The transformer sees no {kinds}{note}.")
    rows, best = fit_all(model, names, data, len(class_names), memory)
    results = {
        "checkpoint": str(checkpoint),
        "dataset": model.config.data.name,
        "train_split": data.train_split,
        "validation_split": data.validation_split,
        "class_names": list(class_names),
        **rows,
    }
    print_table(results)
    output.mkdir(parents=True, exist_ok=True)
    write_classifier(output / CLASSIFIER, checkpoint, loaded, *best, class_names)
    of_blocks = {block_name(i): i for i in range(model.num_blocks + 1)}
    found = {row["features"]: row["accuracy"] for row in results["features"]}
    if of_blocks.keys() & found.keys():
        levels = {name: value for name, value in found.items() if name not in of_blocks}
        levels["commonest class"] = results["commonest_class"]
        depth = [(of_blocks[name], value) for name, value in found.items() if name in of_blocks]
        title = f"Linear classification of {model.config.data.name}, {len(class_names)} classes"
        depth_chart(title, depth, levels).save(output / CHART)
    write_results(output, results)
    if finetuning is not None:
        steps = max(1, round(finetuning.epochs * results["train_images"] / finetuning.batch_size))
        schedule = Schedule(
            steps, finetuning.batch_size, finetuning.learning_rate, finetuning.weight_decay
        )
        number, linear = int(block), best[1]
        params, linear = finetune(model, number, linear, data.train_split, schedule)
        results["finetuned"] = {"block": number} | dataclasses.asdict(schedule)
        results["finetuned"]["accuracy"] = finetuned_accuracy(
            model, number, params, linear, data.validation_split, data.batch_size, data.images
        )
        print(f"Fine-tuned up to block {number}: {results['finetuned']['accuracy']:.1%}.")
        write_classifier(
            output / FINETUNED, checkpoint, loaded, best[0], linear, class_names, params
        )
        write_results(output, results)
    print(f"Wrote {output}.")
    return results


def write_results(output: pathlib.Path, results: dict) -> None:
    """`probe.json`, as far as it is known."""
    (output / RESULTS).write_text(json.dumps(results, indent=2) + "\n")


def chosen_names(checkpoint: str, model, block: str) -> Sequence[str]:
    """The features that `--block` says, by name.

    Raises:
        DataError: there are none of that name.
    """
    from vqgan_jax.probing.features import block_name

    if block == ALL:
        return model.names
    if not model.num_blocks:
        raise DataError(
            f"--block={block}: {checkpoint} is a tokenizer, which has the features "
            f"{', '.join(model.names)}; take --block={ALL}."
        )
    if not block.isdecimal() or int(block) > model.num_blocks:
        raise DataError(
            f"--block is {block}; {checkpoint} has the blocks 1 to {model.num_blocks}, 0 for what "
            f"the first one sees, or {ALL}."
        )
    return (block_name(int(block)),)


def open_data(config, data: Data) -> Sequence[str]:
    """The classes of a data set, which `config` then is for.

    Raises:
        DataError: there is no such data, or its images have no classes or one alone.
    """
    from vqgan_jax.data.sources import open_configured

    if data.images < 0 or data.batch_size < 1:
        raise DataError("--images must not be negative, and --batch_size must be at least 1.")
    config.data.name = dataset_name(data.dataset) or config.data.name
    config.data.data_dir = data.data_dir or config.data.data_dir
    names = []
    for split in (data.train_split, data.validation_split):
        names.append(open_configured(config.data, split, config.model.resolution).class_names or ())
    if not names[0]:
        raise DataError(f"The images of {config.data.name} have no classes to tell apart.")
    if len(names[0]) < 2:
        raise DataError(
            f"{config.data.name} has one class, {names[0][0]}; there is nothing to tell apart."
        )
    if tuple(names[0]) != tuple(names[1]):
        raise DataError(
            f"The splits {data.train_split} and {data.validation_split} of {config.data.name} have "
            "different classes."
        )
    return names[0]


def fit_all(model, names: Sequence[str], data: Data, num_classes: int, memory: float):
    """Classifiers of some features.

    Returns:
        For `probe.json`: images, the share of the commonest class, and a row for each of the
        features; and the name and the classifier of the best.

    Raises:
        DataError: there are too few labelled images, or of one class alone.
    """
    import jax

    from vqgan_jax.probing.features import extract, widths
    from vqgan_jax.probing.linear import HOLD_OUT, Linear, fit_classifiers

    rows, best = [], None
    sizes = widths(model, names)
    passes = grouped(sizes, memory * 2**30 / (4 * num_images(model.config, data)))
    for number, group in enumerate(passes):
        function = functools.partial(model.features, group)
        splits = [
            extract(function, model.variables, model.config, split, data.batch_size, data.images)
            for split in (data.train_split, data.validation_split)
        ]
        (train, labels), (held_out, held_out_labels) = splits
        if len(np.unique(labels)) < 2 or len(labels) < HOLD_OUT or not len(held_out_labels):
            raise DataError(
                f"{model.config.data.name} has {len(labels)} labelled images in the split "
                f"{data.train_split}, of {len(np.unique(labels))} classes, and "
                f"{len(held_out_labels)} in {data.validation_split}: too few to tell classes apart."
            )
        for width in sorted({sizes[name] for name in group}):
            alike = [name for name in group if sizes[name] == width]
            together = np.stack([train.pop(name) for name in alike])
            fitted = jax.device_get(fit_classifiers(together, labels, num_classes))
            for i, name in enumerate(alike):
                linear = Linear(fitted.linear.kernel[i], fitted.linear.bias[i])
                right = np.mean(np.argmax(linear(held_out[name]), axis=-1) == held_out_labels)
                row = {
                    "features": name,
                    "width": width,
                    "decay": float(fitted.decay[i]),
                    "train_accuracy": float(fitted.accuracy[i]),
                    "accuracy": float(right),
                }
                rows.append(row)
                if best is None or row["accuracy"] > best[0]:
                    best = row["accuracy"], name, linear
        if len(passes) > 1:
            print(f"{number + 1} of {len(passes)} passes over the images.", flush=True)
    commonest = np.bincount(labels).argmax()
    results = {
        "train_images": len(labels),
        "validation_images": len(held_out_labels),
        "commonest_class": float(np.mean(held_out_labels == commonest)),
        "features": sorted(rows, key=lambda row: names.index(row["features"])),
    }
    return results, best[1:]


def num_images(config, data: Data) -> int:
    """Images of both splits together, at most."""
    from vqgan_jax.data.sources import open_configured

    def count(split):
        length = len(open_configured(config.data, split, config.model.resolution))
        return min(length, data.images or length)

    return count(data.train_split) + count(data.validation_split)


def grouped(sizes: dict[str, int], values: float) -> list[tuple[str, ...]]:
    """Features in turn, as many together as have no more than so many values an image."""
    groups = []
    for name, size in sizes.items():
        if groups and sum(sizes[other] for other in groups[-1]) + size <= values:
            groups[-1].append(name)
        else:
            groups.append([name])
    return [tuple(group) for group in groups]


def print_table(results: dict) -> None:
    """The accuracies, for people."""
    print(f"\n{'features':<12}{'width':>7}{'decay':>9}{'training':>10}{'held out':>10}")
    for row in results["features"]:
        print(
            f"{row['features']:<12}{row['width']:>7}{row['decay']:>9.0e}"
            f"{row['train_accuracy']:>10.1%}{row['accuracy']:>10.1%}"
        )
    print(f"{'commonest class':<38}{results['commonest_class']:>10.1%}")
    print(
        f"{len(results['class_names'])} classes of {results['dataset']}; {results['train_images']} "
        f"images to fit, {results['validation_images']} held out.\n"
    )
