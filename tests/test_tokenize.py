"""The command, in processes that are killed, stopped, and share the work."""

import json
import os
import pathlib
import pickle
import signal
import socket
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import programs
import tiny
import training_runs as runs
import vqgan_jax
from vqgan_jax.checkpoints.directory_lock import is_empty, locked
from vqgan_jax.conditions.coordinates import coordinate_tokens
from vqgan_jax.conditions.derived import canny_edges, low_resolution
from vqgan_jax.data import code_report
from vqgan_jax.data.augmentations import AllViews, list_views
from vqgan_jax.data.code_report import verify
from vqgan_jax.data.code_writer import ShardImages
from vqgan_jax.data.codes import check_codes, open_codes
from vqgan_jax.data.elements import ReadTransformed
from vqgan_jax.data.sources import open_source
from vqgan_jax.data.transforms import Transform
from vqgan_jax.errors import DataError
from vqgan_jax.inference import Tokenizer
from vqgan_jax.inference.tokenize import tokenize
from vqgan_jax.training.checkpoints import Checkpoints, write_export
from vqgan_jax.training.game import Game
from vqgan_jax.training.states import TokenizerState

COUNT = 120


def print_codes(directory):
    print(*code_report.lines(code_report.describe_codes(pathlib.Path(directory))), sep="\n")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An untrained tokenizer of 32 codes."""
    config = tiny.config_of_tiny_model()
    path = tmp_path_factory.mktemp("exports") / "tiny"
    write_export(path, config, tiny.initial_variables(config))
    return path


@pytest.fixture(scope="module")
def labels_export(tmp_path_factory):
    """An untrained tokenizer of maps of five labels."""
    config = tiny.config_of_tiny_model(codebook_size=16)
    config.model.in_channels = config.model.out_channels = config.data.num_labels = 5
    config.loss.binary_cross_entropy = 1.0
    path = tmp_path_factory.mktemp("exports") / "labels"
    write_export(path, config, tiny.initial_variables(config))
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of smooth random images of two classes, larger than the tokenizer takes them."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / ("cat", "dog")[i % 2] / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8))
        small.resize((44, 36), Image.Resampling.BICUBIC).save(path)
    return folder


def images_of(folder):
    """(N, 32, 32, 3) uint8, as evaluation crops them, in the order of their paths."""
    crops = []
    for path in sorted(folder.rglob("*.png")):
        image = Image.open(path).resize((39, 32), Image.Resampling.BICUBIC)  # 44 * 32 / 36
        crops.append(np.asarray(image)[:, 3:35])
    return np.stack(crops)


def contents(directory):
    """The files of codes; the copies of their tokenizers beside them have names by chance."""
    found = {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    return {str(path): content for path, content in found.items() if "tokenizer" not in str(path)}


def arguments(export, photographs, output, *more):
    return [
        f"--checkpoint={export}",
        f"--dataset=folder:{photographs}",
        "--split=all",
        f"--output={output}",
        "--batch_size=4",
        "--images_per_shard=2",
        "--augment=flip",
        *more,
    ]


def start(*arguments, devices=1, process=None):
    """`python -m vqgan_jax.tokenize`; `process` is (index, count, port)."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(runs.ROOT),
    }
    if process is not None:
        index, count, port = process
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
    return programs.Program(
        [sys.executable, "-m", "vqgan_jax.tokenize", *arguments],
        env=environment,
    )


def run(*arguments, **options):
    """What a command that must succeed prints."""
    code, output, errors = runs.finish(start(*arguments, **options))
    assert code == 0, f"exit code {code}\n{output}\n{errors}"
    assert "Traceback" not in errors, errors
    return output


def fails(*arguments):
    """The line that a command ends with, which must be the only one of that kind."""
    code, _, errors = runs.finish(start(*arguments))
    assert code == 1 and "Traceback" not in errors, errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and errors.splitlines()[-1] == lines[0], errors
    return lines[0]


@pytest.fixture(scope="module")
def whole(export, photographs, tmp_path_factory):
    """The output of one process that nothing interrupted, and what it printed."""
    output = tmp_path_factory.mktemp("whole") / "codes"
    return output, run(*arguments(export, photographs, output))


