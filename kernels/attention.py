"""Attention by the libraries that have it: the backends of PyTorch's scaled_dot_product_attention, and xformers.

Whether one is available is learned by a real call, once for each device, dtype and head dimension.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .probes import first_line, probe

SDPA_BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}

SHORT = 512  # between 256 positions, where the reference trains faster, and 1024, where it does not


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`ops.attention` by the backend PyTorch prefers."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def accepts_sdpa(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Every call but these: on the CPU its backward in bfloat16 takes up to 17 times the reference's for short sequences."""
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if wants_gradient and query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[1] < SHORT:
        return f"on the CPU its bfloat16 backward is slower than the reference below {SHORT} positions"
    return None


def pinned_sdpa(name: str) -> tuple[Callable[..., Tensor], Callable[..., str | None]]:
    """`ops.attention` and its `accepts`, by one backend of PyTorch on CUDA: a key of `SDPA_BACKENDS`."""
    backend = SDPA_BACKENDS[name]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(query, key, value)

    @probe
    def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return _failure(attention, device, dtype, head_dim)

    def accepts(query: Tensor, key: Tensor, value: Tensor) -> str | None:
        if not query.is_cuda:
            return f"query is on {query.device.type}, pinned for CUDA only"
        return why_not(*_case(query))

    return attention, accepts


def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`ops.attention` by xformers' memory_efficient_attention, which dispatches to FA3, FA2 or cutlass."""
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    return memory_efficient_attention(query, key, value)


@probe
def _why_not_xformers(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return _failure(xformers, device, dtype, head_dim)


def accepts_xformers(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """CUDA tensors, where xformers is installed and has an operator for them."""
    if not query.is_cuda:
        return f"query is on {query.device.type}, xformers needs CUDA"
    return _why_not_xformers(query.device, query.dtype, query.shape[-1])


def _case(query: Tensor) -> tuple[torch.device, torch.dtype, int]:
    """What availability depends on; `index` makes the head dimension a number where torch.compile has a symbol for it."""
    return query.device, query.dtype, operator.index(query.shape[-1])


def _failure(attention: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `attention` fails on a small call, None where it works."""
    try:
        small = torch.ones(1, 16, 1, head_dim, device=device, dtype=dtype)
        attention(small, small, small)
    except (ImportError, RuntimeError, AssertionError, ValueError) as error:
        return first_line(error)
    return None
