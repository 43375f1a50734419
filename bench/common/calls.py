"""Calls of every op at the shapes that the library meets, and what can serve them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common import measure
from multibeta import ops

NORM_SHAPES = ((8, 256, 32, 32), (8, 768, 16, 16), (8, 1280, 8, 8), (1, 128, 256, 256))
LARGE_NORM_SHAPES = (*((64, *shape[1:]) for shape in NORM_SHAPES[:3]), (8, 128, 256, 256), (8, 256, 128, 128))
ATTENTION_SHAPES = ((8, 256, 8, 8), (8, 256, 8, 16), (8, 64, 8, 16), (1, 1024, 8, 32), (1, 256, 24, 32), (1, 64, 40, 32))
LATENT_SHAPES = ((8, 4, 16, 16), (64, 4, 32, 32))


def calls(op: str, device: torch.device, dtype: torch.dtype, backward: bool) -> Iterator[tuple[str, tuple, dict]]:
    """Calls of an op at the shapes the library meets: (label, arguments, keyword arguments)."""
    if op == "group_norm_act":
        shapes = NORM_SHAPES + (LARGE_NORM_SHAPES if device.type == "cuda" else ())
        for shape in shapes:
            for layout in ("channels-last", "contiguous"):
                args, kwargs = norm_call(shape, 32, device, dtype, shifted=True, layout=layout, gradients=backward)
                yield f"{shape} {layout} silu, shift", args, kwargs
    elif op == "group_norm_act_pair" and not backward:
        for n, channels, *spatial in NORM_SHAPES[:3]:
            half = (n, channels // 2, *spatial)
            yield f"two of {half} silu", *pair_call(half, channels // 2, 32, device, dtype)
    elif op == "attention":
        for shape in ATTENTION_SHAPES:
            yield str(shape), attention_call(shape, device, dtype, gradients=backward), {}
    elif not backward:
        for shape in LATENT_SHAPES:
            if op == "standard_normal":
                yield str(shape), (torch.arange(shape[0], device=device), 7, shape[1:]), {}
            else:
                yield from sampler_calls(op, shape, device, dtype)


def norm_call(
    shape: tuple[int, ...],
    groups: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    activation: str = "silu",
    shifted: bool = False,
    x_bias: bool = False,
    residual: bool = False,
    layout: str = "channels-last",
    gradients: bool = False,
) -> tuple[tuple, dict]:
    """Arguments of `ops.group_norm_act` for an x of `shape` whose mean is not zero."""
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    x, other = (torch.randn(2, *shape, device=device) + 0.5).to(dtype)
    x, other = (tensor.contiguous(memory_format=memory_format).requires_grad_(gradients) for tensor in (x, other))
    weight, bias = (torch.randn(shape[1], device=device).to(dtype).requires_grad_(gradients) for _ in range(2))
    shift = torch.randn(shape[:2], device=device).to(dtype).requires_grad_(gradients)
    extra = {"shift": shift if shifted else None, "residual": other if residual else None}
    if x_bias:
        extra["x_bias"] = torch.randn(shape[1], device=device).to(dtype).requires_grad_(gradients)
    return (x, weight, bias, groups), {**extra, "activation": activation}


def pair_call(
    shape: tuple[int, ...], skip_channels: int, groups: int, device: torch.device, dtype: torch.dtype, *, activation: str = "silu"
) -> tuple[tuple, dict]:
    """Arguments of `ops.group_norm_act_pair` for an x of `shape` and `skip_channels` of a skip connection, channels-last."""
    n, channels, *spatial = shape
    parts = [(torch.randn(n, c, *spatial, device=device) + 0.5).to(dtype) for c in (channels, skip_channels)]
    parts = [part.contiguous(memory_format=torch.channels_last) for part in parts]
    weight, bias = (torch.randn(channels + skip_channels, device=device).to(dtype) for _ in range(2))
    return (*parts, weight, bias, groups), {"activation": activation}


def attention_call(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, *, gradients: bool = False
) -> tuple[Tensor, ...]:
    """Query, key and value of `shape` (N, L, heads, head_dim), as one linear layer makes them."""
    n, length, heads, head_dim = shape
    return torch.randn(n, length, 3, heads, head_dim, device=device).to(dtype).requires_grad_(gradients).unbind(2)


def sampler_calls(op: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, tuple, dict]]:
    """Calls of the sampler's ops: with and without fresh noise, with a row for each channel, the step after one head as well."""
    n, channels, *spatial = shape
    output = torch.randn(n, 2 * channels, *spatial, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    latent, seeds = torch.randn(shape, device=device), torch.arange(n, device=device)
    named = ops.SamplerRow(1, -0.1, 1, 0.1), ops.SamplerRow(1, -0.1, 1, 0, 0.1, 0.2)
    fresh, history = (ops.pack(row, ()).float() for row in named)
    own = fresh * torch.linspace(0.5, 1.5, channels)[:, None]
    labelled = {"fresh noise": fresh, "history": history, "fresh noise per channel": own}
    if op == "sampler_step":
        labelled["fresh noise, one head"] = fresh
    for label, row in labelled.items():
        if op == "sampler_update":
            previous = tuple(torch.randn(2, *shape, device=device))
            yield f"{shape} {label}", (latent, *output.chunk(2, dim=1), row, seeds, 7), {"previous": previous}
        else:
            one_head = label.endswith("one head")
            heads, columns = (output[:, :channels], ops.ONE_HEAD_COLUMNS) if one_head else (output, ops.TWO_HEAD_COLUMNS)
            channel_rows = torch.randn(1, channels, columns, device=device)
            if one_head:
                channel_rows[..., ops.OneHeadRow._fields.index("delta_limit")] = 1
            table = row[None].to(device), channel_rows, torch.tensor([7], device=device)
            condition = (torch.randn(shape, device=device),) if one_head else ()
            network_input = torch.empty_like(output[:, :channels])
            counter = torch.zeros(1, dtype=torch.int64, device=device)
            yield (  # each its own latent, which a call overwrites
                f"{shape} {label}",
                (latent.clone(), network_input, torch.zeros(2, *shape, device=device), heads, *table, counter, seeds, *condition),
                {},
            )


def arms(op: ops.Op, args: tuple, kwargs: dict, compiled: bool) -> tuple[dict[str, Callable], dict[str, str]]:
    """What can serve the call, by name, and why the rest cannot."""
    able, unable = {"reference": functools.partial(op.reference, *args, **kwargs)}, {}
    if compiled and op.name != "sampler_step":  # reads its counter on the host
        measure.allow_many_compilations()
        able["compiled reference"] = functools.partial(torch.compile(op.reference, dynamic=False), *args, **kwargs)
    for kernel in op.kernels:
        reason = kernel.accepts(*args, **kwargs)
        if reason is None:
            able[str(kernel)] = functools.partial(kernel.function, *args, **kwargs)
        else:
            unable[str(kernel)] = reason
    return able, unable


def bytes_moved(op: str, args: tuple, kwargs: dict | None = None) -> int | None:
    """Bytes that an ideal kernel reads and writes, where a copy is the limit: with sums their total and the residual too."""
    read = {"group_norm_act": args[:1], "group_norm_act_pair": args[:2]}.get(op)
    if read is None:
        return None
    maps = 2 * sum(x.numel() * x.element_size() for x in read)
    sums = [(kwargs or {}).get(name) is not None for name in ("x_bias", "residual")]
    return maps + (any(sums) + sums[1]) * args[0].numel() * args[0].element_size()
