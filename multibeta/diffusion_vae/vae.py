"""The first stage: a VAE held to a capacity, DiffusionVAE Eq. 12."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from multibeta.checks import check_number, check_weights
from multibeta.networks import BlockAutoencoderConfig
from multibeta.training import Batch
from multibeta.variational import capacity_at, capacity_penalty, draw, kl_to_prior


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

    @property
    def comparable_from(self) -> float:
        """The share of the training after which C stays, so that losses compare."""
        return self.warmup


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
        self.comparable_from = self.options.comparable_from

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
