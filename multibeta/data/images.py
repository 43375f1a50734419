"""Shared vocabulary of image data: value ranges, indices, subsets and splits."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multibeta.checks import is_integer
from multibeta.data.dataset import (
    Dataset,
    Indices,
    fingerprint_of,
    knows_attributes,
    knows_classes,
    knows_factors,
    knows_order,
    read_images,
    require_dataset,
)
from multibeta.seeds import as_seed

CHUNK = 512
MEMORY_LIMIT_BYTES = 2**32
LARGE_LIMIT_BYTES = 2**26  # of images of a large dataset


def to_float(images: Tensor) -> Tensor:
    """Bytes to the networks' range: uint8 of any shape to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """The networks' range to bytes: floats of any shape, clamped to [-1, 1] and rounded, to uint8."""
    return ((images.to(torch.float32).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def as_indices(indices: Indices, length: int) -> np.ndarray:
    """Indices of any accepted type as a numpy int64 array, (N,).

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


def check_resolution(resolution: Any) -> None:
    """`ValueError` unless images can have `resolution` pixels per side."""
    if not is_integer(resolution) or resolution < 1:
        raise ValueError(f"resolution must be a positive integer, got {resolution!r}")


def require_resolution(resolution: Any, side: int, upscale: bool) -> None:
    """`ValueError` unless images of `side` pixels may be shown at `resolution`."""
    check_resolution(resolution)
    if resolution > side and not upscale:
        raise ValueError(
            f"the images have {side} pixels per side: choose a resolution up to {side}, got {resolution}, or allow upscale"
        )


