"""Pickles and archives of a few bytes that ask for work and memory without end; odd wrappers."""

import io
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest

from vqgan_jax.errors import DataError
from vqgan_jax.interop import taming
from vqgan_jax.interop.pickle_limits import MOST_STEPS, Budget, Memo
from vqgan_jax.interop.taming_options import ConversionError, read_yaml
from vqgan_jax.interop.taming_transformer import ROOTS as TRANSFORMER_ROOTS
from vqgan_jax.interop.torch_file import has_checksums, read_checkpoint
from vqgan_jax.interop.torch_pickle import Unpickler
from vqgan_jax.interop.torch_writer import write_checkpoint
from vqgan_jax.interop.wrappers import unwrap

START = b"\x80\x02"


def text(size):
    return b"X" + struct.pack("<I", size) + b"a" * size


def long_number(bits):
    digits = pickle.encode_long(1 << bits)
    return b"\x8b" + struct.pack("<i", len(digits)) + digits


LARGE = START + b"](" + b"N" * 200_000 + b"eq\x00"  # a list, in the memo
CALLS = {
    "of a class": b"cx\ny\nq\x01" + b"h\x01h\x00R0" * 50_000,
    "new objects": b"cx\ny\nq\x01" + b"h\x01h\x00\x810" * 50_000,
    "with named arguments": b"}X\x01\0\0\0ah\x00sq\x02cx\ny\nq\x01"
    + b"h\x01h\x00h\x02\x920" * 50_000,
    "sizes": b"ctorch\nSize\nq\x01" + b"h\x01h\x00\x85R0" * 50_000,
    "from a type": b"ctorch\nSize\nq\x01ctorch._tensor\n_rebuild_from_type_v2\nq\x02"
    + b"h\x02(h\x01Nh\x00\x85tR0" * 50_000,
    "dictionaries": b"}q\x010ccollections\nOrderedDict\nq\x02" + b"h\x02h\x00\x85R0" * 50_000,
}  # fmt: skip
PROGRAMS = {f"calls, {name}": LARGE + calls for name, calls in CALLS.items()} | {
    "text of a device": START + text(2**20) + b"q\x00ctorch\ndevice\nq\x01"
    + b"h\x01h\x00K\x01\x86R0" * 50_000,
    "long number as key": START + long_number(2**22) + b"q\x000}" + b"h\x00Ns" * 50_000 + b".",
    "equal long keys": START + text(2**22) + b"q\x00" + text(2**22) + b"q\x01}h\x00Ns"
    + b"h\x01Ns" * 50_000 + b".",
    "memo": START + b"]r" + struct.pack("<I", 2**31) + b".",
    "negative memo": START + b"]q\x00g-1\n.",
    "line": START + b"V" + b"a" * 10_000 + b"\n.",
    "name": b"\x80\x04" + text(10_000) + text(10) + b"\x93.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
    "long text": START + b"\x8d" + struct.pack("<Q", 2**40),
    "key of a storage": START + b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + text(10_000)
    + b"X\x03\0\0\0cpuK\x04tQ.",
}  # fmt: skip


@pytest.fixture
def archive(tmp_path):
    def write(program):
        path = tmp_path / "x.ckpt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a/data.pkl", program)
        return path

    return write


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_without_end(archive, kind):
    path, begin = archive(PROGRAMS[kind]), time.process_time()
    with pytest.raises(DataError, match="x.ckpt") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.process_time() - begin < 5  # each took minutes


def test_numbers_with_one_hash_are_no_keys(archive):
    keys = b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") for k in range(30_000))
    numbers = b"".join(keys[at : at + 12] + b"N" for at in range(0, len(keys), 12))
    begin = time.process_time()
    assert len(read_checkpoint(archive(START + b"}(" + numbers + b"u."))) == 30_000
    assert time.process_time() - begin < 5


def test_steps_of_a_good_file_are_far_from_the_limit(tmp_path):
    tensors = {f"encoder.down.{i}.block.norm1.weight": np.zeros(1, np.float32) for i in range(50)}
    write_checkpoint(tmp_path / "x.ckpt", {"state_dict": tensors})
    program = zipfile.ZipFile(tmp_path / "x.ckpt").read("archive/data.pkl")
    budget = Budget(tmp_path)
    Unpickler(io.BytesIO(program), budget).load()
    assert (MOST_STEPS - budget._left) / 50 * 10_000 < MOST_STEPS  # ten thousand tensors


def test_each_step_counts(tmp_path):
    for program in (b"]" * 101, b"]0" * 51, b"}q\x000" * 34):
        with pytest.raises(DataError, match="more than 100 steps"):
            Unpickler(io.BytesIO(START + program + b"."), Budget(tmp_path, 100)).load()


def test_memo():
    memo = Memo()
    memo[0], memo[3] = "a", "b"
    assert (memo[0], memo[3], len(memo)) == ("a", "b", 4)
    for index in (1, 2, 4, -1):
        with pytest.raises(KeyError):
            memo[index]


def test_a_directory_of_a_million_records(tmp_path):
    path = tmp_path / "x.ckpt"
    entry = b"PK\x01\x02" + bytes(42)
    size = 200_000 * len(entry)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 65535, 65535, size, 0, 0)
    path.write_bytes(b"PK\x03\x04" + bytes(26) + entry * 200_000 + end)
    with pytest.raises(DataError, match=f"its directory has {size} bytes"):
        read_checkpoint(path)


def test_the_old_format_says_that_it_has_no_checksums(tmp_path):
    write_checkpoint(tmp_path / "new.ckpt", {"a": np.ones(1)})
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    assert has_checksums(tmp_path / "new.ckpt") and not has_checksums(tmp_path / "old.ckpt")


