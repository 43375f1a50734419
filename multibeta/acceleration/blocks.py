"""The accelerated blocks of diffusers and latent-diffusion."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from multibeta import ops
from multibeta.acceleration.base import Accelerated, note, untouched
from multibeta.acceleration.layers import add, attend, doubled, norm_act


def _divided(x: Tensor, factor: float) -> Tensor:
    """x / factor, without a pass where that is x."""
    return x if factor == 1 else x / factor


def _tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H W, C)."""
    return x.flatten(2).transpose(1, 2)


# The blocks of diffusers


class ResnetBlock2D(Accelerated):
    """diffusers' ResnetBlock2D."""

    norm1: nn.Module
    conv1: nn.Module
    norm2: nn.Module
    dropout: nn.Module
    conv2: nn.Module
    nonlinearity: Callable[[Tensor], Tensor]
    upsample: nn.Module | None
    downsample: nn.Module | None
    time_emb_proj: nn.Module | None
    skip_time_act: bool
    time_embedding_norm: str
    conv_shortcut: nn.Module | None
    output_scale_factor: float

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: object, **kwargs: object) -> Tensor:
        wrong = temb is None and (self.time_emb_proj is not None or self.time_embedding_norm == "scale_shift")
        if wrong or args or kwargs.get("scale") is not None:  # or deprecated: the original says so
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, h = input_tensor, norm_act(self.norm1, self.nonlinearity, input_tensor)
        for resample in (self.upsample, self.downsample):
            if resample is not None:
                x, h = ((t.contiguous() if len(t) >= 64 else t) for t in (x, h))  # as the original: a limit of torch
                x, h = resample(x), resample(h)
        h = self.conv1(h)
        if temb is not None and self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if temb is not None and self.time_embedding_norm == "scale_shift":
            scale, shift = temb[:, :, None, None].chunk(2, dim=1)
            h = self.nonlinearity(self.norm2(h) * (1 + scale) + shift)
        else:
            h = norm_act(self.norm2, self.nonlinearity, h, temb if self.time_embedding_norm == "default" else None)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return _divided(add(self.conv2, self.dropout(h), x), self.output_scale_factor)


class Attention(Accelerated):
    """diffusers' Attention with its standard processor, as self-attention: over the positions of a feature map, or tokens."""

    group_norm: nn.Module | None
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList
    heads: int
    inner_dim: int
    inner_kv_dim: int
    residual_connection: bool
    rescale_output_factor: float
    fused_projections: bool
    processor: object

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        x, on_map = hidden_states, hidden_states.dim() == 4
        reason = _why_original_attention(self, on_map, {name for name in kwargs if name != "temb"})
        if encoder_hidden_states is not None or attention_mask is not None or reason:
            note(f"attention: {reason or 'a condition or a mask'}")
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        h = x if self.group_norm is None else self.group_norm(x)
        h = _tokens(h) if on_map else h
        query, key, value = (to(h).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[1](self.to_out[0](attend(query, key, value)))
        h = h.transpose(1, 2).reshape(x.shape) if on_map else h
        return _divided(h + x if self.residual_connection else h, self.rescale_output_factor)


def _why_original_attention(attention: Attention, on_map: bool, options: set[str]) -> str | None:
    """Why diffusers' own processor serves this call, or None."""
    if reason := why_not_standard_processor(attention):
        return reason
    if ops.current_backend() == "reference":
        return "backend 'reference' was asked for"
    if attention.group_norm is not None and not (on_map and untouched(attention.group_norm)):
        return "its norm has hooks, or the input is no feature map"
    return f"options {', '.join(sorted(options))}" if options else None


def why_not_standard_processor(attention: nn.Module) -> str | None:
    """Why an Attention of diffusers computes more than its standard processor and its own projections, or None."""
    processor = type(attention.processor)
    if f"{processor.__module__}.{processor.__name__}" != "diffusers.models.attention_processor.AttnProcessor2_0":
        return f"its processor is {processor.__name__}"
    norms = ("norm_q", "norm_k", "spatial_norm")
    if present := [name for name in norms if getattr(attention, name, None) is not None]:
        return f"it has {' and '.join(present)}"
    if attention.inner_kv_dim != attention.inner_dim or attention.fused_projections:
        return "keys and values have heads of their own, or projections are fused"
    return None


class Upsample2D(Accelerated):
    """diffusers' Upsample2D with a convolution."""

    name: str
    conv: nn.Module
    Conv2d_0: nn.Module

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args: object, **kwargs: object) -> Tensor:
        y = None
        if output_size is None and not args and not kwargs and hidden_states.numel() < 2**29:
            y = doubled(self.conv if self.name == "conv" else self.Conv2d_0, hidden_states)
        return super().forward(hidden_states, output_size, *args, **kwargs) if y is None else y


