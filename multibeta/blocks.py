"""Building blocks of all networks: embeddings, the ResNet block, attention, resampling."""

from __future__ import annotations

import math
from typing import Protocol, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multibeta import ops

BETA_FREQUENCY_MAX = 30 * math.pi


def input_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of what a layer or network multiplies: that of its weights, of a quantised one, which shows none, float32."""
    return next((parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point()), torch.float32)


def activate(x: Tensor, activation: str) -> Tensor:
    """The pointwise non-linearity of `ops.group_norm_act`, by the same names."""
    if activation == "sigmoid":
        return torch.sigmoid(x)
    return F.silu(x) if activation == "silu" else x


def sinusoidal_embedding(position: Tensor, frequencies: Tensor) -> Tensor:
    """[sin, cos] of position times each frequency: (N,) and (F,) to (N, 2 F), float32."""
    angle = position.float().unsqueeze(1) * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def beta_embedding(beta: Tensor, channels: int, max_frequency: float = BETA_FREQUENCY_MAX) -> Tensor:
    """Embedding of beta in [0, 1] that is smooth enough to differentiate the encoder in beta.

    Frequencies are geometric from pi / 2 to `max_frequency` radians. With the usual time-step embedding (200 pi and
    more) 60 to 86 % of f(x, t - tau) - f(x, t) is oscillation that carries nothing; `test_blocks.py` holds the slope ratio.

    Args:
        beta: (N,), in [0, 1].
        channels: Even.

    Returns:
        (N, channels), float32.
    """
    exponents = math.log10(math.pi / 2), math.log10(max_frequency)
    return sinusoidal_embedding(beta, torch.logspace(*exponents, channels // 2, device=beta.device))


def timestep_embedding(step: Tensor, channels: int) -> Tensor:
    """Transformer embedding of a time step on the scale of 0 ... 1000: (N,) to (N, channels), float32."""
    half = channels // 2
    return sinusoidal_embedding(step, torch.exp(-math.log(10000.0) * torch.arange(half, device=step.device) / half))


def zero_bias(layer: nn.Conv2d | nn.Linear) -> None:
    """Start the bias of a layer, where it has one, at zero."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def divisible_groups(channels: int, num_groups: int) -> int:
    """The largest number of groups up to `num_groups` that divides `channels`."""
    return max(groups for groups in range(1, num_groups + 1) if channels % groups == 0)


