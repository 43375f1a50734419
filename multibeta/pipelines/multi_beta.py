"""The first system on trained models."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from multibeta import ops, variational
from multibeta.blocks import input_dtype
from multibeta.checks import check_integer, check_steps
from multibeta.flow_map import MAP_SAMPLERS, FlowMap, FlowMapConfig, Trajectories, drawn_indices
from multibeta.inference import Prepared
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig, per_sample
from multibeta.networks import UNet
from multibeta.nonlinear_diffusion import INVERTIBLE, PROCESS_SAMPLERS, DiffusionConfig, NonlinearDiffusion, walk_rows
from multibeta.pipelines.base import INITIAL_STREAM, compare_parts
from multibeta.pipelines.generation import StepEnd
from multibeta.pipelines.inputs import Images
from multibeta.pipelines.likelihood import LogLikelihood, latent_log_density, log_likelihood
from multibeta.pipelines.reverse import DenoisingPipeline
from multibeta.pipelines.spectrum import KEPT_IDENTITY, SPECTRUM_BETAS, check_spectrum, highest_beta, measure_spectrum
from multibeta.sampling import Callback, EngineOptions, Predictions
from multibeta.saving import unwrapped
from multibeta.schedules import BetaGrid, SamplerRows, beta_to_step, spatial
from multibeta.seeds import as_seeds

if TYPE_CHECKING:
    from multibeta.pipelines.protocol import Beta

logger = logging.getLogger("multibeta")

USUAL_STEPS = 20


class DenoisingMultiBetaVAE(DenoisingPipeline):
    """A `MultiBetaVAE` and the `NonlinearDiffusion` over its latents, as one model.

        image --encode(beta)--> latent z_beta --denoise(beta -> 0)--> latent z_0 --decode(beta=0)--> image

    Images are float (N, C, H, W) in [-1, 1]; beta is in [0, 1]. `generate` starts from noise at beta = 1, and also takes the
    `delta_sign` of `NonlinearDiffusion.sampler_rows`.

    Args:
        vae, diffusion: Trained, on one device.
        info: Where the model comes from (recipe, command, figures); saved with it.
        engine_options: How the reverse process runs: see `sampling.EngineOptions`. Under `multibeta.backend("reference")` it
            is the plain loop in the dtype of the weights instead, as for a network that is not a `UNet` of multibeta.
        flow_map: Optional, for the samplers "map" and "map_noise": the reverse process in one to four evaluations.
    """

    parts: ClassVar = {"vae": (MultiBetaVAE, VAEConfig), "diffusion": (NonlinearDiffusion, DiffusionConfig)}
    optional_parts: ClassVar = {"flow_map": (FlowMap, FlowMapConfig)}
    summary = (
        "A Denoising Multi-beta VAE: one autoencoder whose latents range from lossless (beta = 0) to fully compressed "
        "(beta = 1), and a non-linear diffusion model that walks them back to beta = 0. Images are encoded, moved or "
        "interpolated where the representation is simple, and decoded sharp."
    )
    tags = ("variational-autoencoder", "diffusion", "representation-learning", "disentanglement")
    samplers = (*PROCESS_SAMPLERS, *MAP_SAMPLERS)
    inverting = INVERTIBLE
    usual_levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    vae: MultiBetaVAE
    diffusion: NonlinearDiffusion

    def __init__(
        self,
        vae: MultiBetaVAE,
        diffusion: NonlinearDiffusion,
        info: dict[str, Any] | None = None,
        engine_options: EngineOptions | None = None,
        flow_map: FlowMap | None = None,
    ):
        self._require_parts(info, vae=vae, diffusion=diffusion)
        of_vae, of_diffusion = vae.config, diffusion.config
        side = of_diffusion.latent_resolution
        shapes = {"the shape of latents": (of_vae.latent_shape, (of_diffusion.latent_channels, side, side))}
        names = *(field.name for field in fields(BetaGrid)), "sigma_per_channel"
        compare_parts(shapes | {name: (getattr(of_vae, name), getattr(of_diffusion, name)) for name in names})
        self._compare_sigmas(vae.sigmas(), diffusion.sigmas)
        self.vae, self.diffusion = vae.eval().requires_grad_(False), diffusion.eval().requires_grad_(False)
        self.samplers = diffusion.samplers
        self.usual_sampling = {"sampler": diffusion.usual_sampler, "steps": USUAL_STEPS}
        self.info = info or {}
        self._accelerate(engine_options)
        self.flow_map = flow_map

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

    @property
    def spectrum(self) -> list[dict[str, float]] | None:
        """What each beta keeps of an image, as `measure_spectrum` found it; None of a model that it was not measured of."""
        recorded = self.info.get("spectrum")
        if recorded is None:
            return None
        check_spectrum(recorded)
        return recorded["levels"]

    @property
    def auto_beta(self) -> float:
        """The beta of "auto": the highest up to which `spectrum` keeps an identity of 0.95, in steps of 0.01.

        Raises:
            ValueError: The model has no spectrum; says how to measure it.
        """
        if self.spectrum is None:
            raise ValueError(
                'beta must be a number in [0, 1] here: for "auto" the model does not know what each beta keeps of an image. '
                "model.measure_spectrum(images) measures it, or from a shell `multibeta spectrum MODEL --save`"
            )
        return highest_beta(self.spectrum, KEPT_IDENTITY)

    def measure_spectrum(
        self, images: Images, betas: Sequence[float] = SPECTRUM_BETAS, *, progress: bool = False
    ) -> list[dict[str, float]]:
        """Measure what each beta keeps of an image: `spectrum` from now on, which is saved with the model and gives `auto_beta`.

        Args:
            images: Some hundred, held out from training where there are any: see `inputs.as_images`.
            betas: In [0, 1]; 0 is always among them.
            progress: Show a bar.

        Returns:
            A row for each beta, rising: "beta"; "nats" of information, the KL to the prior, a mean over images; "mse" of a latent
            decoded at beta; "denoised_mse" of its mean, denoised by `usual_sampling` and decoded at 0, as edits are; "identity",
            how much of the detail of an image that is in [0, 1]: see `spectrum.identity`, of the latter and of the image encoded
            and decoded at 0.
        """
        images = self._as_images(images)
        rows = measure_spectrum(self, images, betas, progress=progress)
        self.info["spectrum"] = {"num_images": len(images), **self.sampling_options(), "levels": rows}
        return rows

    def _accelerate(self, engine_options: EngineOptions | None) -> None:
        super()._accelerate(engine_options)
        self._prepare_decoder()

    def _prepare_decoder(self) -> None:
        self._decoder = Prepared(self.vae.decoder, input_dtype(self.vae.decoder))

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        unet = unwrapped(self.diffusion).unet
        if not isinstance(unet, UNet):
            name = type(unet).__name__
            raise ValueError(
                f"a model around a {name} cannot be saved, its shape is none of ours: save vae.state_dict() and "
                f"diffusion.state_dict(), and load them into the same parts, NonlinearDiffusion(config, unet={name}(...))"
            )
        return super()._weights()

    @torch.no_grad()
    def encode(self, images: Images, beta: Beta = None, *, seeds: Sequence[int] | Tensor | None = None) -> Tensor:
        """Latents of images at beta.

        Args:
            images: See `inputs.as_images`.
            beta: In [0, 1], a number or (N,), or "auto"; there is no default.
            seeds: None for the mean f(x, beta); one integer per image for a sample f(x, beta) + sigma(beta) eps of MultiBeta
                Eq. 13, whose noise belongs to the seed.

        Returns:
            (N, c, h, w), float32, where the model is.
        """
        beta = cast("float | Tensor", self.resolve_beta(beta))  # the VAE refuses None
        mean = self.vae.encode(self._check_images(images), beta).float()
        if seeds is None:
            return mean
        return variational.sample(mean, self.vae.sigma(per_sample(beta, mean)), self._encoder_noise(seeds, mean))

    @torch.no_grad()
    def decode(self, latents: Tensor, beta: Beta = 0.0) -> Tensor:
        """Images of latents (N, c, h, w) at beta, a number, (N,) or "auto": (N, C, H, W) float32 in [-1, 1], on its device."""
        dtype = input_dtype(self.vae.decoder)
        latents = self._check_latents(latents).to(dtype)
        prepared = ops.current_backend() != "reference" and self._decoder.network is self.vae.decoder
        if prepared and self._decoder.dtype != dtype:  # its weights were given another
            self._prepare_decoder()
        decoder = self._decoder if prepared else self.vae.decoder
        beta = cast("float | Tensor", self.resolve_beta(beta))  # `per_sample` refuses None
        return decoder(latents, per_sample(beta, latents)).float().clamp(-1, 1)

    def denoise(
        self,
        latents: Tensor,
        beta: float | Literal["auto"],
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
            beta: In [0, 1], one number, or "auto"; 0 returns the latents as they are.
            sampler: See `NonlinearDiffusion.sampler_rows`.
            steps: Steps taken, at most the grid steps from beta to 0; a beta close to 0 takes as many as there are. The other
                verbs denoise by default as `usual_sampling` says.
            seeds: One integer per sample for samplers that draw noise; by default 0, 1, 2 ...
            callback: See `sampling.sample`.
            callback_on_step_end: See `Pipeline.generate`.

        Returns:
            (N, c, h, w), in the dtype of `latents`, where the model is.

        Raises:
            ValueError: Latents of another shape, not finite or not of floating point; a beta, a sampler, seeds or steps that are
                none.
        """
        latents = self._check_latents(latents)
        start = self._grid_index(beta)
        check_steps(steps, self.num_steps, ", the steps of the grid")
        rows = self._sampler_rows(sampler, min(steps, max(start, 1)), start)
        return self._denoise_along(rows, latents, self._seeds(seeds, len(latents)), callback, callback_on_step_end)

    def invert(
        self,
        latents: Tensor,
        sampler: str = "ode2",
        steps: int = 50,
        *,
        beta: float | Tensor | Literal["auto"] | None = 1.0,
        callback: Callback | None = None,
    ) -> Tensor:
        """The latents at beta that a deterministic sampler takes to `latents` at beta = 0: the probability-flow ODE, upwards.

        `denoise` by the same sampler and steps gives `latents` back, but for an error that falls with the number of steps, of
        "ode2" and "heun" with its square.

        Args:
            latents: z_0, (N, c, h, w), of any floating point, such as `encode(images, 0)`.
            sampler: One of `inverting`.
            steps: As of `denoise`: a beta close to 0 takes as many as there are.
            beta: In [0, 1], one number, or "auto"; at 1 the latents are noise, 0 returns them as they are.
            callback: As of `denoise`.

        Returns:
            (N, c, h, w), in the dtype of `latents`, where the model is.

        Raises:
            ValueError: As of `denoise`, and a sampler that draws noise or only walks down.
        """
        latents = self._check_latents(latents)
        stop = self._grid_index(beta)
        check_steps(steps, self.num_steps, ", the steps of the grid")
        rows = self.diffusion.sampler_rows(self._inverting_sampler(sampler), min(steps, max(stop, 1)), start=0, stop=stop)
        return self._denoise_along(rows, latents, self._seeds(None, len(latents)), callback)

    def latent_log_density(
        self,
        latents: Tensor,
        sampler: str = "ode2",
        steps: int = 50,
        *,
        num_probes: int | None = 1,
        seeds: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """log p(z_0) of latents at beta = 0, by how volume grows along the ODE to beta = 1: see `sampling.sample_with_volume`.

        Gradients flow through the network itself, in the dtype of its weights, not through the engine.

        Args:
            latents: (N, c, h, w): samples, `encode(images, 0, seeds=...)`. All are computed at once.
            sampler, steps: As of `invert`; the error falls with the steps.
            num_probes: Of Hutchinson's estimate of the trace; None for the trace itself, in c h w times the work of one.
            seeds: One integer per sample, to which its probes belong; by default 0, 1, 2 ...

        Returns:
            (N,) float64, in nats, where the model is.

        Raises:
            ValueError: As of `invert`; no positive number of probes.
        """
        latents, sampler = self._check_latents(latents), self._inverting_sampler(sampler)
        return latent_log_density(self, latents, sampler, steps, num_probes, self._seeds(seeds, len(latents)))

    def log_likelihood(
        self,
        images: Images,
        sampler: str = "ode2",
        steps: int = 50,
        *,
        num_probes: int | None = 1,
        seeds: Sequence[int] | Tensor | None = None,
        batch_size: int = 64,
    ) -> LogLikelihood:
        """How likely images of 8 bits are to the model: a bound in bits per dimension, and its three parts in nats.

            log P(x) >= E_q(z_0|x)[log P(x|z_0) + log p(z_0) - log q(z_0|x)]

        q is the encoder at beta = 0, of which one sample is taken; P(x|z_0) the decoder's Gaussian of deviation s(0) over the bin
        of each pixel (`variational.dequantised`); p(z_0) that of `latent_log_density`.

        Args:
            images: See `inputs.as_images`; floats are rounded to 8 bits, whose probability it is.
            sampler, steps, num_probes: As of `latent_log_density`.
            seeds: One integer per image, for its sample of q and its probes; by default 0, 1, 2 ...
            batch_size: Images computed at once.

        Returns:
            See `LogLikelihood`, of (N,) float64 where the model is.
        """
        images, sampler = self._as_images(images), self._inverting_sampler(sampler)
        check_integer("batch_size", batch_size, 1)
        pairs = zip(images.split(batch_size), self._seeds(seeds, len(images)).split(batch_size), strict=True)
        parts = [log_likelihood(self, chunk, sampler, steps, num_probes, own) for chunk, own in pairs]
        return LogLikelihood(*map(torch.cat, zip(*parts, strict=True)))

    def _grid_index(self, beta: Beta) -> int:
        """The index of the grid nearest to beta, one number or "auto"."""
        return beta_to_step(cast("float", self.resolve_beta(beta)), self.num_steps, self.vae.config.schedule)

    def _denoise_along(
        self,
        rows: SamplerRows,
        initial: Tensor,
        seeds: Tensor,
        callback: Callback | None = None,
        step_end: StepEnd | None = None,
        on_predictions: Predictions | None = None,
    ) -> Tensor:
        """The latent at the end of the rows of a sampler, from `initial` at their beginning."""
        if rows.ends is not None:
            flow_map = self._require_flow_map()
            times, predict = (
                self.diffusion.span_times(rows.steps, rows.ends),
                functools.partial(self.diffusion.predict_span, flow_map),
            )
        else:
            times = rows.steps * (1000 / self.num_steps)
            predict = self.diffusion.predict_data if rows.of_data else self.diffusion.predict
        return self._reverse(rows, initial, seeds, predict, times, callback, step_end, on_predictions)

    def span_teacher(self, config: FlowMapConfig) -> NonlinearDiffusion:
        """What a flow map of this config is learned of."""
        return self.diffusion

    @property
    def walked_shape(self) -> tuple[int, ...]:
        """(C, H, W) of what the reverse process walks."""
        return self.vae.config.latent_shape

    @torch.no_grad()
    def trajectories(self, seeds: Tensor, generator: torch.Generator, steps: int = 24) -> Trajectories:
        """What a flow map learns from: walks of "ode2" from the noise of `seeds` (n,), at grid indices that `generator` draws.

        Args:
            steps: Evaluations of each, or a few less where the grid is short.
        """
        spaced = self.diffusion.config.spacing == "turn"
        indices = drawn_indices(self.num_steps, steps, generator, self.diffusion.step_shares() if spaced else None)
        rows = walk_rows(self.diffusion.sigmas, "ode2", indices)
        latents, predictions = [self.draw_latents(seeds)], []
        self._denoise_along(
            rows,
            latents[0],
            seeds,
            callback=lambda done, total, latent: latents.append(latent.clone()),
            on_predictions=lambda noise_prediction, delta: predictions.append(noise_prediction),
        )
        columns = rows.named.noise_prediction, rows.named.previous_noise_prediction
        now, before = (spatial(torch.as_tensor(column).to(latents[0]))[:, None] for column in columns)
        predicted = torch.stack([torch.zeros_like(latents[0]), *predictions])  # the first row knows none before
        moves = now * predicted[1:] + before * predicted[:-1]
        moved = torch.cat([torch.zeros_like(moves[:1]), moves.cumsum(0)])
        return Trajectories(torch.tensor(indices), torch.stack(latents), moved)

    def _head_rows(self, rows: SamplerRows) -> Tensor:
        if rows.ends is not None:
            return self.diffusion.spans().rows(rows.steps, rows.ends)
        return self.diffusion.head_rows(rows.steps, of_data=rows.of_data)

    def _sampler_rows(self, sampler: str, steps: int, start: int | None = None, delta_sign: int = 1) -> SamplerRows:
        """The rows of a sampler from grid index `start`, by default the last, to 0."""
        self._check_sampler(sampler)
        if sampler not in MAP_SAMPLERS:
            return self.diffusion.sampler_rows(sampler, steps, start=start, delta_sign=delta_sign)
        if delta_sign != 1:
            raise ValueError(f"a flow map has no delta to subtract: delta_sign must be 1, got {delta_sign!r}")
        start = self.num_steps if start is None else start
        check_steps(steps, self.num_steps, ", the steps of the grid")
        path = self._require_flow_map().path(sampler, steps, start) if start else []
        return self.diffusion.spans().sampler_rows(path)

    def _render_denoised(
        self, latents: Tensor, beta: Beta, *, seeds: Sequence[int] | Tensor | None = None, **sampling: Any
    ) -> Tensor:
        return self.decode(self.denoise(latents, cast("float", beta), seeds=seeds, **sampling))

    @torch.no_grad()
    def draw_latents(self, seeds: Sequence[int] | Tensor) -> Tensor:
        """New latents at beta = 1, one for each seed, (N, c, h, w): see `NonlinearDiffusion.initial`."""
        seeds, shape = as_seeds(seeds).to(self.device), self.vae.config.latent_shape
        return self.diffusion.initial(ops.standard_normal(seeds, self.num_steps, shape, stream=INITIAL_STREAM))

    def _image_maker(
        self,
        first_seed: Tensor,
        *,
        sampler: str,
        steps: int,
        delta_sign: int = 1,
        callback_on_step_end: StepEnd | None = None,
    ) -> Callable[[Tensor, Callback], Tensor]:
        rows = self._sampler_rows(sampler, steps, delta_sign=delta_sign)

        def make(seeds: Tensor, advance: Callback) -> Tensor:
            return self.decode(self._denoise_along(rows, self.draw_latents(seeds), seeds, advance, callback_on_step_end))

        return make
