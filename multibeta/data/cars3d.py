"""Cars3D: car models from all sides, three factors."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator, Sized
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from multibeta.caches import size_and_time
from multibeta.data.arrays import missing_extra, unpack
from multibeta.data.factors import StoredFactorGrid
from multibeta.data.files import find_below, what_is_in
from multibeta.files import expanded, require_file

MAX_MESH_BYTES = 2**26
MESH_SHAPE = (128, 128, 3, 24, 4)  # height, width, channel, azimuth, elevation


class Cars3D(StoredFactorGrid):
    """Cars3D (Reed et al. 2015): 17,568 images of 128 pixels, three factors.

    Put `nips2015-analogy-data.tar.gz` of "Deep Visual Analogy-Making" anywhere, or what it holds: `data/cars/*.mat`, one file
    per car with "im", uint8 (128, 128, 3, 24, 4). The object factor follows the sorted file names. The images are unpacked
    once: 0.8 GiB in `cache`.

    Args:
        path: The archive, the folder of the .mat files, or one that holds either, the folder as `cars`.
        resolution: Pixels per side; Lanczos below 128, as published for 64.
        upscale: Accept a resolution above 128.
        cache: Folder of the unpacked images; `multibeta` in $XDG_CACHE_HOME or ~/.cache by default.
        progress: Show a progress bar while unpacking.
    """

    factor_names = ("elevation", "azimuth", "object")
    factor_sizes = (4, 24, 183)
    side = 128

    def __init__(
        self, path: str | Path, resolution: int, *, upscale: bool = False, cache: str | Path | None = None, progress: bool = True
    ):
        folder, files = self._find_meshes(expanded(path))

        def blocks() -> Iterator[memoryview]:
            for name, file in files.items() if folder.is_dir() else self._read_archive(folder).items():
                yield np.ascontiguousarray(load_mesh(file, f"{folder}: {name}").transpose(3, 4, 0, 1, 2)).data

        # In the order of the files: (object, azimuth, elevation).
        evidence = [(name, *size_and_time(file)) for name, file in files.items()]
        shape = (len(self), self.side, self.side, self.channels)
        pixels = unpack(folder, "cars", evidence, "u1", shape, blocks, cache=cache, progress=progress)
        super().__init__(folder, pixels, resolution, upscale)

    def _read(self, array: np.ndarray) -> np.ndarray:
        elevation, azimuth, car = np.unravel_index(array, self.factor_sizes)
        return super()._read(np.ravel_multi_index((car, azimuth, elevation), self.factor_sizes[::-1]))

    def _find_meshes(self, path: Path) -> tuple[Path, dict[str, Path]]:
        """The folder of the .mat files and these by name, in the order of the object factor; or the archive, by its own name."""
        if not path.exists():
            raise FileNotFoundError(f"there is no folder {path}")
        folder, files = path, {}
        if path.is_dir():
            files = meshes_in(path)
            if not files and (place := find_below(path, "cars", "nips2015-analogy-data.tar*", "nips2015-analogy-data.tgz")):
                folder = place
                files = meshes_in(place) if place.is_dir() else {}
        if folder.is_file():
            return folder, {folder.name: folder}
        self._require_all(files, folder)
        return folder, files

    def _read_archive(self, path: Path) -> dict[str, BinaryIO]:
        """The .mat files of the cars in a tar archive, compressed or not, by name; the archive is read once, front to back."""
        files = {}
        try:
            with tarfile.open(require_file(path), "r|*") as archive:
                for member in archive:
                    place = PurePosixPath(member.name)
                    hidden = place.name.startswith(".")
                    if member.isfile() and place.suffix == ".mat" and place.parent.name in ("cars", "") and not hidden:
                        if member.size > MAX_MESH_BYTES:
                            raise ValueError(f"{path}: {member.name} is larger than {MAX_MESH_BYTES // 2**20} MiB")
                        content = archive.extractfile(member)
                        assert content is not None, "only what is no file has none"
                        files[place.name] = io.BytesIO(content.read())
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is no readable tar archive, or truncated: {error}") from None
        self._require_all(files, path)
        return dict(sorted(files.items()))

    def _require_all(self, files: Sized, place: Path) -> None:
        if len(files) != self.factor_sizes[2]:
            there = f", found {what_is_in(place)}" if not files and place.is_dir() else ""
            raise ValueError(f"{place} holds {len(files)} .mat files, {self.factor_sizes[2]} are expected{there}")


def meshes_in(folder: Path) -> dict[str, Path]:
    """The .mat files of a folder by name, sorted."""
    return {file.name: file for file in sorted(folder.glob("*.mat")) if not file.name.startswith(".")}


def load_mesh(file: Path | BinaryIO, name: str) -> np.ndarray:
    """The views of one car, uint8, (128, 128, 3, 24, 4), from a path or an open file that messages call `name`.

    Raises:
        ValueError: the file is damaged or holds something else, found before its data are read.
    """
    try:
        from scipy.io import loadmat, whosmat
    except ImportError as error:
        raise missing_extra("scipy", name) from error
    try:
        file = require_file(file) if isinstance(file, Path) else file
        arrays = {array: (shape, dtype) for array, shape, dtype in whosmat(file)}
        if arrays.get("im") != (MESH_SHAPE, "uint8"):
            raise ValueError(f'found {arrays or "nothing"}, "im" of uint8 {MESH_SHAPE} is expected')
        return loadmat(file, variable_names=["im"])["im"]
    except Exception as error:  # the reader raises whatever a broken file provokes
        raise ValueError(f"{name} cannot be read: {error}") from None
