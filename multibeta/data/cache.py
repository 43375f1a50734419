"""What is derived from a user's data once and reused: how it is named, and when it goes."""

import hashlib
import json
import os
import time
from contextlib import suppress

from multibeta.files import CACHE_VARIABLE, RECENT_SECONDS


def cache_name(path, purpose, evidence):
    """Name for what is derived from `path`: `purpose` tells uses of one source apart, `evidence` changes with its content."""

    def digest(value):
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]

    label = "".join(letter if letter.isalnum() else "_" for letter in path.name)[:32]
    return f"{label}-{digest(os.fspath(path))}-{purpose}-{digest(evidence)}"


def may_use_memory(cache):
    """Whether memory serves in place of a folder that cannot be written: where nobody named one."""
    return cache is None and not os.environ.get(CACHE_VARIABLE)


def size_and_time(path):
    """Size and modification time of a file, -1 where it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def remove_older(stem, suffixes=(".npy", ".json")):
    """Remove what was derived from earlier contents of the same source for the same purpose, unless others may just read it."""
    for old in stem.parent.glob(stem.name.rpartition("-")[0] + "-*"):
        with suppress(OSError):
            if old.stem != stem.name and old.suffix in suffixes and time.time() - old.stat().st_mtime > RECENT_SECONDS:
                old.unlink()
