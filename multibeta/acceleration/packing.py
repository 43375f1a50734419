"""Weights packed for oneDNN beside the modules they belong to, and made anew when those change."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multibeta import inference, ops

PACKED_DTYPES = (torch.float32, torch.bfloat16)

# A write through `.data` leaves no trace but the weights themselves. To sum them all at every call takes 3 to 16 % of a
# convolution on 16 x 16 or 8 x 8 maps and 9 to 55 % of a linear layer (EPYC, one thread, weights in memory), and the sum would
# miss filters that change places. To compare 64 takes 2 us.
SAMPLED_WEIGHTS = 64


@dataclass(frozen=True)
class Pack:
    """A layer made of a weight, and what that weight was."""

    made_of: tuple
    sample: Tensor
    layer: nn.Module


_packs: weakref.WeakKeyDictionary[nn.Module, dict[str, Pack]] = weakref.WeakKeyDictionary()
# Whether `layers.doubled` is faster folded, by shape and dtype of what is doubled
folds: weakref.WeakKeyDictionary[nn.Module, dict[tuple, bool]] = weakref.WeakKeyDictionary()


def forget(module: nn.Module) -> None:
    """Drop what was packed and measured for `module`."""
    _packs.pop(module, None)
    folds.pop(module, None)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer on the CPU multiplies `x`: that of autocast where it is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def why_not_packed(module: nn.Module, x: Tensor, ndim: int | None) -> str | None:
    """Why this call of a layer takes the forward it came with, or None where it takes packed weights.

    Args:
        ndim: Dimensions that `x` must have; None for two or more.
    """
    if torch.compiler.is_compiling():
        return "torch.compile lays the weights out itself"
    if ops.current_backend() not in ("auto", "cpp"):
        return f"backend {ops.current_backend()!r} was asked for"
    weight, bias = module.weight, module.bias
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return "gradients are wanted"
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return f"weights are packed for the CPU, x is on {x.device.type}"
    dtype = compute_dtype(x)
    if dtype not in PACKED_DTYPES or weight.dtype not in PACKED_DTYPES:
        return f"weights are packed in float32 and bfloat16, got {weight.dtype}"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled("cpu"):
        return f"x is {x.dtype}, the weight {weight.dtype}"
    if x.numel() == 0 or (x.dim() != ndim if ndim else x.dim() < 2):
        return f"x is {tuple(x.shape)}"
    if weight.numel() == 0 or weight.is_inference() or not (weight.is_contiguous() or _is_channels_last(weight)):
        return "changes of its weight cannot be followed"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this processor"
    return inference.why_not_packed()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def packed(module: nn.Module, x: Tensor, form: str) -> nn.Module:
    """The layer for `x` that `FORMS[form]` makes of `module`, of the weights of now.

    A weight that is assigned, moved, or changed in place is always noticed, by identity and version. A write through `.data` is
    noticed where it changes one of `SAMPLED_WEIGHTS` weights spread over the layer, as the merging of LoRA, averaging and any
    other change of whole layers do; after one that touches single weights call `restore` and `accelerate`. Biases are read anew.
    """
    weight, dtype = module.weight, compute_dtype(x)
    made_of = id(weight), weight.data_ptr(), weight._version, weight.dtype, dtype, weight.shape
    sample = _sample(weight)
    packs = _packs.setdefault(module, {})
    pack = packs.get(form)
    if pack is None or pack.made_of != made_of or not torch.equal(pack.sample, sample):
        pack = packs[form] = Pack(made_of, sample.clone(), FORMS[form](module, dtype))
    if module.bias is None:
        pack.layer.bias = None
    else:
        bias = module.bias.detach().to(dtype)
        pack.layer.bias = bias.repeat(4) if form == "folded" else bias
    return pack.layer


def _sample(weight: Tensor) -> Tensor:
    """A view of `SAMPLED_WEIGHTS` weights, or all where there are fewer."""
    numel = weight.numel()
    return weight.detach().as_strided((min(SAMPLED_WEIGHTS, numel),), (_sample_step(numel),))


@functools.cache
def _sample_step(numel: int) -> int:
    """The longest step that stays inside and shares no divisor with `numel`: others would meet one tap of every filter."""
    longest = max(numel // SAMPLED_WEIGHTS, 1)
    return next(step for step in range(longest, 0, -1) if math.gcd(step, numel) == 1)


def _pack_pointwise(conv: nn.Conv1d, dtype: torch.dtype) -> inference.PackedLinear:
    linear = nn.Linear(conv.in_channels, conv.out_channels, bias=False, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach()[:, :, 0], requires_grad=False)
    return inference.PackedLinear(linear, dtype)


FORMS: dict[str, Callable[[nn.Module, torch.dtype], nn.Module]] = {
    "conv": inference.PackedConv2d,
    "linear": inference.PackedLinear,
    "pointwise": _pack_pointwise,
    "folded": lambda conv, dtype: inference.PackedConv2d(inference.fold_upsample(conv), dtype),
}


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (N, C, H, W) in `dtype`, channels-last."""
    return x.to(dtype).contiguous(memory_format=torch.channels_last)
