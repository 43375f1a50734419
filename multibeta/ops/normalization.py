"""`group_norm_act`: GroupNorm, its activation and the time embedding before it, of one tensor or of two next to each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from multibeta.kernels import shared
from multibeta.ops.registry import Example, Kernel, Op, active_transform, add, cpp_kernel, triton_kernel

ACTIVATIONS = ("sigmoid", "silu", "none")


def total_of(x: Tensor, x_bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x + x_bias + residual, (N, C, H, W), in the dtype of x."""
    total = x if x_bias is None else x + x_bias.view(-1, 1, 1).to(x.dtype)
    return total if residual is None else total + residual


def _norm_act(
    total: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, shift: Tensor | None, activation: str
) -> Tensor:
    h = total if shift is None else total + shift[:, :, None, None].to(total.dtype)
    norm = F.group_norm if active_transform() is None else shared.group_norm
    h = norm(h, num_groups, weight, bias, eps)
    if activation == "sigmoid":
        return torch.sigmoid(h)
    return F.silu(h) if activation == "silu" else h


def _group_norm_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "sigmoid",
) -> Tensor | tuple[Tensor, Tensor]:
    total = total_of(x, x_bias, residual)
    h = _norm_act(total, weight, bias, num_groups, eps, shift, activation)
    return h if x_bias is None and residual is None else (h, total)


def _group_norm_act_pair_reference(
    x: Tensor,
    beside: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "sigmoid",
) -> Tensor | tuple[Tensor, Tensor]:
    total = total_of(x, x_bias, residual)
    h = _norm_act(torch.cat([total, beside], dim=1), weight, bias, num_groups, eps, shift, activation)
    return h if x_bias is None and residual is None else (h, total)


def _group_norm_act_examples() -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    for shape, groups in (((2, 64, 16, 16), 32), ((3, 24, 5, 7), 1), ((1, 48, 1, 1), 8)):  # usual; one group, odd; 1x1
        x, shift = torch.randn(shape, generator=generator), torch.randn(shape[:2], generator=generator)
        affine = torch.randn(2, shape[1], generator=generator)
        yield (x, affine[0], affine[1], groups), {"shift": shift, "activation": "silu"}


def _group_norm_act_pair_examples() -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    for channels, beside, groups in ((64, 32, 12), (6, 3, 3)):  # usual; groups of three channels
        parts = [torch.randn(2, c, 5, 6, generator=generator).to(memory_format=torch.channels_last) for c in (channels, beside)]
        affine = torch.randn(2, channels + beside, generator=generator)
        yield (*parts, affine[0], affine[1], groups), {"activation": "silu"}


def _kernels(op_name: str) -> list[Kernel]:
    return [triton_kernel("group_norm_act", op_name), cpp_kernel(op_name)]


GROUP_NORM_ACT = add(
    Op("group_norm_act", "group_norm", _group_norm_act_reference, _group_norm_act_examples, _kernels("group_norm_act"))
)
GROUP_NORM_ACT_PAIR = add(
    Op(
        "group_norm_act_pair",
        "group_norm",
        _group_norm_act_pair_reference,
        _group_norm_act_pair_examples,
        _kernels("group_norm_act_pair"),
    )
)


@overload
def group_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    x_bias: None = None,
    residual: None = None,
    activation: str = "sigmoid",
) -> Tensor: ...
@overload
def group_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "sigmoid",
) -> Tensor | tuple[Tensor, Tensor]: ...
def group_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "sigmoid",
) -> Tensor | tuple[Tensor, Tensor]:
    """activation(GroupNorm(x + shift)): normalisation, non-linearity and time embedding of one half of a ResNet block.

    With `x_bias` or `residual`, what a convolution left to its reader, the norm is that of total + shift, total = x + x_bias +
    residual, and the total is returned as well. `blocks.Sum` passes both, in networks that `inference.prepare` made for CUDA.

    Args:
        x: (N, C, H, W).
        weight, bias: Affine parameters, (C,).
        num_groups: Groups; must divide C.
        shift: Projected time embedding added before the norm, (N, C), or None.
        x_bias: Bias of the convolution that made x without it, (C,), or None.
        residual: (N, C, H, W) that x is to be added to, in the dtype of x, or None.
        activation: "sigmoid" (as MultiBeta prints), "silu" (as the code it extends) or "none".

    Returns:
        (N, C, H, W), in the dtype and memory format of `x`; with `x_bias` or `residual` the pair (result, total).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.shape[1] % num_groups:
        raise ValueError(f"channels must divide into groups, got {x.shape[1]} channels and {num_groups} groups")
    options = {"shift": shift, "x_bias": x_bias, "residual": residual, "activation": activation}
    return GROUP_NORM_ACT(x, weight, bias, num_groups, eps, **options)


def group_norm_act_pair(
    x: Tensor,
    beside: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "sigmoid",
) -> Tensor | tuple[Tensor, Tensor]:
    """`group_norm_act` of x and `beside` side by side in channels, whose concatenation is made only where no kernel accepts them.

    Args:
        x, beside: (N, C1, H, W) and (N, C2, H, W).
        weight, bias, num_groups, eps, shift, activation: As for `group_norm_act`, of C1 + C2 channels.
        x_bias, residual: As for `group_norm_act`, of x alone.

    Returns:
        (N, C1 + C2, H, W); with `x_bias` or `residual` the pair (result, total), of which the total has C1 channels.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    options = {"shift": shift, "x_bias": x_bias, "residual": residual, "activation": activation}
    kernel = GROUP_NORM_ACT_PAIR.kernel_for(x, beside, weight, bias, num_groups, eps, **options)
    if kernel is not None:
        return kernel.function(x, beside, weight, bias, num_groups, eps, **options)
    total = total_of(x, x_bias, residual)
    both = torch.cat([total, beside], dim=1)
    y = group_norm_act(both, weight, bias, num_groups, eps, shift=shift, activation=activation)
    return y if x_bias is None and residual is None else (y, total)
