"""Weights from and to latent-diffusion and diffusers, tensor by tensor, all of them or none.

`load_ldm` and `load_diffusers` fill a `ResBlock`, `AttentionBlock`, `Encoder`, `Decoder` or `UNet`; `to_ldm` and `to_diffusers`
go back; `read_networks` and `write_networks` do either with files. Names and layouts are those of CompVis/latent-diffusion
(openaimodel.py, which is OpenAI's guided-diffusion, and model.py) and of `UNet2DModel` and `AutoencoderKL` of diffusers. What
a state dict cannot show (heads, groups, eps, ...) is compared with `config` where one is given.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multibeta import checkpoints
from multibeta.blocks import AttentionBlock, Downsample, GroupNormAct, ResBlock, Upsample
from multibeta.metrics.weights import read_weights
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.networks import Decoder, Encoder, UNet

State = Mapping[str, Tensor]
Latent = Literal["published", "decoder"]
FORMATS = ("multibeta", "ldm", "diffusers")
KINDS: dict[str, type[nn.Module]] = {"unet": UNet, "encoder": Encoder, "decoder": Decoder}
WEIGHTS = "diffusion_pytorch_model"
LDM_PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
CONV_OUT, CONV_IN = ("conv_out.weight", "conv_out.bias"), ("conv_in.weight", "conv_in.bias")


@dataclass(frozen=True)
class Rule:
    """How one tensor of ours is made of theirs, and back; `write` gives as many tensors as `read` takes."""

    how: str
    read: Callable[..., Tensor]
    write: Callable[[Tensor], Sequence[Tensor]]


def pixelwise(tensor: Tensor, dims: int) -> Tensor:
    """A matrix as the weight of a 1x1 convolution over `dims` dimensions; a bias as it is."""
    return tensor.reshape(*tensor.shape, *[1] * dims) if tensor.dim() == 2 else tensor


def matrix(tensor: Tensor) -> Tensor:
    """The inverse of `pixelwise`."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor


def swap_halves(tensor: Tensor) -> Tensor:
    """The halves of the columns of a matrix exchanged; a bias as it is."""
    return tensor.roll(tensor.shape[1] // 2, 1) if tensor.dim() == 2 else tensor


def _nothing() -> Tensor:
    raise AssertionError("a rule without tensors of theirs has nothing to read")


COPY = Rule("as it is", lambda theirs: theirs, lambda ours: [ours])
SWAP = Rule("[cos, sin] to [sin, cos]", swap_halves, lambda ours: [swap_halves(ours)])
ZERO = Rule("zero, they have no embedding", _nothing, lambda ours: [])
UNUSED = Rule("kept, nothing hears it", _nothing, lambda ours: [])


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


@dataclass(frozen=True)
class Mapped:
    """One line of a `Report`: our tensor, its shape, theirs, and what was done."""

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    how: str


@dataclass(frozen=True)
class Report:
    """What became what; prints as a table.

    Attributes:
        rows: One for each tensor of ours.
        left_out: Parts of their file that belong to other networks, and how many tensors each has.
    """

    rows: tuple[Mapped, ...]
    left_out: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        cells = [(row.ours, " x ".join(map(str, row.shape)), " + ".join(row.theirs) or "-", row.how) for row in self.rows]
        cells = [("ours", "shape", "theirs", "how"), *cells]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)

    def summary(self) -> str:
        """One line: how many tensors, what was done to how many, what was left out."""
        done = ", ".join(f"{number} {how}" for how, number in Counter(row.how for row in self.rows).most_common())
        left = ", ".join(f"{name} ({number})" for name, number in self.left_out.items())
        return f"{len(self.rows)} tensors: {done}" + (f"; left out: {left}" if left else "")


Layers = dict[str, tuple[tuple[str, ...], Rule]]  # our name of a layer: its names there, and how its tensors change


@dataclass(frozen=True)
class Style:
    """How another code base builds the inside of a block.

    Attributes:
        title: Its name, for messages.
        res: The layers of a `ResBlock`, our name to theirs.
        attention: The layers of an `AttentionBlock`.
        down: Their name of the convolution in a `Downsample`.
        eps, groups: Of its norms; None for any.
    """

    title: str
    res: dict[str, str]
    attention: Callable[[AttentionBlock], Layers]
    down: str = "conv"
    eps: float | None = None
    groups: int | None = None

    def layers(self, block: nn.Module) -> Layers:
        """The layers of any block; "" is the block itself."""
        if isinstance(block, ResBlock):
            return {ours: ((theirs,), COPY) for ours, theirs in self.res.items()}
        if isinstance(block, AttentionBlock):
            return self.attention(block)
        if isinstance(block, Downsample | Upsample):
            return {"conv": ((self.down if isinstance(block, Downsample) else "conv",), COPY)}
        return {"": (("",), COPY)}

    def rows(self, block: nn.Module, ours: str = "", theirs: str = "") -> Iterator[Row]:
        """Rows of a block that is called `ours` here and `theirs` there."""
        for layer, (names, rule) in self.layers(block).items():
            module = block.get_submodule(layer) if layer != "embedding_projection" else block.embedding_projection
            for kind, _ in module.named_parameters() if module is not None else ():
                yield Row(dotted(ours, layer, kind), tuple(dotted(theirs, name, kind) for name in names), rule)


def dotted(*names: str) -> str:
    """The names that are not empty, joined by dots."""
    return ".".join(name for name in names if name)


def openai_attention(block: AttentionBlock) -> Layers:
    """The layers of `AttentionBlock`, in its first order (QKVAttentionLegacy)."""
    return {"norm": (("norm",), COPY), "qkv": (("qkv",), regroup(block.num_heads)), "projection": (("proj_out",), linear(1))}


def openai_new_attention(block: AttentionBlock) -> Layers:
    """With `use_new_attention_order`, whose query, key and value are laid out as ours."""
    return {"norm": (("norm",), COPY), "qkv": (("qkv",), linear(1)), "projection": (("proj_out",), linear(1))}


def ldm_attention(block: AttentionBlock) -> Layers:
    """The layers of `AttnBlock`."""
    return {"norm": (("norm",), COPY), "qkv": (("q", "k", "v"), stack(2)), "projection": (("proj_out",), linear(2))}


def diffusers_attention(block: AttentionBlock) -> Layers:
    """The layers of `Attention`."""
    names = ("to_q", "to_k", "to_v")
    return {"norm": (("group_norm",), COPY), "qkv": (names, stack(0)), "projection": (("to_out.0",), COPY)}


