"""Metrics from the device to the disk, and the progress line."""

import io
import json
import os
import signal
import socket
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import programs
from vqgan_jax.configuration import ConfigError
from vqgan_jax.training.logging import (
    DeferredMetrics,
    MetricWriter,
    NonFiniteError,
    check_finite,
)
from vqgan_jax.training.phases import DATA, EVALUATION, PhaseClock
from vqgan_jax.training.progress import Progress, format_duration


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_events(workdir):
    """All TensorBoard events: records of (length, checksum, bytes, checksum)."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[12 + length + 4 :]
    return events


def scalars(workdir):
    return [
        (event.step, value.tag, value.simple_value)
        for event in read_events(workdir)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def test_float32_metrics_come_back_bit_for_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 400, dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.append(values[np.isfinite(values)], np.float32([1e-45, 3.4028235e38, -0.0, 0.1]))
    writer = MetricWriter(tmp_path)
    writer.write(3, {f"m{index}": value for index, value in enumerate(values)})
    writer.close()
    (line,) = read_lines(tmp_path)
    assert line.pop("step") == 3
    back = np.array(list(line.values()), np.float32)
    np.testing.assert_array_equal(back.view(np.uint32), values.view(np.uint32))


def test_lines_are_strict_json_with_infinities(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"psnr": np.inf, "low": -np.inf, "bad": np.nan})
    writer.close()

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [float(line["psnr"]), float(line["low"])] == [np.inf, -np.inf]
    assert np.isnan(float(line["bad"]))


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 0.5})
    writer.write(2, {"loss": 0.25})
    assert read_lines(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    writer.close()


def test_tensorboard_events_hold_the_scalars_and_the_config(tmp_path):
    writer = MetricWriter(tmp_path, config_json='{"seed": 7}')
    writer.write(10, {"loss": 0.5, "evaluation/psnr": 21.25})
    writer.close()
    assert scalars(tmp_path) == [(10, "loss", 0.5), (10, "evaluation/psnr", 21.25)]
    assert any(b'"seed": 7' in event.SerializeToString() for event in read_events(tmp_path))


def test_resume_drops_later_lines_and_purges_later_events(tmp_path):
    for resume_step, steps in ((None, range(5, 35, 5)), (20, range(25, 45, 5))):
        writer = MetricWriter(tmp_path, resume_step=resume_step)
        for step in steps:
            writer.write(step, {"loss": float(step)})
        writer.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # within the same second
    assert len(scalars(tmp_path)) == 6 + 4
    # A start mark at step n tells TensorBoard to forget the events of steps from n on.
    starts = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert starts == [21]
    assert [path.name for path in tmp_path.glob("metrics.jsonl*")] == ["metrics.jsonl"]


@pytest.mark.parametrize("resume_step", [None, 10])
@pytest.mark.parametrize("half", ['{"step": 10, "lo', '{"step": 1', "{", "\x00\x00"])
def test_half_a_line_at_the_end_is_dropped(tmp_path, resume_step, half):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.5}\n' + half)
    writer = MetricWriter(tmp_path, resume_step=resume_step)
    writer.write(10, {"loss": 2.0})
    writer.close()
    assert read_lines(tmp_path) == [{"step": 5, "loss": 1.5}, {"step": 10, "loss": 2.0}]


def test_a_whole_last_line_without_its_newline_stays(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.5}')
    writer = MetricWriter(tmp_path, resume_step=5)
    writer.write(10, {"loss": 2.0})
    writer.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [5, 10]


@pytest.mark.parametrize("foreign", ["loss,step\n", "[1, 2]\n", '{"loss": 1}\n', "\n"])
def test_a_damaged_file_is_set_aside_and_its_good_lines_are_kept(tmp_path, foreign, caplog):
    content = '{"step": 1}\n' + foreign + '{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(content)
    MetricWriter(tmp_path, resume_step=1).close()
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == content
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert "line 2 is no JSON object with a step" in caplog.text


def test_a_killed_process_leaves_all_its_lines(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from vqgan_jax.training.logging import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1])\n"
        "for step in range(100):\n"
        "    writer.write(step, {'loss': step / 3})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = programs.run([sys.executable, "-c", program, str(tmp_path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert read_lines(tmp_path) == [{"step": step, "loss": step / 3} for step in range(100)]


def test_pictures_are_png_files_and_events(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    writer = MetricWriter(tmp_path)
    writer.write_images(1200, "reconstructions", picture)
    writer.write_images(1200, "validation/reconstructions", picture)
    writer.close()
    for name in ("reconstructions", "validation/reconstructions"):
        path = tmp_path / "images" / f"{name}_00001200.png"
        np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
    images = [
        value.image
        for event in read_events(tmp_path)
        for value in event.summary.value
        if value.HasField("image")
    ]
    assert [(image.height, image.width) for image in images] == [(6, 9), (6, 9)]
    decoded = Image.open(io.BytesIO(images[0].encoded_image_string))
    np.testing.assert_array_equal(np.asarray(decoded), picture)


def test_other_processes_write_nothing(tmp_path):
    program = (
        "import sys, jax, numpy\n"
        "rank = int(sys.argv[1])\n"
        "jax.distributed.initialize(f'localhost:{sys.argv[2]}', 2, rank)\n"
        "from vqgan_jax.training.logging import MetricWriter\n"
        "from vqgan_jax.training.progress import Progress\n"
        "writer = MetricWriter(f'{sys.argv[3]}/{rank}')\n"
        "writer.write(1, {'loss': 0.5})\n"
        "writer.write_images(1, 'grid', numpy.zeros((2, 2, 3), numpy.uint8))\n"
        "Progress(10, 4).report(1, {'loss': 0.5})\n"
        "writer.close()\n"
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        programs.Program(
            [sys.executable, "-c", program, str(rank), str(port), str(tmp_path)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert read_lines(tmp_path / "0") == [{"step": 1, "loss": 0.5}]
    assert not (tmp_path / "1").exists()
    assert "loss 0.5" in printed[0] and printed[1] == ""


def test_a_missing_wandb_is_named_before_anything_is_touched(tmp_path, monkeypatch):
    content = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(content)
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    with pytest.raises(ConfigError, match=r'pip install "vqgan_jax\[wandb\]"'):
        MetricWriter(tmp_path, wandb_project="tokenizers", resume_step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for resume_step in (None, 1):
        writer = MetricWriter(
            tmp_path, wandb_project="test", config_json='{"seed": 7}', resume_step=resume_step
        )
        writer.write(1, {"loss": 0.5})
        writer.write_images(1, "grid", np.zeros((4, 4, 3), np.uint8))
        writer.close()
        ids.append((tmp_path / "wandb_id.txt").read_text())
    assert ids[0] == ids[1] != "\n"
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) >= 1


def test_deferred_metrics_come_one_step_late_and_exact():
    deferred = DeferredMetrics()

    @jax.jit
    def step(x):
        return {"loss": x / 3, "norms": {"generator": (x * 7).astype(jnp.bfloat16)}}

    assert deferred.push(1, step(jnp.float32(1))) is None
    found = [deferred.push(2, step(jnp.float32(2))), deferred.flush()]
    for number, (late_step, metrics) in enumerate(found, 1):
        assert late_step == number
        assert metrics == {
            "loss": float(np.float32(number) / np.float32(3)),
            "norms/generator": 7.0 * number,
        }
        assert all(type(value) is float for value in metrics.values())
    assert deferred.flush() is None


def test_push_does_not_wait_for_the_step_that_it_takes():
    @jax.jit
    def slow(matrix):
        return jax.lax.fori_loop(0, 300, lambda _, power: power @ matrix, matrix).sum()

    matrix = jnp.eye(512)
    slow(matrix).block_until_ready()
    deferred = DeferredMetrics()
    loss = slow(matrix)
    assert deferred.push(1, {"loss": loss}) is None
    assert not loss.is_ready()
    assert deferred.flush() == (1, {"loss": 512.0})


def test_non_finite_metrics_stop_with_step_name_and_advice():
    check_finite(7, {"l1": 0.5, "psnr": 20.0})
    with pytest.raises(NonFiniteError) as error:
        check_finite(1234, {"l1": 0.5, "codebook": float("nan"), "adversarial": -float("inf")})
    message = str(error.value)
    assert message.startswith("Step 1234: codebook is nan, adversarial is -inf.")
    for advice in ("learning_rate", "discriminator.start", "clip_norm", "float32"):
        assert advice in message
    assert "\n" not in message and isinstance(error.value, ValueError)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_the_progress_line():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(1000, 16, 100, stream, PhaseClock(clock=clock))
    clock.now += 60.0  # 50 steps
    progress.report(150, {"l1": 0.123456})
    with progress.clock.phase(DATA):
        clock.now += 1.0
    clock.now += 9.0
    with progress.clock.phase(EVALUATION):
        clock.now += 40.0
    speed = progress.report(200, {"l1": 0.1, "lpips": 0.4})
    assert speed == {"images_per_second": 80.0, "data_wait": 0.1}
    assert stream.getvalue().splitlines() == [
        # 50 steps x 16 images in 60 s; 850 steps left at 1.2 s each
        "step  150/1000   15.0%  l1 0.1235  13.3 images/s  data wait 0%  left 17:00",
        # 50 x 16 in 10 s without the pause; 800 left at 1.1 s each with it, as the 100 were
        "step  200/1000   20.0%  l1 0.1  lpips 0.4  80.0 images/s  data wait 10%  left 14:40",
    ]


def test_compilation_and_what_was_before_the_first_step_count_nowhere():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(1000, 16, 100, stream, PhaseClock(clock=clock))
    clock.now += 500.0
    progress.begin(101)
    clock.now += 40.0
    progress.clock.note_compilation(clock.now - 30.0, clock.now)
    speed = progress.report(201, {})  # 100 steps in 10 s, 799 to come
    assert speed == {"images_per_second": 160.0, "data_wait": 0.0}
    assert stream.getvalue().endswith("left 01:20\n")


def test_the_last_line_has_nothing_left_and_no_window_is_no_error():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10, 4, stream=stream, clock=PhaseClock(clock=clock))
    clock.now += 1.0
    progress.report(10, {})
    progress.report(10, {})
    first, second = stream.getvalue().splitlines()
    assert first == "step 10/10  100.0%  40.0 images/s  data wait 0%  left 00:00"
    assert second == "step 10/10  100.0%  0.0 images/s  data wait 0%  left 00:00"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (59.6, "01:00"), (3599.4, "59:59"), (3600, "1:00:00"), (359_999, "99:59:59")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
