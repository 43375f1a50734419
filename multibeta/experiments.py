"""The experiments of the papers as recipes: every method trained on one backbone, measured, set beside the printed numbers."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from multibeta import baselines, checkpoints, data, disco, evaluation, recipes
from multibeta.metrics import dci_from_codes, information_gap, mig, mig_from_codes, tad, tad_from_codes
from multibeta.metrics.disentanglement import encode_images
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.networks import AutoencoderConfig
from multibeta.pipelines import BaselineVAE, DenoisingMultiBetaVAE
from multibeta.schedules import spatial
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

    def recipe(self, seed: int, *, fold: bool = False, untie: bool = False) -> recipes.Recipe:
        """The recipe `scenes64` with the budget of this study."""
        preset = recipes.find("scenes64")
        shared = self.steps // 4 if untie else self.steps  # the rest has one sigma per channel
        training = {"steps": shared, "batch_size": self.batch_size, "learning_rate": self.learning_rate, "seed": seed}
        objective = {"fold": fold or untie, "untie_steps": self.steps - shared, **({"anneal": 1.0} if untie else {})}
        return dataclasses.replace(
            preset,
            data=dataclasses.replace(preset.data, source=self.source, num_train=self.num_train, num_test=2 * self.num_images),
            vae_training=dataclasses.replace(preset.vae_training, **training),
            vae_objective=dataclasses.replace(preset.vae_objective, **objective),
            diffusion_training=dataclasses.replace(preset.diffusion_training, steps=self.diffusion_steps, seed=seed),
        )


Objective = Callable[[baselines.VAE, int], baselines.BetaVAEObjective]  # of the VAE and the size of its training set
BASELINES: dict[str, Objective] = {
    **{f"beta-vae-{beta}": lambda vae, _, beta=beta: baselines.BetaVAEObjective(vae, beta) for beta in SEPARATE_BETAS},
    "annealed-vae": lambda vae, _: baselines.AnnealedVAEObjective(vae),
    "beta-tcvae": lambda vae, size: baselines.BetaTCVAEObjective(vae, size),
    "factor-vae": lambda vae, _: baselines.FactorVAEObjective(vae),
    "info-vae": lambda vae, _: baselines.InfoVAEObjective(vae),
}
MULTI_BETA, FOLDED, UNTIED = "multi-beta", "multi-beta-folded", "multi-beta-untied"


def train_baseline(method: str, recipe: recipes.Recipe, train_set, folder: Path, progress: bool = True) -> baselines.VAE:
    """One method of `BASELINES`, trained like the VAE of `recipe`, frozen; goes on where an earlier call stopped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.vae_training.seed)
        names = [field.name for field in dataclasses.fields(AutoencoderConfig)]
        vae = baselines.VAE(AutoencoderConfig(**{name: getattr(recipe.vae, name) for name in names}))
        objective = BASELINES[method](vae, len(train_set))
    context = {"method": method, "data": dataclasses.asdict(recipe.data), "vae": dataclasses.asdict(recipe.vae)}
    options = {"resume": started(folder), "progress": progress, "description": method, "context": context}
    objective.module.load_state_dict(train(objective, train_set, recipe.vae_training, folder, **options))
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
    if not (place / "model").exists():
        vae = trained(method, study, seed, folder, progress)
        recipe = study.recipe(seed, fold=True, untie=method == UNTIED)
        return recipes.train_diffusion(
            recipe, vae, *open_data(study), place, resume=started(place / "diffusion"), progress=progress
        )
    return DenoisingMultiBetaVAE.from_pretrained(place / "model")


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
        arrays |= {
            name: getattr(test_set, name)(indices).numpy() for name in ("factors", "attributes") if hasattr(test_set, name)
        }
        partial = path.with_suffix(".part")
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


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

    mean, size = codes.mean(0), codes.shape[1]
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
        """MIG and DCI on the half that reports."""
        codes, factors = self.half(axes, 1)
        cut = study.dci_train
        train, test = (codes[:cut], factors[:cut]), (codes[cut : cut + study.dci_test], factors[cut : cut + study.dci_test])
        dci = dci_from_codes(*train, *test, seed=self.seed, cache=cache, progress=progress)
        return {
            "method": self.method,
            "beta": self.beta,
            "seed": self.seed,
            "mig": mig_from_codes(codes, factors),
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


HEADLINE_BETAS = (0.3, 0.5, 0.7, 0.9)
# Rows of Table 1: methods that compete, the axes of their codes, and what makes the images where it is another method.
TABLE1: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "beta-VAE, best of 5": (tuple(f"beta-vae-{beta}" for beta in SEPARATE_BETAS), "trained", None),
    "InfoVAE": (("info-vae",), "trained", None),
    "multi-beta VAE": ((MULTI_BETA,), "pca", FOLDED),
}
# Rows of Table 2: methods whose representations compete, and the axes they are read in.
FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "VAE": (("beta-vae-1",), ("trained",)),
    "beta-VAE, best of 5": (tuple(f"beta-vae-{beta}" for beta in SEPARATE_BETAS), ("trained", "pca")),
    "annealed VAE": (("annealed-vae",), ("trained",)),
    "beta-TCVAE": (("beta-tcvae",), ("trained",)),
    "FactorVAE": (("factor-vae",), ("trained",)),
    "InfoVAE": (("info-vae",), ("trained",)),
    "multi-beta VAE": ((MULTI_BETA,), ("trained", "random", "pca", "ica")),
    "multi-beta VAE, sigma per channel": ((UNTIED,), ("trained",)),
}


