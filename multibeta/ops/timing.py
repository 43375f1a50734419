"""How long a call takes, on the device alone where there is one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from multibeta.checks import is_traced
from multibeta.kernels import probes

CYCLES_PER_SECOND = 2e9  # of a GPU, rounded up
MAX_SLEEP_SECONDS = 0.05


def is_watched(tensor: Tensor) -> bool:
    """Whether calls on `tensor` are recorded or only pretended, so that to time them would be wrong."""
    if is_traced() or torch._C._len_torch_dispatch_stack():
        return True
    if type(tensor) not in (Tensor, torch.nn.Parameter):  # fake tensors
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def latency_ms(function: Callable[[], object], device: torch.device, repetitions: int = 10) -> float:
    """Median time of a call in milliseconds, after two to warm up; on CUDA that of the device alone."""
    for _ in range(2):
        function()
    times = _cuda_times_ms if device.type == "cuda" else _host_times_ms
    return statistics.median(times(function, device, repetitions))


def _host_times_ms(function: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _cuda_times_ms(function: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        sleep = min(2 * (time.perf_counter() - start), MAX_SLEEP_SECONDS)
        for first, last in events:
            # while the device sleeps the host queues: between the events lies work of the device, and no wait for Python
            torch.cuda._sleep(int(sleep * CYCLES_PER_SECOND))
            first.record()
            function()
            last.record()
        torch.cuda.synchronize()
    return [first.elapsed_time(last) for first, last in events]


def measure(
    candidates: dict[str, Callable[[], object]],
    device: torch.device,
    repetitions: int = 10,
    latency: Callable[[Callable[[], object], torch.device, int], float] = latency_ms,
) -> tuple[dict[str, float], dict[str, str]]:
    """`latency` of each candidate by name, and why those failed that raise, whatever they raise: another serves."""
    times: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, function in candidates.items():
        try:
            times[name] = latency(function, device, repetitions)
        except Exception as error:
            failures[name] = f"failed on this shape, {probes.first_line(error)}"
    return times, failures


def measured_lines(times: dict[str, float], failures: dict[str, str]) -> list[str]:
    """What `measure` returned, a line for each candidate."""
    lines = [f"{name}: {milliseconds:.3f} ms" for name, milliseconds in times.items()]
    return lines + [f"{name}: {reason}" for name, reason in failures.items()]
