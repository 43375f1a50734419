"""Plain diffusion of a latent, as latent diffusion trains it: the yardstick of `nonlinear_diffusion`, whose latent it shares.

z_0 of a frozen VAE, normalised to u_0, is diffused as images are in a DDPM, u_t = sqrt(alpha_bar_t) u_0 + sqrt(1 - alpha_bar_t)
eps, and a network with one head predicts v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) u_0 (Salimans and Ho 2022). The noise
schedule is the cosine of Nichol and Dhariwal 2021.

Steps are indices 0 ... T - 1 as the network sees them: u_t at index t carries the noise of t + 1 steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multibeta import ops
from multibeta.checks import check_counts, check_integer, check_steps
from multibeta.draws import rows
from multibeta.networks import UNetShape
from multibeta.ops import SamplerRow
from multibeta.schedules import SamplerRows, cosine_variances, posterior_weights, spatial, stratified_steps
from multibeta.training import Batch

SAMPLERS = ("ddim", "ddpm")


@dataclass(frozen=True)
class GaussianDiffusionConfig(UNetShape):
    """Shape of a `GaussianDiffusion`: of its network, its latents, its noise schedule.

    Attributes:
        latent_channels: Of a latent.
        latent_resolution: Height and width of a latent.
        num_steps: T, steps of the noise schedule.

    Raises:
        ValueError: A number out of its range, with the name of its field.
    """

    latent_channels: int = 4
    latent_resolution: int = 32
    num_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "latent_channels", "latent_resolution", "num_steps")


class GaussianDiffusion(nn.Module):
    """The one-headed denoiser: v_hat(u_t, t) of latents normalised to zero mean and unit variance in each channel.

    Mean and deviation of the channels are stored with the weights. The U-Net is that of a `NonlinearDiffusion` of the same shape,
    with half its outputs.
    """

    latent_mean: Tensor
    latent_deviation: Tensor

    def __init__(self, config: GaussianDiffusionConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.unet = config.build_unet(channels, channels, config.latent_resolution)
        self.alpha_bars = (1 - cosine_variances(config.num_steps)).cumprod(0)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_deviation", torch.ones(channels))

    def set_statistics(self, latents: Tensor) -> None:
        """Take mean and deviation of each channel from the z_0 of training images, (N, C, H, W)."""
        of_channels = latents.transpose(0, 1).flatten(1).double()
        if of_channels.shape[0] != self.config.latent_channels:
            raise ValueError(f"latents must have {self.config.latent_channels} channels, got {tuple(latents.shape)}")
        if not of_channels.isfinite().all():
            raise ValueError("latents must be finite")
        self.latent_mean.copy_(of_channels.mean(1))
        self.latent_deviation.copy_(of_channels.std(1).clamp(min=1e-4))

    def normalised(self, latents: Tensor) -> Tensor:
        """u_0 of z_0, (N, C, H, W)."""
        return (latents - spatial(self.latent_mean[None])) / spatial(self.latent_deviation[None])

    def denormalised(self, latents: Tensor) -> Tensor:
        """z_0 of u_0, (N, C, H, W)."""
        return latents * spatial(self.latent_deviation[None]) + spatial(self.latent_mean[None])

    def forward(self, latents: Tensor, steps: Tensor) -> Tensor:
        """v_hat of u_t (N, C, H, W) at `steps` (N,), (N, C, H, W) float32."""
        times = steps * (1000 / self.config.num_steps)
        return self.unet(latents.to(next(self.unet.parameters()).dtype), times).float()

    def diffused(self, clean: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """u_t of u_0 and eps at `steps` (N,), and the v that `forward` should return for it, (N, C, H, W) each."""
        alpha_bar = spatial(self.alpha_bars[steps.to(self.alpha_bars.device)])
        signal, deviation = alpha_bar.sqrt().to(clean), (1 - alpha_bar).sqrt().to(clean)
        return signal * clean + deviation * noise, signal * noise - deviation * clean

    def predict(self, latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What `sampling.sample` calls: v_hat in the place of the noise, and no delta, as `sampler_rows` weighs them."""
        v = self(latents, torch.full((len(latents),), step, device=latents.device))
        return v, torch.zeros_like(v)

    def head_rows(self, steps: Tensor) -> Tensor:
        """What stands between the network and the sampler at indices `steps` (S,): packed `ops.OneHeadRow`s, (S, C, 10).

        `predict` as `ops.sampler_step` computes it: the network reads the latent as it is and its output is v_hat.
        """
        row = ops.OneHeadRow(
            noise_from_output=1,
            noise_from_latent=0,
            noise_offset=0,
            delta_from_noise=0,
            delta_from_latent=0,
            delta_from_condition=0,
            delta_limit=math.inf,
            input_from_latent=1,
            input_offset=0,
            input_from_condition=0,
        )
        return ops.pack(row, (len(steps), self.config.latent_channels))


