"""What the objectives of ordinary VAEs share: the KL to their prior, and the capacity it is held to."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.distributions import Normal, kl_divergence


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
