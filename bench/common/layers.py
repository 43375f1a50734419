"""What the networks are made of: every distinct convolution, layer, norm, attention and upsampling, as a run meets them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import multibeta
from multibeta.blocks import AttentionBlock, GroupNormAct, ResBlock, Upsample
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.nonlinear_diffusion import NonlinearDiffusion
from multibeta.recipes import MultiBetaRecipe


@dataclass(frozen=True)
class Conv:
    """A convolution of an (N, in_channels, height, width) input."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    height: int
    width: int

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"conv{self.kernel}{stride} {self.in_channels}->{self.out_channels} {self.height}x{self.width}"

    @property
    def flop(self) -> int:
        """Floating point operations a sample."""
        pixels = ((self.height + 2 * self.padding - self.kernel) // self.stride + 1) ** 2
        return 2 * pixels * self.in_channels * self.out_channels * self.kernel**2


@dataclass(frozen=True)
class Linear:
    """A linear layer on `tokens` rows a sample."""

    tokens: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"linear {self.in_features}->{self.out_features} x{self.tokens}"

    @property
    def flop(self) -> int:
        """Floating point operations a sample."""
        return 2 * self.tokens * self.in_features * self.out_features


@dataclass(frozen=True)
class Norm:
    """A call of `ops.group_norm_act` on (N, channels, height, width)."""

    channels: int
    height: int
    width: int
    groups: int
    activation: str
    shifted: bool

    def __str__(self) -> str:
        return f"norm {self.channels} {self.height}x{self.width} {self.activation}{' shift' if self.shifted else ''}"


@dataclass(frozen=True)
class Pair:
    """A call of `ops.group_norm_act_pair` on (N, channels, height, width) and `skip_channels` of a skip connection."""

    channels: int
    skip_channels: int
    height: int
    width: int
    groups: int
    activation: str

    def __str__(self) -> str:
        return f"pair {self.channels}+{self.skip_channels} {self.height}x{self.width} {self.activation}"


@dataclass(frozen=True)
class Attention:
    """A call of `ops.attention` on (N, length, heads, head_dim)."""

    length: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"attention {self.length}x{self.heads}x{self.head_dim}"

    @property
    def flop(self) -> int:
        """Floating point operations a sample."""
        return 4 * self.length**2 * self.heads * self.head_dim


@dataclass(frozen=True)
class Doubling:
    """A `blocks.Upsample` of (N, channels, height, width)."""

    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"upsample {self.channels} {self.height}x{self.width}"

    @property
    def flop(self) -> int:
        """Floating point operations a sample, of the convolution as it is defined."""
        return 8 * self.height * self.width * self.channels**2 * 9


Layer = Conv | Linear | Norm | Pair | Attention | Doubling
OfType = TypeVar("OfType", bound=Layer)


def describe(module: nn.Module, args: tuple[Any, ...]) -> Layer | None:
    """What a module does with these inputs; None for modules made of others."""
    x: Tensor = args[0]
    if isinstance(module, nn.Linear):
        return Linear(x[0].numel() // x.shape[-1], module.in_features, module.out_features)
    if not isinstance(module, nn.Conv2d | GroupNormAct | ResBlock | AttentionBlock | Upsample):
        return None
    _, channels, height, width = x.shape
    if isinstance(module, nn.Conv2d):
        kernel, stride, padding = module.kernel_size[0], module.stride[0], int(module.padding[0])
        return Conv(module.in_channels, module.out_channels, kernel, stride, padding, height, width)
    if isinstance(module, GroupNormAct):
        shifted = len(args) > 1 and args[1] is not None
        return Norm(channels, height, width, module.num_groups, module.activation, shifted)
    if isinstance(module, AttentionBlock):
        return Attention(height * width, module.num_heads, channels // module.num_heads)
    if isinstance(module, Upsample):
        return Doubling(channels, height, width)
    if len(args) > 2 and args[2] is not None:
        return Pair(channels, args[2].shape[1], height, width, module.norm1.num_groups, module.norm1.activation)
    return None


def count(network: nn.Module, *inputs: Tensor) -> Counter[Layer]:
    """How often each layer runs in one call of `network`."""
    layers: Counter[Layer] = Counter()

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if (layer := describe(module, args)) is not None:
            layers[layer] += 1

    hooks = [module.register_forward_pre_hook(note) for module in network.modules()]
    with torch.no_grad(), multibeta.backend("reference"):
        network(*inputs)
    for hook in hooks:
        hook.remove()
    return layers


def unet_layers(recipe: MultiBetaRecipe) -> Counter[Layer]:
    """The layers of a recipe's U-Net, without computing anything."""
    with torch.device("meta"):
        return count(NonlinearDiffusion(recipe.diffusion).unet, torch.zeros(1, *recipe.vae.latent_shape), torch.zeros(1))


def decoder_layers(recipe: MultiBetaRecipe) -> Counter[Layer]:
    """The layers of a recipe's VAE decoder, without computing anything."""
    with torch.device("meta"):
        return count(MultiBetaVAE(recipe.vae).decoder, torch.zeros(1, *recipe.vae.latent_shape), torch.zeros(1))


def of_type(layers: Iterable[Layer], *types: type[OfType]) -> list[OfType]:
    """The layers of these types."""
    return [layer for layer in layers if isinstance(layer, types)]
