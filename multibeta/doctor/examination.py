"""A run, or a model, examined."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from multibeta import checkpoints, data, recipes
from multibeta.data.map_style import HANDED_OVER
from multibeta.doctor.finding import WIDTH, Finding
from multibeta.doctor.logs import Log, read_logs
from multibeta.doctor.measured import MEASURED_IMAGES, Measured, measure
from multibeta.doctor.of_logs import OF_LOGS
from multibeta.doctor.of_models import OF_MODELS
from multibeta.evaluation import of_recorded_data, recorded_recipe, recorded_training, source_of
from multibeta.multibeta_vae import MultiBetaVAE, untie_sigma
from multibeta.nonlinear_diffusion import NonlinearDiffusion
from multibeta.pipelines import DenoisingMultiBetaVAE, Pipeline, load_pretrained, resolve_pretrained
from multibeta.pipelines.inputs import image_options
from multibeta.recipes.recipe import MultiBetaRecipe, Recipe, split_counts
from multibeta.recipes.recipe import recorded_recipe as recipe_of_run
from multibeta.training.shards import load as load_checkpoint


@dataclass(frozen=True)
class Examination:
    """What was found wrong, and the numbers that it was judged by.

    Attributes:
        findings: None where all is well; those of stage 1 first.
        logs: Of the trainings of the run, as far as there are any.
        measured: None of a run whose model cannot be measured.
        notes: What is left to do, and what could not be examined, in sentences.
    """

    findings: list[Finding]
    logs: list[Log]
    measured: Measured | None
    notes: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def __str__(self) -> str:
        said = [str(finding) for finding in self.findings] or ["nothing is wrong so far" if self.notes else "nothing is wrong"]
        return "\n\n".join([*(textwrap.fill(note, WIDTH) for note in self.notes), *said, "\n".join(self.vitals())])

    def vitals(self) -> list[str]:
        """The few numbers that a person would want to see, a line each."""
        lines = []
        if (model := self.measured) is not None:
            share = f"{model.mse / model.variance:.1%} of the variance"
            lines.append(f"{'reconstruction':16}mean squared error {model.mse:.3g}, {share}")
            if model.facts:
                value = {key: fact["value"] for key, fact in model.facts.items()}
                lines.append(f"{'sigma':16}{value['sigma_zero']:.3g} at beta 0, {value['sigma_one']:.3g} at 1")
                deviations = f"{value['deviation_zero']:.3g} at beta 0, {value['deviation_one']:.3g} at 1"
                lines.append(f"{'f(x, beta)':16}deviates by {deviations}, as much as its noise at {model.equal_beta:.2f}")
            if model.heads:
                fits = f"{model.mean_fit('noise_r2'):.0%} of the noise, {model.mean_fit('velocity_r2'):.0%} of the velocity"
                lines.append(f"{'heads':16}explain {fits}")
        return [*lines, *map(vital_of, self.logs)]


def vital_of(log: Log) -> str:
    """A training in one line."""
    words = [f"{log.logged_step} of {log.last_step} steps" if log.options else f"{log.logged_step} steps"]
    for name, said in (("loss", "loss"), ("validation/loss", "held-out loss"), ("images_per_second", "images a second")):
        values = log.series(name)[1]
        words += [f"{said} {values[-1]:.4g}"] if len(values) else []
    return f"{log.name:16}{', '.join(words)}"


def examine(
    run: str | Path,
    images: data.Dataset | str | None = None,
    *,
    num_images: int = MEASURED_IMAGES,
    upscale: bool = False,
    device: str | torch.device = "cpu",
) -> Examination:
    """Examine a run or a model: the logs of its trainings, and what its model does with held-out images.

    Args:
        run: Folder of a run, finished or not, of a model, or the name of a shipped model.
        images: To measure on, a dataset or a source; by default those that the recipe of the run held out, or if there are none
            those that it was trained on. Where these were handed over in Python, the logs alone are read.
        num_images: At most as many of them.
        upscale: Accept images of a source that are smaller than the model's.

    Raises:
        FileNotFoundError: There is neither a log nor a model; or the recorded images are not there any more.
        ValueError: What is there is damaged.
    """
    run = Path(run)
    recipe = recipe_of_run(run) if run.is_dir() else None
    model, second_stage = None, True
    if recipe is None or checkpoints.exists(run / "model"):
        folder = resolve_pretrained(run)
        run = folder.parent if folder.name == "model" else run
        if checkpoints.exists(folder):
            model = load_pretrained(folder, device=device)
    before = model
    if isinstance(recipe, MultiBetaRecipe) and checkpoints.exists(run / "vae" / "checkpoint") and is_of_before(model, run):
        model, second_stage = in_training(run, recipe).to(device), False
    logs = read_logs(run, recipe or recipe_of_run(run))
    if model is None and not logs:
        raise FileNotFoundError(f"{run} holds neither a model nor the log of a training (metrics.jsonl)")
    findings = [finding for log in logs for diagnose in OF_LOGS if (finding := diagnose(log)) is not None]
    notes, measured = left_to_do(logs), None
    if before is not model and before is not None:
        notes.append(f"{run / 'model'} is of before stage 1 went on: the VAE of its last checkpoint is measured")
    if recipe is not None and (before is not model or before is None) and all(log.finished for log in logs):
        notes += [f"{name} has not begun: --resume goes on" for name in recipe.plan() if name not in {log.name for log in logs}]
    if model is not None and images is None and logs and handed_over(model):
        notes.append(
            f"its logs alone are read: the model is of a {handed_over(model)}, which only Python has; --data names images"
        )
    elif model is not None:
        dataset, chosen = held_out(model, recipe) if images is None else named(model, images, upscale)
        shown = data.to_float(dataset.images(chosen[:num_images]))
        followed = next((log.followed for log in logs if log.name == "vae"), ("diffusion",))
        measured = measure(model, shown, second_stage=second_stage, followed=followed)
        findings += [finding for diagnose in OF_MODELS if (finding := diagnose(measured)) is not None]
    return Examination(worth_saying(findings, logs), logs, measured, notes)


def left_to_do(logs: list[Log]) -> list[str]:
    """Words on the trainings that were interrupted."""
    return [
        f"{log.name}: {log.checkpoint} of {log.last_step} steps are done: --resume goes on"
        for log in logs
        if not log.finished and log.checkpoint is not None
    ]


def worth_saying(findings: list[Finding], logs: list[Log]) -> list[Finding]:
    """The findings, those of stage 1 first, without those that the steps that are still to come may mend.

    Too few steps are no finding of a training that is not finished, nor of what follows where stage 1 had too few itself.
    """
    first = ["vae", "vae-untied"]
    order = list(dict.fromkeys([*first, "diffusion", *(log.name for log in logs)]))
    going_on = {log.name for log in logs if not log.finished}
    going_on |= {"vae"} if going_on & set(first) else set()
    kept = [finding for finding in findings if not (finding.undertrained and finding.where in going_on)]
    if any(finding.undertrained and finding.where in first for finding in kept):
        kept = [finding for finding in kept if not finding.undertrained or finding.where in first]
    return sorted(kept, key=lambda finding: order.index(finding.where))


def handed_over(model: Pipeline) -> str | None:
    """What a model records of images that were handed over in Python, which no name opens again; None of others."""
    source = recorded_training(model)["trained_on"]
    return source if source is not None and source.startswith(HANDED_OVER) else None


def held_out(model: Pipeline, recipe: Recipe | None) -> tuple[data.Dataset, Tensor]:
    """The images of a model's recipe, and which of them it held out, or where it held none out trained on, int64 (N,)."""
    source = source_of(model, None, "--data")
    with of_recorded_data(source, None, "--data"):
        if recipe is None:
            recorded = recorded_recipe(model)
            if "vae" not in recorded:
                raise ValueError("it records no recipe")
            recipe = recipes.from_dict(recorded)
        images = recipes.open_images(recipe)
        training, others = data.split_indices(len(images), *split_counts(recipe, len(images)), recipe.data.seed)
        return images, others if len(others) else training


