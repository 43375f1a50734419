"""Datasets of others, those of torchvision and of Hugging Face among them, as datasets of the library."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import numbers
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from multibeta.caches import cache_folder, make_cache_folder
from multibeta.checks import check_dense, check_integer
from multibeta.data import decoding, images
from multibeta.data.dataset import Dataset, Indices, is_dataset
from multibeta.data.files import first_readable
from multibeta.data.images import CHUNK, ImageDataset, as_indices, check_resolution
from multibeta.data.large import LARGE, LOOKED_AT
from multibeta.data.loading import to_square
from multibeta.files import say_once
from multibeta.progress import progress_bar

logger = logging.getLogger(__name__)

KEYS = ("image", "img")  # of the picture in an item that is a mapping
MOST_STREAMED = 1_000_000  # pictures, without a limit
_NAMED = (str, bytes, Path, Mapping)  # what names datasets, or holds several
HANDED_OVER = "dataset: "  # before the class of a dataset, in place of a source that `open_dataset` could open


class MapStyle(Protocol):
    """Numbered items, as `torch.utils.data` reads them: a dataset of torchvision or Hugging Face, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Foreign = MapStyle | Iterable[Any]
"""A dataset of others, as `as_dataset` takes it: map-style, or what only streams its items."""


class Pictures(ImageDataset):
    """Base of datasets that prepare the items of another: see `MapDataset` for what an item may be.

    Args:
        dataset: Whose items they are; its class is their `name`.
        resolution, channels, background, white_level, upscale, value_range: See `MapDataset`.
    """

    def __init__(
        self,
        dataset: Any,
        resolution: int,
        channels: int,
        *,
        background: str,
        white_level: int,
        upscale: bool,
        value_range: tuple[float, float] | None,
    ):
        _require_pictures(dataset)
        check_resolution(resolution)
        decoding.require_pixel_options(channels, background, white_level)
        if value_range is not None and not _is_range(value_range):
            raise ValueError(f"value_range must be the values of black and of white, got {value_range}")
        self.resolution, self.channels = resolution, channels
        self.name = type(dataset).__name__
        self._value_range = value_range
        self._options: dict[str, Any] = {"background": background, "white_level": white_level, "upscale": upscale}
        self._low, self._high = np.inf, -np.inf  # of the tensors of floats that were prepared

    def __repr__(self) -> str:
        colours = {1: "grey", 3: "RGB"}[self.channels]
        return f"{type(self).__name__}({self.name}: {len(self)} {colours} images of {self.resolution} pixels)"

    def _prepared(self, item: Any, index: int) -> np.ndarray:
        """An item prepared, uint8 (channels, resolution, resolution)."""
        name, picture = f"item {index} of {self.name}", item
        if isinstance(item, Mapping):
            if (key := next((key for key in KEYS if key in item), None)) is None:
                held = ", ".join(map(str, item)) or "nothing"
                rename = f'rename that of the picture, by dataset.rename_column(NAME, "{KEYS[0]}") where it is of Hugging Face'
                raise TypeError(f"{name} has no {' or '.join(KEYS)}, it has {held}: {rename}")
            try:
                picture = item[key]
            except Exception as error:  # some decode it only now
                raise ValueError(f"{name} cannot be read: {decoding.reason_of(error)}") from error
        elif isinstance(item, tuple | list) and item:
            picture = item[0]
        if isinstance(picture, Tensor) and picture.is_floating_point():
            check_dense(name, picture)
            if self._value_range is not None:
                low, high = self._value_range
                picture = (picture - low) * (2 / (high - low)) - 1
            elif picture.numel():
                self._low, self._high = min(self._low, float(picture.min())), max(self._high, float(picture.max()))
        try:
            return to_square(picture, self.resolution, self.channels, **self._options, name=name)
        except OSError as error:  # text is taken for the name of a file
            raise ValueError(f"{name} is no picture: {error}") from error

    def _require_negative(self, count: int) -> None:
        """`ValueError` where the first `count` pictures are tensors of floats of which none is negative."""
        if 0 <= self._low < self._high:
            raise ValueError(
                f"tensors of floats must lie in [-1, 1], and of the first {count} of {self.name} none is negative, from "
                f"{self._low:g} to {self._high:g}: data.{type(self).__name__}(..., value_range=(0, 1)) takes those that "
                "torchvision's ToTensor gives; or have the dataset give images of Pillow, or uint8"
            )


