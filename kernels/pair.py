"""GroupNorm and activation of two tensors into one channels-last buffer, from a backend's operator that writes a slice of it:

multibeta::group_norm_act_into_<backend>(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? shift,
    str activation, Tensor(a!) out) -> ()

x and `out` are (N, C, H, W); `out` may be a slice of the channels of a larger channels-last tensor. Its numbers are those of the
same channels in a forward over all channels of that tensor, bit for bit.
"""

from __future__ import annotations

import torch


def group_norm_act_pair(into, x, beside, weight, bias, num_groups, eps, shift, activation):
    """`group_norm_act` of torch.cat([x, beside], dim=1) by `into`, which is called on each part."""
    (n, first, height, width), channels = x.shape, x.shape[1] + beside.shape[1]
    out = torch.empty(n, channels, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for part, begin, end in ((x, 0, first), (beside, first, channels)):
        groups, shift_part = part.shape[1] * num_groups // channels, None if shift is None else shift[:, begin:end]
        into(part, weight[begin:end], bias[begin:end], groups, eps, shift_part, activation, out[:, begin:end])
    return out


def declined(x, beside, num_groups) -> str | None:
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
