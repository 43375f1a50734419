"""What the experiments compare: one budget for every method, the trained models, and the codes they make of images."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from multibeta import baselines, checkpoints, data, disco, recipes
from multibeta.files import read_arrays, write_atomically
from multibeta.metrics import dci_from_codes, information_gap, mig_from_codes
from multibeta.metrics.checks import as_integer
from multibeta.metrics.disentanglement import encode_images
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.networks import AutoencoderConfig
from multibeta.pipelines import BaselineVAE, DenoisingMultiBetaVAE, DiffusionVAE
from multibeta.saving import unwrapped
from multibeta.schedules import spatial
from multibeta.seeds import as_short_seed
from multibeta.training import TrainingOptions, train

logger = logging.getLogger(__name__)

SWEEP = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # beta of the multi-beta VAE
SEPARATE_BETAS = (1, 2, 4, 8, 16)  # of the beta-VAEs that are trained one by one
FOLD_BETA = 0.5


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

    def __post_init__(self):
        if len(self.seeds) == 0:
            raise ValueError("name at least one seed")
        for seed in self.seeds:
            as_short_seed(seed)
        for field in dataclasses.fields(self):
            if field.name not in ("source", "seeds", "learning_rate"):
                as_integer(getattr(self, field.name), field.name, 1)
        self.recipe(self.seeds[0])  # has its own word on the learning rate

    def recipe(self, seed: int, *, fold: bool = False, untie: bool = False) -> recipes.Recipe:
        """The recipe `scenes64-isotropic` with the budget of this study; `untie` as in `scenes64`."""
        preset = recipes.find("scenes64-isotropic")
        training = {"steps": self.steps, "batch_size": self.batch_size, "learning_rate": self.learning_rate, "seed": seed}
        recipe = dataclasses.replace(
            preset,
            data=dataclasses.replace(preset.data, source=self.source, num_train=self.num_train, num_test=2 * self.num_images),
            vae_training=dataclasses.replace(preset.vae_training, **training),
            vae_objective=dataclasses.replace(preset.vae_objective, fold=fold),
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
REFINED, UNREFINED = "diffusion-vae", "ddpm"


def train_baseline(method: str, recipe: recipes.Recipe, train_set, folder: Path, progress: bool = True) -> baselines.VAE:
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
def open_data(study: Study) -> tuple[data.Subset, data.Subset]:
    """(train, test) images of a study: the same for every method and seed."""
    return recipes.open_data(study.recipe(0))


def started(folder: Path) -> bool:
    """Whether a training left a checkpoint in `folder`."""
    return checkpoints.exists(folder / "checkpoint")


def trained(method: str, study: Study, seed: int, folder: Path, progress: bool = True) -> nn.Module:
    """A method of the study, frozen: a `baselines.VAE` or a `MultiBetaVAE`; trained first where `folder` does not hold it."""
    recipe = study.recipe(seed, fold=method == FOLDED, untie=method == UNTIED)
    train_set, test_set = open_data(study)
    if method in BASELINES:
        return train_baseline(method, recipe, train_set, folder / method, progress)
    if method == FOLDED and not started(folder / FOLDED / "vae"):  # the same weights, rotated
        trained(MULTI_BETA, study, seed, folder, progress)
        shutil.copytree(folder / MULTI_BETA / "vae", folder / FOLDED / "vae", dirs_exist_ok=True)
    resume = started(folder / method / "vae")
    return recipes.train_vae(recipe, train_set, test_set, folder / method, resume=resume, progress=progress)


def denoising_model(method: str, study: Study, seed: int, folder: Path, progress: bool = True) -> DenoisingMultiBetaVAE:
    """Both stages of `FOLDED` or `UNTIED`; trained first where `folder` does not hold them."""
    place = folder / method
    if not checkpoints.exists(place / "model"):
        vae = trained(method, study, seed, folder, progress)
        recipe = study.recipe(seed, fold=method == FOLDED, untie=method == UNTIED)
        return recipes.train_diffusion(
            recipe, vae, *open_data(study), place, resume=started(place / "diffusion"), progress=progress
        )
    return DenoisingMultiBetaVAE.from_pretrained(place / "model")


def refiner_recipe(study: Study, seed: int, conditional: bool = True) -> recipes.Recipe:
    """The recipe `diffusion-vae-scenes32` with the budget of a study; the learning rates stay its own."""
    preset = recipes.find("diffusion-vae-scenes32")
    alone = {"conditional": False, "form": "form1"}  # nothing but the image for a process to be centred on
    training = {"batch_size": study.batch_size, "seed": seed}
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, source=study.source, num_train=study.num_train, num_test=2 * study.num_images),
        vae_training=dataclasses.replace(preset.vae_training, steps=study.steps, **training),
        diffusion=preset.diffusion if conditional else dataclasses.replace(preset.diffusion, **alone),
        diffusion_training=dataclasses.replace(preset.diffusion_training, steps=study.diffusion_steps, **training),
    )


def refiner(study: Study, seed: int, folder: Path, conditional: bool = True, progress: bool = True) -> DiffusionVAE:
    """The second system, or with `conditional` False a DDPM beside its VAE; trained first where `folder` does not hold it."""
    place, first = folder / (REFINED if conditional else UNREFINED), folder / REFINED
    if checkpoints.exists(place / "model"):
        return DiffusionVAE.from_pretrained(place / "model")
    recipe = refiner_recipe(study, seed, conditional)
    images = recipes.open_data(recipe)
    vae = recipes.train_capacity_vae(recipe, *images, first, resume=started(first / "vae"), progress=progress)
    return recipes.train_refiner(recipe, vae, *images, place, resume=started(place / "diffusion"), progress=progress)


def codes_of(method: str, study: Study, seed: int, folder: Path, progress: bool = True) -> dict[str, np.ndarray]:
    """What one method makes of 2 num_images held-out images: `betas` (B,), `codes` (B, 2 num_images, K).

    `factors` and `attributes` of the images lie beside them, where they are known. All is kept in `folder`, so that a repeated
    call only reads it.
    """
    path = folder / method / "codes.npz"
    if not path.exists():
        vae = trained(method, study, seed, folder, progress)
        multi = isinstance(vae, MultiBetaVAE)
        _, test_set = open_data(study)
        indices = np.arange(2 * study.num_images)
        betas = SWEEP if multi else (0.0,)
        encoders = [(lambda x, b=beta: vae.encode(x, b)) if multi else vae.encode for beta in betas]
        codes = [encode_images(encode, test_set, indices, 250, progress=progress)[0] for encode in encoders]
        arrays = {"betas": np.array(betas), "codes": np.stack(codes)}
        arrays |= {name: getattr(test_set, name)(indices).numpy() for name, known in data.KNOWS.items() if known(test_set)}
        write_atomically(path, lambda file: np.savez(file, **arrays))
    return read_arrays(path)


AXES = ("trained", "random", "pca", "ica")


@dataclass(frozen=True)
class Basis:
    """A linear change of the axes that codes are read in: (codes - mean) @ matrix."""

    mean: np.ndarray
    matrix: np.ndarray

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """Codes (N, K) in this basis, (N, M)."""
        return (codes - self.mean) @ self.matrix


def bases(codes: np.ndarray, seed: int) -> dict[str, Basis]:
    """The four sets of axes that a representation is scored in, fitted on codes (N, K).

    "trained": as they are; "random": a random rotation, the control; "pca": principal axes, which `fold_principal_axes` puts
    into the weights; "ica": independent components (FastICA) of the principal components that hold at least a hundredth of the
    variance of the first.
    """
    from sklearn.decomposition import PCA, FastICA

    seed, mean, size = as_short_seed(seed), codes.mean(0), codes.shape[1]
    rotation, _ = np.linalg.qr(np.random.RandomState(seed).randn(size, size))
    principal = PCA().fit(codes)
    strong = principal.explained_variance_ >= 0.01 * principal.explained_variance_[0]
    axes = principal.components_[strong].T
    independent = FastICA(whiten="unit-variance", random_state=seed, max_iter=2000, tol=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        independent.fit((codes - mean) @ axes)
    if caught:
        logger.info("independent components: %s", caught[0].message)
    return {
        "trained": Basis(mean, np.eye(size)),
        "random": Basis(mean, rotation),
        "pca": Basis(mean, principal.components_.T),
        "ica": Basis(mean, axes @ independent.components_.T),
    }


@dataclass(frozen=True)
class Representation:
    """Codes (2 n, K) of one method at one beta, the bases they are read in, and what is known of the images.

    `labels`: "factors" (2 n, F) and "attributes" (2 n, A), where the data has them.
    """

    method: str
    beta: float
    seed: int
    axes: dict[str, Basis]
    codes: np.ndarray
    labels: dict[str, np.ndarray]

    def half(self, axes: str, which: int, kind: str = "factors") -> tuple[np.ndarray, np.ndarray]:
        """Codes in a basis, and labels: of the half that chooses (0) or of the half that reports (1)."""
        middle = len(self.codes) // 2
        part = slice(0, middle) if which == 0 else slice(middle, None)
        return self.axes[axes](self.codes[part]), self.labels[kind][part]

    def score(self, axes: str, study: Study, cache: Path, progress: bool) -> dict:
        """MIG with its gap of each factor, and DCI, on the half that reports."""
        codes, factors = self.half(axes, 1)
        cut = study.dci_train
        train, test = (codes[:cut], factors[:cut]), (codes[cut : cut + study.dci_test], factors[cut : cut + study.dci_test])
        dci = dci_from_codes(*train, *test, seed=self.seed, cache=cache, progress=progress)
        gap = information_gap(codes, factors)
        return {
            "method": self.method,
            "beta": self.beta,
            "seed": self.seed,
            "mig": gap["mig"],
            "gaps": gap["gaps"].tolist(),
            "dci": dci["disentanglement"],
            "completeness": dci["completeness"],
            "informativeness": dci["informativeness_test"],
        }


def representations(method: str, study: Study, seed: int, folder: Path, progress: bool = True) -> list[Representation]:
    """What one method offers at one seed: one representation, or one for each beta of the sweep.

    The bases of a multi-beta VAE are fitted once, at beta = 0.5.
    """
    arrays = codes_of(method, study, seed, folder, progress)
    betas, codes = arrays["betas"].tolist(), arrays["codes"].astype(np.float64)
    labels = {name: arrays[name] for name in ("factors", "attributes") if name in arrays}
    axes = bases(codes[betas.index(FOLD_BETA) if FOLD_BETA in betas else 0, : study.num_images], seed)
    return [Representation(method, beta, seed, axes, own, labels) for beta, own in zip(betas, codes, strict=True)]


def select(candidates: list[Representation], axes: str) -> Representation:
    """The candidate of highest MIG on the half that chooses."""
    return max(candidates, key=lambda candidate: mig_from_codes(*candidate.half(axes, 0)))


def disco_representation(base: Representation, study: Study, folder: Path, progress: bool = True) -> Representation:
    """The codes that DisCo learns on the frozen decoder of `base` at its beta."""
    train_set, test_set = open_data(study)
    vae = trained(base.method, study, base.seed, folder, progress)
    multi = isinstance(vae, MultiBetaVAE)

    def sample(batch, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(batch.images), *vae.config.latent_shape, generator=generator).to(batch.images.device)
        if not multi:
            return noise
        sigma = vae.sigma(torch.tensor([base.beta], device=batch.images.device))
        return vae.encode(batch.images, base.beta).float() + spatial(sigma) * noise

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base.seed)
        navigator = disco.Navigator(vae.config.latent_shape)
        module = disco.DisCo(
            navigator, disco.Contrastor(vae.config.image_channels, vae.config.resolution, width=study.disco_width)
        )
    decode = functools.partial(vae.decode, beta=base.beta) if multi else vae.decode
    objective = disco.DisCoObjective(module, decode, sample)
    options = TrainingOptions(
        steps=study.disco_steps,
        batch_size=min(128, len(train_set)),
        learning_rate=1e-3,
        ema_decay=0.0,
        clip_norm=0.0,
        seed=base.seed,
    )
    place = folder / f"disco-{base.method}"
    context = {"beta": base.beta, "method": base.method}
    common = {"resume": started(place), "progress": progress, "description": f"DisCo on {base.method}", "context": context}
    module.load_state_dict(train(objective, train_set, options, place, **common))
    codes, _ = encode_images(module.eval().encode, test_set, np.arange(2 * study.num_images), 250, progress=progress)
    axes = bases(codes[: study.num_images].astype(np.float64), base.seed)
    return dataclasses.replace(base, method=f"disco-{base.method}", axes=axes, codes=codes.astype(np.float64))
