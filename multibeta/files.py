"""Files that are written whole or not at all, and locks that end with their process."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import shlex
import shutil
import socket
import stat
import sys
import tempfile
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

logger = logging.getLogger("multibeta")

RECENT_SECONDS = 3600.0  # younger files may be in use by others
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
NOT_HERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)  # another way of writing may do
_PART_DIGITS = 12  # of the name of a file that is being written
_said: set[str] = set()


def write_atomically(target: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write `target` through `write(file)` so that a crash leaves what was there or all of the new, never a part of it.

    Parent folders are made. The new file is written next to the old one under a name of its own and takes its place; where the
    folder allows no other file, or the file is a mount point, it is written elsewhere and copied in, which a crash can interrupt.
    """
    write_all({Path(target): write})


def write_text(target: str | Path, text: str) -> None:
    """`write_atomically` of text in UTF-8."""
    write_atomically(target, functools.partial(_write_encoded, text))


def write_all(writers: dict[Path, Callable[[BinaryIO], object]]) -> None:
    """`write_atomically` of several files, none of which takes its place before all are written."""
    parts: dict[Path, Path] = {}
    with contextlib.ExitStack() as held:
        try:
            real = {Path(os.path.realpath(target)): write for target, write in writers.items()}  # a link stays one
            for folder in {target.parent for target in real}:
                folder.mkdir(parents=True, exist_ok=True)
                remove_abandoned(folder, f".*.{'?' * _PART_DIGITS}.part")
            for target, write in real.items():
                if target.exists() and not target.is_file():
                    _write_into(target, write)
                    continue
                parts[target], file = _open_part(target)
                held.enter_context(file)
                _try_lock(file.fileno())  # says that this part is being written: `is_abandoned` is false
                write(file)
                file.flush()
                mode = os.fstat(file.fileno()).st_mode
                if parts[target].stat().st_mode != mode:  # safetensors puts a file of its own there, which nobody else may read
                    os.chmod(parts[target], stat.S_IMODE(mode))
                flush(parts[target])
            for target, part in parts.items():
                _replace(part, target)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)


def write_together(texts: dict[Path, str]) -> None:
    """`write_all` of texts in UTF-8."""
    write_all({target: functools.partial(_write_encoded, text) for target, text in texts.items()})


def _write_encoded(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def _write_into(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write to a device or a FIFO, which is not to be replaced; `IsADirectoryError` for a folder."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, name a file in it", str(target))
    with open(target, "wb") as file:
        write(file)


def flush(path: Path) -> None:
    """Wait until `path` is on disk; Windows cannot flush a folder."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_file(path: str | Path) -> Path:
    """`path`, if a regular file can be read there: from a FIFO or a device a reader would wait, perhaps for ever.

    Raises:
        FileNotFoundError, OSError: There is nothing, or something else; names it.
    """
    path = Path(path)
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        named = "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise OSError(errno.EINVAL, f"{named}, not a file", str(path))
    return path


def read_json(path: str | Path) -> object:
    """What a JSON file holds.

    Raises:
        FileNotFoundError, OSError: There is no such file.
        ValueError: It is no JSON; names the file and the place.
    """
    try:
        return json.loads(require_file(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of bytes that are no UTF-8, and of lists in lists without end
        raise ValueError(f"{path} is no readable JSON, or truncated: {error}") from None


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; nothing is unpickled.

    Raises:
        FileNotFoundError, OSError: There is no such file.
        ValueError: It is damaged or holds something else; names it.
    """
    try:
        with np.load(require_file(path), allow_pickle=False) as stored:
            return dict(stored)
    except (ValueError, EOFError, TypeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no readable .npz file, or truncated: {error}") from None


def remove_abandoned(folder: Path, pattern: str, *, younger: bool = False) -> None:
    """Remove those of the temporary files and folders that match `pattern` in `folder` that `is_abandoned`.

    Args:
        younger: Also those of the last hour: the caller holds the lock that their writer had.
    """
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if younger or is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_abandoned(path: Path) -> bool:
    """Whether a temporary file or folder was left by a process that was killed: nobody holds its lock, and it is old."""
    try:
        return time.time() - path.lstat().st_mtime > RECENT_SECONDS and is_unlocked(path)
    except FileNotFoundError:  # somebody else removed it
        return False


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True, doing: str = "using") -> Iterator[bool]:
    """Hold the lock file `path`, which names its holder, in a `with` block; it ends with the process, however that ends.

    Args:
        path: The file, removed afterwards; its folder is made where it is missing.
        wait: Wait for another holder, with a word in the log; otherwise that is an error.
        doing: What the holder does with the folder, such as "training in", for the messages.

    Yields:
        Whether the lock is held: False where the file system has none, or the file of another user may not be opened, which the
        log says once for each folder.

    Raises:
        FileExistsError: Another process or thread holds it and `wait` is False; says who.
        OSError: The file cannot be made.
    """
    descriptor = _acquire(path, wait, doing)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):  # of another user, in a folder that all may write to
            path.unlink(missing_ok=True)  # before it is let go: who waits for it looks again for the file
        os.close(descriptor)


