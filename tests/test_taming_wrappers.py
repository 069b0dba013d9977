"""Checkpoints of the original as trainers wrap them, and files that are damaged or hostile."""

import io
import itertools
import os
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest
import yaml

from vqgan_jax.configuration import ConfigError, to_json
from vqgan_jax.interop import taming
from vqgan_jax.interop.taming_options import ConversionError, read_yaml
from vqgan_jax.interop.taming_transformer_yaml import transformer_from_yaml
from vqgan_jax.interop.taming_yaml import config_from_yaml
from vqgan_jax.interop.torch_file import read_checkpoint
from vqgan_jax.interop.torch_pickle import CheckpointFileError
from vqgan_jax.interop.torch_writer import write_checkpoint
from vqgan_jax.interop.wrappers import unwrap

GOLDENS = pathlib.Path(__file__).parent / "goldens"
RAW = {
    "encoder.conv_in.weight": np.ones(2),
    "decoder.norm.bias": np.ones(3),
    "quantize.embedding.weight": np.ones(4),
    "loss.logvar": np.zeros(1),
}
AVERAGE = {name: value + 1 for name, value in RAW.items()}
PREFIXES = ("", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.",
            "_fsdp_wrapped_module.", "first_stage_model.", "a.b.c.")  # fmt: skip
KEYS = ("", "state_dict", "model", "model_state_dict", "net", "module")


def equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("prefix", "key"), list(itertools.product(PREFIXES, KEYS)))
def test_wrappers(prefix, key):
    tensors = {prefix + name: value for name, value in RAW.items()}
    checkpoint = {key: tensors, "epoch": 3, "optimizer": {}} if key else tensors
    found, notes = unwrap(checkpoint, taming.ROOTS)
    equal(found, RAW)
    assert any("wrapper" in note for note in notes) == bool(prefix)
    equal(taming.state_dict_of(checkpoint), RAW)


def test_parts_that_were_compiled():
    tensors = {name.replace(".", "._orig_mod.", 1): value for name, value in RAW.items()}
    equal(unwrap({"state_dict": tensors}, taming.ROOTS)[0], RAW)


@pytest.mark.parametrize("key", ["ema", "model_ema", "ema_state_dict", "params_ema"])
@pytest.mark.parametrize("shape", [dict, lambda values: {"module": values, "decay": 0.99}])
def test_moving_averages_beside_the_weights(key, shape):
    averages = {f"module.{name}": value for name, value in AVERAGE.items()}
    averages["n_averaged"] = np.array(7)
    checkpoint = {"model": RAW, key: shape(averages)}
    found, notes = unwrap(checkpoint, taming.ROOTS)
    equal(found, AVERAGE)
    assert "--weights=raw" in notes[0]
    equal(unwrap(checkpoint, taming.ROOTS, "ema")[0], AVERAGE)
    equal(unwrap(checkpoint, taming.ROOTS, "raw")[0], RAW)
    with pytest.raises(ConversionError, match="no moving average"):
        unwrap({"model": RAW}, taming.ROOTS, "ema")


def test_moving_averages_of_latent_diffusion():
    flat = {f"model_ema.{name.replace('.', '')}": value for name, value in AVERAGE.items()}
    flat |= {"model_ema.decay": np.array(0.99), "model_ema.num_updates": np.array(3)}
    equal(unwrap({"state_dict": RAW | flat}, taming.ROOTS)[0], AVERAGE)
    equal(unwrap({"state_dict": RAW | flat}, taming.ROOTS, "raw")[0], RAW)


@pytest.mark.parametrize(
    ("average", "online"),
    [("ema_model.", "online_model."), ("ema_model.", ""), ("ema.", ""), ("ema.ema_model.", ""),
     ("ema.ema_model.", "ema.online_model."), ("ema_model.module.", "online_model.module.")],
)  # fmt: skip
def test_moving_averages_by_a_prefix(average, online):
    holder = "ema." if average.startswith("ema.") else ""
    counters = {f"{holder}initted": np.array(True), f"{holder}step": np.array(3)}
    averages = {f"{average}{name}": value for name, value in AVERAGE.items()}
    tensors = counters | {f"{online}{name}": value for name, value in RAW.items()} | averages
    found, notes = unwrap({"state_dict": tensors}, taming.ROOTS)
    equal(found, AVERAGE)
    assert "*; --weights=raw" in notes[0]
    equal(unwrap({"state_dict": tensors}, taming.ROOTS, "raw")[0], RAW)
    equal(unwrap(averages | counters, taming.ROOTS)[0], AVERAGE)


def test_weights_that_are_integers_are_refused():
    with pytest.raises(ConversionError, match=r"1 tensors are no .* \(a int8\)"):
        taming.check_floating({"a": np.ones(2, np.int8), "b": np.ones(2, np.float16)})


