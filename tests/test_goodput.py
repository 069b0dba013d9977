"""What the time of a run goes to: all of it is told, over stops and crashes."""

import json
import signal
import time

import jax
import jax.numpy as jnp
import pytest

import training_runs as runs
from vqgan_jax.training import phases
from vqgan_jax.training.goodput import DOWN, GOODPUT_FILE, LOST, Goodput
from vqgan_jax.training.phases import CHECKPOINTS, DATA, EVALUATION, START, STEPS, PhaseClock


class Clock:
    """Stands still until it is told otherwise."""

    now = 1000.0

    def __call__(self):
        return self.now


def nonzero(seconds):
    return {phase: value for phase, value in seconds.items() if value}


def test_each_moment_is_in_one_phase():
    time_of = Clock()
    clock = PhaseClock(START, before=5.0, clock=time_of)
    time_of.now += 2.0
    clock.enter(STEPS)
    time_of.now += 10.0
    with clock.phase(EVALUATION):
        time_of.now += 3.0
        with clock.phase(DATA):
            time_of.now += 1.0
        time_of.now += 3.0
    time_of.now += 20.0
    with pytest.raises(KeyError), clock.phase(CHECKPOINTS):
        time_of.now += 4.0
        raise KeyError
    assert nonzero(clock.seconds()) == {
        START: 7.0,
        STEPS: 30.0,
        EVALUATION: 6.0,
        DATA: 1.0,
        CHECKPOINTS: 4.0,
    }


def test_compilation_is_taken_off_the_phase_that_it_happened_in():
    time_of = Clock()
    clock = PhaseClock(STEPS, clock=time_of)
    time_of.now += 10.0
    clock.note_compilation(2.0, 3.0)  # two traces within the trace of what calls them
    clock.note_compilation(4.0, 5.0)
    clock.note_compilation(1.0, 6.0)
    clock.note_compilation(6.0, 9.0)
    assert nonzero(clock.seconds()) == {STEPS: 2.0, phases.COMPILE: 8.0}


def test_what_jax_compiles_counts():
    clock = PhaseClock(STEPS)
    function = jax.jit(lambda x: jnp.linalg.svd(x @ x)[0] * 3.25)
    with clock.watching_compiler():
        function(jnp.ones((7, 7))).block_until_ready()
    seconds = clock.seconds()
    assert seconds[phases.COMPILE] > 0.005 and seconds[STEPS] > 0  # tracing alone takes longer
    jax.jit(lambda x: jnp.linalg.svd(x @ x)[0] * 4.25)(jnp.ones((7, 7)))  # nobody looks
    assert clock.seconds()[phases.COMPILE] == seconds[phases.COMPILE]


def test_lost_steps_and_the_time_between_starts(tmp_path):
    """A start that does 20 s after its last checkpoint, 50 s of nothing, and another start."""
    time_of = Clock()
    clock = PhaseClock(START, clock=time_of)
    first = Goodput(tmp_path, clock, 0, time_of)
    time_of.now += 5.0
    clock.enter(STEPS)
    time_of.now += 100.0
    with clock.phase(CHECKPOINTS):
        time_of.now += 1.0
    first.mark(10)
    with clock.phase(EVALUATION):
        time_of.now += 8.0
    time_of.now += 12.0
    first.mark(20)  # which was never finished
    assert first.line() == (
        "goodput 89%: steps 01:52, evaluation 00:08, checkpoints 00:01, start 00:05; 1 start"
    )
    time_of.now += 50.0
    clock = PhaseClock(START, before=3.0, clock=time_of)
    second = Goodput(tmp_path, clock, 10, time_of)
    clock.enter(STEPS)
    time_of.now += 23.0
    expected = {STEPS: 123.0, CHECKPOINTS: 1.0, START: 8.0, LOST: 20.0, DOWN: 47.0}
    assert nonzero(second.seconds()) == expected
    assert sum(expected.values()) == time_of.now - 1000.0
    assert second.line() == (
        "goodput 62%: steps 02:03, checkpoints 00:01, start 00:08, lost 00:20, down 00:47; 2 starts"
    )
    shares = second.shares()
    assert shares["goodput/steps"] == 123.0 / 199.0 and sum(shares.values()) == pytest.approx(1.0)
    second.write()
    third = Goodput(tmp_path, PhaseClock(START, clock=time_of), 0, time_of)  # from the start again
    assert nonzero(third.seconds()) == {START: 8.0, LOST: 144.0, DOWN: 47.0}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"starts": 1}'])
def test_a_file_that_is_not_whole_counts_as_none(tmp_path, content):
    (tmp_path / GOODPUT_FILE).write_text(content)
    goodput = Goodput(tmp_path, PhaseClock(START, clock=Clock()), 0)
    assert sum(goodput.seconds().values()) == 0.0 and goodput.line().endswith("; 1 start")


def stored(workdir):
    return json.loads((workdir / GOODPUT_FILE).read_text())


@pytest.mark.slow
def test_a_run_that_is_stopped_killed_and_finished(run_inputs, tmp_path):
    workdir = tmp_path / "run"
    slow = ("--config.model.resolution=32", "--config.loss.perceptual=1.0")  # steps to be seen
    began = time.time()
    process = runs.start(workdir, *slow)
    runs.wait_for_step(process, workdir, 3)
    process.send_signal(signal.SIGTERM)
    code, output, _ = runs.finish(process)
    assert code == 75
    assert output.splitlines()[-1].startswith("goodput ") and output.endswith("; 1 start\n")
    first, step = stored(workdir), runs.steps(workdir)[-1]
    assert first["starts"] == 1 and first["seconds"][LOST] == first["seconds"][DOWN] == 0.0
    assert min(first["seconds"][name] for name in (START, STEPS, phases.COMPILE)) > 0.0

    time.sleep(2.0)
    late = ("--config.training.checkpoint_every=100", "--config.training.evaluate_every=100")
    process = runs.start(workdir, *slow, *late)
    runs.wait_for_step(process, workdir, step + 3)
    process.kill()
    runs.finish(process)
    second = stored(workdir)
    assert second["starts"] == 2 and second["seconds"][DOWN] >= 2.0
    assert second["seconds"][STEPS] > first["seconds"][STEPS]

    output, _ = runs.run(workdir, *slow)
    ended, third = time.time(), stored(workdir)
    assert f"Going on from step {step} " in output
    line = next(line for line in output.splitlines() if line.startswith("goodput "))
    assert line.endswith("; 3 starts") and " down " in line
    of_second = sum(
        second["seconds"][name] - first["seconds"][name] for name in (STEPS, DATA, CHECKPOINTS)
    )
    assert 0.0 < third["seconds"][LOST] == pytest.approx(of_second, abs=0.5)
    # All of the time from the first command to the end of the last, but for Python's own start.
    first_start = first["written"] - sum(first["seconds"].values())
    assert began < first_start and third["written"] < ended
    assert sum(third["seconds"].values()) == pytest.approx(third["written"] - first_start, abs=0.5)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    shares = [{k: v for k, v in line.items() if k.startswith("goodput/")} for line in lines]
    shares = [found for found in shares if found]
    assert len(shares) == 2  # evaluations, at steps 7 and 14
    assert all(sum(found.values()) == pytest.approx(1.0) for found in shares)
    assert 0.0 < shares[-1]["goodput/steps"] < 1.0 and shares[-1]["goodput/lost"] > 0.0
