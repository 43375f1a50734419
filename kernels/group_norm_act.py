"""Triton kernels of `group_norm_act`: activation(GroupNorm(total + shift)) in one read and one write where a group fits, with
total = x + x_bias + residual, the bias of the convolution before and the sum of the block, in the same pass.

Two shapes of work, chosen by `configuration` from (C, H W) alone, so that a sample never depends on its batch:

- "one-pass": a program holds every pixel of a few groups in registers, a tile (pixels, channels).
- "split": larger maps are cut into blocks of pixels. Each yields the mean and the centred squares of its channels, a second
  kernel joins them by Chan's formula into the moments of the groups, a third applies them. The three take turns on as many
  samples as fit the L2 cache, so that the second read of a map does not come from memory.

A call launches one kernel or three a round, forward and backward alike; a pair twice as many.

Both layouts, (N, H, W, C) and (N, C, H, W) in memory, are one source: a tile has a stride per pixel and one per channel.
Sums are float32, variances are centred (raw moments lose the variance where mean/std = 300), nothing is atomic.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, shared
from .launch import FLOATS, define, device_reason

# A tile of 64 values a thread (32 of each of two inputs) keeps to the 128 registers that 512 threads have; a larger one spills.
_LANES_PER_THREAD = 64
_MAX_WARPS = 16
_SECTOR_BYTES = 32  # of memory, read and written as a whole

# (channels, pixels) of the U-Net and of the VAE for 256 x 256 images, at 32 groups: shapes that tests and benchmarks go through.
EXAMPLES = (
    *((256, 1024), (512, 1024), (768, 1024), (1024, 1024)),
    *((256, 256), (768, 256), (1024, 256), (1536, 256), (2048, 256)),
    *((768, 64), (1280, 64), (2048, 64), (2560, 64)),
    *((128, 256**2), (256, 256**2), (128, 128**2), (256, 128**2), (512, 128**2), (256, 64**2), (512, 64**2), (768, 64**2)),
)


@dataclass(frozen=True)
class Configuration:
    """How one call is cut into programs.

    Attributes:
        kind: "one-pass" or "split".
        chunk: Groups of a one-pass program.
        block_pixels, block_channels: Tile of a program; in a one-pass kernel, channels are padded per group.
        num_warps: Of 32 threads.
        splits: Blocks of pixels in a map, 1 for "one-pass".
    """

    kind: str
    chunk: int
    block_pixels: int
    block_channels: int
    num_warps: int
    splits: int


def configuration(
    channels: int, pixels: int, groups: int, element_size: int, layout: str, *, backward: bool = False
) -> Configuration:
    """The launch rules, of the shape alone.

    - One-pass where the tile of one group has at most 32768 padded elements (16384 in the backward, which holds two tensors);
      half of that for contiguous float32, of which a thread holds 16 channels and their parameters.
    - Channels-last programs take as many groups as make a row of at least 32 bytes (a memory sector), within that limit, and
      split where it leaves less; contiguous ones take one group, whose pixels are a row. Both take more while the tile is
      below 2048 elements.
    - Warps: one for 2048 elements of a tile, at most 16.
    - Split tiles have 16384 elements (8192 in the backward) and rows of 128 bytes or more.

    Args:
        channels, pixels, groups: C, H W and the number of groups.
        element_size: Bytes of an element of x.
        layout: "channels_last" or "contiguous".
        backward: For the gradient kernels.
    """
    channels_last = layout == "channels_last"
    inputs = 2 if backward else 1
    group_channels = channels // groups
    padded_channels, padded_pixels = triton.next_power_of_2(group_channels), triton.next_power_of_2(pixels)
    tile = _LANES_PER_THREAD * 32 * _MAX_WARPS // inputs // 2
    limit = tile if element_size == 4 and not channels_last else 2 * tile
    group_tile = padded_channels * padded_pixels
    chunk = 1
    while groups % (2 * chunk) == 0 and 2 * chunk * group_tile <= limit:
        short_row = channels_last and chunk * group_channels * element_size < _SECTOR_BYTES
        if not short_row and chunk * group_tile >= 2048:
            break
        chunk *= 2
    part_of_sector = channels_last and chunk < groups and chunk * group_channels * element_size < _SECTOR_BYTES
    if group_tile <= limit and not part_of_sector:
        num_warps = _warps(chunk * group_tile * inputs)
        return Configuration("one-pass", chunk, padded_pixels, chunk * padded_channels, num_warps, 1)
    if channels_last:
        block_channels = min(triton.next_power_of_2(channels), 256 // element_size)
        block_pixels = min(tile // block_channels, padded_pixels)
    else:
        block_pixels = min(1024, padded_pixels)
        block_channels = min(tile // block_pixels, triton.next_power_of_2(channels))
    num_warps = _warps(block_pixels * block_channels * inputs)
    return Configuration("split", 0, block_pixels, block_channels, num_warps, triton.cdiv(pixels, block_pixels))


def _warps(lanes: int) -> int:
    return min(max(lanes // (32 * _LANES_PER_THREAD), 1), _MAX_WARPS)


@triton.jit
def _activated(u, ACTIVATION: tl.constexpr):
    if ACTIVATION == "sigmoid":
        u = tl.sigmoid(u)
    elif ACTIVATION == "silu":
        u = u * tl.sigmoid(u)
    return u


@triton.jit
def _through_activation(grad, u, ACTIVATION: tl.constexpr):
    if ACTIVATION == "sigmoid":
        s = tl.sigmoid(u)
        grad = grad * s * (1 - s)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(u)
        grad = grad * s * (1 + u * (1 - s))
    return grad


@triton.jit
def _tile(
    first_sample,
    pixels,
    splits,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Sample, split, (channels,) and their groups, (pixels, channels) offsets in the sample, and both masks, of a program.

    A tile holds whole groups, each padded to PADDED_CHANNELS, or any channels where that is GROUP_CHANNELS.
    """
    padded_channels = CHANNELS // GROUP_CHANNELS * PADDED_CHANNELS
    channel_blocks = tl.cdiv(padded_channels, BLOCK_CHANNELS)
    block = tl.program_id(0) // channel_blocks
    sample, split = (first_sample + block // splits).to(tl.int64), block % splits
    pixel = split * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]
    lane = tl.arange(0, BLOCK_CHANNELS)
    first = (tl.program_id(0) % channel_blocks) * BLOCK_CHANNELS
    if PADDED_CHANNELS == GROUP_CHANNELS:
        channel = first + lane
        channel_mask = channel < CHANNELS
    else:
        in_group = lane % PADDED_CHANNELS
        channel = (first // PADDED_CHANNELS + lane // PADDED_CHANNELS) * GROUP_CHANNELS + in_group
        channel_mask = in_group < GROUP_CHANNELS
        if CHANNELS // GROUP_CHANNELS * PADDED_CHANNELS % BLOCK_CHANNELS != 0:
            channel_mask &= channel < CHANNELS
    if CHANNELS_LAST:
        offsets = pixel * CHANNELS + channel[None, :]
    else:
        offsets = channel[None, :] * pixels + pixel
    mask = (pixel < pixels) & channel_mask[None, :]
    return sample, split, channel, channel // GROUP_CHANNELS, offsets, mask, channel_mask


@triton.jit
def _sum_groups(sums, PADDED_CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Sums over the channels of each group, (groups of the tile,), from sums per channel, (channels,)."""
    return tl.sum(tl.reshape(sums, (BLOCK_CHANNELS // PADDED_CHANNELS, PADDED_CHANNELS)), axis=1)


@triton.jit
def _to_channels(of_groups, PADDED_CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """What each group has, for each of its channels."""
    each = tl.broadcast_to(of_groups[:, None], (BLOCK_CHANNELS // PADDED_CHANNELS, PADDED_CHANNELS))
    return tl.reshape(each, (BLOCK_CHANNELS,))


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0).to(tl.float32)


@triton.jit
def _load_total(x_ptr, x_bias_ptr, residual_ptr, total_ptr, start, channel, offsets, mask, channel_mask):
    """x + x_bias + residual, in float32 after it was rounded and stored as the total."""
    total = _load(x_ptr + start + offsets, mask)
    if total_ptr is not None:
        if x_bias_ptr is not None:
            total += _load(x_bias_ptr + channel, channel_mask)[None, :]
        if residual_ptr is not None:
            total += _load(residual_ptr + start + offsets, mask)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + start + offsets, rounded, mask=mask)
        total = rounded.to(tl.float32)
    return total


@triton.jit
def _store_output(
    y_ptr,
    y,
    sample,
    split,
    pixels,
    channel,
    offsets,
    mask,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    FIRST_CHANNEL: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Stores a tile where x has it, or from FIRST_CHANNEL on in the OUT_CHANNELS of a channels-last tensor."""
    if OUT_CHANNELS != CHANNELS:
        pixel = split * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]
        offsets = pixel * OUT_CHANNELS + (FIRST_CHANNEL + channel)[None, :]
    tl.store(y_ptr + sample * OUT_CHANNELS * pixels + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_normal_and_grad(
    grad_ptr,
    total_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    sample,
    start,
    offsets,
    channel,
    statistics,
    mask,
    channel_mask,
    shift_stride_n,
    ACTIVATION: tl.constexpr,
):
    """The normalised input, the gradient before the activation, the weight and 1/deviation, on the tile of a backward kernel."""
    mean, rstd = _load(mean_ptr + statistics, channel_mask), _load(rstd_ptr + statistics, channel_mask)
    weight, bias = _load(weight_ptr + channel, channel_mask), _load(bias_ptr + channel, channel_mask)
    if shift_ptr is not None:
        mean -= _load(shift_ptr + sample * shift_stride_n + channel, channel_mask)
    h = _load(total_ptr + start + offsets, mask)
    normal = tl.where(mask, (h - mean[None, :]) * rstd[None, :], 0.0)
    grad = _load(grad_ptr + start + offsets, mask)
    grad = _through_activation(grad, normal * weight[None, :] + bias[None, :], ACTIVATION)
    return normal, grad, weight, rstd


@triton.jit(do_not_specialize=["shift_stride_n"])
def _one_pass_forward(
    x_ptr,
    x_bias_ptr,
    residual_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    shift_stride_n,
    eps,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    FIRST_CHANNEL: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    sample, split, channel, _, offsets, mask, channel_mask = _tile(
        0, PIXELS, 1, CHANNELS, GROUP_CHANNELS, PADDED_CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST
    )
    if PIXELS == BLOCK_PIXELS:
        mask = tl.broadcast_to(channel_mask[None, :], (BLOCK_PIXELS, BLOCK_CHANNELS))  # spares the registers of the other half
    start, affine = sample * CHANNELS * PIXELS, FIRST_CHANNEL + channel
    h = _load_total(x_ptr, x_bias_ptr, residual_ptr, total_ptr, start, channel, offsets, mask, channel_mask)
    # before the sums, so that nothing is waited for after them
    weight, bias = _load(weight_ptr + affine, channel_mask), _load(bias_ptr + affine, channel_mask)
    if shift_ptr is not None:
        h += _load(shift_ptr + sample * shift_stride_n + affine, channel_mask)[None, :]
    if PIXELS != BLOCK_PIXELS:
        h = tl.where(mask, h, 0.0)

    count = PIXELS * GROUP_CHANNELS
    mean_of_group = _sum_groups(tl.sum(h, axis=0), PADDED_CHANNELS, BLOCK_CHANNELS) / count
    mean = _to_channels(mean_of_group, PADDED_CHANNELS, BLOCK_CHANNELS)
    centred = h - mean[None, :]
    if PIXELS != BLOCK_PIXELS:
        centred = tl.where(mask, centred, 0.0)
    squares = tl.where(channel_mask, tl.sum(centred * centred, axis=0), 0.0)
    rstd_of_group = 1 / tl.sqrt(_sum_groups(squares, PADDED_CHANNELS, BLOCK_CHANNELS) / count + eps)
    rstd = _to_channels(rstd_of_group, PADDED_CHANNELS, BLOCK_CHANNELS)
    y = _activated(centred * (rstd * weight)[None, :] + bias[None, :], ACTIVATION)
    _store_output(y_ptr, y, sample, split, PIXELS, channel, offsets, mask, CHANNELS, OUT_CHANNELS, FIRST_CHANNEL, BLOCK_PIXELS)
    if mean_ptr is not None:
        groups: tl.constexpr = CHANNELS // GROUP_CHANNELS
        chunk: tl.constexpr = BLOCK_CHANNELS // PADDED_CHANNELS
        group = tl.program_id(0) % tl.cdiv(groups, chunk) * chunk + tl.arange(0, chunk)
        tl.store(mean_ptr + sample * groups + group, mean_of_group, mask=group < groups)
        tl.store(rstd_ptr + sample * groups + group, rstd_of_group, mask=group < groups)


@triton.jit(do_not_specialize=["shift_stride_n"])
def _one_pass_backward(
    grad_ptr,
    total_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    grad_shift_ptr,
    sums_ptr,
    shift_stride_n,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    sample, _, channel, group, offsets, mask, channel_mask = _tile(
        0, PIXELS, 1, CHANNELS, GROUP_CHANNELS, PADDED_CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST
    )
    if PIXELS == BLOCK_PIXELS:
        mask = tl.broadcast_to(channel_mask[None, :], (BLOCK_PIXELS, BLOCK_CHANNELS))  # spares the registers of the other half
    start, statistics = sample * CHANNELS * PIXELS, sample * (CHANNELS // GROUP_CHANNELS) + group
    normal, grad, weight, rstd = _load_normal_and_grad(
        grad_ptr,
        total_ptr,
        shift_ptr,
        weight_ptr,
        bias_ptr,
        mean_ptr,
        rstd_ptr,
        sample,
        start,
        offsets,
        channel,
        statistics,
        mask,
        channel_mask,
        shift_stride_n,
        ACTIVATION,
    )

    bias_sum, weight_sum = tl.sum(grad, axis=0), tl.sum(grad * normal, axis=0)
    sums_ptr += sample * 2 * CHANNELS + channel
    tl.store(sums_ptr, weight_sum, mask=channel_mask)
    tl.store(sums_ptr + CHANNELS, bias_sum, mask=channel_mask)
    count = PIXELS * GROUP_CHANNELS
    on_one = _sum_groups(weight * bias_sum, PADDED_CHANNELS, BLOCK_CHANNELS) / count
    on_normal = _sum_groups(weight * weight_sum, PADDED_CHANNELS, BLOCK_CHANNELS) / count
    on_one = _to_channels(on_one, PADDED_CHANNELS, BLOCK_CHANNELS)
    on_normal = _to_channels(on_normal, PADDED_CHANNELS, BLOCK_CHANNELS)
    if grad_shift_ptr is not None:
        grad_shift = rstd * (weight * bias_sum - PIXELS * on_one - tl.sum(normal, axis=0) * on_normal)
        grad_shift = grad_shift.to(grad_shift_ptr.dtype.element_ty)
        tl.store(grad_shift_ptr + sample * CHANNELS + channel, grad_shift, mask=channel_mask)
    grad_x = rstd[None, :] * (weight[None, :] * grad - on_one[None, :] - normal * on_normal[None, :])
    tl.store(grad_x_ptr + start + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_sample"])
def _block_moments(
    x_ptr,
    x_bias_ptr,
    residual_ptr,
    total_ptr,
    moments_ptr,
    first_sample,
    pixels,
    splits,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    sample, split, channel, _, offsets, mask, channel_mask = _tile(
        first_sample, pixels, splits, CHANNELS, GROUP_CHANNELS, GROUP_CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST
    )
    start = sample * CHANNELS * pixels
    h = _load_total(x_ptr, x_bias_ptr, residual_ptr, total_ptr, start, channel, offsets, mask, channel_mask)
    if x_bias_ptr is not None:
        h = tl.where(mask, h, 0.0)
    count = tl.minimum(BLOCK_PIXELS, pixels - split * BLOCK_PIXELS).to(tl.float32)
    mean = tl.sum(h, axis=0) / count
    centred = tl.where(mask, h - mean[None, :], 0.0)
    moments = moments_ptr + (sample * splits + split) * 2 * CHANNELS + channel
    tl.store(moments, mean, mask=channel_mask)
    tl.store(moments + CHANNELS, tl.sum(centred * centred, axis=0), mask=channel_mask)


@triton.jit(do_not_specialize=["first_sample", "shift_stride_n"])
def _join_moments(
    moments_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    first_sample,
    pixels,
    shift_stride_n,
    eps,
    CHANNELS: tl.constexpr,
    FIRST_CHANNEL: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    SPLITS: tl.constexpr,  # no number on the device: beside numpy 2.4 Triton 3.6 interprets no loop over one
    BLOCK_SPLITS: tl.constexpr,
):
    groups = CHANNELS // GROUP_CHANNELS
    sample, group = (first_sample + tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    in_group = tl.arange(0, PADDED_CHANNELS)[None, :]
    channel = group * GROUP_CHANNELS + in_group
    shift = tl.zeros((1, PADDED_CHANNELS), tl.float32)
    if shift_ptr is not None:
        shift = _load(shift_ptr + sample * shift_stride_n + FIRST_CHANNEL + channel, in_group < GROUP_CHANNELS)
    count = pixels * GROUP_CHANNELS

    sums = tl.zeros((BLOCK_SPLITS, PADDED_CHANNELS), tl.float32)
    for first in range(0, SPLITS, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        mask = (split < SPLITS) & (in_group < GROUP_CHANNELS)
        rows = tl.minimum(BLOCK_PIXELS, pixels - split * BLOCK_PIXELS).to(tl.float32)
        block_mean = tl.load(moments_ptr + (sample * SPLITS + split) * 2 * CHANNELS + channel, mask=mask, other=0)
        sums += tl.where(mask, rows * (block_mean + shift), 0.0)
    mean = tl.sum(tl.sum(sums, axis=0)) / count

    squares = tl.zeros((BLOCK_SPLITS, PADDED_CHANNELS), tl.float32)
    for first in range(0, SPLITS, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        mask = (split < SPLITS) & (in_group < GROUP_CHANNELS)
        rows = tl.minimum(BLOCK_PIXELS, pixels - split * BLOCK_PIXELS).to(tl.float32)
        moments = moments_ptr + (sample * SPLITS + split) * 2 * CHANNELS + channel
        distance = tl.load(moments, mask=mask, other=0) + shift - mean
        within = tl.load(moments + CHANNELS, mask=mask, other=0)
        squares += tl.where(mask, within + rows * distance * distance, 0.0)
    variance = tl.sum(tl.sum(squares, axis=0)) / count
    tl.store(mean_ptr + sample * groups + group, mean)
    tl.store(rstd_ptr + sample * groups + group, 1 / tl.sqrt(variance + eps))


@triton.jit(do_not_specialize=["first_sample", "shift_stride_n"])
def _apply_forward(
    total_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    first_sample,
    pixels,
    splits,
    shift_stride_n,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    FIRST_CHANNEL: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    sample, split, channel, group, offsets, mask, channel_mask = _tile(
        first_sample, pixels, splits, CHANNELS, GROUP_CHANNELS, GROUP_CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST
    )
    statistics, affine = sample * (CHANNELS // GROUP_CHANNELS) + group, FIRST_CHANNEL + channel
    mean = _load(mean_ptr + statistics, channel_mask)
    if shift_ptr is not None:
        mean -= _load(shift_ptr + sample * shift_stride_n + affine, channel_mask)
    scale = _load(rstd_ptr + statistics, channel_mask) * _load(weight_ptr + affine, channel_mask)
    bias = _load(bias_ptr + affine, channel_mask)
    total = _load(total_ptr + sample * CHANNELS * pixels + offsets, mask)
    y = _activated((total - mean[None, :]) * scale[None, :] + bias[None, :], ACTIVATION)
    _store_output(y_ptr, y, sample, split, pixels, channel, offsets, mask, CHANNELS, OUT_CHANNELS, FIRST_CHANNEL, BLOCK_PIXELS)


@triton.jit(do_not_specialize=["first_sample", "shift_stride_n"])
def _block_sums(
    grad_ptr,
    total_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    block_sums_ptr,
    first_sample,
    pixels,
    splits,
    shift_stride_n,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    sample, split, channel, group, offsets, mask, channel_mask = _tile(
        first_sample, pixels, splits, CHANNELS, GROUP_CHANNELS, GROUP_CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST
    )
    start, statistics = sample * CHANNELS * pixels, sample * (CHANNELS // GROUP_CHANNELS) + group
    normal, grad, _, _ = _load_normal_and_grad(
        grad_ptr,
        total_ptr,
        shift_ptr,
        weight_ptr,
        bias_ptr,
        mean_ptr,
        rstd_ptr,
        sample,
        start,
        offsets,
        channel,
        statistics,
        mask,
        channel_mask,
        shift_stride_n,
        ACTIVATION,
    )
    sums = block_sums_ptr + (sample * splits + split) * 3 * CHANNELS + channel
    tl.store(sums, tl.sum(grad, axis=0), mask=channel_mask)
    tl.store(sums + CHANNELS, tl.sum(grad * normal, axis=0), mask=channel_mask)
    tl.store(sums + 2 * CHANNELS, tl.sum(normal, axis=0), mask=channel_mask)


@triton.jit(do_not_specialize=["first_sample"])
def _join_sums(
    block_sums_ptr,
    weight_ptr,
    rstd_ptr,
    grad_shift_ptr,
    sums_ptr,
    on_one_ptr,
    on_normal_ptr,
    first_sample,
    pixels,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,  # no number on the device: beside numpy 2.4 Triton 3.6 interprets no loop over one
    BLOCK_SPLITS: tl.constexpr,
):
    groups = CHANNELS // GROUP_CHANNELS
    sample, group = (first_sample + tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    in_group = tl.arange(0, PADDED_CHANNELS)[None, :]
    channel = group * GROUP_CHANNELS + in_group
    channel_mask = in_group < GROUP_CHANNELS
    grads = tl.zeros((BLOCK_SPLITS, PADDED_CHANNELS), tl.float32)
    products = tl.zeros((BLOCK_SPLITS, PADDED_CHANNELS), tl.float32)
    normals = tl.zeros((BLOCK_SPLITS, PADDED_CHANNELS), tl.float32)
    for first in range(0, SPLITS, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        mask = (split < SPLITS) & channel_mask
        block_sums = block_sums_ptr + (sample * SPLITS + split) * 3 * CHANNELS + channel
        grads += tl.load(block_sums, mask=mask, other=0)
        products += tl.load(block_sums + CHANNELS, mask=mask, other=0)
        normals += tl.load(block_sums + 2 * CHANNELS, mask=mask, other=0)
    bias_sum = tl.sum(grads, axis=0, keep_dims=True)
    weight_sum = tl.sum(products, axis=0, keep_dims=True)
    sums_ptr += sample * 2 * CHANNELS + channel
    tl.store(sums_ptr, weight_sum, mask=channel_mask)
    tl.store(sums_ptr + CHANNELS, bias_sum, mask=channel_mask)

    weight = _load(weight_ptr + channel, channel_mask)
    count = pixels * GROUP_CHANNELS
    on_one = tl.sum(tl.sum(weight * bias_sum, axis=1)) / count
    on_normal = tl.sum(tl.sum(weight * weight_sum, axis=1)) / count
    tl.store(on_one_ptr + sample * groups + group, on_one)
    tl.store(on_normal_ptr + sample * groups + group, on_normal)
    if grad_shift_ptr is not None:
        rstd = tl.load(rstd_ptr + sample * groups + group)
        normal_sum = tl.sum(normals, axis=0, keep_dims=True)
        grad_shift = rstd * (weight * bias_sum - pixels * on_one - normal_sum * on_normal)
        grad_shift = grad_shift.to(grad_shift_ptr.dtype.element_ty)
        tl.store(grad_shift_ptr + sample * CHANNELS + channel, grad_shift, mask=channel_mask)


@triton.jit(do_not_specialize=["first_sample", "shift_stride_n"])
def _apply_backward(
    grad_ptr,
    total_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    on_one_ptr,
    on_normal_ptr,
    grad_x_ptr,
    first_sample,
    pixels,
    splits,
    shift_stride_n,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    sample, _, channel, group, offsets, mask, channel_mask = _tile(
        first_sample, pixels, splits, CHANNELS, GROUP_CHANNELS, GROUP_CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST
    )
    start, statistics = sample * CHANNELS * pixels, sample * (CHANNELS // GROUP_CHANNELS) + group
    normal, grad, weight, rstd = _load_normal_and_grad(
        grad_ptr,
        total_ptr,
        shift_ptr,
        weight_ptr,
        bias_ptr,
        mean_ptr,
        rstd_ptr,
        sample,
        start,
        offsets,
        channel,
        statistics,
        mask,
        channel_mask,
        shift_stride_n,
        ACTIVATION,
    )
    on_one, on_normal = _load(on_one_ptr + statistics, channel_mask), _load(on_normal_ptr + statistics, channel_mask)
    grad_x = rstd[None, :] * (weight[None, :] * grad - on_one[None, :] - normal * on_normal[None, :])
    tl.store(grad_x_ptr + start + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class _Plan:
    """What the launches for one shape have in common.

    Attributes:
        one_pass: Whether one kernel does it all.
        programs: Of a kernel on tiles, a sample.
        splits: Blocks of pixels.
        tiles, join, output: Constants of the kernels on tiles; of those that join partial sums; and, beside the first, of those
            that write the output.
    """

    one_pass: bool
    programs: int
    splits: int
    tiles: dict
    join: dict
    output: dict


@functools.cache
def _plan(
    channels: int,
    pixels: int,
    groups: int,
    element_size: int,
    channels_last: bool,
    activation: str,
    *,
    out_channels: int | None = None,
    first_channel: int = 0,
    backward: bool = False,
) -> _Plan:
    # A part of out_channels is cut as the tensor that it is of, for the same numbers.
    group_channels, out_channels = channels // groups, out_channels or channels
    layout = "channels_last" if channels_last else "contiguous"
    all_groups = out_channels // group_channels
    cut = configuration(all_groups * group_channels, pixels, all_groups, element_size, layout, backward=backward)
    one_pass = cut.kind == "one-pass"
    padded = triton.next_power_of_2(group_channels)
    # the default of enable_fp_fusion differs between versions of Triton
    shared = {"CHANNELS": channels, "GROUP_CHANNELS": group_channels, "enable_fp_fusion": True}
    tiles = {
        **shared,
        "BLOCK_PIXELS": cut.block_pixels,
        "BLOCK_CHANNELS": cut.block_channels,
        "CHANNELS_LAST": channels_last,
        "num_warps": cut.num_warps,
    }
    block_splits = max(min(triton.next_power_of_2(cut.splits), 4096 // padded), 1)
    join = {**shared, "PADDED_CHANNELS": padded, "SPLITS": cut.splits, "BLOCK_SPLITS": block_splits}
    output = {"ACTIVATION": activation}
    if not backward:
        join |= {"FIRST_CHANNEL": first_channel, "BLOCK_PIXELS": cut.block_pixels}
        output |= {"OUT_CHANNELS": out_channels, "FIRST_CHANNEL": first_channel}
    if one_pass:
        tiles |= {"PIXELS": pixels, "PADDED_CHANNELS": padded}
        programs = triton.cdiv(groups, cut.chunk)
    else:
        programs = cut.splits * triton.cdiv(channels, cut.block_channels)
    return _Plan(one_pass, programs, cut.splits, tiles, join, tiles | output)


def _channels_last(x: Tensor) -> bool:
    # Where both layouts hold, as on 1x1 maps, the channels are what lies side by side.
    return x.is_contiguous(memory_format=torch.channels_last)


def _in_l2(device: torch.device, samples: int, sample_bytes: int) -> list[tuple[int, int]]:
    """First sample and number of samples of rounds that fit the L2 cache, from which what is read twice then comes."""
    size = launch.l2_bytes(device)
    step = samples if size is None else min(max(size // sample_bytes, 1), samples)
    return [(first, min(step, samples - first)) for first in range(0, samples, step)]


def _rows(shift: Tensor | None) -> tuple[Tensor | None, int]:
    """The shift with its channels side by side, and its stride from sample to sample."""
    if shift is None:
        return None, 0
    if shift.stride(1) != 1:
        shift = shift.contiguous()
    return shift, shift.stride(0)


def _launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shift: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    y: Tensor,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    first_channel: int,
) -> None:
    """Fills y, its channels from `first_channel` on where it has more than x, total, mean and rstd, where they are given."""
    n, channels, height, width = x.shape
    pixels, element_size = height * width, x.element_size()
    plan = _plan(
        channels,
        pixels,
        num_groups,
        element_size,
        _channels_last(x),
        activation,
        out_channels=y.shape[1],
        first_channel=first_channel,
    )
    shift, shift_stride = _rows(shift)
    with torch.cuda.device_of(x):
        if plan.one_pass:
            _one_pass_forward[(n * plan.programs,)](
                x, x_bias, residual, shift, weight, bias, y, total, mean, rstd, shift_stride, eps, **plan.output
            )
            return
        moments = x.new_empty(n, plan.splits, 2, channels, dtype=torch.float32)
        if mean is None:
            mean, rstd = x.new_empty(2, n, num_groups, dtype=torch.float32)
        tensors = 2 + (residual is not None) + (total is not None)
        applied = x if total is None else total
        for first, count in _in_l2(x.device, n, tensors * channels * pixels * element_size):
            grid, sizes = (count * plan.programs,), (first, pixels, plan.splits)
            _block_moments[grid](x, x_bias, residual, total, moments, *sizes, **plan.tiles)
            _join_moments[(count * num_groups,)](moments, shift, mean, rstd, first, pixels, shift_stride, eps, **plan.join)
            _apply_forward[grid](applied, shift, weight, bias, mean, rstd, y, *sizes, shift_stride, **plan.output)


def _empty_like(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, total, mean and rstd of `derivatives`."""
    memory_format = shared.memory_format(x)
    x, weight, bias = x.contiguous(memory_format=memory_format), weight.contiguous(), bias.contiguous()
    y, total = _empty_like(x, memory_format), None
    if residual is not None:
        residual, total = residual.contiguous(memory_format=memory_format), _empty_like(x, memory_format)
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=torch.float32) for _ in range(2))
    _launch_forward(x, weight, bias, num_groups, eps, shift, None, residual, activation, y, total, mean, rstd, 0)
    return y, x.new_empty(0) if total is None else total, mean, rstd


def _infer(
    x: Tensor,
    beside: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shift: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    *,
    sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """y and, with `sums`, the total."""
    memory_format = shared.memory_format(x) if beside is None else torch.channels_last
    x, weight, bias = x.contiguous(memory_format=memory_format), weight.contiguous(), bias.contiguous()
    total = _empty_like(x, memory_format) if sums else None
    if x_bias is not None:
        x_bias = x_bias.contiguous()
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    if beside is None:
        y = _empty_like(x, memory_format)
        _launch_forward(x, weight, bias, num_groups, eps, shift, x_bias, residual, activation, y, total, None, None, 0)
        return y, total
    beside = beside.contiguous(memory_format=memory_format)
    y = _pair_output(x, beside)
    group_channels, first = y.shape[1] // num_groups, x.shape[1]
    options = (weight, bias, first // group_channels, eps, shift, x_bias, residual, activation)
    _launch_forward(x, *options, y, total, None, None, 0)
    options = (weight, bias, num_groups - first // group_channels, eps, shift, None, None, activation)
    _launch_forward(beside, *options, y, None, None, None, first)
    return y, total


def infer(
    x: Tensor,
    beside: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    """y of x, or of x and `beside` side by side, and nothing that a backward would need."""
    return _infer(x, beside, weight, bias, num_groups, eps, shift, None, None, activation, sums=False)[0]


def infer_sum(
    x: Tensor,
    beside: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shift: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """y and total = x + x_bias + residual, in the same passes."""
    y, total = _infer(x, beside, weight, bias, num_groups, eps, shift, x_bias, residual, activation, sums=True)
    assert total is not None, "asked for"
    return y, total


def _pair_output(x: Tensor, beside: Tensor) -> Tensor:
    shape = (x.shape[0], x.shape[1] + beside.shape[1], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_infer(
    x: Tensor,
    beside: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    return _pair_output(x, beside) if beside is not None else _empty_like(x, shared.memory_format(x))


def _fake_infer_sum(
    x: Tensor,
    beside: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shift: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    total = _empty_like(x, shared.memory_format(x) if beside is None else torch.channels_last)
    return _fake_infer(x, beside, weight, bias, num_groups, eps, shift, activation), total


def backward(
    grad: Tensor, total: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, shift: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `derivatives`."""
    memory_format = shared.memory_format(total)
    grad, total = grad.contiguous(memory_format=memory_format), total.contiguous(memory_format=memory_format)
    weight, bias, mean, rstd = weight.contiguous(), bias.contiguous(), mean.contiguous(), rstd.contiguous()
    (n, channels, height, width), num_groups = total.shape, mean.shape[1]
    pixels, element_size = height * width, total.element_size()
    grad_x = _empty_like(total, memory_format)
    sums = total.new_empty(n, 2, channels, dtype=torch.float32)
    grad_shift = None if shift is None else _empty_like(shift, torch.contiguous_format)
    shift, shift_stride = _rows(shift)
    plan = _plan(channels, pixels, num_groups, element_size, _channels_last(total), activation, backward=True)
    inputs = (grad, total, shift, weight, bias, mean, rstd)

    with torch.cuda.device_of(total):
        if plan.one_pass:
            _one_pass_backward[(n * plan.programs,)](*inputs, grad_x, grad_shift, sums, shift_stride, **plan.output)
        else:
            block_sums = total.new_empty(n, plan.splits, 3, channels, dtype=torch.float32)
            on_one, on_normal = total.new_empty(2, n, num_groups, dtype=torch.float32)
            joined = (block_sums, weight, rstd, grad_shift, sums, on_one, on_normal)
            for first, count in _in_l2(total.device, n, 3 * channels * pixels * element_size):
                grid, sizes = (count * plan.programs,), (first, pixels, plan.splits)
                _block_sums[grid](*inputs, block_sums, *sizes, shift_stride, **plan.output)
                _join_sums[(count * num_groups,)](*joined, first, pixels, **plan.join)
                _apply_backward[grid](*inputs, on_one, on_normal, grad_x, *sizes, shift_stride, **plan.output)
    grad_weight, grad_bias = sums.sum(0)
    grad_shift = total.new_empty(0) if grad_shift is None else grad_shift
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_shift


_AFFINE = "Tensor weight, Tensor bias, int num_groups, float eps, Tensor? shift"
_training = define(
    f"group_norm_act_triton(Tensor x, {_AFFINE}, Tensor? residual, str activation) -> (Tensor, Tensor, Tensor, Tensor)",
    forward,
)
define(
    "group_norm_act_backward_triton(Tensor grad, Tensor total, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,"
    " Tensor? shift, str activation) -> (Tensor, Tensor, Tensor, Tensor)",
    backward,
)
shared.register_group_norm_act("triton")
_inference = define(
    f"group_norm_act_inference_triton(Tensor x, Tensor? beside, {_AFFINE}, str activation) -> Tensor", infer, _fake_infer
)
_sum_inference = define(
    f"group_norm_act_sum_inference_triton(Tensor x, Tensor? beside, {_AFFINE}, Tensor? x_bias, Tensor? residual, str activation)"
    " -> (Tensor, Tensor)",
    infer_sum,
    _fake_infer_sum,
)


def _gradients_asked(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, x_bias: Tensor | None, residual: Tensor | None
) -> bool:
    if not torch.is_grad_enabled():
        return False
    return (
        x.requires_grad
        or weight.requires_grad
        or bias.requires_grad
        or (shift is not None and shift.requires_grad)
        or (x_bias is not None and x_bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def _unlike(x: Tensor, name: str, tensor: Tensor) -> str | None:
    """Why a tensor beside x is declined for its dtype or device, or None."""
    if tensor.dtype not in FLOATS:
        return f"{name} is neither float32, bfloat16 nor float16"
    return "tensors lie on different devices" if tensor.device != x.device else None


def _declined(
    x: Tensor, weight: Tensor, bias: Tensor, channels: int, shift: Tensor | None, x_bias: Tensor | None, residual: Tensor | None
) -> str | None:
    """Why the kernels decline a norm of so many channels, of which x has the first, or None; the cheapest questions first."""
    if reason := device_reason(x):
        return reason
    if x.dtype not in FLOATS:
        return "x is neither float32, bfloat16 nor float16"
    if weight is None or bias is None:
        return "weight and bias must be given"
    if reason := _unlike(x, "weight", weight) or _unlike(x, "bias", bias):
        return reason
    if weight.shape != (channels,) or bias.shape != (channels,):
        return "weight or bias is not (C,)"
    if shift is not None:
        if shift.shape != (x.shape[0], channels):
            return "the shift is not (N, C)"
        if reason := _unlike(x, "the shift", shift):
            return reason
    if x_bias is not None:
        if x_bias.shape != (x.shape[1],):
            return "x_bias is not (C,)"
        if reason := _unlike(x, "x_bias", x_bias):
            return reason
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape or residual.device != x.device):
        return "the residual differs from x in dtype, shape or device"
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return "x is neither contiguous nor channels-last"
    return None


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
    """Why the kernels decline a call of `multibeta.ops.group_norm_act`, or None."""
    if x.ndim != 4:
        return f"x has {x.ndim} dimensions, the kernels take 4"
    n, channels, height, width = x.shape
    if reason := _declined(x, weight, bias, channels, shift, x_bias, residual):
        return reason
    elements = channels * height * width
    if n * elements == 0:
        return "x is empty"
    if elements >= 2**31:
        return "a sample has 2^31 elements or more"
    if x_bias is not None and _gradients_asked(x, weight, bias, shift, x_bias, residual):
        return "gradients are asked for, with an x_bias the kernels have none"
    return None


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
    """`multibeta.ops.group_norm_act` by Triton kernels."""
    if _gradients_asked(x, weight, bias, shift, x_bias, residual):
        if x_bias is not None:
            raise RuntimeError("x_bias has no backward")
        y, total, _, _ = _training(x, weight, bias, num_groups, eps, shift, residual, activation)
        return y if residual is None else (y, total)
    if x_bias is None and residual is None:
        return _inference(x, None, weight, bias, num_groups, eps, shift, activation)
    return _sum_inference(x, None, weight, bias, num_groups, eps, shift, x_bias, residual, activation)


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
    """Why the kernels decline a call of `group_norm_act_pair`, or None."""
    if reason := shared.pair_reason(x, beside, num_groups):
        return reason
    n, channels, height, width = x.shape
    channels += beside.shape[1]
    if reason := _declined(x, weight, bias, channels, shift, x_bias, residual):
        return reason
    elements = channels * height * width
    if n * elements == 0:
        return "x is empty"
    if elements >= 2**31:
        return "a sample has 2^31 elements or more"
    if _gradients_asked(x, weight, bias, shift, x_bias, residual) or (torch.is_grad_enabled() and beside.requires_grad):
        return "the pair has no backward"
    return None


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
    """`group_norm_act` of torch.cat([x, beside], dim=1), which is never made, for inference."""
    if _gradients_asked(x, weight, bias, shift, x_bias, residual) or (torch.is_grad_enabled() and beside.requires_grad):
        raise RuntimeError("the pair has no backward")
    if x_bias is None and residual is None:
        return _inference(x, beside, weight, bias, num_groups, eps, shift, activation)
    return _sum_inference(x, beside, weight, bias, num_groups, eps, shift, x_bias, residual, activation)
