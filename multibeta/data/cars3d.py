"""Cars3D: car models from all sides, three factors."""

from pathlib import Path

import numpy as np

from multibeta.data.arrays import missing_extra, unpack
from multibeta.data.cache import size_and_time
from multibeta.data.factors import StoredFactorGrid

MESH_SHAPE = (128, 128, 3, 24, 4)  # height, width, channel, azimuth, elevation


class Cars3D(StoredFactorGrid):
    """Cars3D (Reed et al. 2015): 17,568 images of 128 pixels, three factors.

    Put the unpacked `nips2015-analogy-data.tar.gz` of "Deep Visual Analogy-Making" anywhere: `data/cars/*.mat`, one file per
    car with "im", uint8 (128, 128, 3, 24, 4). The object factor follows the sorted file names. The images are unpacked
    once: 0.8 GiB in `cache`.

    Args:
        path: The folder of the .mat files, or one that holds it as `cars` or `data/cars`.
        resolution: Pixels per side; Lanczos below 128, as published for 64.
        upscale: Accept a resolution above 128.
        cache: Folder of the unpacked images; `multibeta` in $XDG_CACHE_HOME or ~/.cache by default.
        progress: Show a progress bar while unpacking.
    """

    factor_names = ("elevation", "azimuth", "object")
    factor_sizes = (4, 24, 183)
    side = 128

    def __init__(self, path, resolution, *, upscale=False, cache=None, progress=True):
        folder, files = self._find_meshes(Path(path).expanduser())

        def blocks():
            for file in files:
                yield np.ascontiguousarray(load_mesh(file).transpose(3, 4, 0, 1, 2)).data

        # In the order of the files: (object, azimuth, elevation).
        evidence = [(file.name, *size_and_time(file)) for file in files]
        shape = (len(self), self.side, self.side, self.channels)
        super().__init__(
            unpack(folder, "cars", evidence, "u1", shape, blocks, cache=cache, progress=progress), resolution, upscale
        )

    def _read(self, array):
        elevation, azimuth, car = np.unravel_index(array, self.factor_sizes)
        return super()._read(np.ravel_multi_index((car, azimuth, elevation), self.factor_sizes[::-1]))

    def _find_meshes(self, path):
        """The folder of the .mat files, and the files in the order of the object factor."""
        if not path.exists():
            raise FileNotFoundError(f"there is no folder {path}")
        for folder in (path, path / "cars", path / "data" / "cars"):
            files = sorted(file for file in folder.glob("*.mat") if not file.name.startswith("."))
            if files:
                break
        if len(files) != self.factor_sizes[2]:
            raise ValueError(f"{folder if files else path} holds {len(files)} .mat files, {self.factor_sizes[2]} are expected")
        return folder, files


def load_mesh(path):
    """The views of one car, uint8, (128, 128, 3, 24, 4).

    Raises:
        ValueError: the file is damaged or holds something else, found before its data are read.
    """
    try:
        from scipy.io import loadmat, whosmat
    except ImportError as error:
        raise missing_extra("scipy", path) from error
    try:
        found = {name: (shape, kind) for name, shape, kind in whosmat(path)}
        if found.get("im") != (MESH_SHAPE, "uint8"):
            raise ValueError(f'found {found or "nothing"}, "im" of uint8 {MESH_SHAPE} is expected')
        return loadmat(path, variable_names=["im"])["im"]
    except Exception as error:  # the reader raises whatever a broken file provokes
        raise ValueError(f"{path} cannot be read: {error}") from None
