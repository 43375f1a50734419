"""DiffusionVAE: a VAE held to a capacity sketches an image, a conditional DDPM refines it (DiffusionVAE Eq. 6-9 and 12).

Stage 1 trains `CapacityVAE` by `CapacityObjective`; stage 2 keeps it frozen and trains `ConditionalDiffusion` on its
reconstructions by `ConditionalDiffusionObjective`. New images are x_hat = decode(z), then the reverse process given x_hat:

    rows = sampler_rows(diffusion.process.alpha_bars, "ddim", 100)
    residual = sampling.sample(diffusion.predictor(reconstruction), rows, diffusion.process.prior(noise), seeds)
    images = diffusion.process.image(residual, reconstruction)

Noise belongs to the sample. Shared stochasticity (section 4.2, Fig. 7: one tensor of noise per step for every image) is therefore
to give every sample the same seed; `test_diffusion_vae.py` samples both ways.

Steps are indices 0 ... T - 1 as the network sees them: r at index t carries the noise of t + 1 steps. x_T is the paper's z_T, X_T
and x_T alike.

Paper note: the paper is a fork of DiffuseVAE (Pandey et al. 2022), and its published scripts train what its text does not say
in several places; each is settled where it belongs. Those without code: Eq. 6 lacks the logarithms of both likelihoods;
"Figure 4 (top row)" in section 4.2 is Fig. 5; the data is CelebAMask-HQ, not the CelebA-HQ that is cited; stage 2 is given in
days only, its steps are a recipe's choice; the abstract's better fidelity holds against the VAE, the DDPM of Table 1 is
better than the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from multibeta import ops
from multibeta.checks import check_counts, check_number, check_steps, check_weights, is_integer
from multibeta.draws import noise_like, shared
from multibeta.networks import BlockAutoencoderConfig, UNetShape
from multibeta.ops import SamplerRow
from multibeta.schedules import SamplerRows, ddpm_variances, posterior_weights, spatial, stratified_steps
from multibeta.training import Batch
from multibeta.variational import capacity_at, capacity_penalty, draw, kl_to_prior

FORMS = {"form1": (0, 0), "form2": (1, 0), "eq7": (1, 1)}  # multiples of x_hat in x_t and in x_0: see `ForwardProcess`
SAMPLERS = ("ddpm", "ddim")
SPACINGS = ("uniform", "quad")
VARIANCES = ("fixedsmall", "fixedlarge")
LEAST_SIGNAL = 1e-60  # alpha_bar at the end of a chain, by whose root float32 can divide


class CapacityVAE(nn.Module):
    """The first stage: q(z|x) = N(mean(x), diag variance(x)), z a vector, p(z) = N(0, I).

    The networks see images in [0, 1], as published; everything here takes and returns [-1, 1].

    Paper note: section 3.2.1 calls it a standard VAE, section 4.3 trains it by Eq. 12: it is the one of section 4.3. New z
    are drawn from N(0, I), as the text says; the published scripts fit a Gaussian mixture to encodings of the training set
    instead.
    """

    def __init__(self, config: BlockAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = config.build()

    def posterior(self, images: Tensor) -> Normal:
        """q(z|x) of images (N, C, H, W) in [-1, 1], over (N, *latent_shape), float32."""
        mean, log_variance = self.encoder((images + 1) / 2)
        return Normal(mean.float(), (0.5 * log_variance.float()).exp(), validate_args=False)

    def encode(self, images: Tensor) -> Tensor:
        """Mean of q(z|x), (N, *latent_shape)."""
        return self.posterior(images).mean

    def decode(self, latents: Tensor) -> Tensor:
        """x_hat of latents (N, *latent_shape), (N, C, H, W) float32 in [-1, 1]."""
        return 2 * self.decoder(latents).float().sigmoid() - 1

    def reconstruct(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """x_hat of images, decoded from a sample of q(z|x), which `generator` (on the CPU) draws.

        Paper note: the paper calls x_hat a deterministic function of the image; what its second stage is trained on is this
        sample.
        """
        return self.decode(draw(self.posterior(images), generator))


@dataclass(frozen=True)
class CapacityObjectiveOptions:
    """What `CapacityObjective` leaves to choose. A number out of its range is a `ValueError` with its name.

    Attributes:
        gamma: Cost of a nat of KL in squared error; what a nat buys grows with the number of pixels.
        capacity: Largest C, in nats.
        warmup: Fraction of training after which C stays; 0 is C from the first step on.
        reduction: See `capacity_penalty`. "batch_sum" as published.
    """

    gamma: float = 100.0
    capacity: float = 25.0
    warmup: float = 0.85
    reduction: Literal["batch_mean", "batch_sum"] = "batch_mean"

    def __post_init__(self) -> None:
        check_weights(gamma=self.gamma, capacity=self.capacity)
        check_number("warmup", self.warmup, least=0)


class CapacityObjective:
    """Training of the first stage, for `training.train`: log p(x|z) - gamma |KL - C| (DiffusionVAE Eq. 12), negated.

    -log p(x|z) is the squared error of an image in [0, 1] summed over its values, without a factor 1/2, as published. C grows
    linearly from 0. Logged in nats per image are "kl" and "capacity", and "below_capacity": while the KL stays above C it is 0, C
    has no gradient, and this is a beta-VAE with beta = gamma; it leaves 0 when the constraint binds.

    Args:
        vae: The model trained.
        options: What there is to choose; `fields` are those of it that differ, by name.

    Paper note: gamma is what Table 2 calls alpha, and no other beta exists. The published code compares C with the KL of the
    whole batch: 25 nats for 128 images are 0.2 an image, far below what gamma = 100 keeps, so C never binds. "batch_mean" is Eq.
    12 and Burgess et al. Where text, configuration and script disagree (batch, epochs, C and its warm-up), the defaults are the
    text's, Tables 2 and 3; 100,000 steps of 117,000 are warmup = 0.85.
    """

    def __init__(self, vae: CapacityVAE, options: CapacityObjectiveOptions | None = None, **fields: Any) -> None:
        self.module = self.vae = vae
        self.options = replace(options or CapacityObjectiveOptions(), **fields)
        self.comparable_from = self.options.warmup  # until then C grows

    def gather(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """What the penalty of an update needs of all its images."""
        return {"kl": kl_to_prior(self.vae.posterior(batch.images))}

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss per image and pixel value, so that its scale is that of other objectives, and its parts per image."""
        images, options = batch.images, self.options
        posterior = self.vae.posterior(images)
        difference = (self.vae.decode(draw(posterior, generator)) - images) / 2
        error, kl = difference.square().flatten(1).sum(1).mean(), batch.complete({"kl": kl_to_prior(posterior)})["kl"]
        capacity = capacity_at(batch.progress, options.capacity, options.warmup)
        penalty = batch.share(capacity_penalty(kl, capacity, options.gamma, options.reduction))
        share = capacity / len(kl) if options.reduction == "batch_sum" else capacity
        scalars = {
            "reconstruction": error,
            "kl": kl.mean(),
            "penalty": penalty,
            "capacity": torch.tensor(share),
            "below_capacity": (kl.mean() < share).float(),
        }
        return (error + penalty) / images[0].numel(), scalars


