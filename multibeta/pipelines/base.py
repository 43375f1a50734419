"""What all models share: images that are checked, noise that belongs to the sample, saving and loading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from multibeta import checkpoints, ops, saving
from multibeta.blocks import input_dtype
from multibeta.checks import FLOAT_NAMES, FLOATS, check_dense, check_real, is_integer
from multibeta.inference import why_not_prepared
from multibeta.pipelines.generation import choose_seed
from multibeta.pipelines.model_cards import may_write, model_card
from multibeta.sampling import check_latents
from multibeta.seeds import as_seeds
from multibeta.weights import shorten

if TYPE_CHECKING:
    from typing import Self

NETWORKS = ("encoder", "decoder", "unet")  # of a part: their dtype may change; learned curves and tables stay float32
INITIAL_STREAM, ENCODER_STREAM, MIXTURE_STREAM = 1, 2, 3


class Pipeline:
    """What the models share: images that are checked, noise that belongs to the sample, saving and loading.

    A model holds each of its `parts`, name to (module, its config), under that name; `vae` is one of them. `summary` and `tags`
    are for its model card.
    """

    parts: ClassVar[dict[str, tuple[type[nn.Module], type]]]
    summary: ClassVar[str]
    tags: ClassVar[tuple[str, ...]]
    info: dict
    _progress: dict = {"disable": True}  # noqa: RUF012, replaced and never changed

    def __repr__(self) -> str:
        config = self.vae.config
        image, latent = (config.image_channels, config.resolution, config.resolution), tuple(config.latent_shape)
        count = sum(weight.numel() for name in self.parts for weight in getattr(self, name).parameters())
        kind = f"{type(self).__name__}(images {image}, latents {latent}"
        dtypes = dtypes_of(self._networks()) or str(self.dtype).removeprefix("torch.")
        return f"{kind}, {count:,} parameters, {dtypes} on {self.device})"

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.vae.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, where networks differ of the first: each computes in its own, see `blocks.input_dtype`."""
        return next(self.vae.parameters()).dtype

    @classmethod
    def _require_parts(cls, info: dict | None, **parts: nn.Module) -> None:
        """`TypeError` unless each part can stand for the module of its name, wrapped or not, and `info` is a dict."""
        for name, part in parts.items():
            module, kind = cls.parts[name]
            config = getattr(part, "config", None)
            verbs = [verb for verb, function in vars(module).items() if callable(function) and not verb.startswith("_")]
            lacking = [verb for verb in verbs if not hasattr(part, verb)]
            lacking += [f"config.{field.name}" for field in fields(kind) if not hasattr(config, field.name)]
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
        return [network for name in self.parts for network in networks_of(getattr(self, name)).values()]

    def to(self, device=None, dtype=None) -> Self:
        """Move all parts to `device` and the networks to `dtype`, or either alone; learned curves and tables stay float32."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for name in self.parts:
            getattr(self, name).to(device=device)
        for network in self._networks():
            network.to(dtype=dtype)
        return self

    def _walks_plainly(self) -> bool:
        """Whether the reverse process is the plain loop: it was asked for, or the network must be called itself."""
        return ops.current_backend() == "reference" or why_not_prepared(self.diffusion.unet) is not None

    def _check_images(self, images: Tensor) -> Tensor:
        """The images, where the model is and in the dtype of the encoder."""
        self._require_images(images)
        return images.to(self.device, input_dtype(self.vae.encoder))

    def _require_images(self, images: Tensor) -> None:
        config = self.vae.config
        wanted = (config.image_channels, config.resolution, config.resolution)
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor (N, {', '.join(map(str, wanted))}), got {type(images).__name__}")
        check_dense("images", images)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted:
            raise ValueError(f"images must have shape (N, {', '.join(map(str, wanted))}), got {tuple(images.shape)}")
        if images.dtype not in FLOATS:
            raise ValueError(
                f"images must be floats in [-1, 1], got {images.dtype} (possible are {FLOAT_NAMES}); "
                "multibeta.data.to_float converts bytes"
            )
        if len(images) and not (images.abs() <= 1.001).all():
            raise ValueError(
                f"images must be floats in [-1, 1], got {images.dtype} from {images.min():.3g} to {images.max():.3g}; "
                "multibeta.data.to_float converts bytes"
            )

    def _check_latents(self, latents: Tensor) -> Tensor:
        """The latents, where the model is; in their own dtype."""
        check_latents(latents, self.vae.config.latent_shape)
        return latents.to(self.device)

    def _seeds(self, seeds: Sequence[int] | Tensor | None, count: int) -> Tensor:
        seeds = torch.arange(count) if seeds is None else as_seeds(seeds)
        if seeds.shape != (count,):
            raise ValueError(f"one seed per sample is needed, got {tuple(seeds.shape)} for {count} samples")
        return seeds.to(self.device)

    def _encoder_noise(self, seeds: Sequence[int] | Tensor, mean: Tensor) -> Tensor:
        """eps of the samples of a posterior, (N, c, h, w) like its `mean`."""
        return ops.standard_normal(self._seeds(seeds, len(mean)), 0, mean.shape[1:], stream=ENCODER_STREAM)

    def _seed_batches(self, num_images: int, seed: int, batch_size: int, generator: torch.Generator | None) -> Sequence[Tensor]:
        """The seeds of generated images, from (seed, index) alone, `batch_size` at a time."""
        if not (is_integer(num_images) and is_integer(batch_size)):
            raise ValueError(f"num_images and batch_size must be integers, got {num_images!r} and {batch_size!r}")
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images and batch_size must be positive, got {num_images} and {batch_size}")
        seed = choose_seed(seed, generator)
        return ops.sample_seeds(seed, torch.arange(num_images)).to(self.device).split(batch_size)

    def set_progress_bar_config(self, **options) -> None:
        """Show a progress bar in `generate`, with these options of tqdm. None is shown before, nor with `disable=True`."""
        self._progress = options

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model to `folder` as safetensors and JSON; atomic, an older model there survives a failure.

        Wrappers that `saving.unwrapped` knows are left out. A model card goes with it, README.md; one that is there is kept
        unless it was written here.

        Raises:
            ValueError: What would be read back is not the model (see `saving.plain_state`); nothing is written.
        """
        weights = self._weights()
        configs = {name: config_to_dict(self.parts[name][1], part.config) for name, part in self._plain_parts().items()}
        texts = {"README.md": self._model_card(weights)} if may_write(folder) else {}
        checkpoints.save_folder(folder, weights, {"class": type(self).__name__, **configs, "info": self.info}, texts)

    def _model_card(self, weights: dict[str, dict[str, Tensor]]) -> str:
        modules = self._plain_parts()
        files = {"config.json": "shapes of the networks, origin"} | {f"{name}.safetensors": f"`{name}`" for name in weights}
        return model_card(
            type(self).__name__,
            self.summary,
            ("multibeta", *self.tags),
            {
                name: (type(part).__name__, sum(map(torch.numel, part.parameters())), dtypes_of(networks_of(part).values()))
                for name, part in modules.items()
            },
            files,
            (modules["vae"].config.image_channels, modules["vae"].config.resolution),
            self.info,
        )

    def _plain_parts(self) -> dict[str, nn.Module]:
        """The parts without the wrappers that `saving.unwrapped` knows."""
        return {name: saving.unwrapped(getattr(self, name)) for name in self.parts}

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """File name to state dict, of everything that is saved; `ValueError` for a part that would not be read back as it is."""
        states = {}
        for name, part in self._plain_parts().items():
            module, kind = self.parts[name]
            if not isinstance(part, module):
                raise ValueError(
                    f"{name} cannot be saved: it is a {type(part).__name__}, and would be read as a {module.__name__}"
                )
            with torch.device("meta"):
                fresh = module(config_from_dict(kind, config_to_dict(kind, part.config)))
            states[name] = saving.plain_state(part, fresh, name)
        return states

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Load a model that `save_pretrained` wrote. A bare name without a folder of that name is one shipped with multibeta.

        Args:
            device: Where to.
            dtype: Of the networks; by default each is what it was when it was saved. Learned curves and tables are float32.

        Raises:
            FileNotFoundError, ValueError: What is missing or does not fit, and what to do.
        """
        folder, weights, config = read_pretrained(folder)
        if config.get("class") != cls.__name__:
            raise ValueError(f"{folder} holds {held(config)}, not a {cls.__name__}")
        return cls._assemble(folder, weights, config).to(device, dtype)

    @classmethod
    def _assemble(cls, folder: Path, weights: dict, config: dict) -> Self:
        """The model from what `checkpoints.load_folder` read in `folder`."""
        checkpoints.require_entries(folder, weights, config, cls.parts, dict.fromkeys(cls.parts, dict))
        with checkpoints.naming(folder, f"a {cls.__name__}"):
            parts = {name: cls._part(name, config[name], weights[name], folder) for name in cls.parts}
            return cls(**parts, info=config.get("info"))

    @classmethod
    def _part(cls, name: str, values: dict, state: dict[str, Tensor], folder: Path) -> nn.Module:
        """The part `name` of a config, with the weights of `state`, in their dtypes."""
        (module, kind), source = cls.parts[name], Path(folder, f"{name}.safetensors")
        config = config_from_dict(kind, values)
        with torch.device("meta"):  # nothing is allocated for a config that is of other weights
            checkpoints.compare_state(module(config), state, source)
        part = module(config)
        for prefix, network in networks_of(part).items():
            saving.take_dtypes(network, state, f"{prefix}.")
        checkpoints.load_state(part, state, source)
        return part


def read_pretrained(folder: str | Path) -> tuple[Path, dict, dict]:
    """The folder of `resolve_pretrained`, and what `checkpoints.load_folder` reads there."""
    folder = resolve_pretrained(folder)
    weights, config = checkpoints.load_folder(folder)
    if "class" in config:
        checkpoints.require_entries(folder, weights, config, (), {"class": str})
    return folder, weights, config


def held(config: dict) -> str:
    """What a folder of ours holds, by the config that `checkpoints.load_folder` read."""
    if "networks" in config:
        return "networks alone (`multibeta.interop.load_networks` reads them)"
    return f"a {config.get('class', 'training checkpoint')}"


def networks_of(part: nn.Module) -> dict[str, nn.Module]:
    """The networks of a part, by name."""
    return {name: getattr(part, name) for name in NETWORKS if hasattr(part, name)}


def dtypes_of(networks: Iterable[nn.Module]) -> str:
    """The dtypes of networks, as text."""
    found = {str(parameter.dtype) for network in networks for parameter in network.parameters()}
    return ", ".join(sorted(name.removeprefix("torch.") for name in found))


def shipped_models() -> Iterator[Path]:
    """Folders of the models that come with the package."""
    yield from sorted(path.parent for path in (Path(__file__).parents[1] / "pretrained").glob("*/config.json"))


def resolve_pretrained(folder: str | Path) -> Path:
    """`folder` itself where it exists, else the shipped model of that name."""
    folder = Path(folder)
    if folder.exists() or len(folder.parts) > 1:
        if not checkpoints.exists(folder) and (folder / "vae" / "checkpoint").exists():
            run, there = folder / "model", checkpoints.exists(folder / "model")
            advice = f"its model is {run}" if there else "it has no model yet: `multibeta train --resume` goes on with it"
            raise FileNotFoundError(f"{folder} is the folder of a run, {advice}")
        return folder
    shipped = {path.name: path for path in shipped_models()}
    if str(folder) not in shipped:
        raise FileNotFoundError(f"no folder {folder} and no shipped model of that name; shipped: {', '.join(shipped) or 'none'}")
    return shipped[str(folder)]


def config_to_dict(kind: type, config) -> dict:
    """The fields of dataclass `kind` of a config, which may be of a subclass with more; the inverse of `config_from_dict`."""
    return {field.name: getattr(config, field.name) for field in fields(kind)}


def config_from_dict(kind: type, values: dict):
    """A frozen config of dataclass `kind` from its JSON form.

    Raises:
        ValueError: Fields that it has not, or values of another type; names them.
    """
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return kind(**checkpoints.typed(kind, values))


def along(weights: float | Sequence[float], point: Callable[[float], Tensor], finish: Callable[[Tensor], Tensor]) -> Tensor:
    """Images of a path: `finish` of what `point` gives at each weight, all as one batch.

    Returns:
        (N, C, H, W) for one weight, (N, K, C, H, W) for a sequence of K.
    """
    try:
        each = torch.as_tensor(weights)
    except (TypeError, ValueError, RuntimeError):
        each = None
    if each is not None:
        check_real("weights", each)
        each = each.double()
    if each is None or each.dim() > 1 or not each.numel() or not each.isfinite().all():
        raise ValueError(f"weights must be a finite number or a sequence of them, got {weights!r}")
    path = torch.stack([point(weight) for weight in each.view(-1).tolist()], dim=1)
    finished = finish(path.flatten(0, 1))
    return finished if each.dim() == 0 else finished.unflatten(0, path.shape[:2])


def compare_parts(said: dict[str, tuple[object, object]]) -> None:
    """Raise `ValueError` unless VAE and diffusion say the same: name to (what the VAE says, what the diffusion says)."""
    differing = [f"{name} is {vae} and {diffusion}" for name, (vae, diffusion) in said.items() if vae != diffusion]
    if differing:
        raise ValueError(f"VAE and diffusion do not fit: {', '.join(differing)}")
