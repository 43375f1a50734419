"""The command that shows everything once."""

import functools
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from multibeta import checkpoints, data, ops, recipes
from multibeta.cli.arguments import SHIPPED, available
from multibeta.cli.measures import Report
from multibeta.cli.pictures import Edit, Interpolate, Sample, Show
from multibeta.pipelines import Pipeline, load_pretrained, resolve_pretrained
from multibeta.training import TrainingInterrupted

Result = TypeVar("Result")
DEMO_RECIPE = "scenes32-small"
SHOWN = 8  # images a row, where few and many evaluations are compared
DEMO_SCENES = ("scenes:61234", "scenes:178503", "scenes:290117", "scenes:433021")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """See the shipped model at work, train a small one live, and read its report."""

    out: Path = Path("demo")  # Folder of everything the demo writes; a second call goes on where the first stopped.

    def run(self) -> None:
        run, model = self.out / "run", self.out / "run" / "model"
        typed = shlex.join(["multibeta", "demo", "--out", str(self.out)])
        try:
            resolve_pretrained(SHIPPED)
        except FileNotFoundError as error:
            print(f"The shipped model is missing ({error}): going on with the training.\n")
        else:
            with ops.backend("reference"):  # the first picture does not wait until kernels are compiled
                timed(Show(model=SHIPPED, images=DEMO_SCENES, out=self.out / "sharpened.png").run)
            timed(Sample(model=SHIPPED, out=self.out / "samples.png").run)
            if "map" in (shipped := load_pretrained(SHIPPED, available("auto"))).samplers:
                timed(lambda: few_evaluations(shipped, self.out / "few-evaluations.png"))
            timed(Edit(model=SHIPPED, images=DEMO_SCENES, out=self.out / "edited.png").run)
            first, second, *_ = DEMO_SCENES
            timed(Interpolate(model=SHIPPED, first=first, second=second, out=self.out / "interpolated.png").run)
        if not checkpoints.exists(model):
            recipe = recipes.find(DEMO_RECIPE)
            try:
                timed(lambda: recipes.run(recipe, run, resume=(run / "vae").exists(), device=available("auto"), command=typed))
            except KeyboardInterrupt as stopped:  # the message of `train` names a flag that `demo` does without
                number = getattr(stopped, "signal", signal.SIGINT)
                raise TrainingInterrupted(f"stopped; run {typed} again to go on", number) from None
        print(f"{model}: the recipe {DEMO_RECIPE}, trained here")
        timed(Report(model=str(model), out=self.out / "report.html", quick=True).run)


def few_evaluations(model: Pipeline, out: Path) -> None:
    """A picture of new images in few and in many evaluations of the network, a row of each, with the time that they took."""
    usual, rows = model.sampling_options(), {}
    ways = ("map", 1), ("map", 2), ("map", 4), (usual["sampler"], usual["steps"]), ("ancestral", model.num_steps)
    for sampler, steps in ways:
        model.generate(SHOWN, sampler=sampler, steps=1)  # what is prepared once is not timed
        images, seconds = quickest(functools.partial(model.generate, SHOWN, sampler=sampler, steps=steps))
        rows[f"{sampler} {steps}\n{seconds:.2g} s"] = images
    data.save_grid(torch.cat(list(rows.values())), out, columns=SHOWN, labels=list(rows))
    times = ", ".join(label.replace("\n", ": ") for label in rows)
    print(f"{out}: {SHOWN} new images a row, by sampler and evaluations of the network, with the time of a row: {times}")


def quickest(function: Callable[[], Result], within: float = 1.0) -> tuple[Result, float]:
    """What a call returns, and the seconds of the quickest of those that `within` seconds hold: other work delays the others."""
    start, taken = time.perf_counter(), []
    while True:
        began = time.perf_counter()
        result = function()
        taken.append(time.perf_counter() - began)
        if time.perf_counter() - start >= within:
            return result, min(taken)


def timed(step: Callable[[], object]) -> None:
    """Call `step` and print how long it took."""
    began = time.perf_counter()
    step()
    print(f"  took {time.perf_counter() - began:.0f} s\n", flush=True)
