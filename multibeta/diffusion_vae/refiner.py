"""The second stage: a diffusion model that sees a reconstruction, DiffusionVAE Eq. 6 and 9."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from multibeta import ops
from multibeta.checks import check_counts, check_number
from multibeta.diffusion_vae.process import ForwardProcess
from multibeta.draws import noise_like, shared
from multibeta.networks import UNetShape
from multibeta.schedules import ddpm_variances, stratified_steps
from multibeta.training import Batch

LEAST_SIGNAL = 1e-60  # alpha_bar at the end of a chain, by whose root float32 can divide


@dataclass(frozen=True)
class ConditionalDiffusionConfig(UNetShape):
    """Shape of a `ConditionalDiffusion`, by default that of DiffusionVAE Table 3, with 95.2 million parameters.

    Attributes:
        form: See `ForwardProcess`.
        conditional: Whether the network sees x_hat; without it this is the DDPM of Table 1, which needs "form1".
        resolution: Height and width of an image.
        image_channels: Of an image.
        num_steps: T, of `schedules.ddpm_variances`.
        first_variance: Of its first step.
        last_variance: Of its last step.

    Paper note: "scales of attention blocks: 16" is the factor by which the map is smaller than the image, so 8 x 8 pixels;
    only that gives 95.2 million. Of Table 3's "training time steps 100" the published code knows 1000 in training and 100 in
    sampling; after 100 steps of these variances alpha_bar is still 0.36, which is no diffusion to noise.
    """

    form: Literal["form1", "form2", "eq7"] = "form1"
    conditional: bool = True
    resolution: int = 128
    image_channels: int = 3
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 3, 4)
    attention_resolutions: tuple[int, ...] = (8,)
    head_channels: int | None = None
    num_heads: int | None = 8
    dropout: float = 0.1
    num_steps: int = 1000
    first_variance: float = 1e-4
    last_variance: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "resolution", "image_channels")
        ddpm_variances(self.num_steps, self.first_variance, self.last_variance)  # refuses what are none
        variances = np.linspace(self.first_variance, self.last_variance, self.num_steps)
        if np.log1p(-variances).sum() < math.log(LEAST_SIGNAL):
            raise ValueError(
                f"last_variance must leave a share of {LEAST_SIGNAL:g} of the signal's variance after {self.num_steps} steps, "
                f"got {self.last_variance} after {self.first_variance}: lower one of them, or num_steps"
            )


class ConditionalDiffusion(nn.Module):
    """The refiner: eps_hat(x_t, x_hat, t), whose reverse process depends on z through x_hat alone (DiffusionVAE Eq. 9).

    The U-Net is the one of latent-diffusion, as OpenAI's is; its weights are OpenAI's after a permutation: [sin, cos] for
    [cos, sin] in the time embedding, and query, key, value of all heads instead of each head's. Only the initialisation of
    the last layer of an attention block differs, zero there.
    """

    def __init__(self, config: ConditionalDiffusionConfig) -> None:
        super().__init__()
        if not config.conditional and config.form != "form1":
            raise ValueError(f'without a reconstruction the form must be "form1", got {config.form!r}')
        self.config = config
        channels = config.image_channels
        self.unet = config.build_unet((1 + config.conditional) * channels, channels, config.resolution)
        variances = ddpm_variances(config.num_steps, config.first_variance, config.last_variance)
        self.process = ForwardProcess(config.form, variances)

    def forward(self, residual: Tensor, steps: Tensor, reconstruction: Tensor) -> Tensor:
        """Noise prediction, (N, C, H, W) float32.

        Args:
            residual: r_t, (N, C, H, W); the network sees x_t.
            steps: t, (N,), 0 ... T - 1.
            reconstruction: x_hat in [-1, 1], (N, C, H, W); zeros for none.
        """
        if residual.shape != reconstruction.shape:
            shapes = f"{tuple(residual.shape)} and {tuple(reconstruction.shape)}"
            raise ValueError(f"residual and reconstruction must have one shape, got {shapes}")
        x = self.network_input(residual, reconstruction)
        return self.unet(x.to(next(self.unet.parameters()).dtype), steps).float()

    def network_input(self, residual: Tensor, reconstruction: Tensor) -> Tensor:
        """x_t, with the reconstruction next to it where the network sees it, (N, C or 2 C, H, W)."""
        x = self.process.noisy_image(residual, reconstruction)
        return torch.cat([x, reconstruction], dim=1) if self.config.conditional else x

    def guided(self, residual: Tensor, steps: Tensor, reconstruction: Tensor, guidance: float) -> Tensor:
        """The noise prediction under guidance, see `predictor`."""
        noise_prediction = self(residual, steps, reconstruction)
        if not guidance:
            return noise_prediction
        free = self.process.without_reconstruction(residual, reconstruction, steps)
        unconditional = self(free, steps, torch.zeros_like(reconstruction))
        return (1 + guidance) * noise_prediction - guidance * unconditional

    def predictor(
        self, reconstruction: Tensor, *, guidance: float = 0.0, clip: bool = True
    ) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        """What `sampling.sample` calls: (r_t, step) to (noise prediction, r_0 prediction).

        The prediction of r_0, clipped so that x_0 lies in [-1, 1], stands in the place of delta. Clipping is not affine, but
        given its result every step is: `sampler_rows` weighs r_t, the noise as it was predicted, and the clipped r_0.

        Args:
            reconstruction: x_hat in [-1, 1], (N, C, H, W), of the samples.
            guidance: w of (1 + w) eps_hat(x_hat) - w eps_hat(0), for models trained with `condition_dropout`. The second
                prediction sees x_t as it would be for x_hat = 0. In "form2" the published code leaves x_t shifted by x_hat,
                which training without x_hat never shows.
            clip: Whether x_0 is clipped.
        """
        check_number("guidance", guidance)
        if guidance and not self.config.conditional:
            raise ValueError(f"an unconditional model has nothing to be guided by, got guidance={guidance}")

        def predict(residual: Tensor, step: int) -> tuple[Tensor, Tensor]:
            steps = torch.full((len(residual),), step, device=residual.device)
            noise_prediction = self.guided(residual, steps, reconstruction, guidance)
            denoised = self.process.denoised(residual, noise_prediction, steps)
            if clip:
                image = self.process.image(denoised, reconstruction).clamp(-1, 1)
                denoised = self.process.residual(image, reconstruction)
            return noise_prediction, denoised

        return predict

    def head_rows(self, steps: Tensor, *, clip: bool = True) -> Tensor:
        """What stands between the network and the sampler at indices `steps` (S,): packed `ops.OneHeadRow`s, (S, C, 10).

        The latent is r_t, delta the prediction of r_0, the condition x_hat: `predictor`, with or without its `clip`, and
        `ForwardProcess` as `ops.sampler_step` computes them.
        """
        alpha_bar = self.process.alpha_bars[steps.to(self.process.alpha_bars.device)].cpu()
        signal, deviation = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        row = ops.OneHeadRow(
            noise_from_output=1,
            noise_from_latent=0,
            noise_offset=0,
            delta_from_noise=-deviation / signal,
            delta_from_latent=1 / signal,
            delta_from_condition=self.process.offset,
            delta_limit=1.0 if clip else math.inf,
            input_from_latent=1,
            input_offset=0,
            input_from_condition=self.process.shift,
        )
        return ops.pack(row, (len(steps),))[:, None].expand(-1, self.config.image_channels, -1)

    def guidance_rows(self, steps: Tensor, guidance: float) -> Tensor:
        """Packed `ops.GuidanceRow`s at indices `steps` (S,): (S, 2), for `sampling.Engine`.

        What the prediction without x_hat sees of it, `ForwardProcess.without_reconstruction` says.
        """
        signal = self.process.alpha_bars[steps.to(self.process.alpha_bars.device)].cpu().sqrt()
        row = ops.GuidanceRow(weight=guidance, latent_from_condition=self.process.offset * signal)
        return ops.pack(row, (len(steps),))


@dataclass(frozen=True)
class ConditionalDiffusionObjectiveOptions:
    """What `ConditionalDiffusionObjective` leaves to choose.

    Attributes:
        condition_dropout: Probability that a step sees x_hat = 0, for all its images, as classifier-free guidance needs.
    """

    condition_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_number("condition_dropout", self.condition_dropout, least=0, most=1)


class ConditionalDiffusionObjective:
    """Training of the second stage, L_DDPM of DiffusionVAE Eq. 6 as the mean squared error of the noise, for `training.train`.

    Args:
        diffusion: The model trained.
        reconstruct: (images, generator) to x_hat in [-1, 1], frozen: `CapacityVAE.reconstruct`, which draws z. For an
            unconditional model `lambda images, generator: torch.zeros_like(images)`.
        options: What there is to choose; `fields` are those of it that differ, by name.

    Paper note: "LR annealing steps 5000" is a linear warm-up to a rate that stays: `warmup_steps=5000, final_learning_rate=1`.
    """

    def __init__(
        self,
        diffusion: ConditionalDiffusion,
        reconstruct: Callable[[Tensor, torch.Generator], Tensor],
        options: ConditionalDiffusionObjectiveOptions | None = None,
        **fields: Any,
    ) -> None:
        self.module, self.reconstruct = diffusion, reconstruct
        self.options = replace(options or ConditionalDiffusionObjectiveOptions(), **fields)

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images, process = batch.images, self.module.process
        with torch.no_grad():
            reconstruction = self.reconstruct(images, generator)
        if float(torch.rand((), generator=shared(generator))) < self.options.condition_dropout:
            reconstruction = torch.zeros_like(reconstruction)
        steps = stratified_steps(len(images), 0, self.module.config.num_steps - 1, generator)
        noise = noise_like(images, generator)
        residual = process.diffuse(process.residual(images, reconstruction), noise, steps)
        noise_error = (self.module(residual, steps.to(images.device), reconstruction) - noise).square().mean()
        return noise_error, {"noise_error": noise_error}
