"""Encoded images in folders and zip archives, decoded when they are asked for; those of published datasets among them."""

from __future__ import annotations

import errno
import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multibeta.data.arrays import MappedArray, local_data_offset, open_zip
from multibeta.data.dataset import Indices
from multibeta.data.decoding import (
    WHITE_LEVEL,
    TooSmall,
    decoded,
    extension,
    extensions,
    open_image,
    require_pixels,
    require_side,
    to_bytes,
)
from multibeta.data.images import ImageDataset, as_indices, check_resolution
from multibeta.distribution import world
from multibeta.files import expanded, require_file, say_once
from multibeta.processors import cores

MAX_FILE_BYTES = 2**26
MAX_PIXELS = 2**26  # more than any image of these datasets has
SEARCH_DEPTH = 3
MOST_REPLACED = 1000  # images in a row that cannot be read
OWN_TROUBLE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors of this process, not of an image


Names = Sequence[str] | MappedArray | np.ndarray


class ChangedFile(OSError):
    """A file is not the one whose images were listed: no other image may stand in for what was read there."""


class Files(Protocol):
    """Encoded images by number: `FolderFiles`, `ZipFiles`, or the values of an LMDB."""

    @property
    def root(self) -> Path:
        """The folder or archive."""
        ...

    @property
    def names(self) -> Names:
        """What each image is called there."""
        ...

    def read(self, index: int, /) -> bytes:
        """The bytes of one image."""
        ...


