"""What is on disk in directories of codes, for people: whether it is whole, and what it holds."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from vqgan_jax.configuration.documents import convert, parse_json, read_bytes
from vqgan_jax.data.code_manifest import ORIGIN, ConditionInfo, find_codes
from vqgan_jax.data.code_verification import is_verified, write_stamp
from vqgan_jax.data.codes import open_codes
from vqgan_jax.errors import DataError
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
            write_stamp(path, codes.manifest)
            count = codes.info.num_shards * len(codes.info.arrays(0))
            print(f"{path}: all {count} files are as they were written.")
    if failures:
        raise DataError("\n".join(failures))


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What `tokenize` notes of the tokenizer that it copied beside its codes."""

    checkpoint: str
    step: int | None = None


def describe_codes(directory: pathlib.Path) -> dict[str, Any]:
    """What a directory of codes, or those below it, hold.

    Returns:
        What `python -m vqgan_jax.describe --json` writes: `kind`, `path`, `tokenizer` (the copy
        beside the codes, and the checkpoint and step that it is of) and of each directory under
        `splits` all facts of its manifest, the number of images by class, and how much of the
        codebook is used.

    Raises:
        DataError: there are no codes, or they are not complete.
    """
    report: dict[str, Any] = {"kind": "codes", "path": str(directory), "splits": {}}
    for path in find_codes(directory) or [directory]:
        codes = open_codes(path)
        counts = np.zeros((), np.int64)
        for first in range(0, len(codes), 4096):
            some = codes.gather(np.arange(first, min(first + 4096, len(codes))))
            some = some.reshape(len(some), -1, codes.depth)
            counts = counts + np.asarray(
                code_counts(some, codes.codebook_size, depth=codes.depth), np.int64
            )
        classes = np.bincount(codes.labels[codes.labels >= 0], minlength=codes.num_classes)
        report["splits"][path.name] = dataclasses.asdict(codes.info) | {
            "path": str(path),
            "classes": dict(zip(codes.class_names or (), classes.tolist(), strict=True)),
            "replaced": codes.num_replaced,
            "shards": codes.info.num_shards,
            "usage": float(usage(counts)),
            "perplexity": float(perplexity(counts)),
            "verified": is_verified(path, codes.manifest),
        }
        for folder in (path, path.parent):
            if (folder / ORIGIN).exists():
                found = parse_json(read_bytes(folder / ORIGIN), str(folder / ORIGIN))
                origin = convert(found, _Origin, str(folder / ORIGIN))
                report["tokenizer"] = {"copy": str(folder / "tokenizer")}
                report["tokenizer"] |= dataclasses.asdict(origin)
    return report


def lines(report: dict[str, Any]) -> list[str]:
    """A report of `describe_codes` as text."""
    found = []
    for split in report["splits"].values():
        depth = split["depth"]
        grid = "x".join(map(str, (*split["grid"], *([depth] if depth > 1 else []))))
        names = split["augmentations"]
        views = ", ".join(names if len(names) <= 4 else (*names[:3], "...", names[-1]))
        found += [
            f"{split['path']}: codes",
            f"  images      {split['count']} at {split['resolution']} pixels, split "
            f"{split['split']} of {split['dataset']}, {len(split['classes']) or 'no'} classes",
            f"  replaced    {split['replaced']} damaged images, each by the next one",
            f"  views       {len(names)} of each: {views}",
            f"  codes       {grid} a view, of a codebook of {split['codebook_size']}, in "
            f"{split['shards']} shards",
            f"  tokenizer   {split['fingerprint']}, computed in {split['dtype']}",
            f"  codebook    {split['usage']:.1%} used by the first view, with a perplexity of "
            f"{split['perplexity']:.1f}",
            *(f"  condition   {summary(condition)}" for condition in split["conditions"]),
            f"  verified    {'yes' if split['verified'] else 'not since it was written'}",
        ]
    if "tokenizer" in report:
        origin = report["tokenizer"]
        step = "" if origin["step"] is None else f", step {origin['step']}"
        found.append(f"  made by     {origin['checkpoint']}{step}; a copy is {origin['copy']}")
    return found


def summary(facts: dict[str, Any]) -> str:
    """A line about the tokens of a condition."""
    condition = convert(facts, ConditionInfo)
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
