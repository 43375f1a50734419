"""Directions that DisCo learns in the decoder of a trained model (MultiBeta D.1)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multibeta import data, disco, variational
from multibeta import latents as latent_space
from multibeta.latents import NamedDirections
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.pipelines import Pipeline
from multibeta.pipelines.directions import encodings_of
from multibeta.pipelines.display import Traversals
from multibeta.processors import images_at_once
from multibeta.training import Batch, TrainingOptions, train

STEPS, BATCH_SIZE, WIDTH = 400, 64, 32  # published: 70,000 x 128, a contrastor of width 64
COORDINATES = 64  # principal ones, in which directions of any latent are learned
RANKED_IMAGES = 16  # that say how much a direction changes


def disco_options(steps: int, batch_size: int, seed: int) -> TrainingOptions:
    """How DisCo is trained here: ten times the published learning rate, for a hundredth of the steps."""
    return TrainingOptions(steps=steps, batch_size=batch_size, learning_rate=1e-3, ema_decay=0.0, clip_norm=0.0, seed=seed)


def train_disco(
    vae: Any,
    beta: float | None,
    images: data.Dataset,
    options: TrainingOptions,
    folder: Path,
    *,
    width: int,
    num_directions: int | None = None,
    basis: Tensor | None = None,
    context: dict[str, Any] | None = None,
    **training: Any,
) -> disco.DisCo:
    """DisCo on the frozen decoder of a VAE, at beta where it has several levels.

    Args:
        vae: A `MultiBetaVAE`, whose latents are encodings of the images, sampled; or another VAE, whose latents are N(0, I).
        beta: None is 0.
        width: Of the contrastor.
        num_directions, basis: See `disco.Navigator`.
        context, training: See `training.train`.
    """
    beta, device = beta or 0.0, next(vae.parameters()).device

    def sample(batch: Batch, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(batch.images), *vae.config.latent_shape, generator=generator).to(device)
        if not isinstance(vae, MultiBetaVAE):
            return noise
        sigma = vae.sigma(torch.tensor([beta], device=device))
        return variational.sample(vae.encode(batch.images, beta).float(), sigma, noise)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        navigator = disco.Navigator(vae.config.latent_shape, num_directions, basis=basis)
        module = disco.DisCo(navigator, disco.Contrastor(vae.config.image_channels, vae.config.resolution, width=width))
    decode = functools.partial(vae.decode, beta=beta) if isinstance(vae, MultiBetaVAE) else vae.decode
    objective = disco.DisCoObjective(module.to(device), decode, sample)
    module.load_state_dict(train(objective, images, options, folder, context=context, **training))
    return module.eval()


def learn_directions(
    model: Pipeline,
    images: data.Dataset,
    folder: str | Path,
    beta: float | str | None = None,
    num_directions: int | None = None,
    *,
    steps: int = STEPS,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> NamedDirections:
    """Directions that change images in ways that a small network learns to tell apart (DisCo), at beta.

    They are learned among the principal directions of the latents, in units of their deviations, by `train_disco`; and named by
    how much a step of one standard deviation changes decoded images, "disco 0" most.

    Args:
        images: Whose encodings say where latents lie; the model was best trained on them.
        folder: Receives checkpoint/ and metrics.jsonl.
        beta: As of `named_directions`.
        num_directions: 2 to 64, and no more than the latent has dimensions; by default 16 of so many.
        steps: Updates of 64 latents.
        resume: Continue from the checkpoint in `folder`, if there is one.

    Raises:
        ValueError: Latents that do not differ, too many directions, images whose side is not 4 times a power of two; and what
            `training.train` raises.
    """
    level, _, encodings = encodings_of(model, images, beta)
    found = latent_space.principal_directions(encodings)
    basis = (found.directions * found.deviations.view(-1, 1, 1, 1))[:COORDINATES]
    count = min(16, len(basis)) if num_directions is None else num_directions
    module = train_disco(
        model.vae,
        level,
        images,
        disco_options(steps, min(BATCH_SIZE, len(images)), seed),
        Path(folder),
        width=WIDTH,
        num_directions=count,
        basis=basis,
        context={"latents": model.latent_digest(), "beta": level, "num_directions": count},
        resume=resume,
        progress=progress,
        description="DisCo",
    )
    with torch.no_grad():
        directions = [latent_space.in_deviations(each, encodings) for each in module.navigator.directions()]
    changes = [visible_change(model, encodings[:RANKED_IMAGES], direction, level) for direction in directions]
    ranked = sorted(range(count), key=changes.__getitem__, reverse=True)
    names = tuple(f"disco {number}" for number in range(count))
    ordered = torch.stack([directions[each] for each in ranked])
    return NamedDirections(names, ordered, level, "disco", model.latent_digest(), Traversals(model, level, encodings[:1]))


def visible_change(model: Pipeline, latents: Tensor, step: Tensor, beta: float | None) -> float:
    """Root mean square difference between images decoded one step ahead of latents (N, c, h, w) and one step behind."""
    chunks = torch.cat([latents + step, latents - step]).split(images_at_once(model.vae.config.resolution, model.device))
    ahead, behind = torch.cat([model.decode(chunk, beta) for chunk in chunks]).chunk(2)
    return float((ahead - behind).square().mean().sqrt())
