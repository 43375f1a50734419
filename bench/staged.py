"""A budgeted run of stages: each result on disk at once, each stage on its own, nothing timed that computes something else."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import agreement
import measure
import op_speed
import torch

from multibeta import inference, ops, recipes


class Run:
    """What the stages share: device, sizes, the budget, the record, and the ceilings that rates are fractions of."""

    def __init__(self, file: str, device: torch.device, budget_s: float, small: bool):
        self.file, self.device, self.small = file, device, small
        self.dtype = inference.fast_dtype(device)
        self.recipe, self.other = recipes.find("scenes32" if small else "celebahq256"), recipes.find("celeba64")
        self.batches = (2, 1) if small else (64, 8, 1, 256)  # the decisive first
        self.decoder_batches = (2,) if small else (8, 32, 1)
        self.repetitions = 3 if small else 20
        self.end = self.deadline = time.perf_counter() + budget_s
        self.stage, self.rows, self.failed = "", [], set()
        self.name = datetime.now(timezone.utc).isoformat(timespec="seconds")

    @property
    def cuda(self) -> bool:
        """Whether this measures, or stands in."""
        return self.device.type == "cuda"

    @cached_property
    def gemm_tflops(self) -> float:
        """Rate of a large product in the fast dtype."""
        return measure.gemm_ceiling(self.device, self.dtype)

    @cached_property
    def copy_gb_s(self) -> float:
        """Rate of a copy larger than the caches."""
        return measure.copy_ceiling(self.device)

    def left(self) -> float:
        """Seconds of the budget."""
        return self.end - time.perf_counter()

    def late(self, need_s: float = 0.0) -> bool:
        """Whether this stage has no time for something that takes `need_s` seconds."""
        return time.perf_counter() + need_s > self.deadline

    def within(self, items: Iterable) -> Iterator:
        """The items, until the time of the stage is spent; records where it stopped."""
        for done, item in enumerate(items):
            if self.late():
                self.record(stopped=f"the time of the stage is spent after {done} measurements")
                return
            yield item

    def record(self, **values) -> None:
        """One line of the record."""
        measure.append(self.file, {"run": self.name, "stage": self.stage, **values})

    def row(self, what: str, arm: str, ms: float | None, rate: float, unit: str, ceiling: float | None) -> None:
        """One line of the table printed at the end."""
        self.rows.append((self.stage, what, arm, ms, rate, unit, rate / ceiling if ceiling else None))

    def compare(
        self, what: object, batch: int, arms: dict[str, Callable], *, flop: int = 0, moved: int = 0, **facts
    ) -> dict[str, dict]:
        """Time arms that do the same `flop` operations or move the same `moved` bytes; record, note rows, return the times."""
        times = measure.kernel_times(arms, self.device, repetitions=self.repetitions)
        for arm, timing in times.items():
            if "error" in timing:
                continue
            ms = timing["median_ms"]
            timing["rate"], timing["unit"] = (flop / ms / 1e9, "TF/s") if flop else (moved / ms / 1e6, "GB/s")
            ceiling = self.gemm_tflops if flop else self.copy_gb_s
            self.row(f"{what} B{batch}", arm, ms, timing["rate"], timing["unit"], ceiling)
        self.record(what=str(what), batch=batch, flop=flop, bytes=moved, arms=times, **facts)
        return times

    def checked(
        self, op: ops.Op, args: tuple, kwargs: dict, *, compiled: bool = False, sample: tuple | None = None
    ) -> tuple[dict[str, Callable], dict[str, str]]:
        """`op_speed.arms` but for those that disagree with the float64 reference on this call, and what speaks against these.

        Arguments `sample`, of a smaller batch, are checked instead where given.
        """
        able, unable = op_speed.arms(op, args, kwargs, compiled)
        for name in [name for name in able if name != "reference"]:
            try:
                wrong = "failed before" if (op.name, name) in self.failed else None
                wrong = wrong or agreement.disagreement(op, able[name].func, sample or args, kwargs)
            except Exception as error:
                wrong = measure.one_line(error)
            if wrong:
                unable[name] = wrong
                del able[name]
        return able, unable


@dataclass(frozen=True)
class Stage:
    """A stage and about how many seconds it takes."""

    function: Callable[[Run], None]
    seconds: float


def run_stages(run: Run, stages: dict[int, Stage], numbers: list[int]) -> None:
    """The stages of these numbers in this order, as far as the budget goes; each may take what the later ones do not need."""
    for position, number in enumerate(numbers):
        stage = stages[number]
        run.stage = stage.function.__name__
        need = 5 if run.small else stage.seconds
        if run.left() < need:
            print(f"stage {number}, {run.stage}: skipped, it takes about {need:.0f} s and {max(run.left(), 0):.0f} s are left")
            run.record(skipped=f"takes about {need:.0f} s, {max(run.left(), 0):.0f} s left")
            continue
        print(f"stage {number}, {run.stage}: {run.left():.0f} s left", flush=True)
        later = 0 if run.small else sum(stages[n].seconds for n in numbers[position + 1 :])
        start = time.perf_counter()
        run.deadline = max(start + need, run.end - later)
        with measure.Monitor(run.device) as monitor:
            try:
                stage.function(run)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                run.record(error=measure.one_line(error), at=f"{Path(where.filename).name}:{where.lineno}")
                print(f"  raised {measure.one_line(error)} at {Path(where.filename).name}:{where.lineno}")
        run.record(seconds=time.perf_counter() - start, clocks=monitor.summary())


def table(run: Run) -> str:
    """Every timed arm."""
    lines = [f"{'what':50s} {'arm':20s} {'ms':>11s} {'rate':>10s}       {'of ceiling':>10s}"]
    for _, what, arm, ms, rate, unit, fraction in run.rows:
        time_text, share = f"{ms:.4f}" if ms else "", f"{fraction:.1%}" if fraction else ""
        lines.append(f"{what:50s} {arm:20s} {time_text:>11s} {rate:10.3f} {unit:5s} {share:>10s}")
    return "\n".join(lines)