def resize(pixels: np.ndarray, resolution: int, resample: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """A square image, uint8 (side, side, C), scaled by Pillow to uint8 (resolution, resolution, C)."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return np.asarray(image.resize((resolution, resolution), resample)).reshape(resolution, resolution, pixels.shape[-1])


class ImageDataset(torch.utils.data.Dataset[Tensor]):
    """Base of the library's datasets: nothing is known of the images unless a subclass says what.

    It is a map-style dataset of torch: `dataset[i]` is image i, float (C, H, W) in [-1, 1], as `DataLoader` and
    `random_split` of `torch.utils.data` take it. A subclass has `resolution`, `channels`, `__len__` and `images`.
    """

    factor_names: tuple[str, ...] = ()
    factor_sizes: tuple[int, ...] = ()
    attribute_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    fingerprint: str | None = None  # changes with the images and their order, where it is known
    in_memory: bool = False  # whether images are read at no cost
    large: bool = False  # whether its images are too many for the memory, however small

    def __len__(self) -> int:
        raise NotImplementedError

    def images(self, indices: Indices) -> Tensor:
        """Images at `indices`, uint8, (N, C, H, W)."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Tensor:
        """Image number `index`, from 0, float (C, H, W) in [-1, 1]; `IndexError` where there is none, so also for -1."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in [0, {len(self) - 1}], got {index}")
        return to_float(self.images([index])[0])

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Several of them at once, as the loaders of torch ask for a batch."""
        return list(to_float(self.images(indices)))


class Subset(ImageDataset):
    """Some images of a dataset, rendered or decoded once and kept in memory; beyond 4 GiB of them, read when they are asked for.

    Those of a dataset that keeps its images in memory itself are taken from there; of a `large` one up to 64 MiB are kept.

    Args:
        dataset: Any dataset; its factors, attributes and classes are forwarded where it knows them.
        indices: 1-D integers into `dataset`, kept in the order given.

    The parent index of each image stays available as `indices`, int64, (N,), and the parent's `fingerprint` as its own.
    """

    def __init__(self, dataset: Dataset, indices: Indices):
        require_dataset(dataset)
        self.resolution = dataset.resolution
        self.channels = dataset.channels
        self.indices = torch.from_numpy(as_indices(indices, len(dataset)))
        self.fingerprint = fingerprint_of(dataset)
        self._dataset: Dataset = dataset
        self._images: Tensor | None = None
        self.in_memory = getattr(dataset, "in_memory", False)
        self.large = getattr(dataset, "large", False)
        limit = LARGE_LIMIT_BYTES if self.large else MEMORY_LIMIT_BYTES
        if not self.in_memory and len(self) * self.channels * self.resolution**2 <= limit:
            self.in_memory, self.large = True, False
            self._images = torch.empty(len(self), self.channels, self.resolution, self.resolution, dtype=torch.uint8)
            for start in range(0, len(self), CHUNK):
                chunk = self.indices[start : start + CHUNK]
                self._images[start : start + len(chunk)] = read_images(dataset, chunk)
        self._factors = self._attributes = None
        if knows_factors(dataset):
            self.factor_names, self.factor_sizes = dataset.factor_names, dataset.factor_sizes
            self._factors = dataset.factors(self.indices)
        if knows_attributes(dataset):
            self.attribute_names = dataset.attribute_names
            self._attributes = dataset.attributes(self.indices)
        if knows_classes(dataset):
            self.class_names = dataset.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"Subset({len(self)} images of {self._dataset!r})"

    def images(self, indices: Indices) -> Tensor:
        """Images at `indices`, uint8, (N, C, H, W)."""
        rows = torch.from_numpy(as_indices(indices, len(self)))
        return read_images(self._dataset, self.indices[rows]) if self._images is None else self._images[rows]

    @property
    def factors(self) -> Callable[[Indices], Tensor]:
        """Factor values at indices, int64, (N, F); `AttributeError` where the dataset knows none."""
        return self._known("factors", self._factors)

    @property
    def attributes(self) -> Callable[[Indices], Tensor]:
        """Attributes at indices, bool, (N, A); `AttributeError` where the dataset knows none."""
        return self._known("attributes", self._attributes)

    @property
    def labels(self) -> Callable[[Indices], Tensor]:
        """Class of each image at indices, int64, (N,); `AttributeError` where the dataset knows none."""
        dataset = self._dataset
        if not knows_classes(dataset):
            raise AttributeError(f"the images of {self!r} have no known classes")
        return lambda indices: dataset.labels(self.indices[as_indices(indices, len(self))])

    @property
    def order(self) -> Callable[[torch.Generator], Tensor]:
        """The order of the dataset among these images; `AttributeError` where it has none, or they are in memory."""
        dataset = self._dataset
        if self.in_memory or not knows_order(dataset):
            raise AttributeError(f"the images of {self!r} are read in any order")

        def order(generator: torch.Generator) -> Tensor:
            whole = dataset.order(generator)
            return torch.argsort(torch.empty_like(whole).scatter_(0, whole, torch.arange(len(whole)))[self.indices], stable=True)

        return order

    def _known(self, what: str, rows: Tensor | None) -> Callable[[Indices], Tensor]:
        """Selects from the `rows` of what is known of these images."""
        if rows is None:
            raise AttributeError(f"the images of {self!r} have no known {what}")
        return lambda indices: rows[torch.from_numpy(as_indices(indices, len(self)))]


def chosen_digest(dataset: Any) -> str | None:
    """A name for which images of another dataset a dataset holds; None of one that is no part of another."""
    indices = getattr(dataset, "indices", None)
    if isinstance(indices, Tensor):
        return hashlib.blake2b(indices.numpy().tobytes(), digest_size=16).hexdigest()
    inner = getattr(dataset, "_dataset", None)
    return None if inner is None else chosen_digest(inner)


class Mirrored(ImageDataset):
    """A dataset followed by its images mirrored left to right, so twice as long. Labels are left out: a mirror may change them.

    Args:
        dataset: Any dataset.
    """

    def __init__(self, dataset: Dataset):
        require_dataset(dataset)
        self.resolution = dataset.resolution
        self.channels = dataset.channels
        self.fingerprint = fingerprint_of(dataset)
        self.large = getattr(dataset, "large", False)
        self._dataset = dataset

    def __len__(self) -> int:
        return 2 * len(self._dataset)

    def __repr__(self) -> str:
        return f"Mirrored({self._dataset!r})"

    def images(self, indices: Indices) -> Tensor:
        """Images at `indices`, uint8, (N, C, H, W)."""
        rows = torch.from_numpy(as_indices(indices, len(self)))
        images = read_images(self._dataset, rows % len(self._dataset))
        mirrored = (rows >= len(self._dataset))[:, None, None, None]
        return torch.where(mirrored, images.flip(3), images)

    @property
    def order(self) -> Callable[[torch.Generator], Tensor]:
        """Each image or its mirror in the order of the dataset, then the others; `AttributeError` where the dataset has none."""
        dataset = self._dataset
        if not knows_order(dataset):
            raise AttributeError(f"the images of {self!r} are read in any order")

        def order(generator: torch.Generator) -> Tensor:
            first, second = dataset.order(generator), dataset.order(generator)
            mirrored = torch.randint(2, (len(first),), generator=generator)
            return torch.cat([first + len(first) * mirrored[first], second + len(first) * (1 - mirrored[second])])

        return order


def split(dataset: Dataset, num_train: int, num_test: int, seed: int = 0) -> tuple[Subset, Subset]:
    """Disjoint train and test subsets from a seeded permutation of the dataset.

    Args:
        dataset: Any dataset.
        num_train, num_test: Images in each part, at least 0.
        seed: Any integer; the same seed gives the same parts.

    Returns:
        (train, test), both `Subset`.

    Raises:
        TypeError: it is no dataset.
        ValueError: the dataset holds fewer than `num_train + num_test` images.
    """
    require_dataset(dataset)
    train, test = split_indices(len(dataset), num_train, num_test, seed)
    return Subset(dataset, train), Subset(dataset, test)


def split_indices(length: int, num_train: int, num_test: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Which of `length` images are in the parts of `split`: int64, (num_train,) and (num_test,)."""
    if num_train < 0 or num_test < 0:
        raise ValueError(f"num_train and num_test must not be negative, got {num_train} and {num_test}")
    needed = num_train + num_test
    if length < needed:
        raise ValueError(f"{num_train} training and {num_test} test images need {needed} images, the dataset has {length}")
    order = torch.randperm(length, generator=torch.Generator().manual_seed(as_seed(seed)))
    return order[:num_train], order[num_train:needed]


def choose(size: int, limit: int | None, seed: int = 0) -> Tensor:
    """Rising indices of all of `size` images, or of `limit` chosen at random, int64, (N,)."""
    if limit is None or limit >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(as_seed(seed)))[:limit].sort().values
