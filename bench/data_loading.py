"""Reading a million small images from tar shards and from files: time and memory to list them, and images a second of an epoch.

    python bench/data_loading.py --count 1000000 --record
    python bench/data_loading.py --kinds shards --count 4000 --encoding jpeg --side 512 --resolution 256 --batch 64 --workers 0 2

Makes the images in a new folder, which it removes again: as files a million take 4 GB and as many inodes. Each line is of a
process of its own: one that lists the images, one that finds them listed, and one that then reads an epoch in batches as a
training does, for each number of workers. The files were just written, so they come from the memory of the system where it has
room.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common import measure

DISTINCT = 1000  # images, each written many times
SUFFIXES = {"png": "png", "jpeg": "jpg"}
IN_FOLDER = IN_SHARD = 10_000
PROGRAM = Path(__file__).parent / "common" / "loading.py"


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--count", type=int, default=100_001, help="of images; a folder of up to 100,000 is decoded at once")
    place = Path(tempfile.gettempdir()) / "multibeta-images"
    parser.add_argument("--folder", type=Path, default=place, help=f"where they are made, a new one; by default {place}")
    parser.add_argument("--kinds", nargs="+", choices=tuple(WRITERS), default=tuple(WRITERS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--encoding", choices=tuple(SUFFIXES), default="png")
    parser.add_argument("--side", type=int, default=32, help="pixels of an image in its file")
    parser.add_argument("--resolution", type=int, default=32, help="pixels that it is prepared to")
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="threads that read ahead")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    try:
        rows = {kind: measured(kind, arguments) for kind in arguments.kinds}
        images = {"encoding": arguments.encoding, "side": arguments.side, "resolution": arguments.resolution}
        result = {"batch": arguments.batch, **images, "load_average": os.getloadavg()[0], **rows}
        measure.record(arguments.results, "data_loading.jsonl", result)
    finally:
        shutil.rmtree(arguments.folder)


def measured(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the processes say of `count` images in files or in shards."""
    source = arguments.folder / kind
    source.mkdir()
    contents = [encoded(seed, arguments.side, arguments.encoding) for seed in range(min(DISTINCT, arguments.count))]
    WRITERS[kind](source, arguments.count, contents, SUFFIXES[arguments.encoding])
    environment = os.environ | {"MULTIBETA_CACHE": str(arguments.folder / "cache")}
    rows = {}
    epochs = {"epoch" if workers == 0 else f"epoch, {workers} workers": ("epoch", workers) for workers in arguments.workers}
    for name, (what, workers) in {"list": ("open", 0), "listed": ("open", 0), **epochs}.items():
        sizes = arguments.resolution, what, arguments.batch, workers
        command = [sys.executable, str(PROGRAM), str(source), *map(str, sizes)]
        said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows[name] = json.loads(said.splitlines()[-1])
        print(kind, name, *(f"{key} {value:.1f}" if isinstance(value, float) else value for key, value in rows[name].items()))
    index_bytes = sum(path.stat().st_size for path in (arguments.folder / "cache").glob(f"{kind}-*"))
    return {"count": arguments.count, "index_bytes_per_image": index_bytes / arguments.count, **rows}


def encoded(seed: int, side: int, encoding: str) -> bytes:
    """A picture of noise, in a JPEG of soft noise, as one of a camera is softer than its pixels."""
    size = side if encoding == "png" else max(1, side // 8)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).save(file, encoding)
    return file.getvalue()


def write_files(folder: Path, count: int, contents: list[bytes], suffix: str) -> None:
    """As files in subfolders."""
    for number in range(count):
        place = folder / f"{number // IN_FOLDER:04}"
        if number % IN_FOLDER == 0:
            place.mkdir()
        (place / f"{number:08}.{suffix}").write_bytes(contents[number % len(contents)])


def write_shards(folder: Path, count: int, contents: list[bytes], suffix: str) -> None:
    """In tar archives, each image with a label beside it."""
    for start in range(0, count, IN_SHARD):
        with tarfile.open(folder / f"images-{start // IN_SHARD:06}.tar", "w") as archive:
            for number in range(start, min(start + IN_SHARD, count)):
                for ending, content in ((suffix, contents[number % len(contents)]), ("cls", b"%d" % (number % 10))):
                    member = tarfile.TarInfo(f"{number:08}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


WRITERS = {"shards": write_shards, "files": write_files}


if __name__ == "__main__":
    main()
