"""What makes a network and its counterpart elsewhere different functions, and the config.json of one that is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import nn

from multibeta.blocks import AttentionBlock, GroupNormAct, ResBlock
from multibeta.interop.architecture import shape_of
from multibeta.interop.mapping import DIFFUSERS, Network, Style, all_of
from multibeta.networks import Decoder, Encoder, UNet

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


def require_same_function(module: nn.Module, style: Style, more: Iterable[str] = ()) -> None:
    """`ValueError` with the `differences` between a module and its counterpart, and `more` of them, where there are some."""
    if not isinstance(module, UNet | Encoder | Decoder | ResBlock | AttentionBlock):
        raise ValueError(
            f"weights can go into a UNet, Encoder, Decoder, ResBlock or AttentionBlock, not a {type(module).__name__}"
        )
    list(style.rows(module))  # whose layers may have been changed
    if wrong := [*differences(module, style), *more]:
        name = type(module).__name__
        raise ValueError(f"the {name} and its counterpart in {style.title} are different functions: {'; '.join(wrong)}")


def differences(module: nn.Module, style: Style) -> Iterator[str]:
    """What of a module no weight could bring into `style`."""
    norms = all_of(GroupNormAct, module)
    activations = {norm.activation for norm in norms} - {"none", "silu"}
    if activations:
        yield f"activation {', '.join(activations)}, theirs is silu"
    for name, theirs in (("eps", style.eps), ("num_groups", style.groups)):
        ours = {getattr(norm, name) for norm in norms} - {theirs}
        if theirs is not None and ours:
            yield f"{name} {', '.join(map(str, sorted(ours)))}, theirs is {theirs}"
    heads = {block.num_heads for block in all_of(AttentionBlock, module)} - {style.heads}
    if style.heads is not None and heads:
        yield f"{', '.join(map(str, sorted(heads)))} heads, theirs is {style.heads}"
    if style.embeds and isinstance(module, ResBlock) and module.embedding_projection is None:
        yield "no projection of the embedding, theirs has one"
    if isinstance(module, UNet | Encoder | Decoder):
        yield from network_differences(module, style)


def network_differences(network: Network, style: Style) -> Iterator[str]:
    """What of a network could be built here and not there, though each of its blocks could."""
    shape = shape_of(network)
    if shape.widths[0] != shape.base_channels and (
        isinstance(network, UNet) or (isinstance(network, Encoder) and style is DIFFUSERS)
    ):
        yield f"{shape.widths[0]} channels at the first level, theirs has the {shape.base_channels} of the first convolution"
    if style is not DIFFUSERS:
        return
    groups = groups_of(network)
    if len(groups) > 1:
        yield f"norms of {', '.join(map(str, groups))} groups, theirs have all the same"
    if isinstance(network, UNet) and len(widths := head_widths(network)) > 1:
        yield f"heads of {', '.join(map(str, widths))} channels, theirs have all the same"


def groups_of(*networks: nn.Module) -> list[int]:
    """The numbers of groups that the norms of networks have."""
    return sorted({norm.num_groups for network in networks for norm in all_of(GroupNormAct, network)})


def head_widths(unet: UNet) -> Sequence[int | None]:
    """`attention_head_dim` that give a U-Net its heads: one where diffusers can; None is a single head."""
    blocks = all_of(AttentionBlock, unet)
    if all(block.num_heads == 1 for block in blocks):
        return [None]
    return sorted({block.projection.in_features // block.num_heads for block in blocks})


def fixed_differences(config: Mapping, fixed: Mapping) -> Iterator[str]:
    """Fields of `config` that must have one value and have another."""
    for name, value in fixed.items():
        given = config.get(name, value)
        if (given or None) != (value or None) and (name, given) != ("act_fn", "swish"):
            yield f"{name} {given!r}, here it is {value!r}"


def head_differences(module: nn.Module, num_heads: Callable[[int], int]) -> Iterator[str]:
    """The first attention block with other heads than `num_heads` gives for its channels."""
    for block in all_of(AttentionBlock, module):
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


def diffusers_differences(module: nn.Module, config: Mapping) -> Iterator[str]:
    """What differs between a network and a config.json, which says nothing about a block alone."""
    if not isinstance(module, UNet | Encoder | Decoder):
        return
    unet = isinstance(module, UNet)
    named, wanted = config.get("_class_name"), "UNet2DModel" if unet else "AutoencoderKL"
    if named is not None and named != wanted:
        yield f"_class_name {named!r}, here it is {wanted!r}"
    yield from fixed_differences(config, UNET_FIXED if unet else {"act_fn": "silu"})
    groups, attention_groups = config.get("norm_num_groups", 32), config.get("attn_norm_num_groups")
    if groups_of(module) != [groups] or (attention_groups or groups) != groups:
        yield f"norm_num_groups {groups}, attn_norm_num_groups {attention_groups}, here {groups_of(module)}"
    if unet:
        if config.get("time_embedding_dim") not in (None, 4 * module.base_channels):
            yield f"time_embedding_dim {config['time_embedding_dim']}, here it is {4 * module.base_channels}"
        width = config.get("attention_head_dim", 8)
        yield from head_differences(module, lambda channels: channels // (width or channels))


def diffusers_config(*networks: nn.Module) -> dict:
    """The config.json of the model of diffusers that is the same function.

    Args:
        networks: A `UNet`, for `UNet2DModel`; or an `Encoder`, which returns mean and log variance, and its `Decoder`, for
            `AutoencoderKL`.

    Raises:
        ValueError: There is none.
    """
    for network in networks:
        require_same_function(network, DIFFUSERS)
    types = [type(network) for network in networks]
    if types not in ([UNet], [Encoder, Decoder]):
        raise ValueError("a config of diffusers is that of one UNet, or of an Encoder and its Decoder")
    first, last = (shape_of(cast(Network, network)) for network in (networks[0], networks[-1]))
    shared = {
        "in_channels": first.in_channels,
        "out_channels": last.out_channels,
        "block_out_channels": list(first.widths),
        "layers_per_block": first.num_res_blocks,
        "norm_num_groups": groups_of(networks[0])[0],
    }
    names = ["AttnDown" if has else "Down" for has in first.attention]
    ups = [name.replace("Down", "Up") for name in reversed(names)]
    if types == [UNet]:
        return {
            "_class_name": "UNet2DModel",
            **shared,
            "down_block_types": [f"{name}Block2D" for name in names],
            "up_block_types": [f"{name}Block2D" for name in ups],
            "attention_head_dim": head_widths(cast(UNet, networks[0]))[0],
            "flip_sin_to_cos": True,
            **UNET_FIXED,
        }
    require_pair(*cast(tuple[Encoder, Decoder], networks))
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


def require_pair(encoder: Encoder, decoder: Decoder) -> None:
    """`ValueError` unless two networks are an AutoencoderKL: mirror images, the encoder with mean and log variance."""
    first, last = shape_of(encoder), shape_of(decoder)
    ends = {"in_channels": 0, "out_channels": 0, "base_channels": 0}
    if replace(first, **ends) != replace(last, **ends) or first.in_channels != last.out_channels:
        raise ValueError(f"encoder and decoder must mirror each other, got {first} and {last}")
    if len(groups := groups_of(encoder, decoder)) > 1:
        raise ValueError(f"encoder and decoder must have the same groups, got {', '.join(map(str, groups))}")
    if first.out_channels != 2 * last.in_channels:
        raise ValueError(
            f"an AutoencoderKL encodes to mean and log variance, {2 * last.in_channels} channels for latents of "
            f"{last.in_channels}, got {first.out_channels}; freeze_vae makes such an encoder of a MultiBetaVAE"
        )
