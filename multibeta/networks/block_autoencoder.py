"""The pair of DiffusionVAE: residual blocks that strings describe, from an image to a vector and back."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from multibeta.blocks import zero_bias
from multibeta.checks import check_counts


@dataclass(frozen=True)
class BlockAutoencoderConfig:
    """Shape of a `BlockEncoder` and its `BlockDecoder`; by default those of DiffusionVAE: 128 x 128, latent of 1024.

    Attributes:
        resolution: Height and width of an image, pixels.
        image_channels: Of an image.
        encoder_blocks: From an image to a vector, see `parse_blocks`.
        decoder_blocks: From a vector to an image.
        channels: Width at each resolution, "resolution:channels" each; at resolution 1 it is that of the latent.
    """

    resolution: int = 128
    image_channels: int = 3
    encoder_blocks: str = "128x1,128d2,128t64,64x3,64d2,64t32,32x3,32d2,32t16,16x7,16d2,16t8,8x3,8d2,8t4,4x3,4d4,4t1,1x2"
    decoder_blocks: str = "1x1,1u4,1t4,4x2,4u2,4t8,8x2,8u2,8t16,16x6,16u2,16t32,32x2,32u2,32t64,64x2,64u2,64t128,128x1"
    channels: str = "128:64,64:64,32:128,16:128,8:256,4:512,1:1024"

    def __post_init__(self) -> None:
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
        for name, blocks, letter in (("encoder_blocks", self.encoder_blocks, "d"), ("decoder_blocks", self.decoder_blocks, "u")):
            parsed = parse_blocks(blocks)
            factor = math.prod(number for _, change, number in parsed if change == letter)
            if factor != self.resolution:
                raise ValueError(f"{name} must change the resolution by {self.resolution}, got a factor of {factor}")
            named = {resolution for resolution, _, _ in parsed} | {number for _, change, number in parsed if change == "t"}
            if lacking := sorted(named - self.channels_at.keys()):
                raise ValueError(f"channels must give a width at {lacking}, got {self.channels!r}")
        return BlockEncoder(self), BlockDecoder(self)


BLOCKS_32 = BlockAutoencoderConfig(
    resolution=32,
    encoder_blocks="32x1,32d2,32t16,16x2,16d2,16t8,8x2,8d2,8t4,4x1,4d4,4t1,1x1",
    decoder_blocks="1x1,1u4,1t4,4x1,4u2,4t8,8x2,8u2,8t16,16x2,16u2,16t32,32x1",
    channels="32:32,16:64,8:64,4:128,1:64",
)


class BottleneckBlock(nn.Module):
    """Residual block without normalisation: 1x1, two 3x3 and 1x1 convolutions at half the width, GELU before each.

    Args:
        channels: Of input and output, even.
        kernel_size: Of the two middle convolutions; 1 for vectors.
        pool: Average pooling after the block.

    Shapes: (N, channels, H, W) to (N, channels, H / pool, W / pool).
    """

    def __init__(self, channels: int, kernel_size: int = 3, pool: int = 1) -> None:
        super().__init__()
        half, padding = channels // 2, kernel_size // 2
        self.conv1 = nn.Conv2d(channels, half, 1)
        self.conv2 = nn.Conv2d(half, half, kernel_size, padding=padding)
        self.conv3 = nn.Conv2d(half, half, kernel_size, padding=padding)
        self.conv4 = nn.Conv2d(half, channels, 1)
        self.pool = pool
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            zero_bias(conv)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            h = conv(F.gelu(h))
        return x + h if self.pool == 1 else F.avg_pool2d(x + h, self.pool)


def parse_blocks(blocks: str) -> list[tuple[int, str, int]]:
    """Blocks of a `BlockEncoder` or `BlockDecoder`, as (resolution, letter, number), from a string such as "128x1,128d2,128t64".

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
    for resolution, letter, number in parse_blocks(blocks):
        width, kernel_size = channels[resolution], 3 if resolution > 1 else 1
        if letter == "x":
            modules += [BottleneckBlock(width, kernel_size) for _ in range(number)]
        elif letter == "d":
            modules.append(BottleneckBlock(width, kernel_size, pool=number))
        elif letter == "u":
            modules.append(nn.Upsample(scale_factor=number))
        else:
            modules.append(nn.Conv2d(width, channels[number], 1, bias=False))
    return nn.Sequential(*modules)


class BlockEncoder(nn.Module):
    """Encoder of DiffusionVAE: residual blocks and pooling down to a vector, whose mean and log variance it returns.

    Shapes: image (N, image_channels, R, R); result two of (N, latent_channels, 1, 1).
    """

    def __init__(self, config: BlockAutoencoderConfig) -> None:
        super().__init__()
        blocks, channels = config.encoder_blocks, config.channels_at
        self.conv_in = nn.Conv2d(config.image_channels, channels[parse_blocks(blocks)[0][0]], 3, padding=1, bias=False)
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

    def __init__(self, config: BlockAutoencoderConfig) -> None:
        super().__init__()
        blocks, channels = config.decoder_blocks, config.channels_at
        self.blocks = block_stack(blocks, channels)
        self.conv_out = nn.Conv2d(channels[parse_blocks(blocks)[-1][0]], config.image_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        return self.conv_out(self.blocks(latent))
