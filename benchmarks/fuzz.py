"""Damages files of every kind and reads them again: an error of one line, or the undamaged result.

    python benchmarks/fuzz.py [--times=500] [--seed=0] [KIND ...]

Makes a small file of each kind, damages it `--times` times (bytes changed, cut, doubled, exchanged,
numbers and words of texts replaced by odd ones), reads it with the function that the commands use,
and prints a line of figures for each kind:

    refused   an error of one line that names the file
    equal     what the undamaged file gives
    other     another result; for kinds without a checksum (pictures, texts that people write, the
              older format of PyTorch) this is no fault, and the line says so
    FAULTS    a traceback, an error of several lines, more than 10 seconds, or 1 GiB; another result
              where there is a checksum

Ends with exit code 1 where there is a fault.
"""

import argparse
import collections
import io
import json
import logging
import os
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from PIL import Image

from vqgan_jax import configuration
from vqgan_jax.conditions.keypoint_files import read_keypoints
from vqgan_jax.conditions.layout_files import read_objects
from vqgan_jax.configuration import tokenizer_config
from vqgan_jax.data.code_manifest import CodesInfo
from vqgan_jax.data.code_writer import CodeWriter
from vqgan_jax.data.codes import open_codes
from vqgan_jax.data.decoding import decode_image
from vqgan_jax.errors import DataError
from vqgan_jax.inference import load
from vqgan_jax.interop.taming_options import ConversionError
from vqgan_jax.interop.taming_yaml import config_from_yaml
from vqgan_jax.interop.torch_file import read_checkpoint
from vqgan_jax.interop.torch_pickle import CheckpointFileError
from vqgan_jax.interop.torch_writer import write_checkpoint
from vqgan_jax.training.checkpoints import CheckpointError, write_export
from vqgan_jax.training.game import make_vqgan

ERRORS = (
    DataError,
    CheckpointError,
    CheckpointFileError,
    ConversionError,
    configuration.ConfigError,
)
SECONDS, BYTES = 10.0, 2**30
ODD = (
    *("null", "true", "-1", "0", "1e400", "NaN", "1e9", "1000000000", "9" * 5000, '"text"', "[]"),
    *("{}", "[1, 2]", "0.5", "-0.0", '""', '"../../etc/passwd"', "[" * 5000, '{"a": {}}', "1e-400"),
)


