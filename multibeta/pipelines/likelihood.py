"""How likely images are to a `DenoisingMultiBetaVAE`: log p(z_0) along its ODE, and a bound in bits per dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from multibeta import data
from multibeta.blocks import input_dtype
from multibeta.multibeta_vae import per_sample
from multibeta.sampling import sample_with_volume
from multibeta.schedules import spatial
from multibeta.variational import bits_per_dimension, dequantised, gaussian_log_density

if TYPE_CHECKING:
    from multibeta.pipelines.multi_beta import DenoisingMultiBetaVAE


class LogLikelihood(NamedTuple):
    """A bound on the log probability of images of 8 bits, E_q[log P(x|z_0) + log p(z_0) - log q(z_0|x)], each (N,) float64.

    Attributes:
        bits_per_dimension: So many bits, on average over pixels and channels, suffice for an image.
        pixels: log P(x|z_0) of the decoder, in nats.
        latent: log p(z_0) of the process over all betas, in nats.
        posterior: log q(z_0|x) of the encoder, in nats.
    """

    bits_per_dimension: Tensor
    pixels: Tensor
    latent: Tensor
    posterior: Tensor


def latent_log_density(
    model: DenoisingMultiBetaVAE, latents: Tensor, sampler: str, steps: int, num_probes: int | None, seeds: Tensor
) -> Tensor:
    """log p(z_0): see `DenoisingMultiBetaVAE.latent_log_density`."""
    rows = model.diffusion.sampler_rows(sampler, steps, start=0, stop=model.num_steps)
    latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
    options = {"num_probes": num_probes, "basis": model.diffusion.cosines}
    noise, log_volume = sample_with_volume(model.diffusion.predict, rows, latents, seeds, **options)
    return model.diffusion.log_prior(noise) + log_volume


@torch.no_grad()
def log_likelihood(
    model: DenoisingMultiBetaVAE, images: Tensor, sampler: str, steps: int, num_probes: int | None, seeds: Tensor
) -> LogLikelihood:
    """The bound for images (N, C, H, W) in [-1, 1]: see `DenoisingMultiBetaVAE.log_likelihood`."""
    images = data.to_float(data.to_uint8(images)).to(model.device)
    mean, latents = model.encode(images, 0.0), model.encode(images, 0.0, seeds=seeds)
    zero, dimensions = per_sample(0.0, mean), images[0].numel()
    sigma, s = model.vae.sigma(zero).double(), model.vae.decoder_sigma(zero).double()
    reconstructions = model.vae.decode(latents.to(input_dtype(model.vae.decoder)), 0.0)
    pixels = gaussian_log_density(images, reconstructions, s)
    pixels = dequantised(pixels, dimensions / s**2, dimensions)
    posterior = Normal(mean.double(), spatial(sigma), validate_args=False).log_prob(latents.double()).flatten(1).sum(1)
    latent = latent_log_density(model, latents, sampler, steps, num_probes, seeds)
    return LogLikelihood(bits_per_dimension(pixels + latent - posterior, dimensions), pixels, latent, posterior)
