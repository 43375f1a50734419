"""A decoder against a discriminator, as latent-diffusion trains its autoencoders (Esser et al. 2021, Rombach et al. 2022)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multibeta.checks import check_even, check_integer, check_number, check_weights
from multibeta.draws import noise_like, rows
from multibeta.metrics.lpips import LPIPS, load_lpips
from multibeta.multibeta_vae import MultiBetaVAE, Reconstruction
from multibeta.networks import PatchDiscriminator
from multibeta.training import Batch
from multibeta.variational import gaussian_log_density, sample

logger = logging.getLogger(__name__)

ADAM_BETAS = (0.5, 0.9)  # of a discriminator, and of latent-diffusion's autoencoders
LARGEST_RATIO = 1e4  # of the two gradients
PATIENCE = 500  # updates that look alike, after which a discriminator counts as collapsed
INDIFFERENT, CERTAIN = 0.98, 0.02  # its hinge loss is above, and it tells nothing apart; below, and nothing fools it


@dataclass(frozen=True)
class AdversarialOptions:
    """How a decoder is trained against a discriminator. A number out of its range is a `ValueError` with its name.

    Attributes:
        weight: Of the discriminator's verdict beside the reconstruction, in gradients of the last layer; 0 trains without.
        start: Fraction of the training after which both begin against each other.
        beta_weighted: Judge images of beta by 1 - beta, as Eq. 4 judges their reconstruction: an image of high beta is an
            average, which no real one resembles. Otherwise all alike.
        vgg: File of the network of LPIPS, see `metrics.load_lpips`; without it training is without LPIPS.
        heads: File of its weights of the channels.
        perceptual_weight: Of LPIPS, which counts once for every value of an image.
        penalty: R1, gamma / 2 |grad D(x)|^2 of real images (Mescheder et al. 2018), in the discriminator's loss; 0 for none.
        discriminator_rate: Its learning rate relative to the decoder's.
        discriminator_channels: Of its first layer, even, see `networks.PatchDiscriminator`.
        discriminator_layers: That halve the resolution.
        discriminator_norm: Of groups of channels, or as published of the batch.
    """

    weight: float = 0.5
    start: float = 0.0
    beta_weighted: bool = True
    vgg: str | None = None
    heads: str | None = None
    perceptual_weight: float = 1.0
    penalty: float = 0.0
    discriminator_rate: float = 1.0
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    discriminator_norm: Literal["group", "batch"] = "group"

    def __post_init__(self) -> None:
        check_weights(
            weight=self.weight,
            perceptual_weight=self.perceptual_weight,
            penalty=self.penalty,
            discriminator_rate=self.discriminator_rate,
        )
        check_number("start", self.start, least=0, most=1)
        if not isinstance(self.beta_weighted, bool):
            raise ValueError(f"beta_weighted must be True or False, got {self.beta_weighted!r}")
        if self.heads is not None and self.vgg is None:
            raise ValueError(f"heads need vgg, the weights of the network that they are of, got {self.heads}")
        for name in ("discriminator_channels", "discriminator_layers"):
            check_integer(name, getattr(self, name), 1)
        check_even(self, "discriminator_channels")

    @property
    def active(self) -> bool:
        """Whether anything besides the reconstruction is judged."""
        return self.weight > 0 or self.vgg is not None

    def discriminator(self, image_channels: int, resolution: int) -> PatchDiscriminator:
        """A new one; `ValueError` where the images are too small for it."""
        layers, most = self.discriminator_layers, PatchDiscriminator.most_layers(resolution)
        if layers > most:
            raise ValueError(f"discriminator_layers must be at most {most} for {resolution} x {resolution} pixels, got {layers}")
        return PatchDiscriminator(image_channels, self.discriminator_channels, layers, self.discriminator_norm)

    def lpips(self, image_channels: int) -> LPIPS | None:
        """That of the named weights; None where none are named."""
        if self.vgg is None:
            return None
        if image_channels != 3:
            raise ValueError(f"vgg belongs to images of 3 channels, these have {image_channels}")
        return load_lpips(self.vgg, self.heads)

    def say_what_is_left_out(self) -> None:
        """Log that LPIPS is, where its weights are not named."""
        if self.active and self.vgg is None:
            logger.info("no weights of LPIPS are named (vgg, heads): training goes on without it")

    def judged(self, beta: Tensor) -> Tensor:
        """Weight of the images of each beta, (N,)."""
        return 1 - beta if self.beta_weighted else torch.ones_like(beta)


class Reconstructing(Protocol):
    """An objective of two steps, so that others can judge what it reconstructs."""

    @property
    def module(self) -> nn.Module:
        """What learns."""
        ...

    @property
    def last_layer(self) -> Tensor:
        """Weight of the layer that gives the images."""
        ...

    def parameter_groups(self) -> list[dict]:
        """See `training.train`."""
        ...

    def reconstruct(self, images: Tensor, generator: torch.Generator, /) -> Reconstruction:
        """Images (N, C, H, W), encoded and decoded."""
        ...

    def judge(self, batch: Batch, made: Reconstruction, perceptual: float | Tensor, /) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, scalars) of a reconstruction, with nats (N,) that count as its own."""
        ...


