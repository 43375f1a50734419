"""Calls of a network replayed as CUDA graphs, so that a small call does not wait for Python to launch it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from multibeta import ops
from multibeta.inference.host import CudaHost, Host, Step, capture_cuda_graph, searching_algorithms
from multibeta.kernels.probes import first_line

logger = logging.getLogger("multibeta")

LARGEST = 2**22  # values of a result, 21 RGB images of 256 x 256: launching a larger call takes less time than the call
MOST = 16  # graphs, which share the memory of the largest


@dataclass
class _Graph:
    """A captured call: what it reads, what it leaves, and its replay."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    replay: Step


class Replays:
    """`function` on CUDA tensors: the second call of a shape captures it as a graph, which the later ones replay.

    Results are copies. Graphs belong to the weights' addresses and to the kernels they were made of: `Prepared` makes new ones
    with every new copy, and another `ops.backend` has its own. Threads wait for each other, and so do streams.

    Args:
        function: Of tensors, to a tensor; it must not wait for the host.
        host, capture: Those of CUDA, which tests replace.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: torch.device,
        host: type[Host] = CudaHost,
        capture: Callable[[Step, object], Step] = capture_cuda_graph,
    ) -> None:
        self._function, self._host, self._capture = function, host(device), capture
        self._graphs: dict[tuple, _Graph] = {}
        self._seen: set[tuple] = set()
        self._lock = threading.Lock()
        self._pool = self._host.new_pool()
        self._mark: torch.cuda.Event | None = None
        self.why_not: str | None = None  # why nothing is captured any more

    def __call__(self, *inputs: Tensor) -> Tensor:
        served = tuple(ops.current_backend(op.name) for op in ops.all_ops())
        key = (*((tensor.shape, tensor.dtype) for tensor in inputs), served)
        with self._lock:
            graph = self._graphs.get(key) or self._captured(key, inputs)
            if graph is not None:
                return self._replayed(graph, inputs)
        result = self._function(*inputs)
        if result.numel() <= LARGEST:
            self._seen.add(key)
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In a `with` block no call is queued: what is queued in it, such as other weights, follows those before."""
        with self._lock:
            self._follow()
            yield
            self._mark = self._host.mark()

    def _follow(self) -> None:
        """Wait on the device for the last call, which may be on another stream."""
        if self._mark is not None:
            self._host.follow(self._mark)

    def _replayed(self, graph: _Graph, inputs: tuple[Tensor, ...]) -> Tensor:
        self._follow()
        for mine, given in zip(graph.inputs, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        result = graph.outputs[0].clone()
        self._mark = self._host.mark()
        return result

    def _captured(self, key: tuple, inputs: tuple[Tensor, ...]) -> _Graph | None:
        """The graph of a shape that was met before; None where there is none to be had."""
        if key not in self._seen or self.why_not is not None or len(self._graphs) >= MOST:
            return None
        graph = _Graph([tensor.clone() for tensor in inputs], [], lambda: None)

        def step() -> None:
            graph.outputs[:] = [self._function(*graph.inputs)]

        try:
            with searching_algorithms():
                graph.replay = self._capture(step, self._pool)
        except Exception as error:  # memory, or what a graph cannot hold: the call itself can
            self.why_not = first_line(error)
            logger.warning("the network runs without CUDA graphs: %s", self.why_not)
            return None
        self._graphs[key] = graph
        return graph
