"""What the autoencoder and the U-Net share: blocks in levels, each of half the resolution of the one before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from multibeta.blocks import ResBlock
from multibeta.checks import check_counts, check_number

if TYPE_CHECKING:

    class Stages(nn.ModuleList):
        """A list of lists of blocks."""

        def __getitem__(self, idx: int) -> nn.ModuleList: ...
        def __iter__(self) -> Iterator[nn.ModuleList]: ...
else:
    Stages = nn.ModuleList


def check_levels(config: Any) -> None:
    """`ValueError` where the fields that the configs of both have are out of range."""
    check_counts(config, "base_channels", "channel_multipliers", "num_res_blocks", "attention_resolutions", "num_groups")
    if not config.channel_multipliers:
        raise ValueError("channel_multipliers must be at least one number, got none")
    check_number("dropout", config.dropout, least=0, most=1)


def run_blocks(blocks: Iterable[nn.Module], h: Tensor, embeddings: Iterator[Tensor]) -> Tensor:
    """Apply blocks in order, handing each ResBlock the next embedding: h (N, C, H, W), embeddings (N, E) each."""
    for block in blocks:
        h = block(h, next(embeddings)) if isinstance(block, ResBlock) else block(h)
    return h
