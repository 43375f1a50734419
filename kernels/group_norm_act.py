"""Triton kernels of `group_norm_act`: activation(GroupNorm(x + residual + shift)) in one read and one write where a group fits.

Two shapes of work, chosen by `configuration` from (C, H W) alone, so that a sample never depends on its batch:

- "one-pass": a program holds every pixel of a few groups in registers, a tile (pixels, channels).
- "split": larger maps are cut into blocks of pixels. Each yields the mean and the centred squares of its channels, a second
  kernel joins them by Chan's formula into the moments of the groups, a third applies them.

Both layouts, (N, H, W, C) and (N, C, H, W) in memory, are one source: a tile has a stride per pixel and one per channel.
Sums are float32, variances are centred (raw moments lose the variance where mean/std = 300), nothing is atomic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import derivatives, pair
from .launch import FLOATS, device_reason

# A tile of 64 values a thread (32 of each of two inputs) keeps to the 128 registers that 512 threads have; a larger one spills.
_LANES_PER_THREAD = 64
_MAX_WARPS = 16

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

    - One-pass where the tile of one group has at most 32768 padded elements (16384 in the backward, which holds two tensors).
    - Channels-last programs take as many groups as make a row of at least 64 bytes (two memory sectors), within that limit,
      and split where it leaves less than a sector; contiguous ones take one group, whose pixels are a row. Both take more
      while the tile is below 2048 elements.
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
    limit = _LANES_PER_THREAD * 32 * _MAX_WARPS // inputs
    group_tile = padded_channels * padded_pixels
    chunk = 1
    while groups % (2 * chunk) == 0 and 2 * chunk * group_tile <= limit:
        short_row = channels_last and chunk * group_channels * element_size < 64
        if not short_row and chunk * group_tile >= 2048:
            break
        chunk *= 2
    part_of_sector = channels_last and chunk < groups and chunk * group_channels * element_size < 32
    if group_tile <= limit and not part_of_sector:
        num_warps = _warps(chunk * group_tile * inputs)
        return Configuration("one-pass", chunk, padded_pixels, chunk * padded_channels, num_warps, 1)
    tile = limit // 2
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
    pixels,
    splits,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Sample, split, channels, their groups, offsets in the sample (pixels, channels) and both masks, of a program.

    A tile holds whole groups, each padded to PADDED_CHANNELS, or any channels where that is GROUP_CHANNELS.
    """
    padded_channels = CHANNELS // GROUP_CHANNELS * PADDED_CHANNELS
    channel_blocks = tl.cdiv(padded_channels, BLOCK_CHANNELS)
    block = tl.program_id(0) // channel_blocks
    sample, split = (block // splits).to(tl.int64), block % splits
    pixel = split * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]
    lane = tl.arange(0, BLOCK_CHANNELS)[None, :]
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
        offsets = pixel * CHANNELS + channel
    else:
        offsets = channel * pixels + pixel
    return sample, split, channel, channel // GROUP_CHANNELS, offsets, (pixel < pixels) & channel_mask, channel_mask


