"""The part of a state dict that belongs to one network, and what of its autoencoder becomes part of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from multibeta.interop.mapping import Style, dotted, matrix
from multibeta.networks import Encoder
from multibeta.weights import shorten

State = Mapping[str, Tensor]
Latent = Literal["published", "decoder"]
CONV_OUT, CONV_IN = ("conv_out.weight", "conv_out.bias"), ("conv_in.weight", "conv_in.bias")


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

    def __repr__(self) -> str:
        return f"Part({len(self.tensors)} of {len(self.whole)} tensors, prefix={self.prefix!r})"

    @property
    def discrete(self) -> bool:
        """Whether the autoencoder has a codebook, whose encoder returns no log variance."""
        return self.outer is not None and any(name.startswith(f"{self.outer}quantize.") for name in self.whole)

    @property
    def outer(self) -> str | None:
        """Prefix of the autoencoder that this encoder or decoder is part of; None where it stands alone."""
        outer, _, own = self.prefix.removesuffix(".").rpartition(".")
        if own not in ("encoder", "decoder"):
            return None
        return f"{outer}." if outer else ""

    def neighbour(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Weight (a matrix) and bias of a 1x1 convolution of the autoencoder, in float64; None where there is none."""
        if self.outer is None or f"{self.outer}{name}.weight" not in self.whole:
            return None
        weight, bias = (matrix(self.whole[f"{self.outer}{name}.{end}"]).double() for end in ("weight", "bias"))
        return weight, bias

    def put(self, names: Sequence[str], tensors: Sequence[Tensor], how: str) -> None:
        """Replace tensors of the part, noting how."""
        for name, tensor in zip(names, tensors, strict=True):
            self.tensors[name] = tensor.to(torch.promote_types(self.tensors[name].dtype, torch.float32))
            self.how[name] = f"{self.how[name]}, {how}" if name in self.how else how

    def fold(self, names: Sequence[str], tensors: Sequence[Tensor], neighbour: str) -> None:
        """Replace weight and bias of a layer by those that hold a `neighbour` too."""
        self.put(names, tensors, f"with {neighbour}")
        for name in names:
            self.names[name] += (f"{self.outer}{neighbour}.{name.rpartition('.')[2]}",)

    def rename_attention(self) -> None:
        """The names of attention that diffusers had at first, which published files still carry, as those of today."""
        today = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        for name in list(self.tensors):
            stem, _, end = name.rpartition(".")
            path, _, layer = stem.rpartition(".")
            if layer in today:
                new = dotted(path, today[layer], end)
                self.tensors[new], self.names[new] = self.tensors.pop(name), self.names.pop(name)

    def left_out(self) -> dict[str, int]:
        """Parts of the whole that were not used, with their numbers of tensors."""
        used = {name for names in self.names.values() for name in names}
        counts = Counter()
        for name in self.whole:
            if name not in used:
                start = self.outer if self.outer and name.startswith(self.outer) else ""
                counts[start + name.removeprefix(start).split(".")[0]] += 1
        return dict(counts)


def select(module_type: type[nn.Module], state: State, style: Style, prefix: str | None) -> Part:
    """The part of `state` that fits a module: that of a network shows by a name that each has, a block is taken as it is."""
    if prefix is None:
        prefixes = begins(state, style.anchors[module_type]) if module_type in style.anchors else [""]
        if len(prefixes) != 1:
            starts = ", ".join(sorted({name.split(".")[0] for name in state})[:8])
            there = f"{len(prefixes)} of them, at {', '.join(map(repr, prefixes))}: choose by prefix=" if prefixes else "none"
            dense = any(name.endswith("temb.dense.0.weight") for name in state)
            hint = "; temb.dense belongs to its class Model, whose embedding has other frequencies" if dense else ""
            raise ValueError(
                f"wanted one {module_type.__name__} as {style.title} names it, found {there}; names begin with {starts}{hint}"
            )
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
        part.fold(CONV_OUT, after(part.tensors, *quant), "quant_conv")
    if len(part.tensors[CONV_OUT[0]]) == 2 * mean_channels and not part.discrete:
        part.put(CONV_OUT, [part.tensors[name][:mean_channels] for name in CONV_OUT], "mean, the first half")
    if post_quant:
        part.fold(CONV_OUT, after(part.tensors, *post_quant), "post_quant_conv")


def after(tensors: State, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 1x1 convolution applied to what conv_out gives, as one convolution."""
    inner, offset = (tensors[name].double() for name in CONV_OUT)
    return torch.einsum("om,mihw->oihw", weight, inner), weight @ offset + bias


def fold_into_decoder(part: Part, latent: Latent) -> None:
    """post_quant_conv as part of the decoder's first convolution, where that is exact."""
    post_quant = part.neighbour("post_quant_conv")
    if latent == "decoder" or not post_quant or not all(name in part.tensors for name in CONV_IN):
        return
    weight, bias = post_quant
    if bias.any():
        raise ValueError(
            "post_quant_conv has a bias, which no weight of the decoder holds: its first convolution pads with zeros after it. "
            'latent="decoder", for encoder and decoder alike, folds post_quant_conv into the encoder, which is exact; the '
            "latents are then what the decoder reads"
        )
    inner, offset = (part.tensors[name] for name in CONV_IN)
    part.fold(CONV_IN, [torch.einsum("omhw,mi->oihw", inner.double(), weight), offset], "post_quant_conv")
