"""How many steps fit into the time that is given: the seconds of a step are measured on this machine, the rest is arithmetic."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multibeta import checkpoints, data, distribution, processors
from multibeta.checks import check_number
from multibeta.diffusion_vae import CapacityVAE
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.nonlinear_diffusion import NonlinearDiffusion, table_nodes
from multibeta.recipes import preflight
from multibeta.recipes.presets import MINUTES
from multibeta.recipes.recipe import MultiBetaRecipe, Recipe, build, open_data, recorded_recipe
from multibeta.training.run import Run

logger = logging.getLogger(__name__)

STAGE_2 = "diffusion_training"
SHARES = {"vae_training": 0.45, STAGE_2: 0.5}  # of the time; the rest is for what is neither
TITLES = {"vae_training": "1, VAE", "diffusion_training": "2, diffusion"}
LEAST_STEPS = 300  # fewer show nothing
MOST_EPOCHS = 400  # seen more often, a small folder is learned by heart: the loss on held-out images rises again
LOOK_SECONDS = 120  # until the first pictures, and between them
LARGEST_WARMUP = 500
PLANNED = ("steps", "warmup_steps", "validate_every", "checkpoint_every")
STEP_FLAGS = (*(preflight.flag(stage, "steps") for stage in SHARES), preflight.flag("vae_objective", "untie_steps"))
WARM_STEPS, TIMED_STEPS, TIMED_SECONDS, TIMED_ENCODINGS = 3, 10, 20.0, 3


@dataclass(frozen=True)
class Measured:
    """Seconds that a training takes here.

    Attributes:
        steps: One step of each stage, by its name in a recipe; of stage 2 with the encodings of its images at hand.
        encoding: One image through the encoder, without gradients.
    """

    steps: dict[str, float]
    encoding: float


@dataclass(frozen=True)
class PlannedStage:
    """Steps of one stage, and how long each takes."""

    steps: int
    batch_size: int
    step_seconds: float

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.steps * self.step_seconds


@dataclass(frozen=True)
class TimePlan:
    """What is trained in the time that was asked for.

    Attributes:
        minutes: That were asked for.
        stages: By their names in a recipe.
        rest_seconds: For encodings, statistics and pictures.
    """

    minutes: float
    stages: dict[str, PlannedStage]
    rest_seconds: float

    @property
    def second_seconds(self) -> float:
        """Of stage 2, with the encodings and statistics before it."""
        return self.stages[STAGE_2].seconds + self.rest_seconds

    @property
    def total_minutes(self) -> float:
        """Of all together: less where there are too few images for more, more where there is no time for the least."""
        return (self.rest_seconds + sum(stage.seconds for stage in self.stages.values())) / 60

    def table(self) -> str:
        """The plan as a small table."""
        rows = [("stage", "steps x batch", "s a step", "minutes")]
        for name, stage in self.stages.items():
            amounts = f"{stage.step_seconds:.3g}", f"{stage.seconds / 60:.1f}"
            rows.append((TITLES[name], f"{stage.steps} x {stage.batch_size}", *amounts))
        rows.append(("encodings, statistics, pictures", "", "", f"{self.rest_seconds / 60:.1f}"))
        rows.append(("total", "", "", f"{self.total_minutes:.1f}"))
        return "\n".join(f"  {first:<31} {second:>15} {third:>9} {fourth:>8}" for first, second, third, fourth in rows)


def plan_time(minutes: float, measured: Measured, num_images: int, batch_sizes: dict[str, int], encodings: int) -> TimePlan:
    """Steps of both stages that fill `minutes`, from `LEAST_STEPS` to `MOST_EPOCHS` epochs.

    Args:
        minutes: For everything.
        measured: Seconds of its parts.
        num_images: That are trained on, mirrored ones counted.
        batch_sizes: Of each stage, by its name in a recipe.
        encodings: Of every image, before stage 2.
    """
    total, shares = 60 * minutes, sum(SHARES.values())
    rest = max((1 - shares) * total, encodings * num_images * measured.encoding)
    stages = {}
    for name, share in SHARES.items():
        most = max(LEAST_STEPS, MOST_EPOCHS * num_images // batch_sizes[name])
        fitting = int(share / shares * (total - rest) / measured.steps[name])
        steps = min(max(fitting // 10 * 10, LEAST_STEPS), most)
        stages[name] = PlannedStage(steps, batch_sizes[name], measured.steps[name])
    return TimePlan(minutes, stages, rest)


def with_plan(recipe: Recipe, plan: TimePlan, flags: Collection[str] = ()) -> Recipe:
    """The recipe with the steps of a plan, and what follows from them where no `flags` say it.

    Where sigma is untied after stage 1 (`VAEObjectiveOptions.untie_steps`), the steps of the stage are parted as in the recipe.
    """
    changes = {}
    for name, stage in plan.stages.items():
        training, steps = getattr(recipe, name), stage.steps
        untied = getattr(recipe.vae_objective, "untie_steps", 0) if name == "vae_training" else 0
        if untied:
            steps = max(1, stage.steps * training.steps // (training.steps + untied))
            changes["vae_objective"] = dataclasses.replace(recipe.vae_objective, untie_steps=max(1, stage.steps - steps))
        looks = steps // max(1, min(steps // 4, int(LOOK_SECONDS / stage.step_seconds)))
        every = math.ceil(steps / looks)  # the last look is at the end
        planned = {
            "steps": steps,
            "warmup_steps": min(steps // 20, LARGEST_WARMUP),
            "validate_every": every,
            "checkpoint_every": every,
        }
        typed = {field for field in planned if preflight.flag(name, field) in flags}
        changes[name] = dataclasses.replace(training, **{field: planned[field] for field in planned if field not in typed})
    return dataclasses.replace(recipe, **changes)


def fit_to_time(
    recipe: Recipe,
    minutes: float | None,
    folder: Path,
    *,
    flags: Collection[str] = (),
    resume: bool = False,
    device: str | torch.device = "cpu",
    dataset: data.Dataset | data.Foreign | None = None,
) -> tuple[Recipe, TimePlan | None]:
    """The recipe with as many steps as fit into `minutes`, and the plan, logged as a table, or None where nothing is planned.

    Args:
        minutes: For the whole training. None: those of `MINUTES`, if the recipe is there and no steps were typed; otherwise the
            recipe keeps its steps.
        folder: Of the run. What it has begun keeps the steps that it began with: nothing is measured when it is resumed.
        flags: Those that were typed, see `fitting.flags_of`; what they say stays.
        resume, device, dataset: See `run`.

    Raises:
        ValueError: `minutes` is no time, or steps were typed as well; `folder` is resumed and does not say its steps.
        OSError: The images are not there.
    """
    check_minutes(minutes, flags)
    if minutes is None and recipe.name not in MINUTES:
        return recipe, None
    if resume and any(checkpoints.exists(folder / name / "checkpoint") for name in recipe.plan()):
        return as_begun(recipe, folder, flags), None
    if minutes is None and typed_steps(flags):
        return recipe, None
    minutes = MINUTES[recipe.name] if minutes is None else minutes
    images, _ = open_data(recipe, dataset)
    images = data.Mirrored(images) if recipe.data.mirror else images
    logger.info("measuring %d steps of each stage, to plan %g minutes (--minutes)", TIMED_STEPS, minutes)
    batch_sizes = {name: getattr(recipe, name).batch_size for name in SHARES}
    measured = distribution.gather(measure(recipe, images, device))[0]  # all processes follow one plan
    nodes = recipe.diffusion_objective.nodes if isinstance(recipe, MultiBetaRecipe) else 0
    plan = plan_time(minutes, measured, len(images), batch_sizes, nodes + 1)
    planned = with_plan(recipe, plan)
    if nodes and isinstance(planned, MultiBetaRecipe) and not planned.encodes_before(len(images)):  # but each batch, at two nodes
        each = measured.steps | {STAGE_2: measured.steps[STAGE_2] + 2 * batch_sizes[STAGE_2] * measured.encoding}
        plan = plan_time(minutes, Measured(each, measured.encoding), len(images), batch_sizes, 1)
    threads = f"threads: {torch.get_num_threads()}" if torch.device(device).type == "cpu" else device
    logger.info("the plan (%s):\n%s", threads, plan.table())
    if plan.total_minutes > 1.05 * minutes:
        least = f"{LEAST_STEPS} steps a stage are the least that show something"
        logger.warning("%s: %.3g minutes, longer than was asked for", least, plan.total_minutes)
    if plan.total_minutes < 0.9 * minutes:
        logger.info("more than %d epochs of so few images would be learned by heart: that leaves time", MOST_EPOCHS)
    return with_plan(recipe, plan, flags), plan


def typed_steps(flags: Collection[str]) -> list[str]:
    """The `flags` that say steps."""
    return sorted(set(STEP_FLAGS) & set(flags))


def check_minutes(minutes: float | None, flags: Collection[str] = ()) -> None:
    """`ValueError` where `minutes` is no time, or `flags` say steps as well; None is no wish."""
    if minutes is None:
        return
    check_number("minutes", minutes, above=0)
    if typed := typed_steps(flags):
        raise ValueError(f"--minutes {minutes:g} plans the steps of both stages, and {' and '.join(typed)} says some: give one")


def as_begun(recipe: Recipe, folder: Path, flags: Collection[str] = ()) -> Recipe:
    """The recipe with the steps that the run in `folder` began with, but for those that `flags` say.

    Raises:
        ValueError: The folder does not say them.
    """
    begun = recorded_recipe(folder)
    if begun is None:
        if set(STEP_FLAGS[:2]) <= set(flags):
            return recipe
        raise ValueError(f"{folder} does not say how many steps were planned: type {' and '.join(STEP_FLAGS[:2])}")
    changes = {}
    for part, names in (*((stage, PLANNED) for stage in SHARES), ("vae_objective", ("untie_steps",))):
        options, before = getattr(recipe, part), getattr(begun, part)
        kept = {name for name in names if hasattr(options, name) and preflight.flag(part, name) not in flags}
        changes[part] = dataclasses.replace(options, **{name: getattr(before, name) for name in kept})
    resumed = dataclasses.replace(recipe, **changes)
    steps = " and ".join(str(getattr(resumed, stage).steps) for stage in SHARES)
    logger.info("going on to %s steps, as %s began unless %s say others", steps, folder, " and ".join(STEP_FLAGS[:2]))
    return resumed


def measure(recipe: Recipe, images: data.Dataset, device: str | torch.device = "cpu") -> Measured:
    """Seconds of a step of each stage and of an encoding, with fresh networks on `device`; nothing is written.

    Args:
        images: To train on, mirrored ones among them; at least a batch.
    """
    on_cuda = torch.device(device).type == "cuda"
    with processors.fitting_threads(), torch.random.fork_rng([device] if on_cuda else []):
        vae, diffusion = (part.to(device) for part in build(recipe))
        first = _seconds_a_step(Run(recipe.first_objective(vae), images, recipe.vae_training, Path(), None))
        vae.eval().requires_grad_(False)
        if isinstance(diffusion, NonlinearDiffusion):  # any process takes as long
            sigmas = torch.linspace(0.01, 1, len(diffusion.sigmas), device=device)
            sigmas = sigmas.view(-1, *[1] * (diffusion.sigmas.ndim - 1)).expand_as(diffusion.sigmas)
            ones = torch.ones_like(diffusion.latent_mean)
            diffusion.set_process(sigmas, torch.zeros_like(ones), ones, ones)
        second = _seconds_a_step(
            Run(with_encodings(recipe, vae, diffusion, len(images)), images, recipe.diffusion_training, Path(), None)
        )
        count = min(processors.images_at_once(images.resolution, device), len(images))
        batch = data.to_float(data.read_images(images, range(count))).to(device)
        return Measured(
            {"vae_training": first, "diffusion_training": second},
            _seconds_an_encoding(vae, batch, recipe.diffusion_training.precision),
        )


def with_encodings(recipe: Recipe, vae: Any, diffusion: Any, num_images: int) -> Any:
    """The objective of stage 2 as it is where the encodings of all images are at hand."""
    if not isinstance(recipe, MultiBetaRecipe) or not recipe.diffusion_objective.nodes:
        return recipe.second_objective(vae, diffusion)
    ends = len(table_nodes(recipe.vae.num_steps, recipe.diffusion_objective.nodes))
    table = torch.zeros(1, 1, *recipe.vae.latent_shape, dtype=torch.float16).expand(num_images, ends, -1, -1, -1)
    return recipe.second_objective(vae, diffusion, table=table)


def _seconds_a_step(run: Run) -> float:
    """Mean seconds of an update, after the first few, which compile and measure kernels; fewer are timed where they are slow."""
    run.module.train()
    with run.advice_on_memory():
        for _ in range(WARM_STEPS):
            run.advance()  # its loss is read, so the device is waited for
        began, done, seconds = time.perf_counter(), 0, 0.0
        while done < TIMED_STEPS and not distribution.anywhere(done >= 2 and seconds >= TIMED_SECONDS)[0]:
            run.advance()
            done, seconds = done + 1, time.perf_counter() - began
    return seconds / done


@torch.no_grad()
def _seconds_an_encoding(vae: nn.Module, images: torch.Tensor, precision: str) -> float:
    """Seconds of the encoding of each of a batch of images, (N, C, H, W)."""
    assert isinstance(vae, MultiBetaVAE | CapacityVAE)
    encode = vae.encode
    beta = (0.5,) if isinstance(vae, MultiBetaVAE) else ()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        float(encode(images, *beta).sum())
        began = time.perf_counter()
        float(encode(images, *beta).sum())  # which waits for the device
    return (time.perf_counter() - began) / len(images)