def named(model: Pipeline, images: data.Dataset | str, upscale: bool) -> tuple[data.Dataset, Tensor]:
    """A dataset or what a source names, and all of its images in random order, int64 (N,): neighbours may be alike."""
    if isinstance(images, str):
        images = data.open_dataset(images, **image_options(model), upscale=upscale)
    return images, data.split_indices(len(images), len(images), 0)[0]


def is_of_before(model: Pipeline | None, run: Path) -> bool:
    """Whether stage 1 of a run is further than that of its model, or there is none."""
    steps = None if model is None else recorded_recipe(model).get("vae_training", {}).get("steps")
    done = checkpoints.load_config(run / "vae" / "checkpoint").get("step", 0)
    return model is None or (steps is not None and done > steps)


def in_training(run: Path, recipe: MultiBetaRecipe) -> DenoisingMultiBetaVAE:
    """The model of a run that is not finished: the averaged VAE of its last checkpoint, and a stage 2 that knows nothing."""
    vae, diffusion = recipes.build(recipe)
    assert isinstance(vae, MultiBetaVAE) and isinstance(diffusion, NonlinearDiffusion)
    name = "vae"
    if checkpoints.exists(run / "vae-untied" / "checkpoint"):
        vae, name = untie_sigma(vae), "vae-untied"
    checkpoint = run / name / "checkpoint"
    checkpoints.load_state(vae, load_checkpoint(checkpoint, {})[0]["ema"], checkpoint / "ema.safetensors")
    statistics = {key: getattr(diffusion, key) for key in ("latent_mean", "latent_deviation", "velocity_rms")}
    diffusion.set_process(vae.sigmas(), **statistics)
    return DenoisingMultiBetaVAE(vae, diffusion, {"recipe": recipes.to_dict(recipe)})
