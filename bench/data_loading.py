"""Reading a million small images from tar shards and from files: time and memory to list them, and images a second of an epoch.

    python bench/data_loading.py --count 1000000 --record

Makes the images, PNG of 32 x 32 pixels, in a new folder, which it removes again: as files they take 4 GB and as many inodes.
Each line is of a process of its own: one that lists the images, one that finds them listed, and one that then reads an epoch in
batches as a training does. The files were just written, so they come from the memory of the system where it has room.
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

RESOLUTION = 32
DISTINCT = 1000  # images, each written many times
IN_FOLDER = IN_SHARD = 10_000
PROGRAM = Path(__file__).parent / "common" / "loading.py"


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--count", type=int, default=100_001, help="of images; a folder of up to 100,000 is decoded at once")
    place = Path(tempfile.gettempdir()) / "multibeta-images"
    parser.add_argument("--folder", type=Path, default=place, help=f"where they are made, a new one; by default {place}")
    parser.add_argument("--kinds", nargs="+", choices=tuple(WRITERS), default=tuple(WRITERS))
    parser.add_argument("--batch", type=int, default=256)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    try:
        rows = {kind: measured(kind, arguments) for kind in arguments.kinds}
        result = {"batch": arguments.batch, "resolution": RESOLUTION, "load_average": os.getloadavg()[0], **rows}
        measure.record(arguments.results, "data_loading.jsonl", result)
    finally:
        shutil.rmtree(arguments.folder)


def measured(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the processes say of `count` images in files or in shards."""
    source = arguments.folder / kind
    source.mkdir()
    WRITERS[kind](source, arguments.count, [encoded(seed) for seed in range(DISTINCT)])
    environment = os.environ | {"MULTIBETA_CACHE": str(arguments.folder / "cache")}
    rows = {}
    for name, what in {"list": "open", "listed": "open", "epoch": "epoch"}.items():
        command = [sys.executable, str(PROGRAM), str(source), str(RESOLUTION), what, str(arguments.batch)]
        said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows[name] = json.loads(said.splitlines()[-1])
        print(kind, name, *(f"{key} {value:.1f}" if isinstance(value, float) else value for key, value in rows[name].items()))
    index_bytes = sum(path.stat().st_size for path in (arguments.folder / "cache").glob(f"{kind}-*"))
    return {"count": arguments.count, "index_bytes_per_image": index_bytes / arguments.count, **rows}


def encoded(seed: int) -> bytes:
    """A picture of noise, as a PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_files(folder: Path, count: int, contents: list[bytes]) -> None:
    """As files in subfolders."""
    for number in range(count):
        place = folder / f"{number // IN_FOLDER:04}"
        if number % IN_FOLDER == 0:
            place.mkdir()
        (place / f"{number:08}.png").write_bytes(contents[number % len(contents)])


def write_shards(folder: Path, count: int, contents: list[bytes]) -> None:
    """In tar archives, each image with a label beside it."""
    for start in range(0, count, IN_SHARD):
        with tarfile.open(folder / f"images-{start // IN_SHARD:06}.tar", "w") as archive:
            for number in range(start, min(start + IN_SHARD, count)):
                for suffix, content in (("png", contents[number % len(contents)]), ("cls", b"%d" % (number % 10))):
                    member = tarfile.TarInfo(f"{number:08}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


WRITERS = {"shards": write_shards, "files": write_files}


if __name__ == "__main__":
    main()
