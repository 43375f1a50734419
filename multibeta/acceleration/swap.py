"""The exchange of classes: which block has an accelerated form, why one is left alone, `accelerate` and `restore`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from multibeta.acceleration import blocks, layers
from multibeta.acceleration.base import Accelerated, accelerated_class, give_back_class
from multibeta.acceleration.packing import forget

Module = TypeVar("Module", bound=nn.Module)


def accelerate(module: Module) -> Module:
    """Let the blocks of `module` that are known here run on the ops; returns the same module.

    Blocks are matched by their exact class, so that a subclass with a forward of its own is left alone; `report` lists what was
    left alone and why. Calling it twice does no harm: the second call takes in what is new, such as layers that LoRA brought.

    A block remains an instance of the class it came with, and its class equals that one: tools that look for layers by class find
    them, as adapters, pruning, and quantisation and fusion of torch do. Only what compares classes by `is` does not, such as
    `torch.ao.quantization.convert` of observed convolutions: `restore` the model, change it, and accelerate it again.

    Raises:
        TypeError: For what is no module, such as a pipeline of diffusers: accelerate its parts.
        ValueError: For weights on the meta device.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate takes an nn.Module, got a {type(module).__name__}; of a pipeline, its unet and its vae")
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"accelerate needs weights, {name} is on the meta device: load them first")
    for block in module.modules():
        mixin = match(block)
        if isinstance(mixin, type):
            block.__class__ = accelerated_class(mixin, type(block))
    return module


def restore(module: Module) -> Module:
    """Give all blocks of `module` the classes they came with; returns the same module."""
    for block in module.modules():
        if isinstance(block, Accelerated):
            give_back_class(block)
            forget(block)
    return module


def _why_not_layer(layer: nn.Conv1d | nn.Conv2d | nn.Linear) -> str | None:
    weight = layer.weight
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    return None if weight.dtype.is_floating_point else f"its weight is {weight.dtype}: quantised"


def _why_not_conv(conv: nn.Conv2d) -> str | None:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r}, {conv.padding_mode}"
    return "its channels are in groups" if conv.groups > 1 else _why_not_layer(conv)


def _why_not_pointwise(conv: nn.Conv1d) -> str | None:
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.groups
    return _why_not_layer(conv) if geometry == ((1,), (1,), (0,), 1) else "more than one tap"


def _why_not_norm(norm: nn.GroupNorm) -> str | None:
    return "it has no weight or no bias" if norm.weight is None or norm.bias is None else None


def _why_not_upsample(upsample: nn.Module) -> str | None:
    plain = upsample.use_conv and upsample.interpolate and upsample.norm is None and not upsample.use_conv_transpose
    return None if plain else "not nearest neighbour and a convolution"


def _parts(module: nn.Module, *names: str) -> str | None:
    """None where `module` has all these attributes, else which it lacks."""
    missing = [name for name in names if not hasattr(module, name)]
    return f"not the block of latent-diffusion: it has no {missing[0]}" if missing else None


def _why_not_res_block(block: nn.Module) -> str | None:
    names = "in_layers emb_layers out_layers skip_connection updown use_scale_shift_norm _forward"
    if reason := _parts(block, *names.split()):
        return reason
    if present := [name for name in ("exchange_temb_dims", "skip_t_emb") if getattr(block, name, False)]:
        return f"it has {present[0]}"
    parts = (block.in_layers, block.emb_layers, block.out_layers)
    lengths = tuple(len(part) if isinstance(part, nn.Sequential) else 0 for part in parts)
    return None if lengths == (3, 2, 4) else f"its layers are {lengths}, not (3, 2, 4)"


def _why_not_attention_block(block: nn.Module) -> str | None:
    if reason := _parts(block, "norm", "qkv", "attention", "proj_out", "num_heads", "_forward"):
        return reason
    name = type(block.attention).__name__
    return None if name in ("QKVAttention", "QKVAttentionLegacy") else f"its attention is a {name}"


def _why_not_resnet_block(block: nn.Module) -> str | None:
    return _parts(block, "norm1", "conv1", "norm2", "dropout", "conv2", "in_channels", "out_channels", "use_conv_shortcut")


def _why_not_ldm_upsample(block: nn.Module) -> str | None:
    if not getattr(block, "with_conv", getattr(block, "use_conv", False)) or not hasattr(block, "conv"):
        return "it has no convolution"
    return None if getattr(block, "dims", 2) == 2 else f"it has {block.dims} dimensions"


@dataclass(frozen=True)
class _Known:
    """A class that is known: its accelerated form, and why one of its objects must be left alone."""

    mixin: type[Accelerated]
    why_not: Callable[[Any], str | None] = field(default=lambda module: None)


# By qualified name, so that neither package is imported here
_CLASSES = {
    "torch.nn.modules.conv.Conv2d": _Known(layers.Conv2d, _why_not_conv),
    "torch.nn.modules.conv.Conv1d": _Known(layers.Pointwise, _why_not_pointwise),
    "torch.nn.modules.linear.Linear": _Known(layers.Linear, _why_not_layer),
    "torch.nn.modules.normalization.GroupNorm": _Known(layers.GroupNorm, _why_not_norm),
    "diffusers.models.resnet.ResnetBlock2D": _Known(blocks.ResnetBlock2D),
    "diffusers.models.attention_processor.Attention": _Known(blocks.Attention, blocks.why_not_standard_processor),
    "diffusers.models.upsampling.Upsample2D": _Known(blocks.Upsample2D, _why_not_upsample),
}

# Latent-diffusion is copied from repository to repository: by the name of the class, and what its objects are made of
_LDM_CLASSES = {
    "GroupNorm32": _Known(layers.GroupNorm, _why_not_norm),
    "ResBlock": _Known(blocks.ResBlock, _why_not_res_block),
    "AttentionBlock": _Known(blocks.AttentionBlock, _why_not_attention_block),
    "ResnetBlock": _Known(blocks.ResnetBlock, _why_not_resnet_block),
    "AttnBlock": _Known(blocks.AttnBlock, lambda block: _parts(block, "norm", "q", "k", "v", "proj_out")),
    "Upsample": _Known(blocks.Upsample, _why_not_ldm_upsample),
}
_LDM_BASES = {"Module", "TimestepBlock", "GroupNorm"}


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def match(module: nn.Module) -> type[Accelerated] | str | None:
    """The accelerated form of `module`, or why it is left alone; None where it only holds other modules."""
    if isinstance(module, Accelerated):
        return None
    cls = type(module)
    entry = _CLASSES.get(_qualified(cls))
    if entry is None and not cls.__module__.startswith(("torch.", "diffusers.", "multibeta.")):
        entry = _LDM_CLASSES.get(cls.__name__) if cls.__mro__[1].__name__ in _LDM_BASES else None
    if (
        entry is None
        and hasattr(module, "_packed_params")
        and cls.__module__.startswith("torch.ao.nn.")
        and hasattr(module, "scale")
    ):
        return "its weight is packed by torch.ao: quantised"
    if entry is None:
        bases = [base.__name__ for base in cls.__mro__[1:] if _qualified(base) in _CLASSES or base.__name__ in _LDM_CLASSES]
        if bases:
            return f"a subclass of {bases[0]}, whose forward may differ"
        holds_weights = next(module.parameters(recurse=False), None) is not None
        return "not a known block" if holds_weights else None
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    return entry.why_not(module) or entry.mixin
