"""The networks: Encoder and Decoder conditioned on beta, the U-Net, the small pair of MultiBeta C.1.2, that of DiffusionVAE."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import repeat
from typing import Literal

import torch.nn.functional as F
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
    timestep_embedding,
)
from multibeta.checks import LARGEST_WEIGHT, check_counts, check_even, check_number


class BetaEmbedding(nn.Module):
    """Embedding of beta that every block of an encoder or decoder receives.

    Without `mlp` it has no parameters (the reading that gives the paper's 148M); with it a two-layer network follows.
    """

    def __init__(self, channels: int, activation: str, mlp: bool = False, max_frequency: float = BETA_FREQUENCY_MAX):
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
        image_channels, latent_channels: Of input and output.
        resolution: Height and width of the input, pixels.
        base_channels, channel_multipliers: Width of each level; every level but the last halves the resolution.
        num_res_blocks: Blocks a level.
        attention_resolutions: Resolutions (pixels) at which every block is followed by attention.
        mid_attention: Attention between the two middle blocks.
        activation, dropout, num_groups: See `ResBlock`.
        embedding_channels, embedding_mlp, embedding_max_frequency: See `BetaEmbedding`.

    Shapes: image (N, image_channels, R, R), beta (N,); result (N, latent_channels, R / f, R / f), f = 2^(levels - 1).
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        latent_channels: int = 4,
        resolution: int = 256,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 4, 6),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (),
        mid_attention: bool = True,
        activation: str = "silu",
        dropout: float = 0.0,
        num_groups: int = 32,
        embedding_channels: int = 512,
        embedding_mlp: bool = False,
        embedding_max_frequency: float = BETA_FREQUENCY_MAX,
    ):
        super().__init__()
        self.embedding = BetaEmbedding(embedding_channels, activation, embedding_mlp, embedding_max_frequency)
        block = {"activation": activation, "dropout": dropout, "num_groups": num_groups}
        self.conv_in = Conv2d(image_channels, base_channels, 3, padding=1)
        self.blocks = nn.ModuleList()
        channels = base_channels
        for level, multiplier in enumerate(channel_multipliers):
            for _ in range(num_res_blocks):
                self.blocks.append(ResBlock(channels, base_channels * multiplier, embedding_channels, **block))
                channels = base_channels * multiplier
                if resolution in attention_resolutions:
                    self.blocks.append(AttentionBlock(channels, num_groups=num_groups))
            if level < len(channel_multipliers) - 1:
                self.blocks.append(Downsample(channels, asymmetric=True))
                resolution //= 2
        self.blocks.extend(middle_blocks(channels, embedding_channels, mid_attention, block))
        self.norm_out = norm_act(channels, num_groups, activation=activation)
        self.conv_out = Conv2d(channels, latent_channels, 3, padding=1)

    def forward(self, image: Tensor, beta: Tensor) -> Tensor:
        h = run_blocks(self.blocks, self.conv_in(image), repeat(self.embedding(beta).to(image.dtype)))
        return self.conv_out(self.norm_out(h))


class Decoder(nn.Module):
    """g_theta(z, beta): mirror of `Encoder`, with one more block a level (after latent-diffusion's Decoder).

    Arguments as for `Encoder`. Shapes: latent (N, latent_channels, R / f, R / f), beta (N,); result (N, image_channels, R, R).
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        latent_channels: int = 4,
        resolution: int = 256,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 4, 6),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (),
        mid_attention: bool = True,
        activation: str = "silu",
        dropout: float = 0.0,
        num_groups: int = 32,
        embedding_channels: int = 512,
        embedding_mlp: bool = False,
        embedding_max_frequency: float = BETA_FREQUENCY_MAX,
    ):
        super().__init__()
        self.embedding = BetaEmbedding(embedding_channels, activation, embedding_mlp, embedding_max_frequency)
        block = {"activation": activation, "dropout": dropout, "num_groups": num_groups}
        channels = base_channels * channel_multipliers[-1]
        resolution //= 2 ** (len(channel_multipliers) - 1)
        self.conv_in = Conv2d(latent_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(middle_blocks(channels, embedding_channels, mid_attention, block))
        for level, multiplier in reversed(list(enumerate(channel_multipliers))):
            for _ in range(num_res_blocks + 1):
                self.blocks.append(ResBlock(channels, base_channels * multiplier, embedding_channels, **block))
                channels = base_channels * multiplier
                if resolution in attention_resolutions:
                    self.blocks.append(AttentionBlock(channels, num_groups=num_groups))
            if level > 0:
                self.blocks.append(Upsample(channels))
                resolution *= 2
        self.norm_out = norm_act(channels, num_groups, activation=activation)
        self.conv_out = Conv2d(channels, image_channels, 3, padding=1)

    def forward(self, latent: Tensor, beta: Tensor) -> Tensor:
        h = run_blocks(self.blocks, self.conv_in(latent), repeat(self.embedding(beta).to(latent.dtype)))
        return self.conv_out(self.norm_out(h))


def middle_blocks(channels: int, embedding_channels: int, attention: bool, block: dict) -> list[nn.Module]:
    """ResBlock, attention (optional), ResBlock at the lowest resolution."""
    between = [AttentionBlock(channels, num_groups=block["num_groups"])] if attention else []
    first, last = (ResBlock(channels, channels, embedding_channels, **block) for _ in range(2))
    return [first, *between, last]


def run_blocks(blocks: Iterable[nn.Module], h: Tensor, embeddings: Iterator[Tensor]) -> Tensor:
    """Apply blocks in order, handing each ResBlock the next embedding."""
    for block in blocks:
        h = block(h, next(embeddings)) if isinstance(block, ResBlock) else block(h)
    return h


class ConditionedConv(nn.Module):
    """Convolution, shift by the projected beta embedding, GroupNorm, activation: one layer of the small pair."""

    def __init__(self, conv: nn.Module, channels: int, embedding_channels: int, activation: str, num_groups: int):
        super().__init__()
        self.conv = conv
        self.embedding_projection = nn.Linear(embedding_channels, channels)
        self.norm = norm_act(channels, num_groups, activation=activation)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.norm(self.conv(x), self.embedding_projection(embedding))


class ToyEncoder(nn.Module):
    """The small fully convolutional encoder of MultiBeta C.1.2: strided convolutions, then one to a vector latent.

    Args:
        resolution: Of the input, pixels; 2^len(channels) must divide it.
        channels: Of each layer; every layer halves the resolution.
        latent_channels: Dimensions of the latent.

    Shapes: image (N, image_channels, R, R), beta (N,); result (N, latent_channels, 1, 1).
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        latent_channels: int = 32,
        resolution: int = 64,
        channels: tuple[int, ...] = (64, 64, 128, 256),
        activation: str = "sigmoid",
        num_groups: int = 32,
        embedding_channels: int = 128,
        embedding_max_frequency: float = BETA_FREQUENCY_MAX,
    ):
        super().__init__()
        self.embedding = BetaEmbedding(embedding_channels, activation, max_frequency=embedding_max_frequency)
        widths = (image_channels, *channels)
        self.layers = nn.ModuleList(
            ConditionedConv(nn.Conv2d(i, o, 4, 2, 1), o, embedding_channels, activation, num_groups)
            for i, o in zip(widths, channels, strict=False)
        )
        self.conv_out = Conv2d(channels[-1], latent_channels, resolution // 2 ** len(channels))

    def forward(self, image: Tensor, beta: Tensor) -> Tensor:
        h, embedding = image, self.embedding(beta).to(image.dtype)
        for layer in self.layers:
            h = layer(h, embedding)
        return self.conv_out(h)


class ToyDecoder(nn.Module):
    """Mirror of `ToyEncoder`. Shapes: latent (N, latent_channels, 1, 1), beta (N,); result (N, image_channels, R, R)."""

    def __init__(
        self,
        *,
        image_channels: int = 3,
        latent_channels: int = 32,
        resolution: int = 64,
        channels: tuple[int, ...] = (64, 64, 128, 256),
        activation: str = "sigmoid",
        num_groups: int = 32,
        embedding_channels: int = 128,
        embedding_max_frequency: float = BETA_FREQUENCY_MAX,
    ):
        super().__init__()
        self.embedding = BetaEmbedding(embedding_channels, activation, max_frequency=embedding_max_frequency)
        widths = tuple(reversed(channels))
        first = nn.ConvTranspose2d(latent_channels, widths[0], resolution // 2 ** len(channels))
        convs = [first, *(nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in itertools.pairwise(widths))]
        self.layers = nn.ModuleList(
            ConditionedConv(conv, width, embedding_channels, activation, num_groups)
            for conv, width in zip(convs, widths, strict=True)
        )
        self.conv_out = nn.ConvTranspose2d(widths[-1], image_channels, 4, 2, 1)

    @property
    def conv_in(self) -> nn.ConvTranspose2d:
        """The layer that reads the latent."""
        return self.layers[0].conv

    def forward(self, latent: Tensor, beta: Tensor) -> Tensor:
        h, embedding = latent, self.embedding(beta).to(latent.dtype)
        for layer in self.layers:
            h = layer(h, embedding)
        return self.conv_out(h)


class UNet(nn.Module):
    """U-Net conditioned on a time step, whose output channels hold one or more heads (after latent-diffusion's UNetModel).

    Args:
        in_channels, out_channels: For two heads out_channels = 2 in_channels: the noise (or v) head first, then delta.
        resolution: Height and width of the input.
        base_channels, channel_multipliers, num_res_blocks: As for `Encoder`.
        attention_resolutions: Resolutions at which blocks are followed by attention.
        head_channels, num_heads: Attention heads, by their width or by their number.
        activation, dropout, num_groups: See `ResBlock`.

    Shapes: latent (N, in_channels, R, R), step (N,) on the scale of 0 ... 1000; result (N, out_channels, R, R).
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int = 8,
        resolution: int = 32,
        base_channels: int = 256,
        channel_multipliers: tuple[int, ...] = (1, 3, 5),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        head_channels: int | None = 32,
        num_heads: int | None = None,
        activation: str = "silu",
        dropout: float = 0.0,
        num_groups: int = 32,
    ):
        super().__init__()
        self.base_channels, self.activation = base_channels, activation
        width = 4 * base_channels
        block = {"activation": activation, "dropout": dropout, "num_groups": num_groups, "eps": 1e-5, "zero_init": True}

        def attention(channels: int) -> AttentionBlock:
            return AttentionBlock(channels, head_channels=head_channels, num_heads=num_heads, eps=1e-5, num_groups=num_groups)

        def stage(in_channels: int, out_channels: int) -> nn.ModuleList:
            blocks = [ResBlock(in_channels, out_channels, width, **block)]
            return nn.ModuleList(blocks + ([attention(out_channels)] if resolution in attention_resolutions else []))

        self.time_layers = nn.ModuleList([nn.Linear(base_channels, width), nn.Linear(width, width)])
        self.down = nn.ModuleList([nn.ModuleList([Conv2d(in_channels, base_channels, 3, padding=1)])])
        channels, skip_channels = base_channels, [base_channels]
        for level, multiplier in enumerate(channel_multipliers):
            for _ in range(num_res_blocks):
                self.down.append(stage(channels, base_channels * multiplier))
                channels = base_channels * multiplier
                skip_channels.append(channels)
            if level < len(channel_multipliers) - 1:
                self.down.append(nn.ModuleList([Downsample(channels)]))
                skip_channels.append(channels)
                resolution //= 2
        self.middle = nn.ModuleList(
            [
                ResBlock(channels, channels, width, **block),
                attention(channels),
                ResBlock(channels, channels, width, **block),
            ]
        )
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(channel_multipliers))):
            for index in range(num_res_blocks + 1):
                self.up.append(stage(channels + skip_channels.pop(), base_channels * multiplier))
                channels = base_channels * multiplier
                if level > 0 and index == num_res_blocks:
                    self.up[-1].append(Upsample(channels))
                    resolution *= 2
        self.norm_out = norm_act(channels, num_groups, 1e-5, activation)
        self.conv_out = Conv2d(channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def time_embedding(self, step: Tensor) -> Tensor:
        """(N,) on the scale of 0 ... 1000 to (N, 4 base_channels)."""
        embedding = timestep_embedding(step, self.base_channels).to(input_dtype(self.time_layers[0]))
        return self.time_layers[1](activate(self.time_layers[0](embedding), self.activation))

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


def _check_blocks(config: UNetConfig | AutoencoderConfig) -> None:
    """`ValueError` where the fields that both kinds of networks have are out of range."""
    check_counts(config, "base_channels", "channel_multipliers", "num_res_blocks", "attention_resolutions", "num_groups")
    if not config.channel_multipliers:
        raise ValueError("channel_multipliers must be at least one number, got none")
    check_number("dropout", config.dropout, least=0, most=1)


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a `UNet`, whatever it reads and predicts; see there for the fields. Numbers out of range are a `ValueError`."""

    base_channels: int = 256
    channel_multipliers: tuple[int, ...] = (1, 3, 5)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    head_channels: int | None = 32
    num_heads: int | None = None
    activation: Literal["sigmoid", "silu"] = "silu"
    dropout: float = 0.0
    num_groups: int = 32

    def __post_init__(self):
        _check_blocks(self)
        check_counts(self, "head_channels", "num_heads")
        check_even(self, "base_channels")

    def build_unet(self, in_channels: int, out_channels: int, resolution: int) -> UNet:
        """A U-Net of this shape."""
        shape = {field.name: getattr(self, field.name) for field in fields(UNetConfig)}
        return UNet(in_channels=in_channels, out_channels=out_channels, resolution=resolution, **shape)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an encoder and its decoder: see `Encoder` ("ldm") and `ToyEncoder` ("toy") for the fields.

    Numbers out of range are a `ValueError`.
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

    def __post_init__(self):
        _check_blocks(self)
        check_counts(self, "resolution", "image_channels", "latent_channels", "embedding_channels")
        check_even(self, "embedding_channels")
        check_number("embedding_max_frequency", self.embedding_max_frequency, above=0, most=LARGEST_WEIGHT)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(latent_channels, height, width) of one latent."""
        side = 1 if self.architecture == "toy" else self.resolution // 2 ** (len(self.channel_multipliers) - 1)
        return self.latent_channels, side, side

    def build(self, channels_per_latent: int = 1) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder; the encoder returns `channels_per_latent` numbers a latent: 2 for mean and variance."""
        levels = len(self.channel_multipliers) - (self.architecture == "ldm")
        if self.resolution < 1 or self.resolution % 2**levels:
            raise ValueError(f"resolution must be a positive multiple of {2**levels}, got {self.resolution}")
        names = "image_channels resolution activation num_groups embedding_channels embedding_max_frequency"
        shared: dict = {name: getattr(self, name) for name in names.split()}
        kinds: tuple[type, type] = (ToyEncoder, ToyDecoder)
        if self.architecture == "toy":
            shared["channels"] = tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)
        else:
            kinds = (Encoder, Decoder)
            names = "base_channels channel_multipliers num_res_blocks attention_resolutions mid_attention dropout embedding_mlp"
            shared |= {name: getattr(self, name) for name in names.split()}
        encoder, decoder = kinds
        return (
            encoder(latent_channels=channels_per_latent * self.latent_channels, **shared),
            decoder(latent_channels=self.latent_channels, **shared),
        )


class BottleneckBlock(nn.Module):
    """Residual block without normalisation: 1x1, two 3x3 and 1x1 convolutions at half the width, GELU before each.

    Args:
        channels: Of input and output, even.
        kernel_size: Of the two middle convolutions; 1 for vectors.
        pool: Average pooling after the block.

    Shapes: (N, channels, H, W) to (N, channels, H / pool, W / pool).
    """

    def __init__(self, channels: int, kernel_size: int = 3, pool: int = 1):
        super().__init__()
        half, padding = channels // 2, kernel_size // 2
        self.conv1 = nn.Conv2d(channels, half, 1)
        self.conv2 = nn.Conv2d(half, half, kernel_size, padding=padding)
        self.conv3 = nn.Conv2d(half, half, kernel_size, padding=padding)
        self.conv4 = nn.Conv2d(half, channels, 1)
        self.pool = pool
        for conv in self.children():
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            h = conv(F.gelu(h))
        return x + h if self.pool == 1 else F.avg_pool2d(x + h, self.pool)


def parse_blocks(blocks: str) -> list[tuple[int, str, int]]:
    """Blocks of a `BlockEncoder` or `BlockDecoder`, as (resolution, kind, number), from a string such as "128x1,128d2,128t64".

    RxN is N residual blocks at resolution R, RdK one followed by K x K average pooling, RuK nearest upsampling by K, and AtB a
    1x1 convolution without bias from the channels of A to those of B. Raises `ValueError` for anything else.
    """
    parsed = []
    for block in blocks.split(","):
        match = re.fullmatch(r"(\d+)([xdut])(\d+)", block.strip())
        if match is None:
            raise ValueError(f"a block must be RxN, RdK, RuK or AtB, such as 128x1, 128d2, 1u4 or 128t64, got {block.strip()!r}")
        parsed.append((int(match[1]), match[2], int(match[3])))
    return parsed


def block_stack(blocks: str, channels: dict[int, int]) -> nn.Sequential:
    """The modules of `parse_blocks(blocks)`, at the width `channels` gives each resolution."""
    modules: list[nn.Module] = []
    for resolution, kind, number in parse_blocks(blocks):
        width, kernel_size = channels[resolution], 3 if resolution > 1 else 1
        if kind == "x":
            modules += [BottleneckBlock(width, kernel_size) for _ in range(number)]
        elif kind == "d":
            modules.append(BottleneckBlock(width, kernel_size, pool=number))
        elif kind == "u":
            modules.append(nn.Upsample(scale_factor=number))
        else:
            modules.append(nn.Conv2d(width, channels[number], 1, bias=False))
    return nn.Sequential(*modules)


class BlockEncoder(nn.Module):
    """Encoder of DiffusionVAE: residual blocks and pooling down to a vector, whose mean and log variance it returns.

    Shapes: image (N, image_channels, R, R); result two of (N, latent_channels, 1, 1).
    """

    def __init__(self, image_channels: int, blocks: str, channels: dict[int, int]):
        super().__init__()
        self.conv_in = nn.Conv2d(image_channels, channels[parse_blocks(blocks)[0][0]], 3, padding=1, bias=False)
        self.blocks = block_stack(blocks, channels)
        self.mean = nn.Conv2d(channels[1], channels[1], 1, bias=False)
        self.log_variance = nn.Conv2d(channels[1], channels[1], 1, bias=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        h = self.blocks(self.conv_in(image))
        return self.mean(h), self.log_variance(h)


class BlockDecoder(nn.Module):
    """Decoder of DiffusionVAE: residual blocks and nearest upsampling from a vector.

    Shapes: latent (N, latent_channels, 1, 1); result (N, image_channels, R, R), any real number.
    """

    def __init__(self, image_channels: int, blocks: str, channels: dict[int, int]):
        super().__init__()
        self.blocks = block_stack(blocks, channels)
        self.conv_out = nn.Conv2d(channels[parse_blocks(blocks)[-1][0]], image_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        return self.conv_out(self.blocks(latent))


@dataclass(frozen=True)
class BlockAutoencoderConfig:
    """Shape of a `BlockEncoder` and its `BlockDecoder`; by default those of DiffusionVAE: 128 x 128, latent of 1024.

    Attributes:
        encoder_blocks, decoder_blocks: See `parse_blocks`.
        channels: Width at each resolution, "resolution:channels" each; at resolution 1 it is that of the latent.
    """

    resolution: int = 128
    image_channels: int = 3
    encoder_blocks: str = "128x1,128d2,128t64,64x3,64d2,64t32,32x3,32d2,32t16,16x7,16d2,16t8,8x3,8d2,8t4,4x3,4d4,4t1,1x2"
    decoder_blocks: str = "1x1,1u4,1t4,4x2,4u2,4t8,8x2,8u2,8t16,16x6,16u2,16t32,32x2,32u2,32t64,64x2,64u2,64t128,128x1"
    channels: str = "128:64,64:64,32:128,16:128,8:256,4:512,1:1024"

    def __post_init__(self):
        check_counts(self, "resolution", "image_channels")

    @property
    def channels_at(self) -> dict[int, int]:
        """Channels at each resolution."""
        return {int(resolution): int(width) for resolution, width in (pair.split(":") for pair in self.channels.split(","))}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(latent_channels, 1, 1), the shape of one latent."""
        return self.channels_at[1], 1, 1

    def build(self) -> tuple[BlockEncoder, BlockDecoder]:
        """Encoder and decoder.

        Raises:
            ValueError: The blocks do not lead from `resolution` to 1 and back, or stand where `channels` gives no width.
        """
        channels = self.channels_at
        for name, blocks, kind in (("encoder_blocks", self.encoder_blocks, "d"), ("decoder_blocks", self.decoder_blocks, "u")):
            parsed = parse_blocks(blocks)
            factor = math.prod(number for _, block, number in parsed if block == kind)
            if factor != self.resolution:
                raise ValueError(f"{name} must change the resolution by {self.resolution}, got a factor of {factor}")
            named = {resolution for resolution, _, _ in parsed} | {number for _, block, number in parsed if block == "t"}
            if not named <= channels.keys():
                raise ValueError(f"channels must give a width at {sorted(named - channels.keys())}, got {self.channels!r}")
        encoder = BlockEncoder(self.image_channels, self.encoder_blocks, channels)
        return encoder, BlockDecoder(self.image_channels, self.decoder_blocks, channels)


BLOCKS_32 = BlockAutoencoderConfig(
    resolution=32,
    encoder_blocks="32x1,32d2,32t16,16x2,16d2,16t8,8x2,8d2,8t4,4x1,4d4,4t1,1x1",
    decoder_blocks="1x1,1u4,1t4,4x1,4u2,4t8,8x2,8u2,8t16,16x2,16u2,16t32,32x1",
    channels="32:32,16:64,8:64,4:128,1:64",
)
