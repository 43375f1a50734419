"""What is derived once and reused: the folder of all caches, how entries are named and built, and when they go.

One environment variable, `MULTIBETA_CACHE`, moves all of it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from multibeta.files import RECENT_SECONDS, expanded, is_abandoned, is_unlocked, lock, remove_abandoned, say_once

Result = TypeVar("Result")

CACHE_VARIABLE = "MULTIBETA_CACHE"
# By what made them; each name holds a hash, so that nothing else is taken for one of them.
_HASH, _PART = "[0-9a-f]" * 16, "[0-9a-f]" * 12
LEFT = "left by processes that were killed"
CACHE_PATTERNS = {
    "decoded images and unpacked arrays": (f"*-{_HASH}-*-{_HASH}.npy", f"*-{_HASH}-*-{_HASH}.json"),
    "indexes of images": (f"*-{_HASH}-*-{_HASH}.npz",),
    "C++ kernels": (f"cpp-{_HASH}*.so", f"cpp-{_HASH}*.failed", f"cpp-{_HASH}*.log"),
    "fits of DCI": (f"dci/dci-{_HASH}*.npz",),
    LEFT: (f".*.{_PART}.part", f"dci/.*.{_PART}.part", f"cpp-{_HASH}*-*"),
}
ATTEMPTS = 3


def cache_folders(cache: str | Path | None = None) -> list[Path]:
    """The folders that may hold caches, the preferred one first.

    `cache` alone where it is given, else $MULTIBETA_CACHE alone where it is set, else `multibeta` in $XDG_CACHE_HOME or ~/.cache
    and, for a user without a home or with one that cannot be written, `multibeta-UID` in the folder of temporary files.
    """
    if cache is None:
        cache = os.environ.get(CACHE_VARIABLE) or None
    if cache is not None:
        return [expanded(cache)]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # "~" stays where there is no home
    return [*([] if home.startswith("~") else [Path(home) / "multibeta"]), _last_resort()]


def cache_folder(cache: str | Path | None = None, *, usable: Callable[[Path], str | None] = lambda folder: None) -> Path:
    """The first of `cache_folders` that can be written, or made; the log says where it is not the preferred one.

    Args:
        usable: Why a folder that can be written still does not serve, or None.

    Raises:
        OSError: There is none; gives the reason for each, and how to name another.
    """
    folders = cache_folders(cache)
    reasons = ["there is no home folder"] if folders == [_last_resort()] else []
    for folder in folders:
        reason = why_not_writable(folder) or usable(folder)
        if reason is None:
            if reasons:
                say_once(f"caches go to {folder}: {'; '.join(reasons)}. {CACHE_VARIABLE} names another folder")
            return folder
        reasons.append(f"{folder}: {reason}")
    raise OSError(f"no folder for caches ({'; '.join(reasons)}): name one that can be written with --cache or {CACHE_VARIABLE}")


def cached(name: str, cache: str | Path | None = None, **options: Any) -> Path:
    """The place of a file or folder `name` in the caches: where it is already, else in the folder that can be written."""
    there = (folder / name for folder in cache_folders(cache))
    return next((path for path in there if path.exists()), None) or cache_folder(cache, **options) / name


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be made in `folder`, or why the folder itself cannot; None where they can. Nothing is left behind."""
    try:
        if folder == _last_resort() and folder.exists() and hasattr(os, "getuid"):
            status = folder.lstat()  # in a place that all may write, another user could have put it there
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
                return "it belongs to another user, or others may write to it"
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return error.strerror or str(error)


def make_cache_folder(folder: Path) -> None:
    """Make one of `cache_folders` where it is missing; in the folder of temporary files it is for this user alone."""
    folder.mkdir(mode=0o700 if folder == _last_resort() else 0o777, parents=True, exist_ok=True)


def _last_resort() -> Path:
    """The folder of caches for a user without a home."""
    return Path(tempfile.gettempdir()) / f"multibeta-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


def build_once(entry: Path, read: Callable[[], Result | None], build: Callable[[], None], doing: str) -> Result:
    """What `read` finds of `entry` in a cache, built first where it finds None: by one process or thread, the others wait.

    Raises:
        OSError: `build` returned, and yet `read` finds nothing.
    """
    if (result := read()) is not None:
        return result
    make_cache_folder(entry.parent)
    with lock(entry.with_name(f".{entry.name}.lock"), doing=doing) as held:
        if held:
            remove_abandoned(entry.parent, f".{glob.escape(entry.stem)}*.part", younger=True)
        for _ in range(ATTEMPTS):  # somebody may clear the caches meanwhile
            if (result := read()) is not None:
                break
            build()
            result = read()
    if result is None:
        raise OSError(f"{entry} cannot be read back after it was written")
    return result


def cache_name(path: Path, purpose: str, evidence: Any) -> str:
    """Name for what is derived from `path`: `purpose` tells uses of one source apart, `evidence` changes with its content."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]

    label = "".join(letter if letter.isalnum() else "_" for letter in path.name)[:32]
    return f"{label}-{digest(os.fspath(path))}-{purpose}-{digest(evidence)}"


def may_use_memory(cache: str | Path | None) -> bool:
    """Whether memory serves in place of a folder that cannot be written: where nobody named one."""
    return cache is None and not os.environ.get(CACHE_VARIABLE)


def size_and_time(path: Path | int) -> tuple[int, int]:
    """Size and modification time of a file, or of an open one by its descriptor; -1 where it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def remove_older(stem: Path, suffixes: tuple[str, ...] = (".npy", ".json")) -> None:
    """Remove what was derived from earlier contents of the same source for the same purpose, unless others may just read it."""
    for old in stem.parent.glob(stem.name.rpartition("-")[0] + "-*"):
        with contextlib.suppress(OSError):
            if old.stem != stem.name and old.suffix in suffixes and time.time() - old.stat().st_mtime > RECENT_SECONDS:
                old.unlink()


def cache_contents(cache: str | Path | None = None) -> Iterator[tuple[str, Path]]:
    """All of ours in the caches, as (what made it, file or folder), but what others are writing; nothing else is listed."""
    for folder in cache_folders(cache):
        for maker, patterns in CACHE_PATTERNS.items():
            paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
            yield from ((maker, path) for path in paths if (is_abandoned(path) if maker == LEFT else not _is_being_built(path)))


def clear_caches(cache: str | Path | None = None) -> tuple[int, int]:
    """Remove what `cache_contents` lists; returns the number of files and bytes."""
    count, size = 0, 0
    for _, path in list(cache_contents(cache)):
        number, held = disk_usage(path)
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        count, size = count + number, size + held
    return count, size


def disk_usage(path: Path) -> tuple[int, int]:
    """Number of files at or below `path`, and their bytes."""
    sizes = []
    for entry in path.rglob("*") if path.is_dir() else [path]:
        with contextlib.suppress(FileNotFoundError):  # somebody else removed it
            status = entry.stat()
            sizes += [status.st_size] * stat.S_ISREG(status.st_mode)
    return len(sizes), sum(sizes)


def _is_being_built(path: Path) -> bool:
    """Whether somebody builds the cache entry that a file belongs to, alone or with others of its stem: see `build_once`."""
    for lock_file in path.parent.glob(f".{glob.escape(path.stem)}.*.lock"):
        with contextlib.suppress(OSError):
            if not is_unlocked(lock_file):
                return True
    return False
