"""Gaussians: their samples, log densities and KL divergences; and the capacity that a KL can be held to."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from multibeta.draws import noise_like

PIXEL_BIN = 2 / 255  # between the values of a pixel of 8 bits in [-1, 1]


def sample(mean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """z = f + sigma eps (MultiBeta Eq. 13), the reparameterised sample of N(mean, sigma^2).

    Args:
        mean, noise: (N, C, ...).
        sigma: Per sample (N,), per sample and channel (N, C), or shaped like the mean; a first axis of 1 serves all samples.
    """
    return mean + sigma.reshape(*sigma.shape, *[1] * (mean.dim() - sigma.dim())) * noise


def draw(posterior: Normal, generator: torch.Generator) -> Tensor:
    """A sample of `posterior`, shaped like its mean, by which gradients reach it; `generator` (on the CPU) draws the noise."""
    return sample(posterior.mean, posterior.stddev, noise_like(posterior.mean, generator))


def gaussian_log_density(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """log N(x | mean, deviation^2 I) per sample, in nats: x, mean (N, ...), deviation (N,), to (N,)."""
    squared = (x - mean).float().square().flatten(1)
    return -squared.sum(1) / (2 * deviation**2) - squared.shape[1] * (deviation.log() + 0.5 * math.log(2 * math.pi))


def dequantised(log_density: Tensor, precision_trace: float | Tensor, dimensions: int) -> Tensor:
    """A lower bound on the log probability of images of 8 bits whose values have a Gaussian density, in nats.

    `data.to_float` lays the 256 values of a pixel 2/255 apart (255 steps lead from -1 to 1), so that each stands in the middle of
    a bin of width w = 2/255. With u uniform over the bins log P(x) >= E_u[log p(x + u)] + D log w (Theis et al. 2016), and of a
    Gaussian the expectation needs no draws: it is log p(x) - w^2 / 24 tr Sigma^-1.

    Args:
        log_density: log p(x) of the images in [-1, 1], (N,).
        precision_trace: tr Sigma^-1, a number or (N,).
        dimensions: D, values of an image.
    """
    return log_density - PIXEL_BIN**2 / 24 * precision_trace + dimensions * math.log(PIXEL_BIN)


def bits_per_dimension(log_probability: Tensor, dimensions: int) -> Tensor:
    """Bits that each of the `dimensions` values of an image takes, from the log probability of the image in nats."""
    return -log_probability / (dimensions * math.log(2))


def kl_to_standard_normal(mean: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma^2) || N(0, I)) per sample, in nats: mean (N, C, ...), sigma (N,), or (N, C) per channel, to (N,)."""
    sigma = sigma.reshape(len(mean), -1)
    copies = mean[0].numel() // sigma.shape[1]  # dimensions that share a sigma
    squared = mean.float().square().flatten(1).sum(1)
    return 0.5 * (squared + copies * (sigma**2 - 1 - 2 * sigma.log()).sum(1))


def kl_to_prior(posterior: Normal) -> Tensor:
    """KL(q(z|x) || N(0, I)) per image, (N,), in nats."""
    return kl_divergence(posterior, Normal(0.0, 1.0)).flatten(1).sum(1)


def capacity_at(progress: float, capacity: float, warmup: float = 1.0) -> float:
    """C after a fraction `progress` of training: linear from 0 to `capacity` at `warmup`, constant from there; 0 is at once."""
    return capacity if progress >= warmup else capacity * progress / warmup


def capacity_penalty(
    kl: Tensor,
    capacity: float,
    gamma: float,
    reduction: Literal["batch_mean", "batch_sum"] = "batch_mean",
) -> Tensor:
    """gamma |KL - C| per image (Burgess et al. 2018), a scalar.

    Args:
        kl: KL(q(z|x) || p(z)) per image, (N,), in nats.
        capacity: C, in nats.
        gamma: Cost of a nat more or less, in the unit of the reconstruction error.
        reduction: "batch_mean" compares C with the mean KL of an image, "batch_sum" with the KL of the N images together; the
            penalty is per image in both, so "batch_sum" with C is "batch_mean" with C / N.

    Raises:
        ValueError: An unknown reduction.
    """
    if reduction not in ("batch_mean", "batch_sum"):
        raise ValueError(f"reduction must be batch_mean or batch_sum, got {reduction!r}")
    if reduction == "batch_sum":
        capacity = capacity / len(kl)
    return gamma * (kl.mean() - capacity).abs()