def require_no_file(folder: Path) -> None:
    """`NotADirectoryError` where there is a file of the name of a folder, or of one that it lies in."""
    for place in (folder, *folder.absolute().parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if stat.S_ISDIR(place.stat().st_mode):
                return
            break
    raise NotADirectoryError(f"{place} is a file: choose another folder")


@contextlib.contextmanager
def occupy(folder: Path, doing: str, *, wait: bool = False) -> Iterator[bool]:
    """`lock` a folder in a `with` block; the folder is made for it, and goes again where nothing came into it.

    Raises:
        NotADirectoryError: There is a file of that name.
        FileExistsError: Another process or thread holds it and `wait` is False; says who.
    """
    require_no_file(folder)
    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    _make(folder)
    try:
        with lock(folder / ".lock", wait=wait, doing=doing) as held:
            yield held
    finally:
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


def expanded(path: str | Path) -> Path:
    """A path with its "~" resolved; `FileNotFoundError` where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{path}: {error}") from None


def say_once(message: str) -> None:
    """A warning in the log, once for each process."""
    if message not in _said:
        _said.add(message)
        logger.warning("%s", message)


def _open_part(target: Path) -> tuple[Path, BinaryIO]:
    """A new file that will become `target`: next to it, or among the temporary files where its folder takes no other."""
    name = f".{target.name}.{uuid.uuid4().hex[:_PART_DIGITS]}.part"
    try:
        part = target.with_name(name)
        return part, open(part, "xb")
    except OSError as error:
        if error.errno not in NOT_HERE or not target.exists():
            raise
    part = Path(tempfile.gettempdir()) / name
    return part, open(part, "xb")


def _replace(part: Path, target: Path) -> None:
    try:
        os.replace(part, target)
    except OSError as error:
        if error.errno not in NOT_HERE or not target.is_file():
            raise
        shutil.copyfile(part, target)


def _acquire(path: Path, wait: bool, doing: str) -> int | None:
    """The locked descriptor of a lock file; None where nothing can be locked."""
    waited = False
    while True:
        descriptor, kept = _open_lock(path), False
        try:
            locked = None if descriptor is None else _try_lock(descriptor)
            if descriptor is None or locked is None:
                say_once(f"{path.parent} cannot be locked here: see that one process at a time is {doing} it")
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                return None
            if not locked:
                if not wait:
                    advice = "wait for it, stop it, or choose another folder"
                    raise FileExistsError(f"{path.parent} is in use: {_holder(descriptor)} is {doing} it; {advice}")
                if not waited:
                    logger.info("%s: waiting for %s, which is %s it", path.parent, _holder(descriptor), doing)
                waited = True
                assert fcntl is not None, "a lock was refused"
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _same_file(descriptor, path):  # otherwise the holder that we waited for removed it
                with contextlib.suppress(OSError):  # of a full disk, or a file of another user: it holds all the same
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(_myself()).encode(), 0)
                kept = True
                return descriptor
        finally:
            if descriptor is not None and not kept:
                os.close(descriptor)


def _make(folder: Path) -> None:
    """Make a folder and those above it, while others may remove empty ones: see `occupy`."""
    for attempt in reversed(range(100)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return
        except FileNotFoundError:
            if not attempt:
                raise


def _open_lock(path: Path) -> int | None:
    """A descriptor of a lock file, made where it is missing, in a folder made likewise; None for one that may not be opened.

    That of another user may be read alone, which is enough to wait for it.
    """
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # who held it before found nothing to do here, and removed the folder
            _make(path.parent)
        except PermissionError:
            if not path.exists():
                raise
            with contextlib.suppress(FileNotFoundError):  # removed since
                try:
                    return os.open(path, os.O_RDONLY)
                except PermissionError:
                    return None


def _try_lock(descriptor: int) -> bool | None:
    """Whether an exclusive lock was free and is now held; None where the system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def is_unlocked(path: Path) -> bool:
    """Whether nobody holds a lock on a file or folder, as far as the system can tell."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _try_lock(descriptor) is True
    finally:
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _myself() -> dict:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"process": os.getpid(), "machine": socket.gethostname(), "since": since, "command": shlex.join(sys.argv)[:200]}


def _holder(descriptor: int) -> str:
    """Who holds a lock, as its file says."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return "process {process} on {machine} ({command}, since {since})".format(**holder)
    except (OSError, ValueError, KeyError):  # it has not written that yet
        return "another process"
