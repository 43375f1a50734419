"""The C++ kernels of `multibeta._csrc` for the CPU, compiled on first use and kept for later processes.

The library lies in one of `caches.cache_folders`, named after a hash of all it depends on; a build that failed is remembered
there with its reason. MULTIBETA_NO_BUILD=1 leaves it unbuilt; ATEN_CPU_CAPABILITY, which torch reads, chooses the instruction
set here as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import logging
import math
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from multibeta import caches, files
from multibeta.caches import cache_folder

from . import derivatives, pair, probes, shapes

SOURCES = ("attention.cpp", "group_norm_act.cpp", "sampler_update.cpp")
HEADERS = ("vectors.h",)
DTYPES = (torch.float32, torch.bfloat16)
PASSING = (
    "No space left",
    "Disk quota exceeded",
    "Killed",
    "signal",
    "Cannot allocate memory",
    "out of memory",
)  # may not come again
MAX_HEAD_DIM = 256  # of attention.cpp, as kMaxHeadDim

log = logging.getLogger("multibeta")
_lock = threading.Lock()
_outcome: str | None = "not tried"  # None once the operators are available, else the reason they are not


def compiler_flags() -> list[str]:
    """Flags for the instruction set that torch itself uses on this machine."""
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
    if sys.platform == "linux":
        flags.append("-fopenmp")
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        flags += ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
        flags += ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"]
        if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
            flags.append("-mavx512bf16")
    elif capability == "AVX2":
        flags += ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]
    else:
        flags.append("-DCPU_CAPABILITY=DEFAULT")
    return flags


def source_folder() -> Path:
    """Where the C++ sources are installed."""
    return Path(str(importlib.resources.files("multibeta._csrc")))


def library_name() -> str:
    """The library's name in the caches, which holds a hash of sources, torch, Python ABI, instruction set and flags."""
    folder = source_folder()
    digest = hashlib.sha256()
    for part in (torch.__version__, str(sysconfig.get_config_var("SOABI")), *compiler_flags()):
        digest.update(part.encode() + b"\0")
    for name in SOURCES + HEADERS:
        digest.update((folder / name).read_bytes() + b"\0")
    return f"cpp-{digest.hexdigest()[:20]}.so"


@probes.constant
def load() -> str | None:
    """None when the operators `multibeta::*_cpp` are available, building them if need be; else the reason, remembered."""
    global _outcome
    if _outcome == "not tried":
        with _lock:
            if _outcome == "not tried":
                _outcome = _load()
                if _outcome is not None and not _declined_by_user():
                    log.warning("the C++ kernels are off, and the CPU computes more slowly: %s", _outcome)
    return _outcome


def _load() -> str | None:
    if _declined_by_user():
        return "MULTIBETA_NO_BUILD is set"
    try:
        name = library_name()
        places = [folder / name for folder in caches.cache_folders() if why_not_executable(folder) is None]
        if not any(map(_loads, places)) and (reason := _build(cache_folder(usable=why_not_executable) / name)):
            return reason
    except OSError as error:
        return f"the build failed: {error}"
    derivatives.register("cpp")
    _register_fakes()
    return None


def _declined_by_user() -> bool:
    return os.environ.get("MULTIBETA_NO_BUILD", "0") not in ("", "0")