def table2(study: Study, folder: Path, progress: bool = True) -> dict:
    """MultiBeta Table 2: MIG and DCI of all methods, beta chosen on one half of the images, reported on the other.

    Paper note: the paper reports the beta of the highest score, which selects on the test metric.
    """
    rows = []
    for seed in study.seeds:
        for name, (methods, all_axes) in FAMILIES.items():
            place = folder / f"seed-{seed}"
            candidates = [item for method in methods for item in representations(method, study, seed, place, progress)]
            for axes in all_axes:
                score = select(candidates, axes).score(axes, study, folder / "dci", progress)
                rows.append({"name": name, "axes": axes, **score})
    return {"rows": rows, "summary": summarise(rows, ("name", "axes"), ("mig", "dci", "completeness", "informativeness"))}


def figure4(study: Study, folder: Path, progress: bool = True) -> dict:
    """MultiBeta Fig. 4: MIG and, per factor, the highest mutual information with any code (nats), over beta of one model."""
    rows = []
    for seed in study.seeds:
        for item in representations(MULTI_BETA, study, seed, folder / f"seed-{seed}", progress):
            gaps = {axes: information_gap(*item.half(axes, 1)) for axes in AXES}
            information = gaps["pca"]["mutual_information"].max(1)
            rows.append(
                {
                    "seed": seed,
                    "beta": item.beta,
                    **{f"mig, {axes}": gap["mig"] for axes, gap in gaps.items()},
                    **dict(zip(open_data(study)[1].factor_names, information.tolist(), strict=True)),
                }
            )
    measures = tuple(name for name in rows[0] if name not in ("seed", "beta"))
    return {"rows": rows, "summary": summarise(rows, ("beta",), measures)}


