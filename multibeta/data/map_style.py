"""Map-style datasets, those of torchvision and of Hugging Face among them, as datasets of the library."""

from __future__ import annotations

import hashlib
import logging
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from multibeta.data import decoding, images
from multibeta.data.dataset import Dataset, Indices, is_dataset
from multibeta.data.images import CHUNK, ImageDataset, as_indices, check_resolution
from multibeta.data.loading import to_square

logger = logging.getLogger(__name__)

KEYS = ("image", "img")  # of the picture in an item that is a mapping
HANDED_OVER = "dataset: "  # before the class of a dataset, in place of a source that `open_dataset` could open


class MapStyle(Protocol):
    """Numbered items, as `torch.utils.data` reads them: a dataset of torchvision or Hugging Face, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class MapDataset(ImageDataset):
    """The pictures of any map-style dataset, prepared once and kept in memory; beyond 4 GiB, read when they are asked for.

    An item is a picture: an image of Pillow, an array, a tensor or a file (see `loading.load_images`); or a tuple that begins
    with one, as in torchvision; or a mapping that holds one as "image" or "img", as from Hugging Face. Labels are left out. Item
    i becomes image i, prepared as `ImageFolder` prepares files. What a dataset draws at random is drawn once.

    `fingerprint` changes with the pixels and their order, where they are not kept with those of 512 images spread evenly.

    Args:
        dataset: Has a length, and gives its items by number.
        resolution, channels, background, white_level: See `ImageFolder`.
        upscale: Take pictures whose shorter side is below `resolution`, enlarged; otherwise they are an error.
        value_range: Black and white in tensors of floats, such as (0, 1) where torchvision's ToTensor gives them. By default
            (-1, 1), and tensors of which none is negative are refused.
        progress: Show a bar while reading.

    Raises:
        TypeError: What has no length or gives no items by number, or an item that is no picture.
        ValueError: No items; an item that cannot be read, is too small or out of range, says which.
    """

    def __init__(
        self,
        dataset: MapStyle,
        resolution: int,
        channels: int = 3,
        *,
        background: str = "white",
        white_level: int = decoding.WHITE_LEVEL,
        upscale: bool = False,
        value_range: tuple[float, float] | None = None,
        progress: bool = True,
    ):
        check_resolution(resolution)
        decoding.require_pixel_options(channels, background, white_level)
        if value_range is not None and not _is_range(value_range):
            raise ValueError(f"value_range must be the values of black and of white, got {value_range}")
        _require_items(dataset)
        self.resolution, self.channels = resolution, channels
        self.name = type(dataset).__name__
        self._dataset, self._length, self._value_range = dataset, len(dataset), value_range
        self._options: dict[str, Any] = {"background": background, "white_level": white_level, "upscale": upscale}
        self._images: Tensor | None = None
        self.in_memory = len(self) * channels * resolution**2 <= images.MEMORY_LIMIT_BYTES
        if self.in_memory:
            self._images = torch.empty(len(self), channels, resolution, resolution, dtype=torch.uint8)
            chosen = np.arange(len(self))
        else:
            logger.warning("%s are more than 4 GiB: each is read and prepared when it is asked for", self)
            chosen = np.linspace(0, len(self) - 1, CHUNK).astype(np.int64)
        self.fingerprint = self._read(chosen, progress)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        colours = {1: "grey", 3: "RGB"}[self.channels]
        return f"MapDataset({self.name}: {len(self)} {colours} images of {self.resolution} pixels)"

    def images(self, indices: Indices) -> Tensor:
        """Images at `indices`, uint8, (N, channels, resolution, resolution)."""
        rows = as_indices(indices, len(self))
        if self._images is not None:
            return self._images[torch.from_numpy(rows)]
        shape = (self.channels, self.resolution, self.resolution)
        squares = [self._square(self._picture(index), index) for index in rows.tolist()]
        return torch.from_numpy(np.stack(squares)) if squares else torch.empty(0, *shape, dtype=torch.uint8)

    def _read(self, chosen: np.ndarray, progress: bool) -> str:
        """Prepare the images at `chosen`, keep them where there is room, and return their fingerprint."""
        digest, low, high = hashlib.sha256(str(len(self)).encode()), np.inf, -np.inf
        for count, index in enumerate(tqdm(chosen.tolist(), desc="reading images", unit="image", disable=not progress), 1):
            picture = self._picture(index)
            square = self._square(picture, index)
            digest.update(np.ascontiguousarray(square).data)
            if self._images is not None:
                self._images[index] = torch.tensor(square)
            if isinstance(picture, Tensor) and picture.is_floating_point():
                low, high = min(low, float(picture.min())), max(high, float(picture.max()))
            if count in (CHUNK, len(chosen)) and self._value_range is None and 0 <= low < high:
                raise ValueError(
                    f"tensors of floats must lie in [-1, 1], and of the first {count} of {self.name} none is negative, from "
                    f"{low:g} to {high:g}: data.MapDataset(..., value_range=(0, 1)) takes those that torchvision's ToTensor "
                    "gives; or have the dataset give images of Pillow, or uint8"
                )
        return digest.hexdigest()

    def _picture(self, index: int) -> Any:
        """The picture in an item, as it is."""
        try:
            item = self._dataset[index]
        except Exception as error:  # datasets raise whatever a broken file provokes
            raise ValueError(f"item {index} of {self.name} cannot be read: {decoding.reason_of(error)}") from error
        if isinstance(item, Mapping):
            if (key := next((key for key in KEYS if key in item), None)) is None:
                held = ", ".join(map(str, item)) or "nothing"
                raise TypeError(f"item {index} of {self.name} has no {' or '.join(KEYS)}, it has {held}")
            return item[key]
        return item[0] if isinstance(item, tuple | list) and item else item

    def _square(self, picture: Any, index: int) -> np.ndarray:
        """A picture prepared, uint8 (channels, resolution, resolution)."""
        if self._value_range is not None and isinstance(picture, Tensor) and picture.is_floating_point():
            low, high = self._value_range
            picture = (picture - low) * (2 / (high - low)) - 1
        name = f"item {index} of {self.name}"
        try:
            return to_square(picture, self.resolution, self.channels, **self._options, name=name)
        except OSError as error:  # text is taken for the name of a file
            raise ValueError(f"{name} is no picture: {error}") from error


def as_dataset(dataset: Dataset | MapStyle, resolution: int, channels: int = 3, **options: Any) -> Dataset:
    """A dataset of ours as it is, any other map-style dataset as a `MapDataset` with these options.

    Raises:
        TypeError, ValueError: What `MapDataset` raises; one of ours with images of another size or other channels.
    """
    if not is_dataset(dataset):
        return MapDataset(cast("MapStyle", dataset), resolution, channels, **options)
    name = type(dataset).__name__
    decoding.require_channels(name, dataset.channels, channels)
    if dataset.resolution != resolution:
        raise ValueError(
            f"{name} has images of {dataset.resolution} pixels per side, {resolution} are asked for: open it at that resolution, "
            f"or train with --vae.resolution {dataset.resolution}"
        )
    return dataset


def source_name(dataset: Dataset | MapStyle) -> str:
    """What is recorded as the source of images that were handed over as a dataset: "dataset: " and its class."""
    return HANDED_OVER + (dataset.name if isinstance(dataset, MapDataset) else type(dataset).__name__)


def _is_range(values: Any) -> bool:
    """Whether these are two finite numbers, the first below the second."""
    pair = isinstance(values, Sequence) and len(values) == 2
    return pair and all(isinstance(value, numbers.Real) and math.isfinite(value) for value in values) and values[0] < values[1]


def _require_items(dataset: MapStyle) -> None:
    """`TypeError` or `ValueError` unless something gives numbered items, and there are any."""
    name = type(dataset).__name__
    if isinstance(dataset, str | bytes | Path):
        raise TypeError(f"a dataset gives numbered images, got the {name} {dataset!r}: open_dataset opens folders and names")
    if isinstance(dataset, Mapping):
        raise TypeError(f"a dataset gives numbered images, got a {name} of {', '.join(map(str, dataset))}: give one of these")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        streams = ", which only streams them" if isinstance(dataset, Iterable) else ""
        raise TypeError(f"a dataset needs __len__ and __getitem__, got a {name}{streams}")
    if not len(dataset):
        raise ValueError(f"{name} has no items")
