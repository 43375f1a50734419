"""`attention`: scaled dot-product attention."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from multibeta.kernels import attention as attention_kernels
from multibeta.ops.registry import Example, Kernel, Op, add, cpp_kernel


def _attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(query.shape[-1])
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return torch.einsum("nhqk,nkhd->nqhd", weights, value)


def _attention_examples() -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 64, 4, 32), (1, 17, 1, 8)):  # usual; odd length, one head
        yield tuple(torch.randn(3, *shape, generator=generator)), {}


def _kernels() -> list[Kernel]:
    pinned = [Kernel("sdpa", *attention_kernels.pinned_sdpa(name), name=name) for name in attention_kernels.SDPA_BACKENDS]
    return [
        cpp_kernel("attention"),
        *pinned,
        Kernel("xformers", attention_kernels.xformers, attention_kernels.accepts_xformers),
        Kernel("sdpa", attention_kernels.sdpa, attention_kernels.accepts_sdpa),
    ]


ATTENTION = add(Op("attention", "attention", _attention_reference, _attention_examples, _kernels(), measured=True))


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(head_dim)) value.

    Gradients of gradients (create_graph=True) need `backend("reference")`: torch has none for its fused kernels, and says so.

    Args:
        query, key, value: (N, L, heads, head_dim).

    Returns:
        (N, L, heads, head_dim).
    """
    return ATTENTION(query, key, value)
