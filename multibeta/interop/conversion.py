"""Filling our modules with weights of latent-diffusion and diffusers, and going back; freezing them at one beta."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from multibeta import saving
from multibeta.blocks import ResBlock
from multibeta.interop.differences import diffusers_differences, ldm_differences, require_same_function
from multibeta.interop.mapping import COPY, DIFFUSERS, OPENAI, OPENAI_NEW_ORDER, SWAP, ZERO, Row, Style, ldm_style, unconditioned
from multibeta.interop.parts import Latent, Part, State, averaged, fold_into_decoder, fold_into_encoder, select
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.networks import Decoder, Encoder, UNet
from multibeta.weights import shorten, state_problems


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
        prefix: Where the part begins, such as "first_stage_model.encoder."; by default where the only one that fits does.
        ema: Take the averaged weights, "model_ema.".
        without_embedding: Their public autoencoder takes no embedding; "zero" sets our projections to zero, so that the
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
    module = saving.unwrapped(module)  # shares its tensors
    style, config = ldm_style(module), config or {}
    if style is OPENAI and config.get("use_new_attention_order"):
        style = OPENAI_NEW_ORDER
    require_same_function(module, style, ldm_differences(module, config))
    part = select(type(module), averaged(state_dict) if ema else state_dict, style, prefix)
    return fill(module, list(style.rows(module)), part, without_embedding, latent)


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
    module = saving.unwrapped(module)  # shares its tensors
    require_same_function(module, DIFFUSERS, () if config is None else diffusers_differences(module, config))
    part = select(type(module), state_dict, DIFFUSERS, prefix)
    part.rename_attention()
    rows = list(DIFFUSERS.rows(module))
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
    module = saving.unwrapped(module)
    return export(module, ldm_style(module), beta)[0]


def to_diffusers(module: nn.Module, *, beta: float | None = None) -> dict[str, Tensor]:
    """The weights of a module under the names of diffusers, the inverse of `load_diffusers`.

    A `UNet` is the `UNet2DModel` of `diffusers_config(module)`. An encoder or decoder is that of an `AutoencoderKL`, which
    takes no beta: give the one at which to `freeze` it.

    Raises:
        ValueError: diffusers has no such function.
    """
    return export(module, DIFFUSERS, beta)[0]


def export(module: nn.Module, style: Style, beta: float | None) -> tuple[dict[str, Tensor], Report]:
    """The weights of a module under the names of `style`, and what became what."""
    module = saving.unwrapped(module)
    module = module if beta is None else freeze(module, beta)
    require_same_function(module, style)
    ours = module.state_dict()
    saving.require_plain(ours, f"the {type(module).__name__}")
    rows = list(style.rows(module))
    if isinstance(module, Encoder | Decoder):
        if not any(ours[row.ours].any() for row in rows if row.projects_embedding):
            rows = unconditioned(rows)
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


def fill(module: nn.Module, rows: list[Row], part: Part, without_embedding: str | None, latent: Latent) -> Report:
    """Give `module` the tensors of `part`, after comparing every name and shape."""
    if without_embedding not in (None, "zero"):
        raise ValueError(f'without_embedding must be None or "zero", got {without_embedding!r}')
    if latent not in ("published", "decoder"):
        raise ValueError(f'latent must be "published" or "decoder", got {latent!r}')
    if without_embedding:
        rows = unconditioned(rows)
    needed = [row for row in rows if row.projects_embedding and row.theirs]
    if needed and not isinstance(module, UNet) and not any(name in part.tensors for row in needed for name in row.theirs):
        raise ValueError(
            f"the weights have no projection of an embedding ({needed[0].theirs[0]}), which {len(needed) // 2} blocks of the "
            f'{type(module).__name__} have: without_embedding="zero" sets them to zero; outputs do not depend on it then'
        )
    if isinstance(module, Encoder):
        fold_into_encoder(module, part, latent)
    elif isinstance(module, Decoder):
        fold_into_decoder(part, latent)
    ours = module.state_dict()
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(f"the {type(module).__name__} is on the meta device: give it memory first, by to_empty(device=...)")
    compare(rows, ours, part, type(module).__name__)
    values, mapped = dict(ours), []
    for row in rows:
        if row.rule.read:
            values[row.ours] = row.rule.read(*[part.tensors[name] for name in row.theirs])
        elif row.rule is ZERO:
            values[row.ours] = torch.zeros_like(ours[row.ours])
        names = tuple(whole for name in row.theirs for whole in part.names[name])
        how = [part.how[name] for name in row.theirs if name in part.how]
        mapped.append(Mapped(row.ours, tuple(ours[row.ours].shape), names, ", ".join(how) or row.rule.how))
    module.load_state_dict(values)
    return Report(tuple(mapped), part.left_out())


def compare(rows: list[Row], ours: State, part: Part, title: str) -> None:
    """`ValueError` unless the rows use every tensor of the part, and each has the shape that is needed."""
    wanted = {
        name: tensor for row in rows for name, tensor in zip(row.theirs, row.rule.write(ours[row.ours].to("meta")), strict=True)
    }
    problems = state_problems(part.tensors, wanted)
    described = [f"{len(names)} {problem}: {shorten(names)}" for problem, names in problems.items() if names]
    if described:
        where = f" under {part.prefix}" if part.prefix else ""
        raise ValueError(f"the weights{where} do not fit the {title}; " + "; ".join(described))


@torch.no_grad()
def freeze(network: nn.Module, beta: float) -> Encoder | Decoder:
    """A copy of an `Encoder` or `Decoder` that gives at every beta what the original gives at one.

    What a block adds for beta, after its first convolution, becomes part of the bias of that convolution; the projections are
    zero.
    """
    network = saving.unwrapped(network)
    if not isinstance(network, Encoder | Decoder):
        raise ValueError(f"beta freezes an Encoder or Decoder, got a {type(network).__name__}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta:g}")
    network = copy.deepcopy(network)
    weight = network.conv_in.weight
    embedding = network.embedding(torch.tensor([beta], dtype=torch.float32, device=weight.device)).to(weight.dtype)
    for block in network.blocks:
        if isinstance(block, ResBlock):
            shift, bias, projection = block.shift(embedding), block.conv1.bias, block.embedding_projection
            assert shift is not None and bias is not None and projection is not None  # as encoders and decoders have them
            bias += shift[0]
            for parameter in projection.parameters():
                parameter.zero_()
    return network


@torch.no_grad()
def freeze_vae(vae: MultiBetaVAE, beta: float) -> tuple[Encoder, Decoder]:
    """A `MultiBetaVAE` at one beta as an ordinary autoencoder: its encoder returns mean and log variance of q(z|x).

    The mean carries the factor 1 - beta^collapse_exponent, the log variance is 2 log sigma(beta) everywhere; both live in the
    last convolution.
    """
    encoder, decoder = cast(Encoder, freeze(vae.encoder, beta)), cast(Decoder, freeze(vae.decoder, beta))
    exponent, old = vae.config.collapse_exponent, encoder.conv_out
    scale = 1.0 if exponent is None else 1 - beta**exponent
    kernel_size, padding = cast(tuple[tuple[int, int], tuple[int, int]], (old.kernel_size, old.padding))
    new = type(old)(old.in_channels, 2 * old.out_channels, kernel_size, padding=padding).to(old.weight)
    assert old.bias is not None and new.bias is not None  # as `Encoder` builds it
    log_variance = 2 * vae.sigma(torch.tensor([float(beta)], device=old.weight.device))[0].log()
    new.weight.copy_(torch.cat([scale * old.weight, torch.zeros_like(old.weight)]))
    new.bias.copy_(torch.cat([scale * old.bias, log_variance.expand(old.out_channels).to(old.bias)]))
    encoder.conv_out = new
    return encoder, decoder
