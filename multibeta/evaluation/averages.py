"""Averages of the weights of several lengths, by how near to real images those are that they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multibeta import recipes
from multibeta.evaluation.features import Features
from multibeta.evaluation.images import new_images
from multibeta.pipelines import Pipeline, load_pretrained


def compare_averages(
    run: str | Path,
    widths: Sequence[float],
    features: Features,
    real: Tensor,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
    **sampling: Any,
) -> tuple[Pipeline, list[dict[str, Any]]]:
    """The model of a run with that average of its weights whose new images are nearest to real ones, as EDM2 chooses it.

    All make images from the same seeds. What is measured of the best afterwards should be measured on other images.

    Args:
        run: Folder of a finished run, trained with `diffusion_training.posthoc_ema`.
        widths: Relative ones, each in (0, 0.28]: see `recipes.average`.
        features: In which the Frechet distance is measured.
        real: Images that the run held out, (N, C, H, W) in [-1, 1]; each average makes as many.
        sampling: Sampler and steps; by default those of `Pipeline.sampling_options`.

    Returns:
        The model, on `device`, and a row for each width: "sigma_rel", "frechet". The first row is that of the model as the run
        left it, whose width is None.

    Raises:
        ValueError, FileNotFoundError: See `recipes.check_averages`; or the sampling is none of the model's.
    """
    recipes.check_averages(run, widths)

    def row_of(model: Pipeline, width: float | None) -> dict[str, Any]:
        how = sampling | model.sampling_options(sampling.get("sampler"), sampling.get("steps"))
        images = new_images(model.to(device), len(real), progress=progress, **how)
        return {"sigma_rel": width, "frechet": features.distance(images, real)}

    best, rows = None, []
    for width in widths:
        model = recipes.average(run, width)
        rows.append(row_of(model, width))
        if rows[-1] is min(rows, key=lambda row: row["frechet"]):
            best = model
    assert best is not None, "there is a width"
    return best, [row_of(load_pretrained(Path(run) / "model"), None), *rows]
