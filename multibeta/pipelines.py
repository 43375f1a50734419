"""The verbs of the library on trained models: encode, denoise, decode, generate, manipulate, interpolate, save and load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from multibeta import checkpoints, diffusion_vae, latents, ops
from multibeta.baselines import VAE
from multibeta.data import to_uint8
from multibeta.diffusion_vae import CapacityVAE, ConditionalDiffusion, ConditionalDiffusionConfig
from multibeta.inference import Prepared, packs
from multibeta.latents import LatentMixture
from multibeta.metrics.streaming import image_batches
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig, per_sample
from multibeta.networks import AutoencoderConfig, BlockAutoencoderConfig
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusion, sampler_rows
from multibeta.sampling import Callback, Engine, EngineOptions, sample
from multibeta.schedules import SamplerRows, beta_to_step, check_beta, spatial

if TYPE_CHECKING:
    from typing import Self

OUTPUT_TYPES = ("pt", "np", "pil")
INITIAL_STREAM, ENCODER_STREAM, MIXTURE_STREAM = 1, 2, 3


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
        checkpoints.save_folder(folder, self._weights(), {"class": type(self).__name__, **configs, "info": self.info})

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """File name to state dict, of everything that is saved."""
        return {name: getattr(self, name).state_dict() for name in self.parts}

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
            counted = _count_over_batches(callback, index, len(batches))
            yield self.decode(self._walk(rows, self.diffusion.initial(noise), chunk, counted))

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
        return along(
            weights,
            lambda weight: latents.interpolate(*ends, weight, dims),
            lambda mixed: self.decode(self.denoise(mixed, beta, sampler, steps)),
        )

    def principal_directions(self, images: Tensor, beta: float, num_directions: int | None = None):
        """PCA of the encodings of `images` at beta: see `latents.principal_directions`."""
        encodings = torch.cat([self.encode(chunk, beta) for chunk in images.split(256)])
        return latents.principal_directions(encodings, num_directions)


class VAEPipeline(Pipeline):
    """What models of one representation share, whose VAE has a posterior q(z|x) and the prior N(0, I).

    `beta` is there so that tools may call all models alike, and is None.
    """

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

    def draw_latents(self, seeds: Sequence[int] | Tensor) -> Tensor:
        """New latents of the prior N(0, I), one for each seed, (N, c, h, w)."""
        return ops.standard_normal(self._seeds(seeds, len(seeds)), 0, self.vae.config.latent_shape, stream=INITIAL_STREAM)

    def _refuse(self, beta: None) -> None:
        if beta is not None:
            raise ValueError(f"a {type(self).__name__} has one representation and takes no beta, got {beta}")


class BaselineVAE(VAEPipeline):
    """A VAE of `multibeta.baselines`, whichever objective trained it, with the verbs of the house.

    Args:
        vae: Trained.
        info: Where the model comes from (method, recipe, command); saved with it.
    """

    parts: ClassVar = {"vae": (VAE, AutoencoderConfig)}

    def __init__(self, vae: VAE, info: dict | None = None):
        self.vae = vae.eval().requires_grad_(False)
        self.info = info or {}

    def generate(self, num_images: int, seed: int = 0, batch_size: int = 64, output_type: str = "pt"):
        """New images: decoded noise of the prior. Arguments and result as of `DenoisingMultiBetaVAE.generate`."""
        return gather(self.generate_batches(num_images, seed, batch_size), output_type)

    @torch.no_grad()
    def generate_batches(self, num_images: int, seed: int = 0, batch_size: int = 64) -> Iterator[Tensor]:
        """The images of `generate` as they are made, (n, C, H, W) each."""
        for chunk in self._seed_batches(num_images, seed, batch_size):
            yield self.decode(self.draw_latents(chunk))


class DiffusionVAE(VAEPipeline):
    """A `CapacityVAE` that sketches and a `ConditionalDiffusion` that refines the sketch, as one model.

        image --encode--> latent z --decode--> reconstruction x_hat --denoise--> image

    Images and reconstructions are float (N, C, H, W) in [-1, 1]. Methods that end in `denoise` pass its keyword arguments on as
    `walk`.

    Args:
        vae, diffusion: Trained, on one device.
        info: Where the model comes from (recipe, command, figures); saved with it.
        mixture: Where new latents come from in place of the prior: see `fit_latents`.
        engine_options: As for `DenoisingMultiBetaVAE`.
    """

    parts: ClassVar = {
        "vae": (CapacityVAE, BlockAutoencoderConfig),
        "diffusion": (ConditionalDiffusion, ConditionalDiffusionConfig),
    }

    def __init__(
        self,
        vae: CapacityVAE,
        diffusion: ConditionalDiffusion,
        info: dict | None = None,
        mixture: LatentMixture | None = None,
        engine_options: EngineOptions | None = None,
    ):
        sizes = [(part.config.image_channels, part.config.resolution) for part in (vae, diffusion)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                "VAE and diffusion do not fit: images of {} channels and {} pixels, and of {} and {}".format(*sizes[0], *sizes[1])
            )
        self.vae, self.diffusion = vae.eval().requires_grad_(False), diffusion.eval().requires_grad_(False)
        self.info, self.mixture = info or {}, mixture
        self.engine = Engine(self.diffusion.unet, engine_options)

    @property
    def num_steps(self) -> int:
        """Steps T of the forward process."""
        return self.diffusion.config.num_steps

    def _networks(self) -> list[nn.Module]:
        return [*super()._networks(), self.diffusion.unet]

    def to(self, device=None, dtype=None) -> Self:
        super().to(device, dtype)
        self.engine = Engine(self.diffusion.unet, self.engine.options)
        if self.mixture is not None:
            self.mixture.to(device=device)
        return self

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        return super()._weights() | ({} if self.mixture is None else {"mixture": self.mixture.state_dict()})

    @classmethod
    def _assemble(cls, folder: Path, weights: dict, config: dict) -> Self:
        model = super()._assemble(folder, weights, config)
        if "mixture" in weights:
            model.mixture = LatentMixture(**weights["mixture"])
        return model

    @torch.no_grad()
    def denoise(
        self,
        reconstructions: Tensor,
        sampler: str = "ddim",
        steps: int = 100,
        seeds: Sequence[int] | Tensor | None = None,
        *,
        spacing: str = "quad",
        eta: float = 0.0,
        variance: str = "fixedsmall",
        guidance: float = 0.0,
        temperature: float = 1.0,
        shared_noise: bool = False,
        noise: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Images of reconstructions x_hat, by the reverse process given x_hat; the defaults are the published ones.

        Args:
            reconstructions: What `decode` gives, (N, C, H, W).
            sampler, steps, spacing, eta, variance: See `diffusion_vae.sampler_rows`.
            seeds: One integer per sample, whose noise depends on nothing else; by default 0, 1, 2 ...
            guidance: See `ConditionalDiffusion.predictor`.
            temperature: Of the noise that the walk starts from.
            shared_noise: All samples take the noise of the first seed, at the start and at every step (section 4.2, Fig. 7).
            noise: What the walk starts from, (N, C, H, W), in place of the noise of the seeds.
            callback: See `sampling.sample`.

        Returns:
            (N, C, H, W) float32 in [-1, 1].
        """
        self._check_images(reconstructions)
        reconstructions, process = reconstructions.to(self.device, torch.float32), self.diffusion.process
        seeds = self._noise_seeds(seeds, len(reconstructions), shared_noise)
        schedule = {"spacing": spacing, "eta": eta, "variance": variance}
        rows = diffusion_vae.sampler_rows(process.alpha_bars, sampler, steps, **schedule)
        noise = self._initial_noise(seeds) if noise is None else noise.to(reconstructions)
        residual = self._walk(rows, reconstructions, process.prior(noise, temperature), seeds, guidance, callback)
        return process.image(residual, reconstructions).clamp(-1, 1)

    def _walk(
        self,
        rows: SamplerRows,
        reconstructions: Tensor,
        initial: Tensor,
        seeds: Tensor,
        guidance: float,
        callback: Callback | None,
    ) -> Tensor:
        """The reverse process from r_T = `initial`, given x_hat, to r_0: by the engine, or plainly under "reference"."""
        predict = self.diffusion.predictor(reconstructions, guidance=guidance)
        if ops.current_backend() == "reference":
            return sample(predict, rows, initial, seeds, callback=callback)
        tables = rows, self.diffusion.head_rows(rows.steps), rows.steps
        condition = reconstructions if self.diffusion.config.conditional else None
        guided = self.diffusion.guidance_rows(rows.steps, guidance) if guidance else None
        return self.engine.sample(*tables, initial, seeds, condition=condition, guidance_rows=guided, callback=callback)

    def _noise_seeds(self, seeds: Sequence[int] | Tensor | None, count: int, shared: bool) -> Tensor:
        seeds = self._seeds(seeds, count)
        return seeds[:1].repeat(count) if shared else seeds

    def _initial_noise(self, seeds: Tensor) -> Tensor:
        """What walks start from, (N, C, H, W)."""
        config = self.diffusion.config
        shape = (config.image_channels, config.resolution, config.resolution)
        return ops.standard_normal(seeds, self.num_steps, shape, stream=INITIAL_STREAM)

    def refine(self, images: Tensor, seeds: Sequence[int] | Tensor | None = None, **walk) -> Tensor:
        """Images made anew from a sample of their latent: encoded, decoded and denoised from noise alone.

        Args:
            images: (N, C, H, W).
            seeds: Of the samples and of the walk; by default 0, 1, 2 ...
        """
        seeds = self._seeds(seeds, len(images))
        return self.denoise(self.decode(self.encode(images, seeds=seeds)), seeds=seeds, **walk)

    def reconstruct(self, images: Tensor, seeds: Sequence[int] | Tensor | None = None, **walk) -> Tensor:
        """`refine` as published: the walk starts from the images themselves after all T steps of the forward process.

        That is noise with a trace of the image, sqrt(alpha_bar_T) = 0.006 of it.
        """
        seeds, process = self._seeds(seeds, len(images)), self.diffusion.process
        reconstructions = self.decode(self.encode(images, seeds=seeds))
        residual = process.residual(images.to(reconstructions), reconstructions)
        last = torch.full((len(images),), self.num_steps - 1)
        return self.denoise(
            reconstructions, seeds=seeds, noise=process.diffuse(residual, self._initial_noise(seeds), last), **walk
        )

    @torch.no_grad()
    def draw_latents(self, seeds: Sequence[int] | Tensor) -> Tensor:
        """New latents, one for each seed, (N, c, 1, 1): of the prior N(0, I), or of the mixture that `fit_latents` left."""
        noise = super().draw_latents(seeds)
        if self.mixture is None:
            return noise
        chooser = ops.standard_normal(self._seeds(seeds, len(seeds)), 0, (1,), stream=MIXTURE_STREAM)
        return self.mixture.sample(torch.special.ndtr(chooser).squeeze(1), noise)

    def fit_latents(
        self,
        images,
        num_components: int = 10,
        covariance_type: str = "diag",
        seed: int = 0,
    ) -> None:
        """Fit a mixture of Gaussians to samples of the latents of `images`, for `draw_latents` and `generate` from now on.

        Args:
            images: (N, C, H, W), batches of them, or a dataset; memory holds the latents of all, the images of a batch.
            num_components, covariance_type: See `latents.fit_mixture`.
            seed: Of the samples, by index, and of the fit.

        Paper note: the text draws z from N(0, I), the published scripts from a mixture of 100 Gaussians with full covariance.
        That is half a million numbers each for a latent of 1024, from 30,000 images, which leaves them to the regularisation;
        the default here is diagonal.
        """
        encodings: list[Tensor] = []
        for batch in image_batches(images, batch_size=256, progress=False):
            indices = sum(map(len, encodings)) + torch.arange(len(batch))
            encodings.append(self.encode(batch, seeds=ops.sample_seeds(seed, indices)).cpu())
        self.mixture = latents.fit_mixture(torch.cat(encodings), num_components, covariance_type, seed).to(self.device)

    def generate(
        self,
        num_images: int,
        sampler: str = "ddim",
        steps: int = 100,
        seed: int = 0,
        batch_size: int = 64,
        output_type: str = "pt",
        callback: Callback | None = None,
        *,
        shared_noise: bool = False,
        **walk,
    ):
        """New images: drawn latents, decoded and denoised.

        Image i depends on (seed, i) alone, not on `num_images` or `batch_size`.

        Args:
            sampler, steps, walk: As of `denoise`.
            output_type: "pt" (N, C, H, W) float in [-1, 1], "np" (N, H, W, C) float32 in [0, 1], "pil" a list of images.
            callback: Called with (evaluations done, evaluations in total over all batches, latent).
            shared_noise: All images are denoised with the noise of image 0, whatever batch they are in.
        """
        walk |= {"callback": callback, "shared_noise": shared_noise}
        return gather(self.generate_batches(num_images, sampler, steps, seed, batch_size, **walk), output_type)

    @torch.no_grad()
    def generate_batches(
        self,
        num_images: int,
        sampler: str = "ddim",
        steps: int = 100,
        seed: int = 0,
        batch_size: int = 64,
        *,
        callback: Callback | None = None,
        shared_noise: bool = False,
        **walk,
    ) -> Iterator[Tensor]:
        """The images of `generate` as they are made, (n, C, H, W) each: memory holds one batch, however many are asked for."""
        batches = self._seed_batches(num_images, seed, batch_size)
        for index, chunk in enumerate(batches):
            seeds = batches[0][:1].repeat(len(chunk)) if shared_noise else chunk
            counted = _count_over_batches(callback, index, len(batches))
            yield self.denoise(self.decode(self.draw_latents(chunk)), sampler, steps, seeds, callback=counted, **walk)

    def manipulate(
        self,
        images: Tensor,
        direction: Tensor,
        strength: float | Tensor,
        *,
        seeds: Sequence[int] | Tensor | None = None,
        **walk,
    ) -> Tensor:
        """Images edited along a latent direction: the mean latent moved, decoded and denoised.

        Args:
            images: (N, C, H, W), or latents (N, c, 1, 1) in their place.
            direction: (c, 1, 1), for instance from `attribute_direction`.
            strength: A number or (N,).
        """
        encoded = self._as_latents(images)
        moved = latents.manipulate(encoded, direction.to(encoded), strength)
        return self.denoise(self.decode(moved), seeds=seeds, **walk)

    def attribute_direction(self, images_with: Tensor, images_without: Tensor) -> Tensor:
        """From images without an attribute to those with it: the difference of their mean latents, (c, 1, 1)."""
        means = [
            torch.cat([self.encode(chunk) for chunk in images.split(256)]).mean(0) for images in (images_with, images_without)
        ]
        return means[0] - means[1]

    def interpolate(
        self,
        first: Tensor,
        second: Tensor,
        weights: float | Sequence[float],
        how: str = "lerp",
        *,
        seeds: Sequence[int] | Tensor | None = None,
        shared_noise: bool = False,
        **walk,
    ) -> Tensor:
        """Images between two, by their latents: z = (1 - weight) z_1 + weight z_2 (DiffusionVAE Eq. 10), decoded and denoised.

        All images of a path start from the noise of its seed, drawn once.

        Args:
            first, second: Images (N, C, H, W), which stand for their mean latents, or latents (N, c, 1, 1).
            weights: One number, or K numbers for K images per pair; 0 is `first`, 1 is `second`.
            how: "lerp" as printed, or "slerp".
            seeds: One per pair, of the noise; by default 0, 1, 2 ...
            shared_noise: As of `denoise`. Without it pairs have noise of their own, and so does every image at the steps of a
                sampler that draws some.

        Returns:
            (N, C, H, W) for one weight, (N, K, C, H, W) for a sequence.

        Paper note: the lambda of the paper weighs the first latent.
        """
        ends = self._as_latents(first), self._as_latents(second)
        seeds = self._noise_seeds(seeds, len(first), shared_noise)
        noise = self._initial_noise(seeds)
        return along(
            weights,
            lambda weight: latents.between(*ends, weight, how),
            lambda mixed: self._denoise_paths(self.decode(mixed), noise, seeds, shared_noise, **walk),
        )

    def interpolate_noise(
        self,
        images: Tensor,
        first_seeds: Sequence[int] | Tensor,
        second_seeds: Sequence[int] | Tensor,
        weights: float | Sequence[float],
        how: str = "lerp",
        *,
        shared_noise: bool = False,
        **walk,
    ) -> Tensor:
        """Images of one latent between two draws of the noise: x_T = (1 - weight) x_T1 + weight x_T2 (DiffusionVAE Eq. 11).

        Args:
            images: (N, C, H, W), which stand for their mean latents, or latents (N, c, 1, 1).
            first_seeds, second_seeds: Of the noise at the ends, one per image.
            weights: One number, or K numbers for K images each; 0 is the noise of the first seeds, 1 that of the second.
            how: "lerp" as printed, or "slerp".
            shared_noise: The steps of a sampler that draws noise take that of the first seed throughout.

        Returns:
            (N, C, H, W) for one weight, (N, K, C, H, W) for a sequence.

        Paper note: "lerp" leaves half the variance in the middle, less noise than any walk was trained to start from; "slerp"
        keeps it (`test_latents.py`).
        """
        reconstructions = self.decode(self._as_latents(images))
        seeds = self._noise_seeds(first_seeds, len(images), shared_noise)
        ends = [self._initial_noise(self._seeds(end, len(images))) for end in (first_seeds, second_seeds)]
        return along(
            weights,
            lambda weight: latents.between(*ends, weight, how),
            lambda noise: self._denoise_paths(reconstructions, noise, seeds, shared_noise, **walk),
        )

    def _denoise_paths(self, reconstructions: Tensor, noise: Tensor, seeds: Tensor, shared_noise: bool, **walk) -> Tensor:
        """Images of N paths of K points each, (N K, C, H, W).

        Args:
            reconstructions, noise: Of every point, (N K, C, H, W), or of every path, (N, C, H, W).
            seeds: Of the paths, (N,).
        """
        count = max(len(reconstructions), len(noise)) // len(seeds)
        reconstructions, noise = (
            tensor.repeat_interleave(count, dim=0) if len(tensor) == len(seeds) else tensor for tensor in (reconstructions, noise)
        )
        if shared_noise:
            seeds = seeds.repeat_interleave(count)
        else:
            seeds = torch.cat([ops.sample_seeds(seed, torch.arange(count)) for seed in seeds.tolist()])
        return self.denoise(reconstructions, seeds=seeds, noise=noise, **walk)

    def _as_latents(self, images: Tensor) -> Tensor:
        """Mean latents of images; latents as they are."""
        return images.to(self.device) if tuple(images.shape[1:]) == self.vae.config.latent_shape else self.encode(images)


PIPELINES: dict[str, type[Pipeline]] = {kind.__name__: kind for kind in (DenoisingMultiBetaVAE, BaselineVAE, DiffusionVAE)}


def load_pretrained(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline:
    """Load a saved model of any class; see `Pipeline.from_pretrained`.

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


def along(weights: float | Sequence[float], point: Callable[[float], Tensor], finish: Callable[[Tensor], Tensor]) -> Tensor:
    """Images of a path: `finish` of what `point` gives at each weight, all as one batch.

    Returns:
        (N, C, H, W) for one weight, (N, K, C, H, W) for a sequence of K.
    """
    single = isinstance(weights, int | float)
    path = torch.stack([point(float(weight)) for weight in ([weights] if single else weights)], dim=1)
    finished = finish(path.flatten(0, 1))
    return finished if single else finished.unflatten(0, path.shape[:2])


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


def _count_over_batches(callback: Callback | None, index: int, count: int) -> Callback | None:
    """The callback of batch `index` of `count`, all with as many evaluations, that counts those of all batches."""
    if callback is None:
        return None
    return lambda done, total, latent: callback(index * total + done, count * total, latent)
