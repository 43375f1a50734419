"""Faster forwards for models that people already have: the blocks of diffusers and latent-diffusion, served by `multibeta.ops`.

`accelerate` gives each block it knows a subclass of the block's own class that overrides `forward` alone; `restore` gives the
class back. Parameters, state dicts, hooks, isinstance and printing stay as they are, and copies and pickles are accelerated too.
Whatever a fast path does not serve, gradients on packed weights or a mask in attention, takes the forward the block came with,
and so does everything under `multibeta.backend("reference")`.

On the CPU, where no gradients are wanted, weights are packed for oneDNN beside the module (as much memory again) and follow every
change of the weight; activations, and with them the result, lie channels-last.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multibeta import inference, ops

Module = TypeVar("Module", bound=nn.Module)

# How far a block may lie from its original, as a fraction of the largest output. bfloat16: about eight roundings, each of half
# an eps, are sqrt(8) / 2 = 1.4 eps when independent, and three times that when unlucky. float32: sums of up to 10^4 products in
# another order are sqrt(10^4) eps, and ten times that.
TOLERANCES = {torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps, torch.float32: 1024 * torch.finfo(torch.float32).eps}
SAMPLED_WEIGHTS = 64  # of each layer, compared at every call: `weight.data.copy_` leaves no other trace

_notes: list[str] | None = None  # what served the calls, while `check` listens


def accelerate(module: Module) -> Module:
    """Let the blocks of `module` that are known here run on the ops; returns the same module.

    Blocks are matched by their exact class, so that a subclass with a forward of its own is left alone; `report` lists what was
    left alone and why. Calling it twice does no harm: the second call takes in what is new, such as layers that LoRA brought.

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
        match = _match(block)
        if isinstance(match, type):
            block.__class__ = _accelerated_class(match, type(block))
    return module


def restore(module: Module) -> Module:
    """Give all blocks of `module` the classes they came with; returns the same module."""
    for block in module.modules():
        if isinstance(block, _Accelerated):
            block.__class__ = block.original_class
            _packs.pop(block, None)
            _folds.pop(block, None)
    return module


class _Accelerated:
    """Base of every accelerated block; `original_class` is the class it came with."""

    original_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _rebuild, (_mixin(self), self.original_class), *state


def _mixin(block: _Accelerated) -> type[_Accelerated]:
    return type(block).__bases__[0]


@functools.cache
def _accelerated_class(mixin: type[_Accelerated], original: type[nn.Module]) -> type[nn.Module]:
    """`original` with the forward of `mixin`, under its own name."""
    names = {"original_class": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), names)


def _rebuild(mixin: type[_Accelerated], original: type[nn.Module]) -> nn.Module:
    made = _accelerated_class(mixin, original)
    return made.__new__(made)


# What the forwards below are made of


def _note(text: str) -> None:
    if _notes is not None and text not in _notes:
        _notes.append(text)


def _note_op(name: str, *args, **kwargs) -> None:
    """Note which backend serves a call of an op; where it is none but the reference, why."""
    if _notes is not None:
        served = ops.explain(name, *args, **kwargs)
        _note(served if served.startswith(f"{name}: reference") else served.partition(" (")[0])


