"""How well a picture of the Earth agrees with the land-cover map that it was drawn from.

    python benchmarks/land_cover.py --map=maps/segmentation.png --pictures=samples/000000.png,maps/image.png

Prints a line of JSON for each picture. A classifier reads the land cover from the picture: one
Gaussian for each class over the colours around a pixel (their mean and deviation over 9x9 pixels,
in three channels), fitted to the photograph of the training longitudes of `earth`. `agreement` is
the share of the map's pixels that it reads as the map has them; `chance` is that share for a map
with the same share of classes whose pixels lie anywhere. Of the 17 classes, those that are nearly
the same to the eye make one group in `agreement_of_groups`: forests, shrubs and savannas, grass and
crops, water and wetland, snow, barren and urban.

`gradient_at_windows`, `gradient_at_codes` and `gradient_elsewhere` are the mean steps between
neighbouring pixels across the lines that are multiples of `--window` pixels, across the other borders
of codes, multiples of `--code`, and across all other lines. The first two are alike where nothing
shows that windows slid over the picture; the last differs from them as far as codes show.
"""  # noqa: E501

import argparse
import json

import numpy as np
from PIL import Image

from vqgan_jax.data.earth import BANDS, CLASS_NAMES, LATITUDES, PIXELS_PER_DEGREE, load_rasters
from vqgan_jax.data.earth_maps import cut
from vqgan_jax.data.packages import default_data_dir

NUM_CLASSES, SIDE = len(CLASS_NAMES), 9
GROUPS = np.array([0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 0, 3, 5, 3, 4, 5])


def neighbourhoods(image: np.ndarray) -> np.ndarray:
    """uint8 `(H, W, 3)` -> `(H, W, 6)`: mean and deviation of each channel around each pixel."""
    padded = np.pad(image / 255.0, ((SIDE // 2,) * 2,) * 2 + ((0, 0),), mode="reflect")

    def mean(x):
        sums = np.pad(x.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
        corners = sums[SIDE:, SIDE:] - sums[:-SIDE, SIDE:] - sums[SIDE:, :-SIDE]
        return (corners + sums[:-SIDE, :-SIDE]) / SIDE**2

    means = mean(padded)
    deviations = np.sqrt(np.maximum(mean(padded**2) - means**2, 0.0))
    return np.concatenate([means, deviations], axis=-1)


class GaussianClassifier:
    """One Gaussian a class, and the classes' shares."""

    def __init__(self, points: np.ndarray, labels: np.ndarray):
        """Fitted to points `(N, D)` with labels `(N,)`."""
        self.classes = [c for c in range(NUM_CLASSES) if np.count_nonzero(labels == c) > 100]
        self._forms = []
        for c in self.classes:
            own = points[labels == c]
            covariance = np.cov(own.T) + 1e-6 * np.eye(own.shape[1])
            shift = np.log(len(own) / len(points)) - 0.5 * np.linalg.slogdet(covariance)[1]
            self._forms.append((own.mean(0), np.linalg.inv(covariance), shift))

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """The likeliest class of each point: `(..., D)` -> `(...)`."""
        scores = []
        for mean, precision, shift in self._forms:
            centered = points - mean
            scores.append(shift - 0.5 * np.einsum("...i,ij,...j", centered, precision, centered))
        return np.array(self.classes)[np.argmax(scores, axis=0)]


def fit() -> GaussianClassifier:
    """On the photograph and the map of the training longitudes."""
    rasters = load_rasters(default_data_dir())
    north, south = LATITUDES
    points, labels = [], []
    for west, east in BANDS["train"]:
        size = ((north - south) * PIXELS_PER_DEGREE, (east - west) * PIXELS_PER_DEGREE)
        part = cut(rasters, west, north, *size)
        points.append(neighbourhoods(part["image"])[::3, ::3].reshape(-1, 6))
        labels.append(part["segmentation"][::3, ::3].reshape(-1))
    return GaussianClassifier(np.concatenate(points), np.concatenate(labels))


def agreement(true: np.ndarray, read: np.ndarray) -> tuple[float, float]:
    """The share of pixels with one class, and that of two maps that know nothing of each other."""
    shares = [np.bincount(x.ravel(), minlength=NUM_CLASSES) / x.size for x in (true, read)]
    return float((true == read).mean()), float(shares[0] @ shares[1])


def border_gradients(image: np.ndarray, window: int, code: int) -> tuple[float, float, float]:
    """Mean absolute step between pixels across windows' borders, other codes', and elsewhere."""
    found = [[], [], []]
    for axis in (0, 1):
        pixels = np.moveaxis(image.astype(np.float64), axis, 0)
        steps = np.abs(np.diff(pixels, axis=0)).reshape(len(pixels) - 1, -1).mean(axis=1)
        line = np.arange(1, len(pixels))
        kind = np.where(line % window == 0, 0, np.where(line % code == 0, 1, 2))
        for number, own in enumerate(found):
            own.append(steps[kind == number])
    return tuple(float(np.concatenate(own).mean()) for own in found)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--map", required=True, help="the land cover, grey PNG of classes")
    parser.add_argument("--pictures", required=True, help="pictures of its size, by commas")
    parser.add_argument("--window", type=int, default=128, help="in pixels (default 128)")
    parser.add_argument("--code", type=int, default=8, help="in pixels (default 8)")
    parser.add_argument("--columns", default="", help="FIRST:LAST, only these of the map")
    arguments = parser.parse_args()
    first, _, last = arguments.columns.partition(":")
    columns = slice(int(first or 0), int(last) if last else None)
    land_cover = np.asarray(Image.open(arguments.map))
    pictures = {path: Image.open(path).convert("RGB") for path in arguments.pictures.split(",")}
    for path, picture in pictures.items():
        if picture.size != land_cover.shape[::-1]:
            parser.error(f"{path} has not the size of the map {arguments.map}.")
    classifier, land_cover = fit(), land_cover[:, columns]
    for path, picture in pictures.items():
        image = np.asarray(picture)[:, columns]
        read = classifier(neighbourhoods(image))
        share, chance = agreement(land_cover, read)
        of_groups, chance_of_groups = agreement(GROUPS[land_cover], GROUPS[read])
        at_windows, at_codes, elsewhere = border_gradients(image, arguments.window, arguments.code)
        figures = dict(
            agreement=share,
            chance=chance,
            agreement_of_groups=of_groups,
            chance_of_groups=chance_of_groups,
            gradient_at_windows=at_windows,
            gradient_at_codes=at_codes,
            gradient_elsewhere=elsewhere,
        )
        print(json.dumps({"picture": path} | {k: round(v, 4) for k, v in figures.items()}))


if __name__ == "__main__":
    main()
