"""MPI3D: a robot arm holds an object, seven factors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from multibeta.data.arrays import map_npz
from multibeta.data.factors import StoredFactorGrid
from multibeta.data.files import find_file

FINAL_SIZES = (6, 6, 2, 3, 3, 40, 40)  # mpi3d_toy, mpi3d_realistic, mpi3d_real
EARLY_SIZES = (4, 4, 2, 3, 3, 40, 40)  # the challenge's files without held-out factors, and the complex objects


class MPI3D(StoredFactorGrid):
    """MPI3D (Gondal et al. 2019): 1,036,800 or 460,800 images of 64 pixels, seven factors; the number of images says which.

    Put one of the .npz files of "disentanglement_dataset" (rr-learning) anywhere: `mpi3d_toy.npz`, `mpi3d_realistic.npz`,
    `mpi3d_real.npz`, `real3d_complicated_shapes_ordered.npz`, or the challenge's `sim_*_64x_ordered_without_heldout_factors.npz`.
    Each holds "images", uint8, (N, 64, 64, 3), with the last factor varying fastest. An uncompressed file is read in place, a
    compressed one unpacked once (12 GiB for the larger ones) to `cache`.

    Args:
        path: The file, or a folder that holds one of them.
        resolution: Pixels per side; Lanczos below 64.
        upscale: Accept a resolution above 64.
        cache: Folder of the unpacked images; `multibeta` in $XDG_CACHE_HOME or ~/.cache by default.
        progress: Show a progress bar while unpacking.
    """

    factor_names = (
        "object_color",
        "object_shape",
        "object_size",
        "camera_height",
        "background_color",
        "horizontal_axis",
        "vertical_axis",
    )
    known_sizes = (FINAL_SIZES, EARLY_SIZES)

    def __init__(
        self, path: str | Path, resolution: int, *, upscale: bool = False, cache: str | Path | None = None, progress: bool = True
    ):
        path = find_file(path, "mpi3d*.npz", "real3d*.npz", "sim_*.npz")
        sizes = {math.prod(sizes): sizes for sizes in self.known_sizes}
        image = (self.side, self.side, self.channels)

        def check(dtype: np.dtype, shape: tuple[int, ...]) -> None:
            if dtype != np.uint8 or len(shape) != 4 or shape[1:] != image or shape[0] not in sizes:
                raise ValueError(
                    f'"images" in {path} is {dtype} {shape}, '
                    f"uint8 {' or '.join(str((count, *image)) for count in sizes)} is expected"
                )

        pixels = map_npz(path, "images", check, cache=cache, progress=progress)
        self.factor_sizes = sizes[len(pixels)]
        super().__init__(path, pixels, resolution, upscale)