RES_LAYERS = ("norm1", "conv1", "embedding_projection", "norm2", "conv2", "skip")
OPENAI_RES = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
LDM_RES = ("norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut")
DIFFUSERS_RES = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
OPENAI = Style(
    "the U-Net of latent-diffusion", dict(zip(RES_LAYERS, OPENAI_RES, strict=True)), openai_attention, "op", eps=1e-5, groups=32
)
LDM = Style(
    "the autoencoder of latent-diffusion", dict(zip(RES_LAYERS, LDM_RES, strict=True)), ldm_attention, eps=1e-6, groups=32
)
DIFFUSERS = Style("diffusers", dict(zip(RES_LAYERS, DIFFUSERS_RES, strict=True)), diffusers_attention)

OPENAI_ENDS = (
    *(("time_layers.0", "time_embed.0", SWAP), ("time_layers.1", "time_embed.2", COPY)),
    *(("down.0.0", "input_blocks.0.0", COPY), ("norm_out", "out.0", COPY), ("conv_out", "out.2", COPY)),
)
DIFFUSERS_UNET_ENDS = (
    *(("time_layers.0", "time_embedding.linear_1", SWAP), ("time_layers.1", "time_embedding.linear_2", COPY)),
    *(("down.0.0", "conv_in", COPY), ("norm_out", "conv_norm_out", COPY), ("conv_out", "conv_out", COPY)),
)
LDM_ENDS = tuple((name, name, COPY) for name in ("conv_in", "norm_out", "conv_out"))
DIFFUSERS_ENDS = (("conv_in", "conv_in", COPY), ("norm_out", "conv_norm_out", COPY), ("conv_out", "conv_out", COPY))
DENSE = tuple((f"embedding.layers.{index}", f"temb.dense.{index}", COPY) for index in range(2))


@dataclass(frozen=True)
class Place:
    """Where a block stands: its name, side ("down", "mid" or "up"), level and index, counted in the order of application."""

    name: str
    block: nn.Module
    side: str
    level: int
    index: int


def places(network: nn.Module) -> Iterator[Place]:
    """The blocks of an `Encoder`, `Decoder` or `UNet` between its ends."""
    for side, blocks in sides(network).items():
        level, index = 0, -1
        for name, block in blocks:
            index += isinstance(block, ResBlock)
            yield Place(name, block, side, level, index)
            if isinstance(block, Downsample | Upsample):
                level, index = level + 1, -1


def sides(network: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """The named blocks of a network on its way down, in its middle and on its way up."""
    if isinstance(network, UNet):
        down = [(f"down.{i}.{j}", block) for i, blocks in enumerate(network.down) if i for j, block in enumerate(blocks)]
        up = [(f"up.{i}.{j}", block) for i, blocks in enumerate(network.up) for j, block in enumerate(blocks)]
        return {"down": down, "mid": [(f"middle.{j}", block) for j, block in enumerate(network.middle)], "up": up}
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(network.blocks)]
    encodes = isinstance(network, Encoder)
    size = 3 if isinstance(network.blocks[-2 if encodes else 1], AttentionBlock) else 2
    return {"down": blocks[:-size], "mid": blocks[-size:]} if encodes else {"mid": blocks[:size], "up": blocks[size:]}


def openai_name(place: Place, top: int) -> str:
    """Name of a place in the U-Net of latent-diffusion."""
    side, _, numbers = place.name.partition(".")
    return f"{ {'down': 'input_blocks', 'middle': 'middle_block', 'up': 'output_blocks'}[side] }.{numbers}"


def ldm_name(place: Place, top: int) -> str:
    """Name of a place in the autoencoder of latent-diffusion, which counts levels from the highest resolution down to `top`."""
    kind = type(place.block)
    if place.side == "mid":
        return "mid.attn_1" if kind is AttentionBlock else f"mid.block_{place.index + 1}"
    level = top - place.level if place.side == "up" else place.level
    if kind in (Downsample, Upsample):
        return f"{place.side}.{level}.{kind.__name__.lower()}"
    return f"{place.side}.{level}.{'attn' if kind is AttentionBlock else 'block'}.{place.index}"


def diffusers_name(place: Place, top: int) -> str:
    """Name of a place in any network of diffusers."""
    kinds = {ResBlock: "resnets", AttentionBlock: "attentions", Downsample: "downsamplers", Upsample: "upsamplers"}
    side = "mid_block" if place.side == "mid" else f"{place.side}_blocks.{place.level}"
    index = 0 if isinstance(place.block, Downsample | Upsample) else place.index
    return f"{side}.{kinds[type(place.block)]}.{index}"


def table(module: nn.Module, style: Style) -> list[Row]:
    """Rows of every parameter of a block or network, under the names of `style`."""
    if isinstance(module, ResBlock | AttentionBlock):
        return list(style.rows(module))
    unet = isinstance(module, UNet)
    if style.attention is diffusers_attention:
        name, ends = diffusers_name, DIFFUSERS_UNET_ENDS if unet else DIFFUSERS_ENDS
    else:
        name, ends = (openai_name, OPENAI_ENDS) if unet else (ldm_name, LDM_ENDS)
    if not unet and module.embedding.layers is not None:
        ends += DENSE
    found = list(places(module))
    top = max(place.level for place in found)
    rows = [row for place in found for row in style.rows(place.block, place.name, name(place, top))]
    kinds = ("weight", "bias")
    return rows + [Row(f"{ours}.{kind}", (f"{theirs}.{kind}",), rule) for ours, theirs, rule in ends for kind in kinds]


def hears_embedding(row: Row) -> bool:
    """Whether a row belongs to what an `Encoder` or `Decoder` does with beta."""
    return "embedding_projection." in row.ours or row.ours.startswith("embedding.layers.")


def deaf(row: Row) -> Row:
    """A row of `hears_embedding` where they have no embedding: its projection is zero, and what comes before it idle."""
    return replace(row, theirs=(), rule=ZERO if "embedding_projection." in row.ours else UNUSED)


def load_ldm(
    module: nn.Module,
    state_dict: State,
    *,
    config: Mapping | None = None,
    prefix: str | None = None,
    ema: bool = False,
    without_embedding: Literal["zero"] | None = None,
    latent: Latent = "published",
) -> Report:
    """Fill a module with weights of latent-diffusion or guided-diffusion.

    Args:
        module: `UNet` (their `UNetModel`), `Encoder`, `Decoder`, or a `ResBlock` or `AttentionBlock` alone, which is that of the
            U-Net where its eps is 1e-5, else that of the autoencoder.
        state_dict: Of the network alone or of a whole checkpoint, of which the part that fits is taken.
        config: The `params` of the network in their YAML file. Without it the U-Net is taken to have our heads and the first
            order of attention, both of which no state dict shows.
        prefix: Where the part begins, such as "first_stage_model.encoder."; found where only one fits.
        ema: Take the averaged weights, "model_ema.".
        without_embedding: Their public autoencoder hears no embedding; "zero" sets our projections to zero, so that the
            outputs are theirs at every beta.
        latent: What a latent is. "published": what their `encode` gives, before post_quant_conv. "decoder": what their decoder
            reads, after it. See the note.

    Returns:
        What became what.

    Note: quant_conv folds into the encoder's last convolution. Of an encoder that returns mean and log variance, a module
    with half the channels takes the mean, the first half. post_quant_conv folds into the decoder's first convolution only where
    it has no bias, because that convolution pads with zeros, and the bias would be missing at the border. With
    latent="decoder" it folds into the encoder instead, which is exact, and the decoder needs none: use it for both.

    Raises:
        ValueError: Keys are missing, unexpected or of another shape, or the functions differ; the module is unchanged.
    """
    style = ldm_style(module)
    if config is not None and config.get("use_new_attention_order"):
        style = replace(style, attention=openai_new_attention)
    refuse(module, style.title, [*differences(module, style), *ldm_differences(module, config or {})])
    state_dict = averaged(state_dict) if ema else state_dict
    part = select(type(module), state_dict, LDM_ANCHORS, style.title, prefix)
    return fill(module, table(module, style), part, without_embedding, latent)


