"""Which tensors of latent-diffusion and diffusers each tensor of ours is made of, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from multibeta.blocks import AttentionBlock, Downsample, GroupNormAct, ResBlock, Upsample
from multibeta.networks import Decoder, Encoder, UNet
from multibeta.saving import advice

Module = TypeVar("Module", bound=nn.Module)
Network = UNet | Encoder | Decoder


@dataclass(frozen=True)
class Rule:
    """How one tensor of ours is made of theirs, and back; `write` gives as many tensors as `read` takes.

    Without `read` they have nothing like it.
    """

    how: str
    read: Callable[..., Tensor] | None = None
    write: Callable[[Tensor], Sequence[Tensor]] = lambda ours: ()


def pixelwise(tensor: Tensor, dims: int) -> Tensor:
    """A matrix as the weight of a 1x1 convolution over `dims` dimensions; a bias as it is."""
    return tensor.reshape(*tensor.shape, *[1] * dims) if tensor.dim() == 2 else tensor


def matrix(tensor: Tensor) -> Tensor:
    """The inverse of `pixelwise`."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor


def swap_halves(tensor: Tensor) -> Tensor:
    """The halves of the columns of a matrix exchanged; a bias as it is."""
    return tensor.roll(tensor.shape[1] // 2, 1) if tensor.dim() == 2 else tensor


COPY = Rule("as it is", lambda theirs: theirs, lambda ours: [ours])
SWAP = Rule("[cos, sin] to [sin, cos]", swap_halves, lambda ours: [swap_halves(ours)])
ZERO = Rule("zero, they have no embedding")
UNUSED = Rule("kept, nothing hears it")


def linear(dims: int) -> Rule:
    """A linear layer that is a 1x1 convolution there."""
    return Rule("1x1 convolution to matrix", matrix, lambda ours: [pixelwise(ours, dims)])


def stack(dims: int) -> Rule:
    """Query, key and value in one: three matrices there, or three 1x1 convolutions."""
    return Rule(
        "query, key, value stacked",
        lambda *theirs: torch.cat([matrix(tensor) for tensor in theirs]),
        lambda ours: [pixelwise(tensor, dims) for tensor in ours.chunk(3)],
    )


def regroup(num_heads: int) -> Rule:
    """Query, key and value in one: (3, heads, channels) here, (heads, 3, channels) in OpenAI's first order of attention."""
    return Rule(
        f"(heads, 3, ...) to (3, heads, ...), heads = {num_heads}",
        lambda theirs: matrix(theirs).unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2),
        lambda ours: [pixelwise(ours.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2), 1)],
    )


@dataclass(frozen=True)
class Row:
    """One tensor of ours, the names it has there (none where they have nothing like it), and how it is made of those."""

    ours: str
    theirs: tuple[str, ...]
    rule: Rule

    @property
    def projects_embedding(self) -> bool:
        """Whether it belongs to what a block adds for its embedding."""
        return "embedding_projection." in self.ours


def unconditioned(rows: list[Row]) -> list[Row]:
    """The rows of a network that has no embedding there: our projections of it are zero, and what comes before them idle."""
    result = []
    for row in rows:
        if row.projects_embedding:
            row = replace(row, theirs=(), rule=ZERO)
        elif row.ours.startswith("embedding.layers."):
            row = replace(row, theirs=(), rule=UNUSED)
        result.append(row)
    return result


@dataclass(frozen=True)
class Place:
    """Where a block stands between the ends of a network.

    Attributes:
        name: Its name here.
        side: "down", "mid" or "up".
        stage, level: Of its resolution: counted in the order of application, and from the highest resolution down.
        index: Of the `ResBlock` that it is, or follows, at this resolution.
    """

    name: str
    block: nn.Module
    side: str
    stage: int
    level: int
    index: int


