"""What the kernels of an op share, whichever backend they come from: shapes for tracing, autograd, and what they ask of a call.

A backend of `group_norm_act` defines two operators of one schema each:

    multibeta::group_norm_act_<backend>(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? shift,
        Tensor? residual, str activation) -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)
    multibeta::group_norm_act_backward_<backend>(Tensor grad, Tensor total, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,
        Tensor? shift, str activation) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_shift)

The backward operator has no derivative of its own: where one is asked for (create_graph=True), `gradients` takes its place.

`total` is x + residual, or empty without a residual; `mean` and `rstd` are (N, num_groups) float32, of total + shift;
`grad_shift` is (N, C), or empty without a shift. y and total have the memory format of x, grad_x has that of total.

For two tensors normalised into one channels-last buffer it may define an operator that writes a slice of it:

    multibeta::group_norm_act_into_<backend>(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? shift,
        str activation, Tensor(a!) out) -> ()

x and `out` are (N, C, H, W); `out` may be a slice of the channels of a larger channels-last tensor. Its numbers are those of the
same channels in a forward over all channels of that tensor: to rounding, and by C++ bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .columns import ONE_HEAD_COLUMNS, SAMPLER_COLUMNS, TWO_HEAD_COLUMNS


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last where `x` lies so in memory, contiguous where it does; channels-last for every other layout."""
    if x.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=memory_format(x))
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    statistics = x.new_empty(x.shape[0], num_groups, dtype=torch.float32)
    return y, total, statistics, torch.empty_like(statistics)


def _fake_backward(
    grad: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_shift = total.new_empty(0) if shift is None else torch.empty_like(shift, memory_format=torch.contiguous_format)
    return (
        torch.empty_like(total, memory_format=memory_format(total)),
        torch.empty_like(weight),
        torch.empty_like(bias),
        grad_shift,
    )


def _normalised(h: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(h - mean) / deviation of each group, and 1 / deviation: (N, num_groups, -1) and (N, num_groups, 1)."""
    groups = h.reshape(h.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    return (groups - mean) * rstd, rstd


def group_norm(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch.nn.functional.group_norm by operations that have derivatives of every kind, in every layout and when compiled."""
    normal, _ = _normalised(x.to(torch.promote_types(x.dtype, torch.float32)), num_groups, eps)
    y = normal.reshape(x.shape)
    if weight is not None:
        y = y * weight[:, None, None]
    return (y if bias is None else y + bias[:, None, None]).to(x.dtype)


def gradients(
    grad: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shift: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the backward operator computes, in float32 and by operations of torch that have derivatives themselves.

    Returns:
        grad_x and the gradients of weight, bias and shift, the last None without a shift.
    """
    h = total.float() if shift is None else total.float() + shift.float()[:, :, None, None]
    normal, rstd = _normalised(h, num_groups, eps)
    scale = weight.float()[:, None, None]
    u = normal.reshape(h.shape) * scale + bias.float()[:, None, None]
    grad, s = grad.float(), torch.sigmoid(u)
    if activation == "sigmoid":
        grad = grad * s * (1 - s)
    elif activation == "silu":
        grad = grad * s * (1 + u * (1 - s))
    on_normal = (grad * scale).reshape(normal.shape)
    along = on_normal.mean(2, keepdim=True) + normal * (on_normal * normal).mean(2, keepdim=True)
    grad_x = (rstd * (on_normal - along)).reshape(h.shape)
    grad_weight = (grad * normal.reshape(h.shape)).sum((0, 2, 3)).to(weight.dtype)
    grad_shift = None if shift is None else grad_x.sum((2, 3)).to(shift.dtype)
    return grad_x.to(total.dtype), grad_weight, grad.sum((0, 2, 3)).to(bias.dtype), grad_shift


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, num_groups, eps, shift, residual, activation = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, bias, mean, rstd, shift)
    ctx.has_residual, ctx.num_groups, ctx.eps, ctx.activation = residual is not None, num_groups, eps, activation
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def register_group_norm_act(backend: str) -> None:
    """Give the operators of `backend`, once they are defined, their fakes and their autograd formula."""
    name, backward_name = f"group_norm_act_{backend}", f"group_norm_act_backward_{backend}"
    backward_op = getattr(torch.ops.multibeta, backward_name)

    def backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        total, weight, bias, mean, rstd, shift = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = grad_shift = None
        if grad_y is not None and torch.is_grad_enabled():  # to be differentiated once more, which the operator cannot
            options = (ctx.num_groups, ctx.eps, shift, ctx.activation)
            grad_x, grad_weight, grad_bias, grad_shift = gradients(grad_y, total, weight, bias, *options)
        elif grad_y is not None:
            grad_x, grad_weight, grad_bias, grad_shift = backward_op(
                grad_y, total, weight, bias, mean, rstd, shift, ctx.activation
            )
        grad_residual = None
        if ctx.has_residual:
            if grad_total is not None:
                grad_x = grad_total if grad_x is None else grad_x + grad_total
            grad_residual = grad_x
        return grad_x, grad_weight, grad_bias, None, None, None if shift is None else grad_shift, grad_residual, None

    torch.library.register_fake(f"multibeta::{name}", _fake_forward)
    torch.library.register_fake(f"multibeta::{backward_name}", _fake_backward)
    torch.library.register_autograd(f"multibeta::{name}", backward, setup_context=_setup_context)


def group_norm_act_pair(
    into: Callable[..., None],
    x: Tensor,
    beside: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    """`group_norm_act` of torch.cat([x, beside], dim=1) by `into`, which is called on each part."""
    (n, first, height, width), channels = x.shape, x.shape[1] + beside.shape[1]
    out = torch.empty(n, channels, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for part, begin, end in ((x, 0, first), (beside, first, channels)):
        groups, shift_part = part.shape[1] * num_groups // channels, None if shift is None else shift[:, begin:end]
        into(part, weight[begin:end], bias[begin:end], groups, eps, shift_part, activation, out[:, begin:end])
    return out


def pair_reason(x: Tensor, beside: Tensor, num_groups: int) -> str | None:
    """Why two tensors cannot be normalised side by side, whatever the backend, or None."""
    if x.ndim != 4 or beside.ndim != 4:
        return "x and beside must be (N, C, H, W)"
    if x.dtype != beside.dtype or x.device != beside.device:
        return "x and beside differ in dtype or device"
    (n, first, height, width), (samples, second, *spatial) = x.shape, beside.shape
    if n != samples or spatial != [height, width]:
        return "x and beside differ in more than their channels"
    if not (x.is_contiguous(memory_format=torch.channels_last) and beside.is_contiguous(memory_format=torch.channels_last)):
        return "x or beside is not channels-last"
    if num_groups < 1 or (first + second) % num_groups:
        return "channels must divide into groups"
    if first % ((first + second) // num_groups):
        return "a group lies across the boundary of x and beside"
    return None


def sampler_step_reason(
    latent: Tensor,
    network_input: Tensor,
    history: Tensor,
    output: Tensor,
    rows: Tensor,
    channel_rows: Tensor,
    condition: Tensor | None,
) -> str | None:
    """Why these tensors of a call of `multibeta.ops.sampler_step` do not belong to one latent (N, C, H, W), or None."""
    if latent.ndim != 4 or latent.numel() == 0:
        return f"latent must be (N, C, H, W) and not empty, got {tuple(latent.shape)}"
    n, channels, height, width = latent.shape
    if rows.shape[1:] not in ((SAMPLER_COLUMNS,), (channels, SAMPLER_COLUMNS)):
        return f"rows must be (S, 7) or (S, C, 7), got {tuple(rows.shape)}"
    heads, columns, given = (2, TWO_HEAD_COLUMNS, "without") if condition is None else (1, ONE_HEAD_COLUMNS, "with")
    if channel_rows.shape[1:] != (channels, columns):
        return f"channel_rows must be (S, C, {columns}) {given} a condition, got {tuple(channel_rows.shape)}"
    if output.shape != (n, heads * channels, height, width):
        return f"output must have {heads} C channels {given} a condition and be as large as latent, got {tuple(output.shape)}"
    if network_input.shape != latent.shape or history.shape != (2, *latent.shape):
        return "network_input and each half of history must have the shape of latent"
    if condition is not None and condition.shape != latent.shape:
        return f"condition must have the shape of latent, got {tuple(condition.shape)}"
    return None