def headline(study: Study, folder: Path, progress: bool = True) -> dict:
    """What the paper is about: disentanglement of the encoding at beta beside the images decoded from it, directly and denoised.

    Of the two variants of axes that a diffusion model can follow. TAD and MIG are those of the codes in the model's own axes.
    """
    train_set, test_set = open_data(study)
    count = min(1000, study.num_images, len(train_set))
    images = data.to_float(test_set.images(range(count)))
    features = distance_features(study, progress)
    rows, samples = [], []
    for seed in study.seeds:
        for method in (FOLDED, UNTIED):
            model = denoising_model(method, study, seed, folder / f"seed-{seed}", progress)
            quality = evaluation.headline(model, features, images, None, HEADLINE_BETAS)
            for beta, made in zip(HEADLINE_BETAS, quality, strict=True):
                encode = functools.partial(model.encode, beta=beta)
                protocol = {"num_images": count, "batch_size": 250, "progress": progress}
                row = {"method": method, "seed": seed, "beta": beta}
                if hasattr(test_set, "factors"):
                    row["mig"] = mig(encode, test_set, **protocol)["mig"]
                if hasattr(test_set, "attributes"):
                    row["tad"] = tad(encode, test_set, **protocol)["tad"]
                for kind in ("direct", "denoised"):
                    row |= {f"{kind} {measure}": made[kind][measure] for measure in ("frechet", "sharpness")}
                rows.append(row)
            train_images = data.to_float(train_set.images(range(count)))
            made = evaluation.generation(model, features, train_images, images, (("ode2", 20, 1),), progress=progress)
            floors = {name: made[name] for name in ("real_floor", "autoencoder_floor")}
            samples.append({"method": method, "seed": seed, **floors, **made["samples"][0]})
    measures = tuple(name for name in rows[0] if name not in ("method", "seed", "beta"))
    return {
        "features": features.name,
        "num_images": count,
        "rows": rows,
        "summary": summarise(rows, ("method", "beta"), measures),
        "samples": samples,
        "samples_summary": summarise(samples, ("method",), ("frechet", "sharpness", "autoencoder_floor", "real_floor")),
    }


