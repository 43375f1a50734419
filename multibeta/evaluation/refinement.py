"""What denoising makes of images: of both systems before and after it, and a DiffusionVAE in numbers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from multibeta import ops
from multibeta.evaluation import Features, as_many, batched, checked_walk, decoded, likeness, mean_energy, usual_features
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE

WALKS = ({"sampler": "ddim", "steps": 100}, {"sampler": "ddpm", "steps": 100})
AT_ONCE = 64  # images that are denoised together, by a network as large as they are


def before_and_after(
    model: DenoisingMultiBetaVAE | DiffusionVAE, images: Tensor, beta: float | None = None, *, label: str | None = None, **walk
) -> tuple[Tensor, Tensor]:
    """Images of one sample of the latent of each image: decoded at once, and denoised, (N, C, H, W) each.

    A `DenoisingMultiBetaVAE` decodes z_beta at beta, and after its way to 0; a `DiffusionVAE` decodes z to x_hat, and refines
    this. The noise of image i is that of seed i. `walk` is for `denoise`; by default `evaluation.checked_walk`.
    """
    walk |= checked_walk(model, walk.get("sampler"), walk.get("steps"))

    def both(index: Tensor) -> Tensor:
        latents = model.encode(images[index], beta, seeds=index)
        ways = (decoded(model, latents, beta, how, seeds=index, **walk) for how in ("direct", "denoised"))
        return torch.stack(list(ways), 1)

    before, after = batched(both, torch.arange(len(images)), AT_ONCE, label=label).unbind(1)
    return before, after


def checked_walks(model: DiffusionVAE, walks: Sequence[dict] | None = None) -> list[dict]:
    """Arguments of `DiffusionVAE.denoise`, each with its sampler and steps; by default `WALKS`, as far as the process has steps.

    Raises:
        ValueError: None, or one whose sampler or steps the model does not have.
    """
    if walks is None:
        return [walk | {"steps": min(walk["steps"], model.num_steps)} for walk in WALKS]
    if not walks:
        raise ValueError("name at least one walk: a sampler and its steps")
    return [walk | checked_walk(model, walk.get("sampler"), walk.get("steps")) for walk in walks]


def latent_sources(model: DiffusionVAE) -> dict[str, DiffusionVAE]:
    """The model by where its new latents come from: "prior", and "mixture" where it has one."""
    prior = copy.copy(model)
    prior.mixture = None
    return {"prior": prior} | ({} if model.mixture is None else {"mixture": model})


def refined_generation(
    model: DiffusionVAE,
    features: Features,
    train_images: Tensor,
    real: Tensor,
    walks: Sequence[dict],
    *,
    progress: bool = True,
) -> dict:
    """Frechet distance and sharpness of new images as they are decoded and as they are refined, with the floors of both.

    Args:
        train_images: As many training images as `real` holds.
        real: Held-out images.
        walks: Arguments of `DiffusionVAE.denoise`; the floor is refined by the first.

    Returns:
        "real_floor", "autoencoder_floor" and "refined_floor": of training images, of these encoded and decoded, and refined
        besides; "samples": for each source of latents a row of x_hat, whose sampler is None, and one for each walk.
    """
    walks = checked_walks(model, walks)
    energy, label = mean_energy(real), "refining" if progress else None

    def quality(images: Tensor, **row) -> dict:
        return row | {"frechet": features.distance(images, real), "sharpness": mean_energy(images) / energy}

    rebuilt, refined = (quality(made) for made in before_and_after(model, train_images, label=label, **walks[0]))
    result = {
        "num_images": len(real),
        "features": features.name,
        "real_floor": features.distance(train_images, real),
        "autoencoder_floor": rebuilt["frechet"],
        "autoencoder_sharpness": rebuilt["sharpness"],
        "refined_floor": refined["frechet"],
        "refined_sharpness": refined["sharpness"],
        "samples": [],
    }
    index = torch.arange(len(real))
    seeds = ops.sample_seeds(0, index)
    for name, source in latent_sources(model).items():
        made = batched(lambda chunk, source=source: source.decode(source.draw_latents(chunk)), seeds)
        result["samples"].append(quality(made, latents=name, sampler=None, steps=None))
        for walk in walks:
            denoise = lambda i, made=made, walk=walk: model.denoise(made[i], seeds=seeds[i], **walk)  # noqa: E731
            images = batched(denoise, index, AT_ONCE, label=label)
            result["samples"].append(quality(images, latents=name, sampler=walk["sampler"], steps=walk["steps"]))
    return result


def evaluate_refiner(
    model: DiffusionVAE,
    train_set,
    test_set,
    *,
    num_images: int = 1000,
    walks: Sequence[dict] | None = None,
    features: Features | None = None,
    progress: bool = True,
) -> dict:
    """Held-out images through both stages, and new images, as one JSON-ready dictionary. Arguments as of `evaluate`.

    Args:
        walks: Arguments of `DiffusionVAE.denoise`, by default `WALKS`; held-out images are refined by the first.

    Returns:
        "reconstructions": the `likeness` of x_hat ("decoded") and of what became of it ("refined"), sharpness relative to the
        images; "generation": see `refined_generation`; the classifier's accuracy and the factors' names where they are known.
    """
    walks = checked_walks(model, walks)
    train_images, real, factors = as_many(train_set, test_set, num_images)
    features = features or usual_features(train_set, test_set, progress=progress)
    made = before_and_after(model, real, label="refining" if progress else None, **walks[0])
    found = [likeness(features, images, real, factors, mean_energy(real)) for images in made]
    return {
        "reconstructions": dict(zip(("decoded", "refined"), found, strict=True)),
        "generation": refined_generation(model, features, train_images, real, walks, progress=progress),
        "classifier_accuracy": features.accuracy,
        "factor_names": list(test_set.factor_names) if factors is not None else None,
    }
