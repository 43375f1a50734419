"""What only a multi-beta VAE has: the facts of its first stage, a representation at every beta, and two heads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multibeta import data
from multibeta.evaluation.codes import disentanglement, encodings
from multibeta.evaluation.features import Features, batched, usual_features
from multibeta.evaluation.images import (
    COMPARED_BETAS,
    checked_samplings,
    compare_denoising,
    equally_many,
    generation,
)
from multibeta.multibeta_vae import slope_ratio
from multibeta.pipelines import DenoisingMultiBetaVAE
from multibeta.pipelines.spectrum import SPECTRUM_BETAS, add_noise, spectrum
from multibeta.schedules import beta_to_step, spatial, step_to_beta

logger = logging.getLogger(__name__)


def evaluate_multi_beta(
    model: DenoisingMultiBetaVAE,
    train_set: data.Dataset,
    test_set: data.Dataset,
    *,
    num_images: int = 1000,
    samplings: Sequence[dict[str, Any]] | None = None,
    betas: Sequence[float] | None = None,
    features: Features | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """All that is measured of a multi-beta VAE, as one JSON-ready dictionary.

    Args:
        train_set, test_set: Disjoint data sets; with `factors` where they are known.
        num_images: Images on each side of a Frechet distance, at most what the sets hold.
        samplings: Rows of `generation`: see `checked_samplings`.
        betas: Rows of `compare_denoising`, which denoises by `Pipeline.sampling_options`: "walk" says how.
        features: Measured in these; by default those of a factor classifier where factors are known, else of the pixels.
    """
    samplings = checked_samplings(model, samplings)
    model.levels(betas, default=COMPARED_BETAS)  # known to be levels before the work begins
    train_images, real, factors = equally_many(train_set, test_set, num_images)
    features = features or usual_features(train_set, test_set, progress=progress)
    logger.info("measuring %d images in %s", len(real), features.name)
    means = encodings(model, real, SPECTRUM_BETAS)
    rows = spectrum(model, real, means)
    names = list(test_set.factor_names) if data.knows_factors(test_set) else None
    return {
        "facts": facts(model, real, rows),
        "spectrum": rows,
        "disentanglement": [] if factors is None or names is None else disentanglement(means, factors, names),
        "heads": head_fit(model, real[:500]),
        "generation": generation(model, features, train_images, real, samplings, progress=progress),
        "headline": compare_denoising(model, features, real, factors, betas),
        "walk": model.sampling_options(),
        "classifier_accuracy": features.accuracy,
        "factor_names": names,
    }


def facts(model: DenoisingMultiBetaVAE, images: Tensor, rows: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """What must come out of stage 1 (MultiBeta Prop. 3.1, 3.2, Fig. 3), measured: key, name, value, target, whether it holds.

    Args:
        images: (N, C, H, W) in [-1, 1].
        rows: The `spectrum` of `images`, with those of beta = 0 and 1.
    """
    sigmas = model.vae.sigmas().cpu().double().view(model.num_steps + 1, -1)
    least, most = (next(row for row in rows if row["beta"] == beta) for beta in (0, 1))
    slopes = max(slope_ratio(model.vae, images[:64].to(model.device), beta) for beta in (0.1, 0.3, 0.5, 0.7, 0.9))
    measured = [
        ("sigma_zero", "sigma(0): Prop. 3.1, the noise vanishes as beta goes to 0", float(sigmas[0].min()), 0.0, 0.04),
        ("sigma_one", "sigma(1): the noise of the prior", float(sigmas[-1].max()), 0.98, 1.02),
        ("decreasing_steps", "decreasing steps of sigma on the grid", float((sigmas.diff(dim=0) <= 0).sum()), 0.0, 0.0),
        ("deviation_zero", "deviation of f(x, 0) over images", least["encoding_deviation"], 0.8, 1.2),
        ("deviation_one", "deviation of f(x, 1) over images: collapsed", most["encoding_deviation"], 0.0, 0.1),
        ("kl_one", "KL at beta = 1, nats per dimension: Prop. 3.2, no information", most["kl_per_dimension"], 0.0, 0.01),
        ("mse_zero", "mean squared error at beta = 0", least["mse"], 0.0, 0.003),
        ("slope", "slope ratio of f in beta: smooth below 2", slopes, 0.0, 2.0),
    ]
    return [
        {"key": key, "name": name, "value": value, "low": low, "high": high, "holds": low <= value <= high}
        for key, name, value, low, high in measured
    ]


@torch.no_grad()
def head_fit(
    model: DenoisingMultiBetaVAE, images: Tensor, betas: Sequence[float] = (0.05, 0.1, 0.2, 0.5, 0.7, 0.9)
) -> list[dict[str, float]]:
    """R^2 of eps_hat and of the predicted velocity on held-out images, per beta (1 is exact, 0 predicts nothing).

    The heads are trained on the grid: "beta" of a row is that of the index nearest to one of `betas`, whatever the schedule.
    """
    num_steps, schedule = model.num_steps, model.vae.config.schedule
    rows = []
    for step in dict.fromkeys(max(beta_to_step(beta, num_steps, schedule), 1) for beta in betas):
        here, before = (float(step_to_beta(s, num_steps, schedule)) for s in (step, step - 1))
        encoding, previous = (batched(lambda x, b=b: model.encode(x, b), images) for b in (here, before))
        latents = add_noise(model, encoding, here)
        noise = (latents - encoding) / spatial(model.diffusion.sigmas[step : step + 1].cpu())
        outputs = [model.diffusion.predict(chunk.to(model.device), step) for chunk in latents.split(250)]
        noise_prediction, delta = (torch.cat([output[i].cpu() for output in outputs]) for i in (0, 1))
        difference = previous - encoding
        rows.append(
            {
                "beta": here,
                "noise_r2": 1 - float((noise_prediction - noise).square().mean() / noise.square().mean()),
                "velocity_r2": 1 - float((delta - difference).square().mean() / difference.square().mean()),
            }
        )
    return rows
