"""What lies below a folder, found in order, one folder at a time: its image files, and why others are none."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from multibeta.data import decoding

ELSEWHERE = {".mdb": "an LMDB of encoded images is opened by lsun:{root}"}  # what holds images and is none

Skipped = list[tuple[str, str]]
"""What was passed over, and why."""


class ImageSearch:
    """The relative paths of the image files below `root`, in their order; what is passed over is in `others` afterwards.

    Args:
        root: Folder.
        enter: See `search`.

    Attributes:
        others: Pictures in formats that are not read, folders that cannot be searched, other files by extension.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is no folder; when the search begins.
        ValueError: There are no images; when it ends.
    """

    def __init__(self, root: Path, enter: Callable[[str, int], None] | None = None):
        self.root, self.enter = root, enter
        self.others: Skipped = []

    def __iter__(self) -> Iterator[str]:
        known, counts, images = decoding.extensions(), Counter(), 0
        self.others = others = []
        for path in search(self.root, lambda folder, error: others.append((folder, decoding.reason_of(error))), self.enter):
            suffix = decoding.extension(path)
            if suffix in known or (not suffix and decoding.looks_like_an_image(self.root / path)):
                images += 1
                yield path
            elif suffix in decoding.HINTS:
                others.append((path, decoding.HINTS[suffix]))
            else:
                counts[suffix] += 1
        if not images:
            pictures = Counter(decoding.extension(path) for path, reason in others if reason in decoding.HINTS.values())
            there = ", ".join(f"{count} {suffix or 'no extension'}" for suffix, count in (pictures + counts).most_common(5))
            there = f"only other files ({there})" if there else "no files at all"
            there += f"; known are {' '.join(known)}" + (f"; passed over: {by_extension(others)}" if others else "")
            there += "".join(f"; {hint.format(root=self.root)}" for suffix, hint in ELSEWHERE.items() if suffix in counts)
            raise ValueError(f"found no images in {self.root}, {there}")
        others += [
            (f"*{suffix}" if suffix else "no extension", f"{count} file{'s' * (count > 1)} of a kind that holds no images")
            for suffix, count in counts.items()
        ]


def by_extension(others: Skipped) -> str:
    """What was passed over, in words: files of one extension with one reason are counted."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, reason in others:
        groups.setdefault((Path(path).suffix.lower(), reason), []).append(path)
    counted = [(paths[0] if len(paths) == 1 else f"{len(paths)} *{suffix}", reason) for (suffix, reason), paths in groups.items()]
    return "; ".join(f"{what} ({reason})" for what, reason in counted)


def search(
    root: Path, unsearchable: Callable[[str, OSError], None], enter: Callable[[str, int], None] | None = None
) -> Iterator[str]:
    """The paths of the files below `root`, relative and in their order, hidden ones left out; one folder at a time is listed.

    Linked folders are followed, but none is searched twice.

    Args:
        unsearchable: Called with each folder that cannot be searched, and why; `root` itself is an error.
        enter: Called with each folder that is searched, and when it was last changed, in nanoseconds.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is no folder.
    """
    if not root.exists():
        raise FileNotFoundError(f"there is no folder {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file, not a folder of images")
    visited: set[tuple[int, int]] = set()
    pending = [("", ["/"])]  # folders that are being searched, each with "/" at its end, and what is left in them, last first
    while pending:
        prefix, names = pending[-1]
        if not names:
            pending.pop()
            continue
        path = prefix + names.pop()
        if not path.endswith("/"):
            yield path
            continue
        folder = path[:-1]
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as entries:
                found = sorted((_sortable(entry) for entry in entries if not entry.name.startswith(".")), reverse=True)
        except OSError as error:
            if not folder:
                raise
            unsearchable(folder, error)
            continue
        if enter is not None:
            enter(folder, status.st_mtime_ns)
        pending.append((path if folder else "", found))


def _sortable(entry: os.DirEntry[str]) -> str:
    """The name of a file, or that of a folder and "/", by which names sort as whole paths do."""
    try:
        return f"{entry.name}/" if entry.is_dir() else entry.name
    except OSError:  # a link to nowhere, or in a circle: reported when it is read
        return entry.name
