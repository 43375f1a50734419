"""What a user could pick instead: the same networks in diffusers."""

from __future__ import annotations

import torch
from torch import nn

from multibeta.networks import UNet
from multibeta.nonlinear_diffusion import DiffusionConfig


def build_unet(config: DiffusionConfig) -> UNet:
    """Our two-headed U-Net of a preset, its zero-initialised layers filled with small noise so that every layer matters."""
    torch.manual_seed(0)
    names = "base_channels channel_multipliers num_res_blocks attention_resolutions head_channels num_heads activation num_groups"
    network = UNet(
        in_channels=config.latent_channels,
        out_channels=2 * config.latent_channels,
        resolution=config.latent_resolution,
        **{name: getattr(config, name) for name in names.split()},
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


def diffusers_unet(config: DiffusionConfig) -> nn.Module:
    """diffusers' UNet2DModel of the same shape: same blocks, channels, heads and number of outputs."""
    from diffusers import UNet2DModel

    levels = range(len(config.channel_multipliers))
    attention = [config.latent_resolution >> level in config.attention_resolutions for level in levels]
    network = UNet2DModel(
        sample_size=config.latent_resolution,
        in_channels=config.latent_channels,
        out_channels=2 * config.latent_channels,
        layers_per_block=config.num_res_blocks,
        block_out_channels=tuple(config.base_channels * multiplier for multiplier in config.channel_multipliers),
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attention),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)),
        attention_head_dim=config.head_channels or 8,
        norm_num_groups=config.num_groups,
    )
    if config.num_heads:  # UNet2DModel only knows the width of a head
        for module in network.modules():
            if type(module).__name__ == "Attention":
                module.heads = config.num_heads
    return network.eval().requires_grad_(False)
