"""A part of the Earth as pictures of any size: the photograph and the maps of the same place.

    python -m vqgan_jax.data.earth_maps --output=maps --west=2 --north=55 --height=256 --width=512

writes `image.png`, `segmentation.png`, `relief.png` and `elevation.png`, at 15 pixels a degree.
The longitudes of the splits of `earth` are `earth.BANDS`.
"""

import pathlib

import numpy as np
from absl import flags
from PIL import Image

from vqgan_jax import command_line
from vqgan_jax.command_line.help import group, require
from vqgan_jax.data.earth import GRID, PIXELS_PER_DEGREE, load_rasters
from vqgan_jax.data.packages import default_data_dir
from vqgan_jax.errors import DataError


def cut(
    rasters: dict[str, np.ndarray], west: float, north: float, height: int, width: int
) -> dict[str, np.ndarray]:
    """A rectangle of each raster, around the date line too.

    Args:
      rasters: of `load_rasters`.
      west: degrees of longitude of the left side, -180 to 180.
      north: degrees of latitude of the upper side, up to 90.
      height, width: in pixels.

    Raises:
      DataError: the rectangle leaves the Earth.
    """
    top, left = (round(d * PIXELS_PER_DEGREE) for d in (90 - north, 180 + west))
    inside = 0 <= top <= GRID[0] - height and -180 <= west <= 180 and width <= GRID[1]
    if min(height, width) < 1 or not inside:
        raise DataError(
            f"{width} x {height} pixels (width x height) from {west} degrees east and {north} "
            f"degrees north are not on the Earth, which has {GRID[1]} x {GRID[0]}."
        )
    columns = (left + np.arange(width)) % GRID[1]
    return {key: raster[top : top + height, columns] for key, raster in rasters.items()}


def main() -> None:
    """Writes what the flags say."""
    output = pathlib.Path(flags.FLAGS["output"].value)
    if output.exists() and any(output.iterdir()):
        raise DataError(f"{output} exists and is not empty; choose another --output.")
    rasters = load_rasters(default_data_dir())
    place = {name: flags.FLAGS[name].value for name in ("west", "north", "height", "width")}
    parts = cut(rasters, **place)
    output.mkdir(parents=True, exist_ok=True)
    for key, part in parts.items():
        Image.fromarray(part).save(output / f"{key}.png")
    print(f"{output} has {', '.join(f'{key}.png' for key in parts)}.")


def define_flags() -> None:
    """The flags of this command."""
    with group("Flags"):
        flags.DEFINE_string("output", None, "A new directory.")
        flags.DEFINE_float("west", 2.0, "Degrees of longitude of the left side.")
        flags.DEFINE_float("north", 55.0, "Degrees of latitude of the upper side.")
        flags.DEFINE_integer("height", 256, "In pixels, 15 a degree.")
        flags.DEFINE_integer("width", 512, "In pixels, 15 a degree.")
    require("output")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
