"""Triton kernels of `sampler_update` and `sampler_step`: a row of a sampler in one pass, its noise drawn in registers.

The noise is made of the words of `multibeta.ops.philox`, bit for bit, and its normals are those of
`multibeta.ops.standard_normal` to 1e-6: it belongs to the sample's seed, the step and the position, whatever the batch and the
launch.
"""

# pyright: reportArgumentType=false
# a launch takes plain numbers where its kernel declares tl.constexpr
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import SAMPLER_COLUMNS, NamedRow, OneHeadRow, SamplerRow, TwoHeadRow
from .launch import FLOATS, define, device_reason
from .shared import sampler_step_reason

QUADS = 128  # of positions in a program: one Philox block, four normals each


def _column(row: type[NamedRow], name: str) -> tl.constexpr:
    return tl.constexpr(row._fields.index(name))


ROW_COLUMNS = tl.constexpr(SAMPLER_COLUMNS)
LATENT = _column(SamplerRow, "latent")
NOISE_PREDICTION = _column(SamplerRow, "noise_prediction")
DELTA = _column(SamplerRow, "delta")
FRESH_NOISE = _column(SamplerRow, "fresh_noise")
PREVIOUS_NOISE_PREDICTION = _column(SamplerRow, "previous_noise_prediction")
PREVIOUS_DELTA = _column(SamplerRow, "previous_delta")
OFFSET = _column(SamplerRow, "offset")

NOISE_FROM_OUTPUT = _column(OneHeadRow, "noise_from_output")
NOISE_FROM_LATENT = _column(OneHeadRow, "noise_from_latent")
NOISE_OFFSET = _column(OneHeadRow, "noise_offset")
DELTA_FROM_SECOND = _column(TwoHeadRow, "delta_from_second")
DELTA_OFFSET = _column(TwoHeadRow, "delta_offset")
DELTA_FROM_NOISE = _column(OneHeadRow, "delta_from_noise")
DELTA_FROM_LATENT = _column(OneHeadRow, "delta_from_latent")
DELTA_FROM_CONDITION = _column(OneHeadRow, "delta_from_condition")
DELTA_LIMIT = _column(OneHeadRow, "delta_limit")
INPUT_FROM_LATENT = _column(OneHeadRow, "input_from_latent")
INPUT_OFFSET = _column(OneHeadRow, "input_offset")
INPUT_FROM_CONDITION = _column(OneHeadRow, "input_from_condition")


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
    offset,
    draws,
    seed,
    step,
    first_quad,
    QUADS: tl.constexpr,
):
    """A row without history, at the 4 QUADS positions from `first_quad`; where `draws` is 0, so is `on_fresh`."""
    result = on_latent * latent + on_noise * noise_prediction + on_delta * delta + offset
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
    offset,
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
        own = channel_row_ptr + tl.minimum(channel, channels - 1) * ROW_COLUMNS  # masked positions stay in the table
        on_latent, on_noise, on_delta = tl.load(own + LATENT), tl.load(own + NOISE_PREDICTION), tl.load(own + DELTA)
        on_fresh, offset = tl.load(own + FRESH_NOISE), tl.load(own + OFFSET)
        on_previous_noise, on_previous_delta = tl.load(own + PREVIOUS_NOISE_PREDICTION), tl.load(own + PREVIOUS_DELTA)
        draws = tl.max(tl.abs(on_fresh), axis=0)
    coefficients = on_latent, on_noise, on_delta, on_fresh, offset, draws
    result = _next_latent(latent, noise_prediction, delta, *coefficients, seed, step, first_quad, QUADS)
    if previous_noise_ptr is not None:
        result += on_previous_noise * tl.load(previous_noise_ptr + offsets, mask=mask, other=0).to(tl.float32)
        result += on_previous_delta * tl.load(previous_delta_ptr + offsets, mask=mask, other=0).to(tl.float32)
    tl.store(result_ptr + sample * size + position, result, mask=mask)