class Norm(Protocol):
    """What takes a feature map, and two terms that it adds first: then it returns the total as well."""

    @overload
    def __call__(self, x: Tensor, beside: FeatureMap | None, shift: Tensor | None) -> Tensor: ...
    @overload
    def __call__(
        self, x: Tensor, beside: FeatureMap | None, shift: Tensor | None, x_bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


class Sum:
    """A feature map x + bias + residual whose additions wait for the norm that reads it, which makes them in its own pass.

    Whoever else reads it asks for the `value`; both leave the total here. Only networks of `inference` make sums.

    Args:
        x: (N, C, H, W), the result of a convolution without its bias.
        bias: (C,), or None.
        residual: (N, C, H, W), or None.
    """

    def __init__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
        self.shape = x.shape
        self._terms: tuple[Tensor, Tensor | None, Tensor | None] | None = (x, bias, residual)
        self._total: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The total, (N, C, H, W)."""
        if self._terms is not None:
            x, bias, residual = self._terms
            total = x if bias is None else x + bias.view(-1, 1, 1)
            self._keep(total if residual is None else total + residual)
        assert self._total is not None, "kept in the place of its terms"
        return self._total

    def _keep(self, total: Tensor) -> None:
        self._total, self._terms = total, None

    def normalised(self, norm: Norm, beside: FeatureMap | None, shift: Tensor | None) -> Tensor:
        """`norm` of the total, with `beside` next to it, + shift."""
        if self._terms is None:
            return norm(self.value, beside, shift)
        x, bias, residual = self._terms
        if residual is None and bias is not None and shift is not None and shift.shape[1] == len(bias):
            return norm(x, beside, shift + bias)  # the second norm of a block: its only reader
        y, total = norm(x, beside, shift, bias, residual)
        self._keep(total)
        return y


FeatureMap = Tensor | Sum


def value(x: FeatureMap) -> Tensor:
    """The tensor of a feature map, whose sum is made now if it waits."""
    return x.value if isinstance(x, Sum) else x


def plus(x: FeatureMap, y: Tensor) -> FeatureMap:
    """x + y, which waits where x came as a sum."""
    return Sum(y, None, x.value) if isinstance(x, Sum) else x + y


class GroupNormAct(nn.GroupNorm):
    """`nn.GroupNorm` with an optional shift before it and an activation after it, served by `ops.group_norm_act`.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: As of `nn.GroupNorm`.
        activation: "silu", "sigmoid" or "none".
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-05,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "silu",
    ) -> None:
        if activation not in ops.ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ops.ACTIVATIONS)}, got {activation!r}")
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.activation = activation

    def forward(self, x: FeatureMap, shift: Tensor | None = None, beside: FeatureMap | None = None) -> Tensor:
        """(N, C, H, W), shift (N, C) or None, to (N, C, H, W); with `beside`, the last of the C channels are its."""
        return x.normalised(self._norm, beside, shift) if isinstance(x, Sum) else self._norm(x, beside, shift)

    @overload
    def _norm(self, x: Tensor, beside: FeatureMap | None, shift: Tensor | None) -> Tensor: ...
    @overload
    def _norm(
        self, x: Tensor, beside: FeatureMap | None, shift: Tensor | None, x_bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...
    def _norm(
        self,
        x: Tensor,
        beside: FeatureMap | None,
        shift: Tensor | None,
        x_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        weight, bias = self.weight, self.bias
        if not self.affine:  # as the kernels take it
            weight, bias = x.new_ones(self.num_channels), x.new_zeros(self.num_channels)
        arguments, options = (weight, bias, self.num_groups, self.eps), {"x_bias": x_bias, "residual": residual}
        if beside is not None:
            return ops.group_norm_act_pair(x, value(beside), *arguments, shift=shift, activation=self.activation, **options)
        return ops.group_norm_act(x, *arguments, shift=shift, activation=self.activation, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


def norm_act(
    channels: int,
    num_groups: int = 32,
    eps: float = 1e-6,
    activation: str = "silu",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GroupNormAct:
    """A `GroupNormAct` as our networks have it: fewer groups where they do not divide `channels`, the eps of latent-diffusion."""
    groups = divisible_groups(channels, num_groups)
    return GroupNormAct(groups, channels, eps, device=device, dtype=dtype, activation=activation)


class Conv2d(nn.Conv2d):
    """Convolution with an optional sum: conv(x) + residual, for which prepared weights need no pass (see `inference`)."""

    def forward(self, x: FeatureMap, residual: FeatureMap | None = None) -> Tensor:
        """(N, C, H, W), residual shaped like the result, to the result."""
        y = super().forward(value(x))
        return y if residual is None else value(residual) + y


class ResBlock(nn.Module):
    """ResNet block with time embedding (MultiBeta Algorithm 3).

    Args:
        in_channels, out_channels: The skip path is a 1x1 convolution where they differ.
        embedding_channels: Width of the time embedding; None for a block without projection, which takes the shift itself.
        activation: "sigmoid" as printed, "silu" as the code base the paper extends.
        dropout: Before the second convolution.
        num_groups: Of both norms; fewer where it does not divide the channels.
        zero_init: Start the second convolution at zero, so that the block starts as its skip path.
        device, dtype: Of the parameters.

    Shapes: x (N, in_channels, H, W), embedding (N, embedding_channels), result (N, out_channels, H, W). With `beside` the input
    is x and `beside` next to each other in channels.
    """

    skip: nn.Module
    takes_pairs = False  # whether `skip` takes x and `beside` as they are: see `inference`

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int | None = None,
        *,
        activation: str = "silu",
        dropout: float = 0.0,
        num_groups: int = 32,
        eps: float = 1e-6,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.activation = activation
        self.norm1 = norm_act(in_channels, num_groups, eps, activation, **where)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1, **where)
        self.embedding_projection = nn.Linear(embedding_channels, out_channels, **where) if embedding_channels else None
        self.norm2 = norm_act(out_channels, num_groups, eps, activation, **where)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1, **where)
        self.skip = Conv2d(in_channels, out_channels, 1, **where) if in_channels != out_channels else nn.Identity()
        if zero_init:
            nn.init.zeros_(self.conv2.weight)
            zero_bias(self.conv2)

    @overload
    def shift(self, embedding: Tensor) -> Tensor: ...
    @overload
    def shift(self, embedding: None) -> None: ...
    def shift(self, embedding: Tensor | None) -> Tensor | None:
        """The projected embedding, (N, out_channels)."""
        if self.embedding_projection is None:
            return embedding
        if embedding is None:
            raise TypeError(f"embedding must be (N, {self.embedding_projection.in_features}), got None")
        return self.embedding_projection(activate(embedding, self.activation))

    def forward(self, x: FeatureMap, embedding: Tensor | None = None, beside: FeatureMap | None = None) -> FeatureMap:
        if beside is not None and not self.takes_pairs:
            x, beside = torch.cat([value(x), value(beside)], dim=1), None
        h = self.conv1(self.norm1(x, beside=beside))
        skip = self.skip(x) if beside is None else self.skip(x, beside)
        return self.conv2(self.dropout(self.norm2(h, self.shift(embedding))), skip)


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map, with a residual connection.

    Args:
        channels: Of input and output.
        head_channels: Channels a head; None for a single head.
        num_heads: Instead of `head_channels`.
        num_groups: Of the norm; fewer where it does not divide the channels.
        device, dtype: Of the parameters.

    Shapes: (N, channels, H, W) to the same.
    """

    def __init__(
        self,
        channels: int,
        *,
        head_channels: int | None = None,
        num_heads: int | None = None,
        eps: float = 1e-6,
        num_groups: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels % (num_heads or head_channels or 1):
            given = f"{num_heads} heads" if num_heads else f"heads of {head_channels}"
            raise ValueError(f"channels must divide into heads, got {channels} channels and {given}")
        self.num_heads = num_heads or channels // (head_channels or channels)
        self.norm = norm_act(channels, num_groups, eps, "none", device=device, dtype=dtype)
        self.qkv = nn.Linear(channels, 3 * channels, device=device, dtype=dtype)
        self.projection = nn.Linear(channels, channels, device=device, dtype=dtype)

    def forward(self, x: FeatureMap) -> FeatureMap:
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(tokens).view(n, height * width, 3, self.num_heads, c // self.num_heads).unbind(2)
        attended = self.projection(ops.attention(query, key, value).reshape(n, height * width, c))
        return plus(x, attended.transpose(1, 2).reshape(n, c, height, width))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class Downsample(nn.Module):
    """Halve height and width: 3x3 convolution of stride 2.

    `asymmetric` pads right and bottom only, as the autoencoder of latent-diffusion does; its U-Net pads all sides.
    """

    def __init__(
        self, channels: int, asymmetric: bool = False, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1, device=device, dtype=dtype)

    def forward(self, x: FeatureMap) -> FeatureMap:
        x = value(x)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype)

    def forward(self, x: FeatureMap) -> FeatureMap:
        return self.conv(F.interpolate(value(x), scale_factor=2.0, mode="nearest"))
