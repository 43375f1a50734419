"""The VAE conditioned on beta: MultiBeta section 3, Eq. 2-4 and Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from multibeta import distribution
from multibeta.checks import LARGEST_WEIGHT, check_beta, check_integer, check_number, check_weights
from multibeta.draws import rows
from multibeta.networks import AutoencoderConfig
from multibeta.schedules import BetaGrid, DecoderSigmaCurve, SigmaCurve, beta_grid, step_to_beta, stratified_steps
from multibeta.training import Batch
from multibeta.variational import gaussian_log_density, kl_to_standard_normal, sample

LEAST_DEVIATION = 0.1  # of f(x, 0) over images; 0.8 to 1.2 are healthy
LOOKED_AT = 64  # images whose encodings tell whether the encoder has collapsed


@dataclass(frozen=True)
class VAEConfig(BetaGrid, AutoencoderConfig):
    """Shape of a `MultiBetaVAE`: its two networks, its curves, its grid over beta.

    Attributes:
        collapse_exponent: f(x, beta) = (1 - beta^collapse_exponent) encoder(x, beta), which pins f(x, 1) = 0 as sigma(1) = 1 is
            pinned; None leaves f free, as MultiBeta prints it.
        sigma_per_channel: One curve sigma_j(beta) per latent channel instead of the one of MultiBeta Eq. 3; see `untie_sigma`.
        num_knots: See `SigmaCurve`.
        log_sigma_zero: See `SigmaCurve`.

    Raises:
        ValueError: A number out of its range, with the name of its field.
    """

    collapse_exponent: float | None = 8.0
    sigma_per_channel: bool = False
    num_knots: int = 24
    log_sigma_zero: float = -4.0

    def __post_init__(self) -> None:
        AutoencoderConfig.__post_init__(self)
        BetaGrid.__post_init__(self)
        if self.collapse_exponent is not None:
            check_number("collapse_exponent", self.collapse_exponent, above=0, most=LARGEST_WEIGHT)


class MultiBetaVAE(nn.Module):
    """One VAE for every beta.

    p(x|z) = N(g(z, beta), s^2 I) (MultiBeta Eq. 2) and q(z|x) = N(f(x, beta), sigma^2 I) (MultiBeta Eq. 3);
    sigma and s are learned functions of beta alone; sigma rises strictly to sigma(1) = 1, as does each sigma_j where every
    latent channel has its own.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = config.build()
        self.sigma = SigmaCurve(
            config.num_knots, config.log_sigma_zero, config.latent_channels if config.sigma_per_channel else None
        )
        self.decoder_sigma = DecoderSigmaCurve(config.num_knots)

    def encode(self, images: Tensor, beta: float | Tensor) -> Tensor:
        """Encoder mean f_phi(x, beta): images (N, C, H, W) in [-1, 1], beta a number or (N,), to (N, *latent_shape)."""
        beta = per_sample(beta, images)
        mean = self.encoder(images, beta)
        if self.config.collapse_exponent is None:
            return mean
        return mean * (1 - beta**self.config.collapse_exponent).to(mean.dtype)[:, None, None, None]

    def decode(self, latents: Tensor, beta: float | Tensor = 0.0) -> Tensor:
        """Decoder mean g_theta(z, beta): latents (N, *latent_shape), beta a number or (N,), to images, not clamped."""
        return self.decoder(latents, per_sample(beta, latents))

    @torch.no_grad()
    def sigmas(self) -> Tensor:
        """sigma on the training grid, (num_steps + 1,), or (num_steps + 1, c) per channel; float32, index 0 is beta = 0."""
        grid = beta_grid(self.config.num_steps, self.config.schedule)
        return self.sigma(grid.to(self.sigma.raw_increments.device))


def per_sample(beta: float | Tensor, batch: Tensor) -> Tensor:
    """beta, a number or (N,), as a checked (N,) float32 tensor where `batch` is."""
    check_beta(beta)
    each = torch.as_tensor(beta, dtype=torch.float32, device=batch.device)
    if each.shape not in ((), (1,), (len(batch),)):
        raise ValueError(f"beta must be one number, or one for each of {len(batch)} samples, got {tuple(each.shape)}")
    return each.expand(len(batch))


