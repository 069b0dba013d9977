"""The views of an image whose codes are stored: the centre, mirror images, ten crops a scale."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vqgan_jax.data.transforms import Crop, Transform, cut_all
from vqgan_jax.errors import DataError

AUGMENTATIONS = ("flip", "ten_crop")
TEN_CROP_PERCENTS = (110, 105)  # sides of the squares that the crops are cut from
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")


@dataclasses.dataclass(frozen=True)
class View:
    """A crop of the centre square of an image, maybe mirrored.

    Attributes:
      percent: side of the square, of the crop's side.
      row: where in the square the crop is: 0 at the top, 1 in the middle, 2 at the bottom.
      column: 0 at the left, 1 in the middle, 2 at the right.
      flipped: mirrored left and right.
    """

    percent: int = 100
    row: int = 1
    column: int = 1
    flipped: bool = False

    @property
    def name(self) -> str:
        """As in "centre", "centre_flip", "1.10_top_left", "1.05_centre_flip"."""
        scale = "" if self.percent == 100 else f"{self.percent / 100:.2f}_"
        in_the_middle = (self.row, self.column) == (1, 1)
        place = "centre" if in_the_middle else f"{_ROWS[self.row]}_{_COLUMNS[self.column]}"
        return scale + place + ("_flip" if self.flipped else "")


def list_views(augmentations: Sequence[str]) -> tuple[View, ...]:
    """The views that augmentations ask for, in an order of their own and each once.

    The first is always the centre, which evaluation takes. `flip` adds its mirror image. `ten_crop`
    adds the four corners and the centre of larger squares, each with its mirror image, at two
    scales, as class-conditional transformers are trained (Sun et al. 2024, "Autoregressive Model
    Beats Diffusion").

    Raises:
      DataError: for an unknown name.
    """
    for name in augmentations:
        if name not in AUGMENTATIONS:
            raise DataError(f"There is no augmentation {name!r}; there are flip and ten_crop.")
    views = [View()]
    if "flip" in augmentations:
        views.append(View(flipped=True))
    if "ten_crop" in augmentations:
        views += [
            View(percent, row, column, flipped)
            for percent in TEN_CROP_PERCENTS
            for row, column in ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1))
            for flipped in (False, True)
        ]
    return tuple(views)


@dataclasses.dataclass(frozen=True)
class Crops:
    """Several crops of an image; takes the place of one `Crop`."""

    crops: tuple[Crop, ...]

    def cut(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3), or (H, W) for label maps, to (views, side, side, ...)."""
        return cut_all(image, self.crops)

    def each(self, function: Callable[[Crop], np.ndarray]) -> np.ndarray:
        """What a function gives for each crop, stacked on a new first axis."""
        return np.stack([function(crop) for crop in self.crops])


@dataclasses.dataclass(frozen=True)
class AllViews:
    """From an image of any size to all its views; takes the place of a `Transform`.

    Attributes:
      transform: the one of evaluation, whose result is the first view.
      views: as of `list_views`.
    """

    transform: Transform
    views: tuple[View, ...]

    @property
    def resolution(self) -> int:
        """Side of a view in pixels."""
        return self.transform.resolution

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the views of a label map."""
        return len(self.views), *self.transform.shape

    def place(self, height: int, width: int, rng: np.random.Generator | None = None) -> Crops:
        """Which parts of an image of a size are taken. Nothing is random.

        Raises:
          DataError: when the image is smaller than a square, which only `resize=-1` allows.
        """
        squares = {
            percent: self._square(percent).place(height, width, rng)
            for percent in {view.percent for view in self.views}
        }
        return Crops(tuple(self._crop(squares[view.percent], view) for view in self.views))

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """uint8 (H, W, 3), or (H, W) for label maps, to `shape`, or with channels; see `place`."""
        return self.place(*image.shape[:2], rng).cut(image)

    def _square(self, percent: int) -> Transform:
        if percent == 100:
            return self.transform
        side = self.resolution * percent // 100
        # Where pixels are taken as they are, a larger square of them shows more of the image.
        return Transform(side, -1 if self.transform.resize == -1 else side)

    def _crop(self, square: Crop, view: View) -> Crop:
        margin = square.side - self.resolution
        top, left = square.top + margin * view.row // 2, square.left + margin * view.column // 2
        return Crop(square.original, square.whole, top, left, self.resolution, view.flipped)
