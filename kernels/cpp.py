"""The C++ kernels for the CPU: an entry for each op, and `accepts_` before it the question whether it serves a call."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from . import build, probes, shared
from .columns import SAMPLER_COLUMNS

DTYPES = (torch.float32, torch.bfloat16)
MAX_HEAD_DIM = 256  # of attention.cpp, as kMaxHeadDim

log = logging.getLogger("multibeta")
_lock = threading.Lock()
_outcome: str | None = "not tried"  # None once the operators are available, else the reason they are not


@probes.constant
def load() -> str | None:
    """None when the operators `multibeta::*_cpp` are available, building them if need be; else the reason, remembered."""
    global _outcome
    if _outcome == "not tried":
        with _lock:
            if _outcome == "not tried":
                _outcome = build.load_library()
                if _outcome is None:
                    shared.register_group_norm_act("cpp")
                    _register_fakes()
                elif not build.declined_by_user():
                    log.warning("the C++ kernels are off, and the CPU computes more slowly: %s", _outcome)
    return _outcome


def _register_fakes() -> None:
    @torch.library.register_fake("multibeta::group_norm_act_into_cpp")
    def _(
        x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, shift: Tensor | None, activation: str, out: Tensor
    ) -> None:
        return None

    @torch.library.register_fake("multibeta::attention_cpp")
    def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value.new_empty(value.shape)

    @torch.library.register_fake("multibeta::standard_normal_cpp")
    def _(seeds: Tensor, step: int, size: int, stream: int) -> Tensor:
        return seeds.new_empty(seeds.shape[0], size, dtype=torch.float32)

    @torch.library.register_fake("multibeta::sampler_update_cpp")
    def _(
        latent: Tensor,
        noise_prediction: Tensor,
        delta: Tensor,
        row: Tensor,
        seeds: Tensor,
        step: int,
        previous_noise: Tensor | None,
        previous_delta: Tensor | None,
    ) -> Tensor:
        dtype = latent.dtype
        for tensor in (noise_prediction, delta, previous_noise, previous_delta):
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        return torch.empty_like(latent, dtype=dtype)

    @torch.library.register_fake("multibeta::sampler_step_cpp")
    def _(
        latent: Tensor,
        network_input: Tensor,
        history: Tensor,
        output: Tensor,
        rows: Tensor,
        channel_rows: Tensor,
        steps: Tensor,
        counter: Tensor,
        seeds: Tensor,
        condition: Tensor | None = None,
    ) -> None:
        return None


def _declined(named: Mapping[str, Tensor | None]) -> str | None:
    """Why one of these tensors is not for the CPU kernels: its device or dtype."""
    for name, tensor in named.items():
        if tensor is None or (tensor.is_cpu and tensor.dtype in DTYPES):
            continue
        if not tensor.is_cpu:
            return f"{name} is on {tensor.device.type}, the C++ kernels serve the CPU"
        return f"{name} is {str(tensor.dtype).removeprefix('torch.')}, the C++ kernels serve float32 and bfloat16"
    return None


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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
    """`ops.group_norm_act` by the C++ kernels."""
    assert x_bias is None, "declined"
    y, total, _, _ = torch.ops.multibeta.group_norm_act_cpp(x, weight, bias, num_groups, eps, shift, residual, activation)
    return y if residual is None else (y, total)


def accepts_group_norm_act(
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
) -> str | None:
    """None when `group_norm_act` can serve the call, else the reason it declines."""
    if x_bias is not None:
        return "x_bias is given: on the CPU convolutions add their own bias"
    if weight is None or bias is None:
        return "weight and bias must be given"
    if reason := _declined({"x": x, "weight": weight, "bias": bias, "shift": shift, "residual": residual}):
        return reason
    if x.dim() != 4 or x.numel() == 0:
        return f"x must be (N, C, H, W) and not empty, got {tuple(x.shape)}"
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return "x is neither contiguous nor channels-last"
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return "residual must have the shape and dtype of x"
    if shift is not None and shift.shape != x.shape[:2]:
        return f"shift must be (N, C), got {tuple(shift.shape)}"
    return load()


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
) -> Tensor:
    """`group_norm_act` of torch.cat([x, beside], dim=1), which is never made, for inference."""
    assert x_bias is None and residual is None, "declined"
    operator = torch.ops.multibeta.group_norm_act_into_cpp
    return shared.group_norm_act_pair(operator, x, beside, weight, bias, num_groups, eps, shift, activation)


def accepts_group_norm_act_pair(
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
) -> str | None:
    """None when `group_norm_act_pair` can serve the call, else the reason it declines."""
    if x_bias is not None or residual is not None:
        return "x_bias or residual is given: on the CPU convolutions add their own"
    if reason := shared.pair_reason(x, beside, num_groups):
        return reason
    first = x.shape[1]
    if shift is not None and shift.shape != (len(x), first + beside.shape[1]):
        return f"shift must be (N, C) of both parts, got {tuple(shift.shape)}"
    shifts = (None, None) if shift is None else (shift[:, :first], shift[:, first:])
    for part, shift_part in zip((x, beside), shifts, strict=True):
        if reason := accepts_group_norm_act(part, weight, bias, num_groups, shift=shift_part):
            return reason
    return "the pair has no backward" if _wants_gradient(x, beside, weight, bias, shift) else None


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`ops.attention` by the C++ kernel, for inference."""
    return torch.ops.multibeta.attention_cpp(query, key, value)


