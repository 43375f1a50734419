"""The U-Net of a preset, and what a user could pick instead: the same network in diffusers, as a CUDA graph too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import multibeta
from common import measure
from multibeta import recipes
from multibeta.networks import UNet
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusion
from multibeta.sampling import capture_cuda_graph

Network = TypeVar("Network", bound=nn.Module)
PRESETS = {name: recipe for name, recipe in recipes.RECIPES.items() if isinstance(recipe, recipes.MultiBetaRecipe)}


def channels_last(network: Network) -> Network:
    """`network`, its weights channels-last."""
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]: torch documents it


def build_unet(config: DiffusionConfig, device: torch.device | str = "cpu") -> UNet:
    """Our two-headed U-Net of a preset, its zero-initialised layers filled with small noise so that every layer matters."""
    torch.manual_seed(0)
    with torch.device(device):
        network = cast(UNet, NonlinearDiffusion(config).unet)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def unet_flops(config: DiffusionConfig) -> int:
    """Floating point operations of one evaluation of one sample, of the network as it is defined."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad(), multibeta.backend("reference"):
        size = config.latent_channels, config.latent_resolution, config.latent_resolution
        NonlinearDiffusion(config).unet(torch.zeros(1, *size), torch.zeros(1))
    return counter.get_total_flops()


def diffusers_unet(config: DiffusionConfig, device: torch.device | str = "cpu") -> nn.Module:
    """diffusers' UNet2DModel of the same shape: same blocks, channels, heads and number of outputs."""
    from diffusers import UNet2DModel  # pyright: ignore[reportPrivateImportUsage]

    levels = range(len(config.channel_multipliers))
    attention = [config.latent_resolution >> level in config.attention_resolutions for level in levels]
    with torch.device(device):
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
                cast(Any, module).heads = config.num_heads
    return network.eval().requires_grad_(False)


class Captured(nn.Module):
    """A network as a CUDA graph a shape: what a careful user of torch.compile would run. Results are overwritten."""

    def __init__(self, network: Callable[..., object]) -> None:
        super().__init__()
        self.network = network
        self._steps: dict[torch.Size, _Step] = {}

    def forward(self, latent: Tensor, times: Tensor) -> object:
        if latent.shape not in self._steps:
            self._steps[latent.shape] = _Step(self.network, latent.clone(), times.clone())
        return self._steps[latent.shape](latent, times)


class _Step:
    """A captured call over fixed inputs."""

    def __init__(self, network: Callable[..., object], *inputs: Tensor) -> None:
        self.network, self.inputs = network, inputs
        self._run()
        if not measure.capturable(self._run):
            raise RuntimeError("the network waits for the host: it cannot be a graph")
        self.replay = capture_cuda_graph(self._run, None)

    def _run(self) -> None:
        self.output = self.network(*self.inputs)

    def __call__(self, *inputs: Tensor) -> object:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.replay()
        return self.output
