"""PyTorch's file formats, against files that PyTorch 2.13 wrote and against hostile pickles."""

import io
import os
import pathlib
import pickle
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from vqgan_jax.interop.torch_file import read_checkpoint
from vqgan_jax.interop.torch_pickle import CheckpointFileError, Unknown
from vqgan_jax.interop.torch_writer import write_checkpoint

GOLDENS = pathlib.Path(__file__).parent / "goldens"
BASE = np.arange(12, dtype=np.float32).reshape(3, 4)
EXPECTED = {  # what was saved, by the same rule
    "base": BASE,
    "transposed": BASE.T,
    "corner": BASE[1:, 2:],
    "expanded": np.full((4, 2), 3.0, np.float32),
    "float64": np.array([0.1]),
    "float16": np.array([0.5, -2.0], np.float16),
    "bfloat16": np.array([[1.5, -3.0]], ml_dtypes.bfloat16),
    "int64": np.array([2**40, -1]),
    "uint8": np.array([0, 255], np.uint8),
    "bool": np.array([True, False]),
    "complex64": np.array([1 + 2j], np.complex64),
    "scalar": np.array(7),
    "empty": np.empty((0, 4), np.float32),
    "parameter": np.full(2, 2.5, np.float32),
}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, name)


@pytest.mark.parametrize("name", ["torch_zip.pt", "torch_legacy.pt"])
def test_reads_what_pytorch_wrote(name):
    checkpoint = read_checkpoint(GOLDENS / name)
    assert_same(checkpoint["state_dict"], EXPECTED)
    assert checkpoint["global_step"] == 1234
    assert checkpoint["size"] == (1, 2)
    assert checkpoint["dtype"] == "float16"
    assert checkpoint["device"] == "cuda:1"
    assert checkpoint["nested"] == [(1, None, "text", 0.5, True)]
    assert isinstance(checkpoint["linear"], Unknown)
    assert "torch" not in sys.modules


def test_a_pickled_class_as_a_dictionary_key_does_not_hinder():
    checkpoint = read_checkpoint(GOLDENS / "taming_vqgan.ckpt")
    assert checkpoint["global_step"] == 1234
    ((key, value),) = checkpoint["callbacks"].items()
    assert issubclass(key, Unknown) and value["best_model_score"] == 1.0
    assert checkpoint["state_dict"]["encoder.conv_in.weight"].shape == (32, 3, 3, 3)
    assert "pytorch_lightning" not in sys.modules


def test_a_recompressed_archive_and_one_of_the_other_byte_order_read_the_same(tmp_path):
    deflated, swapped = tmp_path / "deflated.pt", tmp_path / "big.pt"
    with (
        zipfile.ZipFile(GOLDENS / "torch_zip.pt") as source,
        zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as small,
        zipfile.ZipFile(swapped, "w") as big,
    ):
        types = _storage_types(source.read("torch_zip/data.pkl"))
        for name in source.namelist():
            values = source.read(name)
            small.writestr(name, values)
            if name.endswith("/byteorder"):
                values = b"big"
            elif "/data/" in name:
                width = types[name.rpartition("/")[2]]
                values = np.frombuffer(values, f"u{width}").byteswap().tobytes()
            big.writestr(name, values)
    assert_same(read_checkpoint(deflated)["state_dict"], EXPECTED)
    assert_same(read_checkpoint(swapped)["state_dict"], EXPECTED)


def _storage_types(program):
    """Bytes an element (of a complex number: a part) of each storage that a pickle mentions."""
    widths = {}

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            for part, width in (
                *(("DoubleStorage", 8), ("LongStorage", 8), ("ComplexFloat", 4)),
                *(("BFloat16", 2), ("Half", 2), ("FloatStorage", 4)),
            ):
                if name.startswith(part):
                    return type(name, (), {"width": width})
            return Unknown

        def persistent_load(self, pid):
            widths[pid[2]] = getattr(pid[1], "width", 1)
            return Unknown()

    Reader(io.BytesIO(program)).load()
    return widths


def test_arrays_are_read_only_views_of_the_file(tmp_path):
    path = tmp_path / "big.ckpt"
    write_checkpoint(path, {"state_dict": {"a": np.ones((64, 64), np.float32)}})
    array = read_checkpoint(path)["state_dict"]["a"]
    assert not array.flags.owndata and not array.flags.writeable
    assert array.ctypes.data % 64 == 0  # records begin where PyTorch puts them
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 2


