"""Any folder of images as a dataset: cropped to squares once, then read from a memory map."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from multibeta.caches import build_once, cache_name, cached, may_use_memory, remove_older, size_and_time
from multibeta.data import decoding, images
from multibeta.data.arrays import MappedArray, map_npy
from multibeta.data.dataset import Indices
from multibeta.data.images import CHUNK, ImageDataset, as_indices, check_resolution
from multibeta.data.searching import ImageSearch, Skipped, by_extension
from multibeta.files import expanded, require_file, say_once, write_atomically, write_text
from multibeta.processors import cores
from multibeta.progress import progress_bar

CACHE_VERSION = 3

logger = logging.getLogger(__name__)

SHOWN = 5  # of the files that could not be read

Squares = tuple[MappedArray | np.ndarray, Skipped, dict[str, int], str]  # squares, skipped, sides of small images, fingerprint


class ImageFolder(ImageDataset):
    """The images below a folder, in the order of their relative paths, as squares of one resolution.

    Each image is turned upright by its EXIF orientation, laid on `background` where it is transparent, converted to RGB or grey,
    scaled with Lanczos so that the shorter side becomes `resolution`, and cropped at the centre. Animations give their first
    frame, colour profiles are not applied. Files with the extension of a format of `decoding.FORMATS`, and files without one, are
    read as what their content is. Hidden files and folders are ignored; linked ones are followed.

    16-bit grey keeps its range: 0 to `white_level` become 0 to 255, whatever an image holds; the log says where all are dark.

    The result is written once to a memory map and reused until a file or one of these options changes. What is left out, also
    because it is small, is kept in `skipped`, a list of (relative path, reason) in which "*.txt" stands for all files with an
    extension of no images; `paths` names the file of each image, and `fingerprint` changes with their pixels and their order.

    A folder with one subfolder for each class, as torchvision's ImageFolder reads it, has classes: `class_names` are the folders
    in `root` in which images lie, at any depth, and `labels` tells which. With an image in `root` itself there are none.

    Args:
        root: Folder, searched with all folders below it.
        resolution: Pixels per side.
        channels: 3 for RGB, or 1 for grey: colour images become their luma (ITU-R 601).
        background: Colour under transparent pixels, such as "white" or "#808080".
        white_level: Value of 16-bit grey that becomes white, such as 4095 of a camera with 12 bits.
        cache: Folder of the memory map; by default that of all caches (`caches.cache_folders`), or memory where there is none.
        minimum: Fewest images to accept.
        upscale: Take images whose shorter side is below `resolution`, enlarged; otherwise they are skipped.
        progress: Show progress bars while reading.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is missing or a file.
        ValueError: no images, or fewer than `minimum`, all that reach `resolution` or with `upscale` all that can be read.
        OSError: the cache cannot be written where it was asked for, or the images take more than 4 GiB of memory without one.
    """

    def __init__(
        self,
        root: str | Path,
        resolution: int,
        *,
        channels: int = 3,
        background: str = "white",
        white_level: int = decoding.WHITE_LEVEL,
        cache: str | Path | None = None,
        minimum: int = 2,
        upscale: bool = False,
        progress: bool = True,
    ):
        check_resolution(resolution)
        if minimum < 1:
            raise ValueError(f"minimum must be at least 1, got {minimum}")
        decoding.require_pixel_options(channels, background, white_level)
        self.root = expanded(root).resolve()
        self.resolution, self.channels = resolution, channels
        found = ImageSearch(self.root)
        files, others = {path: size_and_time(self.root / path) for path in found}, found.others
        pixels = {"resolution": resolution, "channels": channels, "background": background, "white_level": white_level}
        source = _Source(self.root, list(files), pixels, minimum, upscale, progress)
        purpose = f"{resolution}" if channels == 3 else f"{resolution}x{channels}"
        name = cache_name(self.root, purpose, [CACHE_VERSION, background, white_level, list(files.items())]) + ".json"
        self._images, skipped, small, self.fingerprint = _open_squares(source, name, cache)
        unreadable = {path for path, _ in skipped}
        self.paths = [path for path in files if path not in unreadable]
        _require_minimum(self.root, len(self.paths), minimum, skipped)
        self._rows: np.ndarray | None = None  # of the images that are taken, where not all are
        too_small = [] if upscale else [(path, _too_small(side, resolution)) for path, side in small.items()]
        if too_small:
            _require_resolution(source, small, len(self.paths))
            say_once(_words_on_small(source, small, len(self.paths)))
            self._leave_out(small)
        self.class_names, self._labels = _classes(self.paths)
        self.skipped = sorted(skipped + too_small + others)
        if skipped:
            some = "; ".join(f"{path}: {reason}" for path, reason in skipped[:SHOWN])
            more = f"; {len(skipped) - SHOWN} more in `ImageFolder.skipped`" if len(skipped) > SHOWN else ""
            say_once(f"skipped {len(skipped)} of {len(files)} files in {self.root}: {some}{more}")
        if others:
            say_once(f"passed over in {self.root}, because they are not read as images: {by_extension(others)}")

    def _leave_out(self, small: dict[str, int]) -> None:
        """Pass over the images at the paths of `small`."""
        taken = [row for row, path in enumerate(self.paths) if path not in small]
        self._rows, self.paths = np.array(taken), [self.paths[row] for row in taken]
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} {taken}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        colours = {1: "grey", 3: "RGB"}[self.channels]
        return f"ImageFolder({str(self.root)!r}: {len(self)} {colours} images of {self.resolution} pixels)"

    def images(self, indices: Indices) -> torch.Tensor:
        """Images at `indices`, uint8, (N, channels, resolution, resolution)."""
        rows = as_indices(indices, len(self))
        return torch.from_numpy(np.array(self._images[rows if self._rows is None else self._rows[rows]]))

    def labels(self, indices: Indices) -> torch.Tensor:
        """Class of each image at `indices`, int64, (N,), a position in `class_names`; `ValueError` where there are none."""
        if not self.class_names:
            raise ValueError(f"{self!r} has no classes: its images do not all lie in subfolders")
        return self._labels[as_indices(indices, len(self))]


def _classes(paths: list[str]) -> tuple[tuple[str, ...], torch.Tensor]:
    """The first folders of relative paths, sorted, and which of them each path has, int64, (N,); none where a path has none."""
    if not all("/" in path for path in paths):
        return (), torch.empty(0, dtype=torch.int64)
    names, labels = np.unique([path.partition("/")[0] for path in paths], return_inverse=True)
    return tuple(names.tolist()), torch.from_numpy(labels)


@dataclass(frozen=True)
class _Source:
    """What to decode: the image files of a folder, and how; `pixels` are the options of `decoding.square`."""

    root: Path
    paths: list[str]
    pixels: dict
    minimum: int
    upscale: bool
    progress: bool

    @property
    def square(self) -> tuple[int, int, int]:
        """Shape of one decoded image, (C, H, W)."""
        return self.pixels["channels"], self.pixels["resolution"], self.pixels["resolution"]

    def bytes_of(self, count: int) -> int:
        """Size of `count` decoded images."""
        return count * math.prod(self.square)


def _open_squares(source: _Source, name: str, cache: str | Path | None) -> Squares:
    """(images, skipped, small) of a source: from the cache entry `name`, made where it is missing, or else from memory."""
    try:
        entry = cached(name, cache)
        return build_once(
            entry, lambda: _read_cache(entry, source), lambda: build_cache(entry, source), doing="decoding images into"
        )
    except OSError as error:
        if not may_use_memory(cache):
            raise OSError(f"cannot write the image cache of {source.root}: {error}") from error
        return _decode_into_memory(source, error)


def build_cache(entry: Path, source: _Source) -> None:
    """Decode all images into a .npy file, uint8, (N, C, resolution, resolution), then note in `entry`, JSON, what came out.

    The headers are read first, so that too few images of the resolution are reported before any is decoded.
    Older caches of the same folder, resolution and channels are removed.
    """
    sides, skipped = _check(source)
    needed = source.bytes_of(len(sides))
    free = shutil.disk_usage(entry.parent).free
    advice = f"it takes {needed / 2**20:.1f} MiB in {entry.parent}: make room there or choose another cache folder"
    if free < needed:
        raise OSError(f"{free / 2**20:.0f} MiB are free; {advice}")
    logger.info("writing %d images of %s to a cache of %.1f MiB in %s", len(sides), source.root, needed / 2**20, entry.parent)

    digest = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        # Plain sequential writes: on a full disk they raise, where a memory map would kill the process.
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(sides), *source.square)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for square in _decode(source, list(sides), skipped, digest):
            file.write(square.tobytes())
        header["shape"] = (len(source.paths) - len(skipped), *source.square)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == start, "headers of both lengths must take the same room"

    try:
        write_atomically(entry.with_suffix(".npy"), write)
        notes = {"skipped": sorted(skipped), "small": _small(sides, skipped, source), "fingerprint": digest.hexdigest()}
        write_text(entry, json.dumps(notes))
    except OSError as error:
        raise OSError(f"{error}; {advice}") from error
    remove_older(entry.with_suffix(""))


def _read_cache(entry: Path, source: _Source) -> Squares | None:
    """What `build_cache` made, the squares as a memory map; None where it is not complete."""
    try:
        notes = json.loads(entry.read_bytes())
        skipped, small = [(path, reason) for path, reason in notes["skipped"]], dict(notes["small"])
        fingerprint = str(notes["fingerprint"])
        squares = map_npy(entry.with_suffix(".npy"))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is not there, cut off, or something else
    expected = len(source.paths) - len(skipped), *source.square
    return (squares, skipped, small, fingerprint) if squares.shape == expected and squares.dtype == np.uint8 else None


def _decode_into_memory(source: _Source, reason: OSError) -> Squares:
    """The same without a cache, for the `reason` that there is none."""
    sides, skipped = _check(source)
    needed = source.bytes_of(len(sides))
    if needed > images.MEMORY_LIMIT_BYTES:
        raise OSError(f"{len(sides)} images of {source.root} take {needed / 2**30:.1f} GiB without a cache: {reason}") from reason
    logger.warning("%d images of %s are kept in %.1f MiB of memory: %s", len(sides), source.root, needed / 2**20, reason)
    squares = np.empty((len(sides), *source.square), dtype=np.uint8)
    count, digest = 0, hashlib.sha256()
    for square in _decode(source, list(sides), skipped, digest):
        squares[count] = square
        count += 1
    return squares[:count], sorted(skipped), _small(sides, skipped, source), digest.hexdigest()


def _check(source: _Source) -> tuple[dict[str, int], Skipped]:
    """Read the headers; errors for too few images.

    Returns:
        sides: Shorter side of each readable image by path.
        skipped: (path, reason) of the others.
    """

    def read(path: str) -> Any:
        with open(require_file(source.root / path), "rb") as file:
            return min(decoding.open_image(file, decoding.extension(path)).size)

    sides, skipped = {}, []
    for path, result in _in_threads(read, source.paths, "checking images", source.progress):
        if isinstance(result, Exception):
            skipped.append((path, decoding.reason_of(result)))
        else:
            sides[path] = result
    _require_minimum(source.root, len(sides), source.minimum, skipped)
    if not source.upscale:
        _require_resolution(source, _small(sides, skipped, source), len(sides))
    return sides, skipped


def _decode(source: _Source, paths: list[str], skipped: Skipped, digest: hashlib._Hash) -> Iterator[np.ndarray]:
    """Decode `paths` in order to squares, whose bytes `digest` takes; the (path, reason) of what fails goes to `skipped`."""

    def read(path: str) -> Any:
        with open(require_file(source.root / path), "rb") as file:
            image = decoding.open_image(file, decoding.extension(path))
            square = decoding.square(image, **source.pixels)
            return square, decoding.brightest(image) if decoding.is_deep(image) else 0

    brightest = 0
    for path, result in _in_threads(read, paths, "decoding images", source.progress):
        if isinstance(result, Exception):
            skipped.append((path, decoding.reason_of(result)))
        else:
            square, value = result
            brightest = max(brightest, value)
            digest.update(np.ascontiguousarray(square).data)
            yield square
    _require_minimum(source.root, len(source.paths) - len(skipped), source.minimum, skipped)
    if 0 < brightest * decoding.DARK <= source.pixels["white_level"]:
        advice = f"white_level={brightest} (--data.white-level {brightest}) makes that white"
        logger.warning("16-bit greys in %s reach %d and come out dark: %s", source.root, brightest, advice)


def _in_threads(read: Callable, paths: list[str], title: str, progress: bool) -> Iterator[tuple]:
    """(path, read(path) or the exception that it raised) of all paths in order; a chunk of them is read ahead."""

    def attempt(path: str) -> Any:
        try:
            return read(path)
        except Exception as error:  # decoders raise whatever a broken file provokes
            return error

    bar = progress_bar(total=len(paths), desc=title, unit="image", disable=not progress)
    with bar, ThreadPoolExecutor(min(16, cores())) as pool:
        for first in range(0, len(paths), CHUNK):
            chunk = paths[first : first + CHUNK]
            for path, result in zip(chunk, pool.map(attempt, chunk), strict=True):
                yield path, result
                bar.update()


def _small(sides: dict[str, int], skipped: Skipped, source: _Source) -> dict[str, int]:
    """Sides of the images below the resolution, of those that could be read."""
    left_out = {path for path, _ in skipped}
    return {path: side for path, side in sides.items() if side < source.pixels["resolution"] and path not in left_out}


def _require_minimum(root: Path, count: int, minimum: int, skipped: Skipped) -> None:
    if count >= minimum:
        return
    message = f"{count} readable images in {root}, at least {minimum} are needed"
    if skipped:
        path, reason = skipped[0]
        message += f"; {len(skipped)} files could not be read, e.g. {path}: {reason}"
    raise ValueError(message)


def _require_resolution(source: _Source, small: dict[str, int], count: int) -> None:
    """`ValueError` where fewer than the minimum are left of `count` images without the `small` ones."""
    if small and count - len(small) < source.minimum:
        example, resolution = min(small, key=small.__getitem__), source.pixels["resolution"]
        raise ValueError(
            f"{len(small)} of {count} images in {source.root} are smaller than resolution {resolution}, and at least "
            f"{source.minimum} must reach it; the smallest is {example} with a shorter side of {small[example]}. To take all of "
            f"them choose a resolution up to {small[example]}, or allow upscale, which enlarges them"
        )


def _words_on_small(source: _Source, small: dict[str, int], count: int) -> str:
    """What was left out because it is small, and what takes it."""
    example, resolution = min(small, key=small.__getitem__), source.pixels["resolution"]
    return (
        f"skipped {len(small)} of {count} images in {source.root}, smaller than resolution {resolution}, such as {example} with "
        f"a shorter side of {small[example]}: --data.upscale takes them, enlarged, --vae.resolution {small[example]} takes all"
    )


def _too_small(side: int, resolution: int) -> str:
    return f"its shorter side of {side} pixels is below resolution {resolution}"
