"""Triton kernels of `sampler_update` and `sampler_step`: a row of a sampler in one pass, its noise drawn in registers.

The noise has the bits of `multibeta.ops.philox` and is made normal as in `multibeta.ops.standard_normal`: it belongs to the
sample's seed, the step and the position, whatever the batch and the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import shapes
from .launch import FLOATS, device_reason

QUADS = 128  # of positions in a program: one Philox block, four normals each


@triton.jit
def philox(seed, quad, step):
    """Four words for the 64-bit key `seed` and the counter (quad, step, 0, 0), uint32."""
    zero = tl.zeros_like(quad)
    key_low, key_high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.random.philox_impl(quad, zero + step.to(tl.uint32), zero, zero, key_low, key_high)


@triton.jit
def _two_normals(first, second):
    radius = tl.sqrt_rn(-2.0 * tl.log(((first >> 8).to(tl.float32) + 1.0) * 5.9604644775390625e-08))
    angle = (second >> 8).to(tl.float32) * 3.7450702829239685e-07  # 2 pi / 2^24
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _next_latent(
    latent,
    noise_prediction,
    delta,
    on_latent,
    on_noise,
    on_delta,
    on_fresh,
    draws,
    seed,
    step,
    first_quad,
    QUADS: tl.constexpr,
):
    """A row without history, at the 4 QUADS positions from `first_quad`; where `draws` is 0, so is `on_fresh`."""
    result = on_latent * latent + on_noise * noise_prediction + on_delta * delta
    if draws != 0:
        quad = first_quad.to(tl.uint32) + tl.arange(0, QUADS).to(tl.uint32)
        word0, word1, word2, word3 = philox(seed, quad, step)
        normal0, normal1 = _two_normals(word0, word1)
        normal2, normal3 = _two_normals(word2, word3)
        normals = tl.join(tl.join(normal0, normal2), tl.join(normal1, normal3))  # (quad, pair, of the pair)
        result += on_fresh * tl.reshape(normals, (4 * QUADS,))
    return result


@triton.jit
def _positions(size, channels, height, width, QUADS: tl.constexpr):
    """Sample, first quad, positions in the flattened sample, their channel, row, column, and mask, of a program."""
    blocks = tl.cdiv(size, 4 * QUADS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first_quad = (tl.program_id(0) % blocks) * QUADS
    position = first_quad * 4 + tl.arange(0, 4 * QUADS)
    pixel = position % (height * width)
    return sample, first_quad, position, position // (height * width), pixel // width, pixel % width, position < size


@triton.jit(do_not_specialize=["step"])
def _update(
    latent_ptr,
    noise_ptr,
    delta_ptr,
    previous_noise_ptr,
    previous_delta_ptr,
    seeds_ptr,
    result_ptr,
    channel_row_ptr,
    on_latent,
    on_noise,
    on_delta,
    on_fresh,
    on_previous_noise,
    on_previous_delta,
    step,
    size,
    channels,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    QUADS: tl.constexpr,
):
    sample, first_quad, position, channel, row, column, mask = _positions(size, channels, height, width, QUADS)
    offsets = sample * stride_n + channel * stride_c + row * stride_h + column * stride_w
    latent = tl.load(latent_ptr + sample * size + position, mask=mask, other=0)
    noise_prediction = tl.load(noise_ptr + offsets, mask=mask, other=0).to(tl.float32)
    delta = tl.load(delta_ptr + offsets, mask=mask, other=0).to(tl.float32)
    seed = tl.load(seeds_ptr + sample)
    draws = on_fresh
    if channel_row_ptr is not None:
        own = channel_row_ptr + tl.minimum(channel, channels - 1) * 6  # masked positions stay in the table
        on_latent, on_noise, on_delta = tl.load(own), tl.load(own + 1), tl.load(own + 2)
        on_fresh, on_previous_noise, on_previous_delta = tl.load(own + 3), tl.load(own + 4), tl.load(own + 5)
        draws = tl.max(tl.abs(on_fresh), axis=0)
    coefficients = on_latent, on_noise, on_delta, on_fresh, draws
    result = _next_latent(latent, noise_prediction, delta, *coefficients, seed, step, first_quad, QUADS)
    if previous_noise_ptr is not None:
        result += on_previous_noise * tl.load(previous_noise_ptr + offsets, mask=mask, other=0).to(tl.float32)
        result += on_previous_delta * tl.load(previous_delta_ptr + offsets, mask=mask, other=0).to(tl.float32)
    tl.store(result_ptr + sample * size + position, result, mask=mask)


@triton.jit
def _step(
    latent_ptr,
    input_ptr,
    history_ptr,
    output_ptr,
    rows_ptr,
    channel_rows_ptr,
    steps_ptr,
    counter_ptr,
    seeds_ptr,
    condition_ptr,
    sample_count,
    size,
    channels,
    height,
    width,
    output_stride_n,
    output_stride_c,
    output_stride_h,
    output_stride_w,
    input_stride_n,
    input_stride_c,
    input_stride_h,
    input_stride_w,
    PER_CHANNEL: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUADS: tl.constexpr,
):
    sample, first_quad, position, channel, row, column, mask = _positions(size, channels, height, width, QUADS)
    index = tl.load(counter_ptr)
    columns = channel_rows_ptr + (index * channels + channel) * COLUMNS
    if PER_CHANNEL:
        row_ptr = rows_ptr + (index * channels + tl.minimum(channel, channels - 1)) * 6  # masked positions stay in the table
    else:
        row_ptr = rows_ptr + index * 6

    output_ptr += sample * output_stride_n + channel * output_stride_c + row * output_stride_h + column * output_stride_w
    first = tl.load(output_ptr, mask=mask, other=0).to(tl.float32)
    if condition_ptr is None:
        second = tl.load(output_ptr + channels * output_stride_c, mask=mask, other=0).to(tl.float32)
    latent_ptr += sample * size + position
    latent = tl.load(latent_ptr, mask=mask, other=0)
    noise_prediction = tl.load(columns, mask=mask, other=0) * first + tl.load(columns + 1, mask=mask, other=0) * latent
    noise_prediction += tl.load(columns + 2, mask=mask, other=0)
    if condition_ptr is None:
        delta = tl.load(columns + 3, mask=mask, other=0) * second
    else:
        condition = tl.load(condition_ptr + sample * size + position, mask=mask, other=0)
        centre, limit = tl.load(columns + 7, mask=mask, other=0) * condition, tl.load(columns + 8, mask=mask, other=0)
        delta = tl.load(columns + 3, mask=mask, other=0) * noise_prediction + tl.load(columns + 6, mask=mask, other=0) * latent
        delta += centre
        delta = tl.where(delta < -limit, -limit, tl.where(delta > limit, limit, delta)) - centre  # what is not a number stays so
    on_fresh = tl.load(row_ptr + 3)
    result = _next_latent(
        latent,
        noise_prediction,
        delta,
        tl.load(row_ptr),
        tl.load(row_ptr + 1),
        tl.load(row_ptr + 2),
        on_fresh,
        tl.max(tl.abs(on_fresh), axis=0) if PER_CHANNEL else on_fresh,
        tl.load(seeds_ptr + sample),
        tl.load(steps_ptr + index),
        first_quad,
        QUADS,
    )
    history_noise = history_ptr + sample * size + position
    history_delta = history_noise + tl.cast(sample_count, tl.int64) * size
    result += tl.load(row_ptr + 4) * tl.load(history_noise, mask=mask, other=0)
    result += tl.load(row_ptr + 5) * tl.load(history_delta, mask=mask, other=0)

    tl.debug_barrier()  # a position is read and written, not surely by the same thread
    tl.store(history_noise, noise_prediction, mask=mask)
    tl.store(history_delta, delta, mask=mask)
    tl.store(latent_ptr, result, mask=mask)
    network_input = tl.load(columns + 4, mask=mask, other=0) * result + tl.load(columns + 5, mask=mask, other=0)
    if condition_ptr is not None:
        network_input += tl.load(columns + 9, mask=mask, other=0) * condition
    input_ptr += sample * input_stride_n + channel * input_stride_c + row * input_stride_h + column * input_stride_w
    tl.store(input_ptr, network_input.to(input_ptr.dtype.element_ty), mask=mask)


_CONSTANTS = {"QUADS": QUADS, "enable_fp_fusion": True}  # whose default differs between versions of Triton


def _grid(latent: Tensor) -> tuple[int]:
    return (latent.shape[0] * triton.cdiv(latent[0].numel(), 4 * QUADS),)


def _common_reason(latent: Tensor, *others: Tensor) -> str | None:
    if reason := device_reason(latent):
        return reason
    if latent.dtype != torch.float32 or not latent.is_contiguous():
        return "the latent is not contiguous float32"
    if latent.ndim != 4:
        return f"the latent has {latent.ndim} dimensions, the kernels take 4"
    if latent.numel() == 0:
        return "the latent is empty"
    if latent[0].numel() >= 2**31:
        return "a sample has 2^31 elements or more"
    if any(tensor.device != latent.device for tensor in others):
        return "tensors lie on different devices"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (latent, *others)):
        return "gradients are asked for, the kernels have none"
    return None


def accepts_sampler_update(latent, noise_prediction, delta, row, seeds, step, *, previous=None) -> str | None:
    """Why the kernel declines a call of `multibeta.ops.sampler_update`, or None."""
    predictions = (noise_prediction, delta, *(previous or ()))
    if reason := _common_reason(latent, *predictions, seeds):
        return reason
    if any(prediction.dtype not in FLOATS for prediction in predictions):
        return "a prediction is neither float32, bfloat16 nor float16"
    if any(prediction.shape != latent.shape for prediction in predictions):
        return "a prediction has not the shape of the latent"
    if row.shape not in ((6,), (latent.shape[1], 6)):
        return f"row must be (6,) or (C, 6), got {tuple(row.shape)}"
    return None


def sampler_update(latent, noise_prediction, delta, row, seeds, step, *, previous=None):
    """`multibeta.ops.sampler_update` by a Triton kernel."""
    predictions = (noise_prediction, delta, *(previous or ()))
    if len({prediction.stride() for prediction in predictions}) > 1:
        predictions = tuple(prediction.contiguous() for prediction in predictions)
    result = torch.empty_like(latent)
    # a shared row goes by value: it need not be copied to the device
    row = (None, *row.tolist()) if row.dim() == 1 else (row.to(latent).contiguous(), *(None,) * 6)
    pointers = (latent, *predictions, *(() if previous else (None, None)), seeds.contiguous(), result)
    sizes = (latent[0].numel(), *latent.shape[1:])
    with torch.cuda.device_of(latent):
        _update[_grid(latent)](*pointers, *row, step, *sizes, *predictions[0].stride(), **_CONSTANTS)
    return result


def accepts_sampler_step(
    latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition=None
) -> str | None:
    """Why the kernel declines a call of `multibeta.ops.sampler_step`, or None."""
    floats = (history, rows, channel_rows) + (() if condition is None else (condition,))
    whole = (*floats, steps, counter, seeds)
    if reason := _common_reason(latent, network_input, output, *whole):
        return reason
    if reason := shapes.sampler_step_reason(latent, network_input, history, output, rows, channel_rows, condition):
        return reason
    if any(tensor.dtype != torch.float32 for tensor in floats):
        return "history, rows, channel_rows or condition is not float32"
    if not all(tensor.is_contiguous() for tensor in whole):
        return "history, condition or a table is not contiguous"
    if output.dtype not in FLOATS or network_input.dtype not in FLOATS:
        return "output or network_input is neither float32, bfloat16 nor float16"
    return None


@torch.library.custom_op("multibeta::sampler_step_triton", mutates_args=("latent", "network_input", "history"))
def _sampler_step(
    latent: torch.Tensor,
    network_input: torch.Tensor,
    history: torch.Tensor,
    output: torch.Tensor,
    rows: torch.Tensor,
    channel_rows: torch.Tensor,
    steps: torch.Tensor,
    counter: torch.Tensor,
    seeds: torch.Tensor,
    condition: torch.Tensor | None,
) -> None:
    tensors = (latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition)
    sizes = (latent.shape[0], latent[0].numel(), *latent.shape[1:])
    constants = {"PER_CHANNEL": rows.dim() == 3, "COLUMNS": channel_rows.shape[2], **_CONSTANTS}
    with torch.cuda.device_of(latent):
        _step[_grid(latent)](*tensors, *sizes, *output.stride(), *network_input.stride(), **constants)


@_sampler_step.register_fake
def _(latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition):
    return None


def sampler_step(latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition=None) -> None:
    """`multibeta.ops.sampler_step` by a Triton kernel."""
    torch.ops.multibeta.sampler_step_triton(
        latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition
    )