def load_diffusers(
    module: nn.Module,
    state_dict: State,
    *,
    config: Mapping | None = None,
    prefix: str | None = None,
    without_embedding: Literal["zero"] | None = None,
    latent: Latent = "published",
) -> Report:
    """Fill a module with weights of diffusers: `UNet2DModel`, `AutoencoderKL`, or a `ResnetBlock2D` or `Attention` alone.

    Args:
        module: `UNet`, `Encoder`, `Decoder`, `ResBlock` or `AttentionBlock`.
        state_dict: Of the network alone or of the whole `AutoencoderKL`; the names of attention that older files carry will do.
        config: Their config.json, of a network. Without it everything that no state dict shows is taken to be as in
            `diffusers_config(module)`.
        prefix, without_embedding, latent: See `load_ldm`, also for what is returned and raised.
    """
    refuse(module, "that of diffusers", [*differences(module, DIFFUSERS), *diffusers_differences(module, config)])
    part = select(type(module), state_dict, DIFFUSERS_ANCHORS, "diffusers", prefix)
    part.rename_attention()
    rows = table(module, DIFFUSERS)
    if config is not None and not config.get("flip_sin_to_cos", True):
        rows = [replace(row, rule=COPY) if row.rule is SWAP else row for row in rows]
    return fill(module, rows, part, without_embedding, latent)


def to_ldm(module: nn.Module, *, beta: float | None = None) -> dict[str, Tensor]:
    """The weights of a module under the names of latent-diffusion, the inverse of `load_ldm`.

    An encoder or decoder keeps its projections of the embedding, as `temb_proj`, which the public autoencoder lacks, unless they
    are all zero or `beta` is given: then it is frozen there (`freeze`), and an ordinary autoencoder.

    Raises:
        ValueError: latent-diffusion has no such function, which has 32 groups in every norm.
    """
    style = ldm_style(module)
    return export(module, style, beta)[0]


def to_diffusers(module: nn.Module, *, beta: float | None = None) -> dict[str, Tensor]:
    """The weights of a module under the names of diffusers, the inverse of `load_diffusers`.

    A `UNet` is the `UNet2DModel` of `diffusers_config(module)`. An encoder or decoder is that of an `AutoencoderKL`, which
    hears no beta: give the one at which to `freeze` it.

    Raises:
        ValueError: diffusers has no such function.
    """
    return export(module, DIFFUSERS, beta)[0]


def export(module: nn.Module, style: Style, beta: float | None) -> tuple[dict[str, Tensor], Report]:
    """The weights of a module under the names of `style`, and what became what."""
    module = module if beta is None else freeze(module, beta)
    refuse(module, style.title, [*differences(module, style), *limits(module, style)])
    rows, ours = table(module, style), module.state_dict()
    if isinstance(module, Encoder | Decoder):
        projections = [ours[row.ours] for row in rows if "embedding_projection." in row.ours]
        if not any(tensor.any() for tensor in projections):
            rows = [deaf(row) if hears_embedding(row) else row for row in rows]
        elif style is DIFFUSERS:
            raise ValueError(
                f"no autoencoder of diffusers hears beta: name the one to freeze the {type(module).__name__} at, beta="
            )
    state = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for row in rows
        for name, tensor in zip(row.theirs, row.rule.write(ours[row.ours]), strict=True)
    }
    return state, Report(tuple(Mapped(row.ours, tuple(ours[row.ours].shape), row.theirs, row.rule.how) for row in rows))


@torch.no_grad()
def freeze(network: nn.Module, beta: float) -> nn.Module:
    """A copy of an `Encoder` or `Decoder` that gives at every beta what the original gives at one.

    What a block adds for beta, after its first convolution, becomes part of the bias of that convolution; the projections are
    zero.
    """
    if not isinstance(network, Encoder | Decoder):
        raise ValueError(f"beta freezes an Encoder or Decoder, got a {type(network).__name__}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta:g}")
    network = copy.deepcopy(network)
    weight = network.conv_in.weight
    embedding = network.embedding(torch.tensor([beta], dtype=torch.float32, device=weight.device)).to(weight.dtype)
    for block in network.blocks:
        if isinstance(block, ResBlock):
            block.conv1.bias += block.shift(embedding)[0]
            for parameter in block.embedding_projection.parameters():
                parameter.zero_()
    return network


@torch.no_grad()
def freeze_vae(vae: MultiBetaVAE, beta: float) -> tuple[Encoder, Decoder]:
    """A `MultiBetaVAE` at one beta as an ordinary autoencoder: its encoder returns mean and log variance of q(z|x).

    The mean carries the factor 1 - beta^collapse_exponent, the log variance is 2 log sigma(beta) everywhere; both live in the
    last convolution.
    """
    encoder, decoder = freeze(vae.encoder, beta), freeze(vae.decoder, beta)
    exponent, old = vae.config.collapse_exponent, encoder.conv_out
    scale = 1.0 if exponent is None else 1 - beta**exponent
    new = type(old)(old.in_channels, 2 * old.out_channels, old.kernel_size, padding=old.padding).to(old.weight)
    log_variance = 2 * vae.sigma(torch.tensor([float(beta)], device=old.weight.device))[0].log()
    new.weight.copy_(torch.cat([scale * old.weight, torch.zeros_like(old.weight)]))
    new.bias.copy_(torch.cat([scale * old.bias, log_variance.expand(old.out_channels).to(old.bias)]))
    encoder.conv_out = new
    return encoder, decoder


