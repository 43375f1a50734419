"""What the multi-beta VAE is compared with, on its own backbone (MultiBeta Tables 1, 2 and 7): one objective each.

Reconstruction and KL are sums over an image in nats, averaged over the batch, as Locatello et al. 2019 train these methods.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import functional_call

from multibeta.checks import check_integer, check_number, check_weights
from multibeta.draws import shared
from multibeta.networks import AutoencoderConfig
from multibeta.training import Batch
from multibeta.variational import capacity_at, capacity_penalty, draw, kl_to_prior

Estimator = Literal["stratified", "as_published", "weighted"]


class VAE(nn.Module):
    """An ordinary VAE: q(z|x) = N(mean(x), diag deviation(x)^2), p(x|z) Bernoulli in every pixel value.

    Encoder and decoder are those of a `MultiBetaVAE` of the same config; their input beta is 0 throughout.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = config.build(channels_per_latent=2)

    def posterior(self, images: Tensor) -> Normal:
        """q(z|x) of images (N, C, H, W) in [-1, 1], over (N, *latent_shape), float32."""
        mean, log_variance = self.encoder(images, images.new_zeros(len(images))).float().chunk(2, dim=1)
        return Normal(mean, (0.5 * log_variance).exp(), validate_args=False)

    def logits(self, latents: Tensor) -> Tensor:
        """Bernoulli logits of images scaled to [0, 1], from latents (N, *latent_shape), float32."""
        return self.decoder(latents, latents.new_zeros(len(latents))).float()

    def encode(self, images: Tensor) -> Tensor:
        """Mean of q(z|x), (N, *latent_shape)."""
        return self.posterior(images).mean

    def decode(self, latents: Tensor) -> Tensor:
        """Mean of p(x|z) as images in [-1, 1]."""
        return 2 * self.logits(latents).sigmoid() - 1


