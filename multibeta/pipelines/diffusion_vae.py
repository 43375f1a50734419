"""The second system on trained models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multibeta import checkpoints, diffusion_vae, latents, ops
from multibeta.checks import check_number
from multibeta.diffusion_vae import CapacityVAE, ConditionalDiffusion, ConditionalDiffusionConfig
from multibeta.latents import LatentMixture
from multibeta.metrics.streaming import image_batches
from multibeta.networks import BlockAutoencoderConfig
from multibeta.pipelines.base import INITIAL_STREAM, MIXTURE_STREAM, along, compare_parts
from multibeta.pipelines.generation import Advance, StepEnd, gather, generate_each, with_step_end
from multibeta.pipelines.vae import VAEPipeline
from multibeta.sampling import Callback, Engine, EngineOptions, check_latents, sample
from multibeta.schedules import SamplerRows
from multibeta.seeds import as_seeds

if TYPE_CHECKING:
    from typing import Self


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
    summary = (
        "A DiffusionVAE: an autoencoder held to a capacity sketches an image from a vector, and a diffusion model that sees the "
        "sketch refines it. Images are encoded, moved or interpolated by their vectors, decoded and refined."
    )
    tags = ("variational-autoencoder", "diffusion", "representation-learning")

    def __init__(
        self,
        vae: CapacityVAE,
        diffusion: ConditionalDiffusion,
        info: dict | None = None,
        mixture: LatentMixture | None = None,
        engine_options: EngineOptions | None = None,
    ):
        self._require_parts(info, vae=vae, diffusion=diffusion)
        names = "image_channels", "resolution"
        compare_parts({name: (getattr(vae.config, name), getattr(diffusion.config, name)) for name in names})
        self.vae, self.diffusion = vae.eval().requires_grad_(False), diffusion.eval().requires_grad_(False)
        self.info, self.mixture = info or {}, mixture
        self.engine = Engine(self.diffusion.unet, engine_options)

    @property
    def mixture(self) -> LatentMixture | None:
        """Where new latents come from; None for the prior."""
        return self._mixture

    @mixture.setter
    def mixture(self, mixture: LatentMixture | None) -> None:
        if not isinstance(mixture, LatentMixture | None):
            raise TypeError(f"mixture must be a LatentMixture, or None, got a {type(mixture).__name__}")
        made, wanted = None if mixture is None else tuple(mixture.means.shape[1:]), self.vae.config.latent_shape
        if made not in (None, wanted):
            raise ValueError(f"VAE and mixture do not fit: the shape of latents is {wanted} and {made}")
        self._mixture = mixture

    @property
    def num_steps(self) -> int:
        """Steps T of the forward process."""
        return self.diffusion.config.num_steps

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
            with checkpoints.naming(folder, "a LatentMixture", "mixture.safetensors"):
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
        callback_on_step_end: StepEnd | None = None,
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
            callback_on_step_end: See `DenoisingMultiBetaVAE.generate`.

        Returns:
            (N, C, H, W) float32 in [-1, 1].
        """
        self._require_images(reconstructions)
        check_number("temperature", temperature)
        reconstructions, process = reconstructions.to(self.device, torch.float32), self.diffusion.process
        seeds = self._noise_seeds(seeds, len(reconstructions), shared_noise)
        schedule = {"spacing": spacing, "eta": eta, "variance": variance}
        rows = diffusion_vae.sampler_rows(process.alpha_bars, sampler, steps, **schedule)
        if noise is None:
            noise = self._initial_noise(seeds)
        else:
            check_latents(noise, tuple(reconstructions.shape[1:]), "noise")
            if len(noise) != len(reconstructions):
                raise ValueError(f"noise must be one for each of {len(reconstructions)} reconstructions, got {len(noise)}")
        noise = noise.to(reconstructions)
        callback = with_step_end(callback, callback_on_step_end, self, rows.steps, takes_changes=self._walks_plainly())
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
        """The reverse process from r_T = `initial`, given x_hat, to r_0: by the engine or, `_walks_plainly`, by the loop."""
        predict = self.diffusion.predictor(reconstructions, guidance=guidance)
        if self._walks_plainly():
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
        self._require_images(images)
        seeds = self._seeds(seeds, len(images))
        return self.denoise(self.decode(self.encode(images, seeds=seeds)), seeds=seeds, **walk)

    def reconstruct(self, images: Tensor, seeds: Sequence[int] | Tensor | None = None, **walk) -> Tensor:
        """`refine` as published: the walk starts from the images themselves after all T steps of the forward process.

        That is noise with a trace of the image, sqrt(alpha_bar_T) = 0.006 of it.
        """
        self._require_images(images)
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
        chooser = ops.standard_normal(as_seeds(seeds).to(self.device), 0, (1,), stream=MIXTURE_STREAM)
        return self.mixture.sample(torch.special.ndtr(chooser).squeeze(1), noise)

    def fit_latents(
        self,
        images,
        num_components: int = 10,
        covariance_type: str = "full",
        seed: int = 0,
        *,
        progress: bool = False,
    ) -> None:
        """Fit a mixture of Gaussians to samples of the latents of `images`, for `draw_latents` and `generate` from now on.

        Args:
            images: (N, C, H, W), batches of them, or a dataset; memory holds the latents of all, the images of a batch.
            num_components, covariance_type: See `latents.fit_mixture`.
            seed: Of the samples, by index, and of the fit.
            progress: Show a bar while encoding.

        Paper note: the text draws z from N(0, I), the published scripts from a mixture of 100 Gaussians with full covariance.
        That is half a million numbers each for a latent of 1024, from 30,000 images, which leaves them to the regularisation:
        take fewer of them there, or "diag".
        """
        encodings: list[Tensor] = []
        for batch in image_batches(images, batch_size=256, progress=progress, label="latents"):
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
        generator: torch.Generator | None = None,
        **walk,
    ):
        """New images: drawn latents, decoded and denoised.

        Image i depends on (seed, i) alone, not on `num_images` or `batch_size`.

        Args:
            sampler, steps, walk: As of `denoise`.
            output_type, callback, generator: As of `DenoisingMultiBetaVAE.generate`.
            shared_noise: All images are denoised with the noise of image 0, whatever batch they are in.
        """
        walk |= {"callback": callback, "shared_noise": shared_noise, "generator": generator}
        return gather(self.generate_batches(num_images, sampler, steps, seed, batch_size, **walk), output_type)

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
        generator: torch.Generator | None = None,
        **walk,
    ) -> Iterator[Tensor]:
        """The images of `generate` as they are made, (n, C, H, W) each: memory holds one batch, however many are asked for."""
        batches = self._seed_batches(num_images, seed, batch_size, generator)

        def make(seeds: Tensor, advance: Advance) -> Tensor:
            noise_seeds = batches[0][:1].repeat(len(seeds)) if shared_noise else seeds
            sketches = self.decode(self.draw_latents(seeds))
            return self.denoise(sketches, sampler, steps, noise_seeds, callback=advance, **walk)

        return generate_each(make, batches, callback, self._progress)

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
        moved = latents.manipulate(encoded, direction, strength)
        return self.denoise(self.decode(moved), seeds=seeds, **walk)

    def attribute_direction(self, images_with: Tensor, images_without: Tensor) -> Tensor:
        """From images without an attribute to those with it: the difference of their mean latents, (c, 1, 1)."""
        for images in (images_with, images_without):
            self._require_images(images)
        if not len(images_with) or not len(images_without):
            raise ValueError(
                f"a direction needs images on both sides, got {len(images_with)} with and {len(images_without)} without"
            )
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
        """Mean latents of images; latents as they are, float32."""
        if isinstance(images, Tensor) and not images.is_nested and tuple(images.shape[1:]) == self.vae.config.latent_shape:
            return self._check_latents(images).float()
        return self.encode(images)
