"""What this machine has, and which fast paths work on it: each is called."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multibeta import distribution, inference, ops, processors
from multibeta.caches import cache_contents, cache_folder, disk_usage
from multibeta.processors import cores

PACKAGES = ("torch", "triton", "xformers", "numpy", "safetensors", "nvidia-ml-py", "ninja", "diffusers")


@dataclass(frozen=True)
class FastPath:
    """One fast path: on, or off for `reason`."""

    name: str
    on: bool
    reason: str = ""


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Version of an installed package; None where it is not installed, as multibeta itself in a plain checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_version() -> str:
    """Version of this multibeta, installed or not."""
    return sys.modules["multibeta"].__version__


def versions() -> dict[str, str | None]:
    """Version of Python and of each package the library can use; None where it is not installed."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def machine() -> dict[str, object]:
    """Hardware and system."""
    facts: dict[str, object] = {
        "platform": platform.platform(),
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "threads from": processors.origin_of_threads(),
    }
    if (granted := processors.quota()) is not None:
        facts["cpu quota"] = f"{granted:g} of {os.cpu_count()} processors"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB"
        facts["cuda"], facts["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return facts


def fast_paths() -> Iterator[FastPath]:
    """Every fast path, on or off with the reason, by calling it on the first example of its op."""
    here = distribution.local_device()
    for op in ops.all_ops():
        args, kwargs = next(iter(op.examples()))
        args, kwargs = (_to(value, here) for value in (args, kwargs))
        for kernel in op.kernels:
            yield FastPath(f"{op.name}: {kernel}", *_try(kernel, args, kwargs))
    fast = inference.fast_dtype(here)
    yield FastPath("bfloat16 sampling", fast == torch.bfloat16, f"{here.type} computes {fast} fastest")
    reason = "the CPU packs, CUDA does not need to" if here.type == "cuda" else inference.why_not_packed() or ""
    yield FastPath("packed weights", here.type == "cpu" and not reason, reason)
    yield FastPath("captured sampling (CUDA graph)", here.type == "cuda", "" if here.type == "cuda" else "needs CUDA")


def caches() -> list[tuple[str, str]]:
    """The folder of the caches, or why there is none, and then each sort of files in it with their number and size."""
    try:
        rows = [("caches", str(cache_folder()))]
    except OSError as error:
        return [("caches", str(error))]
    totals: dict[str, tuple[int, int]] = {}
    for sort, path in cache_contents():
        number, size = disk_usage(path)
        totals[sort] = totals.get(sort, (0, 0))[0] + number, totals.get(sort, (0, 0))[1] + size
    return rows + [(f"  {sort}", f"{number} files, {size / 2**20:.1f} MiB") for sort, (number, size) in totals.items()]


def backends() -> dict[str, str]:
    """What `ops.backend` may be given for each family of ops that has kernels of it, and what holds now."""
    allowed = {}
    for family in ops.FAMILIES:
        members = [op for op in ops.all_ops() if op.family == family]
        named = {kernel.backend for op in members for kernel in op.kernels}
        names = [name for name in ops.BACKENDS if name in ("auto", "reference") or name in named]
        allowed[f"backend {family}="] = f"{', '.join(names)}; now {ops.current_backend(members[0].name)}"
    return allowed


def _try(kernel: ops.Kernel, args: tuple, kwargs: dict) -> tuple[bool, str]:
    reason = kernel.accepts(*args, **kwargs)
    if reason is not None:
        return False, reason
    try:
        kernel.function(*args, **kwargs)
    except Exception as error:  # whatever a broken driver or build raises is the answer
        return False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return True, ""


def _to(value: Any, device: torch.device) -> Any:
    """The tensors within tuples and dicts, moved."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return {key: _to(item, device) for key, item in value.items()} if isinstance(value, dict) else value


def describe() -> str:
    """All of it as one screen of text."""
    rows = [("multibeta", f"{own_version()}, in {Path(__file__).parent}")]
    rows += [(name, value or "not installed") for name, value in versions().items()]
    rows += [(name, str(value)) for name, value in (machine() | backends()).items()]
    paths = [(path.name, f"{'on ' if path.on else 'off'}  {path.reason}".rstrip()) for path in fast_paths()]
    return "\n".join("\n".join(aligned(block)) for block in (rows, paths, caches()))


def aligned(rows: list[tuple[str, str]]) -> list[str]:
    """Lines of two columns."""
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}s}  {value}" for name, value in rows]
