"""The words that the Triton kernels make their noise of, to compare with those of the CPU."""

# Triton takes tensors for pointers and numbers for constants, and runs its own range: no type says so
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multibeta.kernels import sampler_update
from multibeta.kernels.columns import SamplerRow, pack


@triton.jit
def _store_words(seeds_ptr, words_ptr, step, QUADS: tl.constexpr):
    quad = tl.arange(0, QUADS)
    words = sampler_update.philox(tl.load(seeds_ptr + tl.program_id(0)), quad.to(tl.uint32), tl.cast(step, tl.int64))
    for i in tl.static_range(4):
        tl.store(words_ptr + (tl.program_id(0) * 4 + i) * QUADS + quad, words[i].to(tl.int64))


def words(seeds: Tensor, step: int, quads: int) -> Tensor:
    """Philox's four words for each seed (N,) and each of `quads` blocks (a power of two): (N, 4, quads), int64."""
    result = torch.empty(len(seeds), 4, quads, dtype=torch.int64, device=seeds.device)
    _store_words[(len(seeds),)](seeds, result, step, QUADS=quads)
    return result


def normals(seeds: Tensor, step: int, shape: tuple[int, int, int]) -> Tensor:
    """The fresh noise of `sampler_update` by Triton: what a row adds that takes nothing but noise, (N, *shape)."""
    zeros = torch.zeros(len(seeds), *shape, device=seeds.device)
    return sampler_update.sampler_update(zeros, zeros, zeros, pack(SamplerRow(0, 0, 0, fresh_noise=1), ()), seeds, step)