def places(network: Network) -> Iterator[Place]:
    """The blocks of an `Encoder`, `Decoder` or `UNet` between its ends."""
    for side, blocks in sides(network).items():
        last = sum(isinstance(block, Downsample | Upsample) for _, block in blocks)
        stage, index = 0, -1
        for name, block in blocks:
            index += isinstance(block, ResBlock)
            yield Place(name, block, side, stage, last - stage if side == "up" else stage, index)
            if isinstance(block, Downsample | Upsample):
                stage, index = stage + 1, -1


def sides(network: Network) -> dict[str, list[tuple[str, nn.Module]]]:
    """The named blocks of a network on its way down, in its middle and on its way up."""
    if isinstance(network, UNet):
        ways = cast(tuple[Iterable[nn.ModuleList], Iterable[nn.ModuleList]], (network.down, network.up))
        down = [(f"down.{i}.{j}", block) for i, blocks in enumerate(ways[0]) if i for j, block in enumerate(blocks)]
        up = [(f"up.{i}.{j}", block) for i, blocks in enumerate(ways[1]) for j, block in enumerate(blocks)]
        return {"down": down, "mid": [(f"middle.{j}", block) for j, block in enumerate(network.middle)], "up": up}
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(network.blocks)]
    encodes = isinstance(network, Encoder)
    size = 3 if isinstance(network.blocks[-2 if encodes else 1], AttentionBlock) else 2
    return {"down": blocks[:-size], "mid": blocks[-size:]} if encodes else {"mid": blocks[:size], "up": blocks[size:]}


def openai_place(place: Place) -> str:
    """Name of a place in the U-Net of latent-diffusion."""
    side = {"down": "input_blocks", "mid": "middle_block", "up": "output_blocks"}[place.side]
    return f"{side}.{place.name.partition('.')[2]}"


def ldm_place(place: Place) -> str:
    """Name of a place in the autoencoder of latent-diffusion."""
    if place.side == "mid":
        return "mid.attn_1" if isinstance(place.block, AttentionBlock) else f"mid.block_{place.index + 1}"
    side = f"{place.side}.{place.level}"
    if isinstance(place.block, Downsample | Upsample):
        return f"{side}.{place.side}sample"
    return f"{side}.{'attn' if isinstance(place.block, AttentionBlock) else 'block'}.{place.index}"


def diffusers_place(place: Place) -> str:
    """Name of a place in any network of diffusers."""
    side = "mid_block" if place.side == "mid" else f"{place.side}_blocks.{place.stage}"
    if isinstance(place.block, Downsample | Upsample):
        return f"{side}.{place.side}samplers.0"
    return f"{side}.{'attentions' if isinstance(place.block, AttentionBlock) else 'resnets'}.{place.index}"


@dataclass(frozen=True)
class Style:
    """How another code base builds and names its networks.

    Attributes:
        title: Its name, for messages.
        anchors: Of each network, a tensor by which to find it in a state dict.
        place: Their name of a block in a network.
        names: Their names of our layers, those in blocks and those outside; query, key and value may be three.
        qkv, projection: How the linear layers of an `AttentionBlock` change, the first for a number of heads.
        down: Their name of the convolution in a `Downsample`.
        eps, groups, heads: Of every norm and attention; None for any.
        embeds: Whether every `ResBlock` has a projection of an embedding.
    """

    title: str
    anchors: Mapping[type[nn.Module], str]
    place: Callable[[Place], str]
    names: Mapping[str, str]
    qkv: Callable[[int], Rule]
    projection: Rule
    down: str = "conv"
    eps: float | None = None
    groups: int | None = None
    heads: int | None = None
    embeds: bool = False

    def rows(self, module: nn.Module, ours: str = "", theirs: str = "") -> Iterator[Row]:
        """Rows of a block that is called `ours` here and `theirs` there, or of a whole network.

        `ValueError` for a parameter that its layers do not have as they are built.
        """
        blocks = list(places(module)) if isinstance(module, UNet | Encoder | Decoder) else []
        for place in blocks:
            yield from self.rows(place.block, place.name, self.place(place))
        inside = tuple(f"{place.name}." for place in blocks)
        for parameter, _ in module.named_parameters():
            if not parameter.startswith(inside):
                layer, _, end = parameter.rpartition(".")
                if layer not in self.names or end not in ("weight", "bias"):
                    reasons = advice([parameter]) or ["put its own layers back first"]
                    raise ValueError(
                        f"a {type(module).__name__} has no {dotted(ours, parameter)} as it is built: {'; '.join(reasons)}"
                    )
                names = self.down if isinstance(module, Downsample) else self.names[layer]
                there = tuple(dotted(theirs, name, end) for name in names.split())
                yield Row(dotted(ours, parameter), there, self.rule(layer, module))

    def rule(self, layer: str, module: nn.Module) -> Rule:
        """How a layer of a block or network changes."""
        if layer == "qkv" and isinstance(module, AttentionBlock):
            return self.qkv(module.num_heads)
        if layer == "projection":
            return self.projection
        return SWAP if layer == "time_layers.0" else COPY