def test_what_is_none_names_what_there_is():
    for checkpoint, words in (
        ({"state_dict": {"module.conv.weight": np.ones(2)}}, "module.conv.weight"),
        ({"epoch": 3}, "epoch"),
        ({"shadow_params": [np.ones(2)]}, "Lists such as 'shadow_params' have no names"),
    ):
        with pytest.raises(ConversionError) as error:
            taming.state_dict_of(checkpoint)
        assert words in str(error.value) and "\n" not in str(error.value)


def description(**changes):
    found = yaml.safe_load((GOLDENS / "taming_vqgan.yaml").read_text())
    found["model"] |= changes
    return found


def test_the_same_network_under_other_names():
    expected = to_json(config_from_yaml(description()))
    for target in ("ldm.models.autoencoder.VQModelInterface", "a.b.VQNoDiscModel", "x.VQModel"):
        assert to_json(config_from_yaml(description(target=target))) == expected
    with pytest.raises(ConversionError, match="target is 'x.AutoencoderKL'; supported are VQModel"):
        config_from_yaml(description(target="x.AutoencoderKL"))
    found = description()
    found["model"]["params"]["ddconfig"]["attn_resolutions"] += [7]  # has no effect there either
    assert to_json(config_from_yaml(found)) == expected


ODD = (None, "text", -1, 0, 10**9, 10**30, 0.5, True, [], {}, [1] * 10**5, [[1]], "1e400", 1e300,
       "9" * 5000, float("nan"), float("inf"))  # fmt: skip


def places(values, path=()):
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def test_odd_values_in_yaml():
    """Each key of a description by each odd value, and without it."""
    for i, place in enumerate(places(description())):
        for odd in (ODD[i % len(ODD)], ODD[(5 * i + 3) % len(ODD)], "REMOVED"):
            found = description()
            parent = found
            for key in place[:-1]:
                parent = parent[key]
            if odd == "REMOVED":
                del parent[place[-1]]
            else:
                parent[place[-1]] = odd
            try:
                config_from_yaml(found)
            except (ConversionError, ConfigError) as error:
                assert "\n" not in str(error) and len(str(error)) < 500
            try:
                transformer_from_yaml({"model": {"target": "x.Net2NetTransformer", "params": {
                    "first_stage_config": found["model"], "transformer_config": {"params": {
                        "vocab_size": odd, "block_size": odd, "n_layer": odd}}}}})  # fmt: skip
            except (ConversionError, ConfigError, KeyError) as error:
                assert "\n" not in str(error)


LAUGHS = "a: &a [x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


HOSTILE_TEXTS = {
    "laughs": LAUGHS,
    "deep": "[" * 20_000,
    "long number": "a: " + "9" * 10_000,
    "no date": "a: 2001-99-99",
    "python": "!!python/object/apply:os.system [x]",
    "zero": "\x00",
    "list": "- 1\n- 2",
    "nothing": "",
    "colons": "a: b: c",
    "key": "? [1]: 2",
    "binary": "a: !!binary x",
    "merge": "<<: 1",
    "nan": "a: .nan",
    "long": "x" * 2**21,
    "base 60": "a: 1" + ":59" * 40_000,
    "keys": "\n".join(f"a{number}: {number}" for number in range(60_000)),
}


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS.keys())
def test_hostile_yaml(tmp_path, text):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    try:
        project = read_yaml(path)
        config_from_yaml(project)
    except ConversionError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        pytest.fail("It was taken.")


# ---- Files.


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "x.ckpt"
    tensors = {f"encoder.{i}": np.arange(6.0).reshape(2, 3) + i for i in range(5)}
    write_checkpoint(path, {"state_dict": tensors})
    return path


def outcome(path):
    """The tensors in a file, or None where it is refused in one line that names it."""
    try:
        tensors = read_checkpoint(path)["state_dict"]
        return {name: np.array(value) for name, value in tensors.items()}  # not a map of the file
    except CheckpointFileError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    except KeyError:  # the key itself was damaged, which its pickle's checksum should have shown
        pytest.fail("read_checkpoint gave another dictionary.")


def test_each_changed_byte_is_seen(archive):
    """Every byte of the file: an error, or the undamaged tensors."""
    good, content = outcome(archive), archive.read_bytes()
    seen = 0
    for place in range(0, len(content), 5):
        changed = bytearray(content)
        changed[place] ^= 0x41
        archive.write_bytes(changed)
        found = outcome(archive)
        seen += found is None
        assert found is None or all(np.array_equal(found[name], good[name]) for name in good)
    assert seen > len(content) // 20
    for end in range(0, len(content), 97):
        archive.write_bytes(content[:end])
        assert outcome(archive) is None


