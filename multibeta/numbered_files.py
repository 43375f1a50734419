"""A long work as numbered files in a folder: several processes share it, and a second call goes on where the first stopped."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from multibeta import distribution, files

logger = logging.getLogger(__name__)

INDEX = "index.json"
OTHER = {"digest": "another model", "fingerprint": "other images"}  # of facts that say nothing to a reader

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class NumberedFiles:
    """Files 000000, 000001, ... of a folder, each written whole or not at all, beside an index that says what they are.

    Which are done is which are there: who deletes some has them made again.

    Attributes:
        suffix: Of their names, such as ".png".
    """

    folder: Path
    suffix: str

    def path(self, number: int) -> Path:
        """Where the file of a number is."""
        return self.folder / f"{number:06}{self.suffix}"

    @contextlib.contextmanager
    def written(self, facts: Mapping[str, Any], *, doing: str, grows: str | None = None) -> Iterator[None]:
        """In a `with` block all processes write files of a work, which `facts` tell from any other; its end waits for all.

        Args:
            facts: What the files depend on, as JSON takes it; kept in the index.
            doing: For messages, such as "sampling into".
            grows: Name of a fact that may be larger than in earlier calls.

        Raises:
            ValueError: The files there are of other facts, or there are some without an index; says which.
            FileExistsError: Another work holds the folder.
        """
        with distribution.held_by_first(files.occupy(self.folder, doing)):
            distribution.by_first(lambda: self._begin(json.loads(json.dumps(facts)), grows))
            try:
                yield
            except KeyboardInterrupt:
                kept = f"interrupted; what is in {self.folder} is kept: the same command goes on"
                raise KeyboardInterrupt(kept) from None
            distribution.wait()

    def share(self, count: int, size: int = 1) -> list[range]:
        """What this process is to write of files 0 to `count` - 1: the chunks of `size` of which one is missing, whole.

        The log says how many are there.
        """

        def missing() -> list[range]:
            there = set(os.listdir(self.folder))
            chunks = distribution.chunks(count, size)
            if done := sum(self.path(number).name in there for number in range(count)):
                logger.info("%s: %d of %d files are there already", self.folder, done, count)
            return [chunk for chunk in chunks if not there.issuperset(self.path(number).name for number in chunk)]

        return distribution.world().turns(distribution.by_first(missing))

    def _begin(self, facts: dict[str, Any], grows: str | None) -> None:
        """Compare the index with `facts`, and write it anew; halves that a killed call left are removed."""
        index = self.folder / INDEX
        if index.exists():
            known = files.read_json(index)
            known = known if isinstance(known, dict) else {}
            pairs = {name: (known.get(name), facts.get(name)) for name in {**known, **facts}}
            if grows is not None and isinstance(pairs[grows][0], int) and pairs[grows][0] <= facts[grows]:
                del pairs[grows]
            if others := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
                told = (OTHER.get(name, f"{name} is {old} there and {new} here") for name, (old, new) in others.items())
                differing = ", ".join(told)
                raise ValueError(f"{self.folder} is of another work: {differing}; choose another folder, or delete that one")
        elif any(path.suffix == self.suffix and path.stem.isdecimal() for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds numbered files and no {INDEX} that says of what: choose another folder")
        files.remove_abandoned(self.folder, f".*{self.suffix}.*.part", younger=True)
        files.write_text(index, json.dumps(facts, indent=1) + "\n")


def write_npz(
    target: Path,
    facts: Mapping[str, Any],
    count: int,
    size: int,
    make: Callable[[list[range]], Iterator[Arrays]],
    *,
    beside: Mapping[str, Any] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Write an .npz file of arrays with a row for each of `count` images, which all processes make, a batch of `size` at a time.

    Until it is written, what was made lies in a folder beside it, from which a second call goes on.

    Args:
        facts: What the arrays depend on: see `NumberedFiles.written`.
        make: Gives the arrays of each of these chunks of images, one after another.
        beside: What else goes into the file.

    Returns:
        The shapes of the arrays with a row for each image.
    """
    parts = NumberedFiles(target.with_name(f"{target.name}.parts"), ".npz")
    chunks = distribution.chunks(count, size)
    num_parts = len(chunks)
    with parts.written({**facts, "num_images": count, "batch_size": size}, doing=f"writing {target.name} from"):
        share = [part.start for part in parts.share(num_parts)]
        for part, arrays in zip(share, make([chunks[part] for part in share]), strict=True):
            files.write_atomically(parts.path(part), functools.partial(_save, arrays))
    shapes = distribution.by_first(lambda: _join(target, [parts.path(number) for number in range(num_parts)], beside or {}))
    if distribution.world().first:
        shutil.rmtree(parts.folder)
    return shapes


def _join(target: Path, parts: Sequence[Path], beside: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Write the rows of all parts into one file; returns the shapes."""
    read = [files.read_arrays(part) for part in parts]
    arrays = {name: np.concatenate([each[name] for each in read]) for name in read[0]}
    files.write_atomically(target, functools.partial(_save, {**arrays, **beside}))
    return {name: array.shape for name, array in arrays.items()}


def _save(arrays: Mapping[str, Any], file: BinaryIO) -> None:
    np.savez(file, **arrays)
