"""Arrays in .npy, .npz and HDF5 files, read row by row from disk.

An array that lies uncompressed in its file is mapped where it is. Any other is unpacked once into the cache, because a compressed
stream has no random access and the chunks of a published HDF5 file seldom hold whole images. Nothing is ever unpickled, and
every size is read and compared before any data.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from multibeta.caches import build_once, cache_name, cached, may_use_memory, remove_older, size_and_time
from multibeta.data.images import MEMORY_LIMIT_BYTES
from multibeta.files import require_file, write_atomically
from multibeta.progress import progress_bar

logger = logging.getLogger(__name__)

Check = Callable[[np.dtype, tuple[int, ...]], None]

BLOCK_BYTES = 2**24
SLAB_BYTES = 2**28
UNREADABLE_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error)


class MappedArray:
    """Rows of an array that lies plainly in a file, which is mapped; pickled as its place in the file.

    Args:
        path: File.
        dtype, shape: Of the array, in row-major order.
        offset: Bytes before it.

    Raises:
        ValueError: the file is too short to hold it.
    """

    def __init__(self, path: str | Path, dtype: npt.DTypeLike, shape: tuple[int, ...], offset: int):
        self.path, self.dtype, self.shape, self.offset = path, np.dtype(dtype), tuple(shape), offset
        needed = offset + math.prod(self.shape) * self.dtype.itemsize
        if os.path.getsize(path) < needed:
            raise ValueError(f"{path} is truncated: {os.path.getsize(path)} bytes, at least {needed} are expected")
        self._map = self._open() if needed > offset else None  # at once: it stays even if the file is then removed

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice | int | tuple[np.ndarray, int]) -> np.ndarray:
        """A copy of `rows`, an array of integers or a slice; with a number beside them, of that column."""
        if self._map is None:
            self._map = self._open()
        return np.array(self._map[rows])

    def _open(self) -> np.memmap:
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}


def map_npy(path: str | Path) -> MappedArray:
    """The array of an .npy file as `MappedArray`."""
    with open(require_file(path), "rb") as file:
        dtype, shape = _read_npy_header(file, path)
        return MappedArray(path, dtype, shape, file.tell())


def map_npz(
    path: Path, name: str, check: Check, *, cache: str | Path | None = None, progress: bool = True
) -> MappedArray | np.ndarray:
    """The array `name` of an .npz file as `MappedArray`, in place where it is stored, else unpacked once into `cache`.

    Args:
        path: The .npz file.
        name: Of the array.
        check: Called with (dtype, shape) before anything is unpacked; raises ValueError.
    """
    with _open_npz(path) as archive:
        info = _find_member(archive, path, name)
        with archive.open(info) as stream:
            dtype, shape = _read_npy_header(stream, f"{name} in {path}")
            header = stream.tell()
        check(dtype, shape)
        _require_size(info, header, dtype, shape, f"{name} in {path}")
        if info.compress_type == zipfile.ZIP_STORED:
            return MappedArray(path, dtype, shape, local_data_offset(path, info.header_offset) + header)

        def blocks() -> Iterator[bytes | memoryview]:
            with archive.open(info) as stream:
                stream.read(header)
                while block := stream.read(BLOCK_BYTES):
                    yield block

        return unpack(path, name, size_and_time(path), dtype, shape, blocks, cache=cache, progress=progress)


def read_npz(path: Path, name: str, check: Check) -> np.ndarray:
    """The array `name` of an .npz file in memory; `check` as for `map_npz`, so that it bounds the size."""
    with _open_npz(path) as archive:
        info = _find_member(archive, path, name)
        with archive.open(info) as stream:
            dtype, shape = _read_npy_header(stream, f"{name} in {path}")
            check(dtype, shape)
            _require_size(info, stream.tell(), dtype, shape, f"{name} in {path}")
            try:
                return np.frombuffer(stream.read(), dtype).reshape(shape)
            except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
                raise ValueError(f"{name} in {path} is damaged: {error}") from None


def map_hdf5(
    path: Path, name: str, check: Check, *, cache: str | Path | None = None, progress: bool = True
) -> MappedArray | np.ndarray:
    """The array `name` of an HDF5 file as `MappedArray`, in place where it is contiguous, else unpacked once into `cache`.

    Args as for `map_npz`.
    """
    with open_hdf5(path) as file:
        array = find_hdf5(file, path, name)
        check(array.dtype, array.shape)
        offset = array.id.get_offset()
        if array.chunks is None and offset is not None:
            return MappedArray(path, array.dtype, array.shape, offset)
        row = array.dtype.itemsize * math.prod(array.shape[1:])
        rows = array.chunks[0] if array.chunks else 1
        rows *= max(1, BLOCK_BYTES // (rows * row))
        if rows * row > SLAB_BYTES:
            rows = max(1, SLAB_BYTES // row)

        def blocks() -> Iterator[bytes | memoryview]:
            for start in range(0, len(array), rows):
                block = read_hdf5(lambda start=start: array[start : start + rows], f'"{name}" in {path}')
                yield np.ascontiguousarray(block).data

        return unpack(path, name, size_and_time(path), array.dtype, array.shape, blocks, cache=cache, progress=progress)


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """An HDF5 file for reading, in a `with` block.

    Raises:
        ValueError: not an HDF5 file, truncated or damaged.
        ModuleNotFoundError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise missing_extra("h5py", path) from error
    try:
        file = h5py.File(require_file(path), "r")
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is no readable HDF5 file: {error}") from None
    with file:
        try:
            yield file
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:  # what h5py raises where its structures are broken
            raise ValueError(f"{path} is damaged: {error}") from None