class BetaVAEObjective:
    """VAE (beta = 1, Kingma and Welling 2014) and beta-VAE (Higgins et al. 2017), for `training.train`.

    The other objectives of this module differ in `penalty`, and in that it belongs to all images of an update together: see
    `WholeBatchObjective`. A weight that is negative, not finite or beyond float32 is a `ValueError` with its name.
    """

    def __init__(self, vae: VAE, beta: float = 1.0) -> None:
        check_weights(beta=beta)
        self.module = self.vae = vae
        self.beta = beta

    def penalty(self, kl: Tensor, posterior: Normal, latents: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """What is added to the reconstruction error, a scalar in nats.

        Args:
            kl: KL(q(z|x) || p(z)) per image, (N,).
            latents: One sample of `posterior` for each image, (N, *latent_shape).
        """
        return self.beta * kl.mean()

    def sample(self, images: Tensor, generator: torch.Generator) -> tuple[Normal, Tensor]:
        """q(z|x) of images and one sample of it for each."""
        posterior = self.vae.posterior(images)
        return posterior, draw(posterior, generator)

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss in nats per pixel value, so that its scale is that of other objectives, and its parts in nats per image."""
        images = batch.images
        posterior, latents = self.sample(images, generator)
        error = F.binary_cross_entropy_with_logits(self.vae.logits(latents), (images + 1) / 2, reduction="none")
        error, kl = error.flatten(1).sum(1).mean(), kl_to_prior(posterior)
        penalty = self.penalty(kl, posterior, latents, batch, generator)
        scalars = {"reconstruction": error, "kl": kl.mean(), "penalty": penalty}
        return (error + penalty) / images[0].numel(), scalars


class WholeBatchObjective(BetaVAEObjective):
    """One whose penalty is no mean over images: of a batch in pieces each piece computes it from the latents of all."""

    def gather(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """What the penalty of an update needs of all its images."""
        return as_rows(*self.sample(batch.images, generator))

    def penalty(self, kl: Tensor, posterior: Normal, latents: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        whole = batch.complete(as_rows(posterior, latents))
        posterior = Normal(whole["mean"], whole["deviation"], validate_args=False)
        return batch.share(self.whole_penalty(kl_to_prior(posterior), posterior, whole["latents"], batch.progress, generator))

    def whole_penalty(
        self, kl: Tensor, posterior: Normal, latents: Tensor, progress: float, generator: torch.Generator
    ) -> Tensor:
        """`penalty` of all images of an update."""
        raise NotImplementedError


def as_rows(posterior: Normal, latents: Tensor) -> dict[str, Tensor]:
    """A posterior and its sample by name, (N, *latent_shape) each."""
    return {"mean": posterior.mean, "deviation": posterior.stddev, "latents": latents}


class AnnealedVAEObjective(WholeBatchObjective):
    """Capacity-controlled VAE (Burgess et al. 2018): gamma |KL - C|, C rising linearly to `capacity` nats.

    Args:
        warmup: Fraction of training after which C stays at `capacity`; 0 is from the first step on.
    """

    def __init__(self, vae: VAE, gamma: float = 1000.0, capacity: float = 25.0, warmup: float = 1.0) -> None:
        super().__init__(vae)
        check_weights(gamma=gamma, capacity=capacity)
        check_number("warmup", warmup, least=0)
        self.gamma, self.capacity, self.warmup = gamma, capacity, warmup
        self.comparable_from = warmup

    def whole_penalty(
        self, kl: Tensor, posterior: Normal, latents: Tensor, progress: float, generator: torch.Generator
    ) -> Tensor:
        return capacity_penalty(kl, capacity_at(progress, self.capacity, self.warmup), self.gamma)


class BetaTCVAEObjective(WholeBatchObjective):
    """beta-TCVAE (Chen et al. 2018): KL + (beta - 1) TC, as Locatello et al. 2019 train it.

    Args:
        dataset_size: Images in the training set.
        estimator: See `total_correlation`.
    """

    def __init__(self, vae: VAE, dataset_size: int, beta: float = 6.0, estimator: Estimator = "stratified") -> None:
        super().__init__(vae, beta)
        check_integer("dataset_size", dataset_size, 1, 2**63)
        self.dataset_size = dataset_size
        self.estimator: Estimator = estimator

    def whole_penalty(
        self, kl: Tensor, posterior: Normal, latents: Tensor, progress: float, generator: torch.Generator
    ) -> Tensor:
        correlation = total_correlation(latents, posterior, self.dataset_size, self.estimator)
        return kl.mean() + (self.beta - 1) * correlation


def total_correlation(
    latents: Tensor,
    posterior: Normal,
    dataset_size: int,
    estimator: Estimator = "stratified",
) -> Tensor:
    """TC = E[log q(z) - sum_d log q(z_d)] of the aggregate posterior, estimated in a batch (Chen et al. 2018, App. C), in nats.

    Args:
        latents: Samples of `posterior`, (N, ...).
        dataset_size: Images in the training set, at least N.
        estimator: "stratified" weighs each latent's own posterior by 1 / dataset_size, as the derivation says; "as_published"
            fills the first two columns of the weights instead, as the code of the paper does; "weighted" is minibatch-weighted
            sampling.

    Paper note: the published code strides the flat weights by N instead of N + 1 and so misses their diagonal;
    `test_baselines.py` compares each with the exact value on a Gaussian.
    """
    count = len(latents)
    if dataset_size < count:
        raise ValueError(f"dataset_size must be at least the batch of {count}, got {dataset_size}")
    z, mean, deviation = (tensor.flatten(1) for tensor in (latents, posterior.mean, posterior.stddev))
    log_density = Normal(mean, deviation, validate_args=False).log_prob(z[:, None])  # of z_i under q(z | x_j): (N, N, D)
    if estimator == "weighted":
        weights = torch.full((count, count), -math.log(count * dataset_size), device=z.device)
    else:
        weights = stratified_weights(count, dataset_size, estimator == "as_published").log().to(z.device)
    log_joint = torch.logsumexp(weights + log_density.sum(2), dim=1)
    log_marginals = torch.logsumexp(weights[:, :, None] + log_density, dim=1).sum(1)
    return (log_joint - log_marginals).mean()


def stratified_weights(count: int, dataset_size: int, as_published: bool = False) -> Tensor:
    """Importance weights of minibatch stratified sampling (Chen et al. 2018, App. C.2), rows sum to 1, (count, count).

    Row i weighs x_i itself by 1 / dataset_size, one other image by (dataset_size - count + 1) / (dataset_size (count - 1)), the
    rest by 1 / (count - 1) each.
    """
    if count < 2:
        raise ValueError(f"stratified sampling needs a batch of at least 2, got {count}")
    others = count - 1
    remainder = (dataset_size - others) / (dataset_size * others)
    weights = torch.full((count, count), 1 / others)
    own = torch.zeros(count, dtype=torch.int64) if as_published else torch.arange(count)
    weights[torch.arange(count), own] = 1 / dataset_size
    weights[torch.arange(count), (own + 1) % count] = remainder
    if as_published:
        weights[others - 1, 0] = remainder
    return weights


class FactorVAEObjective(BetaVAEObjective):
    """FactorVAE (Kim and Mnih 2018): KL + gamma TC, by a discriminator of latents and latents permuted across images.

    The discriminator learns in the same step, from latents that carry no gradient, and the VAE's term sees its weights as
    constants: neither receives a gradient of the other's loss. Its Adam has the published betas (0.5, 0.9).

    Args:
        width, depth: Of the discriminator's hidden layers and their number; 1000 and 6 as published.
    """

    def __init__(self, vae: VAE, gamma: float = 10.0, *, width: int = 1000, depth: int = 6) -> None:
        super().__init__(vae)
        check_weights(gamma=gamma)
        for name, value in (("width", width), ("depth", depth)):
            check_integer(name, value, 1)
        self.gamma, self.comparable_from = gamma, 1.0  # the loss is that of a game, no measure of how well it stands
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise([math.prod(vae.config.latent_shape), *[width] * depth]):
            layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(0.2)]
        self.discriminator = nn.Sequential(*layers, nn.Linear(width, 2)).to(next(vae.parameters()).device)
        self.module = nn.ModuleDict({"vae": vae, "discriminator": self.discriminator})

    def parameter_groups(self) -> list[dict]:
        """The VAE, and the discriminator with its own betas."""
        return [
            {"params": list(self.vae.parameters())},
            {"params": list(self.discriminator.parameters()), "betas": (0.5, 0.9)},
        ]

    def penalty(self, kl: Tensor, posterior: Normal, latents: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        constants = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        joint, factorised = functional_call(self.discriminator, constants, latents).float().unbind(1)
        everyone = batch.complete({"latents": latents.detach()})["latents"]
        own = slice(batch.start, batch.start + len(latents))
        return kl.mean() + self.gamma * (joint - factorised).mean() + self.discriminator_loss(everyone, generator, own)

    def gather(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """What the discriminator needs of all images of an update: latents to permute."""
        return {"latents": self.sample(batch.images, generator)[1]}

    def discriminator_loss(self, latents: Tensor, generator: torch.Generator, own: slice = slice(None)) -> Tensor:
        """Cross-entropy of telling latents (class 0) from latents permuted across images in each dimension (class 1).

        The mean over the rows `own` of both.
        """
        flat = latents.flatten(1)
        order = torch.rand(flat.shape, generator=shared(generator)).argsort(0).to(flat.device)
        both = torch.cat([flat[own], flat.gather(0, order)[own]])
        classes = torch.arange(2, device=flat.device).repeat_interleave(len(both) // 2)
        return F.cross_entropy(self.discriminator(both).float(), classes)


class InfoVAEObjective(WholeBatchObjective):
    """InfoVAE (Zhao et al. 2019): (1 - alpha) KL(q(z|x) || p(z)) + (alpha + lambda - 1) MMD^2(q(z), p(z))."""

    def __init__(self, vae: VAE, alpha: float = 0.0, lambda_: float = 1000.0) -> None:
        super().__init__(vae)
        check_number("alpha", alpha)
        check_weights(lambda_=lambda_)
        self.alpha, self.lambda_ = alpha, lambda_

    def whole_penalty(
        self, kl: Tensor, posterior: Normal, latents: Tensor, progress: float, generator: torch.Generator
    ) -> Tensor:
        prior = torch.randn(latents.shape, generator=shared(generator)).to(latents.device)
        discrepancy = squared_mmd(latents.flatten(1), prior.flatten(1))
        return (1 - self.alpha) * kl.mean() + (self.alpha + self.lambda_ - 1) * discrepancy


def squared_mmd(first: Tensor, second: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, Eq. 3) of two samples (N, D) and (M, D), a scalar.

    The kernel is exp(-|a - b|^2 / (2 D)); pairs of a point with itself do not count.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * a.shape[1]))

    def within(sample: Tensor) -> Tensor:
        values = kernel(sample, sample)
        return (values.sum() - values.diagonal().sum()) / (len(sample) * (len(sample) - 1))

    return within(first) + within(second) - 2 * kernel(first, second).mean()
