"""KL and capacity against their definitions."""

import pytest
import torch
from torch.distributions import Normal

from multibeta.variational import capacity_at, capacity_penalty, kl_to_prior

KL = torch.tensor([10.0, 30.0, 20.0, 40.0])


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
