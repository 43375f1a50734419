"""Images in tar archives of the WebDataset layout, read where they lie."""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from multibeta.caches import cache_name, size_and_time
from multibeta.data import decoding
from multibeta.data.dataset import Indices
from multibeta.data.files import MAX_FILE_BYTES, ChangedFile, by_number, what_is_in
from multibeta.data.index import Entry, Index, Notes, open_index
from multibeta.data.large import INDEX_VERSION, LargeImages
from multibeta.files import expanded, require_file, say_once
from multibeta.progress import progress_bar

logger = logging.getLogger(__name__)

SUFFIX = ".tar"
MOST_SHARDS = 100_000  # that ranges of a pattern stand for
WINDOW = 16  # shards whose images an epoch mixes
CLASS = "cls"  # the extension of a class
MOST_CLASSES = 100_000  # what goes beyond numbers no classes
CLASS_BYTES = 16  # a number of these, and a line end
NO_CLASS = -1
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by their first bytes


class TarShards(LargeImages):
    """The images of tar archives, one of each sample of the WebDataset layout, in the order of the archives.

    A sample is the files in a row whose names agree up to the first dot of the last part: of 0001.jpg, 0001.json and 0001.cls
    the first that has the extension of an image is read; of two of one name the last, as `tar -r` replaces one. Where each lies
    in its archive is listed once, in an index in the cache, which all processes share; from there on every image is read by
    itself, in any order. `order` has those of few archives near each other: the archives are mixed, and then the images of every
    16 of them. Of archives joined into one file all are read.

    Images that are links, or that `tar -S` stored without their holes, are passed over, and the log counts them.

    Where every image has a .cls beside it, an integer from 0 as text, it is the class: `labels` gives these integers, and
    `class_names` are those from 0 to the largest as text. Where only some have one there are no classes, and the log says so.

    Args:
        path: A folder of .tar files, one such file, or a pattern: photos-{000000..000099}.tar, photos-*.tar.
        resolution, channels, background, white_level, upscale: See `ImageFolder`.
        cache: Folder of the index; by default that of all caches (`caches.cache_folders`).
        progress: Show a bar while listing.

    Raises:
        FileNotFoundError: There are no such archives; names one.
        ValueError: An archive is compressed, truncated or damaged; there are no images, or half of them cannot be read.
        OSError: The index cannot be written.
        ChangedFile: When images are read: their archive is not the one that was opened.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int,
        *,
        channels: int = 3,
        background: str = "white",
        white_level: int = decoding.WHITE_LEVEL,
        upscale: bool = False,
        cache: str | Path | None = None,
        progress: bool = True,
    ):
        root, archives = Path(os.path.abspath(expanded(path))), shard_paths(path)
        listed = [size_and_time(each) for each in archives]
        paths = [os.path.abspath(each) for each in archives]
        name = cache_name(root, "shards", [INDEX_VERSION, decoding.extensions(), list(zip(paths, listed, strict=True))])
        index = open_index(name, cache, lambda notes: _scan(root, archives, notes, progress), lambda notes: True)
        self._starts: list[int] = [*index.notes["starts"], len(index)]
        self._places, labelled = index.places, index.notes["labelled"]
        if index.notes["others"]:
            say_once(f"images passed over in {root}, because only plain files of an archive are read: {index.notes['others']}")
        if labelled == len(index):
            self.class_names = tuple(map(str, range(index.notes["classes"])))
        elif labelled:
            without = len(index) - labelled
            words = f"no .{CLASS} with an integer from 0 to {MOST_CLASSES - 1} beside them, so that none has a class"
            say_once(f"{without} of {len(index)} images of {root} have {words}")
        pixels = {"channels": channels, "background": background, "white_level": white_level, "upscale": upscale}
        super().__init__(ShardFiles(root, archives, listed, index), index.notes["digest"], resolution, **pixels)

    def labels(self, indices: Indices) -> torch.Tensor:
        """Class of each image at `indices`, int64, (N,), a position in `class_names`; `ValueError` where there are none.

        Of an image for which another stands in it is that of the other, once it was read.
        """
        if not self.class_names:
            raise ValueError(f"{self!r} has no classes: not every image has a .{CLASS} with an integer beside it")
        return torch.from_numpy(self._places[self._shown(indices), 3])

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """All images once, int64, (N,): the archives are mixed, then the images of every `WINDOW` of them."""
        windows = []
        for window in torch.randperm(len(self._starts) - 1, generator=generator).split(WINDOW):
            rows = torch.cat([torch.arange(self._starts[shard], self._starts[shard + 1]) for shard in window.tolist()])
            windows.append(rows[torch.randperm(len(rows), generator=generator)])
        return torch.cat(windows)


class ShardFiles:
    """Members of tar archives by the places that an index knows; an archive is opened for each, so that processes share this.

    Args:
        root: What was opened.
        archives: The files.
        listed: `size_and_time` of each when the index was made.
        names: The index.
    """

    def __init__(self, root: Path, archives: list[Path], listed: list[tuple[int, int]], names: Index):
        self.root, self.archives, self.listed, self.names = root, archives, listed, names

    def read(self, index: int) -> bytes:
        """The bytes of one member.

        Raises:
            ChangedFile: The archive is gone, or has another size or time than when it was listed.
        """
        number, offset, size, _ = self.names.places[index].tolist()
        if size > MAX_FILE_BYTES:
            raise ValueError(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
        archive = self.archives[number]
        try:
            with open(archive, "rb", buffering=0) as file:
                if size_and_time(file.fileno()) == self.listed[number]:
                    file.seek(offset)
                    return file.read(size)
            change = "has changed"
        except FileNotFoundError:
            change = "is gone"
        raise ChangedFile(f"{archive} {change} since its images were listed: open {self.root} again")


def shard_paths(path: str | Path) -> list[Path]:
    """The archives that a path stands for: see `TarShards`.

    Raises:
        FileNotFoundError: There are none, or some of a range are missing.
        ValueError: A range is empty, or there are more than 100,000 names.
    """
    place = expanded(path)
    if place.is_dir():
        held = os.listdir(place)
        names = sorted(filter(is_shard, held), key=by_number) or sorted(filter(is_compressed, held))  # which reading refuses
        if not names:
            raise FileNotFoundError(f"{place} holds no {SUFFIX} files, found {what_is_in(place)}")
        return [place / name for name in names]
    if place.exists():
        return [place]
    expansions = list(dict.fromkeys(path for each in _expanded(str(place)) for path in _matched(each)))
    missing = [each for each in expansions if not os.path.exists(each)]
    if missing:
        few = f", {len(missing)} of {len(expansions)} are missing" if len(expansions) > 1 else ""
        raise FileNotFoundError(f"there is no file {missing[0]}{few}")
    return [Path(each) for each in expansions]


def is_shard(name: str) -> bool:
    """Whether a name is that of a tar archive that is not hidden."""
    return name.endswith(SUFFIX) and not name.startswith(".")


def is_compressed(name: str) -> bool:
    """Whether a name is that of a compressed tar archive that is not hidden."""
    return name.endswith(COMPRESSED_SUFFIXES) and not name.startswith(".")


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds tar archives, compressed ones among them, and neither images nor folders beside them."""
    found = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir() or decoding.extension(entry.name) in decoding.extensions():
                return False
            found = found or is_shard(entry.name) or is_compressed(entry.name)
    return found


