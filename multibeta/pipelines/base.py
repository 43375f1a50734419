"""Models that are made of parts: moved, saved and loaded as one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from multibeta import checkpoints, saving
from multibeta.pipelines.model_cards import check_info, may_write, model_card
from multibeta.weights import shorten, weights_hash

if TYPE_CHECKING:
    from typing import Self

NETWORKS = ("encoder", "decoder", "unet")  # of a part: their dtype may change; learned curves and tables stay float32
ROUNDED = (torch.float16, torch.bfloat16)
INITIAL_STREAM, ENCODER_STREAM, MIXTURE_STREAM = 1, 2, 3


class Pretrained:
    """A model that is made of parts: moved, saved and loaded as one.

    It holds each of its `parts`, name to (class of the module, class of its config), under that name; `vae` is one of them. Of
    `optional_parts` it has each or None. `summary` and `tags` are for its model card, `info` says where it comes from.
    """

    parts: ClassVar[dict[str, tuple[type[nn.Module], type]]] = {}
    optional_parts: ClassVar[dict[str, tuple[type[nn.Module], type]]] = {}
    summary: ClassVar[str]
    tags: ClassVar[tuple[str, ...]]
    vae: Any
    info: dict[str, Any]

    if TYPE_CHECKING:

        def __init__(self, *, info: dict[str, Any] | None = None, **parts: nn.Module) -> None:
            """Each class takes its parts by name."""

    def __repr__(self) -> str:
        config = self.vae.config
        image, latent = (config.image_channels, config.resolution, config.resolution), tuple(config.latent_shape)
        count = sum(weight.numel() for name in self.present_parts for weight in getattr(self, name).parameters())
        dtypes = dtypes_of(self._networks()) or str(self.dtype).removeprefix("torch.")
        shapes = f"images {image}, latents {latent}"
        return f"{type(self).__name__}({shapes}, {count:,} parameters, {dtypes} on {self.device})"

    @property
    def present_parts(self) -> dict[str, tuple[type[nn.Module], type]]:
        """Its `parts`, and those of the `optional_parts` that it has."""
        return self.parts | {name: of for name, of in self.optional_parts.items() if getattr(self, name) is not None}

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.vae.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, where networks differ of the first: each computes in its own, see `blocks.input_dtype`."""
        return next(self.vae.parameters()).dtype

    @classmethod
    def _require_parts(cls, info: dict[str, Any] | None, **parts: nn.Module) -> None:
        """`TypeError` unless each part can stand for the module of its name, wrapped or not, and `info` is a dict."""
        for name, part in parts.items():
            module, config_class = (cls.parts | cls.optional_parts)[name]
            config = getattr(part, "config", None)
            verbs = [verb for verb, function in vars(module).items() if callable(function) and not verb.startswith("_")]
            lacking = [verb for verb in verbs if not hasattr(part, verb)]
            lacking += [f"config.{field.name}" for field in fields(config_class) if not hasattr(config, field.name)]
            if not isinstance(part, nn.Module) or lacking:
                signature = ", ".join(f"{name}: {module.__name__}" for name, (module, _) in cls.parts.items())
                raise TypeError(
                    f"the parts of a {cls.__name__} are ({signature}), got a {type(part).__name__} as {name}"
                    + (f", without {shorten(lacking)}" if lacking else "")
                )
        if info is not None and not isinstance(info, dict):
            raise TypeError(f"info must be a dict, or None, got a {type(info).__name__}")

    def _networks(self) -> list[nn.Module]:
        """The networks of all parts."""
        return [network for name in self.present_parts for network in networks_of(getattr(self, name)).values()]

    def to(self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move all parts to `device` and the networks to `dtype`, or either alone; learned curves and tables stay float32."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for name in self.present_parts:
            getattr(self, name).to(device=device)
        for network in self._networks():
            network.to(dtype=dtype)
        return self

    def save_pretrained(self, folder: str | Path, *, rounded_to: torch.dtype | None = None) -> None:
        """Write the model to `folder` as safetensors and JSON; atomic, an older model there survives a failure.

        Args:
            rounded_to: What networks in float32 are rounded to in the files, torch.float16 or torch.bfloat16, for half of their
                size; read again they are float32. None keeps every bit.

        Wrappers that `saving.unwrapped` knows are left out. A model card goes with it, README.md; one that is there is kept
        unless it was written here.

        Raises:
            ValueError: What would be read back is not the model (see `saving.plain_state`), or no such dtype; nothing is written.
        """
        weights = self._weights()
        if rounded_to is not None:
            if rounded_to not in ROUNDED:
                raise ValueError(f"rounded_to must be torch.float16 or torch.bfloat16, or None, got {rounded_to!r}")
            weights = {name: rounded(state, rounded_to) for name, state in weights.items()}
        rounding = {} if rounded_to is None else {"rounded_to": str(rounded_to).removeprefix("torch.")}
        texts = {"README.md": self._model_card(weights, **rounding)} if may_write(folder) else {}
        named = {"class": type(self).__name__, **self._configs(), "info": self.info, **rounding}
        checkpoints.save_folder(folder, weights, named, texts)

    def save_info(self, folder: str | Path) -> None:
        """Write `info` alone into the folder of this model, whose weights stay as they are.

        Raises:
            FileNotFoundError, ValueError: There is no model, or one of another class or shape.
        """
        config, name = checkpoints.load_config(folder), type(self).__name__
        if config.get("class") != name:
            raise ValueError(f"{folder} holds {contents_of(config)}, not this {name}")
        for part, module in self._plain_parts().items():
            config_class = self.present_parts[part][1]
            if part not in config:
                raise ValueError(f"{folder} holds another {name}: it has no {part}")
            if config_from_dict(config_class, config[part]) != config_class(**config_to_dict(config_class, module.config)):
                raise ValueError(f"{folder} holds another {name}: the shape of its {part} differs")
        checkpoints.replace_config(folder, config | {"info": self.info})

    def _model_card(self, weights: dict[str, dict[str, Tensor]], rounded_to: str = "") -> str:
        modules = self._plain_parts()
        config = cast("Any", modules["vae"]).config
        holds = f", its networks rounded to {rounded_to}" if rounded_to else ""
        files = {f"{name}.safetensors": f"`{name}`{holds}" for name in weights}
        return model_card(
            type(self).__name__,
            self.summary,
            ("multibeta", *self.tags),
            {
                name: (type(part).__name__, sum(map(torch.numel, part.parameters())), dtypes_of(networks_of(part).values()))
                for name, part in modules.items()
            },
            {"config.json": "shapes of the networks, origin"} | files,
            (config.image_channels, config.resolution),
            self.info,
        )

    def _plain_parts(self) -> dict[str, nn.Module]:
        """The parts without the wrappers that `saving.unwrapped` knows."""
        return {name: saving.unwrapped(getattr(self, name)) for name in self.present_parts}

    def _configs(self) -> dict[str, Any]:
        """The config of each part, as JSON takes it."""
        return {name: config_to_dict(self.present_parts[name][1], part.config) for name, part in self._plain_parts().items()}

    def digest(self) -> str:
        """16 hexadecimal digits of all weights and configs: what tells the model from any other, wherever it lies."""
        states = {f"{name}.{key}": value for name, state in self._weights().items() for key, value in state.items()}
        return self._digest_of(self._configs(), states)

    def latent_digest(self) -> str:
        """16 hexadecimal digits of the VAE without the weights of its decoder: of what gives latents their meaning.

        Directions that were found in the latents serve another decoder, denoiser or flow map as well.
        """
        state = self._part_state("vae", self._plain_parts()["vae"])
        states = {key: value for key, value in state.items() if not key.startswith("decoder.")}
        return self._digest_of(self._configs()["vae"], states)

    def _digest_of(self, configs: dict[str, Any], states: dict[str, Tensor]) -> str:
        said = f"{type(self).__name__} {json.dumps(configs, sort_keys=True)} {weights_hash(states)}"
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """File name to state dict, of everything that is saved; `ValueError` for a part that would not be read back as it is."""
        return {name: self._part_state(name, part) for name, part in self._plain_parts().items()}

    def _part_state(self, name: str, part: nn.Module) -> dict[str, Tensor]:
        module, config_class = self.present_parts[name]
        if not isinstance(part, module):
            raise ValueError(f"{name} cannot be saved: it is a {type(part).__name__}, and would be read as a {module.__name__}")
        with torch.device("meta"):
            fresh = module(config_from_dict(config_class, config_to_dict(config_class, part.config)))
        return saving.plain_state(part, fresh, name)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Load a model that `save_pretrained` wrote. A bare name without a folder of that name is one shipped with multibeta.

        Args:
            folder: Of the model, or of a finished run, where the model is in its subfolder model.
            device: Where to.
            dtype: Of the networks; by default each is what it was when it was saved. Learned curves and tables are float32.

        Raises:
            FileNotFoundError, ValueError: What is missing or does not fit, and what to do.
        """
        folder, weights, config = read_pretrained(folder)
        if config.get("class") != cls.__name__:
            raise ValueError(f"{folder} holds {contents_of(config)}, not a {cls.__name__}")
        return cls._assemble(folder, weights, config).to(device, dtype)

    @classmethod
    def _assemble(cls, folder: Path, weights: dict[str, dict[str, Tensor]], config: dict[str, Any]) -> Self:
        """The model from what `checkpoints.load_folder` read in `folder`."""
        there = [*cls.parts, *(name for name in cls.optional_parts if name in weights or name in config)]
        checkpoints.require_entries(folder, weights, config, there, dict.fromkeys(there, dict))
        with checkpoints.naming(folder, f"a {cls.__name__}"):
            if (name := config.get("rounded_to")) is not None:
                weights = {part: as_float32(state, dtype_of(name)) for part, state in weights.items()}
            check_info(config.get("info"))
            parts = {name: cls._part(name, config[name], weights[name], folder) for name in there}
            return cls(**parts, info=config.get("info"))

    @classmethod
    def _part(cls, name: str, values: dict[str, Any], state: dict[str, Tensor], folder: Path) -> nn.Module:
        """The part `name` of a config, with the weights of `state`, in their dtypes."""
        (module, config_class), source = (cls.parts | cls.optional_parts)[name], Path(folder, f"{name}.safetensors")
        config = config_from_dict(config_class, values)
        with torch.device("meta"):  # nothing is allocated for a config that is of other weights
            checkpoints.compare_state(module(config), state, source)
        part = module(config)
        for prefix, network in networks_of(part).items():
            saving.take_dtypes(network, state, f"{prefix}.")
        checkpoints.load_state(part, state, source)
        return part


def read_pretrained(folder: str | Path) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The folder of `resolve_pretrained`, and what `checkpoints.load_folder` reads there."""
    folder = resolve_pretrained(folder)
    weights, config = checkpoints.load_folder(folder)
    if "class" in config:
        checkpoints.require_entries(folder, weights, config, (), {"class": str})
    return folder, weights, config


def contents_of(config: dict[str, Any]) -> str:
    """What a folder of ours holds, by the config that `checkpoints.load_folder` read."""
    if "networks" in config:
        return "networks alone (`multibeta.interop.load_networks` reads them)"
    name = config.get("class", "training checkpoint")
    return f"a {name}" if name else "a model whose class is not said"


def rounded(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict of a part with its networks rounded from float32; learned curves and tables keep every bit."""
    of_network = {name for name, value in state.items() if name.split(".")[0] in NETWORKS and value.dtype == torch.float32}
    return {name: value.to(dtype) if name in of_network else value for name, value in state.items()}


def as_float32(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inverse of `rounded`, but for what rounding took."""
    return {name: value.float() if value.dtype == dtype else value for name, value in state.items()}


def dtype_of(name: object) -> torch.dtype:
    """The dtype of `ROUNDED` of this name; `ValueError` for another."""
    named = {str(dtype).removeprefix("torch."): dtype for dtype in ROUNDED}
    if name not in named:
        raise ValueError(f"rounded_to must be {' or '.join(named)}, got {name!r}")
    return named[cast("str", name)]


def networks_of(part: nn.Module) -> dict[str, nn.Module]:
    """The networks of a part, by name."""
    return {name: getattr(part, name) for name in NETWORKS if hasattr(part, name)}


def dtypes_of(networks: Iterable[nn.Module]) -> str:
    """The dtypes of networks, as text."""
    names = {str(parameter.dtype) for network in networks for parameter in network.parameters()}
    return ", ".join(sorted(name.removeprefix("torch.") for name in names))


def shipped_models() -> Iterator[Path]:
    """Folders of the models that come with the package."""
    yield from sorted(path.parent for path in (Path(__file__).parents[1] / "pretrained").glob("*/config.json"))


def resolve_pretrained(folder: str | Path) -> Path:
    """Where a model lies: in `folder`, or of a finished run in its subfolder model; a bare name may be that of a shipped model.

    Raises:
        FileNotFoundError: A run that has no model yet, or a name that is neither a folder nor a shipped model.
    """
    folder = Path(folder)
    if folder.exists() or len(folder.parts) > 1:
        if checkpoints.exists(folder):
            return folder
        if checkpoints.exists(folder / "model"):
            return folder / "model"
        if (folder / "vae" / "checkpoint").exists():
            advice = "it has no model yet: `multibeta train --resume` goes on with it"
            raise FileNotFoundError(f"{folder} is the folder of a run, {advice}")
        return folder
    shipped = {path.name: path for path in shipped_models()}
    if str(folder) not in shipped:
        raise FileNotFoundError(f"no folder {folder} and no shipped model of that name; shipped: {', '.join(shipped) or 'none'}")
    return shipped[str(folder)]


def config_to_dict(config_class: type, config: Any) -> dict[str, Any]:
    """The fields of a dataclass that a config has, which may be of a subclass with more; the inverse of `config_from_dict`."""
    return {field.name: getattr(config, field.name) for field in fields(config_class)}


def config_from_dict(config_class: type, values: dict[str, Any]) -> Any:
    """A frozen config of a dataclass from its JSON form.

    Raises:
        ValueError: Fields that it has not, or values of another type; names them.
    """
    known = {field.name for field in fields(config_class)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{config_class.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return config_class(**checkpoints.typed(config_class, values))


def compare_parts(said: Mapping[str, tuple[object, object]], parts: str = "VAE and diffusion") -> None:
    """Raise `ValueError` unless two parts say the same: name to (what the first says, what the second says)."""
    differing = [f"{name} is {first} and {second}" for name, (first, second) in said.items() if first != second]
    if differing:
        raise ValueError(f"{parts} do not fit: {', '.join(differing)}")
