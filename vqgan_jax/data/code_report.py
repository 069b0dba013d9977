"""What is on disk in directories of codes, for people: whether it is whole, and what it holds."""

import pathlib

import numpy as np

from vqgan_jax.data.code_manifest import ConditionInfo, find_codes
from vqgan_jax.data.codes import open_codes
from vqgan_jax.data.errors import DataError
from vqgan_jax.metrics.codebook import code_counts, perplexity, usage


def verify(directory: str) -> None:
    """Compares every file in a directory of codes, or those below it, with its manifest.

    Raises:
        DataError: something is not as it was written, or there are no codes.
    """
    failures = []
    for path in find_codes(pathlib.Path(directory)) or [pathlib.Path(directory)]:
        try:
            codes = open_codes(path, verify=True)
        except DataError as error:
            failures.append(str(error))
        else:
            count = codes.info.num_shards * len(codes.info.arrays(0))
            print(f"{path}: all {count} files are as they were written.")
    if failures:
        raise DataError("\n".join(failures))


def print_info(directory: str) -> None:
    """Prints what a directory of codes, or those below it, hold.

    Raises:
        DataError: there are no codes, or they are not complete.
    """
    for path in find_codes(pathlib.Path(directory)) or [pathlib.Path(directory)]:
        codes = open_codes(path)
        info = codes.info
        counts = np.zeros((), np.int64)
        for first in range(0, len(codes), 4096):
            some = codes.gather(np.arange(first, min(first + 4096, len(codes))))
            some = some.reshape(len(some), -1, info.depth)
            counts = counts + np.asarray(
                code_counts(some, info.codebook_size, depth=info.depth), np.int64
            )
        grid = "x".join(map(str, info.grid if info.depth == 1 else (*info.grid, info.depth)))
        names = info.augmentations
        views = ", ".join(names if len(names) <= 4 else (*names[:3], "...", names[-1]))
        print(
            f"{path}",
            f"  images      {info.count} at {info.resolution} pixels, split {info.split} of "
            f"{info.dataset}, {info.num_classes or 'no'} classes",
            f"  replaced    {codes.num_replaced} damaged images, each by the next one",
            f"  views       {len(names)} of each: {views}",
            f"  codes       {grid} a view, of a codebook of {info.codebook_size}, in "
            f"{info.num_shards} shards",
            f"  tokenizer   {info.fingerprint}, computed in {info.dtype}",
            f"  codebook    {float(usage(counts)):.1%} used by the first view, "
            f"with a perplexity of {float(perplexity(counts)):.1f}",
            *(f"  condition   {summary(condition)}" for condition in info.conditions),
            sep="\n",
        )


def summary(condition: ConditionInfo) -> str:
    """A line about the tokens of a condition."""
    size = f"{condition.num_tokens} tokens"
    if condition.grid is not None:
        size = f"{condition.grid[0]}x{condition.grid[1]} tokens"
    line = f"{condition.name}: {size} a view, {condition.vocabulary} different ones"
    if condition.layout:
        layout = condition.layout
        line += (
            f", up to {layout.max_objects} objects of {layout.num_classes} classes, as "
            f"{layout.places}"
        )
    if condition.derive:
        scale = f", {condition.scale} times smaller" if condition.scale else ""
        line += f", derived from the image{scale}"
    if condition.fingerprint:
        line += f", by {condition.fingerprint} in {condition.dtype}"
    return line
