"""What a `group_norm_act` operator needs beside its kernels, whichever backend it comes from: shapes for tracing, and autograd.

A backend defines two operators of one schema each:

    multibeta::group_norm_act_<backend>(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? shift,
        Tensor? residual, str activation) -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)
    multibeta::group_norm_act_backward_<backend>(Tensor grad, Tensor total, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,
        Tensor? shift, str activation) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_shift)

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


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, _, shift, residual, activation = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, bias, mean, rstd, shift)
    ctx.has_residual, ctx.activation = residual is not None, activation


def register(backend: str) -> None:
    """Give the operators of `backend`, once they are defined, their fakes and their autograd formula."""
    name, backward_name = f"group_norm_act_{backend}", f"group_norm_act_backward_{backend}"
    backward_op = getattr(torch.ops.multibeta, backward_name)

    def backward(ctx, grad_y, grad_total, grad_mean, grad_rstd):
        *saved, shift = ctx.saved_tensors
        grad_x, grad_weight, grad_bias, grad_shift = backward_op(grad_y, *saved, shift, ctx.activation)
        if ctx.has_residual:
            grad_x = grad_x + grad_total
        grad_residual = grad_x if ctx.has_residual else None
        return grad_x, grad_weight, grad_bias, None, None, None if shift is None else grad_shift, grad_residual, None

    torch.library.register_fake(f"multibeta::{name}", _fake_forward)
    torch.library.register_fake(f"multibeta::{backward_name}", _fake_backward)
    torch.library.register_autograd(f"multibeta::{name}", backward, setup_context=_setup_context)