def test_written_files_read_back(tmp_path):
    checkpoint = {
        "state_dict": {**EXPECTED, "big_endian": np.arange(3, dtype=">f4")},
        "global_step": 2**40,
        "negative": -129,
        "nested": {"list": [1, "zwölf", None, (True, False, 0.25)], "none": {}, "empty": []},
    }
    del checkpoint["state_dict"]["complex64"]
    path = tmp_path / "new" / "written.ckpt"
    write_checkpoint(path, checkpoint)
    found = read_checkpoint(path)
    expected = checkpoint.pop("state_dict")
    expected["big_endian"] = np.arange(3, dtype=np.float32)
    assert_same(found.pop("state_dict"), expected)
    assert found == checkpoint
    assert [entry.name for entry in path.parent.iterdir()] == ["written.ckpt"]


def test_writing_overwrites_nothing_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "there.ckpt"
    path.write_bytes(b"precious")
    with pytest.raises(CheckpointFileError, match="exists already"):
        write_checkpoint(path, {})
    with pytest.raises(CheckpointFileError, match=r"^state_dict\.a: .*<U1"):
        write_checkpoint(tmp_path / "new.ckpt", {"state_dict": {"a": np.array(["x"])}})
    with pytest.raises(CheckpointFileError, match=r"^a\.b: a set cannot be written"):
        write_checkpoint(tmp_path / "new.ckpt", {"a": {"b": set()}})
    assert path.read_bytes() == b"precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["there.ckpt"]