def _untouched(module: nn.Module) -> bool:
    """Whether a call of `module` is its class's forward and nothing else: no hooks, no forward put on the object."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def _activation_name(activation: object) -> str | None:
    """The name that `ops.group_norm_act` has for an activation, or None."""
    if activation is F.silu:
        return "silu"
    names = {"SiLU": "silu", "FP32SiLU": "silu", "Sigmoid": "sigmoid", "Identity": "none"}
    if isinstance(activation, nn.Module) and _untouched(activation):
        return names.get(type(activation).__name__)
    return None


def _fused_norm(norm: nn.GroupNorm, x: Tensor, activation: str, shift: Tensor | None = None) -> Tensor | None:
    """activation(norm(x + shift)) by a kernel of `ops.group_norm_act`, or None where none accepts the call."""
    arguments, options = (x, norm.weight, norm.bias, norm.num_groups, norm.eps), {"shift": shift, "activation": activation}
    _note_op("group_norm_act", *arguments, **options)
    function, served, _ = ops.find("group_norm_act").choose(*arguments, **options)
    return None if served == "reference" else function(*arguments, **options)


def _norm_act(norm: nn.Module, activation: Callable[[Tensor], Tensor], x: Tensor, shift: Tensor | None = None) -> Tensor:
    """activation(norm(x + shift)): in one pass where a kernel serves it, else by the modules themselves."""
    if isinstance(norm, _GroupNorm) and _untouched(norm):
        name = _activation_name(activation)
        y = _fused_norm(norm, x, name or "none", shift)
        if y is not None:
            return y if name else activation(y)
    return activation(norm(x if shift is None else x + shift[:, :, None, None]))


def _add(conv: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """residual + conv(x), in one pass where `conv` can."""
    if isinstance(conv, _Conv2d) and _untouched(conv):
        return conv.forward(x, residual)
    return residual + conv(x)


def _divided(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x / factor


def _tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H W, C)."""
    return x.flatten(2).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`ops.attention` of (N, L, heads, head_dim), heads joined: (N, L, heads head_dim)."""
    _note_op("attention", query, key, value)
    return ops.attention(query, key, value).flatten(2)


@dataclass(frozen=True)
class _Pack:
    """A layer made of a weight, and what that weight was."""

    made_of: tuple
    sample: Tensor
    layer: nn.Module


_packs: weakref.WeakKeyDictionary[nn.Module, dict[str, _Pack]] = weakref.WeakKeyDictionary()
_folds: weakref.WeakKeyDictionary[nn.Module, dict[tuple, bool]] = weakref.WeakKeyDictionary()  # what was faster, by input


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _why_not_packed(module: nn.Module, x: Tensor, ndim: int | None) -> str | None:
    """Why this call of a layer takes the forward it came with, or None where it takes packed weights."""
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
    dtype = _compute_dtype(x)
    if dtype not in TOLERANCES or weight.dtype not in TOLERANCES:
        return f"weights are packed in float32 and bfloat16, got {weight.dtype}"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled("cpu"):
        return f"x is {x.dtype}, the weight {weight.dtype}"
    if x.numel() == 0 or (x.dim() != ndim if ndim else x.dim() < 2):
        return f"x is {tuple(x.shape)}"
    if weight.is_inference() or not (weight.is_contiguous() or _is_channels_last(weight)):
        return "changes of its weight cannot be followed"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this processor"
    return inference.why_not_packed()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _packed(module: nn.Module, x: Tensor, form: str) -> nn.Module:
    """The layer that `_FORMS[form]` makes of `module`, of the weights of now."""
    weight, bias, dtype = module.weight, module.bias, _compute_dtype(x)
    made_of = id(weight), weight.data_ptr(), weight._version, weight.dtype, dtype, weight.shape, id(bias)
    count = min(SAMPLED_WEIGHTS, weight.numel())
    step = (weight.numel() // count - 1) | 1  # odd: an even one would meet the same tap of every filter
    sample = weight.detach().as_strided((count,), (step,))
    packs = _packs.setdefault(module, {})
    pack = packs.get(form)
    if pack is None or pack.made_of != made_of or not torch.equal(pack.sample, sample):
        pack = packs[form] = _Pack(made_of, sample.clone(), _FORMS[form](module, dtype))
    # a bias of another dtype or length is no view of the module's: taken anew, as it is short
    if bias is not None and (form == "folded" or bias.dtype != dtype or bias.data_ptr() != pack.layer.bias.data_ptr()):
        bias = bias.detach().to(dtype)
        pack.layer.bias = bias.repeat(4) if form == "folded" else bias
    return pack.layer


def _pack_pointwise(conv: nn.Conv1d, dtype: torch.dtype) -> inference.PackedLinear:
    linear = nn.Linear(conv.in_channels, conv.out_channels, bias=conv.bias is not None, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach()[:, :, 0], requires_grad=False)
    linear.bias = conv.bias
    return inference.PackedLinear(linear, dtype)


_FORMS: dict[str, Callable[[nn.Module, torch.dtype], nn.Module]] = {
    "conv": inference.PackedConv2d,
    "linear": inference.PackedLinear,
    "pointwise": _pack_pointwise,
    "folded": lambda conv, dtype: inference.PackedConv2d(inference.fold_upsample(conv), dtype),
}


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _doubled(conv: nn.Module, x: Tensor) -> Tensor | None:
    """conv of x (N, C, H, W) doubled by nearest neighbour, folded where that is faster; None where it cannot be folded."""
    if not (isinstance(conv, _Conv2d) and _untouched(conv)) or _why_not_packed(conv, x, 4):
        return None
    if (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) != ((3, 3), (1, 1), (1, 1), (1, 1), 1):
        return None
    x = _channels_last(x, _compute_dtype(x))
    forms = {
        True: lambda: inference.phases_to_pixels(_packed(conv, x, "folded")(x)),
        False: lambda: conv.forward(F.interpolate(x, scale_factor=2.0, mode="nearest")),
    }
    folds, key = _folds.setdefault(conv, {}), (x.shape, x.dtype)
    if key not in folds:
        folds[key] = _median_ms(forms[True], 2) < _median_ms(forms[False], 2)
    _note("upsample: folded" if folds[key] else "upsample: plain is faster than folded")
    return forms[folds[key]]()


def _median_ms(function: Callable[[], object], repetitions: int) -> float:
    """Median milliseconds of a call on the CPU or the current device, after one to warm up."""
    function()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        result = function()
        if isinstance(result, Tensor) and result.is_cuda:
            torch.cuda.synchronize(result.device)
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[(repetitions - 1) // 2]


# The layers of torch


class _Conv2d(_Accelerated):
    """nn.Conv2d with an optional sum, residual + conv(x)."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        reason = _why_not_packed(self, input, 4)
        _note(f"conv: {reason or 'packed'}")
        if reason:
            y = super().forward(input)
            return y if residual is None else residual + y
        dtype = _compute_dtype(input)
        x, packed = _channels_last(input, dtype), _packed(self, input, "conv")
        if residual is None:
            return packed(x)
        if residual.dtype != dtype:  # under autocast: the sum keeps its precision
            return residual + packed(x)
        return packed(x, _channels_last(residual, dtype))


