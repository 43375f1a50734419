"""Samples, densities, KL and capacity against their definitions."""

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from multibeta.variational import (
    capacity_at,
    capacity_penalty,
    draw,
    gaussian_log_density,
    kl_to_prior,
    kl_to_standard_normal,
    sample,
)

KL = torch.tensor([10.0, 30.0, 20.0, 40.0])


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3,), (1,), (3, 2), (1, 2), (3, 2, 4, 4)])
def test_a_sample_is_the_mean_and_sigma_times_the_noise(shape):
    mean, noise, sigma = rand(3, 2, 4, 4), rand(3, 2, 4, 4, seed=1), rand(*shape, seed=2).exp()
    each = sigma.reshape(*shape, *[1] * (4 - len(shape))).expand_as(mean)
    torch.testing.assert_close(sample(mean, sigma, noise), mean + each * noise, rtol=0, atol=0)


def test_a_draw_is_reparameterised_and_belongs_to_its_generator():
    mean, deviation = rand(4, 2).requires_grad_(), rand(4, 2).exp().requires_grad_()
    posterior = Normal(mean, deviation)
    drawn, again = (draw(posterior, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(drawn, again)
    drawn.sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones(4, 2))
    torch.testing.assert_close(deviation.grad, ((drawn - mean) / deviation).detach())


def test_log_density_is_that_of_torch():
    x, mean, deviation = rand(3, 2, 4, 4), rand(3, 2, 4, 4, seed=1), torch.tensor([0.1, 1.0, 3.0])
    expected = Independent(Normal(mean, deviation.view(3, 1, 1, 1)), 3).log_prob(x)
    torch.testing.assert_close(gaussian_log_density(x, mean, deviation), expected)


def test_kl_is_that_of_torch():
    mean, sigma = rand(3, 2, 4, 4), torch.tensor([0.02, 0.5, 1.0])
    posterior = Independent(Normal(mean, sigma.view(3, 1, 1, 1).expand_as(mean)), 3)
    prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 3)
    torch.testing.assert_close(kl_to_standard_normal(mean, sigma), kl_divergence(posterior, prior))


def test_kl_per_channel_is_that_of_torch():
    mean, sigma = rand(3, 2, 4, 4), torch.tensor([[0.02, 0.9], [0.5, 0.4], [1.0, 0.1]])
    posterior = Independent(Normal(mean, sigma.view(3, 2, 1, 1).expand_as(mean)), 3)
    prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 3)
    torch.testing.assert_close(kl_to_standard_normal(mean, sigma), kl_divergence(posterior, prior))


def test_kl_is_the_mean_log_ratio():
    mean, deviation = torch.tensor([[0.5, -1.0], [0.0, 0.0]]), torch.tensor([[0.3, 2.0], [1.0, 1.0]])
    posterior = Normal(mean.double(), deviation.double())
    z = posterior.sample((200_000,))
    estimate = (posterior.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(2).mean(0)
    torch.testing.assert_close(kl_to_prior(posterior), estimate, rtol=0.02, atol=1e-12)
    assert kl_to_prior(posterior)[1] == 0


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.0), (0.25, 5.0), (0.5, 10.0), (1.0, 10.0)])
def test_capacity_grows_linearly_and_stays(progress, expected):
    assert capacity_at(progress, 10.0, warmup=0.5) == expected


@pytest.mark.parametrize("capacity", [0.0, 20.0, 25.0, 60.0])
def test_batch_mean_holds_the_kl_of_an_image_to_the_capacity(capacity):
    torch.testing.assert_close(capacity_penalty(KL, capacity, 3.0), torch.tensor(3 * abs(25.0 - capacity)))


def test_batch_sum_shares_the_capacity_among_the_images():
    summed = capacity_penalty(KL, 60.0, 3.0, reduction="batch_sum")
    torch.testing.assert_close(summed, torch.tensor(3 * (100.0 - 60.0) / 4))  # the published loss, over the batch
    assert summed == capacity_penalty(KL, 60.0 / 4, 3.0)
    assert summed != capacity_penalty(KL, 60.0, 3.0)


def test_below_the_capacity_the_penalty_pulls_up():
    for capacity, sign in ((20.0, 1), (30.0, -1)):
        kl = KL.clone().requires_grad_()
        capacity_penalty(kl, capacity, 1.0).backward()
        torch.testing.assert_close(kl.grad, torch.full((4,), sign / 4))


def test_unknown_reduction():
    with pytest.raises(ValueError, match="batch_mean or batch_sum, got 'sum'"):
        capacity_penalty(KL, 1.0, 1.0, reduction="sum")