class ForwardProcess:
    """The forward process around a reconstruction x_hat (DiffusionVAE Eq. 7), in three forms that are one chain.

    In each form r_t is an ordinary DDPM chain, r_t = sqrt(1 - v_t) r_{t-1} + sqrt(v_t) eps, seen around another centre:

        x_t = r_t + shift x_hat,    x_0 = r_0 + offset x_hat.

    | form | shift | offset | |
    | --- | --- | --- | --- |
    | "form1" | 0 | 0 | x_hat enters the network only; what the published scripts train |
    | "form2" | 1 | 0 | DiffuseVAE: the first step is N(sqrt(1 - v_1) x_0 + x_hat, v_1 I), the others are Eq. 7 |
    | "eq7" | 1 | 1 | Eq. 7 from the first step on |

    Schedules, samplers and their rows know r alone; x_t appears at the input of the network, x_0 at the end of the trajectory.

    Args:
        form: As above.
        variances: v_t, (T,) float64; see `schedules.ddpm_variances`.

    Paper note: Eq. 7 and 8 are not what the published scripts train, which is "form1", the default here.
    """

    def __init__(self, form: str, variances: Tensor) -> None:
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        self.shift, self.offset = FORMS[form]
        self.alpha_bars = (1 - variances).cumprod(0)

    def residual(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """r_0 of x_0 = `image`."""
        return image - self.offset * reconstruction

    def image(self, residual: Tensor, reconstruction: Tensor) -> Tensor:
        """x_0 of r_0 = `residual`: the last thing a sampler does, for "form2" the published subtraction of x_hat."""
        return residual + self.offset * reconstruction

    def noisy_image(self, residual: Tensor, reconstruction: Tensor) -> Tensor:
        """x_t of r_t = `residual`."""
        return residual + self.shift * reconstruction

    def diffuse(self, residual: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """r_t = sqrt(alpha_bar_t) r_0 + sqrt(1 - alpha_bar_t) eps (DiffusionVAE Eq. 8), at indices `steps` (N,).

        That is x_t ~ N(sqrt(alpha_bar_t) x_0 + (shift - offset sqrt(alpha_bar_t)) x_hat, (1 - alpha_bar_t) I).

        Paper note: Eq. 8 prints sqrt(1 - alpha_bar_t) where sqrt(alpha_bar_t) must stand: x_0 would appear as noise is added.
        Iterating Eq. 7 gives the above; `test_diffusion_vae.py` iterates.
        """
        signal, deviation = self.scales(steps, residual)
        return signal * residual + deviation * noise

    def denoised(self, residual: Tensor, noise_prediction: Tensor, steps: Tensor) -> Tensor:
        """r_0 of r_t = `residual` and its noise: the inverse of `diffuse`."""
        signal, deviation = self.scales(steps, residual)
        return (residual - deviation * noise_prediction) / signal

    def prior(self, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """r_T, which `sample` starts from: x_T is noise around shift x_hat. The temperature scales this noise, no other."""
        return temperature * noise

    def without_reconstruction(self, residual: Tensor, reconstruction: Tensor, steps: Tensor) -> Tensor:
        """r_t of the same image and noise for x_hat = 0."""
        return residual + self.offset * self.scales(steps, residual)[0] * reconstruction

    def scales(self, steps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) at `steps` (N,), to multiply (N, C, H, W)."""
        alpha_bar = spatial(self.alpha_bars[steps.to(self.alpha_bars.device)])
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)


@dataclass(frozen=True)
class ConditionalDiffusionConfig(UNetShape):
    """Shape of a `ConditionalDiffusion`, by default that of DiffusionVAE Table 3, with 95.2 million parameters.

    Attributes:
        form: See `ForwardProcess`.
        conditional: Whether the network sees x_hat; without it this is the DDPM of Table 1, which needs "form1".
        resolution, image_channels: Of an image.
        num_steps, first_variance, last_variance: T and the ends of `schedules.ddpm_variances`.

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
        x = self.process.noisy_image(residual, reconstruction)
        if self.config.conditional:
            x = torch.cat([x, reconstruction], dim=1)
        return self.unet(x.to(next(self.unet.parameters()).dtype), steps).float()

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
            noise_prediction = self(residual, steps, reconstruction)
            if guidance:
                free = self.process.without_reconstruction(residual, reconstruction, steps)
                unconditional = self(free, steps, torch.zeros_like(reconstruction))
                noise_prediction = (1 + guidance) * noise_prediction - guidance * unconditional
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


def spaced_indices(num_steps: int, steps: int, spacing: str = "uniform") -> list[int]:
    """The indices out of 0 ... num_steps - 1 a sampler visits, largest first, as published.

    Args:
        spacing: "uniform" has one stride: the first index is a multiple of it (990 for 100 of 1000 steps), and not every
            number of steps has one. "quad" is int(linspace(0, sqrt(0.8 num_steps), steps)^2), dense at the end, from 0.8
            num_steps; indices that coincide count once, so 100 steps of 1000 visit 96. The trajectory starts from the prior at
            either first index.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    check_steps(steps, num_steps)
    if spacing == "quad":
        points = np.linspace(0, np.sqrt(0.8 * num_steps), steps) ** 2
        return sorted({int(point) for point in points}, reverse=True)
    stride = math.ceil(num_steps / steps)
    indices = range(0, num_steps, stride)
    if len(indices) != steps:
        raise ValueError(
            f"no stride takes {steps} uniform steps out of {num_steps}: a stride of {stride} takes {len(indices)}, "
            f"of {stride - 1} {len(range(0, num_steps, stride - 1))}"
        )
    return list(reversed(indices))


def sampler_rows(
    alpha_bars: Tensor,
    sampler: str,
    steps: int,
    *,
    spacing: str = "uniform",
    variance: str = "fixedsmall",
    eta: float = 0.0,
    start: int | None = None,
) -> SamplerRows:
    """The coefficient table of a sampler of r_t = sqrt(alpha_bar_t) r_0 + sqrt(1 - alpha_bar_t) eps, for every form.

    The latent is r_t; the prediction of r_0 comes from `ConditionalDiffusion.predictor` in the place of delta. The last row adds
    no noise.

    Args:
        alpha_bars: (T,), of a `ForwardProcess`.
        sampler: "ddpm" is the posterior of Ho et al. 2020, "ddim" the sampler of Song et al. 2021.
        steps: As many as the chain has take it whole; fewer take a spaced chain, of variances 1 - alpha_bar_t / alpha_bar_s.
        spacing: See `spaced_indices`.
        variance: Of "ddpm": that of the posterior ("fixedsmall", published for CelebAMask-HQ) or that of the step ("fixedlarge").
        eta: Of "ddim", in [0, 1]: 0 is deterministic; 1 is "ddpm" with "fixedsmall" where nothing is clipped.
        start: Last index of the chain, T - 1 by default. A smaller one truncates it: the initial latent is then r at the first
            index of the rows, such as `process.diffuse` of what is to be refined.

    Raises:
        ValueError: An unknown sampler, spacing or variance; eta, steps or start out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    check_number("eta", eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    last = len(alpha_bars) - 1
    start = last if start is None else start
    if not (is_integer(start) and 0 <= start <= last):
        raise ValueError(f"start must lie between 0 and {last}, got {start}")

    indices = spaced_indices(start + 1, steps, spacing)
    rows = []
    for alpha_bar, next_alpha_bar in itertools.pairwise([*alpha_bars[indices].tolist(), 1.0]):
        on_clean, on_noisy, posterior_variance = posterior_weights(alpha_bar, next_alpha_bar)
        if sampler == "ddim":
            fresh = eta**2 * posterior_variance
            noise, clean = math.sqrt(1 - next_alpha_bar - fresh), math.sqrt(next_alpha_bar)
            rows.append(SamplerRow(latent=0, noise_prediction=noise, delta=clean, fresh_noise=math.sqrt(fresh)))
        else:
            large = variance == "fixedlarge" and next_alpha_bar < 1
            fresh = 1 - alpha_bar / next_alpha_bar if large else posterior_variance
            rows.append(SamplerRow(latent=on_noisy, noise_prediction=0, delta=on_clean, fresh_noise=math.sqrt(fresh)))
    return SamplerRows.of(indices, rows)
