"""Networks from and to files: folders of diffusers, checkpoints of latent-diffusion, folders of our own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multibeta import checkpoints, saving
from multibeta.files import read_json, write_atomically, write_text
from multibeta.interop import folders
from multibeta.interop.architecture import Shape, config_shape, ldm_shape
from multibeta.interop.conversion import Report, export, freeze_vae, load_diffusers, load_ldm
from multibeta.interop.differences import diffusers_config, require_pair
from multibeta.interop.mapping import DIFFUSERS, LDM, OPENAI, ldm_style
from multibeta.interop.parts import Latent, Part, State, begins, select
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.networks import AutoencoderConfig, Decoder, Encoder, UNet, UNetConfig
from multibeta.weights import read_weights

logger = logging.getLogger("multibeta")

FORMATS = ("multibeta", "ldm", "diffusers")
CLASSES: dict[str, type[nn.Module]] = {"unet": UNet, "encoder": Encoder, "decoder": Decoder}
CONFIGS: dict[str, type] = {"unet": UNetConfig, "encoder": AutoencoderConfig, "decoder": AutoencoderConfig}
PARTS = {"unet": ("unet",), "vae": ("encoder", "decoder")}
DIFFUSERS_MODELS = {"UNet2DModel": "unet", "AutoencoderKL": "vae"}
LDM_VAE = "first_stage_model."
LDM_PREFIXES = {"unet": "model.diffusion_model.", "encoder": f"{LDM_VAE}encoder.", "decoder": f"{LDM_VAE}decoder."}


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

    def __repr__(self) -> str:
        return f"Networks({', '.join(f'{name}: {type(module).__name__}' for name, module in self.modules.items())})"


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
    variant: str | None = None,
) -> Networks:
    """Networks of diffusers or latent-diffusion as ours, built from what their files show; outputs do not depend on beta.

    Weights are float32, whatever they are stored in, but those of `write_networks` what they were.

    Args:
        source: Folder of diffusers (of a model, or of a pipeline with subfolders such as unet and vae; safetensors or files of
            `torch.save`, in one or in shards), one of its weight files next to its config.json, weight file of latent-diffusion,
            or folder of `write_networks`. Files are read as tensors, never as code.
        parts: "unet", "vae" or both: those of them that are there.
        head_channels, num_heads: Of the attention in a U-Net of latent-diffusion, whose weights do not show it: one of them.
        resolution: Of the input, in pixels, which weights do not show and outputs do not depend on: it names the levels with
            attention. By default that of the config, or one whose lowest level is 8 pixels, of an autoencoder 32.
        latent: See `load_ldm`.
        mean_only: The encoder returns the mean, as that of a `MultiBetaVAE`; by default mean and log variance where it has both.
        ema: See `load_ldm`.
        variant: Of the weights in a folder of diffusers, such as "fp16" or "non_ema"; by default those without one, or the only
            ones there are. A part of a pipeline that lacks it gives what it has, as in diffusers, with a warning.

    Raises:
        FileNotFoundError, ValueError: What is missing or does not fit, what is there, and what to do.
    """
    source, result = Path(source), Networks({})
    heads = {"head_channels": head_channels, "num_heads": num_heads}
    diffusers = source.is_dir() or (source.name.startswith(folders.WEIGHTS) and folders.model_class(source.parent) is not None)
    ours = load_networks(source) if source.is_dir() else None
    if diffusers and (given := [name for name, value in (heads | {"ema": ema or None}).items() if value is not None]):
        what = "a folder" if source.is_dir() else "of diffusers"
        raise ValueError(f"{' and '.join(given)} can be given for weight files of latent-diffusion, {source} is {what}")
    if variant is not None and (ours is not None or not source.is_dir()):
        raise ValueError(f"variant={variant!r} chooses among the weights in a folder of diffusers, {source} is none")
    if ours is not None:
        result.modules.update({name: ours[name] for name in names_of(parts) if name in ours})
        foreign = iter(())
    elif diffusers:
        foreign = diffusers_networks(source, parts, variant)
    else:
        foreign = ldm_networks(source, parts, ema, **heads)
    for network in foreign:
        network_type, part = CLASSES[network.name], network.part
        shape = latent_shape(network.shape, part, network_type, latent, mean_only or latent == "decoder")
        arguments = shape.arguments(network_type, **network.arguments | ({"resolution": resolution} if resolution else {}))
        module = network_type(**arguments)
        silent = None if network_type is UNet else "zero"
        report = network.load(module, part.whole, prefix=part.prefix, without_embedding=silent, latent=latent)
        result.modules[network.name], result.arguments[network.name], result.reports[network.name] = module, arguments, report
    if not result.modules:
        there = folders.contents(source) if source.is_dir() else "other tensors"
        raise ValueError(
            f"{source} holds no {' or '.join(parts)} as multibeta, latent-diffusion or diffusers writes it, but {there}"
        )
    return result


def names_of(parts: Sequence[str]) -> list[str]:
    """The networks that parts consist of."""
    return [name for part, names in PARTS.items() if part in parts for name in names]


@dataclass(frozen=True)
class Foreign:
    """A network in a file of another code base: its part, its shape, how it is loaded, and what the shape does not show."""

    name: str
    part: Part
    shape: Shape
    load: Callable[..., Report]
    arguments: dict


def diffusers_networks(source: Path, parts: Sequence[str], variant: str | None) -> Iterator[Foreign]:
    """The networks in a folder of diffusers, of a model or of a pipeline, or in one weight file next to its config.json."""
    places = diffusers_places(source if source.is_dir() else source.parent, parts)
    having = [place for place in places.values() if variant in folders.variants(place)]
    for place in places.values():
        if having and place not in having:
            logger.warning("%s has no weights of the variant %s, others are taken", place, variant)
        chosen = variant if place in having or not having else None
        state = folders.read(source if source.is_file() else folders.choose(place, chosen)[1])
        config = cast(dict[str, Any], read_json(place / "config.json"))  # `folders.models` has read its class
        model = config["_class_name"]
        names = PARTS[DIFFUSERS_MODELS[model]]
        with checkpoints.naming(place, f"a {model}"):
            arguments = {"num_groups": config.get("norm_num_groups", 32)}
            if model == "UNet2DModel":
                width = config.get("attention_head_dim", 8)
                arguments |= {"head_channels": width, "num_heads": None if width else 1}
            size = config.get("sample_size")
            if isinstance(size, int) and size % 2 ** (len(config["block_out_channels"]) - 1) == 0:
                arguments["resolution"] = size
            shapes = {name: config_shape(config, CLASSES[name]) for name in names}
        for name, shape in shapes.items():
            part = select(CLASSES[name], state, DIFFUSERS, None)
            yield Foreign(name, part, shape, partial(load_diffusers, config=config), arguments)


def diffusers_places(folder: Path, parts: Sequence[str]) -> dict[str, Path]:
    """Where the parts are in a folder of diffusers: the folder itself, or subfolders, that called as the part before others.

    Raises:
        ValueError: A part must be chosen, or what is there cannot be read.
    """
    models = folders.models(folder)
    places = {}
    for part in parts:
        named = [name for name, model in models.items() if DIFFUSERS_MODELS.get(model) == part]
        named = [name for name in named if name in ("", part)] or named
        if len(named) > 1:
            raise ValueError(f"{folder} holds more than one {part}, in {', '.join(named)}: name the folder of one")
        if named:
            places[part] = folder / named[0]
    unread = [f"{folder / name} holds a {model}" for name, model in models.items() if model not in DIFFUSERS_MODELS]
    if unread and not places:
        raise ValueError(f"{'; '.join(unread)}, what can be read are {' and '.join(DIFFUSERS_MODELS)}")
    for text in unread:
        logger.warning("%s, which cannot be read and is left out", text)
    return places


def ldm_networks(source: Path, parts: Sequence[str], ema: bool, **heads: int | None) -> Iterator[Foreign]:
    """The networks in a weight file of latent-diffusion."""
    state = read_weights(source)
    if any(begins(state, DIFFUSERS.anchors[CLASSES[name]]) for name in names_of(parts)):
        raise ValueError(
            f"{source} has the names of diffusers, whose shape is in a config.json: put it beside the file, which is called "
            f"{folders.WEIGHTS}.safetensors, and name the folder"
        )
    for name in names_of(parts):
        network_type, style = CLASSES[name], OPENAI if name == "unet" else LDM
        if not begins(state, style.anchors[network_type]):
            continue
        if network_type is UNet and sum(value is not None for value in heads.values()) != 1:
            raise ValueError(
                "weights do not show the heads of a U-Net of latent-diffusion: give head_channels or num_heads, or leave it out"
            )
        part = select(network_type, state, style, None)
        load = partial(load_ldm, ema=ema and network_type is UNet)
        yield Foreign(
            name, part, ldm_shape(part.tensors, network_type), load, {"num_groups": 32, **(heads if network_type is UNet else {})}
        )


def latent_shape(shape: Shape, part: Part, network_type: type[nn.Module], latent: Latent, mean_only: bool) -> Shape:
    """The shape of a network after quant_conv and post_quant_conv are folded in."""
    if network_type is UNet:
        return shape
    quant, post_quant = part.neighbour("quant_conv"), part.neighbour("post_quant_conv")
    if network_type is Decoder:
        return replace(shape, in_channels=post_quant[0].shape[1]) if post_quant and latent == "published" else shape
    channels = len(quant[0]) if quant else shape.out_channels
    channels = channels // 2 if mean_only and not part.discrete else channels
    return replace(shape, out_channels=len(post_quant[0]) if post_quant and latent == "decoder" else channels)


class Model(Protocol):
    """A model of `pipelines`; most have a `diffusion` too."""

    vae: nn.Module


def model_networks(model: Model, beta: float | None = None, parts: Sequence[str] = ("unet", "vae")) -> Networks:
    """The networks of a saved model (see `pipelines`) that others have too: its U-Net, and its VAE frozen at `beta`.

    They are the networks alone: what stands around the U-Net (noise schedule, normalisation of latents) stays here. Other VAEs
    than a `MultiBetaVAE` are left out: their decoders return logits, of which an AutoencoderKL knows nothing.

    Raises:
        ValueError: There are none, or a `MultiBetaVAE` is asked for without a beta.
    """
    modules, vae = {}, saving.unwrapped(model.vae)
    unet = getattr(getattr(model, "diffusion", None), "unet", None)
    if unet is not None and "unet" in parts:
        modules["unet"] = saving.unwrapped(unet)
    if isinstance(vae, MultiBetaVAE) and isinstance(vae.encoder, Encoder) and "vae" in parts:
        if beta is None:
            raise ValueError(
                "a MultiBetaVAE is one autoencoder for every beta: name one by beta= (--beta), 0 is the sharpest, or take the "
                "unet alone by parts= (--parts)"
            )
        modules["encoder"], modules["decoder"] = freeze_vae(vae, beta)
    elif modules and "vae" in parts:
        logger.warning("the VAE, a %s, is left out: its decoder returns logits, which no AutoencoderKL does", type(vae).__name__)
    if getattr(model, "flow_map", None) is not None:
        logger.warning("the flow map is left out: no network of latent-diffusion or diffusers takes a span of time")
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
        ValueError: They have no such function, or `out` is no .safetensors file, or no folder.
    """
    out, modules = Path(out), networks.modules
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    if (to == "ldm") != (out.suffix == ".safetensors"):
        raise ValueError(f"{to} is written to a {'.safetensors file' if to == 'ldm' else 'folder'}, got {out}")
    if to == "multibeta":
        if not networks.arguments:
            raise ValueError("these networks are multibeta's own: choose ldm or diffusers")
        described, states = {name: networks.arguments[name] for name in modules}, {}
        for name, module in modules.items():
            with torch.device("meta"):
                fresh = CLASSES[name](**described[name])
            states[name] = saving.plain_state(module, fresh, name)
        checkpoints.save_folder(out, states, {"networks": described})
        return networks.reports
    modules = {name: saving.unwrapped(module) for name, module in modules.items()}
    style = {name: DIFFUSERS if to == "diffusers" else ldm_style(module) for name, module in modules.items()}
    exported = {name: export(module, style[name], None) for name, module in modules.items()}
    states = {name: state for name, (state, _) in exported.items()}
    if to == "diffusers":
        write_diffusers(out, modules, states)
    else:
        if {"encoder", "decoder"} <= modules.keys():
            require_pair(cast(Encoder, modules["encoder"]), cast(Decoder, modules["decoder"]))
        write_weights(out, ldm_checkpoint(states))
    return {name: report for name, (_, report) in exported.items()}