def read_hdf5(array: Callable[[], np.ndarray], what: str) -> np.ndarray:
    """All or a block of an array of an HDF5 file, with what to call it where it is damaged."""
    try:
        return array()
    except OSError as error:
        raise ValueError(f"{what} is damaged: {error}") from None


def find_hdf5(file: Any, path: Path, name: str) -> Any:
    """The array `name` that lies in the HDF5 `file` itself: links and parts in other files are refused."""
    import h5py

    steps = name.split("/")
    links = ("/".join(steps[: count + 1]) for count in range(len(steps)))
    if not all(link in file and isinstance(file.get(link, getlink=True), h5py.HardLink) for link in links):
        raise ValueError(f'{path} holds no array "{name}", found {", ".join(sorted(file)[:8]) or "nothing"}')
    array = file[name]
    if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external:
        raise ValueError(f'"{name}" in {path} is no plain array')
    return array


def unpack(
    path: Path,
    purpose: str,
    evidence: Any,
    dtype: npt.DTypeLike,
    shape: tuple[int, ...],
    blocks: Callable[[], Iterable[bytes | memoryview]],
    *,
    cache: str | Path | None = None,
    progress: bool = True,
) -> MappedArray | np.ndarray:
    """An array written once, uncompressed, to the cache, as `MappedArray`; in memory where no cache can be written.

    Args:
        path: File or folder it comes from.
        purpose: Tells the arrays of one `path` apart, letters only.
        evidence: Sizes and times of the files, as JSON; the array is unpacked again when they change.
        dtype, shape: Of the array.
        blocks: Called for an iterator over its bytes in order.
    """
    name = cache_name(path.resolve(), purpose, [evidence, np.dtype(dtype).str, list(shape)]) + ".npy"
    needed = math.prod(shape) * np.dtype(dtype).itemsize

    def unpack_into(write: Callable[[bytes | memoryview], object]) -> None:
        written = 0
        with progress_bar(total=needed, desc=f"unpacking {path.name}", unit="B", unit_scale=True, disable=not progress) as bar:
            for block in blocks():
                write(block)
                size = memoryview(block).nbytes
                written += size
                bar.update(size)
        if written != needed:
            raise ValueError(f"{path} is damaged: {written} bytes of {purpose}, {needed} are expected")

    def write(file: BinaryIO) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(file, header)
        unpack_into(file.write)

    def read() -> MappedArray | None:
        try:
            return map_npy(target)
        except (OSError, ValueError):
            return None  # not there yet, or cut off by something else: a new one replaces it

    def build() -> None:
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise OSError(f"{free / 2**20:.0f} MiB are free")
        logger.info("unpacking %s of %s to a cache of %.1f MiB in %s", purpose, path, needed / 2**20, target.parent)
        write_atomically(target, write)
        remove_older(target.with_suffix(""))

    target: Path  # once there is a folder of caches
    place = "a cache"
    try:
        try:
            target = cached(name, cache)
            place = str(target.parent)
            return build_once(target, read, build, doing="unpacking images into")
        except OSError as error:
            if not may_use_memory(cache) or needed > MEMORY_LIMIT_BYTES:
                raise OSError(
                    f"cannot unpack {needed / 2**20:.0f} MiB of {path} to {place} ({error}); "
                    "make room there or choose another cache folder"
                ) from error
            logger.warning("%s of %s are kept in %.1f MiB of memory: %s", purpose, path, needed / 2**20, error)
            content = bytearray()
            unpack_into(content.extend)
            return np.frombuffer(content, dtype).reshape(shape)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def local_data_offset(path: Path, header_offset: int) -> int:
    """Where the bytes of a zip member begin, from its local header at `header_offset`."""
    with open(path, "rb") as file:
        file.seek(header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{path} is damaged: no member begins at byte {header_offset}")
    return header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


@contextlib.contextmanager
def open_zip(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive for reading, in a `with` block; ValueError where it is none, truncated or damaged."""
    path = require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (*UNREADABLE_ZIP, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a place before the file's beginning
            raise
        raise ValueError(f"{path} is no readable zip archive, or truncated: {error}") from None


def missing_extra(package: str, path: str | Path) -> ModuleNotFoundError:
    """The error to raise where a package of the extra `data` is needed and missing."""
    return ModuleNotFoundError(f"reading {path} needs {package}: pip install 'multibeta[data]'", name=package)


def _open_npz(path: Path) -> contextlib.AbstractContextManager[zipfile.ZipFile]:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    return open_zip(path)


def _find_member(archive: zipfile.ZipFile, path: Path, name: str) -> zipfile.ZipInfo:
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        there = ", ".join(sorted(member.removesuffix(".npy") for member in archive.namelist())[:8])
        raise ValueError(f'{path} holds no array "{name}", found {there or "nothing"}') from None
    if info.flag_bits & 1:
        raise ValueError(f"{path} is encrypted")
    return info


def _read_npy_header(stream: IO[bytes], what: str | Path) -> tuple[np.dtype, tuple[int, ...]]:
    """(dtype, shape) of a row-major array of plain numbers; the stream then stands at its first byte."""
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran_order, dtype = read(stream)
    except Exception as error:  # its header is read as Python, which fails in many ways
        raise ValueError(f"{what} is no readable array: {error}") from None
    if dtype.hasobject:
        raise ValueError(f"{what} holds pickled Python objects, which are never loaded")
    if fortran_order and len(shape) > 1:
        raise ValueError(f"{what} is stored column by column, expected row by row")
    return dtype, shape


def _require_size(info: zipfile.ZipInfo, header: int, dtype: np.dtype, shape: tuple[int, ...], what: str) -> None:
    expected = header + math.prod(shape) * dtype.itemsize
    if info.file_size != expected:
        raise ValueError(f"{what} is damaged: {info.file_size} bytes, {expected} are expected")
