"""The U-Net of the diffusion models, conditioned on a time step (after latent-diffusion's UNetModel)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import repeat
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from multibeta.blocks import (
    AttentionBlock,
    Conv2d,
    Downsample,
    ResBlock,
    Upsample,
    activate,
    input_dtype,
    norm_act,
    timestep_embedding,
    zero_bias,
)
from multibeta.checks import check_counts, check_even
from multibeta.networks.levels import Stages, changed, check_levels, run_blocks

EPS = 1e-5  # of its norms


@dataclass(frozen=True)
class UNetShape:
    """Shape of a `UNet`, whatever it reads and predicts, by default that of MultiBeta C.1.3.

    Attributes:
        base_channels: Width that the multipliers multiply, even.
        channel_multipliers: Width of each level; every level but the last halves the resolution.
        num_res_blocks: Blocks a level on the way down; one more on the way up.
        attention_resolutions: Resolutions at which blocks are followed by attention.
        head_channels: Attention heads by their width ...
        num_heads: ... or by their number.
        activation: See `ResBlock`.
        dropout: See `ResBlock`.
        num_groups: See `ResBlock`.

    Raises:
        ValueError: A number out of its range, with the name of its field.
    """

    base_channels: int = 256
    channel_multipliers: tuple[int, ...] = (1, 3, 5)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    head_channels: int | None = 32
    num_heads: int | None = None
    activation: Literal["sigmoid", "silu"] = "silu"
    dropout: float = 0.0
    num_groups: int = 32

    def __post_init__(self) -> None:
        check_levels(self)
        check_counts(self, "head_channels", "num_heads")
        check_even(self, "base_channels")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    def build_unet(self, in_channels: int, out_channels: int, resolution: int, **others: Any) -> UNet:
        """A U-Net of this shape; `others` are further fields of its `UNetConfig`."""
        shape = {field.name: getattr(self, field.name) for field in fields(UNetShape)}
        return UNet(UNetConfig(in_channels=in_channels, out_channels=out_channels, resolution=resolution, **shape, **others))


@dataclass(frozen=True)
class UNetConfig(UNetShape):
    """Shape and ends of a `UNet`.

    Attributes:
        in_channels: Of the input.
        out_channels: Of the output. For two heads it is 2 in_channels: the noise (or v) head first, then delta.
        resolution: Height and width of the input.
        span_channels: Width of the layers that embed a span of time next to the time step; None for a network that takes none.
    """

    in_channels: int = 4
    out_channels: int = 8
    resolution: int = 32
    span_channels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "in_channels", "out_channels", "resolution", "span_channels")


TWO_HEADED = UNetConfig()


class UNet(nn.Module):
    """U-Net conditioned on a time step, whose output channels hold one or more heads (after latent-diffusion's UNetModel).

    Args:
        config: Its shape and ends, by default those of MultiBeta C.1.3.
        fields: Those of the config that differ, by name.

    Shapes: latent (N, in_channels, R, R), step (N,) on the scale of 0 ... 1000, with `span_channels` (N, 2), the second the span
    on the same scale; result (N, out_channels, R, R). As built, a span changes nothing.
    """

    def __init__(self, config: UNetConfig = TWO_HEADED, **fields: Any) -> None:
        super().__init__()
        config = changed(config, UNetConfig, fields)
        self.base_channels, self.activation = config.base_channels, config.activation
        embedding_channels, resolution = 4 * config.base_channels, config.resolution

        def res_block(in_channels: int, out_channels: int) -> ResBlock:
            options = {"activation": config.activation, "dropout": config.dropout, "num_groups": config.num_groups}
            return ResBlock(in_channels, out_channels, embedding_channels, **options, eps=EPS, zero_init=True)

        def attention(channels: int) -> AttentionBlock:
            heads, groups = (config.head_channels, config.num_heads), config.num_groups
            return AttentionBlock(channels, head_channels=heads[0], num_heads=heads[1], eps=EPS, num_groups=groups)

        def stage(in_channels: int, out_channels: int) -> nn.ModuleList:
            blocks = [res_block(in_channels, out_channels)]
            return nn.ModuleList(blocks + ([attention(out_channels)] if resolution in config.attention_resolutions else []))

        sizes = config.base_channels, embedding_channels, embedding_channels
        self.time_layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        if config.span_channels is not None:
            sizes = 2 * config.base_channels, config.span_channels, config.span_channels, embedding_channels
            self.span_layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
            nn.init.zeros_(cast("nn.Linear", self.span_layers[-1]).weight)
            zero_bias(cast("nn.Linear", self.span_layers[-1]))
        self.down = Stages([nn.ModuleList([Conv2d(config.in_channels, config.base_channels, 3, padding=1)])])
        channels, skip_channels = config.base_channels, [config.base_channels]
        for level, width in enumerate(config.widths):
            for _ in range(config.num_res_blocks):
                self.down.append(stage(channels, width))
                channels = width
                skip_channels.append(channels)
            if level < len(config.widths) - 1:
                self.down.append(nn.ModuleList([Downsample(channels)]))
                skip_channels.append(channels)
                resolution //= 2
        self.middle = nn.ModuleList([res_block(channels, channels), attention(channels), res_block(channels, channels)])
        self.up = Stages()
        for level, width in reversed(list(enumerate(config.widths))):
            for index in range(config.num_res_blocks + 1):
                self.up.append(stage(channels + skip_channels.pop(), width))
                channels = width
                if level > 0 and index == config.num_res_blocks:
                    self.up[-1].append(Upsample(channels))
                    resolution *= 2
        self.norm_out = norm_act(channels, config.num_groups, EPS, config.activation)
        self.conv_out = Conv2d(channels, config.out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        zero_bias(self.conv_out)

    def time_embedding(self, step: Tensor) -> Tensor:
        """(N,) on the scale of 0 ... 1000, with `span_channels` (N, 2), to (N, 4 base_channels)."""
        step, *span = step.unbind(1) if step.dim() == 2 else (step,)
        embedding = timestep_embedding(step, self.base_channels).to(input_dtype(self.time_layers[0]))
        result = self.time_layers[1](activate(self.time_layers[0](embedding), self.activation))
        if not span:
            return result
        both = torch.cat([embedding, timestep_embedding(span[0], self.base_channels).to(embedding)], dim=1)
        first, second, last = self.span_layers
        return result + last(activate(second(activate(first(both), self.activation)), self.activation))

    @property
    def conv_in(self) -> Conv2d:
        """The layer that reads the latent."""
        return cast("Conv2d", self.down[0][0])

    @property
    def res_blocks(self) -> list[ResBlock]:
        """Its ResBlocks, in the order they are applied."""
        return [block for block in (*self.down.modules(), *self.middle, *self.up.modules()) if isinstance(block, ResBlock)]

    def shifts(self, step: Tensor) -> list[Tensor]:
        """The shift of each of `res_blocks` at `step` (N,): a list of (N, channels of the block)."""
        embedding = self.time_embedding(step)
        return [block.shift(embedding) for block in self.res_blocks]

    def forward(self, latent: Tensor, step: Tensor) -> Tensor:
        return self.run(latent, repeat(self.time_embedding(step)))

    def run(self, latent: Tensor, embeddings: Iterator[Tensor]) -> Tensor:
        """The network, given what each of `res_blocks` takes as its embedding."""
        h, skips = latent, []
        for blocks in self.down:
            h = run_blocks(blocks, h, embeddings)
            skips.append(h)
        h = run_blocks(self.middle, h, embeddings)
        for first, *others in self.up:
            h = run_blocks(others, first(h, next(embeddings), skips.pop()), embeddings)
        return self.conv_out(self.norm_out(h))
