"""The library of the C++ kernels, compiled from the sources of `multibeta._csrc` on first use and kept for later processes.

It lies in one of `caches.cache_folders`, named after a hash of all it depends on; a build that failed is remembered there with
its reason. MULTIBETA_NO_BUILD=1 leaves it unbuilt; ATEN_CPU_CAPABILITY, which torch reads, chooses the instruction set here too.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import logging
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

from multibeta import caches, files
from multibeta.caches import cache_folder

SOURCES = ("attention.cpp", "group_norm_act.cpp", "sampler_update.cpp")
HEADERS = ("vectors.h",)
PASSING = (
    "No space left",
    "Disk quota exceeded",
    "Killed",
    "signal",
    "Cannot allocate memory",
    "out of memory",
)  # may not come again

log = logging.getLogger("multibeta")


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


def load_library() -> str | None:
    """Load the library, building it if need be: None when it is loaded, else the reason it is not."""
    if declined_by_user():
        return "MULTIBETA_NO_BUILD is set"
    try:
        name = library_name()
        places = [folder / name for folder in caches.cache_folders() if why_not_executable(folder) is None]
        if not any(map(_loads, places)) and (reason := _build(cache_folder(usable=why_not_executable) / name)):
            return reason
    except OSError as error:
        return f"the build failed: {error}"
    return None


def declined_by_user() -> bool:
    """Whether MULTIBETA_NO_BUILD is set."""
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
    if os.name != "posix":
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
