"""log p(z_0) of a process in closed form, and the bound on log P(x) where the encoder is the exact posterior."""

import math

import pytest
import torch
from closed_form import CHANNELS, SIDE, gaussian_model
from torch import nn
from torch.distributions import LowRankMultivariateNormal, Normal

from multibeta import data, variational

PIXELS = 3 * (4 * SIDE) ** 2
BIN = 2 / 255


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return torch.randint(0, 256, (count, 3, 4 * SIDE, 4 * SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def at_zero(model):
    """N(m, F^2 + sigma^2) at beta = 0, of each coefficient."""
    sigma, mean, deviation, _ = model.diffusion.tables(torch.zeros(1, dtype=torch.int64))
    return Normal(mean.double(), (deviation**2 + sigma**2).sqrt().double(), validate_args=False)


@pytest.mark.parametrize(
    "process",
    [
        {},
        {"parameterization": "v"},
        {"parameterization": "literal"},
        {"basis": "cosine", "sigma_per_channel": True, "spacing": "turn"},
        {"sigma_per_channel": True},
    ],
)
def test_the_density_of_a_gaussian_process_is_its_closed_form(process):
    """But for the prior of "literal", N(0, I) as printed, which z_1 of a process that has shrunk to a twentieth is near to."""
    model, normal = gaussian_model(num_steps=1000, **process), rand(4, CHANNELS, SIDE, SIDE)
    density = at_zero(model)
    latents = model.diffusion.pixels((density.mean + density.stddev * normal).float())
    expected = density.log_prob(model.diffusion.coefficients(latents)).flatten(1).sum(1)
    found = model.latent_log_density(latents, steps=50)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 3e-3 * latents[0].numel()  # nats per dimension


def test_the_error_falls_with_the_square_of_the_steps():
    model = gaussian_model("v", num_steps=1000)
    density = at_zero(model)
    latents = (density.mean + density.stddev * rand(4, CHANNELS, SIDE, SIDE)).float()
    expected = density.log_prob(latents.double()).flatten(1).sum(1)
    errors = [float((model.latent_log_density(latents, steps=steps) - expected).abs().mean()) for steps in (12, 24, 48)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


class Reads(nn.Module):
    """An encoder whose mean is affine in the image, of any beta."""

    def __init__(self, axes, offset):
        super().__init__()
        self.axes, self.offset = nn.Parameter(axes), nn.Parameter(offset)

    def forward(self, images, beta):
        return (images.flatten(1) @ self.axes + self.offset).view(-1, CHANNELS, SIDE, SIDE)


class Draws(nn.Module):
    """A decoder of orthonormal axes."""

    def __init__(self, axes):
        super().__init__()
        self.axes = nn.Parameter(axes)

    def forward(self, latents, beta):
        return (latents.flatten(1) @ self.axes.T).view(-1, 3, 4 * SIDE, 4 * SIDE)


@pytest.fixture(scope="module")
def exact():
    """A model whose encoder is the posterior of its decoder and process, and the Gaussian that its images then have.

    With z_0 ~ N(m, tau^2 I) and x = A z_0 + s eps, A orthonormal, it is N(sigma^2 (A^T x / s^2 + m / tau^2), sigma^2 I) where
    1 / sigma^2 = 1 / tau^2 + 1 / s^2, and sigma is sigma(0) of `gaussian_model`.
    """
    model = gaussian_model(num_steps=1000, same_scale=True)
    density = at_zero(model)
    mean, tau = density.mean.expand(1, CHANNELS, SIDE, SIDE).flatten(), float(density.stddev.mean())
    sigma = float(model.vae.sigma(torch.zeros(1)))
    s = (1 / (1 / sigma**2 - 1 / tau**2)) ** 0.5
    axes = torch.linalg.qr(rand(PIXELS, CHANNELS * SIDE**2)).Q
    model.vae.encoder = Reads(axes * sigma**2 / s**2, mean.float() * sigma**2 / tau**2)
    model.vae.decoder = Draws(axes)
    model.vae.decoder_sigma.log_s.data.fill_(math.log(s**2 - model.vae.decoder_sigma.floor) / 2)
    of_images = LowRankMultivariateNormal(axes.double() @ mean, axes.double() * tau, torch.full((PIXELS,), s**2).double())
    return model, of_images, s


def test_the_bound_is_tight_where_the_encoder_is_the_posterior(exact):
    model, of_images, s = exact
    x = data.to_uint8(of_images.sample((6,)).view(6, 3, 4 * SIDE, 4 * SIDE))
    found = model.log_likelihood(x, steps=50, batch_size=4)
    density = of_images.log_prob(data.to_float(x).flatten(1).double())
    expected = variational.dequantised(density, PIXELS / s**2, PIXELS)
    bits = -expected / PIXELS / math.log(2)
    torch.testing.assert_close(found.bits_per_dimension, bits, rtol=0, atol=1e-3)
    spread = (found.latent - found.posterior).std()
    assert spread > 100 * (found.bits_per_dimension - bits).abs().max()  # of one sample of q each, whose parts cancel


def test_its_parts_are_the_decoder_the_process_and_the_encoder(model):
    x, seeds = data.to_float(images(3)), [5, 6, 7]
    found = model.log_likelihood(x, steps=5, seeds=seeds)
    latents, zero = model.encode(x, 0.0, seeds=seeds), torch.zeros(1)
    pixels = Normal(model.vae.decode(latents, 0.0), model.vae.decoder_sigma(zero)).log_prob(x).double().flatten(1).sum(1)
    expected = variational.dequantised(pixels, PIXELS / float(model.vae.decoder_sigma(zero)) ** 2, PIXELS)
    torch.testing.assert_close(found.pixels, expected, rtol=1e-5, atol=0)
    posterior = Normal(model.encode(x, 0.0), model.vae.sigma(zero)).log_prob(latents).flatten(1).sum(1)
    torch.testing.assert_close(found.posterior, posterior.double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.latent, model.latent_log_density(latents, steps=5, seeds=seeds), rtol=1e-6, atol=1e-4)
    nats = found.pixels + found.latent - found.posterior
    torch.testing.assert_close(found.bits_per_dimension, -nats / PIXELS / math.log(2), rtol=1e-12, atol=0)


def test_dequantised_is_the_mean_over_the_bin_of_a_pixel():
    density, x = Normal(0.1, 0.03), torch.tensor([0.05, 0.12, 0.3])
    within = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000 * BIN - BIN / 2
    expected = density.log_prob(x[:, None] + within).mean(1) + math.log(BIN)
    found = variational.dequantised(density.log_prob(x), 1 / 0.03**2, 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    exact = (density.cdf(x.double() + BIN / 2) - density.cdf(x.double() - BIN / 2)).log()
    assert (found < exact).all() and (exact - found).max() < 0.2


def test_an_image_has_its_likelihood_in_any_batch(model):
    x, seeds = images(5), torch.tensor([3, 1, -4, 1, 5])
    together = model.log_likelihood(x, steps=4, seeds=seeds)
    for found, expected in zip(model.log_likelihood(x[1:4], steps=4, seeds=seeds[1:4], batch_size=2), together, strict=True):
        torch.testing.assert_close(found, expected[1:4], rtol=1e-5, atol=1e-5)
    near = (data.to_float(x) + 0.3 * BIN * rand(*x.shape).clamp(-1, 1)).clamp(-1, 1)
    rounded = model.log_likelihood(near, steps=4, seeds=seeds)
    torch.testing.assert_close(rounded.bits_per_dimension, together.bits_per_dimension, rtol=0, atol=0)


def test_errors_say_what_is_possible(model):
    x, latents = images(2), rand(2, 4, 8, 8)
    for call, message in (
        (lambda: model.log_likelihood(x, "ancestral"), "must be one of ode, ode2, heun, .* got 'ancestral'"),
        (lambda: model.log_likelihood(x, steps=51), "steps must lie between 1 and 50"),
        (lambda: model.log_likelihood(x, num_probes=0), "num_probes must be at least 1, got 0"),
        (lambda: model.log_likelihood(x, seeds=[1]), "one seed per sample is needed"),
        (lambda: model.log_likelihood(x, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: model.log_likelihood(x[:, :, :8]), r"images must have shape \(N, 3, 16, 16\)"),
        (lambda: model.latent_log_density(latents / 0), "latents must be finite"),
        (lambda: model.latent_log_density(latents, "map"), "must be one of ode, ode2, heun, .* got 'map'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
