"""Weights packed for oneDNN, kept for the modules they belong to, and made anew when those change."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multibeta import inference, ops
from multibeta.acceleration.base import Accelerated


class PackedLayer(Accelerated):
    """Base of the accelerated layers whose weight is packed."""

    weight: nn.Parameter
    bias: nn.Parameter | None


@dataclass(frozen=True)
class Pack:
    """A layer made of a weight, what that weight was, and for which dtype and geometry the layer is."""

    snapshot: inference.Snapshot
    made_for: tuple
    layer: inference.PackedConv2d | inference.PackedLinear


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


def why_original(module: PackedLayer, x: Tensor, ndim: int | None) -> str | None:
    """Why this call of a layer takes the forward it came with, or None where it takes packed weights.

    Args:
        ndim: Dimensions that `x` must have; None for two or more.
    """
    if torch.compiler.is_compiling():
        return "torch.compile lays the weights out itself"
    if (transform := ops.active_transform()) is not None:
        return transform
    if torch.jit.is_tracing() or type(x) not in (Tensor, nn.Parameter):  # pyright: ignore[reportPrivateImportUsage]
        return f"x is a {type(x).__name__}, or traced"
    if getattr(module, "padding_mode", "zeros") != "zeros" or "_conv_forward" in vars(module):
        return "its padding is not of zeros, or its forward was replaced on the object"
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
    if dtype not in inference.PACKED_DTYPES or weight.dtype not in inference.PACKED_DTYPES:
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


def packed(module: PackedLayer, x: Tensor, form: str) -> nn.Module:
    """The layer for `x` that `FORMS[form]` makes of `module`, of the weights of now.

    `inference.Snapshot` says which changes of a weight are noticed; after one that touches single weights through `.data` call
    `restore` and `accelerate`. Biases are read anew.
    """
    weight, dtype = module.weight, compute_dtype(x)
    made_for = (dtype, *(getattr(module, name, None) for name in ("stride", "padding", "dilation", "groups")))
    packs = _packs.setdefault(module, {})
    pack = packs.get(form)
    if pack is None or pack.made_for != made_for or not pack.snapshot.is_of((weight,)):
        pack = packs[form] = Pack(inference.Snapshot((weight,)), made_for, FORMS[form](module, dtype))
    if module.bias is None:
        pack.layer.bias = None
    else:
        bias = module.bias.detach().to(dtype)
        pack.layer.bias = bias.repeat(4) if form == "folded" else bias
    return pack.layer


def _pack_pointwise(conv: nn.Conv1d, dtype: torch.dtype) -> inference.PackedLinear:
    """A convolution of one tap as a packed linear layer, without its bias."""
    linear = nn.Linear(conv.in_channels, conv.out_channels, bias=False, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach()[:, :, 0], requires_grad=False)
    return inference.PackedLinear(linear, dtype)


# Of a layer, each of its own type, and a dtype
FORMS: dict[str, Callable[[Any, torch.dtype], inference.PackedConv2d | inference.PackedLinear]] = {
    "conv": inference.PackedConv2d,
    "linear": inference.PackedLinear,
    "pointwise": _pack_pointwise,
    "folded": lambda conv, dtype: inference.PackedConv2d(inference.fold_upsample(conv), dtype),
}


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (N, C, H, W) in `dtype`, channels-last."""
    return x.to(dtype).contiguous(memory_format=torch.channels_last)
