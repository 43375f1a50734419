"""Shared vocabulary of image data: value ranges, indices, subsets and splits."""

import numpy as np
import torch
from PIL import Image

from multibeta.seeds import as_seed

CHUNK = 512
MEMORY_LIMIT_BYTES = 2**32


def to_float(images):
    """Bytes to the networks' range: uint8 of any shape to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images):
    """The networks' range to bytes: floats of any shape, clamped to [-1, 1] and rounded, to uint8."""
    return ((images.to(torch.float32).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def as_indices(indices, length):
    """Indices of any accepted kind as a numpy int64 array, (N,).

    Args:
        indices: 1-D tensor, array or sequence of integers in [0, length).
        length: Size of the dataset they point into.

    Raises:
        ValueError: not one-dimensional, not integers, or out of range.
    """
    array = indices.detach().cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices)
    if array.ndim != 1:
        raise ValueError(f"indices must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"indices must be integers, got {array.dtype}")
    if array.min() < 0 or array.max() >= length:
        raise ValueError(f"indices must lie in [0, {length - 1}], got {array.min()} to {array.max()}")
    return array.astype(np.int64)


def require_resolution(resolution, side, upscale):
    """Check that images of `side` pixels may be shown at `resolution`."""
    if not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"resolution must be a positive integer, got {resolution!r}")
    if resolution > side and not upscale:
        raise ValueError(
            f"the images have {side} pixels per side: choose a resolution up to {side}, got {resolution}, or allow upscale"
        )


def resize(pixels, resolution, resample=Image.Resampling.LANCZOS):
    """A square image, uint8 (side, side, C), scaled by Pillow to uint8 (resolution, resolution, C)."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return np.asarray(image.resize((resolution, resolution), resample)).reshape(resolution, resolution, pixels.shape[-1])


class Subset:
    """Some images of a dataset, rendered or decoded once and kept in memory; beyond 4 GiB of them, read when they are asked for.

    Args:
        dataset: Anything with `images(indices)`; factors and attributes are forwarded where it has them.
        indices: 1-D integers into `dataset`, kept in the order given.

    The parent index of each image stays available as `indices`, int64, (N,), and the parent's `fingerprint` as its own.
    """

    def __init__(self, dataset, indices):
        self.resolution = dataset.resolution
        self.channels = dataset.channels
        self.indices = torch.from_numpy(as_indices(indices, len(dataset)))
        self.fingerprint = getattr(dataset, "fingerprint", None)
        self._dataset, self._images = dataset, None
        if len(self) * self.channels * self.resolution**2 <= MEMORY_LIMIT_BYTES:
            self._images = torch.empty(len(self), self.channels, self.resolution, self.resolution, dtype=torch.uint8)
            for start in range(0, len(self), CHUNK):
                chunk = self.indices[start : start + CHUNK]
                self._images[start : start + len(chunk)] = dataset.images(chunk)
        if hasattr(dataset, "factors"):
            self.factor_names = dataset.factor_names
            self.factor_sizes = dataset.factor_sizes
            self._factors = dataset.factors(self.indices)
            self.factors = self._select_factors
        if hasattr(dataset, "attributes"):
            self.attribute_names = dataset.attribute_names
            self._attributes = dataset.attributes(self.indices)
            self.attributes = self._select_attributes

    def __len__(self):
        return len(self.indices)

    def __repr__(self):
        return f"Subset({len(self)} images of {self._dataset!r})"

    def images(self, indices):
        """Images at `indices`, uint8, (N, C, H, W)."""
        rows = torch.from_numpy(as_indices(indices, len(self)))
        return self._dataset.images(self.indices[rows]) if self._images is None else self._images[rows]

    def _select_factors(self, indices):
        """Factor values at `indices`, int64, (N, F)."""
        return self._factors[torch.from_numpy(as_indices(indices, len(self)))]

    def _select_attributes(self, indices):
        """Attributes at `indices`, bool, (N, A)."""
        return self._attributes[torch.from_numpy(as_indices(indices, len(self)))]


class Mirrored:
    """A dataset followed by its images mirrored left to right, so twice as long. Labels are left out: a mirror may change them.

    Args:
        dataset: Anything with `images(indices)` and a length.
    """

    def __init__(self, dataset):
        self.resolution = dataset.resolution
        self.channels = dataset.channels
        self.fingerprint = getattr(dataset, "fingerprint", None)
        self._dataset = dataset

    def __len__(self):
        return 2 * len(self._dataset)

    def __repr__(self):
        return f"Mirrored({self._dataset!r})"

    def images(self, indices):
        """Images at `indices`, uint8, (N, C, H, W)."""
        rows = torch.from_numpy(as_indices(indices, len(self)))
        images = self._dataset.images(rows % len(self._dataset))
        mirrored = (rows >= len(self._dataset))[:, None, None, None]
        return torch.where(mirrored, images.flip(3), images)


def split(dataset, num_train, num_test, seed=0):
    """Disjoint train and test subsets from a seeded permutation of the dataset.

    Args:
        dataset: Anything with `images(indices)` and a length.
        num_train, num_test: Images in each part, at least 0.
        seed: Any integer; the same seed gives the same parts.

    Returns:
        (train, test), both `Subset`.

    Raises:
        ValueError: the dataset holds fewer than `num_train + num_test` images.
    """
    if num_train < 0 or num_test < 0:
        raise ValueError(f"num_train and num_test must not be negative, got {num_train} and {num_test}")
    needed = num_train + num_test
    if len(dataset) < needed:
        raise ValueError(f"{num_train} training and {num_test} test images need {needed} images, the dataset has {len(dataset)}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(as_seed(seed)))
    return Subset(dataset, order[:num_train]), Subset(dataset, order[num_train:needed])
