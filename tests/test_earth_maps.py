"""Cut-outs of the Earth, and the figures of the benchmark that reads land cover from pictures."""

import importlib.util
import pathlib

import numpy as np
import pytest

from vqgan_jax.data.earth import GRID
from vqgan_jax.data.earth_maps import cut
from vqgan_jax.errors import DataError


@pytest.fixture(scope="module")
def land_cover():
    path = pathlib.Path(__file__).parent.parent / "benchmarks" / "land_cover.py"
    spec = importlib.util.spec_from_file_location("land_cover", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cut_is_the_place_and_goes_around_the_date_line():
    rows, columns = np.indices(GRID)
    part = cut({"map": columns}, west=178, north=10, height=4, width=60)["map"]
    assert part.shape == (4, 60)
    np.testing.assert_array_equal(part[0], [*range(5370, 5400), *range(30)])
    part = cut({"map": rows}, west=-180, north=10, height=4, width=2)["map"]
    np.testing.assert_array_equal(part[:, 0], 1200 + np.arange(4))


@pytest.mark.parametrize("place", [(0, 91, 4, 4), (0, -89.9, 4, 4), (181, 0, 4, 4), (0, 0, 4, 0)])
def test_what_is_not_on_the_earth_is_one_line(place):
    with pytest.raises(DataError, match="are not on the Earth, which has 5400 x 2700") as error:
        cut({"map": np.zeros(GRID)}, *place)
    assert "\n" not in str(error.value)


def test_neighbourhoods_are_those_of_numpy(land_cover):
    image = np.random.default_rng(0).integers(0, 256, (12, 15, 3), np.uint8)
    found = land_cover.neighbourhoods(image)
    around = image[1:10, 3:12].reshape(-1, 3) / 255  # of row 5, column 7
    np.testing.assert_allclose(found[5, 7], [*around.mean(0), *around.std(0)], atol=1e-9)


def test_classifier_reads_what_gaussians_say(land_cover):
    random = np.random.default_rng(1)
    labels = random.integers(3, 5, 20000)
    points = random.normal(size=(20000, 2)) * np.where(labels == 3, 1.0, 2.0)[:, None]
    read = land_cover.GaussianClassifier(points, labels)(points)
    # The two densities are equal at r^2 = 8/3 log 4, a little more than the samples know.
    inside = (points**2).sum(axis=1) < 8 / 3 * np.log(4)
    assert ((read == 3) == inside).mean() > 0.98


def test_agreement_and_borders_by_hand(land_cover):
    true, read = np.array([[0, 0], [1, 1]]), np.array([[0, 1], [1, 1]])
    assert land_cover.agreement(true, read) == (0.75, 0.5 * 0.25 + 0.5 * 0.75)
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 2:], image[:, 4:] = 1, 7
    # One of two lines by 6, one of four by 1, and all others.
    assert land_cover.border_gradients(image, 4, 2) == (3.0, 0.25, 0.0)
