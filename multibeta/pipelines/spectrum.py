"""What each beta keeps of an image: measured on images, stored with a model, and the beta that edits take by themselves."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from multibeta import variational
from multibeta.checks import is_integer
from multibeta.metrics.fidelity import LEAST_ENERGY, gradient_energy, mean_energy, sharpness
from multibeta.progress import progress_bar

if TYPE_CHECKING:
    from multibeta.pipelines.multi_beta import DenoisingMultiBetaVAE

SPECTRUM_BETAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
SPECTRUM_IMAGES = 200  # are enough to tell `highest_beta` to 0.01 or so
KEPT_IDENTITY = 0.95
BETA_STEP = 0.01  # of the grid that `highest_beta` is of
MEASURED = ("beta", "nats", "mse", "denoised_mse", "identity")
LATENTS_AT_ONCE = 250


@torch.no_grad()
def spectrum(model: DenoisingMultiBetaVAE, images: Tensor, means: Mapping[float, Tensor]) -> list[dict[str, float]]:
    """The representation at each beta: sigma (geometric mean over channels), s, KL in nats, error, sharpness, deviation.

    Args:
        images: (N, C, H, W) in [-1, 1], on the CPU.
        means: beta to the mean encodings of `images`, (N, c, h, w), on the CPU.
    """
    real_energy = mean_energy(images)
    rows = []
    for beta, mean in means.items():
        latents = add_noise(model, mean, beta)
        reconstruction = torch.cat([model.decode(chunk, beta).cpu() for chunk in latents.split(LATENTS_AT_ONCE)])
        at = torch.tensor([float(beta)], device=model.device)
        sigma, decoder_sigma = model.vae.sigma(at).cpu(), float(model.vae.decoder_sigma(at))
        kl = float(variational.kl_to_standard_normal(mean, sigma.expand(len(mean), *sigma.shape[1:])).mean())
        rows.append(
            {
                "beta": beta,
                "sigma": float(sigma.log().mean().exp()),
                "decoder_sigma": decoder_sigma,
                "kl": kl,
                "kl_per_dimension": kl / mean[0].numel(),
                "encoding_deviation": float((mean - mean.mean(0)).square().mean().sqrt()),
                "mse": float((reconstruction - images).square().mean()),
                "sharpness": sharpness(mean_energy(reconstruction), real_energy),
            }
        )
    return rows


def add_noise(model: DenoisingMultiBetaVAE, mean: Tensor, beta: float) -> Tensor:
    """z_beta = f + sigma eps with fixed noise."""
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    return variational.sample(mean, model.vae.sigma(torch.tensor([float(beta)], device=model.device)).to(mean), noise.to(mean))


@torch.no_grad()
def measure_spectrum(
    model: DenoisingMultiBetaVAE, images: Tensor, betas: Sequence[float] = SPECTRUM_BETAS, *, progress: bool = False
) -> list[dict[str, float]]:
    """What each beta keeps of images: see `DenoisingMultiBetaVAE.measure_spectrum`.

    Args:
        images: (N, C, H, W) in [-1, 1].

    Returns:
        A row of MEASURED for each beta, rising; numbers of five digits.
    """
    means = {beta: model._encode_many(images, beta).cpu() for beta in sorted({0.0, *map(float, betas)})}
    images = images.cpu()
    rows = spectrum(model, images, means)
    kept, measured = None, []
    for row in progress_bar(rows, desc="what each beta keeps", unit="beta", disable=not progress):
        beta = row["beta"]
        chunks = means[beta].split(LATENTS_AT_ONCE)
        denoised = torch.cat([model.render(chunk, beta, denoise=True).cpu() for chunk in chunks])
        kept = denoised if kept is None else kept  # the first beta is 0
        values = (beta, row["kl"], row["mse"], float((denoised - images).square().mean()), identity(denoised, kept))
        measured.append({name: float(f"{value:.5g}") for name, value in zip(MEASURED, values, strict=True)})
    return measured


def identity(images: Tensor, originals: Tensor) -> float:
    """The share of the detail of `originals` that is as it was in `images`, in [0, 1].

    1 - energy of their difference / energy of the originals, both summed over all images. The energy is `gradient_energy`, that
    of edges: most of the plain squared error is colour of large areas, which stays long after a small shape has become another.

    Args:
        images, originals: (N, C, H, W).
    """
    changed, whole = (float(gradient_energy(each.double()).sum()) for each in (images - originals, originals))
    return max(0.0, 1 - changed / max(whole, LEAST_ENERGY))


def highest_beta(rows: Sequence[Mapping[str, float]], least: float = KEPT_IDENTITY) -> float:
    """The highest beta up to which the identity stays at `least` or above, a multiple of 0.01.

    Args:
        rows: Of `measure_spectrum`; between them the identity is interpolated, beyond the last of them not known.
    """
    betas, grid = [row["beta"] for row in rows], np.arange(round(1 / BETA_STEP) + 1) * BETA_STEP
    kept = (np.interp(grid, betas, [row["identity"] for row in rows]) >= least - 1e-9) & (grid <= betas[-1] + 1e-9)
    return round(float(grid[np.logical_and.accumulate(kept)][-1]), 2) if kept[0] else 0.0


def with_row_at(rows: Sequence[Mapping[str, float]], beta: float) -> list[Mapping[str, float]]:
    """The rows of `measure_spectrum` with one at `beta` among them, interpolated where that was not measured."""
    betas = [row["beta"] for row in rows]
    if beta in betas:
        return list(rows)
    between = {name: float(np.interp(beta, betas, [row[name] for row in rows])) for name in MEASURED}
    return sorted([*rows, between], key=lambda row: row["beta"])


def check_spectrum(recorded: Any) -> None:
    """`ValueError` unless this is what `DenoisingMultiBetaVAE.measure_spectrum` records."""
    rows = recorded.get("levels") if isinstance(recorded, dict) else None
    sound = isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) and {*MEASURED} <= {*row} for row in rows)
    counted = sound and is_integer(recorded.get("num_images")) and recorded["num_images"] > 0
    if not counted or not _are_levels(cast("list[dict[str, Any]]", rows)):
        raise ValueError(
            f'info["spectrum"] of the model is damaged: it needs num_images, and levels of {", ".join(MEASURED)}, finite '
            "numbers, with beta rising in [0, 1] and identity within. `multibeta spectrum MODEL --save` measures it again"
        )


def _are_levels(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows that have all MEASURED hold finite numbers, with beta rising in [0, 1]."""
    values = [row[name] for row in rows for name in MEASURED]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf for value in values):
        return False
    betas = [row["beta"] for row in rows]
    if max(abs(value) for value in values) > sys.float_info.max or not all(0 <= row["identity"] <= 1 for row in rows):
        return False
    return betas[0] >= 0 and betas[-1] <= 1 and all(lower < upper for lower, upper in itertools.pairwise(betas))