class AdversarialObjective:
    """An objective whose reconstructions are also judged by LPIPS, and by a discriminator that learns to tell them from images.

        L = L_rec + w r g,   g = -mean (1 - beta) D(y),   r = |dL_rec / dW| / (|dg / dW| + 1e-4), at most 1e4

    with y the reconstruction, W the weight of the last layer, r a constant and w the `weight`. L_rec is the objective's own loss,
    in which LPIPS counts as nats of each value of the image. Of MultiBeta Eq. 4 it is the weighted one, so the verdict fades with
    the reconstruction. The discriminator, the `opponent`, minimises

        mean (1 - beta) (relu(1 - D(x)) + relu(1 + D(y))) / 2 + penalty / 2 mean |dD(x) / dx|^2

    on reconstructions of its own, after each update. Logged are "adversarial_loss", g, "adversarial_weight", w r, "lpips" where
    it is used, and those of `DiscriminatorObjective`. Validation measures L_rec alone; since a game has no loss that compares,
    the last weights are taken.

    Args:
        reconstruction: The objective, such as `MultiBetaObjective` or `DecoderObjective`.
        discriminator: The network; None where the weight is 0.
        lpips: Of the user's weights; None trains without.

    Paper note: MultiBeta names "LPIPS + GAN + KL" (Table 4) without weights. latent-diffusion's |x - y| at a fixed scale is the
    Gaussian of Eq. 2 with its learned deviation here; its weight of the KL is `balance`.
    """

    def __init__(
        self,
        reconstruction: Reconstructing,
        discriminator: PatchDiscriminator | None,
        options: AdversarialOptions,
        lpips: LPIPS | None = None,
    ) -> None:
        self.reconstruction, self.module = reconstruction, reconstruction.module
        self.discriminator, self.options, self.lpips = discriminator, options, lpips
        self.comparable_from = getattr(reconstruction, "comparable_from", 0.0) if discriminator is None else 1.0
        if (discriminator is None) != (options.weight == 0):
            raise ValueError(f"a discriminator belongs to a weight above 0, got {discriminator} with {options.weight}")
        self.opponent = None if discriminator is None else DiscriminatorObjective(discriminator, reconstruction, options)

    def parameter_groups(self) -> list[dict]:
        return self.reconstruction.parameter_groups()

    def check(self, step: int) -> None:
        """What the objective itself checks."""
        if check := getattr(self.reconstruction, "check", None):
            check(step)

    def gather(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Both gradients of the last layer, of an update in pieces: a piece's mean for each of its images."""
        if not self.contested(batch):
            return {}
        with torch.enable_grad():
            loss, made, _ = self.judge(batch, generator)
            gradients = self.gradients(loss, self.verdict(made))
        return {name: gradient.expand(len(batch.images), *gradient.shape) for name, gradient in gradients.items()}

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, made, scalars = self.judge(batch, generator)
        if not self.contested(batch):
            return loss, scalars
        verdict = self.verdict(made)
        gradients = batch.update or {name: own[None] for name, own in self.gradients(loss, verdict).items()}
        content, adversarial = (gradients[name].mean(0).norm() for name in ("content", "adversarial"))
        weight = self.options.weight * (content / (adversarial + 1e-4)).clamp(max=LARGEST_RATIO)
        return loss + weight * verdict, scalars | {"adversarial_loss": verdict, "adversarial_weight": weight}

    def contested(self, batch: Batch) -> bool:
        """Whether a discriminator judges this batch."""
        return self.opponent is not None and self.opponent.begun(batch) and not batch.held_out

    def judge(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Reconstruction, dict[str, Tensor]]:
        """(L_rec, what was reconstructed, scalars)."""
        made = self.reconstruction.reconstruct(batch.images, generator)
        if self.lpips is None:
            loss, scalars = self.reconstruction.judge(batch, made, 0.0)
            return loss, made, scalars
        with torch.autocast(batch.images.device.type, enabled=False):
            distance = self.lpips.distance(batch.images, made.image)
        nats = self.options.perceptual_weight * batch.images[0].numel() * distance
        loss, scalars = self.reconstruction.judge(batch, made, nats)
        return loss, made, scalars | {"lpips": distance.mean()}

    def verdict(self, made: Reconstruction) -> Tensor:
        """g, low where reconstructions look real."""
        assert self.discriminator is not None
        logits = self.discriminator(made.image).flatten(1).mean(1)
        return -(self.options.judged(made.beta) * logits).mean()

    def gradients(self, loss: Tensor, verdict: Tensor) -> dict[str, Tensor]:
        """Of both at the last layer."""
        layer = self.reconstruction.last_layer
        content, adversarial = (torch.autograd.grad(each, layer, retain_graph=True)[0] for each in (loss, verdict))
        return {"content": content, "adversarial": adversarial}


class DiscriminatorObjective:
    """The opponent in an `AdversarialObjective`: hinge loss of images and of what is reconstructed of them.

    Logged are "discriminator_loss", the hinge loss, and the mean logits "discriminator_real" and "discriminator_fake". A
    discriminator that tells nothing apart for `PATIENCE` updates, or that nothing fools, is warned of, once: the decoder then
    learns its reconstruction alone, or follows a verdict that says no more where to go, which harms no training but its purpose.
    """

    def __init__(self, discriminator: PatchDiscriminator, reconstruction: Reconstructing, options: AdversarialOptions) -> None:
        self.module, self.reconstruction, self.options = discriminator, reconstruction, options
        self.since_check: list[Tensor] = []
        self.alike: dict[str, int] = {}
        self.checked = 0

    def parameter_groups(self) -> list[dict]:
        """The network at its own rate and with its own betas."""
        rate = self.options.discriminator_rate
        return [{"params": list(self.module.parameters()), "learning_rate_scale": rate, "betas": ADAM_BETAS}]

    def begun(self, batch: Batch) -> bool:
        """Whether it learns, and judges, already."""
        return batch.progress >= self.options.start

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.begun(batch):
            return 0 * self.module(batch.images[:1]).mean(), {}
        with torch.no_grad():
            made = self.reconstruction.reconstruct(batch.images, generator)
        real, fake = (self.module(images).flatten(1) for images in (batch.images, made.image))
        hinge = 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean(1)
        judged = self.options.judged(made.beta)
        loss = (judged * hinge).mean()
        scalars = {
            "discriminator_loss": (judged * hinge).sum() / judged.sum(),
            "discriminator_real": real.mean(),
            "discriminator_fake": fake.mean(),
        }
        self.since_check.append(torch.stack([value.detach() for value in scalars.values()]))
        if self.options.penalty:
            slope = self.slope(batch.images)
            loss, scalars = loss + self.options.penalty / 2 * slope, scalars | {"discriminator_slope": slope}
        return loss, scalars

    def slope(self, images: Tensor) -> Tensor:
        """Mean of |dD(x) / dx|^2 over images, D their mean logit."""
        with torch.autocast(images.device.type, enabled=False):
            images = images.detach().float().requires_grad_(True)
            logits = self.module(images).flatten(1).mean(1)
            (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradient.square().flatten(1).sum(1).mean()

    def check(self, step: int) -> None:
        """Warn of a discriminator that has long been no use."""
        if not self.since_check:
            self.checked = step
            return
        loss, real, fake = torch.stack(self.since_check).mean(0).tolist()
        states = {
            "tells nothing apart": loss > INDIFFERENT and abs(real - fake) < CERTAIN,
            "is not fooled by anything": loss < CERTAIN,
        }
        for state, holds in states.items():
            before = self.alike.get(state, 0)
            self.alike[state] = before + step - self.checked if holds else 0
            if before < PATIENCE <= self.alike[state]:
                logger.warning(
                    "the discriminator %s since step %d: its hinge loss is %.3f, its mean logits are %.3f of images and %.3f of "
                    "reconstructions. Another discriminator_rate, more or fewer discriminator_channels, or a penalty may help",
                    *(state, step - self.alike[state], loss, real, fake),
                )
        self.since_check, self.checked = [], step


def against_discriminator(
    reconstruction: Reconstructing, vae: MultiBetaVAE, options: AdversarialOptions, seed: int
) -> AdversarialObjective:
    """An objective of a VAE against a new discriminator, which a seed draws, and with LPIPS where its weights are named."""
    config, device = vae.config, vae.sigma.raw_increments.device
    discriminator = None
    if options.weight:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
            torch.manual_seed(seed)
            discriminator = options.discriminator(config.image_channels, config.resolution).to(device)
    lpips = options.lpips(config.image_channels)
    return AdversarialObjective(reconstruction, discriminator, options, lpips if lpips is None else lpips.to(device))


class DecoderObjective:
    """Reconstruction by the decoder alone, of latents of a frozen encoder: what tunes a decoder (MultiBeta section 4.2).

        mean (1 - beta) (-log p(x|z) + LPIPS), in nats per value of an image

    with sigma, s and the embedding of beta as they are.

    Args:
        vae: The model; its decoder learns.
        largest_beta: Latents are of betas from 0 to this. Those that were denoised are decoded at 0, where alone it learns by
            default.
    """

    def __init__(self, vae: MultiBetaVAE, largest_beta: float = 0.0) -> None:
        check_number("largest_beta", largest_beta, least=0, below=1)
        self.vae, self.module, self.largest_beta = vae, vae.decoder, largest_beta

    @property
    def last_layer(self) -> Tensor:
        return self.module.conv_out.weight

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The decoder without its embedding of beta."""
        named = self.module.named_parameters()
        return [{"params": [parameter for name, parameter in named if not name.startswith("embedding.")]}]

    def reconstruct(self, images: Tensor, generator: torch.Generator) -> Reconstruction:
        """Images (N, C, H, W), from a sample of the latent at a beta of each."""
        vae = self.vae
        uniform = rows(lambda n, source: torch.rand(n, generator=source), len(images), generator)
        beta = self.largest_beta * uniform.to(images.device)
        with torch.no_grad():
            mean = vae.encode(images, beta).float()
            sigma, decoder_sigma = vae.sigma(beta), vae.decoder_sigma(beta)
            latent = sample(mean, sigma, noise_like(mean, generator))
        return Reconstruction(beta, mean, sigma, decoder_sigma, vae.decode(latent, beta).float())

    def judge(self, batch: Batch, made: Reconstruction, perceptual: float | Tensor = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, scalars), see above."""
        nats = perceptual - gaussian_log_density(batch.images, made.image, made.decoder_sigma)
        loss = ((1 - made.beta) * nats).mean() / batch.images[0].numel()
        return loss, {"mse": (made.image - batch.images).square().mean()}

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.judge(batch, self.reconstruct(batch.images, generator))
