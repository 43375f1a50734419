"""The images of coming steps, read while those before are learned from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Fetched = tuple[Tensor, Tensor]


class Reader:
    """What `fetch` gives for one step after the other.

    Args:
        fetch: `(step) -> (indices, images)`; of several workers, called by several threads at once.
        steps: Of the training; none after them is read.
        num_workers: Threads, each of which reads the images of one coming step; at 0 the caller reads.
        device: That of the caller, to whose copies the threads fit what they read.
    """

    def __init__(self, fetch: Callable[[int], Fetched], steps: int, num_workers: int, device: torch.device):
        self.fetch, self.steps, self.num_workers = fetch, steps, num_workers
        begin = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self.threads = ThreadPoolExecutor(num_workers, "images", begin) if num_workers else None
        self.pending: dict[int, Future[Fetched]] = {}

    def take(self, step: int) -> Fetched:
        """Those of a step, for which it waits; raises what `fetch` raises."""
        pending = self.pending.pop(step, None)
        if self.threads is not None:
            for later in range(step + 1, min(step + 1 + self.num_workers, self.steps)):
                if later not in self.pending:
                    self.pending[later] = self.threads.submit(self.fetch, later)
        return self.fetch(step) if pending is None else pending.result()

    def read_ahead(self, step: int) -> None:
        """Without workers read those of a coming step now."""
        if self.threads is None and step < self.steps and step not in self.pending:
            self.pending[step] = pending = Future()
            pending.set_result(self.fetch(step))

    def close(self) -> None:
        """Read no more."""
        if self.threads is not None:
            self.threads.shutdown(cancel_futures=True)