# ---- What is written.


def test_codes_are_those_of_the_tokenizer(whole, export, photographs):
    output, printed = whole
    codes = open_codes(output / "all", verify=True)
    tokenizer = vqgan_jax.load(export)
    images = images_of(photographs)
    for view, pixels in enumerate((images, images[:, :, ::-1])):
        expected = np.asarray(tokenizer.encode(pixels / np.float32(127.5) - 1))
        found = codes.gather(np.arange(COUNT), view)
        # Batches of another size are rounded elsewhere, which may decide a tie.
        assert np.mean(found == expected.reshape(COUNT, 256)) > 0.999
        assert len(np.unique(found)) > 10
    np.testing.assert_array_equal(codes.labels, np.arange(COUNT) // (COUNT // 2))
    assert codes.class_names == ("cat", "dog")
    check_codes(codes, tokenizer.fingerprint, (16, 16), 32, 2)
    assert "100.0%" in printed and "images/s" in printed and "left 00:00" in printed


@pytest.mark.slow
def test_manifest_has_no_trace_of_time_or_place(whole, export):
    manifest = json.loads((whole[0] / "all" / "manifest.json").read_text())
    assert manifest.keys() == {
        *("format", "version", "dataset", "split", "image_key", "count", "class_names"),
        *("resolution", "resize", "augmentations", "grid", "codebook_size", "fingerprint"),
        *("dtype", "images_per_shard", "conditions", "depth", "shards"),
        "folder_rules",
        "sha256",
    }
    assert len(manifest["shards"]) == 60
    assert manifest["augmentations"] == ["centre", "centre_flip"]
    assert manifest["fingerprint"] == vqgan_jax.load(export).fingerprint


@pytest.mark.slow
def test_two_processes_write_what_one_writes(whole, export, photographs, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = arguments(export, photographs, tmp_path / "codes")
    processes = [start(*command, process=(index, 2, port)) for index in range(2)]
    for code, output, errors in [runs.finish(process) for process in processes]:
        assert code == 0, f"{output}\n{errors}"
    assert contents(tmp_path / "codes") == contents(whole[0])


@pytest.mark.slow
def test_the_number_of_devices_changes_nothing(whole, export, photographs, tmp_path):
    run(*arguments(export, photographs, tmp_path / "codes"), devices=3)
    assert contents(tmp_path / "codes") == contents(whole[0])


@pytest.mark.slow
def test_moving_average_is_what_encodes(photographs, tmp_path):
    config = tiny.config_of_tiny_model()
    config.optimizer.ema_decay = 0.99
    generator = Game.from_config(config).init_generator(tiny.initial_variables(config))
    average = jax.tree.map(lambda x: x + 0.01, generator.params)
    state = TokenizerState(jnp.asarray(1), generator.replace(ema_params=average), None)
    checkpoints = Checkpoints(tmp_path / "run", config)
    checkpoints.save(1, state)
    checkpoints.close()
    tokenize(
        str(tmp_path / "run"), tmp_path / "codes", f"folder:{photographs}", ["all"], batch_size=8
    )
    codes = open_codes(tmp_path / "codes" / "all")
    assert codes.fingerprint == Tokenizer(config, {"params": average}).fingerprint
    images = images_of(photographs) / np.float32(127.5) - 1
    expected = np.asarray(Tokenizer(config, {"params": average}).encode(images))
    assert np.mean(codes.gather(np.arange(COUNT)) == expected.reshape(COUNT, 256)) > 0.999


@pytest.mark.slow
def test_label_maps_and_another_resolution(labels_export, tmp_path):
    maps = np.random.default_rng(0).integers(0, 5, (3, 16, 16)).astype(np.uint8)
    (tmp_path / "maps").mkdir()
    for i, labels in enumerate(maps):
        Image.fromarray(labels).save(tmp_path / "maps" / f"{i}.png")
    dataset = f"folder:{tmp_path / 'maps'}"
    tokenize(str(labels_export), tmp_path / "codes", dataset, ["all"], resolution=16)
    codes = open_codes(tmp_path / "codes" / "all")
    one_hot = np.eye(5, dtype=np.float32)[maps]
    expected = np.asarray(vqgan_jax.load(labels_export).encode(one_hot))
    assert codes.grid == (8, 8) and codes.num_classes == 0 and (codes.labels == -1).all()
    assert np.mean(codes.gather(np.arange(3)) == expected.reshape(3, 64)) > 0.98
    with pytest.raises(DataError, match="--resolution=17 is not divisible by .* factor 2"):
        tokenize(str(labels_export), tmp_path / "other", dataset, ["all"], resolution=17)


def test_images_come_shard_by_shard_padded_and_can_be_sent_to_other_processes(photographs):
    source = open_source(f"folder:{photographs}", "all")
    read = ReadTransformed(source, AllViews(Transform(32, 32), list_views(["flip"])))
    images = ShardImages(read, [range(3), range(50, 54)], batch_size=4)
    images = pickle.loads(pickle.dumps(images))
    expected = images_of(photographs)
    assert len(images) == 8
    for place, index in enumerate([0, 1, 2, None, 50, 51, 52, 53]):
        example = images[place]
        if index is None:
            assert example["image"].shape == (2, 32, 32, 3) and not example["image"].any()
        else:
            np.testing.assert_array_equal(example["image"][0], expected[index])
            np.testing.assert_array_equal(example["image"][1], expected[index][:, ::-1])


@pytest.mark.slow
def test_damaged_images_are_replaced_and_counted(export, photographs, tmp_path, caplog, capsys):
    folder = tmp_path / "images"
    for path in photographs.rglob("*.png"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    damaged = sorted(folder.rglob("*.png"))[59]  # the last cat; the next is a dog
    damaged.write_bytes(damaged.read_bytes()[:100])
    tokenize(str(export), tmp_path / "codes", f"folder:{folder}", ["all"], images_per_shard=50)
    codes = open_codes(tmp_path / "codes" / "all")
    np.testing.assert_array_equal(*codes.gather(np.array([59, 60])))
    assert codes.labels[59] == 1 and codes.num_replaced == 1
    assert [record.message for record in caplog.records if str(damaged) in record.message]
    manifest = json.loads((tmp_path / "codes" / "all" / "manifest.json").read_text())
    assert [shard["replaced"] for shard in manifest["shards"]] == [[], [59], []]
    print_codes(str(tmp_path / "codes"))
    assert "1 damaged images" in capsys.readouterr().out

    other = sorted(folder.rglob("*.png"))[7]
    other.write_bytes(b"")
    with pytest.raises(DataError, match="2 images or more of 120 are damaged"):
        tokenize(str(export), tmp_path / "other", f"folder:{folder}", ["all"])
    assert not (tmp_path / "other" / "all" / "manifest.json").exists()


def test_a_second_job_is_refused(export, photographs, tmp_path):
    with locked(tmp_path / "codes" / "all"):
        with pytest.raises(DataError, match="codes/all is in use by another job"):
            tokenize(str(export), tmp_path / "codes", f"folder:{photographs}", ["all"])
        assert os.listdir(tmp_path / "codes") == ["all"]
        assert is_empty(tmp_path / "codes" / "all")


# ---- Killed, stopped, and going on.


def wait_for_shards(process, directory, count):
    end = time.monotonic() + runs.TIMEOUT
    while len(list(directory.glob("partial/shard-*.json"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no shards came"
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_pass_that_was_ended_goes_on(whole, export, photographs, tmp_path, number):
    output = tmp_path / "codes"
    process = start(*arguments(export, photographs, output))
    wait_for_shards(process, output / "all", 2)
    process.send_signal(number)
    code, _, errors = runs.finish(process)
    if number == signal.SIGTERM:
        assert code == 75 and "the same command goes on from there" in errors, errors
    else:
        assert code == -signal.SIGKILL
    finished = list((output / "all" / "partial").glob("shard-*.json"))
    assert 2 <= len(finished) < 60 and not (output / "all" / "manifest.json").exists()
    records = [json.loads(path.read_text()) for path in finished]
    before = {r["codes"]: (output / "all" / r["codes"]).stat() for r in records}
    with pytest.raises(DataError, match="the pass is not finished"):
        print_codes(output)

    printed = run(*arguments(export, photographs, output))
    assert f"goes on: {len(finished)} of 60 shards exist" in printed
    for name, stat in before.items():
        after = (output / "all" / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert contents(output) == contents(whole[0])


def test_a_complete_directory_stays_as_it_is(whole, export, photographs):
    before = contents(whole[0])
    printed = run(*arguments(export, photographs, whole[0]))
    assert "is complete" in printed and "images/s" not in printed
    assert contents(whole[0]) == before


def test_other_choices_are_refused_in_one_line(whole, export, photographs, tmp_path):
    before = contents(whole[0])
    config = tiny.config_of_tiny_model()
    variables = tiny.initial_variables(config)
    variables["params"]["quantize"]["codebook"] *= 2
    write_export(tmp_path / "other", config, variables)
    command = arguments(export, photographs, whole[0])
    line = fails(*command, f"--checkpoint={tmp_path / 'other'}")
    assert "codes of another pass: its tokenizer is" in line
    assert "--checkpoint, --output and --split are needed" in fails(*command, "--output=")
    same = dict(dataset=f"folder:{photographs}", splits=["all"], augmentations=["flip"])
    for change, words in (
        ({"augmentations": ["ten_crop"]}, "its augmentations is"),
        ({"resolution": 16}, "its resolution is 32, and here it is 16"),
        ({"augmentations": ["turn"]}, "There is no augmentation 'turn'"),
        ({"splits": ["all", "holiday"]}, "has no split 'holiday'"),
        ({"dataset": "folder:/nowhere"}, "The folder /nowhere"),
    ):
        with pytest.raises(DataError, match=words) as error:
            tokenize(str(export), whole[0], **same | {"images_per_shard": 2} | change)
        assert "\n" not in str(error.value)
    assert contents(whole[0]) == before


# ---- Conditions.

SCENES = 40


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Images of 16 x 20 pixels and their maps of five labels."""
    folder, random = tmp_path_factory.mktemp("scenes"), np.random.default_rng(1)
    for i in range(SCENES):
        image = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8)).resize((20, 16))
        labels = Image.fromarray(random.integers(0, 5, (16, 20), np.uint8))
        for key, picture in (("", image), ("segmentation", labels)):
            (folder / key / "train").mkdir(parents=True, exist_ok=True)
            picture.save(folder / key / "train" / f"{i:02}.png")
    return folder


def condition_arguments(export, labels_export, scenes, output):
    conditions = (
        f"segmentation={labels_export}",
        f"edges={export}",
        f"low_resolution:2={export}",
        "coordinates=100",
    )
    return dict(
        checkpoint=str(export),
        output=output,
        dataset=f"folder:{scenes}",
        splits=["train"],
        augmentations=["flip"],
        resolution=16,
        batch_size=2,
        images_per_shard=2,
        conditions=conditions,
    )


@pytest.fixture(scope="module")
def conditioned(export, labels_export, scenes, tmp_path_factory):
    """Codes with those of conditions, by this process and its eight devices."""
    output = tmp_path_factory.mktemp("conditioned") / "codes"
    tokenize(**condition_arguments(export, labels_export, scenes, output))
    return output


@pytest.mark.slow
def test_condition_codes_are_those_of_their_tokenizers(conditioned, export, labels_export, scenes):
    codes = open_codes(conditioned / "train", verify=True)
    ours, of_labels = vqgan_jax.load(export), vqgan_jax.load(labels_export)
    images = np.stack([np.asarray(Image.open(p)) for p in sorted(scenes.glob("train/*"))])
    maps = np.stack(
        [np.asarray(Image.open(p)) for p in sorted(scenes.glob("segmentation/train/*"))]
    )
    images, maps = images[:, :, 2:18], maps[:, :, 2:18]
    whole = np.array(coordinate_tokens(16, 20, 2, 100, (0, 2, 16, 16)))
    for view in range(2):
        if view == 1:
            images, maps, whole = images[:, :, ::-1], maps[:, :, ::-1], whole[:, ::-1]
        edges = np.stack([canny_edges(image) for image in images])
        blurred = np.stack([low_resolution(image, 2) for image in images])
        for name, tokenizer, pictures in (
            ("", ours, images / np.float32(127.5) - 1),
            ("segmentation", of_labels, np.eye(5, dtype=np.float32)[maps]),
            ("edges", ours, edges / np.float32(127.5) - 1),
            ("low_resolution", ours, blurred / np.float32(127.5) - 1),
        ):
            expected = np.asarray(tokenizer.encode(pictures)).reshape(SCENES, 64)
            found = codes.gather(np.arange(SCENES), view, name)
            assert np.mean(found == expected) > 0.99, name
            assert len(np.unique(found)) > 3, name
        places = codes.gather(np.arange(SCENES), view, "coordinates")
        np.testing.assert_array_equal(places, np.tile(whole.ravel(), (SCENES, 1)))
    maps_info, scaled = codes.conditions["segmentation"], codes.conditions["low_resolution"]
    assert (maps_info.vocabulary, maps_info.grid) == (16, (8, 8))
    assert maps_info.fingerprint == of_labels.fingerprint and maps_info.image_key == "segmentation"
    assert (scaled.derive, scaled.scale, scaled.image_key) == ("low_resolution", 2, "")
    assert codes.conditions["coordinates"].vocabulary == 101


@pytest.mark.slow
def test_a_killed_pass_with_conditions_is_ended_by_two_processes(
    conditioned, export, labels_export, scenes, tmp_path
):
    values = condition_arguments(export, labels_export, scenes, tmp_path / "codes")
    names = {"splits": "split", "augmentations": "augment"}
    command = [
        f"--{names.get(k, k)}={','.join(v) if isinstance(v, list | tuple) else v}"
        for k, v in values.items()
    ]
    process = start(*command)
    wait_for_shards(process, tmp_path / "codes" / "train", 1)
    process.kill()
    runs.finish(process)
    assert not (tmp_path / "codes" / "train" / "manifest.json").exists()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(*command, process=(index, 2, port)) for index in range(2)]
    for code, output, errors in [runs.finish(process) for process in processes]:
        assert code == 0, f"{output}\n{errors}"
    assert contents(tmp_path / "codes") == contents(conditioned)


@pytest.mark.slow
def test_verify_and_info_have_conditions(conditioned, labels_export, tmp_path, capsys):
    (tmp_path / "train").mkdir()
    for name, content in contents(conditioned).items():
        (tmp_path / name).write_bytes(content)
    verify(str(tmp_path))
    print_codes(str(tmp_path))
    printed = capsys.readouterr().out
    assert "all 120 files are as they were written" in printed
    fingerprint = vqgan_jax.load(labels_export).fingerprint
    for line in (
        f"segmentation: 8x8 tokens a view, 16 different ones, by {fingerprint} in float32",
        "low_resolution: 8x8 tokens a view, 32 different ones, derived from the image, 2 times",
        "coordinates: 8x8 tokens a view, 101 different ones\n",
    ):
        assert line in printed
    path = tmp_path / "train" / "condition-edges-00007-of-00020.npy"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="1 of .* condition-edges-00007-of-00020.npy has another"):
        verify(str(tmp_path))


@pytest.mark.slow
def test_conditions_that_cannot_be_are_refused_in_one_line(
    conditioned, export, labels_export, scenes, tmp_path
):
    values = condition_arguments(export, labels_export, scenes, tmp_path / "codes")
    for conditions, words in (
        (["segmentation"], "it takes NAME=TOKENIZER"),
        ([f"edges:4={export}"], "it takes NAME=TOKENIZER"),
        (["coordinates=many"], "it takes NAME=TOKENIZER"),
        ([f"depth={export}"], "no pictures of the feature 'depth'"),
        ([f"edges={labels_export}"], "the tokenizer is one of label maps"),
        ([f"edges={export}"] * 2, "edges is there twice"),
        ([f"image={export}"], "cannot be called 'image'"),
        ([f"low_resolution:0={export}"], "is 0 times smaller"),
    ):
        with pytest.raises(DataError, match=words) as error:
            tokenize(**values | {"conditions": conditions})
        assert "\n" not in str(error.value)
    assert not (tmp_path / "codes").exists()
    coarse = tiny.config_of_tiny_model()
    coarse.model.channel_multipliers = (1, 1, 1)
    shapes = jax.eval_shape(lambda: tiny.initial_variables(coarse))
    write_export(tmp_path / "coarse", coarse, jax.tree.map(lambda x: np.ones(x.shape), shapes))
    change = {"conditions": [f"segmentation={tmp_path / 'coarse'}"], "resolution": 18}
    words = "factor 4 of the tokenizer of the condition segmentation does not divide .* 18"
    with pytest.raises(DataError, match=words):
        tokenize(**values | change)
    before = contents(conditioned)
    words = "its conditions is segmentation, edges, low_res.* and here it is segmentation, edges"
    with pytest.raises(DataError, match=words):
        tokenize(**values | {"output": conditioned, "conditions": values["conditions"][:2]})
    assert contents(conditioned) == before


# ---- Looking at what there is.


def test_verify_names_the_damaged_file(whole, tmp_path, capsys):
    for name, content in contents(whole[0]).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    verify(str(tmp_path))
    assert "all 120 files are as they were written" in capsys.readouterr().out
    path = tmp_path / "all" / "codes-00007-of-00060.npy"
    content = bytearray(path.read_bytes())
    content[-200] ^= 4
    path.write_bytes(content)
    line = fails(f"--verify={tmp_path}")
    assert "codes-00007-of-00060.npy has another SHA-256" in line and "codes-00008" not in line


def test_info_says_what_there_is(whole, export, photographs, capsys):
    print_codes(str(whole[0]))
    printed = capsys.readouterr().out
    codes = np.concatenate([np.load(p)[:, 0] for p in sorted(whole[0].glob("all/codes-*.npy"))])
    frequencies = np.bincount(codes.ravel(), minlength=32) / codes.size
    used, positive = np.mean(frequencies > 0), frequencies[frequencies > 0]
    perplexity = np.exp(-np.sum(positive * np.log(positive)))
    assert f"{used:.1%} used by the first view, with a perplexity of {perplexity:.1f}" in printed
    for words in (
        "120 at 32 pixels, split all",
        "2 classes",
        "2 of each: centre, centre_flip",
        "16x16 a view, of a codebook of 32, in 60 shards",
        vqgan_jax.load(export).fingerprint,
    ):
        assert words in printed


# ---- Fingerprints.


def changed(variables, name):
    """The variables with one array of them moved a little."""

    def change(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf + 1e-3 if path == name else leaf

    return jax.tree.map_with_path(change, variables)


def test_fingerprint_is_of_what_determines_codes():
    config = tiny.config_of_tiny_model(kind="ema")
    variables = tiny.initial_variables(config)
    fingerprint = Tokenizer(config, variables).fingerprint
    names = tiny.leaves(variables)
    decoding = ("params/decoder", "params/post_quant_conv", "codebook/quantize/counts")
    decoding = (*decoding, "codebook/quantize/sums")
    assert any(name.startswith(decoding) for name in names)
    for name in names:
        same = Tokenizer(config, changed(variables, name)).fingerprint == fingerprint
        assert same == name.startswith(decoding), name

    for key, value, same in (
        ("dtype", "bfloat16", True),
        ("dropout", 0.1, True),
        ("attention_resolutions", (16,), False),
        ("num_groups", 16, False),
        ("norm", "layer", False),
    ):
        other = tiny.config_of_tiny_model(kind="ema")
        other.model[key] = value
        assert (Tokenizer(other, variables).fingerprint == fingerprint) == same, key


def test_fingerprint_stays_what_it_is():
    """A newer program must know the codes of an older one."""
    config = tiny.config_of_tiny_model()
    shapes = jax.eval_shape(lambda: tiny.initial_variables(config))
    constant = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
    fingerprint = Tokenizer(config, constant).fingerprint
    assert fingerprint == "3fea20518465a18ceb0f66e9d8b02b069646a1a1c768ac155ca89ba0a5144d20"