# The blocks of latent-diffusion


class Checkpointed(Accelerated):
    """Base of the blocks whose `forward` checkpoints `_forward`, which is what runs here."""

    _forward: Callable[..., Tensor]


class ResBlock(Checkpointed):
    """ResBlock of latent-diffusion's U-Net."""

    in_layers: nn.Sequential
    emb_layers: nn.Module
    out_layers: nn.Sequential
    skip_connection: nn.Module
    h_upd: nn.Module
    x_upd: nn.Module
    updown: bool
    use_scale_shift_norm: bool

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if x.dim() != 4:
            return super()._forward(x, emb)
        norm, activation, conv = self.in_layers
        h = norm_act(norm, activation, x)
        if self.updown:
            h, x = self.h_upd(h), self.x_upd(x)
        h = conv(h)
        shift = self.emb_layers(emb).to(h.dtype)
        norm, activation, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = shift[:, :, None, None].chunk(2, dim=1)
            h = activation(norm(h) * (1 + scale) + shift)
        else:
            h = norm_act(norm, activation, h, shift)
        return add(conv, dropout(h), self.skip_connection(x))


class AttentionBlock(Checkpointed):
    """AttentionBlock of latent-diffusion's U-Net."""

    norm: nn.Module
    qkv: nn.Module
    attention: nn.Module
    proj_out: nn.Module
    num_heads: int

    def _forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or not untouched(self.attention) or ops.current_backend() == "reference":
            return super()._forward(x)
        qkv = self.qkv(self.norm(x).flatten(2)).transpose(1, 2)
        if type(self.attention).__name__ == "QKVAttentionLegacy":
            query, key, value = qkv.unflatten(2, (self.num_heads, 3, -1)).unbind(3)
        else:
            query, key, value = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return x + self.proj_out(attend(query, key, value).transpose(1, 2)).reshape(x.shape)


class ResnetBlock(Accelerated):
    """ResnetBlock of latent-diffusion's autoencoder."""

    norm1: nn.Module
    conv1: nn.Module
    temb_proj: nn.Module
    norm2: nn.Module
    dropout: nn.Module
    conv2: nn.Module
    conv_shortcut: nn.Module
    nin_shortcut: nn.Module
    in_channels: int
    out_channels: int
    use_conv_shortcut: bool

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(norm_act(self.norm1, F.silu, x))
        shift = None if temb is None else self.temb_proj(F.silu(temb))
        h = self.dropout(norm_act(self.norm2, F.silu, h, shift))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return add(self.conv2, h, x)


class AttnBlock(Accelerated):
    """AttnBlock of latent-diffusion's autoencoder: one head."""

    norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    proj_out: nn.Module

    def forward(self, x: Tensor, **options: object) -> Tensor:
        if options or ops.current_backend() == "reference":
            return super().forward(x, **options)
        h = self.norm(x)
        query, key, value = (_tokens(to(h)).unsqueeze(2) for to in (self.q, self.k, self.v))
        return add(self.proj_out, attend(query, key, value).transpose(1, 2).reshape(x.shape), x)


class Upsample(Accelerated):
    """Upsample of latent-diffusion's U-Net and autoencoder with a convolution."""

    conv: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y = doubled(self.conv, x) if x.numel() < 2**29 else None
        return super().forward(x) if y is None else y
