"""Codes on disk: damage of any file is an error of one line, before anything is made of it."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from vqgan_jax.checkpoints.directory_lock import LOCK_FILE, is_empty, locked
from vqgan_jax.data.code_manifest import CodesInfo
from vqgan_jax.data.code_report import describe_codes, lines
from vqgan_jax.data.code_verification import STAMP, Verification, is_verified
from vqgan_jax.data.code_writer import CodeWriter, stored_rules
from vqgan_jax.data.codes import open_codes
from vqgan_jax.errors import DataError

INFO = CodesInfo(
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
    folder_rules=2,
)
ODD = (None, "text", -1, 0, 10**9, 10**30, 0.5, True, [], {}, [[1]], "../x", ["a"] * 1000, 1e308)


def write(directory, codes=None):
    writer = CodeWriter(directory, INFO)
    writer.begin()
    numbers = np.random.default_rng(0)
    for shard in writer.unfinished():
        count = len(INFO.images_of(shard))
        own = numbers.integers(0, 16, (count, 1, 16)) if codes is None else codes
        writer.write(shard, own[:count], np.arange(count) % 2)
    writer.finish()
    return directory


@pytest.fixture
def directory(tmp_path):
    return write(tmp_path / "codes")


def refused(directory, verify=False):
    with pytest.raises(DataError) as error:
        open_codes(directory, verify=verify)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)
    return str(error.value)


def test_odd_values_in_a_manifest(directory):
    """Each value by each odd one: as a newer manifest, whose own SHA-256 tells, and as an older."""
    path = directory / "manifest.json"
    good = json.loads(path.read_text())
    whole = open_codes(directory).rows(np.arange(10))
    for key in good:
        for value in (*ODD, "REMOVED"):
            changed = {k: v for k, v in good.items() if k != key}
            changed |= {} if value == "REMOVED" else {key: value}
            for text in (changed, {k: v for k, v in changed.items() if k != "sha256"}):
                path.write_text(json.dumps(text))
                try:
                    found = open_codes(directory)
                except DataError as error:
                    assert "\n" not in str(error) and len(str(error)) < 500
                else:
                    rows = found.rows(np.arange(10))
                    assert all(np.array_equal(rows[name], whole[name]) for name in whole)
    for record in ({"codes": "../codes.npy"}, {"n": 3}, {"codes_sha256": "0"}, {"replaced": [-1]}):
        shards = [good["shards"][0] | record, *good["shards"][1:]]
        changed = {k: v for k, v in good.items() if k != "sha256"} | {"shards": shards}
        path.write_text(json.dumps(changed))
        assert "is damaged" in refused(directory)


def test_each_changed_byte_of_an_array_is_seen(directory):
    choose = random.Random(0)
    for path in sorted(directory.glob("*.npy"))[:4]:
        content = path.read_bytes()
        for _ in range(60):
            changed = bytearray(content)
            changed[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
            path.write_bytes(changed)
            assert path.name in refused(directory, verify=True)
        for end in (0, 5, 50, len(content) - 1):
            path.write_bytes(content[:end])
            assert path.name in refused(directory)
        path.write_bytes(content)
    open_codes(directory, verify=True)


def test_codes_outside_of_the_codebook_end_training_at_once(tmp_path):
    codes = np.zeros((4, 1, 16), np.int64)
    codes[2, 0, 5] = 16
    found = open_codes(write(tmp_path / "codes", codes))
    with pytest.raises(DataError, match=r"codes-00000-of-00003.npy has the code 16, and there are"):
        found.batch(0, 0, 40)


def test_codes_are_verified_once_and_in_the_background(directory):
    codes = open_codes(directory)
    assert not is_verified(directory, codes.manifest)
    Verification(codes).wait()
    assert is_verified(directory, codes.manifest) and (directory / STAMP).exists()
    path = directory / "codes-00001-of-00003.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not is_verified(directory, codes.manifest)  # by its time
    with pytest.raises(
        DataError, match="so nothing is saved: codes-00001-of-00003.npy has another"
    ):
        Verification(codes).wait()
    Verification(codes, process=0, processes=3).wait()  # shards 0 of 3 are those of another process


def test_a_stamp_that_is_damaged_counts_as_none(directory):
    codes = open_codes(directory)
    for text in ("", "{", "[]", '{"a": 1}', "null"):
        (directory / STAMP).write_text(text)
        assert not is_verified(directory, codes.manifest)


@pytest.mark.parametrize("left", [("plan.json",), ("shard-00000.json", "x.tmp"), ()])
def test_a_pass_that_was_killed_at_its_very_end(directory, left):
    """Between the manifest and the removal of `partial`, or within that."""
    (directory / "partial").mkdir()
    for name in left:
        (directory / "partial" / name).write_text("{}")
    writer = CodeWriter(directory, INFO)
    assert writer.is_complete and stored_rules(directory) == 2
    writer.clean()
    assert not (directory / "partial").exists()
    open_codes(directory, verify=True)


def test_one_job_a_directory(tmp_path):
    with locked(tmp_path / "new" / "codes"):
        assert is_empty(tmp_path / "new" / "codes")
        again = locked(tmp_path / "new" / "codes")
        with pytest.raises(DataError, match="codes is in use by another job .process [0-9]+ on "):
            again.__enter__()
    assert not (tmp_path / "new").exists()  # nothing was written
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / LOCK_FILE).write_text("of a process that was killed")
    with locked(tmp_path / "left"):
        pass
    write(tmp_path / "left")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file" / "codes"):
        pass


HOLDER = """
import sys, time
from vqgan_jax.checkpoints.directory_lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    command = [sys.executable, "-c", HOLDER, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=f"process {holder.pid} on "), locked(tmp_path):
            pass
        holder.kill()
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path):
        pass
    assert is_empty(tmp_path)


def test_what_is_said_of_codes(directory, tmp_path):
    report = describe_codes(directory)
    (split,) = report["splits"].values()
    assert split["classes"] == {"a": 5, "b": 5} and split["count"] == 10 and not split["verified"]
    text = "\n".join(lines(report))
    assert "10 at 32 pixels, split train of folder:x, 2 classes" in text
    origin = directory / "tokenizer_origin.json"
    origin.write_text('{"checkpoint": "runs/x", "step": null}')
    assert "made by     runs/x; a copy" in "\n".join(lines(describe_codes(directory)))
    for damaged in ("[]", "{}", '{"checkpoint": 1}', '{"checkpoint": "x", "step": "a"}', "x"):
        origin.write_text(damaged)
        with pytest.raises(DataError, match="tokenizer_origin.json is damaged"):
            describe_codes(directory)
    origin.unlink()
    shutil.copytree(directory, tmp_path / "two" / "train")
    assert describe_codes(tmp_path / "two")["splits"].keys() == {"train"}
