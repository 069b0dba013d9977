import os
import sys

import numpy as np
import pytest

import parity
import programs

FILES = sorted(parity.GOLDENS.glob("taming_*.npz"))


def replay(path):
    """The command, optimised: in float64 convolutions have no fast path, and these are not tiny."""
    command = [sys.executable, parity.__file__, str(path)]
    environment = os.environ | {"XLA_FLAGS": ""}
    return programs.run(command, env=environment, timeout=600)


QUICK = ("taming_gumbel", "taming_gpt")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in FILES
    ],
)
def test_replay_holds(path):
    result = replay(path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].startswith("worst: ")


@pytest.mark.slow
def test_replay_fails_where_a_number_is_wrong(tmp_path):
    with np.load(parity.GOLDENS / "taming_gumbel.npz") as file:
        golden = {key: file[key] for key in file.files}
    golden["fwd/quant"] = golden["fwd/quant"] * 1.001
    np.savez(tmp_path / "other_name.npz", **golden)
    result = replay(tmp_path / "other_name.npz")
    assert result.returncode == 1
    assert "worst: fwd/quant" in result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_forward_and_first_step_hold_in_float32(tmp_path):
    """Before an update of Adam has amplified rounding, training's own precision is enough."""
    with np.load(parity.GOLDENS / "taming_vqgan.npz") as file:
        golden = {key: file[key] for key in file.files if not key.startswith(("final", "step"))}
        first = {key: file[key] for key in file.files if key.startswith("step0/g/")}
    golden["x"] = golden["x"][:1]
    np.savez(tmp_path / "first.npz", **golden, **first)
    early = [
        comparison
        for comparison in parity.replay(tmp_path / "first.npz")
        if comparison.key.startswith(("fwd/", "step0/g/"))
    ]
    assert len(early) > 150
    assert max(comparison.share for comparison in early) < 1