@triton.jit(do_not_specialize=["sample_count"])
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
    index = tl.load(counter_ptr).to(tl.int32)  # 64 bits cost registers, and a table has no 2^31 elements
    columns = channel_rows_ptr + (index * channels + channel) * COLUMNS
    if PER_CHANNEL:
        row_ptr = rows_ptr + (index * channels + tl.minimum(channel, channels - 1)) * ROW_COLUMNS  # masked ones stay inside
    else:
        row_ptr = rows_ptr + index * ROW_COLUMNS

    output_ptr += sample * output_stride_n + channel * output_stride_c + row * output_stride_h + column * output_stride_w
    first = tl.load(output_ptr, mask=mask, other=0).to(tl.float32)
    if condition_ptr is None:
        second = tl.load(output_ptr + channels * output_stride_c, mask=mask, other=0).to(tl.float32)
    latent_ptr += sample * size + position
    latent = tl.load(latent_ptr, mask=mask, other=0)
    noise_prediction = tl.load(columns + NOISE_FROM_OUTPUT, mask=mask, other=0) * first
    noise_prediction += tl.load(columns + NOISE_FROM_LATENT, mask=mask, other=0) * latent
    noise_prediction += tl.load(columns + NOISE_OFFSET, mask=mask, other=0)
    if condition_ptr is None:
        delta = tl.load(columns + DELTA_FROM_SECOND, mask=mask, other=0) * second
        delta += tl.load(columns + DELTA_FROM_NOISE, mask=mask, other=0) * noise_prediction
        delta += tl.load(columns + DELTA_FROM_LATENT, mask=mask, other=0) * latent
        delta += tl.load(columns + DELTA_OFFSET, mask=mask, other=0)
    else:
        condition = tl.load(condition_ptr + sample * size + position, mask=mask, other=0)
        centre = tl.load(columns + DELTA_FROM_CONDITION, mask=mask, other=0) * condition
        limit = tl.load(columns + DELTA_LIMIT, mask=mask, other=0)
        delta = tl.load(columns + DELTA_FROM_NOISE, mask=mask, other=0) * noise_prediction
        delta += tl.load(columns + DELTA_FROM_LATENT, mask=mask, other=0) * latent
        delta += centre
        delta = tl.where(delta < -limit, -limit, tl.where(delta > limit, limit, delta)) - centre  # what is not a number stays so
    on_fresh = tl.load(row_ptr + FRESH_NOISE)
    result = _next_latent(
        latent,
        noise_prediction,
        delta,
        tl.load(row_ptr + LATENT),
        tl.load(row_ptr + NOISE_PREDICTION),
        tl.load(row_ptr + DELTA),
        on_fresh,
        tl.load(row_ptr + OFFSET),
        tl.max(tl.abs(on_fresh), axis=0) if PER_CHANNEL else on_fresh,
        tl.load(seeds_ptr + sample),
        tl.load(steps_ptr + index),
        first_quad,
        QUADS,
    )
    history_noise = history_ptr + sample * size + position
    history_delta = history_noise + tl.cast(sample_count, tl.int64) * size
    result += tl.load(row_ptr + PREVIOUS_NOISE_PREDICTION) * tl.load(history_noise, mask=mask, other=0)
    result += tl.load(row_ptr + PREVIOUS_DELTA) * tl.load(history_delta, mask=mask, other=0)

    tl.debug_barrier()  # a position is read and written, not surely by the same thread
    tl.store(history_noise, noise_prediction, mask=mask)
    tl.store(history_delta, delta, mask=mask)
    tl.store(latent_ptr, result, mask=mask)
    network_input = tl.load(columns + INPUT_FROM_LATENT, mask=mask, other=0) * result
    network_input += tl.load(columns + INPUT_OFFSET, mask=mask, other=0)
    if condition_ptr is not None:
        network_input += tl.load(columns + INPUT_FROM_CONDITION, mask=mask, other=0) * condition
    input_ptr += sample * input_stride_n + channel * input_stride_c + row * input_stride_h + column * input_stride_w
    tl.store(input_ptr, network_input.to(input_ptr.dtype.element_ty), mask=mask)


_CONSTANTS = {"QUADS": QUADS, "enable_fp_fusion": True}  # whose default differs between versions of Triton


def _sizes(latent: Tensor) -> tuple[tuple[int], tuple[int, int, int, int]]:
    """The grid; elements of a sample, channels, height and width."""
    n, channels, height, width = latent.shape
    size = channels * height * width
    return (n * triton.cdiv(size, 4 * QUADS),), (size, channels, height, width)


def _common_reason(latent: Tensor, *others: Tensor) -> str | None:
    if reason := device_reason(latent):
        return reason
    if latent.dtype != torch.float32 or not latent.is_contiguous():
        return "the latent is not contiguous float32"
    if latent.ndim != 4:
        return f"the latent has {latent.ndim} dimensions, the kernels take 4"
    elements = latent.numel()
    if elements == 0:
        return "the latent is empty"
    if elements >= 2**31 * latent.shape[0]:
        return "a sample has 2^31 elements or more"
    device, wants_gradients = latent.device, torch.is_grad_enabled()
    if wants_gradients and latent.requires_grad:
        return "gradients are asked for, the kernels have none"
    for tensor in others:
        if tensor.device != device:
            return "tensors lie on different devices"
        if wants_gradients and tensor.requires_grad:
            return "gradients are asked for, the kernels have none"
    return None


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
    """Why the kernel declines a call of `multibeta.ops.sampler_update`, or None."""
    predictions = (noise_prediction, delta, *(previous or ()))
    if reason := _common_reason(latent, *predictions, seeds):
        return reason
    if any(prediction.dtype not in FLOATS for prediction in predictions):
        return "a prediction is neither float32, bfloat16 nor float16"
    if any(prediction.shape != latent.shape for prediction in predictions):
        return "a prediction has not the shape of the latent"
    if row.shape not in ((SAMPLER_COLUMNS,), (latent.shape[1], SAMPLER_COLUMNS)):
        return f"row must be (7,) or (C, 7), got {tuple(row.shape)}"
    return None


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
    """`multibeta.ops.sampler_update` by a Triton kernel."""
    shared_row, channel_row = _row(row, latent)
    return _update_op(latent, noise_prediction, delta, *(previous or (None, None)), shared_row, channel_row, seeds, step)


