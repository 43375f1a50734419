"""Attention by the libraries that have it: the backends of PyTorch's scaled_dot_product_attention, and xformers.

Whether one is available is learned by a real call, once for each kind of call: see `_case`.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

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
    def why_not(*case: Any) -> str | None:
        return _failure(attention, *case)

    def accepts(query: Tensor, key: Tensor, value: Tensor) -> str | None:
        if not query.is_cuda:
            return f"query is on {query.device.type}, pinned for CUDA only"
        return why_not(*_case(query, key, value))

    return attention, accepts


def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`ops.attention` by xformers' memory_efficient_attention, which dispatches to FA3, FA2 or cutlass."""
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    return memory_efficient_attention(query, key, value)


@probe
def _why_not_xformers(*case: Any) -> str | None:
    return _failure(xformers, *case)


def accepts_xformers(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """CUDA tensors, where xformers is installed and has an operator for them."""
    if not query.is_cuda:
        return f"query is on {query.device.type}, xformers needs CUDA"
    return _why_not_xformers(*_case(query, key, value, autocast=False))


def _case(
    query: Tensor, key: Tensor, value: Tensor, *, autocast: bool = True
) -> tuple[torch.device, torch.dtype, int, bool, bool]:
    """What availability depends on: device, the dtype of the products, head dimension, more than one position, and gradients.

    Args:
        autocast: Whether the library's function heeds it.
    """
    dtype, kind = query.dtype, query.device.type
    if autocast and dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    wants_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    # index makes the head dimension a number where torch.compile has a symbol for it
    return query.device, dtype, operator.index(query.shape[-1]), bool(key.shape[1] > 1), wants_gradient


def _failure(
    attention: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, head_dim: int, several: bool, wants_gradient: bool
) -> str | None:
    """Why `attention` fails on a small call, None where it works."""
    try:
        small = torch.ones(1, 16 if several else 1, 1, head_dim, device=device, dtype=dtype, requires_grad=wants_gradient)
        with warnings.catch_warnings():  # by which torch tells why each backend declines, one after the other
            warnings.simplefilter("ignore")
            result = attention(small, small, small)
            if wants_gradient:
                result.sum().backward()
    except (ImportError, RuntimeError, AssertionError, ValueError) as error:
        return first_line(error)
    return None
