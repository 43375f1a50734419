"""The first system on trained models."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from multibeta import latents, ops
from multibeta.blocks import input_dtype
from multibeta.checks import check_steps
from multibeta.inference import Prepared
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig, per_sample
from multibeta.networks import UNet
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusion, sampler_rows
from multibeta.pipelines.base import INITIAL_STREAM, Pipeline, along, compare_parts
from multibeta.pipelines.generation import Advance, StepEnd, gather, generate_each, with_step_end
from multibeta.sampling import Callback, Engine, EngineOptions, sample
from multibeta.saving import unwrapped
from multibeta.schedules import SamplerRows, beta_to_step, spatial

if TYPE_CHECKING:
    from typing import Self

logger = logging.getLogger("multibeta")


class PlainLoop:
    """In the place of an `Engine`, for a network that it cannot prepare."""

    def __init__(self, network: nn.Module, options: EngineOptions | None = None):
        self.network, self.options = network, options or EngineOptions()

    def explain(self) -> str:
        """Why the walk is plain."""
        return f"plain loop: the engine prepares the UNet of multibeta, the network is a {type(self.network).__name__}"


class DenoisingMultiBetaVAE(Pipeline):
    """A `MultiBetaVAE` and the `NonlinearDiffusion` over its latents, as one model.

        image --encode(beta)--> latent z_beta --denoise(beta -> 0)--> latent z_0 --decode(beta=0)--> image

    Images are float (N, C, H, W) in [-1, 1]; beta is in [0, 1].

    Args:
        vae, diffusion: Trained, on one device.
        info: Where the model comes from (recipe, command, figures); saved with it.
        engine_options: How the reverse process runs: see `sampling.EngineOptions`. Under `multibeta.backend("reference")` it
            is the plain loop in the dtype of the weights instead, as for a network that is not a `UNet` of multibeta.
    """

    parts: ClassVar = {"vae": (MultiBetaVAE, VAEConfig), "diffusion": (NonlinearDiffusion, DiffusionConfig)}
    summary = (
        "A Denoising Multi-beta VAE: one autoencoder whose latents range from lossless (beta = 0) to fully compressed "
        "(beta = 1), and a non-linear diffusion model that walks them back to beta = 0. Images are encoded, moved or "
        "interpolated where the representation is simple, and decoded sharp."
    )
    tags = ("variational-autoencoder", "diffusion", "representation-learning", "disentanglement")

    def __init__(
        self,
        vae: MultiBetaVAE,
        diffusion: NonlinearDiffusion,
        info: dict | None = None,
        engine_options: EngineOptions | None = None,
    ):
        self._require_parts(info, vae=vae, diffusion=diffusion)
        of_vae, of_diffusion = vae.config, diffusion.config
        side = of_diffusion.latent_resolution
        shapes = {"the shape of latents": (of_vae.latent_shape, (of_diffusion.latent_channels, side, side))}
        names = "num_steps", "schedule", "sigma_per_channel"
        compare_parts(shapes | {name: (getattr(of_vae, name), getattr(of_diffusion, name)) for name in names})
        self._compare_sigmas(vae.sigmas(), diffusion.sigmas)
        self.vae, self.diffusion = vae.eval().requires_grad_(False), diffusion.eval().requires_grad_(False)
        self.info = info or {}
        self._accelerate(engine_options)

    @staticmethod
    def _compare_sigmas(of_vae: Tensor, of_diffusion: Tensor) -> None:
        if of_vae.is_meta or of_diffusion.is_meta:
            return
        apart = float((of_vae.cpu() - of_diffusion.cpu()).abs().max())
        if apart > 1e-3:
            logger.warning(
                "sigma of VAE and diffusion differ by up to %.2g: NonlinearDiffusion.set_process takes the VAE's", apart
            )

    @property
    def num_steps(self) -> int:
        """Grid steps N between beta = 0 and beta = 1."""
        return self.vae.config.num_steps

    def to(self, device=None, dtype=None) -> Self:
        super().to(device, dtype)
        self._accelerate(self.engine.options)
        return self

    def _accelerate(self, engine_options: EngineOptions | None) -> None:
        unet = self.diffusion.unet
        self.engine = Engine(unet, engine_options) if isinstance(unet, UNet) else PlainLoop(unet, engine_options)
        self._prepare_decoder()

    def _prepare_decoder(self) -> None:
        self._decoder = Prepared(self.vae.decoder, input_dtype(self.vae.decoder))

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        unet = unwrapped(self.diffusion).unet
        if not isinstance(unet, UNet):
            kind = type(unet).__name__
            raise ValueError(
                f"a model around a {kind} cannot be saved, its shape is none of ours: save vae.state_dict() and "
                f"diffusion.state_dict(), and load them into the same parts, NonlinearDiffusion(config, unet={kind}(...))"
            )
        return super()._weights()

    @torch.no_grad()
    def encode(self, images: Tensor, beta: float | Tensor, *, seeds: Sequence[int] | Tensor | None = None) -> Tensor:
        """Latents of images at beta.

        Args:
            images: (N, C, H, W).
            beta: In [0, 1], a number or (N,).
            seeds: None for the mean f(x, beta); one integer per image for a sample f(x, beta) + sigma(beta) eps of MultiBeta
                Eq. 13, whose noise belongs to the seed.

        Returns:
            (N, c, h, w), float32, where the model is.
        """
        mean = self.vae.encode(self._check_images(images), beta).float()
        if seeds is None:
            return mean
        return mean + spatial(self.vae.sigma(per_sample(beta, mean))) * self._encoder_noise(seeds, mean)

    @torch.no_grad()
    def decode(self, latents: Tensor, beta: float | Tensor = 0.0) -> Tensor:
        """Images of latents (N, c, h, w) at beta, a number or (N,): (N, C, H, W) float32 in [-1, 1], where the model is."""
        dtype = input_dtype(self.vae.decoder)
        latents = self._check_latents(latents).to(dtype)
        prepared = ops.current_backend() != "reference" and self._decoder.network is self.vae.decoder
        if prepared and self._decoder.dtype != dtype:  # its weights were given another
            self._prepare_decoder()
        decoder = self._decoder if prepared else self.vae.decoder
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
        callback_on_step_end: StepEnd | None = None,
    ) -> Tensor:
        """Latents at beta = 0 from latents at `beta`, by the reverse process (MultiBeta Algorithm 2 and its mended forms).

        Args:
            latents: z_beta, (N, c, h, w), of any floating point.
            beta: In [0, 1], one number; 0 returns the latents as they are.
            sampler: See `nonlinear_diffusion.sampler_rows`.
            steps: Steps taken, at most the grid steps from beta to 0; a beta close to 0 takes as many as there are.
            seeds: One integer per sample for samplers that draw noise; by default 0, 1, 2 ...
            callback: See `sampling.sample`.
            callback_on_step_end: See `generate`.

        Returns:
            (N, c, h, w), in the dtype of `latents`, where the model is.

        Raises:
            ValueError: Latents of another shape, not finite or not of floating point; a beta, a sampler, seeds or steps that are
                none.
        """
        latents = self._check_latents(latents)
        start = beta_to_step(beta, self.num_steps, self.vae.config.schedule)
        check_steps(steps, self.num_steps, ", the steps of the grid")
        rows = sampler_rows(self.diffusion.sigmas, sampler, min(steps, max(start, 1)), start=start)
        return self._walk(rows, latents, self._seeds(seeds, len(latents)), callback, callback_on_step_end)

    def invert(self, latents: Tensor, sampler: str = "ode2", steps: int = 50) -> Tensor:
        """Noise at beta = 1 that the deterministic sampler takes to `latents` at beta = 0: the ODE backwards.

        Latents and result as of `denoise`.
        """
        latents = self._check_latents(latents)
        rows = sampler_rows(self.diffusion.sigmas, sampler, steps, start=0, stop=self.num_steps)
        return self._walk(rows, latents, self._seeds(None, len(latents)))

    def _walk(
        self,
        rows: SamplerRows,
        initial: Tensor,
        seeds: Tensor,
        callback: Callback | None = None,
        step_end: StepEnd | None = None,
    ) -> Tensor:
        """The reverse process from `initial`: by the engine, or by the plain loop where `_walks_plainly`."""
        if self.engine.network is not self.diffusion.unet:
            self._accelerate(self.engine.options)
        plainly = self._walks_plainly() or isinstance(self.engine, PlainLoop)
        callback = with_step_end(callback, step_end, self, rows.steps, takes_changes=plainly)
        if plainly:
            return sample(self.diffusion.predict, rows, initial, seeds, callback=callback)
        times = rows.steps * (1000 / self.num_steps)
        return self.engine.sample(rows, self.diffusion.head_rows(rows.steps), times, initial, seeds, callback=callback)

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
        generator: torch.Generator | None = None,
        callback_on_step_end: StepEnd | None = None,
    ):
        """New images from noise at beta = 1.

        Image i depends on (seed, i) alone, not on `num_images` or `batch_size`.

        Args:
            sampler, steps: See `nonlinear_diffusion.sampler_rows`.
            output_type: "pt" (N, C, H, W) float in [-1, 1], "np" (N, H, W, C) float32 in [0, 1], "pil" a list of images.
            callback: Called with (evaluations done, evaluations in total over all batches, latent).
            delta_sign: See `nonlinear_diffusion.sampler_rows`.
            generator: Gives the seed, one int64 drawn from it, where none is given.
            callback_on_step_end: Called as diffusers does, with (model, index of the evaluation in its batch, its grid index,
                {"latents": latent}), and returns the dict. The plain loop goes on from changed latents, the engine refuses them.
        """
        walk = {"callback": callback, "delta_sign": delta_sign, "callback_on_step_end": callback_on_step_end}
        batches = self.generate_batches(num_images, sampler, steps, seed, batch_size, generator=generator, **walk)
        return gather(batches, output_type)

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
        generator: torch.Generator | None = None,
        callback_on_step_end: StepEnd | None = None,
    ) -> Iterator[Tensor]:
        """The images of `generate` as they are made, (n, C, H, W) each: memory holds one batch, however many are asked for."""
        rows = sampler_rows(self.diffusion.sigmas, sampler, steps, delta_sign=delta_sign)

        def make(seeds: Tensor, advance: Advance) -> Tensor:
            noise = ops.standard_normal(seeds, self.num_steps, self.vae.config.latent_shape, stream=INITIAL_STREAM)
            return self.decode(self._walk(rows, self.diffusion.initial(noise), seeds, advance, callback_on_step_end))

        return generate_each(make, self._seed_batches(num_images, seed, batch_size, generator), callback, self._progress)

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
        moved = latents.manipulate(encoded, direction, strength)
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
        ends = [self.encode(images, beta) for images in (first, second)]
        return along(
            weights,
            lambda weight: latents.interpolate(*ends, weight, dims),
            lambda mixed: self.decode(self.denoise(mixed, beta, sampler, steps)),
        )

    def principal_directions(self, images: Tensor, beta: float, num_directions: int | None = None):
        """PCA of the encodings of `images` at beta: see `latents.principal_directions`."""
        self._require_images(images)
        encodings = torch.cat([self.encode(chunk, beta) for chunk in images.split(256)])
        return latents.principal_directions(encodings, num_directions)