def multibeta_objective(
    image: Tensor,
    reconstruction: Tensor,
    mean: Tensor,
    sigma: Tensor,
    decoder_sigma: Tensor,
    beta: Tensor,
    beta_max: float = 1.0,
    *,
    balance: float | None = None,
    decoder_weight: float = 0.0,
    perceptual: float | Tensor = 0.0,
) -> Tensor:
    """Negative beta-weighted evidence lower bound (MultiBeta Eq. 4).

    Args:
        image, reconstruction: (N, C, H, W), in [-1, 1].
        mean: Encoder mean f_phi(x, beta), (N, c, h, w).
        sigma: Deviation of the latent at `beta`, (N,), or (N, c) per channel, positive.
        decoder_sigma: Deviation of a pixel at `beta`, (N,), positive.
        beta: Compression of each image, (N,), in [0, beta_max].
        balance: kappa. With D pixels and d latent dimensions the reconstruction's nats are weighted by kappa d / D, so
            that one nat per latent dimension weighs as much as 1 / kappa nats per pixel. None keeps Eq. 4 as printed,
            which is kappa = D / d; a weight w of the KL beside the printed sums is kappa = D / (d w).
        decoder_weight: Added to the reconstruction's weight beta_max - beta; see `scale_gradient`.
        perceptual: Counted as nats of the reconstruction, of each image, (N,).

    Returns:
        Objective per image, (N,), in nats.

    Paper note: with the printed sums nothing is lost until beta > 0.9 and f(x, 1) does not collapse, so the prior of the
    second stage is wrong; kappa between 1 and 4 spreads the loss of information over beta. `bench/literal_paper.py`
    trains both.
    """
    log_likelihood = gaussian_log_density(image, reconstruction, decoder_sigma) - perceptual
    if balance is not None:
        log_likelihood = log_likelihood * (balance * mean[0].numel() / image[0].numel())
    kl = kl_to_standard_normal(mean, sigma)
    return beta * kl - (beta_max - beta + decoder_weight) * log_likelihood


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x itself, whose gradient is multiplied by `factor` (N,) on the way back."""
    factor = factor.view(-1, *[1] * (x.dim() - 1))
    return x * factor + (x * (1 - factor)).detach()


@dataclass(frozen=True)
class Reconstruction:
    """What a VAE makes of images: latents drawn at a beta of each, and these decoded.

    Attributes:
        beta: (N,).
        mean: f(x, beta), (N, *latent_shape).
        sigma, decoder_sigma: Of latent and pixels at beta, (N,); of the latent (N, c) per channel.
        image: g(z, beta), (N, C, H, W).
    """

    beta: Tensor
    mean: Tensor
    sigma: Tensor
    decoder_sigma: Tensor
    image: Tensor


class TrainingCollapsed(RuntimeError):
    """The encoder stopped telling images apart where it should keep everything."""


@dataclass(frozen=True)
class MultiBetaObjectiveOptions:
    """What `MultiBetaObjective` leaves to choose.

    Attributes:
        balance: kappa of `multibeta_objective`; None for Eq. 4 as printed.
        anneal: Fraction of training over which kappa falls geometrically from D / d (Eq. 4 as printed) to `balance`.
        decoder_weight: Weight of the reconstruction that only the decoder feels. Near beta = 1 the weight 1 - beta of Eq. 4
            leaves the decoder untrained; this term trains it without touching the encoder.
        curve_learning_rate: Learning rate of sigma and s relative to the networks'.
        collapse_step: From this step on, a deviation of f(x, 0) below LEAST_DEVIATION over images stops training.

    Raises:
        ValueError: A number out of its range, with the name of its field.
    """

    balance: float | None = 2.0
    anneal: float = 0.25
    decoder_weight: float = 0.1
    curve_learning_rate: float = 5.0
    collapse_step: int = 500

    def __post_init__(self) -> None:
        if self.balance is not None:
            check_number("balance", self.balance, above=0, most=LARGEST_WEIGHT)
        check_number("anneal", self.anneal, least=0)
        check_weights(decoder_weight=self.decoder_weight, curve_learning_rate=self.curve_learning_rate)
        check_integer("collapse_step", self.collapse_step, 0, 2**63)

    @property
    def comparable_from(self) -> float:
        """The share of the training after which kappa stays, so that losses compare."""
        return 0.0 if self.balance is None else self.anneal


class MultiBetaObjective:
    """Training of the VAE (MultiBeta Algorithm 1), for `training.train`.

    Args:
        vae: The model trained.
        options: What there is to choose; `fields` are those of it that differ, by name.
    """

    def __init__(self, vae: MultiBetaVAE, options: MultiBetaObjectiveOptions | None = None, **fields: Any) -> None:
        self.module, self.options = vae, replace(options or MultiBetaObjectiveOptions(), **fields)
        self.comparable_from = self.options.comparable_from
        config = vae.config
        self.last_images, self.at_once = torch.empty(0, config.image_channels, config.resolution, config.resolution), 1

    @property
    def last_layer(self) -> Tensor:
        """Weight of the layer that gives the images."""
        return self.module.decoder.conv_out.weight

    def parameter_groups(self) -> list[dict]:
        """The networks, and the two curves at their own learning rate."""
        networks = [*self.module.encoder.parameters(), *self.module.decoder.parameters()]
        curves = [*self.module.sigma.parameters(), *self.module.decoder_sigma.parameters()]
        return [
            {"params": networks, "learning_rate_scale": 1.0},
            {"params": curves, "learning_rate_scale": self.options.curve_learning_rate},
        ]

    def balance_at(self, progress: float, pixels: int, latent_dimensions: int) -> float | None:
        """kappa after a fraction `progress` of training."""
        balance, anneal = self.options.balance, self.options.anneal
        if balance is None or anneal == 0:
            return balance
        printed = pixels / latent_dimensions
        return balance * (printed / balance) ** max(0.0, 1 - progress / anneal)

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.judge(batch, self.reconstruct(batch.images, generator))

    def reconstruct(self, images: Tensor, generator: torch.Generator) -> Reconstruction:
        """Images (N, C, H, W) at betas that are spread evenly over the grid; the decoder alone feels all of its gradient."""
        vae, config = self.module, self.module.config
        steps = stratified_steps(len(images), 0, config.num_steps, generator)
        beta = step_to_beta(steps, config.num_steps, config.schedule).to(images.device)
        noise = rows(lambda n, source: torch.randn(n, *config.latent_shape, generator=source), len(images), generator)

        mean = vae.encode(images, beta).float()
        sigma, decoder_sigma = vae.sigma(beta), vae.decoder_sigma(beta)
        latent = sample(mean, sigma, noise.to(images.device))
        felt_by_encoder = (1 - beta) / (1 - beta + self.options.decoder_weight).clamp(min=1e-12)
        return Reconstruction(beta, mean, sigma, decoder_sigma, vae.decode(scale_gradient(latent, felt_by_encoder), beta).float())

    def judge(self, batch: Batch, made: Reconstruction, perceptual: float | Tensor = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss in nats per latent dimension, scalars) of what was made of a batch; `perceptual` as of `multibeta_objective`."""
        vae, options, images = self.module, self.options, batch.images
        objective = multibeta_objective(
            images,
            made.image,
            made.mean,
            made.sigma,
            made.decoder_sigma,
            made.beta,
            balance=self.balance_at(batch.progress, images[0].numel(), made.mean[0].numel()),
            decoder_weight=options.decoder_weight,
            perceptual=perceptual,
        )
        self.last_images, self.at_once = torch.cat([images, self.last_images.to(images)])[:LOOKED_AT], len(images)
        scalars = {
            "kl": kl_to_standard_normal(made.mean, made.sigma).mean(),
            "mse": (made.image - images).square().mean(),
            "mse_low_beta": (made.image - images)[made.beta <= made.beta.quantile(0.1)].square().mean(),
            "sigma_zero": vae.sigma(torch.zeros(1, device=images.device)).mean(),
        }
        return objective.mean() / made.mean[0].numel(), scalars

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Raise `TrainingCollapsed` when f(x, 0) hardly depends on x after `collapse_step` steps."""
        if step < self.options.collapse_step:
            return
        seen, at_once = distribution.gather_rows(self.last_images)[:LOOKED_AT], max(distribution.gather(self.at_once))
        encodings = torch.cat([self.module.encode(images, 0.0) for images in seen.split(at_once)])
        deviation = float(encodings.std(0).mean())
        if deviation < LEAST_DEVIATION:
            raise TrainingCollapsed(
                f"posterior collapse: at step {step} the encodings at beta = 0 differ by only {deviation:.4f} between images "
                f"(healthy: 0.8 to 1.2). The KL term won before the reconstruction was learned. Raise the balance (now "
                f"{self.options.balance}), lengthen its anneal (now {self.options.anneal} of training), or use activation 'silu'."
            )


@torch.no_grad()
def fold_principal_axes(vae: MultiBetaVAE, encodings: Tensor) -> Tensor:
    """Rotate the latent space to the principal axes of `encodings`, in the weights; the VAE's function is unchanged.

    With the isotropic noise of MultiBeta Eq. 3 the objective is blind to rotations of the latent space; this one makes
    channel 0 the direction of largest variance. It acts on channels, so it commutes with the convolutions around it.

    Args:
        encodings: f(x, 0.5) of many training images, (N, c, h, w).

    Returns:
        The rotation Q, (c, c): new latent = Q^T old latent.

    Raises:
        ValueError: sigma differs by channel: then the noise is not blind to rotations.
    """
    if vae.config.sigma_per_channel:
        raise ValueError("the axes of a VAE with one sigma per channel cannot be rotated: fold them before untie_sigma")
    channels = encodings.transpose(0, 1).flatten(1).double()
    covariance = torch.cov(channels).reshape(len(channels), -1)  # of one channel cov gives a scalar: its axis is 1
    _, axes = torch.linalg.eigh(covariance)
    axes = axes.flip(1)
    rotation = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()

    conv_out, conv_in = vae.encoder.conv_out, vae.decoder.conv_in
    rotation = rotation.to(conv_out.weight.device)
    conv_out.weight.copy_(torch.einsum("cd,cihw->dihw", rotation, conv_out.weight.double()))
    assert conv_out.bias is not None
    conv_out.bias.copy_(rotation.T @ conv_out.bias.double())
    reads_latent_first = isinstance(conv_in, nn.ConvTranspose2d)
    equation = "cohw,cd->dohw" if reads_latent_first else "ochw,cd->odhw"
    conv_in.weight.copy_(torch.einsum(equation, conv_in.weight.double(), rotation))
    return rotation.float()


@torch.no_grad()
def untie_sigma(vae: MultiBetaVAE) -> MultiBetaVAE:
    """The VAE with one curve sigma_j(beta) per latent channel, all equal to the one it had: a start for training on.

    Noise that differs by channel is not blind to rotations, so training keeps axes that it would not find by itself: fold
    the principal axes first.
    """
    if vae.config.sigma_per_channel:
        raise ValueError("sigma differs by channel already")
    untied = MultiBetaVAE(replace(vae.config, sigma_per_channel=True)).to(vae.sigma.raw_increments.device)
    shared = vae.sigma.raw_increments
    state = vae.state_dict() | {"sigma.raw_increments": shared.expand(vae.config.latent_channels, -1).clone()}
    untied.load_state_dict(state)
    return untied


@torch.no_grad()
def slope_ratio(vae: MultiBetaVAE, images: Tensor, beta: float, width: float = 0.02, step: float = 0.001) -> float:
    """How rough f(x, beta) is in beta: rms slope over `step` relative to rms slope over `width`.

    1 for a smooth encoder; above 2 the differences of MultiBeta Eq. 19 are mostly oscillation.
    """
    here, near, far = (vae.encode(images, b) for b in (beta, beta - step, beta - width))
    return float(((near - here).square().mean().sqrt() / step) / ((far - here).square().mean().sqrt() / width))