class _Linear(_Accelerated):
    """nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        reason = _why_not_packed(self, input, None)
        _note(f"linear: {reason or 'packed'}")
        if reason:
            return super().forward(input)
        return _packed(self, input, "linear")(input.to(_compute_dtype(input)))


class _Pointwise(_Accelerated):
    """nn.Conv1d of one tap: a linear layer on (N, C, L), whose result lies as (N, L, C)."""

    def forward(self, input: Tensor) -> Tensor:
        reason = _why_not_packed(self, input, 3)
        _note(f"conv: {reason or 'packed'}")
        if reason:
            return super().forward(input)
        return _packed(self, input, "pointwise")(input.to(_compute_dtype(input)).transpose(1, 2)).transpose(1, 2)


class _GroupNorm(_Accelerated):
    """nn.GroupNorm, and GroupNorm32 of latent-diffusion, whose arithmetic is float32 as that of the op always is."""

    def forward(self, input: Tensor) -> Tensor:
        y = _fused_norm(self, input, "none")
        return super().forward(input) if y is None else y


# The blocks of diffusers


class _ResnetBlock2D(_Accelerated):
    """diffusers' ResnetBlock2D."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        if args or kwargs.get("scale") is not None:  # deprecated: the original says so
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, h = input_tensor, _norm_act(self.norm1, self.nonlinearity, input_tensor)
        for resample in (self.upsample, self.downsample):
            if resample is not None:
                x, h = ((t.contiguous() if len(t) >= 64 else t) for t in (x, h))  # as the original: a limit of torch
                x, h = resample(x), resample(h)
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "default":
            h = _norm_act(self.norm2, self.nonlinearity, h, temb)
        elif self.time_embedding_norm == "scale_shift":
            scale, shift = temb[:, :, None, None].chunk(2, dim=1)
            h = self.nonlinearity(self.norm2(h) * (1 + scale) + shift)
        else:
            h = _norm_act(self.norm2, self.nonlinearity, h)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return _divided(_add(self.conv2, self.dropout(h), x), self.output_scale_factor)