class EncodedImages(ImageDataset):
    """Base of datasets whose images stay encoded on disk, in files or archives.

    A subclass says with `_square` how an image becomes a square of `resolution` pixels.

    Args:
        files: Where they lie.
        resolution: Pixels per side.
        upscale: Accept images that are smaller.

    Attributes:
        replaces: Whether the next image that can be read stands in for one that cannot, with a line in the log, whoever reads it
            and however often; otherwise that is an error. Where nothing is known of each image.
    """

    channels: int = 3
    replaces: bool = False

    def __init__(self, files: Files, resolution: int, upscale: bool = False):
        check_resolution(resolution)
        self.resolution = resolution
        self.upscale = upscale
        self._files = files
        self._stand_ins: dict[int, int] = {}  # which image was shown for which
        self._look()

    def __len__(self) -> int:
        return len(self._files.names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._files.root)!r}: {len(self)} images of {self.resolution} pixels)"

    @property
    def paths(self) -> Names:
        """Name of the file of each image."""
        return self._files.names

    def images(self, indices: Indices) -> Tensor:
        """Images at `indices`, uint8, (N, channels, resolution, resolution).

        Raises:
            ValueError: a file is missing, damaged or not what the dataset holds, and where `replaces` also those after it.
        """
        array = as_indices(indices, len(self))
        images = np.empty((len(array), self.channels, self.resolution, self.resolution), dtype=np.uint8)
        load = self._load_or_next if self.replaces else self._load

        def fill(rows: np.ndarray) -> None:
            for row in rows.tolist():
                images[row] = load(int(array[row]))

        workers = min(16, max(1, cores() // world().local_size))
        with ThreadPoolExecutor(workers) as pool:  # each takes several pieces, because some images take longer
            list(pool.map(fill, np.array_split(np.arange(len(array)), min(len(array), 4 * workers) or 1)))
        return torch.from_numpy(images)

    def _look(self) -> None:
        """Read an image: what is wrong with the first is wrong with all, and is said at once."""
        self.images([0])

    def _load(self, index: int) -> np.ndarray:
        """One image, uint8 (channels, resolution, resolution)."""
        try:
            return self._prepared(index)
        except Exception as error:  # decoders raise whatever a broken file provokes
            if isinstance(error, MemoryError | ChangedFile) or getattr(error, "errno", None) in OWN_TROUBLE:
                raise
            kind = TooSmall if isinstance(error, TooSmall) else ValueError
            raise kind(f"{self._files.root}: {self._name(index)}: {error}") from None

    def _load_or_next(self, index: int) -> np.ndarray:
        image, shown = first_readable(self._load, index, len(self), self._name)
        if shown != index:
            self._stand_ins[index] = shown
        return image

    def _prepared(self, index: int) -> np.ndarray:
        """One image, uint8 (channels, resolution, resolution); raises whatever is wrong with it."""
        image = self._decode(index)
        if not self.upscale:
            require_side(image.size, self.resolution)
        return self._square(image).transpose(2, 0, 1)

    def _name(self, index: int) -> str:
        name = self._files.names[index]
        return name if isinstance(name, str) else str(name.item().decode(errors="replace"))

    def _decode(self, index: int) -> Image.Image:
        return decode(self._files.read(index), self._name(index))

    def _square(self, image: Image.Image) -> np.ndarray:
        raise NotImplementedError


def first_readable(
    load: Callable[[int], np.ndarray], index: int, length: int, name: Callable[[int], str]
) -> tuple[np.ndarray, int]:
    """Image `index` of `length` or, where `load` raises `ValueError`, the first after it for which it does not; the log says so.

    Returns:
        The image, and its number.

    Raises:
        ValueError: There is none among the next thousand.
    """
    tried, reason = min(MOST_REPLACED, length), ""
    for other in ((index + further) % length for further in range(tried)):
        try:
            image = load(other)
        except ValueError as error:
            reason = reason or str(error)
            continue
        if reason:
            say_once(f"{reason}; {name(other)} stands in for it")
        return image, other
    raise ValueError(f"{reason}; and none of the {tried - 1} after it can stand in for it" if tried > 1 else reason)


class FolderFiles:
    """Files by their names below a folder."""

    def __init__(self, root: str | Path, names: Sequence[str]):
        self.root, self.names = Path(root), names

    def read(self, index: int) -> bytes:
        """The bytes of one file."""
        with open(require_file(self.root / self.names[index]), "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
        return content


class ZipFiles:
    """Members of a zip archive by their names; the archive is opened for each, so that processes and threads can share this.

    Raises:
        ValueError: no zip archive, or one that lacks some of `names`.
    """

    def __init__(self, root: str | Path, names: list[str]):
        self.root, self.names = Path(root), names
        places = np.zeros((len(names), 5), dtype=np.int64)  # header offset, compressed and full size, crc, method
        with open_zip(self.root) as archive:
            for row, name in enumerate(names):
                try:
                    info = archive.getinfo(name)
                except KeyError:
                    count = len(archive.namelist())
                    raise ValueError(f"{root} holds {count} members, but not {name}") from None
                places[row] = info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type
        self._places = places

    def read(self, index: int) -> bytes:
        """The bytes of one member."""
        offset, compressed, size, crc, method = self._places[index].tolist()
        if max(compressed, size) > MAX_FILE_BYTES:
            raise ValueError(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
        with open(self.root, "rb") as file:
            file.seek(local_data_offset(self.root, offset))
            content = file.read(compressed)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size)
        elif method != zipfile.ZIP_STORED:
            raise ValueError(f"it is compressed by method {method}; stored and deflated files can be read")
        if len(content) != size or zlib.crc32(content) != crc:
            raise ValueError(f"{self.root} is damaged here")
        return content


def decode(content: bytes, name: str = "") -> Image.Image:
    """An RGB image of Pillow from the bytes of a file; its size is checked before its pixels are decoded."""
    image = open_image(io.BytesIO(content), extension(name))
    require_pixels(image.size, MAX_PIXELS)
    with decoded(image):
        return to_bytes(3, "white", WHITE_LEVEL, image)


def find_file(path: str | Path, *names: str) -> Path:
    """`path` itself, or what matches the first of `names` in it or up to two folders below.

    Args:
        path: File or folder.
        names: Of files or folders, also as patterns.

    Raises:
        FileNotFoundError: neither; says what is there.
        ValueError: several match.
    """
    path = expanded(path)
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_dir():
        return require_file(path)
    match = find_below(path, *names)
    if match is None:
        raise FileNotFoundError(f"{path} holds no {' or '.join(names)}, found {what_is_in(path)}")
    return match


def find_below(root: str | Path, *names: str) -> Path | None:
    """What matches the first of `names`, which may be patterns, in the folder `root` or up to two below, or None.

    Raises:
        ValueError: several match.
    """
    level = [Path(root)]
    for _ in range(SEARCH_DEPTH):
        for name in names:
            matches = [path for folder in level for path in sorted(folder.glob(name)) if not path.name.startswith(".")]
            if len(matches) > 1:
                raise ValueError(
                    f"{root} holds {', '.join(str(path.relative_to(root)) for path in matches[:4])}: name one of them"
                )
            if matches:
                return matches[0]
        level = [folder for above in level for folder in _folders(above)]
    return None


def what_is_in(folder: str | Path) -> str:
    """The first names in a folder, for a message."""
    names = sorted(entry.name for entry in Path(folder).iterdir() if not entry.name.startswith("."))
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "nothing"


def find_folder(path: str | Path) -> Path:
    """`path` as a folder that exists."""
    path = expanded(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is a file, not a folder" if path.exists() else f"there is no folder {path}")
    return path


def find_images(path: str | Path, *, others: tuple[str, ...] = ()) -> tuple[Path, list[str]]:
    """All images of a folder or a zip archive, ordered by the numbers in their names.

    Args:
        path: A folder with images at any depth, a zip archive of them, or a folder that holds nothing else but one.
        others: More extensions to take.

    Returns:
        root: The folder or the archive.
        names: Relative paths, or members, without hidden ones.

    Raises:
        FileNotFoundError: there is no such place, or there are no images; says what is there.
    """
    path, suffixes = expanded(path), (*extensions(), *others)
    if path.is_file():
        with open_zip(path) as archive:
            names = [name for name in archive.namelist() if not name.startswith(("__MACOSX", ".")) and "/." not in name]
    else:
        names = list(_files_below(find_folder(path)))
    images = [name for name in names if name.lower().endswith(suffixes)]
    archives = [name for name in names if name.lower().endswith(".zip")]
    if not images and len(archives) == 1 and path.is_dir():
        return find_images(path / archives[0])
    if not images:
        there = ", ".join(sorted(names)[:8]) or "nothing"
        raise FileNotFoundError(f"{path} holds no images ({' '.join(suffixes)}), found {there}")
    return path, sorted(images, key=by_number)


def open_images(root: Path, names: list[str]) -> FolderFiles | ZipFiles:
    """The images `names` of a folder or a zip archive."""
    return ZipFiles(root, names) if root.is_file() else FolderFiles(root, names)


def by_number(name: str) -> list[int | str]:
    """Sorting key of names by the numbers in them."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def read_text(path: str | Path) -> str:
    """Text of a list of files, in UTF-8 with or without a mark.

    Raises:
        ValueError: it is no text.
    """
    try:
        return require_file(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from None


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and those that cannot be looked into."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in sorted(entries, key=lambda entry: entry.name) if _is_open_folder(entry)]
    except OSError:
        return []


def _is_open_folder(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith((".", "__MACOSX")) and entry.is_dir()


def _files_below(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        below = Path(folder).relative_to(root)
        yield from ((below / name).as_posix() for name in files if not name.startswith("."))


def choose_listed(names: list[str], listing: str | Path) -> list[str]:
    """Those of `names` that the text file `listing` names, one a line, in its order; folders in it may be left out."""
    lines = read_text(expanded(listing)).split()
    known = {name.rpartition("/")[2]: name for name in names} | {name: name for name in names}
    chosen = [known.get(line) or known.get(line.rpartition("/")[2]) for line in lines]
    missing = [line for line, name in zip(lines, chosen, strict=True) if name is None]
    if missing or not chosen:
        raise ValueError(f"{listing} lists {len(lines)} files, {len(missing)} of them are missing, e.g. {', '.join(missing[:3])}")
    return [name for name in chosen if name is not None]


def centre_square(image: Image.Image) -> Image.Image:
    """The largest square in the middle, at whole pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def resize_without_antialiasing(image: Image.Image | np.ndarray, resolution: int) -> np.ndarray:
    """Bilinear interpolation between the four nearest pixels: (H, W, 3) to uint8 (resolution, resolution, 3).

    This is what OpenCV's INTER_LINEAR does, up to rounding, and with it the published preprocessing of the faces. In NumPy:
    torch's thread pool fails now and then when several threads of a forked process are the first to use it.
    """
    pixels = np.asarray(image)
    for axis in (0, 1):
        side = pixels.shape[axis]
        places = np.clip((np.arange(resolution) + 0.5) * side / resolution - 0.5, 0, side - 1)
        below = places.astype(np.int64)
        fraction = (places - below).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        low, high = pixels.take(below, axis), pixels.take(np.minimum(below + 1, side - 1), axis)
        pixels = low * (1 - fraction) + high * fraction
    return (pixels + 0.5).astype(np.uint8)
