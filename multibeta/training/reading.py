"""The images of coming steps, read while those before are learned from."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

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
        self.fetch, self.steps, self.device = fetch, steps, device
        self.pending: dict[int, Future[Fetched]] = {}
        self.asked: queue.SimpleQueue[tuple[int, Future[Fetched]] | None] = queue.SimpleQueue()
        # daemons: what reads for ever holds up neither an interrupt nor the end of the program
        self.workers = [threading.Thread(target=self._work, name=f"images_{n}", daemon=True) for n in range(num_workers)]
        for worker in self.workers:
            worker.start()

    def take(self, step: int) -> Fetched:
        """Those of a step, for which it waits; raises what `fetch` raises."""
        pending = self.pending.pop(step, None)
        for later in range(step + 1, min(step + 1 + len(self.workers), self.steps)):
            if later not in self.pending:
                self.pending[later] = Future()
                self.asked.put((later, self.pending[later]))
        return self.fetch(step) if pending is None else pending.result()

    def read_ahead(self, step: int) -> None:
        """Without workers read those of a coming step now."""
        if not self.workers and step < self.steps and step not in self.pending:
            self.pending[step] = pending = Future()
            pending.set_result(self.fetch(step))

    def close(self) -> None:
        """Read no more; what is being read after an interrupt or an error is not waited for."""
        for pending in self.pending.values():
            pending.cancel()
        for _ in self.workers:
            self.asked.put(None)
        for worker in self.workers if not self.pending else ():
            worker.join()

    def _work(self) -> None:
        """Read what is asked for."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        while (asked := self.asked.get()) is not None:
            step, pending = asked
            if pending.set_running_or_notify_cancel():
                try:
                    pending.set_result(self.fetch(step))
                except BaseException as error:
                    pending.set_exception(error)