@dataclass
class Part:
    """The part of a state dict that belongs to one network.

    Attributes:
        tensors: Name inside the part to tensor.
        names: Name inside the part to the names in the whole.
        prefix: Where it begins.
        whole: The state dict it is from.
        how: Name inside the part to what was done to it before its rule.
    """

    tensors: dict[str, Tensor]
    names: dict[str, tuple[str, ...]]
    prefix: str
    whole: State
    how: dict[str, str] = field(default_factory=dict)

    @property
    def discrete(self) -> bool:
        """Whether the autoencoder has a codebook, whose encoder returns no log variance."""
        return self.outer is not None and any(name.startswith(f"{self.outer}quantize.") for name in self.whole)

    @property
    def outer(self) -> str | None:
        """Prefix of the autoencoder that this encoder or decoder is part of; None where it stands alone."""
        outer, _, own = self.prefix.removesuffix(".").rpartition(".")
        return None if own not in ("encoder", "decoder") else f"{outer}." if outer else ""

    def neighbour(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Weight (a matrix) and bias of a 1x1 convolution of the autoencoder, in float64; None where there is none."""
        if self.outer is None or f"{self.outer}{name}.weight" not in self.whole:
            return None
        return tuple(matrix(self.whole[f"{self.outer}{name}.{kind}"]).double() for kind in ("weight", "bias"))

    def put(self, names: Sequence[str], tensors: Sequence[Tensor], how: str, neighbour: str = "") -> None:
        """Replace tensors of the part, noting how, and the layer of the autoencoder that went in."""
        for name, tensor in zip(names, tensors, strict=True):
            self.tensors[name] = tensor.to(torch.promote_types(self.tensors[name].dtype, torch.float32))
            self.names[name] += (f"{self.outer}{neighbour}.{name.split('.')[1]}",) if neighbour else ()
            self.how[name] = ", ".join(filter(None, (self.how.get(name), how)))

    def rename_attention(self) -> None:
        """The names of attention that diffusers had at first, which published files still carry, as those of today."""
        today = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        for name in list(self.tensors):
            *path, layer, kind = ["", *name.split(".")]
            if layer in today:
                new = dotted(*path, today[layer], kind)
                self.tensors[new], self.names[new] = self.tensors.pop(name), self.names.pop(name)

    def left_out(self) -> dict[str, int]:
        """Parts of the whole that were not used, with their numbers of tensors."""
        used = set(itertools.chain.from_iterable(self.names.values()))
        outer = self.outer or ""
        inside = [(outer if name.startswith(outer) else "", name) for name in self.whole if name not in used]
        return dict(Counter(start + name.removeprefix(start).split(".")[0] for start, name in inside))


LDM_ANCHORS: dict[type, str] = {
    UNet: "input_blocks.0.0.weight",
    Encoder: "down.0.block.0.norm1.weight",
    Decoder: "up.0.block.0.norm1.weight",
}
DIFFUSERS_ANCHORS: dict[type, str] = {
    UNet: "time_embedding.linear_1.weight",
    Encoder: "down_blocks.0.resnets.0.norm1.weight",
    Decoder: "up_blocks.0.resnets.0.norm1.weight",
}


def select(kind: type[nn.Module], state: State, anchors: Mapping[type, str], title: str, prefix: str | None) -> Part:
    """The part of `state` that fits a module: that of a network is found by a name that each has, a block is taken as it is."""
    anchor = anchors.get(kind)
    if prefix is None:
        prefixes = begins(state, anchor) if anchor else [""]
        if len(prefixes) != 1:
            starts = ", ".join(sorted({name.split(".")[0] for name in state})[:8])
            found = f"{len(prefixes)} of them, at {', '.join(map(repr, prefixes))}: choose by prefix=" if prefixes else "none"
            dense = any(name.endswith("temb.dense.0.weight") for name in state)
            hint = "; temb.dense belongs to its class Model, whose embedding has other frequencies" if dense else ""
            raise ValueError(f"wanted one {kind.__name__} as {title} names it, found {found}; names begin with {starts}{hint}")
        (prefix,) = prefixes
    names = {name.removeprefix(prefix): (name,) for name in state if name.startswith(prefix)}
    return Part({name: state[whole] for name, (whole,) in names.items()}, names, prefix, state)


def begins(state: State, anchor: str) -> list[str]:
    """Prefixes at which a network begins that has a tensor called `anchor`."""
    return [name.removesuffix(anchor) for name in state if name == anchor or name.endswith(f".{anchor}")]


def averaged(state: State) -> dict[str, Tensor]:
    """The averaged weights of a latent-diffusion checkpoint, under the names of those they average."""
    names = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in state if name.startswith("model.")}
    missing = [ema for ema in names.values() if ema not in state]
    if missing or not names:
        what = f"lacks {shorten(missing)}" if missing else "has no tensor under model."
        raise ValueError(f"averaged weights were asked for, the state dict {what}: leave ema=False")
    return {name: state[ema] for name, ema in names.items()}


def fill(module: nn.Module, rows: list[Row], part: Part, without_embedding: str | None, latent: Latent) -> Report:
    """Give `module` the tensors of `part`, after comparing every name and shape."""
    if without_embedding not in (None, "zero"):
        raise ValueError(f'without_embedding must be None or "zero", got {without_embedding!r}')
    if latent not in ("published", "decoder"):
        raise ValueError(f'latent must be "published" or "decoder", got {latent!r}')
    if without_embedding:
        rows = [deaf(row) if hears_embedding(row) else row for row in rows]
    heard = [row for row in rows if "embedding_projection." in row.ours and row.theirs]
    if heard and not isinstance(module, UNet) and not any(name in part.tensors for row in heard for name in row.theirs):
        raise ValueError(
            f"the weights have no projection of an embedding ({heard[0].theirs[0]}), which {len(heard) // 2} blocks of the "
            f'{type(module).__name__} have: without_embedding="zero" sets them to zero; outputs do not depend on it then'
        )
    if isinstance(module, Encoder):
        fold_into_encoder(module, part, latent)
    elif isinstance(module, Decoder):
        fold_into_decoder(part, latent)
    ours = module.state_dict()
    compare(rows, ours, part, type(module).__name__)
    assert {row.ours for row in rows} == ours.keys(), "the table names every tensor of ours"
    values, mapped = dict(ours), []
    for row in rows:
        if row.theirs:
            values[row.ours] = row.rule.read(*[part.tensors[name] for name in row.theirs])
        elif row.rule is ZERO:
            values[row.ours] = torch.zeros_like(ours[row.ours])
        names = tuple(itertools.chain.from_iterable(part.names[name] for name in row.theirs))
        how = [part.how[name] for name in row.theirs if name in part.how]
        mapped.append(Mapped(row.ours, tuple(ours[row.ours].shape), names, ", ".join(how) or row.rule.how))
    module.load_state_dict(values)
    return Report(tuple(mapped), part.left_out())


def compare(rows: list[Row], ours: State, part: Part, title: str) -> None:
    """`ValueError` unless the rows use every tensor of the part, and each has the shape that is needed."""
    wanted = {
        name: tuple(tensor.shape)
        for row in rows
        for name, tensor in zip(row.theirs, row.rule.write(ours[row.ours].to("meta")), strict=True)
    }
    found = {name: tuple(tensor.shape) for name, tensor in part.tensors.items()}
    other = [name for name in wanted if found.get(name, wanted[name]) != wanted[name]]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": [f"{name} {found[name]} instead of {wanted[name]}" for name in other],
    }
    described = [f"{len(names)} {problem}: {shorten(names)}" for problem, names in problems.items() if names]
    if described:
        where = f" under {part.prefix}" if part.prefix else ""
        raise ValueError(f"the weights{where} do not fit the {title}; " + "; ".join(described))


def fold_into_encoder(encoder: Encoder, part: Part, latent: Latent) -> None:
    """quant_conv, the choice of the mean, and with latent="decoder" post_quant_conv, as the encoder's last convolution."""
    if not all(name in part.tensors for name in CONV_OUT):
        return
    quant, post_quant = part.neighbour("quant_conv"), part.neighbour("post_quant_conv") if latent == "decoder" else None
    channels = encoder.conv_out.out_channels
    if post_quant and channels == 2 * len(post_quant[0]):
        raise ValueError(
            f'latent="decoder" needs an encoder of {len(post_quant[0])} channels, the mean alone, got {channels}: a log variance '
            "of each channel does not pass post_quant_conv, which mixes channels"
        )
    mean_channels = post_quant[0].shape[1] if post_quant else channels
    if quant:
        part.put(CONV_OUT, after(part.tensors, *quant), "with quant_conv", "quant_conv")
    if len(part.tensors[CONV_OUT[0]]) == 2 * mean_channels and not part.discrete:
        part.put(CONV_OUT, [part.tensors[name][:mean_channels] for name in CONV_OUT], "mean, the first half")
    if post_quant:
        part.put(CONV_OUT, after(part.tensors, *post_quant), "with post_quant_conv", "post_quant_conv")


def after(tensors: State, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 1x1 convolution applied to what conv_out gives, as one convolution."""
    inner, offset = (tensors[name].double() for name in CONV_OUT)
    return torch.einsum("om,mihw->oihw", weight, inner), weight @ offset + bias


def fold_into_decoder(part: Part, latent: Latent) -> None:
    """post_quant_conv as part of the decoder's first convolution, where that is exact."""
    post_quant = part.neighbour("post_quant_conv")
    if latent == "decoder" or not post_quant or CONV_IN[0] not in part.tensors:
        return
    weight, bias = post_quant
    if bias.any():
        raise ValueError(
            "post_quant_conv has a bias, which no weight of the decoder holds: its first convolution pads with zeros after it. "
            'latent="decoder", for encoder and decoder alike, folds post_quant_conv into the encoder, which is exact; the '
            "latents are then what the decoder reads"
        )
    folded = torch.einsum("omhw,mi->oihw", part.tensors[CONV_IN[0]].double(), weight)
    part.put(CONV_IN[:1], [folded], "with post_quant_conv", "post_quant_conv")
    part.names[CONV_IN[1]] += (f"{part.outer}post_quant_conv.bias",)


def ldm_style(module: nn.Module) -> Style:
    """Which of its two kinds of blocks latent-diffusion has for a module."""
    if isinstance(module, UNet):
        return OPENAI
    if isinstance(module, Encoder | Decoder):
        return LDM
    if isinstance(module, ResBlock | AttentionBlock):
        return OPENAI if any(norm.eps == OPENAI.eps for norm in norms(module)) else LDM
    raise ValueError(f"weights can go into a UNet, Encoder, Decoder, ResBlock or AttentionBlock, not a {type(module).__name__}")


def norms(module: nn.Module) -> list[GroupNormAct]:
    """The norms anywhere in a module."""
    return [norm for norm in module.modules() if isinstance(norm, GroupNormAct)]


def attention_blocks(module: nn.Module) -> list[AttentionBlock]:
    """The attention anywhere in a module."""
    return [block for block in module.modules() if isinstance(block, AttentionBlock)]


def refuse(module: nn.Module, title: str, wrong: Sequence[str]) -> None:
    """`ValueError` with the differences between a module and its counterpart, where there are some."""
    if wrong:
        raise ValueError(f"the {type(module).__name__} and {title} are different functions: {'; '.join(wrong)}")


def differences(module: nn.Module, style: Style) -> Iterator[str]:
    """What of a module no weight could bring into `style`."""
    ldm_style(module)
    activations = {norm.activation for norm in norms(module)} - {"none", "silu"}
    if activations:
        yield f"activation {', '.join(activations)}, theirs is silu"
    for name, theirs in (("eps", style.eps), ("num_groups", style.groups)):
        found = {getattr(norm, name) for norm in norms(module)} - {theirs}
        if theirs is not None and found:
            yield f"{name} {', '.join(map(str, sorted(found)))}, theirs is {theirs}"
    heads = {block.num_heads for block in attention_blocks(module)} - {1}
    if heads and style.attention is ldm_attention:
        yield f"{', '.join(map(str, sorted(heads)))} heads, theirs is 1"
    if style.attention is openai_attention and isinstance(module, ResBlock) and module.embedding_projection is None:
        yield "no projection of the embedding, theirs has one"


LDM_FIXED = {
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "conv_resample": True,
    "resamp_with_conv": True,
    "use_spatial_transformer": False,
    "use_linear_attn": False,
    "num_classes": None,
    "n_embed": None,
    "dims": 2,
    "tanh_out": False,
    "give_pre_end": False,
}
UNET_FIXED = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}


def fixed_differences(config: Mapping, fixed: Mapping) -> Iterator[str]:
    """Fields of `config` that must have one value and have another."""
    for name, value in fixed.items():
        given = config.get(name, value)
        if (given or None) != (value or None) and (name, given) != ("act_fn", "swish"):
            yield f"{name} {given!r}, here it is {value!r}"


def head_differences(module: nn.Module, num_heads: Callable[[int], int]) -> Iterator[str]:
    """Attention blocks with other heads than `num_heads` gives for their channels."""
    for block in attention_blocks(module):
        channels = block.projection.in_features
        if block.num_heads != num_heads(channels):
            yield f"{num_heads(channels)} heads at {channels} channels, here there are {block.num_heads}"
            return


def ldm_differences(module: nn.Module, config: Mapping) -> Iterator[str]:
    """What differs between a module and the `params` of its YAML file."""
    yield from fixed_differences(config, LDM_FIXED)
    if config.get("attn_type", "vanilla") not in ("vanilla", "none"):
        yield f"attn_type {config['attn_type']!r}, here it is 'vanilla' or 'none'"
    width, number = config.get("num_head_channels", -1), config.get("num_heads", -1)
    if max(width, number) > 0:
        yield from head_differences(module, lambda channels: channels // width if width > 0 else number)


def diffusers_differences(module: nn.Module, config: Mapping | None) -> Iterator[str]:
    """What differs between a module and a config.json, where one is given."""
    if config is None or not isinstance(module, UNet | Encoder | Decoder):
        return
    unet = isinstance(module, UNet)
    named, wanted = config.get("_class_name"), "UNet2DModel" if unet else "AutoencoderKL"
    if named is not None and named != wanted:
        yield f"_class_name {named!r}, here it is {wanted!r}"
    yield from fixed_differences(config, UNET_FIXED if unet else {"act_fn": "silu"})
    if unet and config.get("time_embedding_dim") not in (None, 4 * module.base_channels):
        yield f"time_embedding_dim {config['time_embedding_dim']}, here it is {4 * module.base_channels}"
    groups = config.get("norm_num_groups", 32)
    found = {norm.num_groups for norm in norms(module)}
    if found != {groups} or (config.get("attn_norm_num_groups") or groups) != groups:
        yield f"norm_num_groups {groups}, attn_norm_num_groups {config.get('attn_norm_num_groups')}, here {sorted(found)}"
    width = config.get("attention_head_dim", 8)
    if unet:
        yield from head_differences(module, lambda channels: channels // (width or channels))


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

    def arguments(self, kind: type[nn.Module], *, resolution: int | None, num_groups: int, **heads) -> dict:
        """Arguments of `kind` for a network of this shape; without a resolution, one whose lowest level is 8 (32) pixels."""
        if any(width % self.base_channels for width in self.widths):
            raise ValueError(
                f"channels must be multiples of the first {self.base_channels}, got {', '.join(map(str, self.widths))}"
            )
        resolution = resolution or (8 if kind is UNet else 32) * 2 ** (len(self.widths) - 1)
        inside, outside = (self.in_channels, self.out_channels) if kind is not Decoder else (self.out_channels, self.in_channels)
        ends = ("in_channels", "out_channels") if kind is UNet else ("image_channels", "latent_channels")
        return {
            **dict(zip(ends, (inside, outside), strict=True)),
            "resolution": resolution,
            "base_channels": self.base_channels,
            "channel_multipliers": tuple(width // self.base_channels for width in self.widths),
            "num_res_blocks": self.num_res_blocks,
            "attention_resolutions": tuple(resolution // 2**level for level, has in enumerate(self.attention) if has),
            **({} if kind is UNet else {"mid_attention": self.mid_attention}),
            "num_groups": num_groups,
            **heads,
        }


def shape_of(network: nn.Module) -> Shape:
    """The shape of an `Encoder`, `Decoder` or `UNet`."""
    found = list(places(network))
    side = "up" if isinstance(network, Decoder) else "down"
    levels = range(max(place.level for place in found) + 1)
    on_level = [[place.block for place in found if place.side == side and place.level == level] for level in levels]
    on_level = on_level[::-1] if side == "up" else on_level
    res = [[block for block in blocks if isinstance(block, ResBlock)] for blocks in on_level]
    widths = tuple(blocks[0].conv2.out_channels for blocks in res)
    first = network.down[0][0] if isinstance(network, UNet) else network.conv_in
    return Shape(
        first.in_channels,
        network.conv_out.out_channels,
        math.gcd(*widths) if side == "up" else first.out_channels,
        widths,
        tuple(any(isinstance(block, AttentionBlock) for block in blocks) for blocks in on_level),
        len(res[0]) - (side == "up"),
        any(place.side == "mid" and isinstance(place.block, AttentionBlock) for place in found),
    )


def counted(state: State, name: str) -> int:
    """How many tensors there are called `name`, with 0, 1, 2, ... in the place of {}."""
    return next(index for index in itertools.count() if name.format(index) not in state)


def ldm_shape(state: State, kind: type[nn.Module]) -> Shape:
    """The shape of a network of latent-diffusion, from its part of a state dict."""
    if kind is UNet:
        return openai_shape(state)
    side = "up" if kind is Decoder else "down"
    levels = range(counted(state, side + ".{}.block.0.conv1.weight"))
    widths = tuple(len(state[f"{side}.{level}.block.0.conv1.weight"]) for level in levels)
    return Shape(
        state["conv_in.weight"].shape[1],
        len(state["conv_out.weight"]),
        math.gcd(*widths) if kind is Decoder else len(state["conv_in.weight"]),
        widths,
        tuple(f"{side}.{level}.attn.0.norm.weight" in state for level in levels),
        counted(state, side + ".0.block.{}.conv1.weight") - (kind is Decoder),
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


def config_shape(config: Mapping, kind: type[nn.Module]) -> Shape:
    """The shape of a network of diffusers, from the config.json it is part of."""
    widths, latent = tuple(config["block_out_channels"]), config.get("latent_channels", 4)
    ends = config.get("in_channels", 3), config.get("out_channels", 3)
    return Shape(
        latent if kind is Decoder else ends[0],
        2 * latent if kind is Encoder else ends[1],
        math.gcd(*widths) if kind is Decoder else widths[0],
        widths,
        tuple(name.startswith("Attn") for name in config["down_block_types"]),
        config.get("layers_per_block", 2 if kind is UNet else 1),
        config.get("mid_block_add_attention", True),
    )


def diffusers_config(*networks: nn.Module) -> dict:
    """The config.json of the model of diffusers that is the same function.

    Args:
        networks: A `UNet`, for `UNet2DModel`; or an `Encoder`, which returns mean and log variance, and its `Decoder`, for
            `AutoencoderKL`.

    Raises:
        ValueError: There is none.
    """
    for network in networks:
        refuse(network, "that of diffusers", [*differences(network, DIFFUSERS), *limits(network, DIFFUSERS)])
    shapes = [shape_of(network) for network in networks]
    first, last, kinds = shapes[0], shapes[-1], [type(network) for network in networks]
    shared = {
        "in_channels": first.in_channels,
        "out_channels": last.out_channels,
        "block_out_channels": list(first.widths),
        "layers_per_block": first.num_res_blocks,
        "norm_num_groups": norms(networks[0])[0].num_groups,
    }
    names = ["AttnDown" if has else "Down" for has in first.attention]
    ups = [name.replace("Down", "Up") for name in reversed(names)]
    if kinds == [UNet]:
        return {
            "_class_name": "UNet2DModel",
            **shared,
            "down_block_types": [f"{name}Block2D" for name in names],
            "up_block_types": [f"{name}Block2D" for name in ups],
            "attention_head_dim": head_widths(networks[0])[0],
            "flip_sin_to_cos": True,
            **UNET_FIXED,
        }
    if kinds != [Encoder, Decoder]:
        raise ValueError("a config of diffusers is that of one UNet, or of an Encoder and its Decoder")
    check_pair(*networks)
    return {
        "_class_name": "AutoencoderKL",
        **shared,
        "latent_channels": last.in_channels,
        "down_block_types": [f"{name}EncoderBlock2D" for name in names],
        "up_block_types": [f"{name}DecoderBlock2D" for name in ups],
        "mid_block_add_attention": first.mid_attention,
        "act_fn": "silu",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.0,
    }


def check_pair(encoder: Encoder, decoder: Decoder) -> None:
    """`ValueError` unless two networks are an AutoencoderKL: mirror images, the encoder with mean and log variance."""
    first, last = shape_of(encoder), shape_of(decoder)
    ends = {"in_channels": 0, "out_channels": 0, "base_channels": 0}
    if replace(first, **ends) != replace(last, **ends) or first.in_channels != last.out_channels:
        raise ValueError(f"encoder and decoder must mirror each other, got {first} and {last}")
    if first.out_channels != 2 * last.in_channels:
        raise ValueError(
            f"an AutoencoderKL encodes to mean and log variance, {2 * last.in_channels} channels for latents of "
            f"{last.in_channels}, got {first.out_channels}; freeze_vae makes such an encoder of a MultiBetaVAE"
        )


def head_widths(unet: UNet) -> list[int | None]:
    """`attention_head_dim` that give a U-Net its heads: one where diffusers can; None is a single head."""
    blocks = attention_blocks(unet)
    if all(block.num_heads == 1 for block in blocks):
        return [None]
    return sorted({block.projection.in_features // block.num_heads for block in blocks})


def limits(network: nn.Module, style: Style) -> Iterator[str]:
    """What of a network could be built here and not there, though each of its blocks could."""
    if not isinstance(network, UNet | Encoder | Decoder):
        return
    unet, shape = isinstance(network, UNet), shape_of(network)
    encodes = isinstance(network, Encoder) and style is DIFFUSERS
    if (unet or encodes) and shape.widths[0] != shape.base_channels:
        yield f"{shape.widths[0]} channels at the first level, theirs has the {shape.base_channels} of the first convolution"
    if style is not DIFFUSERS:
        return
    groups = sorted({norm.num_groups for norm in norms(network)})
    if len(groups) > 1:
        yield f"norms of {', '.join(map(str, groups))} groups, theirs have all the same"
    if unet and len(head_widths(network)) > 1:
        yield f"heads of {', '.join(map(str, head_widths(network)))} channels, theirs have all the same"


@dataclass(frozen=True)
class Networks:
    """Networks on their way from file to file: "unet", or "encoder" and "decoder", or all three.

    Attributes:
        modules: By name.
        arguments: Those that each was built with.
        reports: What became what, by name; empty for networks that were ours.
    """

    modules: dict[str, nn.Module]
    arguments: dict[str, dict] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)


def read_networks(
    source: str | Path,
    *,
    parts: Sequence[str] = ("unet", "vae"),
    head_channels: int | None = None,
    num_heads: int | None = None,
    resolution: int | None = None,
    latent: Latent = "published",
    mean_only: bool = False,
    ema: bool = False,
) -> Networks:
    """Networks of diffusers or latent-diffusion as ours, built from what their files show; outputs do not depend on beta.

    Args:
        source: Folder of diffusers (config.json and weights, or subfolders unet and vae), weight file of latent-diffusion, or
            folder of `write_networks`. Files are read as tensors, never as code.
        parts: "unet", "vae" or both: those of them that are there.
        head_channels, num_heads: Of the attention in a U-Net of latent-diffusion, whose weights do not show it: one of them.
        resolution: Of the input, in pixels, which weights do not show and outputs do not depend on: it names the levels with
            attention. By default that of the config, or one whose lowest level is 8 pixels, of an autoencoder 32.
        latent: See `load_ldm`.
        mean_only: The encoder returns the mean, as that of a `MultiBetaVAE`; by default mean and log variance where it has both.
        ema: See `load_ldm`.

    Raises:
        FileNotFoundError, ValueError: What is missing or does not fit, and what to do.
    """
    source = Path(source)
    if source.is_dir() and (networks := load_networks(source)) is not None:
        return Networks({name: module for name, module in networks.items() if part_of(name) in parts})
    if source.is_dir():
        found = find_diffusers(source, parts)
    else:
        found = find_ldm(read_weights(source), parts, ema, head_channels=head_channels, num_heads=num_heads)
    result = Networks({})
    for network in found:
        kind, shape = KINDS[network.name], network.shape
        given: dict = {"prefix": network.part.prefix}
        if kind is not UNet:
            shape = latent_shape(shape, network.part, kind, latent, mean_only or latent == "decoder")
            given |= {"without_embedding": "zero", "latent": latent}
        arguments = shape.arguments(kind, resolution=resolution or network.resolution, **network.arguments)
        module = kind(**arguments)
        result.reports[network.name] = network.load(module, network.part.whole, **given)
        result.modules[network.name], result.arguments[network.name] = module, arguments
    if not result.modules:
        raise ValueError(f"{source} holds no {' or '.join(parts)} as latent-diffusion or a folder of diffusers names it")
    return result


@dataclass(frozen=True)
class Found:
    """A network in a file of another code base: its part, its shape, how it is loaded, and what the shape does not show."""

    name: str
    part: Part
    shape: Shape
    load: Callable[..., Report]
    arguments: dict
    resolution: int | None = None


def part_of(name: str) -> str:
    """The part, "unet" or "vae", that a network belongs to."""
    return "unet" if name == "unet" else "vae"


def find_diffusers(source: Path, parts: Sequence[str]) -> Iterator[Found]:
    """The networks in a folder of diffusers, or in its subfolders called as the parts."""
    for folder in (source, *(source / part for part in parts)):
        if not (folder / "config.json").is_file():
            continue
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = config.get("_class_name")
        if model not in ("UNet2DModel", "AutoencoderKL"):
            raise ValueError(f"{folder} holds a {model}, what can be read are UNet2DModel and AutoencoderKL")
        names = ["unet"] if model == "UNet2DModel" else ["encoder", "decoder"]
        if part_of(names[0]) not in parts:
            continue
        files = [folder / f"{WEIGHTS}.{suffix}" for suffix in ("safetensors", "bin")]
        state = read_weights(next((file for file in files if file.is_file()), files[0]))
        for name in names:
            part = select(KINDS[name], state, DIFFUSERS_ANCHORS, DIFFUSERS.title, None)
            shape = config_shape(config, KINDS[name])
            arguments = {"num_groups": config.get("norm_num_groups", 32)}
            if name == "unet":
                width = config.get("attention_head_dim", 8)
                arguments |= {"head_channels": width, "num_heads": None if width else 1}
            size = config.get("sample_size")
            fits = isinstance(size, int) and size % 2 ** (len(shape.widths) - 1) == 0
            yield Found(name, part, shape, partial(load_diffusers, config=config), arguments, size if fits else None)


def find_ldm(state: State, parts: Sequence[str], ema: bool, **heads: int | None) -> Iterator[Found]:
    """The networks in a state dict of latent-diffusion."""
    for name, kind in KINDS.items():
        if part_of(name) not in parts or not begins(state, LDM_ANCHORS[kind]):
            continue
        if kind is UNet and sum(value is not None for value in heads.values()) != 1:
            raise ValueError(
                "weights do not show the heads of a U-Net of latent-diffusion: give head_channels or num_heads, or leave it out"
            )
        part = select(kind, state, LDM_ANCHORS, OPENAI.title, None)
        load = partial(load_ldm, ema=ema) if kind is UNet else load_ldm
        yield Found(name, part, ldm_shape(part.tensors, kind), load, {"num_groups": 32, **(heads if kind is UNet else {})})


def latent_shape(shape: Shape, part: Part, kind: type[nn.Module], latent: Latent, mean_only: bool) -> Shape:
    """The shape of an encoder or decoder after quant_conv and post_quant_conv are folded in."""
    quant, post_quant = part.neighbour("quant_conv"), part.neighbour("post_quant_conv")
    if kind is Decoder:
        return replace(shape, in_channels=post_quant[0].shape[1]) if post_quant and latent == "published" else shape
    channels = len(quant[0]) if quant else shape.out_channels
    channels = channels // 2 if mean_only and not part.discrete else channels
    return replace(shape, out_channels=len(post_quant[0]) if post_quant and latent == "decoder" else channels)


def model_networks(model, beta: float | None = None, parts: Sequence[str] = ("unet", "vae")) -> Networks:
    """The networks of a saved model (see `pipelines`) that others have too: its U-Net, and its VAE frozen at `beta`.

    They are the networks alone: what stands around the U-Net (noise schedule, normalisation of latents) stays here. Other VAEs
    than a `MultiBetaVAE` are left out: their decoders return logits, of which an AutoencoderKL knows nothing.

    Raises:
        ValueError: There are none, or a `MultiBetaVAE` is asked for without a beta.
    """
    modules = {}
    unet = getattr(getattr(model, "diffusion", None), "unet", None)
    if unet is not None and "unet" in parts:
        modules["unet"] = unet
    if isinstance(model.vae, MultiBetaVAE) and isinstance(model.vae.encoder, Encoder) and "vae" in parts:
        if beta is None:
            raise ValueError(
                "a MultiBetaVAE is one autoencoder for every beta: name one, beta=0 is the sharpest, or leave the vae out"
            )
        modules["encoder"], modules["decoder"] = freeze_vae(model.vae, beta)
    if not modules:
        raise ValueError(f"a {type(model).__name__} has no {' or '.join(parts)} that latent-diffusion or diffusers could hold")
    return Networks(modules)


def write_networks(networks: Networks, to: str, out: str | Path) -> dict[str, Report]:
    """Write networks for another code base, and say what became what.

    Args:
        to: "ldm", one .safetensors file with the names of a whole latent-diffusion checkpoint; "diffusers", a folder with
            subfolders unet and vae for `from_pretrained`; or "multibeta", a folder for `load_networks`.
        out: File or folder.

    Raises:
        ValueError: They have no such function, or `out` is of another kind.
    """
    out, modules = Path(out), networks.modules
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    if (to == "ldm") != (out.suffix == ".safetensors"):
        raise ValueError(f"{to} is written to a {'.safetensors file' if to == 'ldm' else 'folder'}, got {out}")
    if to == "multibeta":
        if not networks.arguments:
            raise ValueError("these networks are multibeta's own: choose ldm or diffusers")
        described = {name: networks.arguments[name] for name in modules}
        checkpoints.save_folder(out, {name: module.state_dict() for name, module in modules.items()}, {"networks": described})
        return networks.reports
    if {"encoder", "decoder"} <= modules.keys():
        check_pair(modules["encoder"], modules["decoder"])
    exported = {
        name: export(module, DIFFUSERS if to == "diffusers" else ldm_style(module), None) for name, module in modules.items()
    }
    states = {name: state for name, (state, _) in exported.items()}
    if to == "ldm":
        write_weights(out, ldm_checkpoint(states))
    else:
        write_diffusers(out, modules, states)
    return {name: report for name, (_, report) in exported.items()}


def ldm_checkpoint(states: dict[str, State]) -> dict[str, Tensor]:
    """Networks as one checkpoint of latent-diffusion; quant_conv and post_quant_conv, which it needs, are the identity."""
    prefixes = {"unet": LDM_PREFIXES["unet"], **{name: f"{LDM_PREFIXES['vae']}{name}." for name in ("encoder", "decoder")}}
    whole = {prefixes[name] + key: tensor for name, state in states.items() for key, tensor in state.items()}
    for name, conv, channels in (("encoder", "quant_conv", 0), ("decoder", "post_quant_conv", 1)):
        if name in states:
            like = states[name]["conv_in.weight" if channels else "conv_out.weight"]
            width = like.shape[channels]
            whole[f"{LDM_PREFIXES['vae']}{conv}.weight"] = torch.eye(width).to(like)[..., None, None]
            whole[f"{LDM_PREFIXES['vae']}{conv}.bias"] = torch.zeros(width).to(like)
    return whole


def write_diffusers(out: Path, modules: dict[str, nn.Module], states: dict[str, State]) -> None:
    """Subfolders unet and vae, each with the config.json and the weights of a model of diffusers."""
    models = {}
    if "unet" in modules:
        models["unet"] = diffusers_config(modules["unet"]), states["unet"]
    if autoencoder := [name for name in ("encoder", "decoder") if name in modules]:
        weights = {f"{name}.{key}": tensor for name in autoencoder for key, tensor in states[name].items()}
        models["vae"] = diffusers_config(*[modules[name] for name in autoencoder]), weights
    for name, (config, weights) in models.items():
        write_weights(out / name / f"{WEIGHTS}.safetensors", weights)
        (out / name / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_weights(path: Path, state: State) -> None:
    """A safetensors file, all of it or nothing; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    save_file(checkpoints.separate(state), part, metadata={"format": "pt"})
    os.replace(part, path)


def load_networks(folder: str | Path) -> dict[str, nn.Module] | None:
    """The networks that `write_networks` wrote "multibeta"; None for a folder of another kind.

    Raises:
        ValueError: A file is damaged or does not fit.
    """
    path = Path(folder) / "config.json"
    if not path.is_file() or "networks" not in json.loads(path.read_text(encoding="utf-8")):
        return None
    weights, config = checkpoints.load_folder(folder)
    networks = {}
    for name, described in config["networks"].items():
        arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in described.items()}
        networks[name] = KINDS[name](**arguments)
        checkpoints.load_state(networks[name], weights[name], f"{folder}/{name}.safetensors")
    return networks


def is_ours(source: str | Path) -> bool:
    """Whether a source is a saved model of any class, or a name for one, and not for `read_networks`."""
    source = Path(source)
    if (source / "config.json").is_file():
        return "class" in json.loads((source / "config.json").read_text(encoding="utf-8"))
    return not source.exists() and not source.suffix


def shorten(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
