"""What is measured of a model before it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multibeta.evaluation import SPECTRUM_BETAS, batched, encodings, facts, head_fit, recorded_recipe, spectrum
from multibeta.pipelines import DenoisingMultiBetaVAE, Pipeline

MEASURED_IMAGES = 100


@dataclass(frozen=True)
class Measured:
    """A model in numbers.

    Attributes:
        mse: Of images that are encoded and decoded, of a multi-beta VAE at beta = 0.
        variance: Of a pixel over these images: the error of their mean.
        facts: Of `evaluation.facts`, by key; of a multi-beta VAE, as are the following.
        rows: Of `evaluation.spectrum`.
        heads: Of `evaluation.head_fit`; none where stage 2 was not trained.
        sigmas_apart: How far sigma of stage 2 is from that of the VAE, at most.
        options: The fields of the recipe's `vae_objective`, as far as they are known.
        network: The fields of the VAE's config.
        steps: Of both stages, "vae" and "diffusion", as far as they are known.
        parameterization: Of the heads of stage 2, see `DiffusionConfig`.
        followed: Folders of the trainings that were begun on its VAE.
    """

    mse: float
    variance: float
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    heads: list[dict[str, float]] = field(default_factory=list)
    sigmas_apart: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    parameterization: str | None = None
    followed: tuple[str, ...] = ("diffusion",)

    @property
    def equal_beta(self) -> float:
        """The beta at which the encodings deviate as much as their noise: up to there a latent is more signal than noise."""
        betas = [row["beta"] for row in self.rows]
        excess = [np.log(max(row["encoding_deviation"], 1e-6) / row["sigma"]) for row in self.rows]
        below = next((index for index, value in enumerate(excess) if value < 0), None)
        if below is None:
            return 1.0
        if below == 0:
            return 0.0
        return float(np.interp(0.0, [excess[below], excess[below - 1]], [betas[below], betas[below - 1]]))

    def mean_fit(self, name: str) -> float:
        """The mean of "noise_r2" or "velocity_r2" over beta."""
        return float(np.mean([row[name] for row in self.heads]))


@torch.no_grad()
def measure(model: Pipeline, images: Tensor, *, second_stage: bool = True, **known: Any) -> Measured:
    """Measure a model on images (N, C, H, W) in [-1, 1], on the CPU.

    Args:
        second_stage: Whether the diffusion model was trained, so that its heads are worth a look.
        **known: Fields of `Measured` that its images do not say, such as `followed`.
    """
    recipe = recorded_recipe(model)
    steps = {stage: recipe.get(f"{stage}_training", {}).get("steps") for stage in ("vae", "diffusion")}
    known |= {
        "variance": float((images - images.mean(0)).square().mean()),
        "options": recipe.get("vae_objective", {}),
        "network": vars(model.vae.config),
        "steps": {stage: count for stage, count in steps.items() if count is not None},
    }
    if not isinstance(model, DenoisingMultiBetaVAE):
        again = batched(lambda x: model.decode(model.encode(x)), images)
        return Measured(mse=float((again - images).square().mean()), **known)
    rows = spectrum(model, images, encodings(model, images, SPECTRUM_BETAS))
    return Measured(
        mse=rows[0]["mse"],
        facts={fact["key"]: fact for fact in facts(model, images, rows)},
        rows=rows,
        heads=head_fit(model, images) if second_stage else [],
        parameterization=model.diffusion.config.parameterization,
        sigmas_apart=float((model.vae.sigmas() - model.diffusion.sigmas).abs().max()) if second_stage else 0.0,
        **known,
    )