def ldm_checkpoint(states: Mapping[str, State]) -> dict[str, Tensor]:
    """Networks as one checkpoint of latent-diffusion; quant_conv and post_quant_conv, which it needs, are the identity."""
    whole = {LDM_PREFIXES[name] + key: tensor for name, state in states.items() for key, tensor in state.items()}
    for name, inner, side, outer in (("encoder", "conv_out", 0, "quant_conv"), ("decoder", "conv_in", 1, "post_quant_conv")):
        if name in states:
            weight = states[name][f"{inner}.weight"]
            whole[f"{LDM_VAE}{outer}.weight"] = torch.eye(weight.shape[side]).to(weight)[..., None, None]
            whole[f"{LDM_VAE}{outer}.bias"] = weight.new_zeros(weight.shape[side])
    return whole


def write_diffusers(out: Path, modules: Mapping[str, nn.Module], states: Mapping[str, State]) -> None:
    """Subfolders unet and vae, each with the config.json and the weights of a model of diffusers."""
    models = {}
    for part, names in PARTS.items():
        if there := [name for name in names if name in modules]:
            prefixes = {name: "" if part == "unet" else f"{name}." for name in there}
            weights = {prefixes[name] + key: tensor for name in there for key, tensor in states[name].items()}
            models[part] = diffusers_config(*[modules[name] for name in there]), weights
    for part, (config, weights) in models.items():
        write_weights(out / part / f"{folders.WEIGHTS}.safetensors", weights)
        write_text(out / part / "config.json", json.dumps(config, indent=2) + "\n")


