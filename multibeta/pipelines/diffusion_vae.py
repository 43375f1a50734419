"""The second system on trained models."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from multibeta import checkpoints, diffusion_vae, latents, ops
from multibeta.checks import check_number, check_steps
from multibeta.diffusion_vae import CapacityVAE, ConditionalDiffusion, ConditionalDiffusionConfig, ConditionalSpans
from multibeta.flow_map import MAP_SAMPLERS, FlowMap, FlowMapConfig, Trajectories, drawn_indices
from multibeta.latents import LatentMixture
from multibeta.metrics.streaming import image_batches
from multibeta.networks import BlockAutoencoderConfig
from multibeta.pipelines.base import INITIAL_STREAM, MIXTURE_STREAM, compare_parts
from multibeta.pipelines.generation import StepEnd, along
from multibeta.pipelines.inputs import Images, are_pictures
from multibeta.pipelines.reverse import DenoisingPipeline
from multibeta.pipelines.vae import VAEPipeline
from multibeta.sampling import Callback, EngineOptions, check_latents
from multibeta.schedules import SamplerRows
from multibeta.seeds import as_seeds

if TYPE_CHECKING:
    from typing import Self

    from multibeta.pipelines.protocol import Beta


class DiffusionVAE(DenoisingPipeline, VAEPipeline):
    """A `CapacityVAE` that sketches and a `ConditionalDiffusion` that refines the sketch, as one model.

        image --encode--> latent z --decode--> reconstruction x_hat --denoise--> image

    Images and reconstructions are float (N, C, H, W) in [-1, 1]. Verbs that end in `denoise` pass its keyword arguments on as
    `sampling`. With `shared_noise` `generate` denoises all images with the noise of image 0, and `interpolate` all images of all
    paths with that of the first seed.

    Args:
        vae, diffusion: Trained, on one device.
        info: Where the model comes from (recipe, command, figures); saved with it.
        mixture: Where new latents come from in place of the prior: see `fit_latents`.
        engine_options, flow_map: As for `DenoisingMultiBetaVAE`.
    """

    parts: ClassVar = {
        "vae": (CapacityVAE, BlockAutoencoderConfig),
        "diffusion": (ConditionalDiffusion, ConditionalDiffusionConfig),
    }
    optional_parts: ClassVar = {"flow_map": (FlowMap, FlowMapConfig)}
    summary = (
        "A DiffusionVAE: an autoencoder held to a capacity sketches an image from a vector, and a diffusion model that sees the "
        "sketch refines it. Images are encoded, moved or interpolated by their vectors, decoded and refined."
    )
    tags = ("variational-autoencoder", "diffusion", "representation-learning")
    samplers = (*diffusion_vae.SAMPLERS, *MAP_SAMPLERS)
    usual_sampling = types.MappingProxyType({"sampler": "ddim", "steps": 100})
    usual_path = "lerp"
    vae: CapacityVAE
    diffusion: ConditionalDiffusion

    def __init__(
        self,
        vae: CapacityVAE,
        diffusion: ConditionalDiffusion,
        info: dict[str, Any] | None = None,
        mixture: LatentMixture | None = None,
        engine_options: EngineOptions | None = None,
        flow_map: FlowMap | None = None,
    ):
        self._require_parts(info, vae=vae, diffusion=diffusion)
        names = "image_channels", "resolution"
        compare_parts({name: (getattr(vae.config, name), getattr(diffusion.config, name)) for name in names})
        self.vae, self.diffusion = vae.eval().requires_grad_(False), diffusion.eval().requires_grad_(False)
        self.info, self.mixture = info or {}, mixture
        self._accelerate(engine_options)
        self.flow_map = flow_map

    @property
    def mixture(self) -> LatentMixture | None:
        """Where new latents come from; None for the prior."""
        return self._mixture

    @mixture.setter
    def mixture(self, mixture: LatentMixture | None) -> None:
        if not isinstance(mixture, LatentMixture | None):
            raise TypeError(f"mixture must be a LatentMixture, or None, got a {type(mixture).__name__}")
        given, wanted = None if mixture is None else tuple(mixture.means.shape[1:]), self.vae.config.latent_shape
        if given not in (None, wanted):
            raise ValueError(f"VAE and mixture do not fit: the shape of latents is {wanted} and {given}")
        self._mixture = mixture

    @property
    def num_steps(self) -> int:
        """Steps T of the forward process."""
        return self.diffusion.config.num_steps

    def to(self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        super().to(device, dtype)
        if self.mixture is not None:
            self.mixture.to(self.device)
        return self

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        return super()._weights() | ({} if self.mixture is None else {"mixture": self.mixture.state_dict()})

    @classmethod
    def _assemble(cls, folder: Path, weights: dict[str, dict[str, Tensor]], config: dict[str, Any]) -> Self:
        model = super()._assemble(folder, weights, config)
        if "mixture" in weights:
            with checkpoints.naming(folder, "a LatentMixture", "mixture.safetensors"):
                model.mixture = LatentMixture(**weights["mixture"])
        return model

    @torch.no_grad()
    def denoise(
        self,
        reconstructions: Images,
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
            reconstructions: What `decode` gives, (N, C, H, W), or in another form of `inputs.as_images`.
            sampler, steps, spacing, eta, variance: See `diffusion_vae.sampler_rows`; "map" and "map_noise" take the first two.
            seeds: One integer per sample, whose noise depends on nothing else; by default 0, 1, 2 ...
            guidance: See `ConditionalDiffusion.predictor`; a flow map has its own within, and takes no other.
            temperature: Of the noise that the reverse process starts from.
            shared_noise: All samples take the noise of the first seed, at the start and at every step (section 4.2, Fig. 7).
            noise: What it starts from, (N, C, H, W), in place of the noise of the seeds.
            callback: See `sampling.sample`.
            callback_on_step_end: See `Pipeline.generate`.

        Returns:
            (N, C, H, W) float32 in [-1, 1].
        """
        reconstructions = self._as_images(reconstructions).to(self.device, torch.float32)
        check_number("temperature", temperature)
        process = self.diffusion.process
        seeds = self._noise_seeds(seeds, len(reconstructions), shared_noise)
        schedule = {"spacing": spacing, "eta": eta, "variance": variance}
        self._check_sampler(sampler)
        spans = self._spans(guidance) if sampler in MAP_SAMPLERS else None
        if spans is None:
            rows = diffusion_vae.sampler_rows(process.alpha_bars, sampler, steps, **schedule)
        else:
            check_steps(steps, self.num_steps)
            rows = spans.sampler_rows(self._require_flow_map().path(sampler, steps, self.num_steps))
        if noise is None:
            noise = self._initial_noise(seeds)
        else:
            check_latents(noise, tuple(reconstructions.shape[1:]), "noise")
            if len(noise) != len(reconstructions):
                raise ValueError(f"noise must be one for each of {len(reconstructions)} reconstructions, got {len(noise)}")
        noise = noise.to(reconstructions)
        initial, step_end = process.prior(noise, temperature), callback_on_step_end
        residual = self._walk(rows, initial, seeds, reconstructions, guidance, callback, step_end)
        return process.image(residual, reconstructions).clamp(-1, 1)

    def _walk(
        self,
        rows: SamplerRows,
        initial: Tensor,
        seeds: Tensor,
        reconstructions: Tensor,
        guidance: float,
        callback: Callback | None = None,
        step_end: StepEnd | None = None,
    ) -> Tensor:
        """r at the end of the rows of a sampler, from `initial` at their beginning, given the reconstructions."""
        condition, guidance_rows = reconstructions if self.diffusion.config.conditional else None, None
        if rows.ends is not None:
            spans = self._spans(guidance)
            predict = spans.predictor(self._require_flow_map(), reconstructions)
            times = spans.span_times(rows.steps + 1, rows.ends + 1)
        else:
            predict, times = self.diffusion.predictor(reconstructions, guidance=guidance), rows.steps
            guidance_rows = self.diffusion.guidance_rows(rows.steps, guidance) if guidance else None
        watched = callback, step_end
        return self._reverse(rows, initial, seeds, predict, times, *watched, condition=condition, guidance_rows=guidance_rows)

    def _head_rows(self, rows: SamplerRows) -> Tensor:
        return super()._head_rows(rows) if rows.ends is None else self._spans().rows(rows.steps + 1, rows.ends + 1)

    def _spans(self, guidance: float = 0.0) -> ConditionalSpans:
        """What the head of the flow map means; `ValueError` for a `guidance` that is not its own."""
        config = self._require_flow_map().config
        if guidance not in (0, config.guidance):
            raise ValueError(f"the flow map was trained under guidance={config.guidance:g} and takes no other, got {guidance!r}")
        return self.span_teacher(config)

    def span_teacher(self, config: FlowMapConfig) -> ConditionalSpans:
        """What a flow map of this config is learned of."""
        return ConditionalSpans(self.diffusion, config.deviation, config.guidance, config.velocities)

    @property
    def walked_shape(self) -> tuple[int, ...]:
        """(C, H, W) of what the reverse process walks."""
        return self.diffusion.config.image_channels, self.diffusion.config.resolution, self.diffusion.config.resolution

    @torch.no_grad()
    def trajectories(self, seeds: Tensor, generator: torch.Generator, steps: int = 24, *, guidance: float = 0.0) -> Trajectories:
        """What a flow map learns from: walks of "ddim" from the noise of `seeds` (n,), given what new latents decode to.

        Args:
            generator: Draws where on the chain they stand.
            steps: Evaluations of each, or a few less where the chain is short.
            guidance: See `denoise`.
        """
        seeds, indices = seeds.to(self.device), drawn_indices(self.num_steps, steps, generator)
        rows = diffusion_vae.walk_rows(self.diffusion.process.alpha_bars, "ddim", [index - 1 for index in indices[:-1]])
        reconstructions, latents = self.decode(self.draw_latents(seeds)), [self._initial_noise(seeds)]

        def keep(done: int, total: int, latent: Tensor) -> None:
            latents.append(latent.clone())

        self._walk(rows, latents[0], seeds, reconstructions, guidance, keep)
        return Trajectories(torch.tensor(indices), torch.stack(latents), condition=reconstructions)

    def _render_denoised(
        self, latents: Tensor, beta: Beta, *, seeds: Sequence[int] | Tensor | None = None, **sampling: Any
    ) -> Tensor:
        return self.denoise(self.decode(latents, beta), seeds=seeds, **sampling)

    def _noise_seeds(self, seeds: Sequence[int] | Tensor | None, count: int, shared: bool) -> Tensor:
        """One seed per sample, or the first for all of them."""
        seeds = self._seeds(seeds, count)
        return seeds[:1].repeat(count) if shared else seeds

    def _initial_noise(self, seeds: Tensor) -> Tensor:
        """What the reverse process starts from, (N, C, H, W)."""
        config = self.diffusion.config
        shape = (config.image_channels, config.resolution, config.resolution)
        return ops.standard_normal(seeds, self.num_steps, shape, stream=INITIAL_STREAM)

    def refine(self, images: Images, seeds: Sequence[int] | Tensor | None = None, **sampling: Any) -> Tensor:
        """Images made anew from a sample of their latent: encoded, decoded and denoised from noise alone.

        Args:
            images: See `inputs.as_images`.
            seeds: Of the samples and of the reverse process; by default 0, 1, 2 ...
        """
        images = self._as_images(images)
        seeds = self._seeds(seeds, len(images))
        return self.render(self.encode(images, seeds=seeds), denoise=True, seeds=seeds, **sampling)

    def reconstruct(self, images: Images, seeds: Sequence[int] | Tensor | None = None, **sampling: Any) -> Tensor:
        """`refine` as published: it starts from the images themselves after all T steps of the forward process.

        That is noise with a trace of the image, sqrt(alpha_bar_T) = 0.006 of it.
        """
        images = self._as_images(images)
        seeds, process = self._seeds(seeds, len(images)), self.diffusion.process
        reconstructions = self.decode(self.encode(images, seeds=seeds))
        residual = process.residual(images.to(reconstructions), reconstructions)
        last = torch.full((len(images),), self.num_steps - 1)
        noise = process.diffuse(residual, self._initial_noise(seeds), last)
        return self.denoise(reconstructions, seeds=seeds, noise=noise, **self._with_usual_sampling(sampling))

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
        images: Any,
        num_components: int = 10,
        covariance_type: str = "full",
        seed: int = 0,
        *,
        progress: bool = False,
    ) -> None:
        """Fit a mixture of Gaussians to samples of the latents of `images`, for `draw_latents` and `generate` from now on.

        Args:
            images: See `inputs.as_images`; or batches (N, C, H, W) of them, or a dataset, of which memory holds a batch.
            num_components, covariance_type: See `latents.fit_mixture`.
            seed: Of the samples, by index, and of the fit.
            progress: Show a bar while encoding.

        Paper note: the text draws z from N(0, I), the published scripts from a mixture of 100 Gaussians with full covariance.
        That is half a million numbers each for a latent of 1024, from 30,000 images, which leaves them to the regularisation:
        take fewer of them there, or "diag".
        """
        encodings: list[Tensor] = []
        if isinstance(images, np.ndarray) or are_pictures(images):
            images = self._as_images(images)
        for batch in image_batches(images, batch_size=256, progress=progress, label="latents"):
            indices = sum(map(len, encodings)) + torch.arange(len(batch))
            encodings.append(self.encode(batch, seeds=ops.sample_seeds(seed, indices)).cpu())
        self.mixture = latents.fit_mixture(torch.cat(encodings), num_components, covariance_type, seed).to(self.device)

    def _image_maker(
        self, first_seed: Tensor, *, shared_noise: bool = False, **sampling: Any
    ) -> Callable[[Tensor, Callback], Tensor]:
        def make(seeds: Tensor, advance: Callback) -> Tensor:
            noise_seeds = first_seed.repeat(len(seeds)) if shared_noise else seeds
            return self.render(self.draw_latents(seeds), denoise=True, seeds=noise_seeds, callback=advance, **sampling)

        return make

    def _render_paths(
        self,
        points: Tensor,
        num_paths: int,
        beta: Beta,
        seeds: Sequence[int] | Tensor | None,
        *,
        shared_noise: bool = False,
        **sampling: Any,
    ) -> Tensor:
        """As of `Pipeline`; samplers that draw noise draw it for each image by itself, or with `shared_noise` once for all."""
        seeds = self._noise_seeds(seeds, num_paths, shared_noise)
        return self._denoise_paths(self.decode(points, beta), self._initial_noise(seeds), seeds, shared_noise, **sampling)

    def interpolate_noise(
        self,
        images: Images,
        first_seeds: Sequence[int] | Tensor,
        second_seeds: Sequence[int] | Tensor,
        weights: float | Sequence[float],
        how: str = "lerp",
        *,
        shared_noise: bool = False,
        **sampling: Any,
    ) -> Tensor:
        """Images of one latent between two draws of the noise: x_T = (1 - weight) x_T1 + weight x_T2 (DiffusionVAE Eq. 11).

        Args:
            images: See `inputs.as_images`, which stand for their mean latents; or latents (N, c, 1, 1).
            first_seeds, second_seeds: Of the noise at the ends, one per image.
            weights: One number, or K numbers for K images each; 0 is the noise of the first seeds, 1 that of the second.
            how: "lerp" as printed, or "slerp".
            shared_noise: The steps of a sampler that draws noise take that of the first seed throughout.

        Returns:
            (N, C, H, W) for one weight, (N, K, C, H, W) for a sequence.

        Paper note: "lerp" leaves half the variance in the middle, less noise than the network was trained to start from; "slerp"
        keeps it (`test_latents.py`).
        """
        reconstructions = self.decode(self._as_latents(images, None))
        seeds = self._noise_seeds(first_seeds, len(reconstructions), shared_noise)
        first, second = (self._initial_noise(self._seeds(end, len(reconstructions))) for end in (first_seeds, second_seeds))
        return along(
            weights,
            lambda weight: latents.between(first, second, weight, how),
            lambda noise: self._denoise_paths(reconstructions, noise, seeds, shared_noise, **sampling),
        )

    def _denoise_paths(
        self, reconstructions: Tensor, noise: Tensor, seeds: Tensor, shared_noise: bool, **sampling: Any
    ) -> Tensor:
        """Images of N paths of K points each, (N K, C, H, W).

        Args:
            reconstructions, noise: Of every point, (N K, C, H, W), or of every path, (N, C, H, W).
            seeds: Of the paths, (N,).
        """
        count = max(len(reconstructions), len(noise)) // max(len(seeds), 1)  # no paths have no points
        reconstructions, noise = (
            tensor.repeat_interleave(count, dim=0) if len(tensor) == len(seeds) else tensor for tensor in (reconstructions, noise)
        )
        if shared_noise:
            seeds = seeds.repeat_interleave(count)
        else:
            seeds = torch.cat([seeds[:0], *(ops.sample_seeds(seed, torch.arange(count)) for seed in seeds.tolist())])
        return self.denoise(reconstructions, seeds=seeds, noise=noise, **self._with_usual_sampling(sampling))
