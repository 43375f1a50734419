"""Pictures along the way of a training: what a model makes of a few images, and new ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from multibeta import data, variational
from multibeta.diffusion_vae import CapacityVAE
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.pipelines import DiffusionVAE, Pipeline

GRID_BETAS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
STEPS = 20  # of the sampler, where the grid has as many


def shown_images(train_images: data.Dataset, test_images: data.Dataset) -> Tensor:
    """Images to be shown, (N, C, H, W) in [-1, 1]: held-out ones where there are any."""
    images = test_images if len(test_images) else train_images
    return data.to_float(data.read_images(images, range(min(8, len(images)))))


@torch.no_grad()
def save_reconstructions(vae: MultiBetaVAE, images: Tensor, path: Path) -> None:
    """Image grid: the images, and below them g(f(x, beta) + sigma eps, beta) for rising beta."""
    images = images.to(next(vae.parameters()).device)
    noise = torch.randn(len(images), *vae.config.latent_shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    rows = [images]
    for beta in GRID_BETAS:
        sigma = vae.sigma(torch.tensor([beta], device=images.device))
        rows.append(vae.decode(variational.sample(vae.encode(images, beta), sigma, noise), beta))
    labels = ["input", *(f"beta {beta:g}" for beta in GRID_BETAS)]
    data.save_grid(torch.cat(rows), path, columns=len(images), labels=labels)


def save_samples(model: Pipeline, path: Path) -> None:
    """Image grid of 32 samples by the model's usual sampler."""
    data.save_grid(model.generate(32), path, columns=8)


@torch.no_grad()
def save_sketches(vae: CapacityVAE, images: Tensor, path: Path) -> None:
    """Image grid: the images, and below them what the means of their latents decode to."""
    images = images.to(next(vae.parameters()).device)
    rows = torch.cat([images, vae.decode(vae.encode(images))])
    data.save_grid(rows, path, columns=len(images), labels=["input", "decoded"])


def save_refinements(model: DiffusionVAE, images: Tensor, path: Path) -> None:
    """Image grid: images, their reconstructions, these refined, and new images, by `ddim`."""
    steps = min(STEPS, model.num_steps)
    reconstructions = model.decode(model.encode(images))
    rows = {"input": images.to(model.device), "decoded": reconstructions}
    rows |= {"refined": model.denoise(reconstructions, steps=steps), "new": model.generate(len(images), steps=steps)}
    data.save_grid(torch.cat(list(rows.values())), path, columns=len(images), labels=list(rows))
