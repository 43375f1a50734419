"""Encoder and decoder conditioned on beta: those after latent-diffusion, and the small pair of MultiBeta C.1.2.

A network takes its config, and by name the fields that differ from it: Encoder(config), Encoder(config, latent_channels=8).
Without a config they differ from the default: Encoder(resolution=64).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Literal, cast

from torch import Tensor, nn

from multibeta.blocks import (
    BETA_FREQUENCY_MAX,
    AttentionBlock,
    Conv2d,
    Downsample,
    ResBlock,
    Upsample,
    activate,
    beta_embedding,
    input_dtype,
    norm_act,
)
from multibeta.checks import LARGEST_WEIGHT, check_counts, check_even, check_number
from multibeta.networks.levels import changed, check_levels, run_blocks


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an encoder and its decoder, by default that of MultiBeta C.1.3.

    Attributes:
        architecture: "ldm" builds `Encoder` and `Decoder`, "toy" `ToyEncoder` and `ToyDecoder`.
        resolution: Height and width of an image, pixels.
        image_channels: Of an image.
        latent_channels: Of a latent.
        base_channels: Width that the multipliers multiply.
        channel_multipliers: Width of each level. Every level but the last halves the resolution, of "toy" the last as well.
        num_res_blocks: Blocks a level; the decoder has one more ("ldm").
        attention_resolutions: Resolutions (pixels) at which every block is followed by attention ("ldm").
        mid_attention: Attention between the two middle blocks ("ldm").
        activation: See `ResBlock`.
        dropout: See `ResBlock` ("ldm").
        num_groups: See `ResBlock`.
        embedding_channels: Width of the embedding of beta, see `BetaEmbedding`.
        embedding_mlp: Whether a network follows the embedding ("ldm").
        embedding_max_frequency: Of the embedding, in radians.

    Raises:
        ValueError: A number out of its range, with the name of its field.
    """

    architecture: Literal["ldm", "toy"] = "ldm"
    resolution: int = 256
    image_channels: int = 3
    latent_channels: int = 4
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 6)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = ()
    mid_attention: bool = True
    activation: Literal["sigmoid", "silu"] = "silu"
    dropout: float = 0.0
    num_groups: int = 32
    embedding_channels: int = 512
    embedding_mlp: bool = False
    embedding_max_frequency: float = BETA_FREQUENCY_MAX

    def __post_init__(self) -> None:
        check_levels(self)
        check_counts(self, "resolution", "image_channels", "latent_channels", "embedding_channels")
        check_even(self, "embedding_channels")
        check_number("embedding_max_frequency", self.embedding_max_frequency, above=0, most=LARGEST_WEIGHT)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(latent_channels, height, width) of one latent."""
        side = 1 if self.architecture == "toy" else self.resolution // 2 ** (len(self.channel_multipliers) - 1)
        return self.latent_channels, side, side

    def build(self, channels_per_latent: int = 1) -> tuple[Encoder | ToyEncoder, Decoder | ToyDecoder]:
        """Encoder and decoder; the encoder returns `channels_per_latent` numbers a latent: 2 for mean and variance.

        Raises:
            ValueError: The levels do not divide the resolution.
        """
        levels = len(self.channel_multipliers) - (self.architecture == "ldm")
        if self.resolution % 2**levels:
            raise ValueError(f"resolution must be a positive multiple of {2**levels}, got {self.resolution}")
        encoder, decoder = (ToyEncoder, ToyDecoder) if self.architecture == "toy" else (Encoder, Decoder)
        return encoder(self, latent_channels=channels_per_latent * self.latent_channels), decoder(self)


LDM = AutoencoderConfig()
TOY = AutoencoderConfig(
    architecture="toy",
    resolution=64,
    latent_channels=32,
    base_channels=64,
    channel_multipliers=(1, 1, 2, 4),
    activation="sigmoid",
    embedding_channels=128,
)


class BetaEmbedding(nn.Module):
    """Embedding of beta that every block of an encoder or decoder receives.

    Without `mlp` it has no parameters (the reading that gives the paper's 148M); with it a two-layer network follows.

    Args:
        channels: Of the embedding, even.
        activation: Of the network.
        mlp: Whether there is one.
        max_frequency: See `beta_embedding`.
    """

    def __init__(self, channels: int, activation: str, mlp: bool = False, max_frequency: float = BETA_FREQUENCY_MAX) -> None:
        super().__init__()
        self.channels, self.activation, self.max_frequency = channels, activation, max_frequency
        self.layers = nn.ModuleList([nn.Linear(channels, channels) for _ in range(2)]) if mlp else None

    def forward(self, beta: Tensor) -> Tensor:
        """(N,) in [0, 1] to (N, channels)."""
        embedding = beta_embedding(beta, self.channels, self.max_frequency)
        if self.layers is None:
            return embedding
        hidden = activate(self.layers[0](embedding.to(input_dtype(self.layers[0]))), self.activation)
        return self.layers[1](hidden)


class Encoder(nn.Module):
    """f_phi(x, beta): convolutional encoder in which beta enters every ResNet block (after latent-diffusion's Encoder).

    Args:
        config: Its shape, by default that of MultiBeta C.1.3.
        fields: Those of the config that differ, by name.

    Shapes: image (N, image_channels, R, R), beta (N,); result (N, latent_channels, R / f, R / f), f = 2^(levels - 1).
    """

    def __init__(self, config: AutoencoderConfig = LDM, **fields: Any) -> None:
        super().__init__()
        config = changed(config, AutoencoderConfig, fields)
        self.embedding = embedding_of(config)
        self.conv_in = Conv2d(config.image_channels, config.base_channels, 3, padding=1)
        self.blocks = nn.ModuleList()
        channels, resolution = config.base_channels, config.resolution
        for level, width in enumerate(config.widths):
            for _ in range(config.num_res_blocks):
                self.blocks.append(res_block(config, channels, width))
                channels = width
                if resolution in config.attention_resolutions:
                    self.blocks.append(AttentionBlock(channels, num_groups=config.num_groups))
            if level < len(config.widths) - 1:
                self.blocks.append(Downsample(channels, asymmetric=True))
                resolution //= 2
        self.blocks.extend(middle_blocks(config))
        self.norm_out = norm_act(channels, config.num_groups, activation=config.activation)
        self.conv_out = Conv2d(channels, config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor, beta: Tensor) -> Tensor:
        h = run_blocks(self.blocks, self.conv_in(image), repeat(self.embedding(beta).to(image.dtype)))
        return self.conv_out(self.norm_out(h))


class Decoder(nn.Module):
    """g_theta(z, beta): mirror of `Encoder`, with one more block a level (after latent-diffusion's Decoder).

    Arguments as for `Encoder`. Shapes: latent (N, latent_channels, R / f, R / f), beta (N,); result (N, image_channels, R, R).
    """

    def __init__(self, config: AutoencoderConfig = LDM, **fields: Any) -> None:
        super().__init__()
        config = changed(config, AutoencoderConfig, fields)
        self.embedding = embedding_of(config)
        channels, resolution = config.widths[-1], config.resolution // 2 ** (len(config.widths) - 1)
        self.conv_in = Conv2d(config.latent_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(middle_blocks(config))
        for level, width in reversed(list(enumerate(config.widths))):
            for _ in range(config.num_res_blocks + 1):
                self.blocks.append(res_block(config, channels, width))
                channels = width
                if resolution in config.attention_resolutions:
                    self.blocks.append(AttentionBlock(channels, num_groups=config.num_groups))
            if level > 0:
                self.blocks.append(Upsample(channels))
                resolution *= 2
        self.norm_out = norm_act(channels, config.num_groups, activation=config.activation)
        self.conv_out = Conv2d(channels, config.image_channels, 3, padding=1)

    def forward(self, latent: Tensor, beta: Tensor) -> Tensor:
        h = run_blocks(self.blocks, self.conv_in(latent), repeat(self.embedding(beta).to(latent.dtype)))
        return self.conv_out(self.norm_out(h))


def embedding_of(config: AutoencoderConfig) -> BetaEmbedding:
    """The embedding of beta of an encoder or decoder."""
    return BetaEmbedding(
        config.embedding_channels, config.activation, config.embedding_mlp, max_frequency=config.embedding_max_frequency
    )


def res_block(config: AutoencoderConfig, in_channels: int, out_channels: int) -> ResBlock:
    """A ResBlock of an encoder or decoder."""
    return ResBlock(
        in_channels,
        out_channels,
        config.embedding_channels,
        activation=config.activation,
        dropout=config.dropout,
        num_groups=config.num_groups,
    )


def middle_blocks(config: AutoencoderConfig) -> list[nn.Module]:
    """ResBlock, attention (optional), ResBlock at the lowest resolution."""
    channels = config.widths[-1]
    between = [AttentionBlock(channels, num_groups=config.num_groups)] if config.mid_attention else []
    first, last = (res_block(config, channels, channels) for _ in range(2))
    return [first, *between, last]


class ConditionedConv(nn.Module):
    """Convolution, shift by the projected beta embedding, GroupNorm, activation: one layer of the small pair.

    Shapes: x (N, C, H, W), embedding (N, embedding_channels); result (N, channels, H', W') of the convolution.
    """

    def __init__(self, config: AutoencoderConfig, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.embedding_projection = nn.Linear(config.embedding_channels, channels)
        self.norm = norm_act(channels, config.num_groups, activation=config.activation)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.norm(self.conv(x), self.embedding_projection(embedding))


class ToyEncoder(nn.Module):
    """The small fully convolutional encoder of MultiBeta C.1.2: strided convolutions, then one to a vector latent.

    Args:
        config: Its shape, by default that of C.1.2; 2^levels must divide its resolution.
        channels: Of each layer, in the place of `base_channels` and `channel_multipliers`.
        fields: Those of the config that differ, by name.

    Shapes: image (N, image_channels, R, R), beta (N,); result (N, latent_channels, 1, 1).
    """

    def __init__(self, config: AutoencoderConfig = TOY, *, channels: tuple[int, ...] | None = None, **fields: Any) -> None:
        super().__init__()
        config = toy_config(changed(config, AutoencoderConfig, fields), channels)
        self.embedding = embedding_of(config)
        widths = (config.image_channels, *config.widths)
        self.layers = nn.ModuleList(ConditionedConv(config, nn.Conv2d(i, o, 4, 2, 1), o) for i, o in itertools.pairwise(widths))
        self.conv_out = Conv2d(widths[-1], config.latent_channels, config.resolution // 2 ** len(config.widths))

    def forward(self, image: Tensor, beta: Tensor) -> Tensor:
        h, embedding = image, self.embedding(beta).to(image.dtype)
        for layer in self.layers:
            h = layer(h, embedding)
        return self.conv_out(h)


class ToyDecoder(nn.Module):
    """Mirror of `ToyEncoder`; arguments as there.

    Shapes: latent (N, latent_channels, 1, 1), beta (N,); result (N, image_channels, R, R).
    """

    def __init__(self, config: AutoencoderConfig = TOY, *, channels: tuple[int, ...] | None = None, **fields: Any) -> None:
        super().__init__()
        config = toy_config(changed(config, AutoencoderConfig, fields), channels)
        self.embedding = embedding_of(config)
        widths = tuple(reversed(config.widths))
        first = nn.ConvTranspose2d(config.latent_channels, widths[0], config.resolution // 2 ** len(widths))
        convs = [first, *(nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in itertools.pairwise(widths))]
        self.layers = nn.ModuleList(ConditionedConv(config, conv, width) for conv, width in zip(convs, widths, strict=True))
        self.conv_out = nn.ConvTranspose2d(widths[-1], config.image_channels, 4, 2, 1)

    @property
    def conv_in(self) -> nn.ConvTranspose2d:
        """The layer that reads the latent."""
        return cast("nn.ConvTranspose2d", self.layers[0].conv)

    def forward(self, latent: Tensor, beta: Tensor) -> Tensor:
        h, embedding = latent, self.embedding(beta).to(latent.dtype)
        for layer in self.layers:
            h = layer(h, embedding)
        return self.conv_out(h)


def toy_config(config: AutoencoderConfig, channels: tuple[int, ...] | None) -> AutoencoderConfig:
    """The config of a small network, whose embedding has no network: with levels of `channels`; None keeps its own."""
    levels = {} if channels is None else {"base_channels": 1, "channel_multipliers": tuple(channels)}
    return replace(config, embedding_mlp=False, **levels)
