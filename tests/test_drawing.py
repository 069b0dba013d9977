"""What is shown while images form: what is there already, and how long it still takes."""

import types

import numpy as np
import pytest

from vqgan_jax import drawing
from vqgan_jax.conditions.layouts import Layout, SceneObject
from vqgan_jax.drawing import Drawing, Film

GRID, WINDOW = (6, 4), (4, 4)


@pytest.fixture
def sheet():
    """6 x 4 codes through a window of 4 x 4: code (i, j) is drawn in step 4 i + j."""
    config = types.SimpleNamespace(model=types.SimpleNamespace(grid=WINDOW))
    generator = types.SimpleNamespace(config=config, size_of=lambda grid: (24, 16))
    return Drawing(generator, GRID, {}, {})


def keep(sheet, mask):
    sheet._known, sheet._known_mask = np.zeros(24, int), mask.reshape(-1)


def test_what_is_drawn_after_some_steps(sheet):
    assert np.array_equal(sheet.is_drawn(6).ravel(), np.arange(24) < 6)
    keep(sheet, np.indices(GRID)[0] >= 4)
    assert np.array_equal(sheet.is_drawn(6).ravel(), (np.arange(24) < 6) | (np.arange(24) >= 16))


def test_steps_without_work_are_those_whose_codes_are_known(sheet):
    assert [sheet.work(step) for step in (0, 7, 24)] == [0, 7, 24]
    keep(sheet, np.indices(GRID)[0] < 3)
    assert [sheet.work(step) for step in (0, 12, 14, 24)] == [0, 0, 2, 12]


def test_time_left_leaves_out_compilation_and_known_steps(sheet, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(drawing.time, "monotonic", lambda: clock[-1])
    keep(sheet, np.indices(GRID)[0] < 3)
    film, codes = Film(sheet, show=False), np.zeros((1, *GRID), int)
    # The first step with work is that in which the program was compiled, 100 seconds.
    for seconds, step in ((1.0, 12), (101.0, 14), (121.0, 18), (141.0, 22), (151.0, 24)):
        clock.append(seconds)
        film(step, 24, codes)
    assert capsys.readouterr().out.splitlines() == [
        "step 14/24",
        "step 18/24  left 00:30",
        "step 22/24  left 00:10",
        "step 24/24  left 00:00",
    ]


def test_layouts_have_one_name_in_every_process(sheet):
    """Sets of words are in another order there."""
    item = SceneObject(3, (0.0, 0.25, 0.5, 0.5), frozenset({"occluded", "group"}))
    assert drawing._bytes_of_layout(Layout((item,))) == (
        b"([(3, (0.0, 0.25, 0.5, 0.5), ['group', 'occluded'])], (0.0, 0.0, 1.0, 1.0))"
    )
