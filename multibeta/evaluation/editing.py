"""Two ways to edit, compared: from the mean of the latent at beta, and from the latent at 0, inverted to beta."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multibeta import data
from multibeta.data.factors import FactorGrid
from multibeta.evaluation.features import Features, batched
from multibeta.evaluation.images import reconstructions
from multibeta.pipelines import DenoisingMultiBetaVAE
from multibeta.progress import progress_bar

EDITED_BETAS = (0.5, 0.7, 0.8, 0.9)
SAME = 8  # of 255: what less does to a pixel is no change


def compare_editing(
    model: DenoisingMultiBetaVAE,
    features: Features,
    scenes: FactorGrid,
    indices: Tensor,
    others: Tensor,
    betas: Sequence[float | str] = EDITED_BETAS,
    *,
    num_directions: int = 3,
    strengths: Sequence[float] = (1.0, 2.0),
    progress: bool = False,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """What edits along the first principal directions change, and what they leave alone, in both ways of `manipulate`.

    A direction is meant to change one factor, that which explains most of where latents lie along it (`meant_factor`). The other
    factors are to stay, and so are the pixels that no value of this factor changes (`unchanged_pixels`).

    Args:
        features: With a classifier of the factors of `scenes`.
        scenes: Images of all combinations of the factors.
        indices: Of the images that are edited, (N,).
        others: Of the images whose mean latents give the directions, (M,).
        betas: Each in [0, 1], or "auto".
        strengths: Positive, in standard deviations of the latents along a direction; each image is edited both ways along it.
        sampling: Sampler and steps; by default those of `sampling_options` that invert.

    Returns:
        For each beta, way ("encoded" or "inverted") and strength a row: "changed", the share of edits that change the meant
        factor; "kept", the share of the other factors that are as they were; "outside", the squared error to the input in the
        pixels that were to stay; "frechet", the distance of edited images to the inputs; "meant", the factor of each direction.
        They are means over directions, signs and images, with the standard errors over images under "error". First comes strength
        0, no edit: "kept" of all factors, "outside" of all pixels, and "lossless", the squared error to decode(encode(x, 0)).

    Raises:
        ValueError: Features without a classifier; betas, directions or a sampling that the model has not.
    """
    if (classifier := features.classifier) is None:
        raise ValueError(f"edits are judged by a classifier of the factors, and there is none behind {features.name}")
    sampling |= model.sampling_options(sampling.get("sampler"), sampling.get("steps"), invert=True)
    levels = [beta for beta in dict.fromkeys(model.levels(betas)) if beta is not None]
    images, factors = data.to_float(scenes.images(indices)), scenes.factors(indices)
    lossless = reconstructions(model, images, 0.0)
    stay = [unchanged_pixels(scenes, indices, factor) for factor in range(factors.shape[1])]

    def judged(edited: Tensor, meant: int | None) -> dict[str, Tensor]:
        same, error = (classifier.predict(edited).cpu() == factors).float(), (edited - images).square().mean(1)
        if meant is None:
            none = {"kept": same.mean(1), "outside": error.mean((1, 2)), "lossless": (edited - lossless).square().mean((1, 2, 3))}
            return none | {"frechet": torch.tensor(features.distance(edited, images))}
        others = torch.arange(factors.shape[1]) != meant
        outside = (error * stay[meant]).sum((1, 2)) / stay[meant].sum((1, 2)).clamp(min=1)
        of_edit = {"changed": 1 - same[:, meant], "kept": same[:, others].mean(1), "outside": outside}
        return of_edit | {"frechet": torch.tensor(features.distance(edited, images))}

    rows = []
    total = 2 * len(levels) * (1 + 2 * num_directions * len(strengths))
    with progress_bar(total=total, desc="editing", unit="edit", disable=not progress) as bar:
        for beta in levels:
            learned = batched(lambda chunk, at=beta: model.encode(data.to_float(scenes.images(chunk)), at), others)
            principal = model.principal_directions(learned, beta, num_directions)
            axes = principal.directions.cpu() * principal.deviations.cpu()[:, None, None, None]
            along = (learned - learned.mean(0)).flatten(1) @ axes.flatten(1).T
            meant = [meant_factor(positions, scenes.factors(others)) for positions in along.T]
            starts = {
                "encoded": batched(lambda x, at=beta: model.encode(x, at), images),
                "inverted": batched(lambda x, at=beta: model.invert(model.encode(x, 0.0), beta=at, **sampling), images),
            }
            for (way, start), strength in itertools.product(starts.items(), (0.0, *strengths)):
                edits = (
                    [(axes[0], None)] if strength == 0 else [(s * axes[k], meant[k]) for k in range(len(axes)) for s in (-1, 1)]
                )
                each = []
                for direction, factor in edits:
                    edited = batched(
                        lambda z, d=direction, by=strength, at=beta: model.manipulate(z, d, by, at, **sampling), start
                    )
                    each.append(judged(edited, factor))
                    bar.update()
                means = {name: torch.stack([of_edit[name] for of_edit in each]).mean(0) for name in each[0]}
                rows.append(
                    {
                        "beta": beta,
                        "way": way,
                        "strength": strength,
                        **{name: float(values.mean()) for name, values in means.items()},
                        "error": {name: float(v.std() / len(v) ** 0.5) for name, v in means.items() if v.dim()},
                        "meant": [scenes.factor_names[factor] for factor in meant],
                        **sampling,
                    }
                )
    return rows


def meant_factor(positions: Tensor, factors: Tensor) -> int:
    """The factor that explains the largest share of the variance of `positions` (N,), of integer factors (N, F)."""

    def within(values: Tensor) -> float:
        return sum(float((own - own.mean()).square().sum()) for own in (positions[values == v] for v in values.unique()))

    return min(range(factors.shape[1]), key=lambda factor: within(factors[:, factor]))


def unchanged_pixels(scenes: FactorGrid, indices: Tensor, factor: int) -> Tensor:
    """Where no other value of a factor changes an image by more than 8 of 255, bool, (N, H, W)."""
    images, factors = scenes.images(indices).int(), scenes.factors(indices)
    unchanged = torch.ones(len(images), *images.shape[2:], dtype=torch.bool)
    for value in range(scenes.factor_sizes[factor]):
        factors[:, factor] = value
        unchanged &= (scenes.images(scenes.indices(factors)).int() - images).abs().amax(1) <= SAME
    return unchanged