class MapDataset(Pictures):
    """The pictures of any map-style dataset, prepared once and kept in memory; beyond 4 GiB, read when they are asked for.

    An item is a picture: an image of Pillow, an array, a tensor or a file (see `loading.load_images`); or a tuple that begins
    with one, as in torchvision; or a mapping that holds one as "image" or "img", as from Hugging Face. Labels are left out. Item
    i becomes image i, prepared as `ImageFolder` prepares files. What a dataset draws at random is drawn once.

    An item that cannot be read, or is too small, is an error; where images are read when they are asked for, the next item stands
    in, with a line in the log. `fingerprint` changes with the pixels and their order, where they are not kept with those of 512
    images spread evenly.

    Args:
        dataset: Has a length, and gives its items by number.
        resolution, channels, background, white_level: See `ImageFolder`.
        upscale: Take pictures whose shorter side is below `resolution`, enlarged; otherwise they are too small.
        value_range: Black and white in tensors of floats, such as (0, 1) where torchvision's ToTensor gives them. By default
            (-1, 1), and tensors of which none is negative are refused.
        progress: Show a bar while reading.

    Raises:
        TypeError: What has no length or gives no items by number; a loader of batches; an item that is no picture.
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
        pixels = {"background": background, "white_level": white_level, "upscale": upscale}
        super().__init__(dataset, resolution, channels, value_range=value_range, **pixels)
        _require_items(dataset)
        self._dataset, self._length = dataset, len(dataset)
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

    def images(self, indices: Indices) -> Tensor:
        """Images at `indices`, uint8, (N, channels, resolution, resolution)."""
        rows = as_indices(indices, len(self))
        if self._images is not None:
            return self._images[torch.from_numpy(rows)]
        shape = (self.channels, self.resolution, self.resolution)
        squares = [self._square_or_next(index) for index in rows.tolist()]
        return torch.from_numpy(np.stack(squares)) if squares else torch.empty(0, *shape, dtype=torch.uint8)

    def _read(self, chosen: np.ndarray, progress: bool) -> str:
        """Prepare the images at `chosen`, keep them where there is room, and return their fingerprint."""
        digest, read = hashlib.sha256(str(len(self)).encode()), self._square if self.in_memory else self._square_or_next
        watched = progress_bar(chosen.tolist(), desc="reading images", unit="image", disable=not progress)
        for count, index in enumerate(watched, 1):
            square = read(index)
            digest.update(np.ascontiguousarray(square).data)
            if self._images is not None:
                self._images[index] = torch.tensor(square)
            if count in (CHUNK, len(chosen)):
                self._require_negative(count)
        return digest.hexdigest()

    def _square(self, index: int) -> np.ndarray:
        """Item `index` prepared, uint8 (channels, resolution, resolution)."""
        try:
            item = self._dataset[index]
        except Exception as error:  # datasets raise whatever a broken file provokes
            raise ValueError(f"item {index} of {self.name} cannot be read: {decoding.reason_of(error)}") from error
        return self._prepared(item, index)

    def _square_or_next(self, index: int) -> np.ndarray:
        return first_readable(self._square, index, len(self), lambda other: f"item {other}")[0]


class StreamDataset(Pictures):
    """The pictures of any iterable, read once, prepared, to a file on disk that goes with this process.

    For what only streams its items, such as a generator, torch's IterableDataset or a streamed dataset of Hugging Face. Items
    are those of `MapDataset`; one that cannot be prepared is left out, with a line in the log. `fingerprint` changes with the
    pixels and their order. Every process that opens a stream reads it.

    Args:
        stream: Gives its items one after the other.
        resolution, channels, background, white_level, upscale, value_range: See `MapDataset`.
        limit: Read so many pictures; by default all, up to a million, beyond which a stream may have no end.
        cache: Folder of the file; by default that of all caches.
        progress: Show a bar while reading.

    Raises:
        TypeError: What gives no items, such as a function that is not called; a loader of batches; an item that is no picture.
        ValueError: There are no pictures, or more than a million without a `limit`; the stream fails; none of its first 64 items
            can be prepared, or of all where there are fewer.
        OSError: The pictures do not fit on the disk.
    """

    def __init__(
        self,
        stream: Iterable[Any],
        resolution: int,
        channels: int = 3,
        *,
        limit: int | None = None,
        background: str = "white",
        white_level: int = decoding.WHITE_LEVEL,
        upscale: bool = False,
        value_range: tuple[float, float] | None = None,
        cache: str | Path | None = None,
        progress: bool = True,
    ):
        pixels = {"background": background, "white_level": white_level, "upscale": upscale}
        super().__init__(stream, resolution, channels, value_range=value_range, **pixels)
        if limit is not None:
            check_integer("limit", limit, 1)
        folder = cache_folder(cache)
        make_cache_folder(folder)
        size = channels * resolution**2
        words = "the items of %s are read once, to a file in %s: %.1f MiB for every 1000"
        logger.info(words, self.name, folder, 1000 * size / 2**20)
        with tempfile.TemporaryFile(dir=folder) as file:  # on disk as long as it is mapped
            count, digest = 0, hashlib.sha256()
            for square in self._squares(stream, limit, progress):
                content = np.ascontiguousarray(square).data
                try:
                    file.write(content)
                except OSError as error:
                    advice = "make room there, choose another cache folder, or give a limit"
                    raise OSError(f"after {count} images of {self.name} in {folder}: {error}; {advice}") from error
                digest.update(content)
                count += 1
            if not count:
                raise ValueError(f"{self.name} has no items")
            file.flush()
            self._images = np.memmap(file, np.uint8, "r", shape=(count, channels, resolution, resolution))
        self._require_negative(count)
        self.large, self.fingerprint = count > LARGE, digest.hexdigest()
        logger.info("%d images of %s take %.1f MiB on disk, in %s", count, self.name, count * size / 2**20, folder)

    def __len__(self) -> int:
        return len(self._images)

    def images(self, indices: Indices) -> Tensor:
        """Images at `indices`, uint8, (N, channels, resolution, resolution)."""
        return torch.from_numpy(np.array(self._images[as_indices(indices, len(self))]))

    def _squares(self, stream: Iterable[Any], limit: int | None, progress: bool) -> Iterator[np.ndarray]:
        """The pictures of a stream, prepared, uint8 (channels, resolution, resolution)."""
        iterator, count, refused = None, 0, None
        with progress_bar(desc="reading images", unit="image", total=limit, disable=not progress) as bar:
            for index in itertools.count():
                if count == limit:
                    return
                try:
                    iterator = iter(stream) if iterator is None else iterator
                    item = next(iterator)
                except StopIteration:
                    if refused is not None and not count:
                        raise ValueError(f"none of the {index} items of {self.name} is taken; the last: {refused}") from refused
                    return
                except Exception as error:  # datasets raise whatever a broken file provokes
                    raise ValueError(f"{self.name} fails at item {index}: {decoding.reason_of(error)}") from error
                try:
                    square = self._prepared(item, index)
                except ValueError as error:
                    if not count and index + 1 == LOOKED_AT:
                        raise ValueError(f"none of the first {LOOKED_AT} items is taken; the last: {error}") from error
                    refused = error
                    say_once(f"{error}; it is left out")
                    continue
                if count == MOST_STREAMED and limit is None:
                    raise ValueError(
                        f"{self.name} gives more than {MOST_STREAMED} pictures, and may have no end: "
                        f"data.StreamDataset(stream, {self.resolution}, limit=...) takes the first of them"
                    )
                count += 1
                bar.update()
                yield square


def as_dataset(dataset: Dataset | Foreign, resolution: int, channels: int = 3, **options: Any) -> Dataset:
    """A dataset of ours as it is, any map-style dataset as a `MapDataset`, any other iterable as a `StreamDataset`.

    Args:
        options: Those that both take.

    Raises:
        TypeError, ValueError: What these raise; one of ours with images of another size or other channels.
    """
    if not is_dataset(dataset):
        streams = not _is_map_style(dataset) and isinstance(dataset, Iterable) and not isinstance(dataset, _NAMED)
        kind: Any = StreamDataset if streams else MapDataset
        return kind(dataset, resolution, channels, **options)
    name = type(dataset).__name__
    decoding.require_channels(name, dataset.channels, channels)
    if dataset.resolution != resolution:
        raise ValueError(
            f"{name} has images of {dataset.resolution} pixels per side, {resolution} are asked for: open it at that resolution, "
            f"or train with --vae.resolution {dataset.resolution}"
        )
    return dataset


def source_name(dataset: Dataset | Foreign) -> str:
    """What is recorded as the source of images that were handed over as a dataset: "dataset: " and its class."""
    return HANDED_OVER + (dataset.name if isinstance(dataset, Pictures) else type(dataset).__name__)


def _is_map_style(dataset: Any) -> bool:
    """Whether something gives items by number; torch's IterableDataset has the method and does not."""
    by_number = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return by_number and not isinstance(dataset, torch.utils.data.IterableDataset)


