"""Images in tar archives of the WebDataset layout, read where they lie."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch

from multibeta.caches import cache_name, size_and_time
from multibeta.data import decoding
from multibeta.data.files import MAX_FILE_BYTES, by_number, what_is_in
from multibeta.data.index import Entry, Index, Notes, open_index
from multibeta.data.large import INDEX_VERSION, LargeImages
from multibeta.files import expanded, require_file
from multibeta.progress import progress_bar

logger = logging.getLogger(__name__)

SUFFIX = ".tar"
WINDOW = 16  # shards whose images an epoch mixes
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by their first bytes


class TarShards(LargeImages):
    """The images of tar archives, one of each sample of the WebDataset layout, in the order of the archives.

    A sample is the files in a row whose names agree up to the first dot of the last part: of 0001.jpg, 0001.json and 0001.cls
    the first that has the extension of an image is read. Where each lies in its archive is listed once, in an index in the cache,
    which all processes share; from there on every image is read by itself, in any order. `order` has those of few archives near
    each other: the archives are mixed, and then the images of every 16 of them.

    Args:
        path: A folder of .tar files, one such file, or a pattern: photos-{000000..000099}.tar, photos-*.tar.
        resolution, channels, background, white_level, upscale: See `ImageFolder`.
        cache: Folder of the index; by default that of all caches (`caches.cache_folders`).
        progress: Show a bar while listing.

    Raises:
        FileNotFoundError: There are no such archives; names one.
        ValueError: An archive is compressed, truncated or damaged; there are no images, or half of them cannot be read.
        OSError: The index cannot be written.
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
        evidence = [INDEX_VERSION, decoding.extensions(), [(os.path.abspath(each), size_and_time(each)) for each in archives]]
        name = cache_name(root, "shards", evidence)
        index = open_index(name, cache, lambda notes: _scan(root, archives, notes, progress), lambda notes: True)
        self._starts: list[int] = [*index.notes["starts"], len(index)]
        pixels = {"channels": channels, "background": background, "white_level": white_level, "upscale": upscale}
        super().__init__(ShardFiles(root, archives, index), index.notes["digest"], resolution, **pixels)

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """All images once, int64, (N,): the archives are mixed, then the images of every `WINDOW` of them."""
        windows = []
        for window in torch.randperm(len(self._starts) - 1, generator=generator).split(WINDOW):
            rows = torch.cat([torch.arange(self._starts[shard], self._starts[shard + 1]) for shard in window.tolist()])
            windows.append(rows[torch.randperm(len(rows), generator=generator)])
        return torch.cat(windows)


class ShardFiles:
    """Members of tar archives by the places that an index knows; an archive is opened for each, so that processes share this."""

    def __init__(self, root: Path, archives: list[Path], names: Index):
        self.root, self.archives, self.names = root, archives, names

    def read(self, index: int) -> bytes:
        """The bytes of one member."""
        archive, offset, size = self.names.places[index].tolist()
        if size > MAX_FILE_BYTES:
            raise ValueError(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
        with open(self.archives[archive], "rb", buffering=0) as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise ValueError("the archive was cut off")
        return content


def shard_paths(path: str | Path) -> list[Path]:
    """The archives that a path stands for: see `TarShards`.

    Raises:
        FileNotFoundError: There are none, or some of a range are missing.
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
    expansions = list(_expanded(str(place)))
    if len(expansions) == 1 and glob.has_magic(expansions[0]):
        expansions = sorted(glob.glob(expansions[0]), key=by_number)
        if not expansions:
            raise FileNotFoundError(f"no file matches {place}")
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
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        yield pattern
        return
    width = max(len(found[1]), len(found[2])) if "0" in (found[1][0], found[2][0]) else 0
    for number in range(int(found[1]), int(found[2]) + 1):
        yield from _expanded(f"{pattern[: found.start()]}{number:0{width}}{pattern[found.end() :]}")


def _scan(root: Path, archives: list[Path], notes: Notes, progress: bool) -> Iterator[Entry]:
    """Name and (archive, offset, size) of the image of each sample, from the headers of the members alone."""
    known, digest, starts, count, others = decoding.extensions(), hashlib.sha256(), [], 0, 0
    for number, path in enumerate(progress_bar(archives, desc="listing images", unit="archive", disable=not progress)):
        starts.append(count)
        last = None
        for member in _members(path):
            folder, _, base = member.name.rpartition("/")
            sample = folder, base.partition(".")[0]
            if not member.isreg() or base.startswith(".") or sample == last or decoding.extension(base) not in known:
                others += member.isreg()
                continue
            last, count = sample, count + 1
            digest.update(os.fsencode(f"{member.name}\0{member.size}\0"))
            yield f"{path.name}/{member.name}", (number, member.offset_data, member.size)
    if not count:
        raise ValueError(f"{root} holds no images: {others} files of other kinds in {len(archives)} archives")
    logger.info("listed %d images in %d archives of %s, and %d other files", count, len(archives), root, others)
    notes |= {"starts": starts, "digest": digest.hexdigest()}


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of an archive, of which none is kept."""
    with open(require_file(path), "rb") as file:
        begin = file.read(8)
        if kind := next((kind for mark, kind in COMPRESSED.items() if begin.startswith(mark)), None):
            raise ValueError(f"{path} is compressed by {kind}, so that no image in it can be read by itself: decompress it first")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]: where it keeps all that it read
                    yield member
                file.seek(archive.offset)  # tarfile takes anything but a header for the end
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"the member or the end that begins at byte {archive.offset} is missing")
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no readable tar archive, or truncated: {error}") from None