def dotted(*names: str) -> str:
    """The names that are not empty, joined by dots."""
    return ".".join(name for name in names if name)


OPENAI = Style(
    "latent-diffusion",
    anchors={UNet: "input_blocks.0.0.weight"},
    place=openai_place,
    names={
        **{"norm1": "in_layers.0", "conv1": "in_layers.2", "embedding_projection": "emb_layers.1"},
        **{"norm2": "out_layers.0", "conv2": "out_layers.3", "skip": "skip_connection"},
        **{"norm": "norm", "qkv": "qkv", "projection": "proj_out", "conv": "conv"},
        **{"time_layers.0": "time_embed.0", "time_layers.1": "time_embed.2"},
        **{"down.0.0": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2"},
    },
    qkv=regroup,  # of its first order of attention (QKVAttentionLegacy)
    projection=linear(1),
    down="op",
    eps=1e-5,
    groups=32,
    embeds=True,
)
OPENAI_NEW_ORDER = replace(OPENAI, qkv=lambda num_heads: linear(1))
LDM = Style(
    "latent-diffusion",
    anchors={Encoder: "down.0.block.0.norm1.weight", Decoder: "up.0.block.0.norm1.weight"},
    place=ldm_place,
    names={
        **{name: name for name in ("norm1", "conv1", "norm2", "conv2", "norm", "conv", "conv_in", "norm_out", "conv_out")},
        **{"embedding_projection": "temb_proj", "skip": "nin_shortcut", "qkv": "q k v", "projection": "proj_out"},
        **{"embedding.layers.0": "temb.dense.0", "embedding.layers.1": "temb.dense.1"},
    },
    qkv=lambda num_heads: stack(2),
    projection=linear(2),
    eps=1e-6,
    groups=32,
    heads=1,
)
DIFFUSERS = Style(
    "diffusers",
    anchors={
        UNet: "time_embedding.linear_1.weight",
        Encoder: "down_blocks.0.resnets.0.norm1.weight",
        Decoder: "up_blocks.0.resnets.0.norm1.weight",
    },
    place=diffusers_place,
    names={
        **LDM.names,
        **{"embedding_projection": "time_emb_proj", "skip": "conv_shortcut"},
        **{"norm": "group_norm", "qkv": "to_q to_k to_v", "projection": "to_out.0"},
        **{"time_layers.0": "time_embedding.linear_1", "time_layers.1": "time_embedding.linear_2"},
        **{"down.0.0": "conv_in", "norm_out": "conv_norm_out"},
    },
    qkv=lambda num_heads: stack(0),
    projection=COPY,
)


def ldm_style(module: nn.Module) -> Style:
    """Which of its two families of blocks latent-diffusion has for a module; a block alone shows it by its eps."""
    if isinstance(module, Encoder | Decoder):
        return LDM
    in_unet = isinstance(module, UNet) or any(norm.eps == OPENAI.eps for norm in all_of(GroupNormAct, module))
    return OPENAI if in_unet else LDM


def all_of(module_type: type[Module], module: nn.Module) -> list[Module]:
    """The modules of a type anywhere in a module."""
    return [inner for inner in module.modules() if isinstance(inner, module_type)]
