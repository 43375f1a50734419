"""A run of stages, each in a process of its own with a time limit; what was measured is on disk before the next measurement."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from common import agreement, calls, measure, networks, sampling
from multibeta import inference, ops, recipes

GRACE_S = 5.0  # between the interrupt and the kill of a stage
LEAST_S = 5.0  # of a stage that starts at all
Item = TypeVar("Item")


@dataclass(frozen=True)
class Stage:
    """Functions of a `Run`, one after the other, and the seconds that they are given together."""

    functions: tuple[Callable[[Run], None], ...]
    seconds: float


class Run:
    """What the functions of a stage share: device, sizes, the time that is left, the record.

    Args:
        folder, file: Of the record.
        deadline: Of `time.monotonic`, after which no further measurement starts.
        small: Tiny sizes, which prove the script.
    """

    def __init__(self, folder: Path, file: str, device: torch.device, stage: str, deadline: float, small: bool) -> None:
        self.folder, self.file, self.device, self.stage, self.small = folder, file, device, stage, small
        self.deadline = deadline
        self.dtype = inference.fast_dtype(device)
        self.recipe = tiny() if small else networks.PRESETS["celebahq256"]
        self.batches = (1, 2) if small else (1, 8, 64)
        self.decoder_batch = 2 if small else 8
        self.repetitions = 3 if small else 20

    @property
    def cuda(self) -> bool:
        """Whether this measures, or stands in."""
        return self.device.type == "cuda"

    @cached_property
    def gemm_tflops(self) -> float | None:
        """Rate of a large product, as an earlier stage measured it."""
        return latest(self.lines(), "gemm_tflops")

    def lines(self) -> list[dict]:
        """The record so far, of all stages and runs."""
        return measure.read(self.folder, self.file)

    def late(self, need_s: float = 0.0) -> bool:
        """Whether this stage has no time for something that takes `need_s` seconds."""
        return time.monotonic() + need_s > self.deadline

    def within(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, until the time of the stage is spent; records where it stopped."""
        for done, item in enumerate(items):
            if self.late():
                self.record(stopped=f"the time of the stage is spent after {done} measurements")
                return
            yield item

    def record(self, **values: object) -> None:
        """One line of the record, on disk when this returns."""
        measure.append(self.folder, self.file, {"stage": self.stage, **values})

    def compare(
        self, what: object, batch: int, arms: dict[str, Callable], *, flop: int = 0, moved: int = 0, **facts: object
    ) -> dict[str, dict]:
        """Time arms that do the same `flop` operations or move the same `moved` bytes, record each, return the times."""
        times = measure.kernel_times(arms, self.device, repetitions=self.repetitions)
        for arm, timing in times.items():
            rates = rated(timing, flop, moved) if "error" not in timing else {}
            self.record(what=f"{what} B{batch}", arm=arm, batch=batch, flop=flop, bytes=moved, **timing, **rates, **facts)
        return times

    def checked(self, op: ops.Op, args: tuple, kwargs: dict, *, sample: tuple | None = None) -> tuple[dict, dict[str, str]]:
        """`calls.arms` but for those that disagree with the float64 reference on this call, and what speaks against these.

        Arguments `sample`, of a smaller batch, are checked instead where given.
        """
        able, unable = calls.arms(op, args, kwargs, compiled=False)
        for name in [name for name in able if name != "reference"]:
            try:
                wrong = agreement.disagreement(op, able[name].func, sample or args, kwargs)
            except Exception as error:
                wrong = measure.one_line(error)
            if wrong:
                unable[name] = wrong
                del able[name]
        return able, unable

    def build_arm(self, name: str) -> sampling.Sampling:
        """An arm of `common.sampling`; tiny ones are traced, not compiled."""
        backend = "aot_eager" if self.small else "inductor"
        return sampling.build_arm(name, self.recipe.diffusion, self.device, None, backend=backend)


def rated(timing: dict, flop: int, moved: int) -> dict[str, object]:
    """Rates that follow from the times of a call: TF/s where it computes, GB/s where it moves bytes, warm and cold."""
    scale, unit = (flop / 1e9, "TF/s") if flop else (moved / 1e6, "GB/s")
    rates = {"rate": scale / timing["median_ms"], "unit": unit}
    return rates | ({"cold_rate": scale / timing["cold_ms"]} if "cold_ms" in timing else {})


def tiny() -> recipes.MultiBetaRecipe:
    """The scenes' recipe with networks of one level and 16 channels."""
    recipe = networks.PRESETS["scenes32"]
    shape = {"base_channels": 16, "num_res_blocks": 1, "num_groups": 4}
    vae = dataclasses.replace(recipe.vae, **shape, resolution=16, channel_multipliers=(1, 1, 1))
    diffusion = dataclasses.replace(
        recipe.diffusion, **shape, latent_resolution=4, channel_multipliers=(1,), attention_resolutions=(4,), head_channels=8
    )
    return dataclasses.replace(recipe, vae=vae, diffusion=diffusion)