def distance_features(study: Study, progress: bool = True) -> evaluation.Features:
    """What Frechet distances are measured in: a classifier of the factors where they are known, else the pixels."""
    train_set, test_set = open_data(study)
    if hasattr(train_set, "factors"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return evaluation.classifier_features(train_set, test_set, progress=progress)
    return evaluation.pixel_features(train_set)


def table1(study: Study, folder: Path, progress: bool = True) -> dict:
    """MultiBeta Table 1: TAD of the encoding, and Frechet distance of new images, of beta-VAE, InfoVAE and the multi-beta VAE.

    beta is chosen by TAD on one half of the images; the other methods of the table have networks of their own and are quoted.
    """
    _, test_set = open_data(study)
    count = min(1000, study.num_images)
    real, features = data.to_float(test_set.images(range(count))), distance_features(study, progress)
    rows = []
    for seed in study.seeds:
        place = folder / f"seed-{seed}"
        for name, (methods, axes, generator) in TABLE1.items():
            candidates = [item for method in methods for item in representations(method, study, seed, place, progress)]
            chosen = max(candidates, key=lambda item: tad_from_codes(*item.half(axes, 0, "attributes"))["tad"])
            score = tad_from_codes(*chosen.half(axes, 1, "attributes"))
            fake = new_images(generator or chosen.method, study, seed, place, count, progress)
            row = {"name": name, "method": chosen.method, "beta": chosen.beta, "seed": seed, "tad": score["tad"]}
            rows.append(row | {"captured": len(score["captured"]), "frechet": features.distance(fake, real)})
    summary = summarise(rows, ("name",), ("tad", "captured", "frechet"))
    return {"features": features.name, "num_images": count, "rows": rows, "summary": summary}


def new_images(method: str, study: Study, seed: int, folder: Path, count: int, progress: bool = True) -> Tensor:
    """Images (count, C, H, W) from noise, by a method of the study."""
    if method not in BASELINES:
        return denoising_model(method, study, seed, folder, progress).generate(count)
    vae = trained(method, study, seed, folder, progress)
    noise = torch.randn(count, *vae.config.latent_shape, generator=torch.Generator().manual_seed(seed))
    return evaluation.batched(vae.decode, noise)


def table7(study: Study, folder: Path, progress: bool = True) -> dict:
    """MultiBeta Table 7: the codes of a VAE and of the multi-beta VAE, and those that DisCo learns on the decoder of either."""
    rows = []
    for seed in study.seeds:
        place = folder / f"seed-{seed}"
        for name, method in (("VAE", "beta-vae-1"), ("multi-beta VAE", MULTI_BETA)):
            chosen = select(representations(method, study, seed, place, progress), "pca")
            found = disco_representation(chosen, study, place, progress)
            for label, item, axes in ((name, chosen, "pca"), (f"DisCo on {name}", found, "trained")):
                rows.append({"name": label, **item.score(axes, study, folder / "dci", progress)})
    return {"rows": rows, "summary": summarise(rows, ("name",), ("mig", "dci"))}


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


def summarise(rows: list[dict], keys: tuple[str, ...], measures: tuple[str, ...]) -> list[dict]:
    """Mean and standard deviation over the rows that agree in `keys`, in order of appearance; `chosen`: what was selected."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {
            **dict(zip(keys, group, strict=True)),
            "seeds": len(members),
            **({} if "beta" in keys or "beta" not in members[0] else {"chosen": [chosen(member) for member in members]}),
            **{name: spread([member[name] for member in members]) for name in measures},
        }
        for group, members in groups.items()
    ]


def chosen(row: dict) -> str:
    """What was selected in a row: a method that was trained for one beta, or a beta of the multi-beta VAE."""
    return row["method"] if row["method"] in BASELINES else f"beta {row['beta']:g}"


def spread(values: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


EXPERIMENTS: dict[str, Callable[[Study, Path, bool], dict]] = {
    "table1": table1,
    "table2": table2,
    "table7": table7,
    "figure4": figure4,
    "headline": headline,
}
# fmt: off
# What the paper prints, by experiment: a header, then rows.
PRINTED: dict[str, tuple[tuple[str, ...], ...]] = {
    "table1": (
        ("CelebA",               "TAD",           "FID"),
        ("beta-VAE",             "0.088 ± 0.043", "99.8 ± 2.4"),
        ("InfoVAE",              "0.000 ± 0.000", "77.8 ± 1.6"),
        ("DiffAE",               "0.155 ± 0.010", "22.7 ± 2.1"),
        ("InfoDiffusion",        "0.299 ± 0.006", "23.6 ± 1.3"),
        ("DisDiff",              "0.305 ± 0.010", "18.3 ± 2.1"),
        ("multi-beta VAE",       "0.378 ± 0.017", "17.9 ± 1.9"),
    ),
    "table2": (
        ("MIG, DCI",             "Cars3D",                       "Shapes3D",                     "MPI3D"),
        ("FactorVAE",            "0.128 ± 0.036, 0.160 ± 0.020", "0.411 ± 0.163, 0.611 ± 0.127", "0.098 ± 0.027, 0.246 ± 0.066"),
        ("beta-TCVAE",           "0.080 ± 0.024, 0.140 ± 0.020", "0.406 ± 0.190, 0.613 ± 0.151", "0.108 ± 0.053, 0.239 ± 0.062"),
        ("InfoGAN-CR",           "0.011 ± 0.009, 0.020 ± 0.011", "0.297 ± 0.124, 0.478 ± 0.055", "0.161 ± 0.077, 0.242 ± 0.076"),
        ("multi-beta VAE",       "0.117 ± 0.009, 0.157 ± 0.010", "0.422 ± 0.090, 0.621 ± 0.090", "0.147 ± 0.035, 0.253 ± 0.043"),
    ),
    "table7": (
        ("MIG, DCI",             "Cars3D",                       "Shapes3D",                     "MPI3D"),
        ("VAE",                  "0.037 ± 0.022, 0.063 ± 0.037", "0.167 ± 0.112, 0.363 ± 0.027", "0.021 ± 0.013, 0.096 ± 0.024"),
        ("DisCo on VAE",         "0.071 ± 0.029, 0.127 ± 0.044", "0.237 ± 0.134, 0.526 ± 0.045", "0.047 ± 0.027, 0.188 ± 0.042"),
        ("multi-beta VAE",       "0.114 ± 0.009, 0.157 ± 0.010", "0.422 ± 0.090, 0.621 ± 0.090", "0.147 ± 0.035, 0.253 ± 0.043"),
        ("DisCo on multi-beta",  "0.116 ± 0.011, 0.171 ± 0.010", "0.434 ± 0.090, 0.678 ± 0.081", "0.152 ± 0.029, 0.284 ± 0.060"),
    ),
}
# fmt: on


def reproduce(name: str, study: Study, folder: Path, *, progress: bool = True, command: str | None = None) -> str:
    """Run one of `EXPERIMENTS`; returns its tables as Markdown.

    `folder` receives the trainings, one folder a seed, which all experiments share and which go on where they stopped;
    NAME.json with every number, NAME.md with the tables, and a figure of what varies over beta.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    needed = "attributes" if name == "table1" else "factors"
    if not hasattr(open_data(study)[1], needed):
        raise ValueError(f"{name} needs images with known {needed}; {study.source} has none")
    claim(folder, study)
    result = EXPERIMENTS[name](study, folder, progress)
    record = {"experiment": name, "command": command, "study": dataclasses.asdict(study), **result}
    tables = [table(result[key]) for key in ("summary", "samples_summary") if key in result]
    if name in PRINTED:
        tables.append("As printed in the paper:\n\n" + markdown(PRINTED[name]))
    text = "\n\n".join(tables)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    if "beta" in result["summary"][0]:
        draw_over_beta(result["summary"], folder / f"{name}.png")
    return text


def claim(folder: Path, study: Study) -> None:
    """Write down what the trainings in `folder` share; `ValueError` if another study has left its own there."""
    shared = {name: value for name, value in dataclasses.asdict(study).items() if name not in ("seeds", "dci_train", "dci_test")}
    path = folder / "study.json"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))) != shared:
        differing = ", ".join(
            f"{name} {before.get(name)} (now {value})" for name, value in shared.items() if before.get(name) != value
        )
        raise ValueError(f"{folder} holds another study: {differing}; choose another folder")
    path.write_text(json.dumps(shared), encoding="utf-8")