def rewritten(path, change):
    """The archive with its records changed by `change(name, data, info)`."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            for name, data, compression in change(info.filename, source.read(info)):
                target.writestr(zipfile.ZipInfo(name), data, compression)
    path.write_bytes(out.getvalue())


def test_records_twice_or_compressed(archive):
    good = outcome(archive)
    content = archive.read_bytes()
    rewritten(archive, lambda name, data: [(name, data, zipfile.ZIP_DEFLATED)])
    assert all(np.array_equal(outcome(archive)[name], good[name]) for name in good)
    archive.write_bytes(content)
    with pytest.warns(UserWarning, match="Duplicate name"):
        rewritten(archive, lambda name, data: [(name, data, zipfile.ZIP_STORED)] * 2)
    assert outcome(archive) is None
    archive.write_bytes(content)  # a storage that becomes larger than it says
    rewritten(archive, lambda name, data: [
        (name, bytes(50 * 2**20) if "/data/" in name else data, zipfile.ZIP_DEFLATED)])  # fmt: skip
    assert outcome(archive) is None


def test_records_that_share_bytes(archive):
    content = bytearray(archive.read_bytes())
    directory = content.index(b"PK\x01\x02")
    second = content.index(b"PK\x01\x02", directory + 4)
    content[second + 42 : second + 46] = content[directory + 42 : directory + 46]
    archive.write_bytes(content)
    assert outcome(archive) is None


def with_pickle(archive, program):
    rewritten(archive, lambda name, data: [
        (name, program if name.endswith("data.pkl") else data, zipfile.ZIP_STORED)])  # fmt: skip


HOSTILE = {
    "system": b"cos\nsystem\nX\x04\x00\x00\x00trueq\x00\x85R.",
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "long string": b"\x80\x02X\xff\xff\xff\x7f.",
    "long number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "deep": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "deep key": b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.",
    "doubled": b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 64 + b"}X\x01\x00\x00\x00ah\x00s.",
    "doubled device": b"\x80\x02ctorch\ndevice\n)q\x00" + b"h\x00h\x00\x86q\x00" * 64 + b"\x85R.",
    "extension": b"\x80\x02\x84\xff\xff\xff\x7f.",
    "nothing": b".",
    "text": b"hello",
    "many classes": b"".join(b"cm\nn%d\n" % number for number in range(20_000)) + b".",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles(archive, kind):
    with_pickle(archive, HOSTILE[kind])
    try:
        assert isinstance(read_checkpoint(archive), dict)
    except CheckpointFileError as error:
        assert str(archive) in str(error) and "\n" not in str(error) and len(str(error)) < 600


def test_tensors_that_are_larger_than_their_storage(archive):
    def tensor(shape, strides, offset=0):
        numbers = b"".join(
            b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in values) + b"t"
            for values in (shape, strides)
        )
        storage = b"(X\x07\x00\x00\x00storagectorch\nDoubleStorage\n"
        storage += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
        return (b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(" + storage
                + b"\x8a\x08" + struct.pack("<q", offset) + numbers + b"\x89}tRs.")  # fmt: skip

    content = archive.read_bytes()
    for shape, strides, offset in (((7,), (1,), 0), ((2,), (1,), 5), ((2**40,), (0,), 0),
                                   ((-1,), (1,), 0), ((1,), (1,), -1), ((2,), (-1,), 1),
                                   ((2**62, 2**62), (1, 1), 0)):  # fmt: skip
        archive.write_bytes(content)
        with_pickle(archive, tensor(shape, strides, offset))
        with pytest.raises(CheckpointFileError):
            read_checkpoint(archive)
    archive.write_bytes(content)
    with_pickle(archive, tensor((2, 3), (3, 1)))
    np.testing.assert_array_equal(read_checkpoint(archive)["a"], np.arange(6.0).reshape(2, 3))


NO_CHECKPOINTS = {
    b"": "is empty",
    b"PK": "no PyTorch checkpoint",
    b"PK\x03\x04": "cut off",
    b"\x80\x02": "damaged or no PyTorch checkpoint",
    b"\n<!DOCTYPE html>": "web page",
    b"version https://git-lfs.github.com/spec/v1\noid": "git lfs pull",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    struct.pack("<Q", 40) + b'{"a": {"dtype"': "safetensors",
}


@pytest.mark.parametrize(("content", "words"), NO_CHECKPOINTS.items())
def test_files_that_are_no_checkpoints(tmp_path, content, words):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointFileError, match=f"x.ckpt: .*{words}"):
        read_checkpoint(path)


def test_records_of_another_compression(archive):
    rewritten(archive, lambda name, data: [(name, data, zipfile.ZIP_LZMA)])
    with pytest.raises(CheckpointFileError, match="compressed by a method"):
        read_checkpoint(archive)


def test_a_loss_that_is_none():
    for target in ("torch.nn.Identity", "taming.modules.losses.vqperceptual.DummyLoss"):
        project = description()
        project["model"]["params"]["lossconfig"] = {"target": target}
        assert not config_from_yaml(project).discriminator.enabled


def test_folders_and_pipes_are_no_checkpoints(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing"):
        with pytest.raises(CheckpointFileError):
            read_checkpoint(path)
    assert pickle  # the module that must never load one of these itself
