"""The networks, each built from its config: encoder and decoder conditioned on beta, the U-Net, the pair of DiffusionVAE,
the discriminator."""

from multibeta.networks.autoencoder import (
    AutoencoderConfig,
    BetaEmbedding,
    ConditionedConv,
    Decoder,
    Encoder,
    ToyDecoder,
    ToyEncoder,
)
from multibeta.networks.block_autoencoder import (
    BLOCKS_32,
    BlockAutoencoderConfig,
    BlockDecoder,
    BlockEncoder,
    BottleneckBlock,
    parse_blocks,
)
from multibeta.networks.discriminator import PatchDiscriminator
from multibeta.networks.unet import UNet, UNetConfig, UNetShape

__all__ = [
    "AutoencoderConfig",
    "Encoder",
    "Decoder",
    "ToyEncoder",
    "ToyDecoder",
    "BetaEmbedding",
    "ConditionedConv",
    "UNetShape",
    "UNetConfig",
    "UNet",
    "BlockAutoencoderConfig",
    "BlockEncoder",
    "BlockDecoder",
    "BottleneckBlock",
    "BLOCKS_32",
    "parse_blocks",
    "PatchDiscriminator",
]
