"""The processors this process may compute on: how many, how many threads torch has for them, and whether it waits for them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
GROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
TASKS = Path("/proc/self/task")
AT_ONCE = 256  # images
PIXELS_AT_ONCE = 2**15  # of images on a CPU, for each thread: the maps of a network of more of them leave its caches
_AT_IMPORT = torch.get_num_threads()


def images_at_once(resolution: int, device: str | torch.device) -> int:
    """How many images of `resolution` pixels a side a network is run on at once, where there are many: on a CPU fewer."""
    if torch.device(device).type != "cpu":
        return AT_ONCE
    return min(AT_ONCE, max(1, PIXELS_AT_ONCE * torch.get_num_threads() // resolution**2))


def cores() -> int:
    """Cores this process may use: of the machine, of its affinity, and whole ones of its CPU quota (containers); at least 1."""
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    return max(1, math.floor(min(*counts, quota() or math.inf)))


def quota(groups: Path | None = None, mount: Path | None = None) -> float | None:
    """Processors that the control groups of this process grant it, version 1 or 2, also a fraction; None without a limit.

    Args:
        groups, mount: /proc/self/cgroup, /sys/fs/cgroup.
    """
    try:
        lines = (groups or GROUPS).read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in (controllers, "cpu", "") if controllers else ("", "unified"):
            top = (mount or MOUNT) / root
            inside = top / path.lstrip("/")  # within a container it may not be visible there, but its root is
            limits += [_limit(folder) for folder in (inside, *inside.parents) if folder.is_relative_to(top)]
    return min((limit for limit in limits if limit), default=None)


def _limit(folder: Path) -> float | None:
    """Processors that the files of one control group grant."""
    with contextlib.suppress(OSError, ValueError):
        granted, period = (folder / "cpu.max").read_text().split()
        return None if granted == "max" else int(granted) / int(period)
    with contextlib.suppress(OSError, ValueError):
        granted, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return granted / period if granted > 0 else None
    return None


def excess_threads() -> int | None:
    """`cores()`, where torch has more threads and nobody asked for them; otherwise None.

    Threads are asked for by `OMP_NUM_THREADS`, `MKL_NUM_THREADS`, or by `torch.set_num_threads` after multibeta was imported.
    """
    threads, allowed = torch.get_num_threads(), cores()
    asked = threads != _AT_IMPORT or any(os.environ.get(name) for name in THREAD_VARIABLES)
    return None if asked or threads <= allowed else allowed


@contextlib.contextmanager
def fitting_threads() -> Iterator[None]:
    """Within a `with` block torch has no more threads than `cores()`, unless more were asked for; the log says so."""
    threads, allowed = torch.get_num_threads(), excess_threads()
    if allowed is None:
        yield
        return
    logger.info("computing with %d threads, as many as cores may be used here, not %d; OMP_NUM_THREADS sets it", allowed, threads)
    torch.set_num_threads(allowed)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def origin_of_threads() -> str:
    """Where the number of torch's threads comes from."""
    named = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if os.environ.get(name)]
    if named:
        return ", ".join(named)
    if torch.get_num_threads() == _AT_IMPORT:
        return "torch, as many as the machine or the affinity has"
    return "torch.set_num_threads, or the cores that may be used"


class Waiting:
    """Notices that this process has to wait for processors: others compute on them, or a quota is used up.

    Threads that wait for each other spin, so processor time says little: two threads next to two busy processes computed through
    all of the 0.63 seconds of a step that took 0.18 alone. The kernel counts what its threads stood ready and were not let run
    (`/proc/self/task/*/schedstat`): that was 0.63 seconds too, and 0.01 alone. Elsewhere, and where the process waits for
    something else, the wall time is compared with the processor time.

    Args:
        window: Seconds between two looks.
        bearable: Seconds of standing ready for each second of computing that are not worth a word.
        idle: Seconds of wall time for each second of computing that are not.
    """

    def __init__(self, window: float = 3.0, bearable: float = 0.5, idle: float = 3.0):
        self.window, self.bearable, self.idle = window, bearable, idle
        self.said = 0.0
        self.began: tuple[float, float, float] | None = None

    def restart(self) -> None:
        """Count from the next look on."""
        self.began = None

    def look(self) -> None:
        """Warn where it waits, once, and again where it waits twice as much; the first look only begins to count."""
        if self.began is None:
            self.began = time.perf_counter(), time.process_time(), seconds_ready()
        wall, computed, ready = self.began
        wall = time.perf_counter() - wall
        if wall < self.window:
            return
        computed = max(time.process_time() - computed, 1e-3)
        ready = max(0.0, seconds_ready() - ready)  # threads that ended take theirs with them
        self.restart()
        crowded, slow = ready / computed > self.bearable, wall / computed > self.idle
        stretch = max((computed + ready) / computed, wall / computed)
        if not (crowded or slow) or stretch < 2 * self.said:
            return
        self.said = stretch
        threads = torch.get_num_threads()
        said = f"in the last {wall:.1f} s this process computed for {computed:.1f} s"
        cause = "It waits for something, such as the reading of images, or for other work on these cores"
        if crowded:
            said += f" and its threads stood ready for {ready:.1f} s more without a processor"
            cause = "It shares its cores with other work, or has used up a CPU quota"
        fewer = f"OMP_NUM_THREADS={max(1, threads // 2)} is often faster than {threads} threads that wait for each other"
        alone = "OMP_NUM_THREADS and torch.set_num_threads are at 1 already: end the other work, or go where there is none"
        logger.warning("%s. %s: %s", said, cause, fewer if threads > 1 else alone)


def seconds_ready() -> float:
    """How long the threads of this process stood ready to run and were not let; 0 where the system does not count it."""
    total = 0
    for task in TASKS.glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int(task.read_text().split()[1])
    return total / 1e9
