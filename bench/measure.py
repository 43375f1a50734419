"""Timing that compares: arms interleaved in one run, median and spread, and the machine they ran on."""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from multibeta import environment

RESULTS = Path(__file__).parent / "results"


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    arms: dict[str, Callable[[], object]], device: torch.device, *, repetitions: int = 10, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Times of each arm in milliseconds, one call of each in turn, so that a slow moment meets all alike.

    Returns:
        For each arm median_ms, p10_ms, p90_ms and the number of repetitions.
    """
    for function in arms.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repetitions):
        for name, function in arms.items():
            times[name].append(1e3 * seconds(function, device))
    return {name: summary(values) for name, values in times.items()}


def summary(milliseconds: list[float]) -> dict[str, float]:
    """Median and spread."""
    ordered = sorted(milliseconds)
    last = len(ordered) - 1
    return {
        "median_ms": statistics.median(ordered),
        "p10_ms": ordered[round(0.1 * last)],
        "p90_ms": ordered[round(0.9 * last)],
        "repetitions": len(ordered),
    }


def gemm_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a large square matrix product in TFLOP/s: what MFU is a fraction of."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = interleaved({"gemm": lambda: a @ b}, device, repetitions=7)
    return 2 * size**3 / timing["gemm"]["median_ms"] / 1e9


def copy_ceiling(device: torch.device, megabytes: int = 1024) -> float:
    """Rate of a copy in GB/s, read and written bytes counted."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, repetitions=7)
    return 2 * len(source) / timing["copy"]["median_ms"] / 1e6


def peak_memory_mib(function: Callable[[], object], device: torch.device) -> float | None:
    """Peak of allocated device memory during a call; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


class Monitor:
    """Clocks and power of the GPU through NVML, twice a second, while a `with` block runs; never sets anything."""

    def __init__(self, device: torch.device):
        self.samples: list[tuple[int, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if device.type == "cuda" else None

    def __enter__(self) -> Monitor:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        try:
            import pynvml
        except ImportError:
            return
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        while not self._done.wait(0.5):
            clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
            self.samples.append((clock, pynvml.nvmlDeviceGetPowerUsage(handle) / 1000))

    def summary(self) -> dict[str, float] | None:
        """Median SM clock in MHz and power in W; None without a GPU or without nvidia-ml-py."""
        if not self.samples:
            return None
        clocks, powers = zip(*self.samples, strict=True)
        return {"sm_clock_mhz": statistics.median(clocks), "power_w": statistics.median(powers)}


def record(file: str, result: dict) -> None:
    """Append `result` as one JSON line to bench/results/`file`, with the command, the versions and the machine."""
    line = {
        "command": " ".join(["python", *sys.argv]),
        "versions": environment.versions(),
        "machine": environment.machine(),
        **result,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / file).open("a") as stream:
        stream.write(json.dumps(line) + "\n")
