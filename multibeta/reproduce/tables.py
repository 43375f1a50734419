"""The experiments: every table and figure, what it trains and what it measures."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multibeta import data, evaluation, recipes
from multibeta.metrics import information_gap, mig, tad, tad_from_codes
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.reproduce.codes import AXES, disco_representation, representations, select
from multibeta.reproduce.models import (
    BASELINES,
    FOLDED,
    MULTI_BETA,
    SEPARATE_BETAS,
    UNTIED,
    Study,
    diffusion_vae_recipe,
    study_images,
    trained_diffusion_vae,
    trained_multi_beta,
    trained_vae,
)
from multibeta.reproduce.summary import summarise

SAMPLING = {"sampler": "ddim", "steps": 50}
SHARPNESS_BETAS = (0.3, 0.5, 0.7, 0.9)
SHARPNESS_SAMPLING = ({"sampler": "ode2", "steps": 20, "delta_sign": 1},)
# Rows of Table 1: methods that compete, the axes of their codes, and what makes the images where it is another method.
TABLE1_METHODS: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "beta-VAE, best of 5": (tuple(f"beta-vae-{beta}" for beta in SEPARATE_BETAS), "trained", None),
    "InfoVAE": (("info-vae",), "trained", None),
    "multi-beta VAE": ((MULTI_BETA,), "pca", FOLDED),
}
# Rows of Table 2: methods whose representations compete, and the axes they are read in.
TABLE2_METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "VAE": (("beta-vae-1",), ("trained",)),
    "beta-VAE, best of 5": (tuple(f"beta-vae-{beta}" for beta in SEPARATE_BETAS), ("trained", "pca")),
    "annealed VAE": (("annealed-vae",), ("trained",)),
    "beta-TCVAE": (("beta-tcvae",), ("trained",)),
    "FactorVAE": (("factor-vae",), ("trained",)),
    "InfoVAE": (("info-vae",), ("trained",)),
    "multi-beta VAE": ((MULTI_BETA,), ("trained", "random", "pca", "ica")),
    "multi-beta VAE, sigma per channel": ((UNTIED,), ("trained", "pca")),
}


def table1(study: Study, folder: Path, progress: bool = True) -> dict:
    """MultiBeta Table 1: TAD of the encoding, and Frechet distance of new images, of beta-VAE, InfoVAE and the multi-beta VAE.

    beta is chosen by TAD on one half of the images; the other methods of the table have networks of their own and are quoted.
    """
    train_set, test_set = study_images(study)
    count = min(1000, study.num_images)
    real = data.to_float(test_set.images(range(count)))
    features = evaluation.usual_features(train_set, test_set, progress=progress)
    rows = []
    for seed in study.seeds:
        place = folder / f"seed-{seed}"
        for name, (methods, axes, generator) in TABLE1_METHODS.items():
            candidates = [item for method in methods for item in representations(method, study, seed, place, progress)]
            chosen = max(candidates, key=lambda item: tad_from_codes(*item.half(axes, 0, "attributes"))["tad"])
            score = tad_from_codes(*chosen.half(axes, 1, "attributes"))
            fake = images_by(generator or chosen.method, study, seed, place, count, progress)
            row = {"name": name, "method": chosen.method, "beta": chosen.beta, "seed": seed, "tad": score["tad"]}
            rows.append(row | {"captured": len(score["captured"]), "frechet": features.distance(fake, real)})
    summary = summarise(rows, ("name",), ("tad", "captured", "frechet"))
    return {"features": features.name, "num_images": count, "rows": rows, "summary": summary}


def images_by(method: str, study: Study, seed: int, folder: Path, count: int, progress: bool = True) -> Tensor:
    """Images (count, C, H, W) from noise, by a method of the study."""
    if method not in BASELINES:
        return trained_multi_beta(method, study, seed, folder, progress).generate(count)
    vae = trained_vae(method, study, seed, folder, progress)
    noise = torch.randn(count, *vae.config.latent_shape, generator=torch.Generator().manual_seed(seed))
    return evaluation.batched(vae.decode, noise)


def table2(study: Study, folder: Path, progress: bool = True) -> dict:
    """MultiBeta Table 2: MIG and DCI of all methods, beta chosen on one half of the images, reported on the other.

    Paper note: the paper reports the beta of the highest score, which selects on the test metric.
    """
    rows = []
    for seed in study.seeds:
        for name, (methods, all_axes) in TABLE2_METHODS.items():
            place = folder / f"seed-{seed}"
            candidates = [item for method in methods for item in representations(method, study, seed, place, progress)]
            for axes in all_axes:
                score = select(candidates, axes).score(axes, study, folder / "dci", progress)
                rows.append({"name": name, "axes": axes, **score})
    return {"rows": rows, "summary": summarise(rows, ("name", "axes"), ("mig", "dci", "completeness", "informativeness"))}


def figure4(study: Study, folder: Path, progress: bool = True) -> dict:
    """MultiBeta Fig. 4: MIG and, per factor, the highest mutual information with any code (nats), over beta of one model.

    "kept" is what z_beta could tell of x if f were Gaussian, sum_j 1/2 ln(1 + var f_j / sigma^2) nats over the principal axes;
    "kept, first" is the largest term of the sum.
    """
    rows = []
    for seed in study.seeds:
        place = folder / f"seed-{seed}"
        vae = trained_vae(MULTI_BETA, study, seed, place, progress)
        assert isinstance(vae, MultiBetaVAE)
        for item in representations(MULTI_BETA, study, seed, place, progress):
            gaps = {axes: information_gap(*item.half(axes, 1)) for axes in AXES}
            sigma = vae.sigma(torch.tensor([item.beta])).item()
            kept = np.log1p(item.half("pca", 1)[0].var(0) / sigma**2) / 2
            information = gaps["pca"]["mutual_information"].max(1)
            rows.append(
                {
                    "seed": seed,
                    "beta": item.beta,
                    **{f"mig, {axes}": gap["mig"] for axes, gap in gaps.items()},
                    **dict(zip(study_images(study)[1].factor_names, information.tolist(), strict=True)),
                    "kept": float(kept.sum()),
                    "kept, first": float(kept.max()),
                }
            )
    measures = tuple(name for name in rows[0] if name not in ("seed", "beta"))
    return {"rows": rows, "summary": summarise(rows, ("beta",), measures)}


def table7(study: Study, folder: Path, progress: bool = True) -> dict:
    """MultiBeta Table 7: the codes of a VAE and of the multi-beta VAE, and those that DisCo learns on the decoder of either."""
    rows = []
    for seed in study.seeds:
        place = folder / f"seed-{seed}"
        for name, method in (("VAE", "beta-vae-1"), ("multi-beta VAE", MULTI_BETA)):
            chosen = select(representations(method, study, seed, place, progress), "pca")
            learned = disco_representation(chosen, study, place, progress)
            for label, item, axes in ((name, chosen, "pca"), (f"DisCo on {name}", learned, "trained")):
                rows.append({"name": label, **item.score(axes, study, folder / "dci", progress)})
    return {"rows": rows, "summary": summarise(rows, ("name",), ("mig", "dci"))}


def codes_and_sharpness(study: Study, folder: Path, progress: bool = True) -> dict:
    """What the paper is about: disentanglement of the encoding at beta, and sharpness of the images decoded from it, directly and
    denoised.

    Of the two variants of axes that a diffusion model can follow. TAD and MIG are those of the codes in the model's own axes.
    """
    train_set, test_set = study_images(study)
    count = min(1000, study.num_images, len(train_set))
    images = data.to_float(test_set.images(range(count)))
    features = evaluation.usual_features(train_set, test_set, progress=progress)
    rows, samples = [], []
    for seed in study.seeds:
        for method in (FOLDED, UNTIED):
            model = trained_multi_beta(method, study, seed, folder / f"seed-{seed}", progress)
            quality = evaluation.compare_denoising(model, features, images, None, SHARPNESS_BETAS)
            for beta, made in zip(SHARPNESS_BETAS, quality, strict=True):
                encode = functools.partial(model.encode, beta=beta)
                protocol = {"num_images": count, "batch_size": 250, "progress": progress}
                row = {"method": method, "seed": seed, "beta": beta}
                if data.knows_factors(test_set):
                    row["mig"] = mig(encode, test_set, **protocol)["mig"]
                if data.knows_attributes(test_set):
                    row["tad"] = tad(encode, test_set, **protocol)["tad"]
                for how in ("direct", "denoised"):
                    row |= {f"{how} {measure}": made[how][measure] for measure in ("frechet", "sharpness")}
                rows.append(row)
            train_images = data.to_float(train_set.images(range(count)))
            made = evaluation.generation(model, features, train_images, images, SHARPNESS_SAMPLING, progress=progress)
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


def diffusion_vae_table1(study: Study, folder: Path, progress: bool = True) -> dict:
    """DiffusionVAE Table 1: Frechet distance of new images by a VAE, by a DDPM, and by both, which share the VAE's z.

    Sampled by `ddim` in 50 steps, where the published scripts take 100. New z are drawn from N(0, I), as the text says, and from
    the mixture of Gaussians that the recipe fits to encodings, as the scripts do. Next to it what a classifier of the
    factors still reads from held-out images, decoded and refined.
    """
    count = min(1000, study.num_images)
    rows, reconstructions = [], []
    for seed in study.seeds:
        train_set, test_set = recipes.open_data(diffusion_vae_recipe(study, seed))
        features = evaluation.usual_features(train_set, test_set, progress=progress)
        model, ddpm = (
            trained_diffusion_vae(study, seed, folder / f"seed-{seed}", conditional, progress) for conditional in (True, False)
        )
        sets = {"num_images": count, "samplings": (SAMPLING,), "features": features, "progress": progress}
        measured = evaluation.evaluate_images(model, train_set, test_set, **sets)
        made = measured["generation"]
        distances = {"training images": made["real_floor"], "training images, refined": made["refined_floor"]}
        for sample in made["samples"]:
            name = "VAE" if sample["sampler"] is None else "DiffusionVAE"
            distances[f"{name}, z from the {sample['latents']}"] = sample["frechet"]
        real = data.to_float(test_set.images(range(count)))
        distances["DDPM"] = features.distance(ddpm.generate(count, **SAMPLING).cpu(), real)
        rows += [{"name": name, "seed": seed, "frechet": distance} for name, distance in distances.items()]
        for name, similarity in measured["reconstructions"].items():
            accuracy = similarity.pop("accuracy", None)
            read = {} if accuracy is None else dict(zip(measured["factor_names"], accuracy, strict=True))
            reconstructions.append({"name": name, "seed": seed, **similarity, **read})
    measures = tuple(name for name in reconstructions[0] if name not in ("name", "seed"))
    return {
        "features": features.name,
        "num_images": count,
        "rows": rows,
        "summary": summarise(rows, ("name",), ("frechet",)),
        "reconstructions": reconstructions,
        "reconstructions_summary": summarise(reconstructions, ("name",), measures),
    }