def damaged(content: bytes, choose: random.Random) -> bytes:
    """The content with one damage."""
    place = choose.randrange(len(content) + 1)
    kind = choose.randrange(8)
    changed = bytearray(content)
    if kind <= 2 and content:  # some bits
        for _ in range(choose.choice((1, 1, 1, 4, 32))):
            changed[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    elif kind == 3:  # cut
        del changed[place:]
    elif kind == 4:  # a hole, as of a disk's page
        end = min(place + choose.choice((1, 16, 512)), len(content))
        changed[place:end] = bytes(end - place)
    elif kind == 5:  # doubled
        changed[place:place] = content[place : place + choose.choice((1, 8, 200))]
    elif kind == 6:  # something else
        changed[place : place + 40] = choose.randbytes(40)
    else:  # in texts, an odd value for a number or a word
        words = content.split(b" ")
        words[choose.randrange(len(words))] = choose.choice(ODD).encode()
        changed = bytearray(b" ".join(words))
    return bytes(changed)


class Kind:
    """A file, what reads it, and whether damage of it can be known from a checksum.

    Attributes:
        files: that are damaged, one at a time.
        read: gives what can be compared.
        checked: whether any other result is a fault.
    """

    def __init__(self, files: list[pathlib.Path], read: Callable, checked: bool) -> None:
        self.files, self.read, self.checked = files, read, checked


def kinds(root: pathlib.Path) -> Iterator[tuple[str, Kind]]:
    """All kinds, their files written below `root`."""
    numbers = np.random.default_rng(0)
    picture = Image.fromarray(numbers.integers(0, 256, (24, 32, 3), np.uint8))
    for suffix, options in {
        "png": {},
        "jpg": {},
        "webp": {},
        "gif": {},
        "bmp": {},
        "tif": {"compression": "tiff_deflate"},
        "avif": {},
        "jp2": {},
        "ppm": {},
        "tga": {},
    }.items():
        path = root / f"picture.{suffix}"
        picture.save(path, **options)
        yield suffix, Kind([path], lambda path=path: decode_image(path), False)

    info = CodesInfo(
        dataset="folder:x",
        split="train",
        image_key="image",
        count=10,
        class_names=("a", "b"),
        resolution=32,
        resize=32,
        augmentations=("center",),
        grid=(4, 4),
        codebook_size=16,
        fingerprint="f",
        dtype="float32",
        images_per_shard=4,
    )
    writer = CodeWriter(root / "codes", info)
    writer.begin()
    for shard in range(info.num_shards):
        count = len(info.images_of(shard))
        codes = numbers.integers(0, 16, (count, 1, 16))
        writer.write(shard, codes, numbers.integers(0, 2, count))
    writer.finish()
    manifest = root / "codes" / "manifest.json"

    def read_codes() -> dict:
        found = open_codes(root / "codes", verify=True)
        return found.rows(np.arange(10)) | {"info": str(found.info)}

    yield "codes manifest", Kind([manifest], read_codes, True)
    yield "codes .npy", Kind(sorted((root / "codes").glob("*.npy")), read_codes, True)

    config = tokenizer_config()
    config.model.update(resolution=16, channels=8, num_groups=4, channel_multipliers=(1, 1))
    config.model.update(num_res_blocks=0, attention_resolutions=(), latent_channels=8)
    config.model.quantizer.update(codebook_size=16, code_dim=8)
    images = np.zeros((1, 16, 16, 3), np.float32)
    variables = jax.jit(make_vqgan(config.model).init)(jax.random.key(0), images)
    export = root / "export"
    write_export(export, config, variables)

    def read_export() -> dict:
        tokenizer = load(export)
        return {"fingerprint": tokenizer.fingerprint, "config": configuration.to_json(config)}

    weights = [path for path in export.rglob("*") if path.is_file()]
    yield "export", Kind(weights, read_export, True)
    older = root / "older"
    shutil.copytree(export, older)
    (older / "checksums.json").unlink()

    def read_older() -> str:
        return load(older).fingerprint

    yield "older export's config", Kind([older / "config.json"], read_older, False)

    tensors = {f"encoder.{i}.weight": numbers.standard_normal((4, 3)) for i in range(20)}
    archive = root / "weights.ckpt"
    write_checkpoint(archive, {"state_dict": tensors, "epoch": 3})
    yield "PyTorch zip", Kind([archive], lambda: read_checkpoint(archive)["state_dict"], True)
    goldens = pathlib.Path(__file__).parents[1] / "tests" / "goldens"
    legacy = root / "legacy.pt"
    shutil.copy(goldens / "torch_legacy.pt", legacy)
    yield "PyTorch legacy", Kind([legacy], lambda: str(read_checkpoint(legacy)), False)
    description = root / "model.yaml"
    shutil.copy(goldens / "taming_vqgan.yaml", description)
    yield (
        "yaml",
        Kind([description], lambda: configuration.to_json(config_from_yaml(description)), False),
    )

    layout = root / "layout.json"
    objects = [{"class": i % 3, "box": [0.1 * i, 0.1, 0.2, 0.3]} for i in range(5)]
    layout.write_text(json.dumps({"objects": objects}))
    yield "layout", Kind([layout], lambda: str(read_objects(layout, ("a", "b", "c"))), False)
    keypoints = root / "keypoints.json"
    people = [{"pose_keypoints_2d": [float(i) for i in range(54)]}]
    keypoints.write_text(json.dumps({"people": people}))
    yield "keypoints", Kind([keypoints], lambda: read_keypoints(keypoints), False)


def same(one, other) -> bool:
    """Whether two results are equal."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(
            one, other, equal_nan=one.dtype.kind == "f"
        )
    return one == other


def attempt(kind: Kind, good) -> tuple[str, str]:
    """What reading a damaged file comes to, and what is to be said of it."""
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = kind.read()
        outcome, detail = ("equal", "") if same(found, good) else ("other", "another result")
        if outcome == "other" and kind.checked:
            outcome = "FAULTS"
    except ERRORS as error:
        line = str(error)
        outcome, detail = ("refused", "") if line and "\n" not in line else ("FAULTS", repr(line))
    except BaseException as error:
        outcome, detail = "FAULTS", f"{type(error).__name__}: {error}"
    if time.monotonic() - began > SECONDS:
        return "FAULTS", f"{time.monotonic() - began:.0f} seconds"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    return ("FAULTS", f"{grown / 2**20:.0f} MiB") if grown > BYTES else (outcome, detail)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=500, help="damages of each kind (500)")
    parser.add_argument("--seed", type=int, default=0, help="of the damages (0)")
    parser.add_argument("kinds", nargs="*", help="only these")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    hooks = io.StringIO()
    sys.unraisablehook = lambda unraisable: hooks.write(str(unraisable))
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        for name, kind in kinds(pathlib.Path(directory)):
            if arguments.kinds and name not in arguments.kinds:
                continue
            choose, counts = random.Random(arguments.seed), collections.Counter()
            good, faults, began = kind.read(), collections.Counter(), time.monotonic()
            for _ in range(arguments.times):
                path = choose.choice(kind.files)
                content = path.read_bytes()
                path.write_bytes(damaged(content, choose))
                outcome, detail = attempt(kind, good)
                path.write_bytes(content)
                counts[outcome] += 1
                if outcome == "FAULTS":
                    faults[f"{path.name}: {detail[:150]}"] += 1
            failed |= counts["FAULTS"] > 0
            figures = "  ".join(
                f"{what} {counts[what]:4}" for what in ("refused", "equal", "other", "FAULTS")
            )
            seconds = time.monotonic() - began
            without = "" if kind.checked else "  (no checksum)"
            print(f"{name:22} {figures}  {seconds:5.1f} s{without}", flush=True)
            for fault, count in faults.most_common(5):
                print(f"    {count} x {fault}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
