"""The accelerated layers of torch, and the steps that the blocks make of them."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from multibeta import inference, ops
from multibeta.acceleration.base import Accelerated, note, note_op, untouched
from multibeta.acceleration.packing import PackedLayer, channels_last, compute_dtype, folds, packed, why_original


class Conv2d(PackedLayer):
    """nn.Conv2d with an optional sum, residual + conv(x)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        reason = why_original(self, input, 4)
        note(f"conv: {reason or 'packed'}")
        if reason:
            y = super().forward(input)
            return y if residual is None else residual + y
        dtype = compute_dtype(input)
        x, layer = channels_last(input, dtype), packed(self, input, "conv")
        if residual is None:
            return layer(x)
        if residual.dtype != dtype:  # under autocast: the sum keeps its precision
            return residual + layer(x)
        return layer(x, channels_last(residual, dtype))


class Linear(PackedLayer):
    """nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        reason = why_original(self, input, None)
        note(f"linear: {reason or 'packed'}")
        if reason:
            return super().forward(input)
        return packed(self, input, "linear")(input.to(compute_dtype(input)))


class Pointwise(PackedLayer):
    """nn.Conv1d of one tap: a linear layer on (N, C, L), whose result lies as (N, L, C)."""

    def forward(self, input: Tensor) -> Tensor:
        reason = why_original(self, input, 3)
        note(f"conv: {reason or 'packed'}")
        if reason:
            return super().forward(input)
        return packed(self, input, "pointwise")(input.to(compute_dtype(input)).transpose(1, 2)).transpose(1, 2)


class GroupNorm(Accelerated):
    """nn.GroupNorm, and GroupNorm32 of latent-diffusion, whose arithmetic is float32 as that of the op always is."""

    num_groups: int
    eps: float
    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        y = _fused_norm(self, input, "none")
        return super().forward(input) if y is None else y


def _fused_norm(norm: GroupNorm, x: Tensor, activation: str, shift: Tensor | None = None) -> Tensor | None:
    """activation(norm(x + shift)) by a kernel of `ops.group_norm_act`, or None where none accepts the call."""
    arguments, options = (x, norm.weight, norm.bias, norm.num_groups, norm.eps), {"shift": shift, "activation": activation}
    note_op("group_norm_act", *arguments, **options)
    function, served, _ = ops.find("group_norm_act").choose(*arguments, **options)
    return None if served == "reference" else function(*arguments, **options)


def _activation_name(activation: object) -> str | None:
    """The name that `ops.group_norm_act` has for an activation, or None."""
    if activation is F.silu:
        return "silu"
    names = {"SiLU": "silu", "FP32SiLU": "silu", "Sigmoid": "sigmoid", "Identity": "none"}
    if isinstance(activation, nn.Module) and untouched(activation):
        return names.get(type(activation).__name__)
    return None


def norm_act(norm: nn.Module, activation: Callable[[Tensor], Tensor], x: Tensor, shift: Tensor | None = None) -> Tensor:
    """activation(norm(x + shift)): in one pass where a kernel serves it, else by the modules themselves.

    Args:
        x: (N, C, H, W).
        shift: (N, C).
    """
    if isinstance(norm, GroupNorm) and untouched(norm):
        name = _activation_name(activation)
        y = _fused_norm(norm, x, name or "none", shift)
        if y is not None:
            return y if name else activation(y)
    return activation(norm(x if shift is None else x + shift[:, :, None, None]))


def add(conv: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """residual + conv(x), in one pass where `conv` can."""
    if isinstance(conv, Conv2d) and untouched(conv):
        return conv.forward(x, residual)
    return residual + conv(x)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`ops.attention` of (N, L, heads, head_dim), heads joined: (N, L, heads head_dim)."""
    note_op("attention", query, key, value)
    return ops.attention(query, key, value).flatten(2)


def doubled(conv: nn.Module, x: Tensor) -> Tensor | None:
    """conv of x (N, C, H, W) doubled by nearest neighbour, folded where that is faster; None where it cannot be folded."""
    if not (isinstance(conv, Conv2d) and untouched(conv)) or why_original(conv, x, 4):
        return None
    if (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) != ((3, 3), (1, 1), (1, 1), (1, 1), 1):
        return None
    x = channels_last(x, compute_dtype(x))

    def folded() -> Tensor:
        return inference.phases_to_pixels(packed(conv, x, "folded")(x))

    def plain() -> Tensor:
        return conv.forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    faster, key = folds.setdefault(conv, {}), (x.shape, x.dtype)
    if key not in faster:
        times, _ = ops.measure({"folded": folded, "plain": plain}, x.device, 3, ops.latency_ms)
        faster[key] = bool(times) and min(times, key=times.__getitem__) == "folded"
    note("upsample: folded" if faster[key] else "upsample: plain is faster than folded")
    return folded() if faster[key] else plain()
