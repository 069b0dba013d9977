"""Training is the same computation on one device, on several, and on two processes.

All in float64; see `training_runs.assert_close_metrics`.
"""

import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import training_runs as runs
import vqgan_jax
from tiny_config import get_config
from vqgan_jax.data.sources import open_source
from vqgan_jax.data.transforms import evaluation_transform
from vqgan_jax.training.loop import train

LAST = 14
GLOBAL_STATISTICS = "discriminator/batch_stats/"


def ten_steps(**discriminator):
    """With what its discriminator has otherwise."""
    config = get_config("float64")
    config.discriminator.update(discriminator)
    config.training.num_steps = 10
    config.training.evaluate_every = 100  # and at the end
    config.training.checkpoint_every = 100
    return config


def assert_close_statistics(workdir, reference, step):
    """BatchNorm's statistics, of images of which each device sees only a part."""
    ours, theirs = runs.state(workdir, step), runs.state(reference, step)
    names = [name for name in theirs if name.startswith(GLOBAL_STATISTICS)]
    for name in names:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)
    return names


@pytest.mark.slow
@pytest.mark.xdist_group("processes")  # as in `test_hosts`
def test_two_processes_stop_together_and_go_on(reference_run_in_float64, tmp_path):
    """Of four devices each; one of them is told to stop, and both do, at the same step."""
    workdir = tmp_path / "run"
    processes = runs.start_several(2, workdir, devices=4, dtype="float64")
    runs.wait_for_step(processes[0], workdir, 6)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        code, _, errors = runs.finish(process)
        assert code == 75, errors
    assert 6 <= runs.steps(workdir)[-1] < LAST
    for process in runs.start_several(2, workdir, devices=4, dtype="float64"):
        code, output, errors = runs.finish(process)
        assert code == 0, errors
    runs.assert_close_metrics(workdir, reference_run_in_float64)
    assert len(assert_close_statistics(workdir, reference_run_in_float64, LAST)) == 2


@pytest.mark.slow
def test_split_parameters(float64, reference_run_in_float64, tmp_path, capsys):
    """A run of one device goes on with kernels and their moments split over axes of a mesh."""
    workdir = runs.copy_until(reference_run_in_float64, tmp_path / "run", 4)
    config = get_config("float64")
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.sharding_rules = (
        (r"encoder.*(conv\w*|norm)\d*/kernel$", ("fsdp",)),
        (r"(conv\w*|norm)\d*/kernel$", ("tensor",)),
    )
    train(config, workdir, jax.devices())
    assert "Going on from step 4 " in capsys.readouterr().out
    runs.assert_close_metrics(workdir, reference_run_in_float64)
    assert len(assert_close_statistics(workdir, reference_run_in_float64, LAST)) == 2
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        path = workdir / "checkpoints" / str(LAST) / "state"
        stored = checkpointer.metadata(path).item_metadata.tree
    adam = stored["generator"]["opt_state"][0]
    for tree in (stored["generator"]["params"], adam["mu"], adam["nu"]):
        for network, axis in (("encoder", "fsdp"), ("decoder", "tensor")):
            kernel = tree[network]["conv_in"]["kernel"]
            assert tuple(kernel.sharding.partition_spec) == (None, None, None, axis)


@pytest.mark.slow
def test_accumulated_gradients(float64, run_inputs, tmp_path):
    """One batch of 8, or four of 2 before the update; nothing here sees a batch as a whole."""
    for count in (1, 4):
        config = ten_steps(norm="group", adaptive_weight=False)
        config.optimizer.accumulate = count
        train(config, tmp_path / str(count), jax.devices()[:1])
    # The codes that a batch uses are those of a micro-batch.
    runs.assert_close_metrics(tmp_path / "4", tmp_path / "1", ignored=("batch_codebook",))


def test_evaluation_counts_each_image_once(reference_run):
    """The figures of the last evaluation, computed again image by image."""
    figures = runs.metrics(reference_run)[-1]
    assert figures["step"] == LAST and figures["validation/images"] == 11
    config = get_config()
    source = open_source(config.data.name, "validation")
    transform = evaluation_transform(config, config.model.resolution)
    tokenizer = vqgan_jax.load(reference_run)
    l1, l2, seen = [], [], set()
    for i in range(len(source)):
        image = transform(source.read(i)["image"])
        codes = tokenizer.encode(image[None] / np.float32(127.5) - 1)
        made = np.asarray(tokenizer.decode(codes))[0]
        made = np.round((np.clip(made, -1, 1) + 1) * 127.5)
        difference = (made - image) / 127.5
        l1.append(np.abs(difference).mean())
        l2.append(np.square(difference).mean())
        seen |= set(np.asarray(codes).ravel().tolist())
    assert figures["validation/l1"] == pytest.approx(np.mean(l1), rel=1e-4)
    assert figures["validation/l2"] == pytest.approx(np.mean(l2), rel=1e-4)
    assert figures["validation/codebook_usage"] == pytest.approx(len(seen) / 16)
