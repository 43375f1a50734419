"""dSprites: white shapes on black, six factors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from multibeta.data.arrays import find_hdf5, map_hdf5, map_npz, open_hdf5, read_hdf5, read_npz
from multibeta.data.factors import StoredFactorGrid, require_row_major
from multibeta.data.files import find_file


class DSprites(StoredFactorGrid):
    """dSprites (Matthey et al. 2017): 737,280 binary images of 64 pixels and one channel, six factors.

    Put `dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz` or .hdf5 from "dsprites-dataset" of DeepMind anywhere. "imgs", uint8
    (737280, 64, 64) with values 0 and 1, becomes 0 and 255; "latents_classes" ("latents/classes" of the HDF5 file), (737280, 6),
    is checked against the order of the factors, of which colour has one value; "metadata" is pickled and never read. The file is
    compressed and unpacked once: 2.8 GiB in `cache`.

    Args:
        path: The file, or the folder that holds it.
        resolution: Pixels per side; Lanczos below 64.
        upscale: Accept a resolution above 64.
        cache: Folder of the unpacked images; `multibeta` in $XDG_CACHE_HOME or ~/.cache by default.
        progress: Show a progress bar while unpacking.
    """

    channels = 1
    factor_names = ("color", "shape", "scale", "orientation", "position_x", "position_y")
    factor_sizes = (1, 3, 6, 40, 32, 32)

    def __init__(
        self, path: str | Path, resolution: int, *, upscale: bool = False, cache: str | Path | None = None, progress: bool = True
    ):
        name = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64"
        path = find_file(path, f"{name}.npz", f"{name}.hdf5", "dsprites*.npz", "dsprites*.h*5")

        def check_images(dtype: np.dtype, shape: tuple[int, ...]) -> None:
            expected = (len(self), self.side, self.side)
            if dtype != np.uint8 or shape != expected:
                raise ValueError(f'"imgs" in {path} is {dtype} {shape}, uint8 {expected} is expected')

        def check_classes(dtype: np.dtype, shape: tuple[int, ...]) -> None:
            expected = (len(self), len(self.factor_sizes))
            if dtype.kind not in "iu" or shape != expected:
                raise ValueError(f'"latents_classes" in {path} is {dtype} {shape}, integers {expected} are expected')

        if path.suffix.lower() in (".h5", ".hdf5"):
            with open_hdf5(path) as file:
                stored = find_hdf5(file, path, "latents/classes")
                check_classes(stored.dtype, stored.shape)
                classes = read_hdf5(lambda: stored[...], f'"latents/classes" in {path}')
            images = map_hdf5
        else:
            classes, images = read_npz(path, "latents_classes", check_classes), map_npz
        require_row_major(classes, self.factor_names, self.factor_sizes, path)
        super().__init__(path, images(path, "imgs", check_images, cache=cache, progress=progress), resolution, upscale)

    def _read(self, array: np.ndarray) -> np.ndarray:
        pixels = super()._read(array)[..., None]
        if pixels.max(initial=0) > 1:
            raise ValueError(f"the images in {self.path} hold values up to {pixels.max()}, 0 and 1 are expected")
        return pixels * np.uint8(255)
