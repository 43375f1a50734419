"""What the experiments train: one budget for every method, and models that are trained once and kept."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from multibeta import baselines, checkpoints, data, recipes
from multibeta.metrics.checks import as_integer
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.networks import AutoencoderConfig
from multibeta.pipelines import BaselineVAE, DenoisingMultiBetaVAE, DiffusionVAE
from multibeta.saving import unwrapped
from multibeta.seeds import as_short_seed
from multibeta.training import train

SEPARATE_BETAS = (1, 2, 4, 8, 16)  # of the beta-VAEs that are trained one by one


@dataclass(frozen=True)
class Study:
    """What is trained and measured, the same for every method."""

    source: str = "scenes"  # Images with known factors (table1: attributes), as for `train`.
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 2000  # Of training, for each model.
    batch_size: int = 32
    learning_rate: float = 2e-3
    diffusion_steps: int = 1000  # Of stage 2, where an experiment needs it.
    num_train: int = 20000  # Images to train on.
    num_images: int = 2000  # Held-out images that beta and the axes are chosen on; on as many others the numbers are reported.
    dci_train: int = 1000  # Of those others, how many the trees of DCI learn from.
    dci_test: int = 500
    disco_steps: int = 400  # Published: 70000.
    disco_width: int = 16  # Of the contrastor. Published: 64.
    networks: str | None = None  # Of latent_diffusion: the recipe of the first system that it trains, by default photos32.
    vae: str | None = None  # Of latent_diffusion: a trained MODEL, whose VAE, recipe and split of the images it takes.

    def __post_init__(self) -> None:
        if len(self.seeds) == 0:
            raise ValueError("name at least one seed")
        for seed in self.seeds:
            as_short_seed(seed)
        for field in dataclasses.fields(self):
            if field.name not in ("source", "seeds", "learning_rate", "networks", "vae"):
                as_integer(getattr(self, field.name), field.name, 1)
        self.recipe(self.seeds[0])  # has its own word on the learning rate

    def recipe(self, seed: int, *, fold: bool = False, untie: bool = False) -> recipes.MultiBetaRecipe:
        """The recipe `networks`, or `scenes64-isotropic`, with the budget of this study; `untie` as in `scenes64`."""
        preset = recipes.find(self.networks or "scenes64-isotropic")
        if not isinstance(preset, recipes.MultiBetaRecipe):
            raise ValueError(f"networks must be a recipe of the first system, got {self.networks!r} of a {preset.model.__name__}")
        training = {"steps": self.steps, "batch_size": self.batch_size, "learning_rate": self.learning_rate, "seed": seed}
        recipe = dataclasses.replace(
            preset,
            data=dataclasses.replace(preset.data, source=self.source, num_train=self.num_train, num_test=2 * self.num_images),
            vae_training=dataclasses.replace(preset.vae_training, **training),
            vae_objective=dataclasses.replace(preset.vae_objective, fold=fold, untie_steps=0),
            diffusion_training=dataclasses.replace(preset.diffusion_training, steps=self.diffusion_steps, seed=seed),
        )
        return recipes.untied(recipe, recipe.name) if untie else recipe


Objective = Callable[[baselines.VAE, int], baselines.BetaVAEObjective]  # of the VAE and the size of its training set
BASELINES: dict[str, Objective] = {
    **{f"beta-vae-{beta}": lambda vae, _, beta=beta: baselines.BetaVAEObjective(vae, beta) for beta in SEPARATE_BETAS},
    "annealed-vae": lambda vae, _: baselines.AnnealedVAEObjective(vae),
    "beta-tcvae": lambda vae, size: baselines.BetaTCVAEObjective(vae, size),
    "factor-vae": lambda vae, _: baselines.FactorVAEObjective(vae),
    "info-vae": lambda vae, _: baselines.InfoVAEObjective(vae),
}
MULTI_BETA, FOLDED, UNTIED = "multi-beta", "multi-beta-folded", "multi-beta-untied"
DIFFUSION_VAE, DDPM = "diffusion-vae", "ddpm"


def train_baseline(
    method: str, recipe: recipes.MultiBetaRecipe, train_set: data.Subset, folder: Path, progress: bool = True
) -> baselines.VAE:
    """One method of `BASELINES`, trained like the VAE of `recipe`, frozen; goes on where an earlier call stopped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.vae_training.seed)
        names = [field.name for field in dataclasses.fields(AutoencoderConfig)]
        vae = baselines.VAE(AutoencoderConfig(**{name: getattr(recipe.vae, name) for name in names}))
        objective = BASELINES[method](vae, len(train_set))
    context = {"method": method, "data": dataclasses.asdict(recipe.data), "vae": dataclasses.asdict(recipe.vae)}
    options = {"resume": started(folder), "progress": progress, "description": method, "context": context}
    unwrapped(objective.module).load_state_dict(train(objective, train_set, recipe.vae_training, folder, **options))
    pipeline = BaselineVAE(vae, {"method": method, "recipe": {"data": context["data"]}})
    pipeline.save_pretrained(folder / "model")
    return pipeline.vae


