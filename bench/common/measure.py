"""Timing that compares: arms interleaved in one run, median and spread, and the machine they ran on."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from multibeta import environment
from multibeta.sampling import capture_cuda_graph

RESULTS = Path(__file__).parents[1] / "results"
COMPARED = {"diffusers": "diffusers importlib_metadata", "xformers": "xformers"}  # and what a bare machine lacks for each


def parser(docstring: str | None) -> argparse.ArgumentParser:
    """Reads the flags of a benchmark: its help is the first line of `docstring`; `results` is the folder of `record`, or None.

    --results names one; the numbers of this repository, which lie in bench/results, change with --record alone.
    """
    reads = argparse.ArgumentParser(description=docstring and docstring.splitlines()[0])
    folder = reads.add_mutually_exclusive_group()
    folder.add_argument("--results", type=Path, help="folder that keeps what was measured; by default it is only printed")
    keep = {"action": "store_const", "const": RESULTS, "dest": "results"}
    folder.add_argument("--record", **keep, help="keep it in bench/results, with the numbers of the repository")
    return reads


def missing_packages() -> dict[str, str]:
    """Which packages to compare with are not installed, and how to bring them, with and without a package index."""
    versions, missing = environment.versions(), {}
    for name, wheels in COMPARED.items():
        if versions[name] is None:
            carried = f"pip download --no-deps -d wheels {wheels}` elsewhere and `pip install --no-index --no-deps wheels/*.whl"
            missing[name] = f"`pip install {name}`; without a package index `{carried}` here"
    return missing


def tell_missing_packages() -> None:
    """Print a line for each of `missing_packages`."""
    for name, how in missing_packages().items():
        print(f"{name} is not installed and not compared with: {how}")


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
    arms: Mapping[str, Callable[[], object]], device: torch.device, *, repetitions: int = 10, warmup: int = 2
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


def one_line(error: Exception) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def allow_many_compilations() -> None:
    """Let torch.compile keep more than eight versions of a function, which arms and batches are: past them it runs eagerly."""
    torch._dynamo.config.recompile_limit = 256


def capturable(function: Callable[[], object]) -> bool:
    """Whether a call, made once before, never waits for the CUDA device. To try by capturing would break later captures.

    The mode that tells is of the whole process: no other thread may use CUDA meanwhile.
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return True


def replayed(function: Callable[[], object], calls: int = 1) -> Callable[[], object]:
    """`function` so many times in a row as one CUDA graph, so that no host stands between the calls; replayed once already."""

    def loop() -> None:
        for _ in range(calls):
            function()

    replay = capture_cuda_graph(loop, None)
    replay()  # the first replay also lays the graph out on the device
    return replay


def repeated(function: Callable[[], object], calls: int) -> Callable[[], object]:
    """`function` so many times in a row, by the host."""

    def loop() -> None:
        for _ in range(calls):
            function()

    return loop


def event_ms(function: Callable[[], object]) -> float:
    """Milliseconds of one call on the current CUDA stream, by events; what was queued before it is not waited for."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def kernel_times(
    arms: Mapping[str, Callable[[], object]], device: torch.device, *, repetitions: int = 20, replay_ms: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Times of short calls on the device alone, arms in turn.

    On CUDA an arm is a graph (see `replayed`) of as many calls as take `replay_ms`: each call meets in the L2 cache what the one
    before left there. `cold_ms` is the median of single calls after that cache was overwritten. An arm that waits for the host
    cannot be a graph (`captured` is false) and its time holds the launches. On the CPU: `interleaved`.

    Returns:
        `summary` of each arm, on CUDA with cold_ms and captured; {"error": reason} for an arm that raises.
    """
    able, failed = {}, {}
    for name, function in arms.items():
        try:
            function()
            able[name] = _warm_and_cold(function, replay_ms) if device.type == "cuda" else function
        except Exception as error:  # whatever a library raises on one shape must not cost the others
            failed[name] = {"error": one_line(error)}
    if device.type != "cuda":
        return interleaved(able, device, repetitions=repetitions, warmup=1) | failed
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    warm: dict[str, list[float]] = {name: [] for name in able}
    cold: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(repetitions):
        for name, (once, many, calls, _) in able.items():
            warm[name].append(event_ms(many) / calls)
            flush.zero_()
            cold[name].append(event_ms(once))
    times = {}
    for name, (*_, captured) in able.items():
        times[name] = {**summary(warm[name]), "cold_ms": statistics.median(cold[name]), "captured": captured}
    return times | failed