def _row(row: Tensor, latent: Tensor) -> tuple[list[float], Tensor | None]:
    """The coefficients by value, where the host has one row for all channels; else, never waiting for the device, by channel."""
    if row.dim() == 1 and row.device.type == "cpu":
        return row.tolist(), None
    return [], row.to(latent).expand(latent.shape[1], SAMPLER_COLUMNS).contiguous()


def _launch_update(
    latent: Tensor,
    noise_prediction: Tensor,
    delta: Tensor,
    previous_noise_prediction: Tensor | None,
    previous_delta: Tensor | None,
    row: list[float],
    channel_row: Tensor | None,
    seeds: Tensor,
    step: int,
) -> Tensor:
    others, strides = (delta, previous_noise_prediction, previous_delta), noise_prediction.stride()
    if any(prediction is not None and prediction.stride() != strides for prediction in others):
        noise_prediction = noise_prediction.contiguous()
        others, strides = [None if other is None else other.contiguous() for other in others], noise_prediction.stride()
    latent, seeds, result = latent.contiguous(), seeds.contiguous(), torch.empty_like(latent, memory_format=_CONTIGUOUS)
    grid, sizes = _sizes(latent)
    tensors = (latent, noise_prediction, *others, seeds, result, channel_row)
    arguments = (*tensors, *(row or (None,) * SAMPLER_COLUMNS), step, *sizes, *strides)
    with torch.cuda.device_of(latent):
        _update[grid](*arguments, **_CONSTANTS)
    return result


_CONTIGUOUS = torch.contiguous_format
_update_op = define(
    "sampler_update_triton(Tensor latent, Tensor noise_prediction, Tensor delta, Tensor? previous_noise_prediction,"
    " Tensor? previous_delta, float[] row, Tensor? channel_row, Tensor seeds, int step) -> Tensor",
    _launch_update,
    lambda latent, *_: torch.empty_like(latent, memory_format=_CONTIGUOUS),
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
    """Why the kernel declines a call of `multibeta.ops.sampler_step`, or None."""
    given = () if condition is None else (condition,)
    if reason := _common_reason(latent, network_input, output, history, rows, channel_rows, steps, counter, seeds, *given):
        return reason
    if reason := sampler_step_reason(latent, network_input, history, output, rows, channel_rows, condition):
        return reason
    if history.dtype != torch.float32 or rows.dtype != torch.float32 or channel_rows.dtype != torch.float32:
        return "history, rows or channel_rows is not float32"
    if condition is not None and condition.dtype != torch.float32:
        return "the condition is not float32"
    for tensor in (history, rows, channel_rows, steps, counter, seeds, *given):
        if not tensor.is_contiguous():
            return "history, condition or a table is not contiguous"
    if output.dtype not in FLOATS or network_input.dtype not in FLOATS:
        return "output or network_input is neither float32, bfloat16 nor float16"
    return None


def _launch_step(
    latent: Tensor,
    network_input: Tensor,
    history: Tensor,
    output: Tensor,
    rows: Tensor,
    channel_rows: Tensor,
    steps: Tensor,
    counter: Tensor,
    seeds: Tensor,
    condition: Tensor | None,
) -> None:
    tensors = (latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition)
    grid, sizes = _sizes(latent)
    strides = (*output.stride(), *network_input.stride())
    constants = {"PER_CHANNEL": rows.dim() == 3, "COLUMNS": channel_rows.shape[2], **_CONSTANTS}
    torch.autograd.graph.increment_version((latent, network_input, history))
    with torch.cuda.device_of(latent):
        _step[grid](*tensors, latent.shape[0], *sizes, *strides, **constants)


_step_op = define(
    "sampler_step_triton(Tensor(a!) latent, Tensor(b!) network_input, Tensor(c!) history, Tensor output, Tensor rows,"
    " Tensor channel_rows, Tensor steps, Tensor counter, Tensor seeds, Tensor? condition) -> ()",
    _launch_step,
    lambda *_: None,
)


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
    """`multibeta.ops.sampler_step` by a Triton kernel."""
    _step_op(latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition)
