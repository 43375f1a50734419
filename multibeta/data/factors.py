"""Datasets in which every combination of known factors has one image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multibeta.data.arrays import MappedArray
from multibeta.data.dataset import Indices
from multibeta.data.images import ImageDataset, as_indices, require_resolution, resize


class FactorGrid(ImageDataset):
    """All combinations of `factor_names` with `factor_sizes` values; the last varies fastest: `index = factors . bases`."""

    path: Path | None = None
    resolution: int
    channels: int

    def __len__(self) -> int:
        return int(np.prod(self.factor_sizes))

    def __repr__(self) -> str:
        place = f"{str(self.path)!r}: " if self.path else ""
        return f"{type(self).__name__}({place}{len(self)} images of {self.resolution} pixels, factors {self.factor_sizes})"

    def factors(self, indices: Indices) -> Tensor:
        """Factor values at `indices`, int64, (N, F)."""
        values = np.unravel_index(as_indices(indices, len(self)), self.factor_sizes)
        return torch.from_numpy(np.stack(values, axis=1).astype(np.int64))

    def indices(self, factors: Tensor | npt.ArrayLike) -> Tensor:
        """Indices of factor values, the inverse of `factors`.

        Args:
            factors: Integers, (N, F), column i in [0, factor_sizes[i]).

        Returns:
            int64, (N,).
        """
        values = factors.detach().cpu().numpy() if isinstance(factors, Tensor) else np.asarray(factors)
        if values.ndim != 2 or values.shape[1] != len(self.factor_sizes):
            raise ValueError(f"factors must have shape (N, {len(self.factor_sizes)}), got {values.shape}")
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"factors must be integers, got {values.dtype}")
        for name, size, column in zip(self.factor_names, self.factor_sizes, values.T, strict=True):
            if column.size and (column.min() < 0 or column.max() >= size):
                raise ValueError(f"{name} must lie in [0, {size - 1}], got {column.min()} to {column.max()}")
        return torch.from_numpy(np.ravel_multi_index(tuple(values.T.astype(np.int64)), self.factor_sizes))


class StoredFactorGrid(FactorGrid):
    """A factor grid whose images lie in one array on disk.

    Args:
        path: Where the dataset lies.
        pixels: Anything that gives uint8 (N, side, side, C) for an array of row numbers.
        resolution: Pixels per side; scaled with Lanczos where it is not the stored `side`.
        upscale: Accept a `resolution` above `side`.
    """

    channels = 3
    side = 64

    def __init__(self, path: Path, pixels: MappedArray | np.ndarray, resolution: int, upscale: bool = False):
        require_resolution(resolution, self.side, upscale)
        self.path = path
        self.resolution = resolution
        self._pixels = pixels

    def images(self, indices: Indices) -> Tensor:
        """Images at `indices`, uint8, (N, C, resolution, resolution)."""
        pixels = self._read(as_indices(indices, len(self)))
        if self.resolution != self.side:
            shape = (self.resolution, self.resolution, self.channels)
            pixels = (
                np.stack([resize(image, self.resolution) for image in pixels]) if len(pixels) else np.empty((0, *shape), "u1")
            )
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))

    def _read(self, array: np.ndarray) -> np.ndarray:
        return self._pixels[array]


def require_row_major(
    labels: npt.ArrayLike, factor_names: tuple[str, ...], factor_sizes: tuple[int, ...], source: str | Path
) -> None:
    """Check that stored labels, (N, F), are those of a factor grid in row-major order, whatever the unit of each column."""
    grid = np.asarray(labels).reshape(*factor_sizes, len(factor_sizes))
    for axis, (name, size) in enumerate(zip(factor_names, factor_sizes, strict=True)):
        levels = np.moveaxis(grid[..., axis], axis, -1)
        if len(np.unique(levels.reshape(-1, size)[0])) != size or not np.allclose(levels, levels.reshape(-1, size)[0]):
            raise ValueError(f"{source}: the labels of {name} are not in the published order, the last factor varying fastest")
