"""The verbs of the library on trained models: encode, denoise, decode, generate, manipulate, interpolate, save and load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from multibeta import checkpoints, latents, ops
from multibeta.baselines import VAE
from multibeta.data import to_uint8
from multibeta.inference import Prepared, packs
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig, per_sample
from multibeta.networks import AutoencoderConfig
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusion, sampler_rows
from multibeta.sampling import Callback, Engine, EngineOptions, sample
from multibeta.schedules import SamplerRows, beta_to_step, check_beta, spatial

if TYPE_CHECKING:
    from typing import Self

OUTPUT_TYPES = ("pt", "np", "pil")
INITIAL_STREAM, ENCODER_STREAM = 1, 2


class Pipeline:
    """What the models share: images that are checked, noise that belongs to the sample, saving and loading.

    A model holds each of its `parts`, name to (module, its config), under that name; `vae` is one of them.
    """

    parts: ClassVar[dict[str, tuple[type[nn.Module], type]]]
    info: dict

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.vae.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.vae.parameters()).dtype

    def _networks(self) -> list[nn.Module]:
        """The networks whose dtype may change; learned curves and tables stay float32."""
        return [self.vae.encoder, self.vae.decoder]

    def to(self, device=None, dtype=None) -> Self:
        """Move all parts to `device` and the networks to `dtype`; learned curves and tables stay float32."""
        for name in self.parts:
            getattr(self, name).to(device=device)
        for network in self._networks():
            network.to(dtype=dtype)
        return self

    def _check_images(self, images: Tensor) -> Tensor:
        config = self.vae.config
        wanted = (config.image_channels, config.resolution, config.resolution)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted:
            raise ValueError(f"images must have shape (N, {', '.join(map(str, wanted))}), got {tuple(images.shape)}")
        if images.dtype == torch.uint8 or images.min() < -1.001 or images.max() > 1.001:
            raise ValueError(
                f"images must be floats in [-1, 1], got {images.dtype} from {images.min():.3g} to {images.max():.3g}; "
                "multibeta.data.to_float converts bytes"
            )
        return images.to(self.device, self.dtype)

    def _check_latents(self, latents: Tensor) -> Tensor:
        if tuple(latents.shape[1:]) != self.vae.config.latent_shape:
            raise ValueError(f"latents must have shape (N, *{self.vae.config.latent_shape}), got {tuple(latents.shape)}")
        return latents.to(self.device, self.dtype)

    def _seeds(self, seeds: Sequence[int] | Tensor | None, count: int) -> Tensor:
        seeds = torch.arange(count) if seeds is None else torch.as_tensor(seeds, dtype=torch.int64)
        if seeds.shape != (count,):
            raise ValueError(f"one seed per sample is needed, got {tuple(seeds.shape)} for {count} samples")
        return seeds.to(self.device)

    def _encoder_noise(self, seeds: Sequence[int] | Tensor, mean: Tensor) -> Tensor:
        """eps of the samples of a posterior, (N, c, h, w) like its `mean`."""
        return ops.standard_normal(self._seeds(seeds, len(mean)), 0, mean.shape[1:], stream=ENCODER_STREAM)

    def _seed_batches(self, num_images: int, seed: int, batch_size: int) -> Sequence[Tensor]:
        """The seeds of generated images, from (seed, index) alone, `batch_size` at a time."""
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images and batch_size must be positive, got {num_images} and {batch_size}")
        return ops.sample_seeds(seed, torch.arange(num_images)).to(self.device).split(batch_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model to `folder` as safetensors and JSON; atomic, an older model there survives a failure."""
        configs = {name: config_to_dict(kind, getattr(self, name).config) for name, (_, kind) in self.parts.items()}
        weights = {name: getattr(self, name).state_dict() for name in self.parts}
        checkpoints.save_folder(folder, weights, {"class": type(self).__name__, **configs, "info": self.info})

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Load a model that `save_pretrained` wrote. A bare name without a folder of that name is one shipped with multibeta.

        Raises:
            FileNotFoundError, ValueError: What is missing or does not fit, and what to do.
        """
        folder = resolve_pretrained(folder)
        weights, config = checkpoints.load_folder(folder)
        if config.get("class") != cls.__name__:
            raise ValueError(f"{folder} holds a {config.get('class', 'training checkpoint')}, not a {cls.__name__}")
        return cls._assemble(folder, weights, config).to(device, dtype)

    @classmethod
    def _assemble(cls, folder: Path, weights: dict, config: dict) -> Self:
        """The model from what `checkpoints.load_folder` read in `folder`."""
        parts = {name: module(config_from_dict(kind, config[name])) for name, (module, kind) in cls.parts.items()}
        for name, part in parts.items():
            checkpoints.load_state(part, weights[name], f"{folder}/{name}.safetensors")
        return cls(**parts, info=config.get("info"))


class DenoisingMultiBetaVAE(Pipeline):
    """A `MultiBetaVAE` and the `NonlinearDiffusion` over its latents, as one model.

        image --encode(beta)--> latent z_beta --denoise(beta -> 0)--> latent z_0 --decode(beta=0)--> image

    Images are float (N, C, H, W) in [-1, 1]; beta is in [0, 1].

    Args:
        vae, diffusion: Trained, on one device.
        info: Where the model comes from (recipe, command, figures); saved with it.
        engine_options: How the reverse process runs: see `sampling.EngineOptions`. Under `multibeta.backend("reference")` it
            is the plain loop in the dtype of the weights instead.
    """

    parts: ClassVar = {"vae": (MultiBetaVAE, VAEConfig), "diffusion": (NonlinearDiffusion, DiffusionConfig)}

    def __init__(
        self,
        vae: MultiBetaVAE,
        diffusion: NonlinearDiffusion,
        info: dict | None = None,
        engine_options: EngineOptions | None = None,
    ):
        expected = (diffusion.config.latent_channels, diffusion.config.latent_resolution)
        if vae.config.latent_shape[:2] != expected or vae.config.num_steps != diffusion.config.num_steps:
            raise ValueError(
                f"VAE and diffusion do not fit: latents {vae.config.latent_shape} on {vae.config.num_steps} steps, "
                f"diffusion on {expected} and {diffusion.config.num_steps} steps"
            )
        self.vae, self.diffusion = vae.eval().requires_grad_(False), diffusion.eval().requires_grad_(False)
        self.info = info or {}
        self._accelerate(engine_options)

    @property
    def num_steps(self) -> int:
        """Grid steps N between beta = 0 and beta = 1."""
        return self.vae.config.num_steps

    def _networks(self) -> list[nn.Module]:
        return [*super()._networks(), self.diffusion.unet]

    def to(self, device=None, dtype=None) -> Self:
        super().to(device, dtype)
        self._accelerate(self.engine.options)
        return self

    def _accelerate(self, engine_options: EngineOptions | None) -> None:
        self.engine = Engine(self.diffusion.unet, engine_options)
        self._decoder = Prepared(self.vae.decoder, self.dtype, pack=packs(self.device))

    @torch.no_grad()
    def encode(self, images: Tensor, beta: float, *, seeds: Sequence[int] | Tensor | None = None) -> Tensor:
        """Latents of images at beta.

        Args:
            images: (N, C, H, W).
            beta: In [0, 1].
            seeds: None for the mean f(x, beta); one integer per image for a sample f(x, beta) + sigma(beta) eps of MultiBeta
                Eq. 13, whose noise belongs to the seed.

        Returns:
            (N, c, h, w), float32.
        """
        mean = self.vae.encode(self._check_images(images), beta).float()
        if seeds is None:
            return mean
        sigma = self.vae.sigma(torch.tensor([float(beta)], device=self.device))
        return mean + spatial(sigma) * self._encoder_noise(seeds, mean)

    @torch.no_grad()
    def decode(self, latents: Tensor, beta: float = 0.0) -> Tensor:
        """Images of latents (N, c, h, w) at beta, (N, C, H, W) float32 in [-1, 1]."""
        latents = self._check_latents(latents)
        reference = ops.current_backend() == "reference"
        decoder = self.vae.decoder if reference else self._decoder
        return decoder(latents, per_sample(beta, latents)).float().clamp(-1, 1)

    def denoise(
        self,
        latents: Tensor,
        beta: float,
        sampler: str = "ode",
        steps: int = 50,
        seeds: Sequence[int] | Tensor | None = None,
        *,
        callback: Callback | None = None,
    ) -> Tensor:
        """Latents at beta = 0 from latents at `beta`, by the reverse process (MultiBeta Algorithm 2 and its mended forms).

        Args:
            latents: z_beta, (N, c, h, w).
            beta: In [0, 1]; 0 returns the latents as they are.
            sampler: See `nonlinear_diffusion.sampler_rows`.
            steps: Steps taken, at most the grid steps from beta to 0; a beta close to 0 takes as many as there are.
            seeds: One integer per sample for samplers that draw noise; by default 0, 1, 2 ...
            callback: See `sampling.sample`.
        """
        check_beta(beta)
        if steps > self.num_steps:
            raise ValueError(f"steps must lie between 1 and {self.num_steps}, the steps of the grid, got {steps}")
        start = beta_to_step(beta, self.num_steps, self.vae.config.schedule)
        rows = sampler_rows(self.diffusion.sigmas, sampler, min(steps, max(start, 1)), start=start)
        return self._walk(rows, latents.to(self.device), self._seeds(seeds, len(latents)), callback)

    def invert(self, latents: Tensor, sampler: str = "ode2", steps: int = 50) -> Tensor:
        """Noise at beta = 1 that the deterministic sampler takes to `latents` at beta = 0: the ODE backwards."""
        rows = sampler_rows(self.diffusion.sigmas, sampler, steps, start=0, stop=self.num_steps)
        return self._walk(rows, latents.to(self.device), self._seeds(None, len(latents)))

    def _walk(self, rows: SamplerRows, initial: Tensor, seeds: Tensor, callback: Callback | None = None) -> Tensor:
        """The reverse process from `initial`: by the engine, or by the plain loop under the "reference" backend."""
        if ops.current_backend() == "reference":
            return sample(self.diffusion.predict, rows, initial, seeds, callback=callback)
        times = rows.steps * (1000 / self.num_steps)
        return self.engine.sample(rows, self.diffusion.head_rows(rows.steps), times, initial, seeds, callback=callback)

    @torch.no_grad()
    def generate(
        self,
        num_images: int,
        sampler: str = "ode2",
        steps: int = 20,
        seed: int = 0,
        batch_size: int = 64,
        output_type: str = "pt",
        callback: Callback | None = None,
        *,
        delta_sign: int = 1,
    ):
        """New images from noise at beta = 1.

        Image i depends on (seed, i) alone, not on `num_images` or `batch_size`.

        Args:
            sampler, steps: See `nonlinear_diffusion.sampler_rows`.
            output_type: "pt" (N, C, H, W) float in [-1, 1], "np" (N, H, W, C) float32 in [0, 1], "pil" a list of images.
            callback: Called with (evaluations done, evaluations in total over all batches, latent).
            delta_sign: See `nonlinear_diffusion.sampler_rows`.
        """
        walk = {"callback": callback, "delta_sign": delta_sign}
        return gather(self.generate_batches(num_images, sampler, steps, seed, batch_size, **walk), output_type)

    @torch.no_grad()
    def generate_batches(
        self,
        num_images: int,
        sampler: str = "ode2",
        steps: int = 20,
        seed: int = 0,
        batch_size: int = 64,
        *,
        callback: Callback | None = None,
        delta_sign: int = 1,
    ) -> Iterator[Tensor]:
        """The images of `generate` as they are made, (n, C, H, W) each: memory holds one batch, however many are asked for."""
        rows = sampler_rows(self.diffusion.sigmas, sampler, steps, delta_sign=delta_sign)
        batches = self._seed_batches(num_images, seed, batch_size)
        for index, chunk in enumerate(batches):
            noise = ops.standard_normal(chunk, self.num_steps, self.vae.config.latent_shape, stream=INITIAL_STREAM)
            shifted = _shift_progress(callback, index * len(rows), len(batches) * len(rows))
            yield self.decode(self._walk(rows, self.diffusion.initial(noise), chunk, shifted))

    def manipulate(
        self,
        images: Tensor,
        direction: Tensor,
        strength: float | Tensor,
        beta: float,
        *,
        sampler: str = "ode",
        steps: int = 50,
    ) -> Tensor:
        """Images edited along a latent direction (MultiBeta Algorithm 4): encode at beta, move, denoise to 0, decode.

        Args:
            images: (N, C, H, W).
            direction: (c, h, w), for instance from `principal_directions`.
            strength: alpha, a number or (N,).

        The mean f(x, beta) is moved, as the algorithm prints, not a sample around it: the mean keeps much more of the input
        and comes back as sharp (`evaluation.headline` measures both). For variations of an image denoise samples instead:
        `encode` with seeds.
        """
        encoded = self.encode(images, beta)
        moved = latents.manipulate(encoded, direction.to(encoded), strength)
        return self.decode(self.denoise(moved, beta, sampler, steps))

    def interpolate(
        self,
        first: Tensor,
        second: Tensor,
        weights: float | Sequence[float],
        beta: float,
        dims: Sequence[int] | None = None,
        *,
        sampler: str = "ode",
        steps: int = 50,
    ) -> Tensor:
        """Images between two (MultiBeta Algorithm 5): slerp of the encodings at beta, denoised to 0 and decoded.

        Args:
            first, second: (N, C, H, W).
            weights: One number, or K numbers for K images per pair; 0 is `first`, 1 is `second`.
            dims: Latent channels to interpolate; None for all.

        Returns:
            (N, C, H, W) for one weight, (N, K, C, H, W) for a sequence.
        """
        if first.shape != second.shape:
            raise ValueError(f"pairs must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
        ends = [self.encode(images, beta) for images in (first, second)]
        single = isinstance(weights, int | float)
        between = [latents.interpolate(*ends, float(weight), dims) for weight in ([weights] if single else weights)]
        mixed = torch.stack(between, dim=1)
        decoded = self.decode(self.denoise(mixed.flatten(0, 1), beta, sampler, steps))
        return decoded if single else decoded.unflatten(0, mixed.shape[:2])

    def principal_directions(self, images: Tensor, beta: float, num_directions: int | None = None):
        """PCA of the encodings of `images` at beta: see `latents.principal_directions`."""
        encodings = torch.cat([self.encode(chunk, beta) for chunk in images.split(256)])
        return latents.principal_directions(encodings, num_directions)


class BaselineVAE(Pipeline):
    """A VAE of `multibeta.baselines`, whichever objective trained it, with the verbs of the house.

    It has one representation: `beta` is there so that tools may call all models alike, and is None.

    Args:
        vae: Trained.
        info: Where the model comes from (method, recipe, command); saved with it.
    """

    parts: ClassVar = {"vae": (VAE, AutoencoderConfig)}

    def __init__(self, vae: VAE, info: dict | None = None):
        self.vae = vae.eval().requires_grad_(False)
        self.info = info or {}

    @torch.no_grad()
    def encode(self, images: Tensor, beta: None = None, *, seeds: Sequence[int] | Tensor | None = None) -> Tensor:
        """Latents of images (N, C, H, W), (N, c, h, w) float32: the mean of q(z|x), or with one seed per image a sample of it.

        Raises:
            ValueError: Images of another kind, or a beta, which this model does not have.
        """
        self._refuse(beta)
        posterior = self.vae.posterior(self._check_images(images))
        return posterior.mean if seeds is None else posterior.mean + posterior.stddev * self._encoder_noise(seeds, posterior.mean)

    @torch.no_grad()
    def decode(self, latents: Tensor, beta: None = None) -> Tensor:
        """Mean images of latents (N, c, h, w), (N, C, H, W) float32 in [-1, 1]."""
        self._refuse(beta)
        return self.vae.decode(self._check_latents(latents))

    def generate(self, num_images: int, seed: int = 0, batch_size: int = 64, output_type: str = "pt"):
        """New images: decoded noise of the prior. Arguments and result as of `DenoisingMultiBetaVAE.generate`."""
        return gather(self.generate_batches(num_images, seed, batch_size), output_type)

    @torch.no_grad()
    def generate_batches(self, num_images: int, seed: int = 0, batch_size: int = 64) -> Iterator[Tensor]:
        """The images of `generate` as they are made, (n, C, H, W) each."""
        for chunk in self._seed_batches(num_images, seed, batch_size):
            yield self.decode(ops.standard_normal(chunk, 0, self.vae.config.latent_shape, stream=INITIAL_STREAM))

    def _refuse(self, beta: None) -> None:
        if beta is not None:
            raise ValueError(f"a {type(self).__name__} has one representation and takes no beta, got {beta}")


PIPELINES: dict[str, type[Pipeline]] = {kind.__name__: kind for kind in (DenoisingMultiBetaVAE, BaselineVAE)}


def load_pretrained(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> DenoisingMultiBetaVAE | BaselineVAE:
    """Load a saved model of any class; see `DenoisingMultiBetaVAE.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: What is missing or does not fit; of an unknown class, the classes there are.
    """
    folder = resolve_pretrained(folder)
    weights, config = checkpoints.load_folder(folder)
    found = config.get("class", "training checkpoint")
    if found not in PIPELINES:
        raise ValueError(f"{folder} holds a {found}, which is none of the models known here: {', '.join(PIPELINES)}")
    return PIPELINES[found]._assemble(folder, weights, config).to(device, dtype)


def shipped_models() -> Iterator[Path]:
    """Folders of the models that come with the package."""
    yield from sorted(path.parent for path in (Path(__file__).parent / "pretrained").glob("*/config.json"))


def resolve_pretrained(folder: str | Path) -> Path:
    """`folder` itself where it exists, else the shipped model of that name."""
    folder = Path(folder)
    if folder.exists() or len(folder.parts) > 1:
        return folder
    shipped = {path.name: path for path in shipped_models()}
    if str(folder) not in shipped:
        raise FileNotFoundError(f"no folder {folder} and no shipped model of that name; shipped: {', '.join(shipped) or 'none'}")
    return shipped[str(folder)]


def config_to_dict(kind: type, config) -> dict:
    """The fields of dataclass `kind` of a config, which may be of a subclass with more; the inverse of `config_from_dict`."""
    return {field.name: getattr(config, field.name) for field in fields(kind)}


def config_from_dict(kind: type, values: dict):
    """A frozen config of dataclass `kind` from its JSON form; unknown fields are a `ValueError` that names them."""
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def gather(batches: Iterator[Tensor], output_type: str):
    """Generated batches as one output: see `DenoisingMultiBetaVAE.generate`."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    return convert_output(torch.cat(list(batches)), output_type)


def convert_output(images: Tensor, output_type: str):
    """Images (N, C, H, W) in [-1, 1] as "pt", "np" or "pil": see `DenoisingMultiBetaVAE.generate`."""
    if output_type == "pt":
        return images
    channels_last = images.permute(0, 2, 3, 1).cpu()
    if output_type == "np":
        return ((channels_last + 1) / 2).numpy()
    from PIL import Image

    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in to_uint8(channels_last).numpy()]


def _shift_progress(callback: Callback | None, before: int, total: int) -> Callback | None:
    if callback is None:
        return None
    return lambda done, _, latent: callback(before + done, total, latent)