def write_weights(path: Path, state: State) -> None:
    """A safetensors file, all of it or nothing; parent folders are made."""
    state = checkpoints.separate(state)
    write_atomically(path, lambda file: save_file(state, file.name, metadata={"format": "pt"}))


def load_networks(folder: str | Path) -> dict[str, nn.Module] | None:
    """The networks that `write_networks` wrote "multibeta", in the dtypes they had; None for a folder that it did not write.

    Raises:
        ValueError: A file is damaged or does not fit.
    """
    path = Path(folder) / "config.json"
    if not path.is_file() or not _has_entry(path, "networks"):
        return None
    weights, config = checkpoints.load_folder(folder)
    checkpoints.require_entries(folder, weights, config, (), {"networks": dict})
    checkpoints.require_entries(folder, weights, config, config["networks"], {})
    networks = {}
    with checkpoints.naming(folder, "networks of multibeta"):
        for name, described in config["networks"].items():
            if name not in CLASSES:
                raise ValueError(f"a network must be one of {', '.join(CLASSES)}, got {name!r}")
            arguments, source = checkpoints.typed(CONFIGS[name], described), Path(folder, f"{name}.safetensors")
            with torch.device("meta"):  # nothing is allocated for a config that is of other weights
                checkpoints.compare_state(CLASSES[name](**arguments), weights[name], source)
            networks[name] = CLASSES[name](**arguments)
            saving.take_dtypes(networks[name], weights[name])
            checkpoints.load_state(networks[name], weights[name], source)
    return networks


def _has_entry(path: Path, name: str) -> bool:
    """Whether a JSON file holds an object with an entry of this name."""
    held = read_json(path)
    return isinstance(held, dict) and name in held


def is_ours(source: str | Path) -> bool:
    """Whether a source is a saved model of any class, or a name for one, and not for `read_networks`."""
    source = Path(source)
    for folder in (source, source / "model"):  # the latter of the folder of a run
        if (folder / "config.json").is_file():
            return _has_entry(folder / "config.json", "class")
    return not source.exists() and not source.suffix
