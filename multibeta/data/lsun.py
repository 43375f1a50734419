"""LSUN: photographs of one category of scenes in an LMDB."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from multibeta.caches import size_and_time
from multibeta.data.arrays import missing_extra, unpack
from multibeta.data.files import (
    MAX_FILE_BYTES,
    EncodedImages,
    Files,
    Names,
    centre_square,
    find_below,
    find_images,
    open_images,
    what_is_in,
)
from multibeta.data.large import LARGE
from multibeta.files import expanded

# LMDB refuses to open a file twice in one process, and in the fork of one that has it open: it is open only while it is read.
OPEN = threading.Lock()


def _renew_lock() -> None:
    global OPEN
    OPEN = threading.Lock()  # a thread that a forked process has not got may have held the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class LSUN(EncodedImages):
    """One category of LSUN (Yu et al. 2015), such as 3,033,042 bedrooms, at most 256 pixels on the shorter side.

    Put the unpacked `bedroom_train_lmdb.zip` (or of any category) of "LSUN" anywhere: a folder with `data.mdb`, whose
    values are WebP or JPEG files; any LMDB will do whose keys are text and whose values are encoded images.
    The order is that of the keys, which are listed once in `cache` (116 MiB for the bedrooms).
    Exported images, in a folder of any depth or a zip archive, are read too, in the order of the numbers in their names. For one
    that cannot be read the next stands in, with a line in the log.

    Args:
        path: That folder, or the archive.
        resolution: Pixels per side; the centre square, bicubic with antialiasing.
        upscale: Accept a resolution above the images'.
        cache: Folder of the list of keys; `multibeta` in $XDG_CACHE_HOME or ~/.cache by default.
        progress: Show a progress bar while listing.
    """

    replaces = True

    def __init__(
        self, path: str | Path, resolution: int, *, upscale: bool = False, cache: str | Path | None = None, progress: bool = True
    ):
        root = expanded(path)
        data = find_below(root, "data.mdb") if root.is_dir() else None
        files: Files = open_images(*find_images(root)) if data is None else LMDBFiles(data.parent, cache=cache, progress=progress)
        super().__init__(files, resolution, upscale)
        self.large = len(self) > LARGE

    @property
    def paths(self) -> Names:
        """Key of each image, bytes, (N,), or the names of exported images."""
        return self._files.names[:]

    def _square(self, image: Image.Image) -> np.ndarray:
        return np.asarray(centre_square(image).resize((self.resolution, self.resolution), Image.Resampling.BICUBIC))


class LMDBFiles:
    """The values of an LMDB by their keys, in the order of the keys.

    Raises:
        FileNotFoundError: `root` holds no data.mdb.
        ValueError: it is damaged, truncated or empty.
        ModuleNotFoundError: lmdb is not installed.
    """

    def __init__(self, root: Path, *, cache: str | Path | None = None, progress: bool = True):
        self.root = root
        data = root / "data.mdb"
        if not data.is_file():
            raise FileNotFoundError(f"{root} holds no data.mdb, found {what_is_in(root)}")
        with open_lmdb(root) as database:
            pages, statistics = database.info()["last_pgno"] + 1, database.stat()
            # Pages beyond the end of the file would be read as zeros, or kill the process.
            if data.stat().st_size < pages * statistics["psize"]:
                raise ValueError(
                    f"{data} is truncated: {data.stat().st_size} bytes, at least {pages * statistics['psize']} are expected"
                )
            if not statistics["entries"]:
                raise ValueError(f"{data} holds no images")

            def blocks() -> Iterator[bytes]:
                with database.begin() as transaction:
                    for key in transaction.cursor().iternext(values=False):
                        yield key.ljust(width, b"\0")

            with database.begin() as transaction:
                width = max((len(key) for key in transaction.cursor().iternext(values=False)), default=0)
            if not width:
                raise ValueError(f"{data} is damaged: it announces {statistics['entries']} images and has no keys")
            shape = (statistics["entries"],)
            self.names = unpack(root, "keys", size_and_time(data), f"S{width}", shape, blocks, cache=cache, progress=progress)

    def read(self, index: int) -> bytes:
        """The bytes of one value."""
        with open_lmdb(self.root) as database, database.begin() as transaction:
            content = transaction.get(self.names[index].item())
        if content is None or len(content) > MAX_FILE_BYTES:
            raise ValueError("the key is gone" if content is None else f"the value is larger than {MAX_FILE_BYTES // 2**20} MiB")
        return content


@contextmanager
def open_lmdb(root: Path) -> Iterator[Any]:
    """An LMDB for reading, by one thread at a time."""
    try:
        import lmdb
    except ImportError as error:
        raise missing_extra("lmdb", root) from error
    with OPEN:
        try:
            database = lmdb.open(str(root), readonly=True, lock=False, readahead=False, meminit=False, create=False)
        except lmdb.Error as error:
            raise ValueError(f"{root} is no readable LMDB: {error}") from None
        try:
            yield database
        except lmdb.Error as error:
            raise ValueError(f"{root} is damaged: {error}") from None
        finally:
            database.close()