class _Attention(_Accelerated):
    """diffusers' Attention with its standard processor, as self-attention: over the positions of a feature map, or tokens."""

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        x, on_map = hidden_states, hidden_states.dim() == 4
        reason = _why_standard_attention(self, on_map, {name for name in kwargs if name != "temb"})
        if encoder_hidden_states is not None or attention_mask is not None or reason:
            _note(f"attention: {reason or 'a condition or a mask'}")
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        h = x if self.group_norm is None else self.group_norm(x)
        h = _tokens(h) if on_map else h
        query, key, value = (to(h).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[1](self.to_out[0](_attend(query, key, value)))
        h = h.transpose(1, 2).reshape(x.shape) if on_map else h
        return _divided(h + x if self.residual_connection else h, self.rescale_output_factor)


def _why_standard_attention(attention: nn.Module, on_map: bool, options: set[str]) -> str | None:
    """Why diffusers' own processor serves this call, or None."""
    if reason := _why_not_attention(attention):
        return reason
    if ops.current_backend() == "reference":
        return "backend 'reference' was asked for"
    if attention.group_norm is not None and not (on_map and _untouched(attention.group_norm)):
        return "its norm has hooks, or the input is no feature map"
    return f"options {', '.join(sorted(options))}" if options else None


def _why_not_attention(attention: nn.Module) -> str | None:
    processor = type(attention.processor)
    if f"{processor.__module__}.{processor.__name__}" != "diffusers.models.attention_processor.AttnProcessor2_0":
        return f"its processor is {processor.__name__}"
    norms = ("norm_q", "norm_k", "spatial_norm")
    if found := [name for name in norms if getattr(attention, name, None) is not None]:
        return f"it has {' and '.join(found)}"
    if attention.inner_kv_dim != attention.inner_dim or attention.fused_projections:
        return "keys and values have heads of their own, or projections are fused"
    return None


class _Upsample2D(_Accelerated):
    """diffusers' Upsample2D with a convolution."""

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args, **kwargs) -> Tensor:
        y = None
        if output_size is None and not args and not kwargs and hidden_states.numel() < 2**29:
            y = _doubled(self.conv if self.name == "conv" else self.Conv2d_0, hidden_states)
        return super().forward(hidden_states, output_size, *args, **kwargs) if y is None else y


# The blocks of latent-diffusion


class _ResBlock(_Accelerated):
    """ResBlock of latent-diffusion's U-Net. Its `forward` checkpoints `_forward`, which is what runs here."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if x.dim() != 4:
            return super()._forward(x, emb)
        norm, activation, conv = self.in_layers
        h = _norm_act(norm, activation, x)
        if self.updown:
            h, x = self.h_upd(h), self.x_upd(x)
        h = conv(h)
        shift = self.emb_layers(emb).to(h.dtype)
        norm, activation, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = shift[:, :, None, None].chunk(2, dim=1)
            h = activation(norm(h) * (1 + scale) + shift)
        else:
            h = _norm_act(norm, activation, h, shift)
        return _add(conv, dropout(h), self.skip_connection(x))


class _AttentionBlock(_Accelerated):
    """AttentionBlock of latent-diffusion's U-Net. Its `forward` checkpoints `_forward`, which is what runs here."""

    def _forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or not _untouched(self.attention) or ops.current_backend() == "reference":
            return super()._forward(x)
        qkv = self.qkv(self.norm(x).flatten(2)).transpose(1, 2)
        if type(self.attention).__name__ == "QKVAttentionLegacy":
            query, key, value = qkv.unflatten(2, (self.num_heads, 3, -1)).unbind(3)
        else:
            query, key, value = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return x + self.proj_out(_attend(query, key, value).transpose(1, 2)).reshape(x.shape)


