"""One process that opens a large dataset, or reads an epoch of it as a training does, and says what it took.

    python bench/common/loading.py SOURCE RESOLUTION {open,epoch} BATCH [WORKERS]

Prints one JSON line. It imports no more than a training does, because its memory is what is measured.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time

import torch

from multibeta import data
from multibeta.training import batch_indices
from multibeta.training.batches import order_of
from multibeta.training.reading import Fetched, Reader

HELD_OUT = 1000


def main(source: str, resolution: int, what: str, batch: int, num_workers: int = 0) -> dict[str, float | int | str]:
    """The measures of a process, in MiB and seconds; an epoch is read as by `TrainingOptions.num_workers`."""
    imported = peak_mib()
    start = time.perf_counter()
    dataset = data.open_dataset(source, resolution, progress=False)
    result = {"class": type(dataset).__name__, "images": len(dataset), "open_seconds": time.perf_counter() - start}
    if what == "epoch":
        held_out = min(HELD_OUT, len(dataset) // 10)
        train, _ = data.split(dataset, len(dataset) - held_out, held_out)
        order, steps = order_of(train), len(train) // batch

        def fetch(step: int) -> Fetched:
            indices = batch_indices(step, len(train), batch, 0, order)
            return indices, train.images(indices)

        start, first = time.perf_counter(), 0.0
        with contextlib.closing(Reader(fetch, steps, num_workers, torch.device("cpu"))) as reader:
            for step in range(steps):
                reader.take(step)
                first = first or time.perf_counter() - start
        seconds = time.perf_counter() - start
        result |= {
            "num_workers": num_workers,
            "epoch_seconds": seconds,
            "first_batch_seconds": first,
            "images_per_second": steps * batch / seconds,
        }
    return result | {"imported_mib": imported, "peak_mib": peak_mib()}


def peak_mib() -> float:
    """The most memory that this process had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))))
