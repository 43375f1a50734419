"""What is asked of the device that networks run on: captured steps, marks in its queue, memory, a search for algorithms."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch

Step = Callable[[], None]


def capture_cuda_graph(step: Step, pool: object, *, find_waits: bool = False) -> Step:
    """`step`, which must not wait for the host, as a CUDA graph on the current device, in memory `pool`; returns its replay.

    Args:
        find_waits: Run `step` once more before, so that a wait raises where it stands, not within a capture that it spoils. This
            sets the synchronisation debug mode of CUDA, which is the whole process's: not next to other threads on the device.
    """
    stream, graph, handle = torch.cuda.Stream(), torch.cuda.CUDAGraph(), cast("torch.cuda._POOL_HANDLE | None", pool)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # algorithm searches and lazy compilation happen outside the capture
        for _ in range(2):
            step()
        if find_waits:
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(stream)
    # The workspaces of cuBLAS belong to a thread and stream: a graph makes its own, in its pool, and nobody else keeps them
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, pool=handle, stream=stream, capture_error_mode="thread_local"):
            step()
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return graph.replay


class _Searching:
    """How many searches for algorithms are going on, in all threads, and what the process's flag was before the first."""

    def __init__(self) -> None:
        self.lock, self.blocks, self.previous = threading.Lock(), 0, False


_searching = _Searching()


@contextmanager
def searching_algorithms() -> Iterator[None]:
    """cuDNN tries its algorithms and keeps the fastest for a shape, unless determinism was asked for; no other flag is set."""
    cudnn = torch.backends.cudnn
    with _searching.lock:
        if not _searching.blocks:
            _searching.previous = cudnn.benchmark
        _searching.blocks += 1
        cudnn.benchmark |= not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled())
    try:
        yield
    finally:
        with _searching.lock:
            _searching.blocks -= 1
            if not _searching.blocks:
                cudnn.benchmark = _searching.previous


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is, or came of, a lack of device memory: within a capture, what ends it raises another."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


class Host:
    """What is asked of a device: nothing, where work is done when a call returns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new_pool(self) -> object:
        """Memory that graphs share."""
        return None

    def synchronize(self) -> None:
        """Wait for all that was queued."""

    def mark(self) -> torch.cuda.Event | None:
        """A mark behind what is queued now; None where nothing is."""
        return None

    def follow(self, mark: torch.cuda.Event) -> None:
        """Let what is queued from here on wait for what stands before `mark`."""


class CudaHost(Host):
    """The same of a CUDA device: graphs replay and events are recorded on the stream that is current there."""

    def new_pool(self) -> object:
        return torch.cuda.graph_pool_handle()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def mark(self) -> torch.cuda.Event:
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def follow(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)