def _expanded(pattern: str) -> Iterator[str]:
    """The names that the ranges of a pattern stand for, such as {000..099}, from left to right."""
    texts = re.split(r"\{\d+\.\.\d+\}", pattern)
    ranges = [_range(first, last, pattern) for first, last in re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)]
    count = math.prod(last + 1 - first for first, last, _ in ranges)
    if count > MOST_SHARDS:
        raise ValueError(f"{pattern} stands for {count} names, possible are {MOST_SHARDS}")
    numbers = [[f"{number:0{width}}" for number in range(first, last + 1)] for first, last, width in ranges]
    for chosen in itertools.product(*numbers):
        yield "".join(itertools.chain.from_iterable(itertools.zip_longest(texts, chosen, fillvalue="")))


def _range(first: str, last: str, pattern: str) -> tuple[int, int, int]:
    """First and last number of a range, and how many digits each has at least: as a shell and WebDataset understand it."""
    if int(first) > int(last):
        raise ValueError(
            f"the range {{{first}..{last}}} of {pattern} is empty: it goes from the smaller number to the larger one"
        )
    padded = any(number != "0" and number.startswith("0") for number in (first, last))
    return int(first), int(last), max(len(first), len(last)) if padded else 0


def _matched(pattern: str) -> list[str]:
    """The files that a pattern without ranges stands for; its own name where it has no * or ?."""
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    if not (found := sorted(glob.glob(pattern), key=by_number)):
        raise FileNotFoundError(f"no file matches {pattern}")
    return found


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        sample: What it has in common with all files of its sample.
        name: With its folders.
        offset, size: Bytes before its content, and of it.
        label: The class that a .cls says, `NO_CLASS` where that is none; of other files None.
        kind: In words, what it is where its bytes do not all lie there; else empty.
    """

    sample: tuple[int, str]
    name: str
    offset: int
    size: int
    label: int | None
    kind: str


def _scan(root: Path, archives: list[Path], notes: Notes, progress: bool) -> Iterator[Entry]:
    """Name and (archive, offset, size, class) of the image of each sample, from the headers of the members and the classes."""
    known, digest, starts = decoding.extensions(), hashlib.sha256(), []
    count, files, labelled, classes, others = 0, 0, 0, 0, Counter()
    for number, path in enumerate(progress_bar(archives, desc="listing images", unit="archive", disable=not progress)):
        starts.append(count)
        for _, members in itertools.groupby(_members(path), lambda member: member.sample):
            image, label = None, NO_CLASS
            for member in members:
                files, label = files + 1, label if member.label is None else member.label
                if decoding.extension(member.name) in known and (image is None or image.name == member.name):
                    image = member
            if image is None or image.kind:
                others.update([] if image is None else [image.kind])
                continue
            count, labelled, classes = count + 1, labelled + (label != NO_CLASS), max(classes, label + 1)
            digest.update(os.fsencode(f"{image.name}\0{image.size}\0"))
            yield f"{path.name}/{image.name}", (number, image.offset, image.size, label)
    if not count:
        of_others = f", {_counted(others)} among them" if others else ""
        raise ValueError(f"{root} holds no images: {files} files of other kinds in {len(archives)} archives{of_others}")
    logger.info("listed %d images in %d archives of %s, and %d files beside them", count, len(archives), root, files - count)
    notes |= {"starts": starts, "digest": digest.hexdigest(), "others": _counted(others)}
    notes |= {"labelled": labelled, "classes": classes}


def _members(path: Path) -> Iterator[Member]:
    """The files in an archive, or in several that were joined, but hidden ones; none is kept."""
    with open(require_file(path), "rb") as file:
        begin = file.read(8)
        if kind := next((kind for mark, kind in COMPRESSED.items() if begin.startswith(mark)), None):
            raise ValueError(f"{path} is compressed by {kind}, so that no image in it can be read by itself: decompress it first")
        start: int | None = 0
        try:
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    while (member := archive.next()) is not None:
                        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]: where it keeps all that it read
                        folder, _, base = member.name.rpartition("/")
                        kind = _kind(member)
                        if kind is not None and not base.startswith("."):
                            name, _, extension = base.partition(".")
                            label = _read_class(file, member) if extension.lower() == CLASS and not kind else None
                            place = member.offset_data, member.size
                            yield Member((start, f"{folder}/{name}"), member.name, *place, label, kind)
                start = _beyond_the_end(file, archive.offset)
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no readable tar archive, or truncated: {error}") from None


def _kind(member: tarfile.TarInfo) -> str | None:
    """As `Member` says it; None where it is no file."""
    if member.issparse():
        return "sparse files"  # as `tar -S` writes those with holes, which are left out
    if member.islnk() or member.issym():
        return "links"
    return "" if member.isreg() else None


def _counted(kinds: Counter[str]) -> str:
    """How many there are of each kind, in words."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _read_class(file: BinaryIO, member: tarfile.TarInfo) -> int:
    """The class that a member says, `NO_CLASS` where it is no integer from 0 or a large one."""
    if member.size > CLASS_BYTES:
        return NO_CLASS
    file.seek(member.offset_data)
    text = file.read(member.size).strip()
    return label if text.isdigit() and (label := int(text)) < MOST_CLASSES else NO_CLASS


def _beyond_the_end(file: BinaryIO, place: int) -> int | None:
    """Where another archive begins, after the zeros at `place` that end one; None where there is none."""
    file.seek(place)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes anything but a header for the end
        raise tarfile.ReadError(f"the member or the end that begins at byte {place} is missing")
    place += tarfile.BLOCKSIZE
    while chunk := file.read(128 * tarfile.BLOCKSIZE):
        if rest := chunk.lstrip(b"\0"):
            return place + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        place += len(chunk)
    return None