def _is_range(values: Any) -> bool:
    """Whether these are two finite numbers, the first below the second."""
    pair = isinstance(values, Sequence) and len(values) == 2
    return pair and all(isinstance(value, numbers.Real) and math.isfinite(value) for value in values) and values[0] < values[1]


def _require_pictures(dataset: Any) -> None:
    """`TypeError` unless something gives pictures, by number or in a row; it says what to give in place of it."""
    name = type(dataset).__name__
    if isinstance(dataset, str | bytes | Path):
        raise TypeError(f"a dataset gives numbered images, got the {name} {dataset!r}: open_dataset opens folders and names")
    if isinstance(dataset, Mapping):
        raise TypeError(f"a dataset gives numbered images, got a {name} of {', '.join(map(str, dataset))}: give one of these")
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise TypeError(f"a dataset gives one picture at a time, got a {name}, which gives batches: give its dataset")
    if isinstance(dataset, type):
        raise TypeError(f"a dataset gives pictures, got the class {dataset.__name__} itself: give an object of it")
    if _is_map_style(dataset) or isinstance(dataset, Iterable):
        return
    if callable(dataset):
        called = getattr(dataset, "__name__", name)
        raise TypeError(f"a dataset gives pictures, got {called}, which is to be called: give what it returns, {called}(...)")
    raise TypeError(f"a dataset needs __len__ and __getitem__, or else __iter__, got a {name}")


def _require_items(dataset: MapStyle) -> None:
    """`TypeError` or `ValueError` unless something gives numbered items, and there are any."""
    name = type(dataset).__name__
    if not _is_map_style(dataset):
        raise TypeError(
            f"a dataset needs __len__ and __getitem__, got a {name}, which only streams: data.StreamDataset reads these"
        )
    try:
        length = len(dataset)
    except Exception as error:  # in datasets of others, whatever they raise
        raise TypeError(f"a dataset needs a length, that of {name} is missing: {decoding.reason_of(error)}") from error
    if not length:
        raise ValueError(f"{name} has no items")