def why_not_executable(folder: Path) -> str | None:
    """Why no library can be loaded from `folder`, as far as its mount tells; None where it can."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    flags = os.statvfs(there).f_flag if hasattr(os, "statvfs") else 0
    return "it is mounted noexec, and libraries cannot be loaded from it" if flags & getattr(os, "ST_NOEXEC", 0) else None


def _loads(library: Path) -> bool:
    if not library.exists():
        return False
    try:
        torch.ops.load_library(library)
    except OSError:  # damaged: built anew
        with contextlib.suppress(OSError):
            library.unlink(missing_ok=True)
        return False
    return True


def _build(library: Path) -> str | None:
    compiler = os.environ.get("CXX", "c++")
    if not (executable := shutil.which(compiler.split()[0])):
        return f"no C++ compiler: {compiler} not found; install g++ or set CXX"
    if not (Path(torch.__file__).parent / "include" / "ATen").is_dir():
        return "torch headers missing"
    scripts = sysconfig.get_path("scripts")
    if not shutil.which("ninja") and not shutil.which("ninja", path=scripts):
        return "ninja not found; install it with `pip install ninja`"
    if files.fcntl is None:
        return "the C++ kernels are built on Linux and macOS only"

    caches.make_cache_folder(library.parent)
    with files.lock(library.with_suffix(".lock"), doing="compiling the C++ kernels into") as held:
        if _loads(library):  # built by another process meanwhile
            return None
        if reason := _remembered(library, executable):
            return reason
        if held:
            files.remove_abandoned(library.parent, f"{library.stem}-*", younger=True)
        folder = tempfile.mkdtemp(prefix=f"{library.stem}-", dir=library.parent)
        try:
            reason = _compile(library, folder, scripts)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if reason and not any(passing in reason for passing in PASSING):
            failed = {"reason": reason, **_identity(executable)}
            files.write_text(_failure(library), json.dumps(failed))
        return reason


def _failure(library: Path) -> Path:
    return library.with_suffix(".failed")


def _remembered(library: Path, executable: str) -> str | None:
    """The reason why an earlier build with the same compiler failed, which this one would too."""
    try:
        failed = json.loads(_failure(library).read_bytes())
        reason = failed.pop("reason")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    if failed != _identity(executable):
        return None
    return f"{reason} (found earlier; `multibeta cache clear`, or removing {_failure(library)}, makes it try again)"


def _identity(executable: str) -> dict[str, object]:
    """What tells one compiler from another, or from a newer version of it."""
    return {"compiler": os.path.realpath(executable), "changed": os.stat(executable).st_mtime_ns}


def _compile(library: Path, folder: str, scripts: str) -> str | None:
    from torch.utils import cpp_extension

    start, path = time.perf_counter(), os.environ.get("PATH", "")
    log.info("compiling the C++ kernels, once for this machine")
    os.environ["PATH"] = os.pathsep.join((path, scripts))  # where pip puts ninja
    try:
        cpp_extension.load(
            "multibeta_cpp",
            [str(source_folder() / name) for name in SOURCES],
            extra_cflags=compiler_flags(),
            extra_ldflags=["-fopenmp"] if sys.platform == "linux" else [],
            build_directory=folder,
            is_python_module=False,
        )
    except Exception as error:  # of many types: whatever it is, the reference still works
        log_file = library.with_suffix(".log")
        with contextlib.suppress(OSError):  # of a full disk, say
            files.write_text(log_file, str(error))
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower()] or lines or [repr(error)]
        passing = [line for line in lines if any(reason in line for reason in PASSING)]
        return f"the build failed: {(passing or telling)[-1][:300]}; log at {log_file}"
    finally:
        os.environ["PATH"] = path
    os.replace(Path(folder) / "multibeta_cpp.so", library)
    log.info("compiled the C++ kernels in %.0f s: %s", time.perf_counter() - start, library)
    return None


def _register_fakes() -> None:
    @torch.library.register_fake("multibeta::group_norm_act_into_cpp")
    def _(x, weight, bias, num_groups, eps, shift, activation, out):
        return None

    @torch.library.register_fake("multibeta::attention_cpp")
    def _(query, key, value):
        return value.new_empty(value.shape)

    @torch.library.register_fake("multibeta::standard_normal_cpp")
    def _(seeds, step, size, stream):
        return seeds.new_empty(seeds.shape[0], size, dtype=torch.float32)

    @torch.library.register_fake("multibeta::sampler_update_cpp")
    def _(latent, noise_prediction, delta, row, seeds, step, previous_noise, previous_delta):
        dtype = latent.dtype
        for tensor in (noise_prediction, delta, previous_noise, previous_delta):
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        return torch.empty_like(latent, dtype=dtype)

    @torch.library.register_fake("multibeta::sampler_step_cpp")
    def _(latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition=None):
        return None


def _declined(named: dict[str, Tensor | None]) -> str | None:
    """Why one of these tensors is not for the CPU kernels: its device or dtype."""
    for name, tensor in named.items():
        if tensor is None or (tensor.is_cpu and tensor.dtype in DTYPES):
            continue
        if not tensor.is_cpu:
            return f"{name} is on {tensor.device.type}, the C++ kernels serve the CPU"
        return f"{name} is {str(tensor.dtype).removeprefix('torch.')}, the C++ kernels serve float32 and bfloat16"
    return None


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def group_norm_act(x, weight, bias, num_groups, eps=1e-6, *, shift=None, x_bias=None, residual=None, activation="sigmoid"):
    """`ops.group_norm_act` by the C++ kernels."""
    assert x_bias is None, "declined"
    y, total, _, _ = torch.ops.multibeta.group_norm_act_cpp(x, weight, bias, num_groups, eps, shift, residual, activation)
    return y if residual is None else (y, total)


def accepts_group_norm_act(
    x, weight, bias, num_groups, eps=1e-6, *, shift=None, x_bias=None, residual=None, activation="sigmoid"
) -> str | None:
    """None when `group_norm_act` can serve the call, else the reason it declines."""
    if x_bias is not None:
        return "x_bias is given: on the CPU convolutions add their own bias"
    if weight is None or bias is None:
        return "weight and bias must be given"
    if reason := _declined({"x": x, "weight": weight, "bias": bias, "shift": shift, "residual": residual}):
        return reason
    if x.dim() != 4 or x.numel() == 0:
        return f"x must be (N, C, H, W) and not empty, got {tuple(x.shape)}"
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return "x is neither contiguous nor channels-last"
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return "residual must have the shape and dtype of x"
    if shift is not None and shift.shape != x.shape[:2]:
        return f"shift must be (N, C), got {tuple(shift.shape)}"
    return load()


def group_norm_act_pair(
    x, beside, weight, bias, num_groups, eps=1e-6, *, shift=None, x_bias=None, residual=None, activation="sigmoid"
):
    """`group_norm_act` of torch.cat([x, beside], dim=1), which is never made, for inference."""
    assert x_bias is None and residual is None, "declined"
    operator = torch.ops.multibeta.group_norm_act_into_cpp
    return pair.group_norm_act_pair(operator, x, beside, weight, bias, num_groups, eps, shift, activation)


def accepts_group_norm_act_pair(
    x, beside, weight, bias, num_groups, eps=1e-6, *, shift=None, x_bias=None, residual=None, activation="sigmoid"
) -> str | None:
    """None when `group_norm_act_pair` can serve the call, else the reason it declines."""
    if x_bias is not None or residual is not None:
        return "x_bias or residual is given: on the CPU convolutions add their own"
    if reason := pair.declined(x, beside, num_groups):
        return reason
    first = x.shape[1]
    if shift is not None and shift.shape != (len(x), first + beside.shape[1]):
        return f"shift must be (N, C) of both parts, got {tuple(shift.shape)}"
    shifts = (None, None) if shift is None else (shift[:, :first], shift[:, first:])
    for part, shift_part in zip((x, beside), shifts, strict=True):
        if reason := accepts_group_norm_act(part, weight, bias, num_groups, shift=shift_part):
            return reason
    return "the pair has no backward" if _wants_gradient(x, beside, weight, bias, shift) else None


def attention(query, key, value):
    """`ops.attention` by the C++ kernel, for inference."""
    return torch.ops.multibeta.attention_cpp(query, key, value)


def accepts_attention(query, key, value) -> str | None:
    """None when `attention` can serve the call, else the reason it declines."""
    named = {"query": query, "key": key, "value": value}
    if reason := _declined(named):
        return reason
    if query.dim() != 4 or query.numel() == 0 or key.shape != query.shape or value.shape != query.shape:
        return "query, key and value must be (N, L, heads, head_dim) of one shape and not empty"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return "query, key and value must have one dtype"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {query.shape[-1]}"
    if any(tensor.stride(-1) != 1 for tensor in named.values()):
        return "the last dimension of query, key and value must have stride 1"
    if _wants_gradient(query, key, value):
        return "the C++ attention has no backward"
    return load()


def standard_normal(seeds, step, shape, *, stream=0):
    """`ops.standard_normal` by the C++ kernels."""
    return torch.ops.multibeta.standard_normal_cpp(seeds, step, math.prod(shape), stream).view(-1, *shape)


def accepts_standard_normal(seeds, step, shape, *, stream=0) -> str | None:
    """None when `standard_normal` can serve the call, else the reason it declines."""
    if seeds.device.type != "cpu":
        return f"seeds are on {seeds.device.type}, the C++ kernels serve the CPU"
    if seeds.dtype != torch.int64 or seeds.dim() != 1 or seeds.numel() * math.prod(shape) == 0:
        return "seeds must be (N,) int64 and the noise not empty"
    return load()


def sampler_update(latent, noise_prediction, delta, row, seeds, step, *, previous=None):
    """`ops.sampler_update` by the C++ kernels."""
    previous_noise, previous_delta = previous or (None, None)
    return torch.ops.multibeta.sampler_update_cpp(
        latent, noise_prediction, delta, row, seeds, step, previous_noise, previous_delta
    )


def accepts_sampler_update(latent, noise_prediction, delta, row, seeds, step, *, previous=None) -> str | None:
    """None when `sampler_update` can serve the call, else the reason it declines."""
    previous_noise, previous_delta = previous or (None, None)
    named = {"latent": latent, "noise_prediction": noise_prediction, "delta": delta}
    named |= {"previous[0]": previous_noise, "previous[1]": previous_delta}
    if reason := _declined(named):
        return reason
    if latent.numel() == 0 or any(tensor is not None and tensor.shape != latent.shape for tensor in named.values()):
        return "latent and predictions must have one shape and not be empty"
    if row.shape not in ((6,), (*latent.shape[1:2], 6)):
        return f"row must be (6,) or (C, 6), got {tuple(row.shape)}"
    if row.device.type != "cpu" or seeds.device.type != "cpu" or seeds.dtype != torch.int64:
        return "row and seeds must be on the CPU, seeds int64"
    if _wants_gradient(row, *named.values()):
        return "the C++ sampler has no derivative"
    return load()


def sampler_step(latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition=None):
    """`ops.sampler_step` by the C++ kernels."""
    torch.ops.multibeta.sampler_step_cpp(
        latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition
    )


def accepts_sampler_step(
    latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition=None
) -> str | None:
    """None when `sampler_step` can serve the call, else the reason it declines."""
    named = {"latent": latent, "network_input": network_input, "history": history, "output": output}
    if reason := _declined(named | {"rows": rows, "channel_rows": channel_rows, "condition": condition}):
        return reason
    if reason := shapes.sampler_step_reason(latent, network_input, history, output, rows, channel_rows, condition):
        return reason
    whole = (latent, history, rows, channel_rows) + (() if condition is None else (condition,))
    if any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in whole):
        return "latent, history, rows, channel_rows and condition must be contiguous float32"
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.int64 for tensor in (steps, counter, seeds)):
        return "steps, counter and seeds must be int64 on the CPU"
    if _wants_gradient(latent, history, output, rows, channel_rows, condition):
        return "the C++ sampler has no derivative"
    return load()
