"""Plain latent diffusion on trained models: what the first system is compared with."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Normal

from multibeta.blocks import input_dtype
from multibeta.gaussian_diffusion import SAMPLERS, GaussianDiffusion, GaussianDiffusionConfig, sampler_rows
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig, per_sample
from multibeta.pipelines.base import compare_parts
from multibeta.pipelines.generation import StepEnd
from multibeta.pipelines.reverse import DenoisingPipeline
from multibeta.pipelines.vae import VAEPipeline
from multibeta.sampling import Callback, EngineOptions
from multibeta.schedules import spatial


class LatentDiffusion(DenoisingPipeline, VAEPipeline):
    """A `MultiBetaVAE` at beta = 0 and a `GaussianDiffusion` of its z_0, as one model: latent diffusion, the plain one.

        noise --denoise--> latent z_0 --decode--> image

    It is the yardstick of a `DenoisingMultiBetaVAE`, with which it shares the VAE: new images come from the diffusion model, but
    an image has no other representation than z_0. Images are float (N, C, H, W) in [-1, 1]; there is no beta. `manipulate` and
    `interpolate` move z_0 and decode it at once.

    Args:
        vae, diffusion: Trained, on one device.
        info: Where the model comes from (recipe, command, figures); saved with it.
        engine_options: As for `DenoisingMultiBetaVAE`.
    """

    parts: ClassVar = {"vae": (MultiBetaVAE, VAEConfig), "diffusion": (GaussianDiffusion, GaussianDiffusionConfig)}
    summary = (
        "Plain latent diffusion: the lossless end (beta = 0) of a multi-beta VAE, and a diffusion model of its latents. Images "
        "are made from noise; it is what a Denoising Multi-beta VAE of the same autoencoder is compared with."
    )
    tags = ("variational-autoencoder", "diffusion", "latent-diffusion")
    denoises = False  # in z_0 nothing is left to denoise; what `generate` denoises is noise
    samplers = SAMPLERS
    usual_sampling = types.MappingProxyType({"sampler": "ddim", "steps": 50})
    usual_path = "lerp"
    vae: MultiBetaVAE
    diffusion: GaussianDiffusion

    def __init__(
        self,
        vae: MultiBetaVAE,
        diffusion: GaussianDiffusion,
        info: dict[str, Any] | None = None,
        engine_options: EngineOptions | None = None,
    ):
        self._require_parts(info, vae=vae, diffusion=diffusion)
        side = diffusion.config.latent_resolution
        compare_parts({"the shape of latents": (vae.config.latent_shape, (diffusion.config.latent_channels, side, side))})
        self.vae, self.diffusion = vae.eval().requires_grad_(False), diffusion.eval().requires_grad_(False)
        self.info = info or {}
        self._accelerate(engine_options)

    @property
    def num_steps(self) -> int:
        """Steps T of the noise schedule."""
        return self.diffusion.config.num_steps

    def _posterior(self, images: Tensor) -> Normal:
        """q(z_0|x) = N(f(x, 0), sigma(0)^2)."""
        mean = self.vae.encode(images, 0.0).float()
        return Normal(mean, spatial(self.vae.sigma(per_sample(0.0, mean))).expand_as(mean), validate_args=False)

    @torch.no_grad()
    def decode(self, latents: Tensor, beta: float | Tensor | None = None) -> Tensor:
        """Images of z_0 (N, c, h, w), (N, C, H, W) float32 in [-1, 1], where the model is."""
        self._refuse(beta)
        return self.vae.decode(self._check_latents(latents).to(input_dtype(self.vae.decoder))).float().clamp(-1, 1)

    def denoise(
        self,
        noise: Tensor,
        sampler: str = "ddim",
        steps: int = 50,
        seeds: Sequence[int] | Tensor | None = None,
        *,
        callback: Callback | None = None,
        callback_on_step_end: StepEnd | None = None,
    ) -> Tensor:
        """z_0 from noise, by the reverse process.

        Args:
            noise: Standard normal, (N, c, h, w), such as of `draw_latents`.
            sampler, steps: See `gaussian_diffusion.sampler_rows`.
            seeds: One integer per sample for the sampler that draws noise; by default 0, 1, 2 ...
            callback: See `sampling.sample`.
            callback_on_step_end: See `Pipeline.generate`.

        Returns:
            (N, c, h, w) in the dtype of `noise`, where the model is.

        Raises:
            ValueError: Noise of another shape, not finite or not of floating point; a sampler, seeds or steps that are none.
        """
        noise = self._check_latents(noise)
        rows = sampler_rows(self.diffusion.alpha_bars, sampler, steps)
        times, seeds = rows.steps * (1000 / self.num_steps), self._seeds(seeds, len(noise))
        made = self._reverse(rows, noise, seeds, self.diffusion.predict, times, callback, callback_on_step_end)
        return self.diffusion.denormalised(made).to(noise.dtype)

    def _image_maker(self, first_seed: Tensor, **sampling: Any) -> Callable[[Tensor, Callback], Tensor]:
        def make(seeds: Tensor, advance: Callback) -> Tensor:
            return self.decode(self.denoise(self.draw_latents(seeds), seeds=seeds, callback=advance, **sampling))

        return make