class _ResnetBlock(_Accelerated):
    """ResnetBlock of latent-diffusion's autoencoder."""

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(_norm_act(self.norm1, F.silu, x))
        shift = None if temb is None else self.temb_proj(F.silu(temb))
        h = self.dropout(_norm_act(self.norm2, F.silu, h, shift))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return _add(self.conv2, h, x)


class _AttnBlock(_Accelerated):
    """AttnBlock of latent-diffusion's autoencoder: one head."""

    def forward(self, x: Tensor, **options) -> Tensor:
        if options or ops.current_backend() == "reference":
            return super().forward(x, **options)
        h = self.norm(x)
        query, key, value = (_tokens(to(h)).unsqueeze(2) for to in (self.q, self.k, self.v))
        return _add(self.proj_out, _attend(query, key, value).transpose(1, 2).reshape(x.shape), x)


class _Upsample(_Accelerated):
    """Upsample of latent-diffusion's U-Net and autoencoder with a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        y = _doubled(self.conv, x) if x.numel() < 2**29 else None
        return super().forward(x) if y is None else y


# Which block is which


def _why_not_layer(layer: nn.Module) -> str | None:
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
    if found := [name for name in ("exchange_temb_dims", "skip_t_emb") if getattr(block, name, False)]:
        return f"it has {found[0]}"
    layers = (block.in_layers, block.emb_layers, block.out_layers)
    lengths = tuple(len(part) if isinstance(part, nn.Sequential) else 0 for part in layers)
    return None if lengths == (3, 2, 4) else f"its layers are {lengths}, not (3, 2, 4)"


def _why_not_attention_block(block: nn.Module) -> str | None:
    if reason := _parts(block, "norm", "qkv", "attention", "proj_out", "num_heads", "_forward"):
        return reason
    kind = type(block.attention).__name__
    return None if kind in ("QKVAttention", "QKVAttentionLegacy") else f"its attention is a {kind}"


def _why_not_resnet_block(block: nn.Module) -> str | None:
    names = "norm1 conv1 norm2 dropout conv2 in_channels out_channels use_conv_shortcut"
    return _parts(block, *names.split())


def _why_not_ldm_upsample(block: nn.Module) -> str | None:
    if not getattr(block, "with_conv", getattr(block, "use_conv", False)) or not hasattr(block, "conv"):
        return "it has no convolution"
    return None if getattr(block, "dims", 2) == 2 else f"it has {block.dims} dimensions"


@dataclass(frozen=True)
class _Kind:
    """A class that is known: its accelerated form, and why one of its objects must be left alone."""

    mixin: type[_Accelerated]
    why_not: Callable[[nn.Module], str | None] = field(default=lambda module: None)


# By qualified name, so that neither package is imported here
_KINDS = {
    "torch.nn.modules.conv.Conv2d": _Kind(_Conv2d, _why_not_conv),
    "torch.nn.modules.conv.Conv1d": _Kind(_Pointwise, _why_not_pointwise),
    "torch.nn.modules.linear.Linear": _Kind(_Linear, _why_not_layer),
    "torch.nn.modules.normalization.GroupNorm": _Kind(_GroupNorm, lambda norm: None if norm.affine else "it has no weight"),
    "diffusers.models.resnet.ResnetBlock2D": _Kind(_ResnetBlock2D),
    "diffusers.models.attention_processor.Attention": _Kind(_Attention, _why_not_attention),
    "diffusers.models.upsampling.Upsample2D": _Kind(_Upsample2D, _why_not_upsample),
}

# Latent-diffusion is copied from repository to repository: by the name of the class, and what its objects are made of
_LDM_KINDS = {
    "GroupNorm32": _Kind(_GroupNorm, lambda norm: None if norm.affine else "it has no weight"),
    "ResBlock": _Kind(_ResBlock, _why_not_res_block),
    "AttentionBlock": _Kind(_AttentionBlock, _why_not_attention_block),
    "ResnetBlock": _Kind(_ResnetBlock, _why_not_resnet_block),
    "AttnBlock": _Kind(_AttnBlock, lambda block: _parts(block, "norm", "q", "k", "v", "proj_out")),
    "Upsample": _Kind(_Upsample, _why_not_ldm_upsample),
}
_LDM_BASES = {"Module", "TimestepBlock", "GroupNorm"}


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _match(module: nn.Module) -> type[_Accelerated] | str | None:
    """The accelerated form of `module`, or why it is left alone; None where it only holds other modules."""
    if isinstance(module, _Accelerated):
        return None
    cls = type(module)
    kind = _KINDS.get(_qualified(cls))
    if kind is None and not cls.__module__.startswith(("torch.", "diffusers.", "multibeta.")):
        kind = _LDM_KINDS.get(cls.__name__) if cls.__mro__[1].__name__ in _LDM_BASES else None
    if kind is None:
        known = [base.__name__ for base in cls.__mro__[1:] if _qualified(base) in _KINDS or base.__name__ in _LDM_KINDS]
        if known:
            return f"a subclass of {known[0]}, whose forward may differ"
        holds_weights = next(module.parameters(recurse=False), None) is not None
        return "not a known block" if holds_weights else None
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    return kind.why_not(module) or kind.mixin


# What was done, and whether it is right


@dataclass(frozen=True)
class Row:
    """One block of an accelerated model.

    Attributes:
        name, type: Where it is in the model, and the class it came with.
        accelerated: Whether it runs on the ops.
        reason: Why it does not.
        path: What served its calls, by `ops.explain`; measured by `check`, as all below.
        error: Largest difference from the original forward, as a fraction of the original's largest output.
        before_ms, after_ms: Milliseconds of a call.
    """

    name: str
    type: str
    accelerated: bool
    reason: str = ""
    path: str = ""
    error: float | None = None
    before_ms: float | None = None
    after_ms: float | None = None


def report(module: nn.Module) -> list[Row]:
    """What became of the blocks of `module`: each that is accelerated, without its parts, and each left alone with the reason."""
    rows = []
    for name, block in _outermost(module, lambda block: isinstance(block, _Accelerated)):
        if isinstance(block, _Accelerated):
            rows.append(Row(name, type(block).__name__, True))
        elif isinstance(match := _match(block), str):
            rows.append(Row(name, type(block).__name__, False, match))
        elif match is not None:
            rows.append(Row(name, type(block).__name__, False, "accelerate was not called on it"))
    return rows


def _outermost(module: nn.Module, ends: Callable[[nn.Module], bool], name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module by name, down to those at which the descent `ends`."""
    yield name, module
    if not ends(module):
        for part, child in module.named_children():
            yield from _outermost(child, ends, f"{name}.{part}" if name else part)