@functools.lru_cache(maxsize=1)
def study_images(study: Study) -> tuple[data.Subset, data.Subset]:
    """(train, test) images of a study: the same for every method and seed."""
    return recipes.open_data(study.recipe(0))


def started(folder: Path) -> bool:
    """Whether a training left a checkpoint in `folder`."""
    return checkpoints.exists(folder / "checkpoint")


def trained_vae(method: str, study: Study, seed: int, folder: Path, progress: bool = True) -> baselines.VAE | MultiBetaVAE:
    """The VAE of a method of the study, frozen; trained first where `folder` does not hold it."""
    recipe = study.recipe(seed, fold=method == FOLDED, untie=method == UNTIED)
    train_set, test_set = study_images(study)
    if method in BASELINES:
        return train_baseline(method, recipe, train_set, folder / method, progress)
    if method == FOLDED and not started(folder / FOLDED / "vae"):  # the same weights, rotated
        trained_vae(MULTI_BETA, study, seed, folder, progress)
        shutil.copytree(folder / MULTI_BETA / "vae", folder / FOLDED / "vae", dirs_exist_ok=True)
    resume = started(folder / method / "vae")
    vae = recipes.train_vae(recipe, train_set, test_set, folder / method, resume=resume, progress=progress)
    assert isinstance(vae, MultiBetaVAE)
    return vae


def trained_multi_beta(method: str, study: Study, seed: int, folder: Path, progress: bool = True) -> DenoisingMultiBetaVAE:
    """Both stages of `FOLDED` or `UNTIED`; trained first where `folder` does not hold them."""
    place = folder / method
    if not checkpoints.exists(place / "model"):
        vae = trained_vae(method, study, seed, folder, progress)
        recipe = study.recipe(seed, fold=method == FOLDED, untie=method == UNTIED)
        resume = started(place / "diffusion")
        model = recipes.train_diffusion(recipe, vae, *study_images(study), place, resume=resume, progress=progress)
        assert isinstance(model, DenoisingMultiBetaVAE)
        return model
    return DenoisingMultiBetaVAE.from_pretrained(place / "model")


def diffusion_vae_recipe(study: Study, seed: int, conditional: bool = True) -> recipes.DiffusionVAERecipe:
    """The recipe `diffusion-vae-scenes32` with the budget of a study; the learning rates stay its own."""
    preset = recipes.find("diffusion-vae-scenes32")
    assert isinstance(preset, recipes.DiffusionVAERecipe)
    alone = {"conditional": False, "form": "form1"}  # nothing but the image for a process to be centred on
    training = {"batch_size": study.batch_size, "seed": seed}
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, source=study.source, num_train=study.num_train, num_test=2 * study.num_images),
        vae_training=dataclasses.replace(preset.vae_training, steps=study.steps, **training),
        diffusion=preset.diffusion if conditional else dataclasses.replace(preset.diffusion, **alone),
        diffusion_training=dataclasses.replace(preset.diffusion_training, steps=study.diffusion_steps, **training),
    )


def trained_diffusion_vae(study: Study, seed: int, folder: Path, conditional: bool = True, progress: bool = True) -> DiffusionVAE:
    """A `DiffusionVAE`, or with `conditional` False its VAE and a DDPM; trained first where `folder` does not hold it."""
    place, first = folder / (DIFFUSION_VAE if conditional else DDPM), folder / DIFFUSION_VAE
    if checkpoints.exists(place / "model"):
        return DiffusionVAE.from_pretrained(place / "model")
    recipe = diffusion_vae_recipe(study, seed, conditional)
    images = recipes.open_data(recipe)
    vae = recipes.train_vae(recipe, *images, first, resume=started(first / "vae"), progress=progress)
    model = recipes.train_diffusion(recipe, vae, *images, place, resume=started(place / "diffusion"), progress=progress)
    assert isinstance(model, DiffusionVAE)
    return model
