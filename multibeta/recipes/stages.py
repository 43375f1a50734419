"""The two stages of a recipe: a VAE, then a diffusion model of what the frozen VAE makes, saved together."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multibeta import checkpoints, data
from multibeta.diffusion_vae import CapacityVAE, ConditionalDiffusion
from multibeta.files import occupy
from multibeta.multibeta_vae import MultiBetaVAE, fold_principal_axes, untie_sigma
from multibeta.nonlinear_diffusion import NonlinearDiffusion, process_statistics
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, Pipeline
from multibeta.pipelines.spectrum import SPECTRUM_IMAGES
from multibeta.recipes import pictures, preflight
from multibeta.recipes.presets import changes
from multibeta.recipes.recipe import DiffusionVAERecipe, MultiBetaRecipe, Recipe, build, located, to_dict
from multibeta.saving import unwrapped
from multibeta.training import train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stages:
    """The training of a recipe, on the images and in the folder of one run. A subclass says what is particular to a system.

    Attributes:
        resume: Continue whichever stage was interrupted.
    """

    recipe: Any
    train_images: data.Dataset
    test_images: data.Dataset
    folder: Path
    resume: bool = False
    device: str | torch.device = "cpu"
    progress: bool = True

    def train_vae(self) -> nn.Module:
        """Stage 1: the VAE, frozen."""
        vae = build(self.recipe)[0].to(self.device)
        self._train("vae", "stage 1, VAE", self.recipe.first_objective(vae), self._draws_vae(vae, "vae"), resume=self.resume)
        return self.finish(vae)

    def train_diffusion(self, vae: nn.Module, command: str | None = None) -> Pipeline:
        """Stage 2: the diffusion model of what a frozen `vae` makes, and the trained model, which is saved."""
        diffusion = build(self.recipe)[1].to(self.device)
        model = self.join(vae, diffusion, origin(self.recipe, command, self.train_images, self.test_images))
        diffusion.requires_grad_(True)
        self._train(
            "diffusion",
            "stage 2, diffusion",
            self.recipe.second_objective(vae, diffusion),
            lambda step, _: self.draw_model(model, self.folder / "diffusion" / f"samples-{step:06d}.png"),
            resume=self._resumes("diffusion"),
        )
        model.save_pretrained(self.folder / "model")
        logger.info("saved the model in %s", self.folder / "model")
        self.measure(model)
        return model

    def finish(self, vae: nn.Module) -> nn.Module:
        """The VAE as stage 2 sees it, after its training."""
        return vae

    def join(self, vae: nn.Module, diffusion: nn.Module, info: dict[str, Any]) -> Pipeline:
        """The model of both parts, ready for stage 2."""
        raise NotImplementedError

    def measure(self, model: Pipeline) -> None:
        """Add to a saved model what is measured of it."""

    def draw_vae(self, vae: nn.Module, path: Path) -> None:
        """A picture of what the VAE makes of images."""
        raise NotImplementedError

    def draw_model(self, model: Pipeline, path: Path) -> None:
        """A picture of what the model makes."""
        raise NotImplementedError

    @functools.cached_property
    def shown(self) -> Tensor:
        """Images for the pictures along the way, (N, C, H, W) in [-1, 1]."""
        return pictures.shown_images(self.train_images, self.test_images)

    def _draws_vae(self, vae: nn.Module, name: str) -> Callable[[int, Any], None]:
        return lambda step, _: self.draw_vae(vae, self.folder / name / f"reconstructions-{step:06d}.png")

    def _resumes(self, name: str) -> bool:
        return self.resume and checkpoints.exists(self.folder / name / "checkpoint")  # it may have stopped before

    def _train(
        self, name: str, description: str, objective: Any, on_validate: Callable[[int, Any], None], *, resume: bool
    ) -> None:
        """Train the module of an objective by the plan of that name, and leave it averaged and frozen."""
        options, context = self.recipe.plan()[name]
        state = train(
            objective,
            self.train_images,
            options,
            self.folder / name,
            validation=self.test_images if len(self.test_images) else None,
            resume=resume,
            on_validate=on_validate,
            progress=self.progress,
            description=description,
            context=context,
        )
        unwrapped(objective.module).load_state_dict(state)
        objective.module.eval().requires_grad_(False)


class MultiBetaStages(Stages):
    """The first system: the VAE is folded and untied as the recipe says, and the process is measured on it."""

    recipe: MultiBetaRecipe

    def finish(self, vae: MultiBetaVAE) -> MultiBetaVAE:
        options = self.recipe.vae_objective
        if options.fold:
            fold_principal_axes(vae, self._encode_all(vae)(self.statistics_images(), 0.5))
        if options.untie_steps:
            vae, name = untie_sigma(vae).to(self.device), "vae-untied"
            objective = self.recipe.first_objective(vae, anneal=0.0)
            self._train(name, "stage 1, sigma per channel", objective, self._draws_vae(vae, name), resume=self._resumes(name))
        return vae

    def join(self, vae: MultiBetaVAE, diffusion: NonlinearDiffusion, info: dict[str, Any]) -> DenoisingMultiBetaVAE:
        config = self.recipe.vae
        statistics = process_statistics(self._encode_all(vae), self.statistics_images(), config.num_steps, config.schedule)
        diffusion.set_process(vae.sigmas(), *statistics)
        return DenoisingMultiBetaVAE(vae, diffusion, info)

    def measure(self, model: Pipeline) -> None:
        """What each beta keeps of held-out images, or where there are none of training images."""
        assert isinstance(model, DenoisingMultiBetaVAE)
        dataset = self.test_images if len(self.test_images) else self.train_images
        images = data.to_float(dataset.images(range(min(SPECTRUM_IMAGES, len(dataset)))))
        model.measure_spectrum(images, progress=self.progress)
        model.save_info(self.folder / "model")
        logger.info(
            "edits keep what an image is up to beta %g: see multibeta spectrum %s", model.auto_beta, self.folder / "model"
        )

    def statistics_images(self) -> Tensor:
        """The training images that the fold and the process are measured on, (N, C, H, W) in [-1, 1]."""
        count = min(self.recipe.diffusion_objective.statistics_images, len(self.train_images))
        return data.to_float(self.train_images.images(range(count)))

    def draw_vae(self, vae: MultiBetaVAE, path: Path) -> None:
        pictures.save_reconstructions(vae, self.shown, path)

    def draw_model(self, model: DenoisingMultiBetaVAE, path: Path) -> None:
        pictures.save_samples(model, path)

    def _encode_all(self, vae: MultiBetaVAE) -> Callable[[Tensor, float], Tensor]:
        """`vae.encode` of many images, batch by batch, without gradients, in float32, on the CPU side again."""

        @torch.no_grad()
        def encode_all(images: Tensor, beta: float) -> Tensor:
            return torch.cat([vae.encode(batch.to(self.device), beta).float().cpu() for batch in images.split(256)])

        return encode_all


class DiffusionVAEStages(Stages):
    """The second system: new latents come from a mixture, where the recipe asks for one."""

    recipe: DiffusionVAERecipe

    def join(self, vae: CapacityVAE, diffusion: ConditionalDiffusion, info: dict[str, Any]) -> DiffusionVAE:
        model = DiffusionVAE(vae, diffusion, info)
        if components := self.recipe.diffusion_objective.mixture_components:
            model.fit_latents(self.train_images, components, progress=self.progress)
        return model

    def draw_vae(self, vae: CapacityVAE, path: Path) -> None:
        pictures.save_sketches(vae, self.shown, path)

    def draw_model(self, model: DiffusionVAE, path: Path) -> None:
        pictures.save_refinements(model, self.shown, path)


STAGES: dict[type[Recipe], type[Stages]] = {MultiBetaRecipe: MultiBetaStages, DiffusionVAERecipe: DiffusionVAEStages}


def train_vae(
    recipe: Recipe, train_images: data.Dataset, test_images: data.Dataset, folder: str | Path, **options: Any
) -> nn.Module:
    """Stage 1 alone: the VAE of a recipe, frozen; `options` are resume, device and progress of `run`."""
    return STAGES[type(recipe)](recipe, train_images, test_images, Path(folder), **options).train_vae()


def train_diffusion(
    recipe: Recipe, vae: nn.Module, train_images: data.Dataset, test_images: data.Dataset, folder: str | Path, **options: Any
) -> Pipeline:
    """Stage 2 alone: the diffusion model of what a frozen `vae` makes, saved together; `options` as of `train_vae`."""
    return STAGES[type(recipe)](recipe, train_images, test_images, Path(folder), **options).train_diffusion(vae)


def run(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
    command: str | None = None,
) -> Pipeline:
    """Train both stages of a recipe.

    `folder` receives vae/ and diffusion/ (checkpoint, metrics.jsonl, image grids along the way) and model/, the result as
    `Pipeline.save_pretrained` writes it. `resume` continues whichever stage was interrupted. See `preflight.prepare` for what is
    checked before the first begins.
    """
    folder, recipe = Path(folder), located(recipe)
    with occupy(folder, "training in"):
        images = preflight.prepare(recipe, folder, resume=resume, device=device)
        stages = STAGES[type(recipe)](recipe, *images, folder, resume=resume, device=device, progress=progress)
        return stages.train_diffusion(stages.train_vae(), command)


def origin(recipe: Recipe, command: str | None, train_images: data.Dataset, test_images: data.Dataset) -> dict[str, Any]:
    """What a model records of its training: `Pipeline.info`."""
    images = {
        "training": len(train_images),
        "held_out": len(test_images),
        "fingerprint": data.fingerprint_of(train_images),
    }
    folder = {"command": command, "working_folder": str(Path.cwd())}
    return {"recipe": to_dict(recipe), "changes": changes(recipe), "images": images, **folder}
