"""An index of many images: their names and places in a file of the cache that is mapped, so that no list is kept in memory."""

from __future__ import annotations

import functools
import json
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from multibeta.caches import build_once, cache_folders, cached, remove_older
from multibeta.data.arrays import map_npz, read_npz
from multibeta.files import write_atomically

Entry = tuple[str, tuple[int, ...]]
"""The name of an image, and the numbers that say where it lies."""

Notes = dict[str, Any]


class Index(Sequence[str]):
    """The names of N images by their numbers, each read from the mapped file when it is asked for.

    Attributes:
        places: The numbers of each image, int64, (N, K), as `MappedArray`.
        notes: What was noted when the index was made, JSON.

    Raises:
        FileNotFoundError, ValueError: There is no whole index at `path`.
    """

    def __init__(self, path: Path):
        open_array = functools.partial(map_npz, path, progress=False)
        self.notes: Notes = json.loads(read_npz(path, "notes", _require(np.uint8, 1)).tobytes())
        self._letters = open_array("letters", _require(np.uint8, 1))
        self._ends = open_array("ends", _require(np.int64, 1))
        self.places = open_array("places", _require(np.int64, 2))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        """The name of image `index`, from 0; of a slice a list of names."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in [0, {len(self) - 1}], got {index}")
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._letters[start : int(self._ends[index])].tobytes())


def open_index(
    name: str, cache: str | Path | None, scan: Callable[[Notes], Iterable[Entry]], is_current: Callable[[Notes], bool]
) -> Index:
    """The index `name` of the cache, made first where there is none or it is not current: by one process, the others wait.

    Args:
        name: As `caches.cache_name` makes it.
        cache: Folder of caches.
        scan: Gives the entries in their order, one at a time, and fills the notes on the way; raises where there are none.
        is_current: Whether what its notes say still holds.

    Raises:
        OSError: It cannot be written; or what `scan` raises.
    """
    target = cached(f"{name}.npz", cache)

    made = False

    def read() -> Index | None:
        return _read(target, (lambda notes: True) if made else is_current)  # what changed meanwhile, the next to open it notices

    def build() -> None:
        nonlocal made
        write_atomically(target, functools.partial(_write, scan, target.parent))
        remove_older(target.with_suffix(""), (".npz",))
        made = True

    return build_once(target, read, build, doing="listing images into")


def current_index(name: str, cache: str | Path | None, is_current: Callable[[Notes], bool]) -> Index | None:
    """The index `name` of the cache as `open_index` gives it; None where it would have to be made."""
    return next((index for folder in cache_folders(cache) if (index := _read(folder / f"{name}.npz", is_current))), None)


def _read(path: Path, is_current: Callable[[Notes], bool]) -> Index | None:
    try:
        index = Index(path)
    except (OSError, ValueError):  # not there yet, or cut off by something else: a new one replaces it
        return None
    return index if is_current(index.notes) else None


def _write(scan: Callable[[Notes], Iterable[Entry]], folder: Path, file: BinaryIO) -> None:
    """An index as an .npz file, whose arrays grow in files of their own until their lengths are known."""
    notes: Notes = {}
    count, end, width = 0, 0, 0
    with (
        tempfile.TemporaryFile(dir=folder) as letters,
        tempfile.TemporaryFile(dir=folder) as ends,
        tempfile.TemporaryFile(dir=folder) as places,
    ):
        for name, place in scan(notes):
            written = os.fsencode(name)
            count, end, width = count + 1, end + len(written), len(place)
            letters.write(written)
            ends.write(struct.pack("<q", end))
            places.write(struct.pack(f"<{width}q", *place))
        with zipfile.ZipFile(file, "w") as archive:
            _put(archive, "letters", "|u1", (end,), letters)
            _put(archive, "ends", "<i8", (count,), ends)
            _put(archive, "places", "<i8", (count, width), places)
            content = json.dumps(notes).encode()
            with tempfile.TemporaryFile(dir=folder) as noted:
                noted.write(content)
                _put(archive, "notes", "|u1", (len(content),), noted)


def _put(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], content: IO[bytes]) -> None:
    """An array into an .npz file that is being written, from a file of its bytes."""
    content.seek(0)
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {"descr": dtype, "fortran_order": False, "shape": shape})
        shutil.copyfileobj(content, member, 2**20)


def _require(dtype: type, dimensions: int) -> Callable[[np.dtype, tuple[int, ...]], None]:
    """A check of an array of an index, see `arrays.map_npz`."""

    def check(found: np.dtype, shape: tuple[int, ...]) -> None:
        if found != np.dtype(dtype) or len(shape) != dimensions:
            raise ValueError(f"{found} {shape} is not what an index holds")

    return check
