"""The cosine basis of a latent: its coefficients in the orthonormal discrete cosine transform (DCT-II) of each channel."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor


def cosine_matrix(size: int) -> Tensor:
    """The orthonormal matrix of the DCT-II, (size, size) float32; row k is the cosine of frequency k."""
    position = (torch.arange(size, dtype=torch.float64) + 0.5) * (math.pi / size)
    rows = torch.cos(torch.arange(size)[:, None] * position) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows.float()


def transformed(maps: Tensor, matrix: Tensor) -> Tensor:
    """Maps (..., H, H) transformed in both directions by a matrix (H, H); by its transpose they come back.

    Outside autocast: in bfloat16 the difference of two encodings is mostly rounding.
    """
    kind = maps.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        return matrix @ maps @ matrix.T


def to_coefficients(maps: Tensor, matrix: Tensor) -> Tensor:
    """Maps (N, C, H, H) as their coefficients in the basis of a matrix (H, H), each a channel of one pixel: (N, C H H, 1, 1)."""
    return transformed(maps, matrix).flatten(1)[..., None, None]


def from_coefficients(coefficients: Tensor, matrix: Tensor) -> Tensor:
    """The inverse of `to_coefficients`."""
    return transformed(coefficients.unflatten(1, (-1, *matrix.shape)).squeeze((-1, -2)), matrix.T)