@torch.no_grad()
def check(module: nn.Module, *inputs: object, repetitions: int = 3, **options: object) -> list[Row]:
    """Accelerate `module`, comparing each block with its original on the inputs it meets; a block that differs is put back.

    The original runs once on `inputs` and `options`, in evaluation mode; each block runs in both forms on what it is given there.

    Returns:
        A row for each block: see `report`. `TOLERANCES` says how far a block may lie from its original.
    """
    rows = report(accelerate(restore(module)))
    blocks = {row.name: module.get_submodule(row.name) for row in rows if row.accelerated}
    measured: dict[str, Row] = {}
    training = {part: part.training for part in restore(module).modules()}
    hooks = [
        block.register_forward_hook(_comparison(name, measured, repetitions), with_kwargs=True) for name, block in blocks.items()
    ]
    try:
        module.eval()(*inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in training.items():
            part.training = mode
    accelerate(module)
    for name, row in measured.items():
        if not row.accelerated:
            restore(blocks[name])
    unmet = {name: replace(row, path="not run by these inputs") for row in rows if (name := row.name) in blocks}
    return [measured.get(row.name) or unmet.get(row.name) or row for row in rows]


def _comparison(name: str, measured: dict[str, Row], repetitions: int) -> Callable:
    """A forward hook that runs the accelerated form of a block beside its original, on the first call."""

    def compare(block: nn.Module, args: tuple, kwargs: dict, expected: Tensor) -> None:
        if name in measured:
            return
        measured[name] = Row(name, type(block).__name__, False)  # calls of the block below are not compared
        before = _median_ms(lambda: block.forward(*args, **kwargs), repetitions)
        after, error, reason, path = None, None, "", ""
        try:
            accelerate(block)
            with _listening() as notes:
                error = _relative_error(block.forward(*args, **kwargs), expected)
            path = "; ".join(notes)
            after = _median_ms(lambda: block.forward(*args, **kwargs), repetitions)
            tolerance = TOLERANCES.get(expected.dtype, 1e-2)
            if not error <= tolerance:  # nan as well
                reason = f"differs from the original by {error:.1e}, {tolerance:.1e} is allowed"
        except Exception as failure:  # of many types: a class may have the name and the parts, and mean something else
            reason = (str(failure).splitlines() or [type(failure).__name__])[0]
        finally:
            restore(block)
        measured[name] = Row(name, type(block).__name__, not reason, reason, path, error, before, after)

    return compare


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what serves the calls of a `with` block."""
    global _notes
    previous, _notes = _notes, []
    try:
        yield _notes
    finally:
        _notes = previous


def _relative_error(found: Tensor, expected: Tensor) -> float:
    largest = expected.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found.float() - expected.float()).abs().max() / largest)


def table(rows: list[Row]) -> str:
    """Rows of `report` or `check` as text: a line each, and what was gained over all."""
    lines = []
    for row in rows:
        parts = [f"{row.name or '(model)'} {row.type}"]
        if row.error is not None and row.after_ms is not None:
            parts.append(f"{row.before_ms:.2f} -> {row.after_ms:.2f} ms, error {row.error:.1e}")
        if not row.accelerated:
            parts.append(f"left as it is, {row.reason}")
        lines.append(": ".join([*parts, row.path] if row.path else parts))
    timed = [row for row in rows if row.accelerated and row.after_ms is not None]
    if timed:
        before, after = (sum(getattr(row, name) for row in timed) for name in ("before_ms", "after_ms"))
        lines.append(f"{len(timed)} blocks: {before:.1f} -> {after:.1f} ms, {before / after:.1f}x")
    return "\n".join(lines)


# Models of diffusers from disk


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model that diffusers saved in `folder`, for inference.

    Raises:
        ValueError: For a folder without a model's config.json.
        ModuleNotFoundError: Without diffusers.
    """
    config = Path(folder) / "config.json"
    if not config.exists():
        parts = sorted(path.parent.name for path in Path(folder).glob("*/config.json"))
        hint = f"; name one of its parts: {', '.join(parts)}" if parts else ""
        raise ValueError(f"{folder} holds no config.json of a diffusers model{hint}")
    name = json.loads(config.read_text()).get("_class_name")
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{folder} is read by diffusers, which is not installed: pip install diffusers") from error
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"{config} names the class {name!r}, which diffusers {diffusers.__version__} does not have")
    return kind.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False).eval().requires_grad_(False)


def random_inputs(model: nn.Module, *, batch: int = 1, size: int | None = None) -> dict[str, object]:
    """Random arguments for a model of diffusers, as its configuration describes them.

    Args:
        model: UNet2DModel, UNet2DConditionModel or AutoencoderKL; `ValueError` for others.
        size: Height and width of the sample; by default that of the configuration.
    """
    kind, config = type(model).__name__, model.config
    if kind not in ("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL"):
        raise ValueError(f"no inputs are known for a {kind}: call multibeta.acceleration.check with some of your own")
    size = size or config.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(model.device, model.dtype)

    inputs: dict[str, object] = {"sample": draw(config.in_channels, height, width)}
    if kind == "AutoencoderKL":
        return inputs
    inputs["timestep"] = 500
    if kind == "UNet2DConditionModel":
        inputs["encoder_hidden_states"] = draw(77, config.cross_attention_dim)
        if config.addition_embed_type == "text_time":  # the larger Stable Diffusion
            ids = draw(6)
            width = config.projection_class_embeddings_input_dim - ids.shape[1] * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": draw(width), "time_ids": ids}
    return inputs
