"""Directions and paths in a latent space: the latent half of MultiBeta Algorithms 4 and 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrincipalDirections:
    """Principal components of a set of encodings (MultiBeta C.2).

    Attributes:
        mean: (c, h, w).
        directions: Unit vectors, largest variance first, (K, c, h, w).
        deviations: Standard deviation of the encodings along each, (K,).
    """

    mean: Tensor
    directions: Tensor
    deviations: Tensor


def principal_directions(encodings: Tensor, num_directions: int | None = None) -> PrincipalDirections:
    """PCA of encodings (N, c, h, w) at one beta: the candidates for the direction of MultiBeta Algorithm 4.

    The sign of a direction makes its largest entry positive. Raises `ValueError` for fewer than two encodings or more
    directions than there are dimensions or encodings to find them.
    """
    flat = encodings.flatten(1).double()
    available = min(len(flat) - 1, flat.shape[1])
    if available < 1:
        raise ValueError(f"principal directions need at least 2 encodings, got {len(flat)}")
    count = available if num_directions is None else num_directions
    if not 1 <= count <= available:
        raise ValueError(f"num_directions must lie between 1 and {available}, got {num_directions}")
    mean = flat.mean(0)
    _, singular_values, axes = torch.linalg.svd(flat - mean, full_matrices=False)
    axes = axes[:count]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    deviations = singular_values[:count] / (len(flat) - 1) ** 0.5
    shape = encodings.shape[1:]
    return PrincipalDirections(mean.view(shape).to(encodings), axes.view(-1, *shape).to(encodings), deviations.to(encodings))


def slerp(first: Tensor, second: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical linear interpolation between vectors (MultiBeta Algorithm 5): (N, ...) and (N, ...) to (N, ...).

    Args:
        weight: 0 gives `first`, 1 gives `second`; a number or (N,).

    Nearly parallel vectors are interpolated linearly, which is the limit.
    """
    a, b = first.flatten(1), second.flatten(1)
    weight = torch.as_tensor(weight, dtype=a.dtype, device=a.device).expand(len(a))[:, None]
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)[:, None]
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    nearly_parallel = sine < 1e-4
    safe = torch.where(nearly_parallel, torch.ones_like(sine), sine)
    on_first = torch.where(nearly_parallel, 1 - weight, torch.sin((1 - weight) * angle) / safe)
    on_second = torch.where(nearly_parallel, weight, torch.sin(weight * angle) / safe)
    return (on_first * a + on_second * b).view_as(first)


def interpolate(first: Tensor, second: Tensor, weight: float | Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """Latents between two sets (MultiBeta Algorithm 5, lines 2-3): slerp in the chosen channels, `first` elsewhere.

    Args:
        first, second: (N, c, h, w).
        weight: 0 ... 1, a number or (N,).
        dims: Channels to interpolate (for a vector latent: its dimensions); None for all.
    """
    if dims is None:
        return slerp(first, second, weight)
    bad = [d for d in dims if not 0 <= d < first.shape[1]]
    if bad:
        raise ValueError(f"dims must lie between 0 and {first.shape[1] - 1}, got {bad}")
    result, dims = first.clone(), list(dims)
    result[:, dims] = slerp(first[:, dims], second[:, dims], weight)
    return result


def manipulate(latents: Tensor, direction: Tensor, strength: float | Tensor) -> Tensor:
    """Latents moved along a direction (MultiBeta Algorithm 4, line 2): z + strength * direction.

    Args:
        latents: (N, c, h, w).
        direction: (c, h, w) or (N, c, h, w).
        strength: A number or (N,).
    """
    if direction.shape[-3:] != latents.shape[1:]:
        raise ValueError(f"direction must have the latent's shape {tuple(latents.shape[1:])}, got {tuple(direction.shape)}")
    strength = torch.as_tensor(strength, dtype=latents.dtype, device=latents.device)
    return latents + strength.expand(len(latents)).view(-1, 1, 1, 1) * direction