def _warm_and_cold(
    function: Callable[[], object], replay_ms: float
) -> tuple[Callable[[], object], Callable[[], object], int, bool]:
    """One call, as many as take `replay_ms`, how many those are, and whether both are graphs."""
    captured = capturable(function)
    once = replayed(function) if captured else function
    calls = max(1, min(200, int(replay_ms / max(event_ms(once), 1e-3))))
    if calls == 1:
        return once, once, 1, captured
    return once, replayed(function, calls) if captured else repeated(function, calls), calls, captured


def gemm_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a large square matrix product in TFLOP/s: what MFU is a fraction of."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = kernel_times({"gemm": lambda: a @ b}, device, repetitions=7)
    return 2 * size**3 / timing["gemm"]["median_ms"] / 1e9


def copy_ceiling(device: torch.device, mebibytes: int | None = None) -> float:
    """Rate of the best copy in GB/s, by the driver or a kernel, read and written bytes counted; by default beyond the caches."""
    mebibytes = mebibytes or (1024 if device.type == "cuda" else 128)
    source = torch.randint(2**31, (mebibytes << 18,), dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    arms = {"driver": lambda: target.copy_(source), "kernel": lambda: torch.bitwise_not(source, out=target)}
    times = kernel_times(arms, device, repetitions=7)
    return 2 * 4 * len(source) / min(timing["median_ms"] for timing in times.values()) / 1e6


def first_call(function: Callable[[], object], device: torch.device) -> dict[str, float | None]:
    """Seconds of a call that builds and runs something, and the device memory it needs at its peak beyond what was held before.

    Returns:
        build_seconds, and peak_memory_mib, which is None on the CPU.
    """
    if device.type != "cuda":
        return {"build_seconds": seconds(function, device), "peak_memory_mib": None}
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    taken = seconds(function, device)
    return {"build_seconds": taken, "peak_memory_mib": (torch.cuda.max_memory_allocated(device) - held) / 2**20}


class Monitor:
    """Clocks and power of the GPU by NVML or nvidia-smi, twice a second, while a `with` block runs; never sets anything."""

    def __init__(self, device: torch.device) -> None:
        self.samples: list[tuple[float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if device.type == "cuda" else None

    def __enter__(self) -> Monitor:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        with contextlib.suppress(Exception):  # a counter that a driver does not offer
            read = self._reader()
            while not self._done.wait(0.5):
                self.samples.append(read())

    @staticmethod
    def _reader() -> Callable[[], tuple[float, float]]:
        """What reads the SM clock in MHz and the power in W."""
        try:
            import pynvml  # pyright: ignore[reportMissingImports]: an extra
        except ImportError:
            query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0"]

            def ask() -> tuple[float, float]:
                clock, power = subprocess.check_output(query, text=True).split(",")
                return float(clock), float(power)

            return ask
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        return lambda: (
            pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        )

    def summary(self) -> dict[str, float] | None:
        """Median SM clock in MHz and power in W; None where nothing could be read."""
        if not self.samples:
            return None
        clocks, powers = zip(*self.samples, strict=True)
        return {"sm_clock_mhz": statistics.median(clocks), "power_w": statistics.median(powers)}


def record(folder: Path | None, file: str, result: dict) -> None:
    """Append `result` as one JSON line to `folder`/`file`, with the command, the versions, the machine and the precision.

    Without a folder there is nothing to keep: a benchmark prints its table besides.
    """
    if folder is None:
        return
    append(folder, file, {**provenance(), **result})


def provenance() -> dict[str, object]:
    """The command, the versions, the machine and the precision."""
    command = shlex.join(["python", *sys.argv])  # as it is typed
    return {
        "command": command,
        "versions": environment.versions(),
        "machine": environment.machine(),
        "precision": precision(),
        "missing_peers": missing_packages(),
    }


def precision() -> dict[str, object]:
    """What torch may make of float32 products and convolutions on CUDA ("none" is float32 as it is), and how cuDNN chooses.

    The settings are read by the names under which torch has kept them since 2.9: the older ones raise once both were written.
    """
    backends = torch.backends
    return {
        "float32_matmul": backends.cuda.matmul.fp32_precision,
        "float32_convolution": backends.cudnn.conv.fp32_precision,  # pyright: ignore[reportAttributeAccessIssue]
        "cudnn_benchmark": backends.cudnn.benchmark,
        "cudnn_deterministic": backends.cudnn.deterministic,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def append(folder: Path, file: str, result: dict) -> None:
    """Append `result` as one JSON line to `folder`/`file`, in one write, so that a kill leaves no half of it.

    A torn line that is there, of a disk that was full, stays a line of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / file).open("ab+", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        torn = size > 0 and os.pread(stream.fileno(), 1, size - 1) != b"\n"
        stream.write(b"\n" * torn + json.dumps(result).encode() + b"\n")


def read(folder: Path, file: str) -> list[dict]:
    """The lines of `folder`/`file`, none where there is no such file; torn lines are left out."""
    path, lines = folder / file, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines
