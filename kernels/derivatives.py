"""What a `group_norm_act` operator needs beside its kernels, whichever backend it comes from: shapes for tracing, and autograd.

A backend defines two operators of one schema each:

    multibeta::group_norm_act_<backend>(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? shift,
        Tensor? residual, str activation) -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)
    multibeta::group_norm_act_backward_<backend>(Tensor grad, Tensor total, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,
        Tensor? shift, str activation) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_shift)

The backward operator has no derivative of its own: where one is asked for (create_graph=True), `gradients` takes its place.

`total` is x + residual, or empty without a residual; `mean` and `rstd` are (N, num_groups) float32, of total + shift;
`grad_shift` is (N, C), or empty without a shift. y and total have the memory format of x, grad_x has that of total.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last where `x` lies so in memory, contiguous where it does; channels-last for every other layout."""
    if x.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last


def _fake_forward(x, weight, bias, num_groups, eps, shift, residual, activation):
    y = torch.empty_like(x, memory_format=memory_format(x))
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    statistics = x.new_empty(x.shape[0], num_groups, dtype=torch.float32)
    return y, total, statistics, torch.empty_like(statistics)


def _fake_backward(grad, total, weight, bias, mean, rstd, shift, activation):
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


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, bias, num_groups, eps, shift, residual, activation = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, bias, mean, rstd, shift)
    ctx.has_residual, ctx.num_groups, ctx.eps, ctx.activation = residual is not None, num_groups, eps, activation
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def register(backend: str) -> None:
    """Give the operators of `backend`, once they are defined, their fakes and their autograd formula."""
    name, backward_name = f"group_norm_act_{backend}", f"group_norm_act_backward_{backend}"
    backward_op = getattr(torch.ops.multibeta, backward_name)

    def backward(ctx, grad_y: Tensor | None, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
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
