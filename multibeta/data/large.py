"""More images than are decoded at once: they stay in their files, an index names them, each is prepared when it is asked for."""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from multibeta.caches import cache_folders, cache_name
from multibeta.data import decoding
from multibeta.data.dataset import Indices
from multibeta.data.files import EncodedImages, Files, FolderFiles
from multibeta.data.images import as_indices
from multibeta.data.index import Entry, Notes, current_index, open_index
from multibeta.data.searching import ImageSearch, by_extension
from multibeta.files import expanded, say_once
from multibeta.progress import progress_bar

logger = logging.getLogger(__name__)

LARGE = 100_000  # images; a folder of no more is decoded at once, to a cache
LOOKED_AT = 64  # of the images, when they are opened
INDEX_VERSION = 3


class LargeImages(EncodedImages):
    """Base of datasets of any number of images, each prepared as `ImageFolder` prepares files, whenever it is asked for.

    For an image that cannot be read, or that is too small, the next one stands in, with a line in the log; that is known when it
    is first asked for, and from then on its class in `labels` is that of the image shown. `fingerprint` changes with the names in
    the index, and with the pixels of 64 images spread evenly.

    Args:
        files: Where they lie.
        digest: Of all their names.
        resolution, channels, background, white_level, upscale: See `ImageFolder`.

    Raises:
        ValueError: Half of these 64 images, or more, cannot be read, or are smaller than the resolution and `upscale` is not set.
    """

    replaces = True

    def __init__(
        self, files: Files, digest: str, resolution: int, *, channels: int, background: str, white_level: int, upscale: bool
    ):
        decoding.require_pixel_options(channels, background, white_level)
        self.channels, self.background, self.white_level = channels, background, white_level
        self.fingerprint = digest
        super().__init__(files, resolution, upscale)
        self.large = len(self) > LARGE

    def _look(self) -> None:
        chosen = np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).astype(np.int64))
        unread, small = [], []
        for index in chosen.tolist():
            try:
                self._load(index)
            except ValueError as error:
                (small if isinstance(error, decoding.TooSmall) else unread).append(str(error))
        if 2 * len(unread + small) >= len(chosen):
            kinds = [(unread, "cannot be read", ""), (small, "are too small", "; --data.upscale (upscale=True) enlarges them")]
            words = [f"{len(each)} {what}, e.g. {each[0]}{advice}" for each, what, advice in kinds if each]
            raise ValueError(f"of {len(chosen)} images that were looked at {', and '.join(words)}")
        pixels = self.images(chosen).numpy()
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} {pixels.shape}".encode() + pixels.tobytes()).hexdigest()

    def _shown(self, indices: Indices) -> np.ndarray:
        """`indices`, and in place of those whose images were found unreadable those of the images that stand in for them."""
        rows = as_indices(indices, len(self))
        return np.array([self._stand_ins.get(row, row) for row in rows.tolist()], dtype=np.int64) if self._stand_ins else rows

    def _prepared(self, index: int) -> np.ndarray:
        image = decoding.open_image(io.BytesIO(self._files.read(index)), decoding.extension(self._name(index)))
        pixels = self.channels, self.background, self.white_level
        return decoding.square(image, self.resolution, *pixels, self.upscale)


class LargeFolder(LargeImages):
    """The images below a folder of millions, in the order of their relative paths: as `ImageFolder`, but decoded on demand.

    Their names are listed once, in an index in the cache (about 40 bytes an image), which all processes share. It is made anew
    when a file was added, removed or renamed; that the content of a file changed is noticed in 64 of them. Classes are those of
    `ImageFolder`.

    Args:
        root: Folder, searched with all folders below it.
        resolution, channels, background, white_level, upscale: See `ImageFolder`.
        cache: Folder of the index; by default that of all caches (`caches.cache_folders`).
        progress: Show a bar while listing.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is missing or a file.
        ValueError: There are no images, or half of them cannot be read or are too small.
        OSError: The index cannot be written.
    """

    def __init__(
        self,
        root: str | Path,
        resolution: int,
        *,
        channels: int = 3,
        background: str = "white",
        white_level: int = decoding.WHITE_LEVEL,
        upscale: bool = False,
        cache: str | Path | None = None,
        progress: bool = True,
    ):
        self.root = expanded(root).resolve()
        listing = _Listing(self.root, cache, progress)
        index = open_index(listing.name, cache, listing.scan, listing.is_current)
        if index.notes["others"]:
            say_once(f"passed over in {self.root}, because they are not read as images: {index.notes['others']}")
        names, self._starts = list(index.notes["classes"]), np.array(list(index.notes["classes"].values()), dtype=np.int64)
        self.class_names = tuple(sorted(names))
        self._classes = np.array([self.class_names.index(name) for name in names], dtype=np.int64)
        pixels = {"channels": channels, "background": background, "white_level": white_level, "upscale": upscale}
        super().__init__(FolderFiles(self.root, index), index.notes["digest"], resolution, **pixels)

    def labels(self, indices: Indices) -> torch.Tensor:
        """Class of each image at `indices`, int64, (N,), a position in `class_names`; `ValueError` where there are none.

        Of an image for which another stands in it is that of the other, once it was read.
        """
        if not self.class_names:
            raise ValueError(f"{self!r} has no classes: its images do not all lie in subfolders")
        rows = np.searchsorted(self._starts, self._shown(indices), side="right") - 1
        return torch.from_numpy(self._classes[rows])


class _Listing:
    """How the index of a folder is made; its notes are the times of all folders, the first image of each class, and a digest."""

    def __init__(self, root: Path, cache: str | Path | None, progress: bool = False):
        self.root, self.progress = root, progress
        self.caches = {folder.resolve() for folder in cache_folders(cache)}  # which change by what is done here
        self.name = cache_name(root, "index", [INDEX_VERSION, decoding.extensions()])

    def scan(self, notes: Notes) -> Iterator[Entry]:
        """The path of each image, relative to the folder."""
        digest, times, classes, classified = hashlib.sha256(), {}, {}, True
        search = ImageSearch(self.root, times.__setitem__)
        for number, path in enumerate(progress_bar(search, desc="listing images", unit="image", disable=not self.progress)):
            digest.update(os.fsencode(path) + b"\0")
            folder, inside, _ = path.partition("/")
            classified = classified and bool(inside)
            if classified:
                classes.setdefault(folder, number)
            yield path, ()
        others = by_extension(search.others)
        notes |= {"folders": times, "classes": classes if classified else {}, "digest": digest.hexdigest(), "others": others}
        logger.info("listed the images of %s", self.root)

    def is_current(self, notes: Notes) -> bool:
        """Whether no folder has changed since."""
        places = ((self.root / folder, time) for folder, time in notes["folders"].items())
        return all(_changed(place) == time for place, time in places if place.resolve() not in self.caches)


def is_large(root: str | Path, cache: str | Path | None = None) -> bool:
    """Whether a folder holds more images than are decoded at once.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: `root` is no folder, or holds no images.
    """
    root = expanded(root).resolve()
    listing = _Listing(root, cache)
    if (index := current_index(listing.name, cache, listing.is_current)) is not None:
        return len(index) > LARGE
    return sum(1 for _ in itertools.islice(ImageSearch(root), LARGE + 1)) > LARGE


def _changed(folder: Path) -> int:
    """When a folder was last changed, in nanoseconds; -1 where it cannot be looked at."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1