def table(summary: list[dict]) -> str:
    """What `summarise` returns as a Markdown table of mean ± standard deviation."""
    rows = [tuple(summary[0])]
    for entry in summary:
        cells = (f"{v['mean']:.3f} ± {v['std']:.3f}" if isinstance(v, dict) else v for v in entry.values())
        rows.append(tuple(", ".join(sorted(set(cell))) if isinstance(cell, list) else str(cell) for cell in cells))
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its header."""
    header, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([header, "|" + " --- |" * len(rows[0]), *body])


def draw_over_beta(summary: list[dict], path: Path) -> None:
    """Every measure over beta, mean and deviation over seeds, a curve for each method."""
    from multibeta.report import drawn  # brings matplotlib

    measures = [name for name, value in summary[0].items() if isinstance(value, dict)]
    groups: dict[str, list[dict]] = {}
    for row in summary:
        groups.setdefault(row.get("method", ""), []).append(row)

    def draw(axes):
        for axis, name in zip(axes, measures, strict=False):
            for label, rows in groups.items():
                mean, deviation = ([row[name][key] for row in rows] for key in ("mean", "std"))
                axis.errorbar([row["beta"] for row in rows], mean, deviation, marker="o", capsize=2, label=label or None)
            axis.set(title=name, xlabel="β", ylim=(0, None))
            if len(groups) > 1:
                axis.legend()
        for axis in axes[len(measures) :]:
            axis.set_axis_off()

    path.write_bytes(drawn(draw, rows=-(-len(measures) // 3), columns=3, kind="png"))
