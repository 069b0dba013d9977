"""Exports and small files of runs: damage is seen, and no run is lost by it."""

import json
import shutil

import jax
import numpy as np
import pytest

import tiny
import vqgan_jax
from vqgan_jax.checkpoints.checksums import CHECKSUMS
from vqgan_jax.checkpoints.damage import set_aside
from vqgan_jax.describe import describe
from vqgan_jax.training import model_report
from vqgan_jax.training.checkpoints import CheckpointError, Checkpoints, write_export


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "export"
    config = tiny.config_of_tiny_model()
    write_export(directory, config, tiny.initial_variables(config))
    return directory


@pytest.fixture
def export(made, tmp_path):
    shutil.copytree(made, tmp_path / "export")
    return tmp_path / "export"


def refused(path):
    with pytest.raises(CheckpointError) as error:
        vqgan_jax.load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def test_damage_of_each_file_is_seen_and_named(export):
    files = [path for path in export.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        changed = bytearray(content)
        changed[len(content) // 2] ^= 0x10
        for damage in (bytes(changed), content[: len(content) // 2], b"", None):
            path.unlink()
            if damage == content.strip():  # without the last line's end
                damage = b"{}"
            if damage is not None:
                path.write_bytes(damage)
            if path.name == CHECKSUMS and damage is None:
                vqgan_jax.load(export)  # as exports of before
            else:  # a changed name in the list is that of another file
                assert path.name in (line := refused(export)) or path.name == CHECKSUMS, line
            path.write_bytes(content)
    (export / "variables" / "more").write_text("x")
    assert "more is no file of this export" in refused(export)


def test_exports_of_before_load_with_a_line(export, caplog):
    (export / CHECKSUMS).unlink()
    vqgan_jax.load(export)
    vqgan_jax.load(export)
    assert caplog.text.count("has no checksums") == 1


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("model", {"channels": 64}),
        ("model", {"num_res_blocks": 64}),
        ("model", {"channel_multipliers": [1] * 10**5}),
        ("model", {"num_res_blocks": 10**9}),
        ("model", {"norm": "none"}),
        ("model", {"vit": None}),
        ("quantizer", {"codebook_size": 2**24}),
        ("quantizer", {"kind": "fsq"}),
    ],
)
def test_configs_that_do_not_fit_their_weights(export, section, changes):
    (export / CHECKSUMS).unlink()
    config = json.loads((export / "config.json").read_text())
    (config["model"] if section == "model" else config["model"][section]).update(changes)
    (export / "config.json").write_text(json.dumps(config))
    assert str(export) in refused(export)


def test_what_is_said_of_an_export(export):
    report = describe(str(export))
    leaves = tiny.leaves(vqgan_jax.load(export).variables["params"])
    assert report["kind"] == "export" and report["checksums"]
    assert report["parameters"] == sum(np.size(leaf) for leaf in leaves.values())
    assert (report["stage"], report["model"]["factor"]) == ("tokenizer", 2)


def test_nothing_is_lost_by_setting_aside(tmp_path, caplog):
    for content in ("a", "b", "c"):
        (tmp_path / "x.json").write_text(content)
        set_aside(tmp_path / "x.json", "cut", "another is made")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["x.json.damaged", "x.json.damaged-2", "x.json.damaged-3"]
    assert (
        "is damaged (cut); it is renamed to x.json.damaged-3, and another is made." in caplog.text
    )


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"lpips": "x"}', "\x00", None])
def test_figures_of_a_checkpoint_that_cannot_be_read(tmp_path, damage):
    config = tiny.config_of_tiny_model()
    state = {"step": np.int32(3), "w": np.arange(4.0)}
    checkpoints = Checkpoints(tmp_path, config)
    for step in (1, 2):
        checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state), {"lpips": 1.0 / step})
    checkpoints.close()
    file = tmp_path / "checkpoints" / "2" / "metrics" / "metrics"
    file.unlink()
    if damage is not None:
        file.write_text(damage)
    checkpoints = Checkpoints(tmp_path, config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=device), state
    )
    step, restored = checkpoints.restore(abstract)
    checkpoints.close()
    assert step == 2 and np.array_equal(restored["w"], state["w"])


@pytest.mark.parametrize("content", ["[]", "{}", '{"psnr": "x"}', "x", ""])
def test_an_evaluation_that_is_damaged_is_not_shown(tmp_path, content):
    checkpoints = Checkpoints(tmp_path, tiny.config_of_tiny_model())
    state = {"generator": {"params": {"w": np.zeros(2)}}}
    checkpoints.save(1, state, {"lpips": 1.0})
    checkpoints.close()
    (tmp_path / "evaluation.json").write_text(content)
    report = describe(str(tmp_path))
    assert report["evaluation"] is None and report["steps"] == [1]
    assert not any(line.startswith("  evaluation") for line in model_report.lines(report))