@dataclass(frozen=True)
class GaussianDiffusionObjectiveOptions:
    """What `GaussianDiffusionObjective` leaves to choose.

    Attributes:
        noise_draws: Draws of (t, eps) per latent in a batch, which multiply the batch that the U-Net sees.
    """

    noise_draws: int = 1

    def __post_init__(self) -> None:
        check_integer("noise_draws", self.noise_draws, 1)


class GaussianDiffusionObjective:
    """Training of v: its mean squared error, weight 1, at uniform t, one from each of equal strata, for `training.train`.

    Args:
        diffusion: The model trained; its statistics must be set.
        encode: Images to z_0, frozen. It is called outside autocast, in float32.
        options: What there is to choose; `fields` are those of it that differ, by name.
        encodings: z_0 of all training images by their dataset indices, (M, C, H, W), in place of encoding them at every step;
            images of validation are encoded as they come.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        encode: Callable[[Tensor], Tensor],
        options: GaussianDiffusionObjectiveOptions | None = None,
        *,
        encodings: Tensor | None = None,
        **fields: Any,
    ) -> None:
        self.module, self.encode, self.encodings = diffusion, encode, encodings
        self.options = replace(options or GaussianDiffusionObjectiveOptions(), **fields)

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images, last, draws = batch.images, self.module.config.num_steps - 1, self.options.noise_draws
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if self.encodings is not None and not batch.held_out:
                latents = self.encodings[batch.indices].to(images.device)
            else:
                latents = self.encode(images.float())
            clean = self.module.normalised(latents.float()).repeat(draws, 1, 1, 1)
        steps = torch.cat([stratified_steps(len(images), 0, last, generator) for _ in range(draws)]).to(images.device)
        noise = rows(lambda n, source: torch.randn(draws, n, *clean.shape[1:], generator=source), len(images), generator, dim=1)
        noisy, v = self.module.diffused(clean, noise.flatten(0, 1).to(images.device), steps)
        v_error = (self.module(noisy, steps) - v).square().mean()
        return v_error, {"v_error": v_error}


def trailing_indices(num_steps: int, steps: int) -> list[int]:
    """`steps` indices out of 0 ... num_steps - 1, largest first, from the last on, where a sampler starts from noise alone.

    That is the "trailing" spacing of Lin et al. 2023; a spacing that begins at 0 stops short of the end of the schedule.
    """
    check_steps(steps, num_steps)
    return (np.linspace(num_steps, 0, steps, endpoint=False).round().astype(int) - 1).tolist()


def sampler_rows(alpha_bars: Tensor, sampler: str, steps: int) -> SamplerRows:
    """The coefficient table of a sampler of u_t, whose prediction is v in the place of the noise; delta is not used.

    With alpha_bar_t = cos^2 a, u_0 = cos a u_t - sin a v and eps = sin a u_t + cos a v: every step is affine in u_t and v.

    Args:
        alpha_bars: (T,), of a `GaussianDiffusion`.
        sampler: "ddim" is that of Song et al. 2021 with eta = 0, the rotation u_s = cos(a - b) u_t - sin(a - b) v for b the angle
            at s; "ddpm" is the posterior of Ho et al. 2020 along the spaced chain.
        steps: 1 <= steps <= T, see `trailing_indices`. The last row adds no noise.

    Raises:
        ValueError: An unknown sampler, steps out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    indices, table = trailing_indices(len(alpha_bars), steps), []
    for alpha_bar, next_alpha_bar in itertools.pairwise([*alpha_bars[indices].tolist(), 1.0]):
        angle, next_angle = (math.atan2(math.sqrt(1 - each), math.sqrt(each)) for each in (alpha_bar, next_alpha_bar))
        if sampler == "ddim":
            row = SamplerRow(latent=math.cos(angle - next_angle), noise_prediction=-math.sin(angle - next_angle), delta=0)
        else:
            on_clean, on_noisy, variance = posterior_weights(alpha_bar, next_alpha_bar)
            row = SamplerRow(
                latent=on_noisy + on_clean * math.cos(angle),
                noise_prediction=-on_clean * math.sin(angle),
                delta=0,
                fresh_noise=math.sqrt(variance),
            )
        table.append(row)
    return SamplerRows.of(indices, table)