def latest(lines: list[dict], key: str) -> Any:
    """The last value under `key`; None where there is none."""
    return next((line[key] for line in reversed(lines) if key in line), None)


def run_stage(run: Run, stage: Stage) -> bool:
    """The functions of a stage; one that raises is recorded and the next goes on. False once interrupted."""
    start, interrupted = time.monotonic(), False
    run.record(device=str(run.device), small=run.small, **measure.provenance())
    with measure.Monitor(run.device) as monitor:
        for function in stage.functions:
            if interrupted:
                break
            try:
                function(run)
            except KeyboardInterrupt:
                interrupted = True
                run.record(interrupted=function.__name__)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                at = f"{Path(where.filename).name}:{where.lineno}"
                run.record(what=function.__name__, error=measure.one_line(error), at=at)
                print(f"  {function.__name__} raised {measure.one_line(error)} at {at}", flush=True)
    run.record(seconds=time.monotonic() - start, clocks=monitor.summary())
    return not interrupted


def supervise(command: list[str], limit_s: float, grace_s: float = GRACE_S) -> int:
    """The return code of a command that is interrupted after `limit_s`, and killed with all it started `grace_s` later.

    It runs in a process group of its own, so that Ctrl-C here comes to it as that interrupt.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=os.setpgrp)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return _stop(process, grace_s)
    except KeyboardInterrupt:
        _stop(process, grace_s)
        raise
    finally:
        _signal(process, signal.SIGKILL)  # what the command left behind


def _stop(process: subprocess.Popen, grace_s: float) -> int:
    _signal(process, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(grace_s)
    _signal(process, signal.SIGKILL)
    return process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run_stages(
    stages: dict[str, Stage], names: list[str], command: list[str], budget_s: float, note: Callable[[str, str], None]
) -> None:
    """`command` --stage NAME --until T for each of these stages; one may take what the later ones do not need.

    Args:
        note: Takes (stage, how it ended) of stages that ended ill.
    """
    end = time.monotonic() + budget_s
    for position, name in enumerate(names):
        left = end - time.monotonic() - GRACE_S
        later = sum(stages[other].seconds for other in names[position + 1 :])
        limit = min(left, max(stages[name].seconds, left - later))
        if limit < LEAST_S:
            note(name, f"skipped: {max(left, 0):.0f} s are left")
            continue
        print(f"{name}: {limit:.0f} s at most", flush=True)
        start = time.monotonic()  # of one clock for all processes
        code = supervise([*command, "--stage", name, "--until", f"{start + limit:.1f}"], limit)
        if code:
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
            note(name, f"ended by {reason} after {time.monotonic() - start:.0f} s")


def newest(lines: list[dict]) -> list[dict]:
    """The lines of the last process of each stage, in the order of the record: what ran before in the same folder is history."""
    begins = {line["stage"]: number for number, line in enumerate(lines) if "versions" in line}  # the first of a process
    return [line for number, line in enumerate(lines) if number >= begins.get(line["stage"], 0)]


def table(lines: list[dict]) -> str:
    """Every timed arm, the first stages last: a log that is cut keeps its end."""
    gemm, copy = latest(lines, "gemm_tflops"), latest(lines, "copy_gb_s")
    rows = {(line["what"], line["arm"]): line for line in lines if "rate" in line}  # the latest of each
    text = []
    for (what, arm), line in rows.items():
        ceiling = {"TF/s": gemm, "GB/s": copy}.get(line["unit"])
        share = f"{line['rate'] / ceiling:.0%}" if ceiling else ""
        cold = f"{line['cold_rate']:10.3f}" if "cold_rate" in line else ""
        host = "" if line.get("captured", True) else " with its launches"
        numbers = f"{line['median_ms']:10.4f} {line['rate']:10.3f} {line['unit']:5s} {share:>5s} {cold}{host}"
        text.append(f"{what:46s} {arm:18s} {numbers}".rstrip())
    legend = (
        "Newest first. share: of the rate of a large product (TF/s) or of a large copy (GB/s). cold rate: with the L2 cache "
        'overwritten before, on CUDA. "with its launches": not captured, so that the host\'s time counts.'
    )
    head = f"{'what':46s} {'arm':18s} {'ms':>10s} {'rate':>10s}       {'share':>5s} {'cold rate':>10s}"
    return "\n".join([legend, head, *reversed(text)])
