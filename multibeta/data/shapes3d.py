"""3D Shapes: rooms with one object, six factors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from multibeta.data.arrays import find_hdf5, map_hdf5, open_hdf5, read_hdf5
from multibeta.data.factors import StoredFactorGrid, require_row_major
from multibeta.data.files import find_file


class Shapes3D(StoredFactorGrid):
    """3D Shapes (Burgess and Kim 2018): 480,000 images of 64 pixels, six factors.

    Put `3dshapes.h5` from "3D Shapes Dataset" of DeepMind anywhere: "images", (480000, 64, 64, 3), and "labels",
    (480000, 6), which are checked against the order of the factors. The published file is compressed in pieces that hold no
    whole image, so it is unpacked once: 5.5 GiB in `cache`.

    Args:
        path: The file, or the folder that holds it.
        resolution: Pixels per side; Lanczos below 64.
        upscale: Accept a resolution above 64.
        cache: Folder of the unpacked images; `multibeta` in $XDG_CACHE_HOME or ~/.cache by default.
        progress: Show a progress bar while unpacking.
    """

    factor_names = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    factor_sizes = (10, 10, 10, 8, 4, 15)

    def __init__(
        self, path: str | Path, resolution: int, *, upscale: bool = False, cache: str | Path | None = None, progress: bool = True
    ):
        path = find_file(path, "3dshapes.h5", "3dshapes*.h*5", "shapes3d*.h*5")
        expected = len(self), self.side, self.side, self.channels

        def check(dtype: np.dtype, shape: tuple[int, ...]) -> None:
            if dtype != np.uint8 or shape != expected:
                raise ValueError(f'"images" in {path} is {dtype} {shape}, uint8 {expected} is expected')

        with open_hdf5(path) as file:
            labels = find_hdf5(file, path, "labels")
            shape = (len(self), len(self.factor_sizes))
            if labels.dtype.kind not in "fiu" or labels.shape != shape:
                raise ValueError(f'"labels" in {path} is {labels.dtype} {labels.shape}, numbers {shape} are expected')
            require_row_major(read_hdf5(lambda: labels[...], f'"labels" in {path}'), self.factor_names, self.factor_sizes, path)
        super().__init__(path, map_hdf5(path, "images", check, cache=cache, progress=progress), resolution, upscale)
