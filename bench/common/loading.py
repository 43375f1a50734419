"""One process that opens a large dataset, or reads an epoch of it as a training does, and says what it took.

    python bench/common/loading.py SOURCE RESOLUTION {open,epoch} BATCH

Prints one JSON line. It imports no more than a training does, because its memory is what is measured.
"""

from __future__ import annotations

import json
import resource
import sys
import time

from multibeta import data
from multibeta.training import batch_indices
from multibeta.training.batches import order_of

HELD_OUT = 1000


def main(source: str, resolution: int, what: str, batch: int) -> dict[str, float | int | str]:
    """The measures of a process, in MiB and seconds."""
    imported = peak_mib()
    start = time.perf_counter()
    dataset = data.open_dataset(source, resolution, progress=False)
    result = {"class": type(dataset).__name__, "images": len(dataset), "open_seconds": time.perf_counter() - start}
    if what == "epoch":
        held_out = min(HELD_OUT, len(dataset) // 10)
        train, _ = data.split(dataset, len(dataset) - held_out, held_out)
        order, steps = order_of(train), len(train) // batch
        start, first = time.perf_counter(), 0.0
        for step in range(steps):
            train.images(batch_indices(step, len(train), batch, 0, order))
            first = first or time.perf_counter() - start
        seconds = time.perf_counter() - start
        result |= {"epoch_seconds": seconds, "first_batch_seconds": first, "images_per_second": steps * batch / seconds}
    return result | {"imported_mib": imported, "peak_mib": peak_mib()}


def peak_mib() -> float:
    """The most memory that this process had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
