"""Files that are derived from a user's data once and reused: where they lie, how they are named, written whole or not at all."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path


def cache_folder(cache=None):
    """`cache`, or `multibeta` in $XDG_CACHE_HOME or ~/.cache."""
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multibeta"


def cache_name(path, purpose, evidence):
    """Name for what is derived from `path`: `purpose` tells uses of one source apart, `evidence` changes with its content."""

    def digest(value):
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]

    label = "".join(letter if letter.isalnum() else "_" for letter in path.name)[:32]
    return f"{label}-{digest(os.fspath(path))}-{purpose}-{digest(evidence)}"


def size_and_time(path):
    """Size and modification time of a file, -1 where it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def write_atomically(target, write):
    """Write a file so that a crash leaves either all of it or nothing under its name."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def remove_older(stem, suffixes=(".npy", ".json")):
    """Remove what was derived from earlier contents of the same source for the same purpose."""
    for old in stem.parent.glob(stem.name.rpartition("-")[0] + "-*"):
        if old.stem != stem.name and old.suffix in suffixes:
            with suppress(OSError):
                old.unlink()