def accepts_attention(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """None when `attention` can serve the call, else the reason it declines."""
    named = {"query": query, "key": key, "value": value}
    if reason := _declined(named):
        return reason
    if query.dim() != 4 or query.numel() == 0 or key.shape != query.shape or value.shape != query.shape:
        return "query, key and value must be (N, L, heads, head_dim) of one shape and not empty"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return "query, key and value must have one dtype"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {query.shape[-1]}"
    if any(tensor.stride(-1) != 1 for tensor in named.values()):
        return "the last dimension of query, key and value must have stride 1"
    if _wants_gradient(query, key, value):
        return "the C++ attention has no backward"
    return load()


def standard_normal(seeds: Tensor, step: int, shape: tuple[int, ...], *, stream: int = 0) -> Tensor:
    """`ops.standard_normal` by the C++ kernels."""
    return torch.ops.multibeta.standard_normal_cpp(seeds, step, math.prod(shape), stream).view(-1, *shape)


def accepts_standard_normal(seeds: Tensor, step: int, shape: tuple[int, ...], *, stream: int = 0) -> str | None:
    """None when `standard_normal` can serve the call, else the reason it declines."""
    if seeds.device.type != "cpu":
        return f"seeds are on {seeds.device.type}, the C++ kernels serve the CPU"
    if seeds.dtype != torch.int64 or seeds.dim() != 1 or seeds.numel() * math.prod(shape) == 0:
        return "seeds must be (N,) int64 and the noise not empty"
    return load()


def sampler_update(
    latent: Tensor,
    noise_prediction: Tensor,
    delta: Tensor,
    row: Tensor,
    seeds: Tensor,
    step: int,
    *,
    previous: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`ops.sampler_update` by the C++ kernels."""
    previous_noise, previous_delta = previous or (None, None)
    return torch.ops.multibeta.sampler_update_cpp(
        latent, noise_prediction, delta, row, seeds, step, previous_noise, previous_delta
    )


def accepts_sampler_update(
    latent: Tensor,
    noise_prediction: Tensor,
    delta: Tensor,
    row: Tensor,
    seeds: Tensor,
    step: int,
    *,
    previous: tuple[Tensor, Tensor] | None = None,
) -> str | None:
    """None when `sampler_update` can serve the call, else the reason it declines."""
    previous_noise, previous_delta = previous or (None, None)
    named = {"latent": latent, "noise_prediction": noise_prediction, "delta": delta}
    named |= {"previous[0]": previous_noise, "previous[1]": previous_delta}
    if reason := _declined(named):
        return reason
    if latent.numel() == 0 or any(tensor is not None and tensor.shape != latent.shape for tensor in named.values()):
        return "latent and predictions must have one shape and not be empty"
    if row.shape not in ((SAMPLER_COLUMNS,), (*latent.shape[1:2], SAMPLER_COLUMNS)):
        return f"row must be (7,) or (C, 7), got {tuple(row.shape)}"
    if row.device.type != "cpu" or seeds.device.type != "cpu" or seeds.dtype != torch.int64:
        return "row and seeds must be on the CPU, seeds int64"
    if _wants_gradient(row, *named.values()):
        return "the C++ sampler has no derivative"
    return load()


def sampler_step(
    latent: Tensor,
    network_input: Tensor,
    history: Tensor,
    output: Tensor,
    rows: Tensor,
    channel_rows: Tensor,
    steps: Tensor,
    counter: Tensor,
    seeds: Tensor,
    condition: Tensor | None = None,
) -> None:
    """`ops.sampler_step` by the C++ kernels."""
    torch.ops.multibeta.sampler_step_cpp(
        latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition
    )


def accepts_sampler_step(
    latent: Tensor,
    network_input: Tensor,
    history: Tensor,
    output: Tensor,
    rows: Tensor,
    channel_rows: Tensor,
    steps: Tensor,
    counter: Tensor,
    seeds: Tensor,
    condition: Tensor | None = None,
) -> str | None:
    """None when `sampler_step` can serve the call, else the reason it declines."""
    named = {"latent": latent, "network_input": network_input, "history": history, "output": output}
    if reason := _declined(named | {"rows": rows, "channel_rows": channel_rows, "condition": condition}):
        return reason
    if reason := shared.sampler_step_reason(latent, network_input, history, output, rows, channel_rows, condition):
        return reason
    whole = (latent, history, rows, channel_rows) + (() if condition is None else (condition,))
    if any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in whole):
        return "latent, history, rows, channel_rows and condition must be contiguous float32"
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.int64 for tensor in (steps, counter, seeds)):
        return "steps, counter and seeds must be int64 on the CPU"
    if _wants_gradient(latent, history, output, rows, channel_rows, condition):
        return "the C++ sampler has no derivative"
    return load()
