"""The architecture of a network, from its modules, from the names and shapes of its tensors, or from a config."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from multibeta.blocks import AttentionBlock, Conv2d, ResBlock
from multibeta.interop.mapping import Network, places
from multibeta.interop.parts import State
from multibeta.networks import Decoder, Encoder, UNet


@dataclass(frozen=True)
class Shape:
    """The architecture that names and shapes of tensors show: all but heads, groups and resolution.

    Attributes:
        base_channels: Of the first convolution; of a decoder, which does not show it, those that all widths divide into.
        widths, attention: Channels of each level, from the highest resolution down, and whether attention follows its blocks.
    """

    in_channels: int
    out_channels: int
    base_channels: int
    widths: tuple[int, ...]
    attention: tuple[bool, ...]
    num_res_blocks: int
    mid_attention: bool

    def arguments(
        self, network_type: type[nn.Module], *, num_groups: int, resolution: int | None = None, **heads: int | None
    ) -> dict:
        """Arguments of a network of this shape and type; without a resolution, its lowest level is 8 pixels, of a VAE 32."""
        if any(width % self.base_channels for width in self.widths):
            raise ValueError(
                f"channels must be multiples of the first {self.base_channels}, got {', '.join(map(str, self.widths))}"
            )
        factor = 2 ** (len(self.widths) - 1)
        resolution = resolution or (8 if network_type is UNet else 32) * factor
        if resolution % factor:
            raise ValueError(f"resolution must be a multiple of {factor}, for {len(self.widths)} levels, got {resolution}")
        if network_type is UNet:
            own = {"in_channels": self.in_channels, "out_channels": self.out_channels, **heads}
        else:
            ends = ("image_channels", "latent_channels") if network_type is Encoder else ("latent_channels", "image_channels")
            own = {ends[0]: self.in_channels, ends[1]: self.out_channels, "mid_attention": self.mid_attention}
        return {
            **own,
            "resolution": resolution,
            "base_channels": self.base_channels,
            "channel_multipliers": tuple(width // self.base_channels for width in self.widths),
            "num_res_blocks": self.num_res_blocks,
            "attention_resolutions": tuple(resolution // 2**level for level, has in enumerate(self.attention) if has),
            "num_groups": num_groups,
        }


def shape_of(network: Network) -> Shape:
    """The shape of an `Encoder`, `Decoder` or `UNet`."""
    blocks = list(places(network))
    decodes = isinstance(network, Decoder)
    levels: list[list[nn.Module]] = [[] for _ in range(1 + max(place.level for place in blocks))]
    for place in blocks:
        if place.side == ("up" if decodes else "down"):
            levels[place.level].append(place.block)
    widths = tuple(cast(ResBlock, level[0]).conv2.out_channels for level in levels)
    first = cast(Conv2d, network.get_submodule("down.0.0" if isinstance(network, UNet) else "conv_in"))
    return Shape(
        first.in_channels,
        network.conv_out.out_channels,
        math.gcd(*widths) if decodes else first.out_channels,
        widths,
        tuple(any(isinstance(block, AttentionBlock) for block in level) for level in levels),
        sum(isinstance(block, ResBlock) for block in levels[0]) - decodes,
        any(place.side == "mid" and isinstance(place.block, AttentionBlock) for place in blocks),
    )


def counted(state: State, name: str) -> int:
    """How many tensors there are called `name`, with 0, 1, 2, ... in the place of {}."""
    return next(index for index in itertools.count() if name.format(index) not in state)


def ldm_shape(state: State, network_type: type[nn.Module]) -> Shape:
    """The shape of a network of latent-diffusion, from its part of a state dict."""
    if network_type is UNet:
        return openai_shape(state)
    side = "up" if network_type is Decoder else "down"
    levels = range(counted(state, side + ".{}.block.0.conv1.weight"))
    widths = tuple(len(state[f"{side}.{level}.block.0.conv1.weight"]) for level in levels)
    return Shape(
        state["conv_in.weight"].shape[1],
        len(state["conv_out.weight"]),
        math.gcd(*widths) if network_type is Decoder else len(state["conv_in.weight"]),
        widths,
        tuple(f"{side}.{level}.attn.0.norm.weight" in state for level in levels),
        counted(state, side + ".0.block.{}.conv1.weight") - (network_type is Decoder),
        "mid.attn_1.norm.weight" in state,
    )


def openai_shape(state: State) -> Shape:
    """The shape of a `UNetModel`, from its part of a state dict."""
    levels: list[list[tuple[int, bool]]] = [[]]
    for index in itertools.count(1):
        if f"input_blocks.{index}.0.op.weight" in state:
            levels.append([])
        elif (conv := state.get(f"input_blocks.{index}.0.in_layers.2.weight")) is not None:
            levels[-1].append((len(conv), f"input_blocks.{index}.1.qkv.weight" in state))
        else:
            break
    if not all(levels):
        raise ValueError("the U-Net has a level without a block, here every level has one")
    first, last = state["input_blocks.0.0.weight"], state["out.2.weight"]
    widths, attention = zip(*[level[0] for level in levels], strict=True)
    return Shape(first.shape[1], len(last), len(first), widths, attention, len(levels[0]), True)


def config_shape(config: Mapping, network_type: type[nn.Module]) -> Shape:
    """The shape of a network of diffusers, from the config.json it is part of."""
    widths, latent = tuple(config["block_out_channels"]), config.get("latent_channels", 4)
    return Shape(
        latent if network_type is Decoder else config.get("in_channels", 3),
        2 * latent if network_type is Encoder else config.get("out_channels", 3),
        math.gcd(*widths) if network_type is Decoder else widths[0],
        widths,
        tuple(name.startswith("Attn") for name in config["down_block_types"]),
        config.get("layers_per_block", 2 if network_type is UNet else 1),
        config.get("mid_block_add_attention", True),
    )