MODEL = {name: np.ones(2) for name in ("encoder.a", "decoder.b", "quantize.embedding.weight")}


def under(prefix, tensors=MODEL):
    return {prefix + name: value for name, value in tensors.items()}


@pytest.mark.parametrize("prefix", ["module.", "generator.", "module.net."])
@pytest.mark.parametrize("other", ["scale", "discriminator.main.0.weight", "other.encoder.c"])
def test_a_wrapper_beside_other_tensors(prefix, other):
    found, notes = unwrap({"state_dict": under(prefix) | {other: np.ones(1)}}, taming.ROOTS)
    assert found.keys() == MODEL.keys()
    assert any(other in note for note in notes)


def test_one_of_several_models_is_not_guessed():
    both = under("student.") | under("teacher.")
    assert unwrap({"state_dict": both}, taming.ROOTS)[0].keys() == both.keys()


def test_the_first_stage_of_another_model():
    tensors = under("first_stage_model.") | under("cond_stage_model.") | {"model.x": np.ones(1)}
    assert unwrap({"state_dict": tensors}, taming.ROOTS)[0].keys() == MODEL.keys()
    tensors |= {"transformer.y": np.ones(1)}
    for prefix in ("", "module."):  # of a transformer it is a part
        given = under(prefix, tensors)
        assert unwrap({"state_dict": given}, taming.ROOTS)[0].keys() == given.keys()
        assert unwrap({"state_dict": given}, TRANSFORMER_ROOTS)[0].keys() == tensors.keys()


def test_many_prefixes_are_no_work():
    names = {f"a{i}.encoder.x": np.ones(1) for i in range(30_000)}
    begin = time.process_time()
    assert len(unwrap(names, taming.ROOTS)[0]) == len(names)
    assert time.process_time() - begin < 5


def test_averages_without_names_are_noted():
    shadow = {"decay": 0.99, "shadow_params": [np.ones(2)]}
    for checkpoint, key in (
        ({"model": MODEL, "ema": shadow}, "ema.shadow_params"),
        ({"model": MODEL, "shadow_params": [np.ones(2)]}, "shadow_params"),
    ):
        assert any(key in note for note in unwrap(checkpoint, taming.ROOTS)[1])
    notes = unwrap({"model": MODEL, "ema": MODEL, "optimizer": [np.ones(2)]}, taming.ROOTS)[1]
    assert not any("nothing of" in note for note in notes)


def test_a_number_of_yaml_that_python_does_not_print(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("model: {target: x.VQModel, params: {n_embed: 0x" + "f" * 4000 + "}}")
    with pytest.raises(ConversionError, match="digits"):
        read_yaml(path)


def tensor(storage, count, shape, strides):
    """Instructions for a tensor of float32 in a storage of `count` values."""
    numbers = b"".join(
        b"(" + b"".join(b"J" + struct.pack("<i", n) for n in values) + b"t"
        for values in (shape, strides)
    )
    key = b"X" + struct.pack("<I", len(storage)) + storage.encode()
    pid = b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + key + b"X\x03\0\0\0cpuJ"
    pid += struct.pack("<i", count) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"K\x00" + numbers + b"\x89}tR"


@pytest.mark.parametrize("memo", [True, False])
def test_many_tensors_of_one_storage(tmp_path, memo):
    """A megabyte that a file mentions as tensors of a terabyte, which a reader would copy."""

    def write(count):
        one = tensor("0", 2**18, (2**18,), (1,))
        values = [one + b"q\x00", *[b"h\x00"] * (count - 1)] if memo else [one] * count
        path = tmp_path / f"{count}.ckpt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            items = b"".join(b"M" + struct.pack("<H", i) + v for i, v in enumerate(values))
            file.writestr("a/data.pkl", START + b"}(" + items + b"u.")
            file.writestr("a/data/0", bytes(2**20))
        return path

    assert len(read_checkpoint(write(200))) == 200
    with pytest.raises(DataError, match="share storages"):
        read_checkpoint(write(20_000))


@pytest.mark.parametrize("dtype", ["float32", "complex64", "int8"])
def test_views_of_big_endian_files(tmp_path, dtype):
    """Strided views, such as a transposed matrix that shares its storage with the matrix."""
    numbers = np.arange(12).astype(dtype) * (1 + 2j if dtype == "complex64" else 1)
    names = {"float32": b"Float", "complex64": b"ComplexFloat", "int8": b"Char"}
    one = tensor("0", 12, (3, 2), (1, 6)).replace(b"Float", names[dtype])
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as file:
        file.writestr("a/data.pkl", START + b"}(K\x00" + one + b"u.")
        file.writestr("a/byteorder", b"big")
        file.writestr("a/data/0", numbers.astype(numbers.dtype.newbyteorder(">")).tobytes())
    found = read_checkpoint(tmp_path / "x.ckpt")[0]
    np.testing.assert_array_equal(found, [[n, n + 6 * numbers[1]] for n in numbers[:3]])
    assert found.dtype == dtype and not found.flags.writeable


@pytest.mark.parametrize(
    ("record", "words"),
    [("arr_0.npy", ".npz"), ("model.weights.h5", "Keras"), ("a.txt", "no data.pkl")],
)
def test_archives_of_other_kinds(tmp_path, record, words):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as file:
        file.writestr(record, b"x")
    with pytest.raises(DataError, match=f"x.ckpt: is a.*{words}"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_a_moving_average_alone():
    checkpoint = {"ema": MODEL}
    assert unwrap(checkpoint, taming.ROOTS)[0].keys() == MODEL.keys()
    with pytest.raises(ConversionError, match="leave out --weights=raw"):
        unwrap(checkpoint, taming.ROOTS, "raw")