def test_files_that_are_no_checkpoint(tmp_path):
    def message(content):
        path = tmp_path / "file.ckpt"
        path.write_bytes(content)
        with pytest.raises(CheckpointFileError) as caught:
            read_checkpoint(path)
        text = str(caught.value)
        assert text.startswith(f"{path}: ") and "\n" not in text
        return text

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "hello")
    assert "no PyTorch checkpoint" in message(b"<html>Sign in to continue</html>")
    assert "is empty" in message(b"")
    assert "no data.pkl" in message(archive.getvalue())
    assert "no PyTorch checkpoint" in message(pickle.dumps({"a": 1}))
    assert "single object" in message(_archive(pickle.dumps([1, 2], 2)))
    with pytest.raises(CheckpointFileError, match="no such file"):
        read_checkpoint(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize("name", ["torch_zip.pt", "torch_legacy.pt"])
def test_a_file_cut_off_anywhere_is_an_error(tmp_path, name):
    content = (GOLDENS / name).read_bytes()
    path = tmp_path / "cut.pt"
    for size in range(5, len(content) - 1, 97):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointFileError) as caught:
            read_checkpoint(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_record_or_a_tensor_past_its_storage_is_an_error(tmp_path):
    path = tmp_path / "file.pt"
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"

    def tensor(offset, size, stride):
        numbers = b"".join(
            pickle.BININT + struct.pack("<i", number) + end
            for number, end in ((offset, b""), (size, b"\x85"), (stride, b"\x85"))
        )
        return b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + (
            storage + numbers + b"\x89}tRs."
        )

    values = np.arange(4, dtype=np.float32).tobytes()
    path.write_bytes(_archive(tensor(1, 3, 1), {"0": values}))
    np.testing.assert_array_equal(read_checkpoint(path)["a"], [1, 2, 3])
    for program, records, problem in (
        (tensor(0, 4, 1), {}, "lacks the record"),
        (tensor(0, 4, 1), {"0": values[:12]}, "12 bytes instead of 16"),
        (tensor(1, 4, 1), {"0": values}, "past its storage"),
        (tensor(0, 2, 4), {"0": values}, "past its storage"),
        (tensor(-1, 1, 1), {"0": values}, "past its storage"),
        (tensor(3, 2, -1), {"0": values}, "past its storage"),
        (tensor(0, -1, 1), {"0": values}, "past its storage"),
    ):
        path.write_bytes(_archive(program, records))
        with pytest.raises(CheckpointFileError, match=problem):
            read_checkpoint(path)


def _archive(program, records=None):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("archive/data.pkl", program)
        for key, values in (records or {}).items():
            file.writestr(f"archive/data/{key}", values)
    return content.getvalue()


class Attack:
    """Pickles to a call of anything; harmless until it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def _hostile_programs(mark):
    """Pickles of `{"a": ...}` that write the file `mark` if anything in them is carried out."""
    command = f"touch {mark}"
    code = f"open({mark!r}, 'w')"
    text = pickle.BINUNICODE + struct.pack("<I", len(command)) + command.encode()
    source = pickle.BINUNICODE + struct.pack("<I", len(code)) + code.encode()

    for protocol in range(5):
        yield pickle.dumps({"a": Attack(os.system, command)}, protocol)
        yield pickle.dumps({"a": Attack(eval, code)}, protocol)
        yield pickle.dumps({"a": Attack(exec, code)}, protocol)
    head, tail = b"\x80\x02}X\x01\0\0\0a", b"s."
    name = b"\x8c\x05posix\x8c\x06system\x93"
    yield head + b"cbuiltins\neval\n" + source + b"\x85R" + tail
    yield head + b"c__builtin__\neval\n" + source + b"\x85R" + tail
    yield head + b"cos.path\nos.system\n" + text + b"\x85R" + tail
    yield head + b"ctorch\nserialization.os.system\n" + text + b"\x85R" + tail
    yield head + b"(" + text + b"iposix\nsystem\n" + tail
    yield head + b"(cposix\nsystem\n" + text + b"o" + tail
    yield head + name + text + b"\x85R" + tail
    yield head + b"cposix\nsystem\n" + text + b"\x85\x81" + tail
    yield (
        head
        + b"cbuiltins\ngetattr\ncos\n__dict__\nX\x06\0\0\0system\x86R"
        + (text + b"\x85R" + tail)
    )
    # state for an unknown object, for the reader's own functions and for its containers
    state = b"}X\x0c\0\0\0__setstate__cposix\nsystem\nsb" + text + b"b"
    yield head + b"cnowhere\nThing\n)\x81" + state + tail
    yield head + b"cnowhere\nThing\n" + state + tail
    yield head + b"ctorch._utils\n_rebuild_tensor_v2\n" + state + tail
    yield head + b"ccollections\nOrderedDict\n)R" + state + tail
    yield head + b"ctorch\nFloatStorage\n" + state + tail
    yield (
        head
        + b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nN"
        + (text + b"\x85NtR" + tail)
    )
    # persistent ids that are no storage
    for pid in (b"N", b"K\x01", b")", b"X\x07\0\0\0storage\x85", text, b"cposix\nsystem\n"):
        yield head + pid + b"Q" + tail
    yield head + b"(X\x07\0\0\0storagecposix\nsystem\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ" + tail
    yield head + b"(X\x07\0\0\0storagectorch\nFloatStorage\n]X\x03\0\0\0cpuK\x04tQ" + tail
    yield head + b"(X\x06\0\0\0modulecposix\nsystem\nN" + text + b"tQ" + text + b"\x85R" + tail


def test_hostile_pickles_are_inert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "mark"
    path = tmp_path / "hostile.pt"
    programs = list(_hostile_programs(str(mark)))
    assert len(programs) > 30
    pickle.loads(programs[0])  # they do work where nothing holds them back
    assert mark.exists()
    mark.unlink()
    modules = set(sys.modules)
    outcomes = {"read": 0, "refused": 0}
    for program in programs:
        legacy = b"".join(
            pickle.dumps(value, 2)
            for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        )
        for content in (_archive(program), legacy + program + pickle.dumps([], 2)):
            path.write_bytes(content)
            try:
                value = read_checkpoint(path)["a"]
            except CheckpointFileError:
                outcomes["refused"] += 1
            else:
                outcomes["read"] += 1
                kinds = (dict, Unknown, type, str)
                assert isinstance(value, kinds), (program, value)
                assert not isinstance(value, type) or issubclass(value, Unknown)
            assert not mark.exists(), program
    assert set(sys.modules) == modules
    assert outcomes["read"] >= 50  # most are read, as inert objects
    # and the reader is as it was
    assert_same(read_checkpoint(GOLDENS / "torch_zip.pt")["state_dict"], EXPECTED)