@triton.jit
def _over_groups(sums, PADDED_CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Sums over the channels of each group, from sums per channel, (1, channels), to the same shape."""
    grouped = tl.reshape(sums, (BLOCK_CHANNELS // PADDED_CHANNELS, PADDED_CHANNELS))
    grouped = tl.broadcast_to(tl.sum(grouped, axis=1, keep_dims=True), (BLOCK_CHANNELS // PADDED_CHANNELS, PADDED_CHANNELS))
    return tl.reshape(grouped, (1, BLOCK_CHANNELS))


@triton.jit
def _load_shift(shift_ptr, sample, channel, channel_mask, stride_n, stride_c):
    return tl.load(shift_ptr + sample * stride_n + channel * stride_c, mask=channel_mask, other=0).to(tl.float32)


@triton.jit
def _load_sum(x_ptr, residual_ptr, total_ptr, start, offsets, mask):
    """x + residual, in float32 after it was rounded and stored as the total."""
    h = tl.load(x_ptr + start + offsets, mask=mask, other=0).to(tl.float32)
    if residual_ptr is not None:
        total = (h + tl.load(residual_ptr + start + offsets, mask=mask, other=0).to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + start + offsets, total, mask=mask)
        h = total.to(tl.float32)
    return h


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
    BLOCK_PIXELS: tl.constexpr,
):
    """Stores a tile where x has it, or OUT_CHANNELS from pixel to pixel in a slice of a larger channels-last tensor."""
    if OUT_CHANNELS != CHANNELS:
        offsets = (split * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]) * OUT_CHANNELS + channel
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
    shift_stride_c,
    ACTIVATION: tl.constexpr,
):
    """The normalised input, the gradient before the activation, the weight and 1/deviation, on the tile of a backward kernel."""
    mean = tl.load(mean_ptr + statistics, mask=channel_mask, other=0)
    rstd = tl.load(rstd_ptr + statistics, mask=channel_mask, other=0)
    weight = tl.load(weight_ptr + channel, mask=channel_mask, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=channel_mask, other=0).to(tl.float32)
    h = tl.load(total_ptr + start + offsets, mask=mask, other=0).to(tl.float32)
    if shift_ptr is not None:
        h += _load_shift(shift_ptr, sample, channel, channel_mask, shift_stride_n, shift_stride_c)
    normal = tl.where(mask, (h - mean) * rstd, 0.0)
    grad = tl.load(grad_ptr + start + offsets, mask=mask, other=0).to(tl.float32)
    return normal, _through_activation(grad, normal * weight + bias, ACTIVATION), weight, rstd


@triton.jit
def _one_pass_forward(
    x_ptr,
    residual_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    shift_stride_n,
    shift_stride_c,
    eps,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    sample, split, channel, group, offsets, mask, channel_mask = _tile(
        PIXELS, 1, CHANNELS, GROUP_CHANNELS, PADDED_CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST
    )
    start, statistics = sample * CHANNELS * PIXELS, sample * (CHANNELS // GROUP_CHANNELS) + group
    h = _load_sum(x_ptr, residual_ptr, total_ptr, start, offsets, mask)
    if shift_ptr is not None:
        h += _load_shift(shift_ptr, sample, channel, channel_mask, shift_stride_n, shift_stride_c)
        if PIXELS != BLOCK_PIXELS:
            h = tl.where(mask, h, 0.0)

    count = PIXELS * GROUP_CHANNELS
    mean = _over_groups(tl.sum(h, axis=0, keep_dims=True), PADDED_CHANNELS, BLOCK_CHANNELS) / count
    centred = tl.where(mask, h - mean, 0.0)
    squares = tl.sum(centred * centred, axis=0, keep_dims=True)
    rstd = 1 / tl.sqrt(_over_groups(squares, PADDED_CHANNELS, BLOCK_CHANNELS) / count + eps)
    first_of_group = channel_mask & (channel % GROUP_CHANNELS == 0)
    tl.store(mean_ptr + statistics, mean, mask=first_of_group)
    tl.store(rstd_ptr + statistics, rstd, mask=first_of_group)

    weight = tl.load(weight_ptr + channel, mask=channel_mask, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=channel_mask, other=0).to(tl.float32)
    y = _activated(centred * (rstd * weight) + bias, ACTIVATION)
    _store_output(y_ptr, y, sample, split, PIXELS, channel, offsets, mask, CHANNELS, OUT_CHANNELS, BLOCK_PIXELS)


@triton.jit
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
    weight_sums_ptr,
    bias_sums_ptr,
    shift_stride_n,
    shift_stride_c,
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
        PIXELS, 1, CHANNELS, GROUP_CHANNELS, PADDED_CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST
    )
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
        shift_stride_c,
        ACTIVATION,
    )

    bias_sum = tl.sum(grad, axis=0, keep_dims=True)
    weight_sum = tl.sum(grad * normal, axis=0, keep_dims=True)
    tl.store(bias_sums_ptr + sample * CHANNELS + channel, bias_sum, mask=channel_mask)
    tl.store(weight_sums_ptr + sample * CHANNELS + channel, weight_sum, mask=channel_mask)
    count = PIXELS * GROUP_CHANNELS
    on_one = _over_groups(weight * bias_sum, PADDED_CHANNELS, BLOCK_CHANNELS) / count
    on_normal = _over_groups(weight * weight_sum, PADDED_CHANNELS, BLOCK_CHANNELS) / count
    if grad_shift_ptr is not None:
        normal_sum = tl.sum(normal, axis=0, keep_dims=True)
        grad_shift = rstd * (weight * bias_sum - PIXELS * on_one - normal_sum * on_normal)
        grad_shift = grad_shift.to(grad_shift_ptr.dtype.element_ty)
        tl.store(grad_shift_ptr + sample * CHANNELS + channel, grad_shift, mask=channel_mask)
    grad_x = rstd * (weight * grad - on_one - normal * on_normal)
    tl.store(grad_x_ptr + start + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _block_moments(
    x_ptr,
    residual_ptr,
    total_ptr,
    moments_ptr,
    pixels,
    splits,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    sample, split, channel, _, offsets, mask, channel_mask = _tile(
        pixels, splits, CHANNELS, GROUP_CHANNELS, GROUP_CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST
    )
    h = _load_sum(x_ptr, residual_ptr, total_ptr, sample * CHANNELS * pixels, offsets, mask)
    count = tl.minimum(BLOCK_PIXELS, pixels - split * BLOCK_PIXELS).to(tl.float32)
    mean = tl.sum(h, axis=0, keep_dims=True) / count
    centred = tl.where(mask, h - mean, 0.0)
    squares = tl.sum(centred * centred, axis=0, keep_dims=True)
    moments = moments_ptr + (sample * splits + split) * 2 * CHANNELS + channel
    tl.store(moments, mean, mask=channel_mask)
    tl.store(moments + CHANNELS, squares, mask=channel_mask)


@triton.jit
def _join_moments(
    moments_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    pixels,
    splits,
    shift_stride_n,
    shift_stride_c,
    eps,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    groups = CHANNELS // GROUP_CHANNELS
    sample, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    in_group = tl.arange(0, PADDED_CHANNELS)[None, :]
    channel = group * GROUP_CHANNELS + in_group
    shift = tl.zeros((1, PADDED_CHANNELS), tl.float32)
    if shift_ptr is not None:
        shift = _load_shift(shift_ptr, sample, channel, in_group < GROUP_CHANNELS, shift_stride_n, shift_stride_c)
    count = pixels * GROUP_CHANNELS

    sums = tl.zeros((BLOCK_SPLITS, PADDED_CHANNELS), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        mask = (split < splits) & (in_group < GROUP_CHANNELS)
        rows = tl.minimum(BLOCK_PIXELS, pixels - split * BLOCK_PIXELS).to(tl.float32)
        block_mean = tl.load(moments_ptr + (sample * splits + split) * 2 * CHANNELS + channel, mask=mask, other=0)
        sums += tl.where(mask, rows * (block_mean + shift), 0.0)
    mean = tl.sum(tl.sum(sums, axis=0)) / count

    squares = tl.zeros((BLOCK_SPLITS, PADDED_CHANNELS), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        mask = (split < splits) & (in_group < GROUP_CHANNELS)
        rows = tl.minimum(BLOCK_PIXELS, pixels - split * BLOCK_PIXELS).to(tl.float32)
        moments = moments_ptr + (sample * splits + split) * 2 * CHANNELS + channel
        distance = tl.load(moments, mask=mask, other=0) + shift - mean
        within = tl.load(moments + CHANNELS, mask=mask, other=0)
        squares += tl.where(mask, within + rows * distance * distance, 0.0)
    variance = tl.sum(tl.sum(squares, axis=0)) / count
    tl.store(mean_ptr + sample * groups + group, mean)
    tl.store(rstd_ptr + sample * groups + group, 1 / tl.sqrt(variance + eps))


@triton.jit
def _apply_forward(
    total_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    pixels,
    splits,
    shift_stride_n,
    shift_stride_c,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    sample, split, channel, group, offsets, mask, channel_mask = _tile(
        pixels, splits, CHANNELS, GROUP_CHANNELS, GROUP_CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST
    )
    start, statistics = sample * CHANNELS * pixels, sample * (CHANNELS // GROUP_CHANNELS) + group
    mean = tl.load(mean_ptr + statistics, mask=channel_mask, other=0)
    rstd = tl.load(rstd_ptr + statistics, mask=channel_mask, other=0)
    if shift_ptr is not None:
        mean -= _load_shift(shift_ptr, sample, channel, channel_mask, shift_stride_n, shift_stride_c)
    weight = tl.load(weight_ptr + channel, mask=channel_mask, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=channel_mask, other=0).to(tl.float32)
    total = tl.load(total_ptr + start + offsets, mask=mask, other=0).to(tl.float32)
    y = _activated((total - mean) * (rstd * weight) + bias, ACTIVATION)
    _store_output(y_ptr, y, sample, split, pixels, channel, offsets, mask, CHANNELS, OUT_CHANNELS, BLOCK_PIXELS)


@triton.jit
def _block_sums(
    grad_ptr,
    total_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    pixels,
    splits,
    shift_stride_n,
    shift_stride_c,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    sample, split, channel, group, offsets, mask, channel_mask = _tile(
        pixels, splits, CHANNELS, GROUP_CHANNELS, GROUP_CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST
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
        shift_stride_c,
        ACTIVATION,
    )
    sums = sums_ptr + (sample * splits + split) * 3 * CHANNELS + channel
    tl.store(sums, tl.sum(grad, axis=0, keep_dims=True), mask=channel_mask)
    tl.store(sums + CHANNELS, tl.sum(grad * normal, axis=0, keep_dims=True), mask=channel_mask)
    tl.store(sums + 2 * CHANNELS, tl.sum(normal, axis=0, keep_dims=True), mask=channel_mask)


@triton.jit
def _join_sums(
    sums_ptr,
    weight_ptr,
    rstd_ptr,
    grad_shift_ptr,
    weight_sums_ptr,
    bias_sums_ptr,
    on_one_ptr,
    on_normal_ptr,
    pixels,
    splits,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    groups = CHANNELS // GROUP_CHANNELS
    sample, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    in_group = tl.arange(0, PADDED_CHANNELS)[None, :]
    channel = group * GROUP_CHANNELS + in_group
    channel_mask = in_group < GROUP_CHANNELS
    grads = tl.zeros((BLOCK_SPLITS, PADDED_CHANNELS), tl.float32)
    products = tl.zeros((BLOCK_SPLITS, PADDED_CHANNELS), tl.float32)
    normals = tl.zeros((BLOCK_SPLITS, PADDED_CHANNELS), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)[:, None]
        mask = (split < splits) & channel_mask
        sums = sums_ptr + (sample * splits + split) * 3 * CHANNELS + channel
        grads += tl.load(sums, mask=mask, other=0)
        products += tl.load(sums + CHANNELS, mask=mask, other=0)
        normals += tl.load(sums + 2 * CHANNELS, mask=mask, other=0)
    bias_sum = tl.sum(grads, axis=0, keep_dims=True)
    weight_sum = tl.sum(products, axis=0, keep_dims=True)
    tl.store(bias_sums_ptr + sample * CHANNELS + channel, bias_sum, mask=channel_mask)
    tl.store(weight_sums_ptr + sample * CHANNELS + channel, weight_sum, mask=channel_mask)

    weight = tl.load(weight_ptr + channel, mask=channel_mask, other=0).to(tl.float32)
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


@triton.jit
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
    pixels,
    splits,
    shift_stride_n,
    shift_stride_c,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    sample, _, channel, group, offsets, mask, channel_mask = _tile(
        pixels, splits, CHANNELS, GROUP_CHANNELS, GROUP_CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST
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
        shift_stride_c,
        ACTIVATION,
    )
    on_one = tl.load(on_one_ptr + statistics, mask=channel_mask, other=0)
    on_normal = tl.load(on_normal_ptr + statistics, mask=channel_mask, other=0)
    grad_x = rstd * (weight * grad - on_one - normal * on_normal)
    tl.store(grad_x_ptr + start + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _channels_last(x: Tensor) -> bool:
    # Where both layouts hold, as on 1x1 maps, the channels are what lies side by side.
    return x.is_contiguous(memory_format=torch.channels_last)


def _plan(x: Tensor, num_groups: int, *, out_channels: int | None = None, backward: bool = False) -> Configuration:
    # A slice of out_channels is cut as the tensor that it is of, for the same numbers.
    group_channels, layout = x.shape[1] // num_groups, "channels_last" if _channels_last(x) else "contiguous"
    groups = (out_channels or x.shape[1]) // group_channels
    pixels = x.shape[2] * x.shape[3]
    return configuration(groups * group_channels, pixels, groups, x.element_size(), layout, backward=backward)


def _constants(plan: Configuration, x: Tensor, num_groups: int) -> dict:
    """Arguments of every kernel that works on tiles of `plan`."""
    constants = {
        "CHANNELS": x.shape[1],
        "GROUP_CHANNELS": x.shape[1] // num_groups,
        "BLOCK_PIXELS": plan.block_pixels,
        "BLOCK_CHANNELS": plan.block_channels,
        "CHANNELS_LAST": _channels_last(x),
        "num_warps": plan.num_warps,
        "enable_fp_fusion": True,  # the default differs between versions of Triton
    }
    if plan.kind == "one-pass":
        constants |= {"PIXELS": x.shape[2] * x.shape[3], "PADDED_CHANNELS": plan.block_channels // plan.chunk}
    return constants


def _block_splits(plan: Configuration, padded_channels: int) -> int:
    return max(min(triton.next_power_of_2(plan.splits), 4096 // padded_channels), 1)


_FORWARD = (
    "(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? shift, Tensor? residual, str activation)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_INTO = "(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? shift, str activation, Tensor(a!) out) -> ()"
_BACKWARD = (
    "(Tensor grad, Tensor total, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, Tensor? shift, str activation)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("multibeta::group_norm_act_triton", mutates_args=(), schema=_FORWARD)
def forward(x, weight, bias, num_groups, eps, shift, residual, activation):
    memory_format = derivatives.memory_format(x)
    x, weight, bias = x.contiguous(memory_format=memory_format), weight.contiguous(), bias.contiguous()
    y, total = torch.empty_like(x, memory_format=memory_format), x.new_empty(0)
    if residual is not None:
        residual, total = residual.contiguous(memory_format=memory_format), torch.empty_like(y)
    mean, rstd = _launch_forward(x, weight, bias, num_groups, eps, shift, residual, activation, y, total, x.shape[1])
    return y, total, mean, rstd


@torch.library.custom_op("multibeta::group_norm_act_into_triton", mutates_args=("out",), schema=_INTO)
def into(x, weight, bias, num_groups, eps, shift, activation, out):
    assert _channels_last(x) and out.stride(1) == 1, "x and out must be channels-last"
    weight, bias = weight.contiguous(), bias.contiguous()
    _launch_forward(x, weight, bias, num_groups, eps, shift, None, activation, out, None, out.stride(3))


@into.register_fake
def _(x, weight, bias, num_groups, eps, shift, activation, out):
    return None


def _launch_forward(x, weight, bias, num_groups, eps, shift, residual, activation, y, total, out_channels):
    """Fills y, whose pixels are `out_channels` apart if channels-last, and total; returns mean and rstd."""
    n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    mean, rstd = (x.new_empty(n, num_groups, dtype=torch.float32) for _ in range(2))
    shift_strides = (0, 0) if shift is None else shift.stride()
    plan = _plan(x, num_groups, out_channels=out_channels)
    constants = _constants(plan, x, num_groups)
    on_output = {"OUT_CHANNELS": out_channels, "ACTIVATION": activation}
    padded = triton.next_power_of_2(channels // num_groups)

    with torch.cuda.device_of(x):
        if plan.kind == "one-pass":
            tensors = (x, residual, shift, weight, bias, y, total, mean, rstd)
            grid = (n * triton.cdiv(num_groups, plan.chunk),)
            _one_pass_forward[grid](*tensors, *shift_strides, eps, **constants, **on_output)
            return mean, rstd
        grid = (n * plan.splits * triton.cdiv(channels, plan.block_channels),)
        moments = x.new_empty(n, plan.splits, 2, channels, dtype=torch.float32)
        _block_moments[grid](x, residual, total, moments, pixels, plan.splits, **constants)
        _join_moments[(n * num_groups,)](
            *(moments, shift, mean, rstd, pixels, plan.splits, *shift_strides, eps),
            CHANNELS=channels,
            GROUP_CHANNELS=channels // num_groups,
            PADDED_CHANNELS=padded,
            BLOCK_PIXELS=plan.block_pixels,
            BLOCK_SPLITS=_block_splits(plan, padded),
            enable_fp_fusion=True,
        )
        tensors = (x if residual is None else total, shift, weight, bias, mean, rstd, y)
        sizes = (pixels, plan.splits, *shift_strides)
        _apply_forward[grid](*tensors, *sizes, **constants, **on_output)
    return mean, rstd


@torch.library.custom_op("multibeta::group_norm_act_backward_triton", mutates_args=(), schema=_BACKWARD)
def backward(grad, total, weight, bias, mean, rstd, shift, activation):
    memory_format = derivatives.memory_format(total)
    grad, total = (t.contiguous(memory_format=memory_format) for t in (grad, total))
    weight, bias, mean, rstd = (t.contiguous() for t in (weight, bias, mean, rstd))
    n, channels, pixels = total.shape[0], total.shape[1], total.shape[2] * total.shape[3]
    num_groups = mean.shape[1]
    grad_x = torch.empty_like(total, memory_format=memory_format)
    weight_sums, bias_sums = (total.new_empty(n, channels, dtype=torch.float32) for _ in range(2))
    grad_shift = None if shift is None else torch.empty_like(shift, memory_format=torch.contiguous_format)
    shift_strides = (0, 0) if shift is None else shift.stride()
    plan = _plan(total, num_groups, backward=True)
    constants = _constants(plan, total, num_groups)
    padded = triton.next_power_of_2(channels // num_groups)
    inputs = (grad, total, shift, weight, bias, mean, rstd)

    with torch.cuda.device_of(total):
        if plan.kind == "one-pass":
            tensors = (*inputs, grad_x, grad_shift, weight_sums, bias_sums)
            grid = (n * num_groups // plan.chunk,)
            _one_pass_backward[grid](*tensors, *shift_strides, **constants, ACTIVATION=activation)
        else:
            grid = (n * plan.splits * triton.cdiv(channels, plan.block_channels),)
            sizes = (pixels, plan.splits)
            sums = total.new_empty(n, plan.splits, 3, channels, dtype=torch.float32)
            on_one, on_normal = torch.empty_like(mean), torch.empty_like(mean)
            _block_sums[grid](*inputs, sums, *sizes, *shift_strides, **constants, ACTIVATION=activation)
            _join_sums[(n * num_groups,)](
                *(sums, weight, rstd, grad_shift, weight_sums, bias_sums, on_one, on_normal, *sizes),
                CHANNELS=channels,
                GROUP_CHANNELS=channels // num_groups,
                PADDED_CHANNELS=padded,
                BLOCK_SPLITS=_block_splits(plan, padded),
                enable_fp_fusion=True,
            )
            outputs = (on_one, on_normal, grad_x)
            _apply_backward[grid](*inputs, *outputs, *sizes, *shift_strides, **constants, ACTIVATION=activation)
    grad_weight = weight_sums.sum(0, dtype=torch.float32).to(weight.dtype)
    grad_bias = bias_sums.sum(0, dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, total.new_empty(0) if grad_shift is None else grad_shift


derivatives.register("triton")


def accepts_group_norm_act(
    x, weight, bias, num_groups, eps=1e-6, *, shift=None, x_bias=None, residual=None, activation="sigmoid"
) -> str | None:
    """Why the kernels decline a call of `multibeta.ops.group_norm_act`, or None."""
    if x_bias is not None:
        return "x_bias is given"
    if reason := device_reason(x):
        return reason
    if x.ndim != 4:
        return f"x has {x.ndim} dimensions, the kernels take 4"
    tensors = [t for t in (x, weight, bias, shift, residual) if t is not None]
    if any(t.dtype not in FLOATS for t in tensors):
        return "a tensor is neither float32, bfloat16 nor float16"
    if any(t.device != x.device for t in tensors):
        return "tensors lie on different devices"
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
        return "the residual differs from x in dtype or shape"
    if shift is not None and shift.shape != x.shape[:2]:
        return "the shift is not (N, C)"
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return "x is neither contiguous nor channels-last"
    if x.numel() == 0:
        return "x is empty"
    if x[0].numel() >= 2**31:
        return "a sample has 2^31 elements or more"
    return None


def group_norm_act(x, weight, bias, num_groups, eps=1e-6, *, shift=None, x_bias=None, residual=None, activation="sigmoid"):
    """`multibeta.ops.group_norm_act` by Triton kernels."""
    y, total, _, _ = torch.ops.multibeta.group_norm_act_triton(x, weight, bias, num_groups, eps, shift, residual, activation)
    return y if residual is None else (y, total)


def group_norm_act_pair(
    x, beside, weight, bias, num_groups, eps=1e-6, *, shift=None, x_bias=None, residual=None, activation="sigmoid"
):
    """`group_norm_act` of torch.cat([x, beside], dim=1), which is never made, for inference."""
    operator = torch.ops.multibeta.group_norm_act_into_triton
    return pair.group_norm_act_pair(operator, x, beside, weight, bias, num_groups, eps, shift, activation)


def accepts_group_norm_act_pair(
    x, beside, weight, bias, num_groups, eps=1e-6, *, shift=None, x_bias=None, residual=None, activation="sigmoid"
) -> str | None:
    """Why the kernels decline a call of `group_norm_act_pair`, or None."""
    if x_bias is not None or residual is not None:
        return "x_bias or residual is given"
    if x.numel() + beside.numel() >= 2**31 * max(x.shape[0], 1):
        return "a sample has 2^31 elements or more"
    return pair.declined(accepts_group_norm_act, x, beside, weight, bias, num_groups, shift)
