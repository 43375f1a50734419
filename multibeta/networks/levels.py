"""What the autoencoder and the U-Net share: blocks in levels, each of half the resolution of the one before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from multibeta.blocks import ResBlock
from multibeta.checks import check_counts, check_number

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    class Stages(nn.ModuleList):
        """A list of lists of blocks."""

        def __getitem__(self, idx: int) -> nn.ModuleList: ...
        def __iter__(self) -> Iterator[nn.ModuleList]: ...
else:
    Stages = nn.ModuleList

Config = TypeVar("Config", bound="DataclassInstance")


def check_levels(config: Any) -> None:
    """`ValueError` where the fields that the configs of both have are out of range."""
    check_counts(config, "base_channels", "channel_multipliers", "num_res_blocks", "attention_resolutions", "num_groups")
    if not config.channel_multipliers:
        raise ValueError("channel_multipliers must be at least one number, got none")
    check_number("dropout", config.dropout, least=0, most=1)


def changed(config: Config, wanted: type[Config], fields: dict[str, Any]) -> Config:
    """The config of a network with other values in these fields; `TypeError` unless it is a `wanted` and has them."""
    if not isinstance(config, wanted):
        raise TypeError(f"config must be of class {wanted.__name__}, or its fields by name, got a {type(config).__name__}")
    return replace(config, **fields)


def run_blocks(blocks: Iterable[nn.Module], h: Tensor, embeddings: Iterator[Tensor]) -> Tensor:
    """Apply blocks in order, handing each ResBlock the next embedding: h (N, C, H, W), embeddings (N, E) each."""
    for block in blocks:
        h = block(h, next(embeddings)) if isinstance(block, ResBlock) else block(h)
    return h
