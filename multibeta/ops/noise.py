"""`standard_normal`: noise that belongs to the sample, by Philox from its seed; and the seeds of samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from multibeta.ops.registry import Example, Op, add, cpp_kernel
from multibeta.seeds import as_seed, as_seeds

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def _multiply_high_low(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    # int64 holds a 32 x 32 bit product only in halves of 16 bits
    low_part = multiplier * (x & 0xFFFF)
    high = (multiplier * (x >> 16) + (low_part >> 16)) >> 16
    return high & _MASK32, (multiplier * x) & _MASK32


def philox(key: Tensor, counter: tuple[Tensor | int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words for a 64-bit key and a 128-bit counter.

    Args:
        key: int64, any shape; its 64 bits are the key.
        counter: Four 32-bit words, low first, ints or int64 tensors that broadcast with `key`.

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    key_low, key_high = key & _MASK32, (key >> 32) & _MASK32
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, device=key.device) + 0 * key for c in counter))
    for _ in range(10):
        high0, low0 = _multiply_high_low(_PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key_low, low1, high0 ^ c3 ^ key_high, low0
        key_low, key_high = (key_low + _PHILOX_WEYL[0]) & _MASK32, (key_high + _PHILOX_WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def standard_normal_reference(seeds: Tensor, step: int, shape: tuple[int, ...], *, stream: int = 0) -> Tensor:
    """`standard_normal` in plain PyTorch."""
    size = math.prod(shape)
    quad = torch.arange((size + 3) // 4, device=seeds.device)
    words = philox(seeds[:, None], (quad[None], step, stream, 0))
    uniform = [(word >> 8).float() for word in words]
    normals = []
    for first, second in ((uniform[0], uniform[1]), (uniform[2], uniform[3])):
        radius = torch.sqrt(-2 * torch.log((first + 1) * 2**-24))  # (0, 1]: the logarithm is finite
        angle = second * (2 * math.pi * 2**-24)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1).flatten(1)[:, :size].reshape(-1, *shape)


def _standard_normal_examples() -> Iterator[Example]:
    for count, shape in ((3, (4, 8, 8)), (1, (3, 5, 5))):  # usual; a size that four does not divide
        yield (torch.arange(count) - 1, 7, shape), {"stream": 1}


STANDARD_NORMAL = add(
    Op("standard_normal", "noise", standard_normal_reference, _standard_normal_examples, [cpp_kernel("standard_normal")])
)


def standard_normal(seeds: Tensor, step: int, shape: tuple[int, ...], *, stream: int = 0) -> Tensor:
    """Standard normal noise that belongs to the sample: a function of (seed, step, position) alone.

    Four consecutive positions of the flattened sample share one Philox block, Box-Muller turns its words into normals.

    Args:
        seeds: One 64-bit seed per sample, (N,) int64.
        step: Grid index, 0 <= step < 2^32.
        shape: Shape of one sample.
        stream: Separates uses of one seed: 0 is the sampler's fresh noise, 1 the initial latent, 2 the encoder's noise, 3 the
            component of a mixture, 4 the probes of a trace.

    Returns:
        (N, *shape), float32. Every backend makes it of the same Philox words; their logarithms, sines and cosines round apart in
        the last places, by less than 1e-6 of a normal.

    Raises:
        ValueError: Seeds that are no integers, or no row of them.
    """
    seeds = as_seeds(seeds)
    if seeds.dim() != 1:
        raise ValueError(f"one seed per sample is needed, (N,), got {tuple(seeds.shape)}")
    return STANDARD_NORMAL(seeds, step, shape, stream=stream)


def sample_seeds(seed: int, indices: Tensor) -> Tensor:
    """A 64-bit seed per sample from one user seed and the sample's index.

    Args:
        seed: Any integer, modulo 2^64: see `seeds.as_seed`.
        indices: Integers, (N,), non-negative.

    Returns:
        (N,) int64.
    """
    indices = as_seeds(indices)
    key = torch.full_like(indices, as_seed(seed))
    low, high, _, _ = philox(key, (indices & _MASK32, (indices >> 32) & _MASK32, 0, 0xFFFFFFFF))
    return low | (high << 32)
