"""The baselines: each objective against its definition, its estimator against closed forms."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal

from multibeta import data
from multibeta.baselines import (
    VAE,
    AnnealedVAEObjective,
    BetaTCVAEObjective,
    BetaVAEObjective,
    FactorVAEObjective,
    InfoVAEObjective,
    squared_mmd,
    stratified_weights,
    total_correlation,
)
from multibeta.networks import AutoencoderConfig
from multibeta.training import Batch, TrainingOptions, train
from multibeta.variational import capacity_at

TINY = AutoencoderConfig(
    architecture="toy",
    resolution=16,
    latent_channels=4,
    base_channels=8,
    channel_multipliers=(1, 1),
    num_groups=4,
    embedding_channels=8,
)
OBJECTIVES = {
    "vae": BetaVAEObjective,
    "annealed": AnnealedVAEObjective,
    "tc": lambda vae: BetaTCVAEObjective(vae, dataset_size=100),
    "factor": lambda vae: FactorVAEObjective(vae, width=16, depth=2),
    "info": InfoVAEObjective,
}


def tiny():
    torch.manual_seed(0)
    return VAE(TINY)


def batch_at(progress=0.5, count=8):
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(images, torch.arange(count), 0, progress)


def loss_of(objective, progress=0.5):
    return objective(batch_at(progress), torch.Generator().manual_seed(2))


def gradients(objective, module):
    objective.module.zero_grad()
    loss_of(objective)[0].backward()
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


class TestVAE:
    def test_loss_is_the_negative_evidence_lower_bound(self):
        vae, batch = tiny(), batch_at()
        loss, scalars = loss_of(BetaVAEObjective(vae))
        posterior = vae.posterior(batch.images)
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(2))
        logits = vae.logits(posterior.mean + posterior.stddev * noise)
        pixels = (batch.images + 1) / 2
        likelihood = (pixels * Bernoulli(logits=logits).probs.log() + (1 - pixels) * (-logits).sigmoid().log()).flatten(1).sum(1)
        mean, variance = posterior.mean.double(), posterior.variance.double()
        kl = 0.5 * (mean**2 + variance - 1 - variance.log()).flatten(1).sum(1)
        torch.testing.assert_close(scalars["kl"].double(), kl.mean(), rtol=1e-5, atol=1e-6)
        expected = (kl.mean() - likelihood.mean()) / batch.images[0].numel()
        torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-6)

    def test_beta_weighs_the_kl(self):
        (first, scalars), (second, _) = (loss_of(BetaVAEObjective(tiny(), beta)) for beta in (1.0, 5.0))
        torch.testing.assert_close(second - first, 4 * scalars["kl"] / (3 * 16 * 16))

    def test_decodes_images_in_range(self):
        images = tiny().decode(torch.randn(3, 4, 1, 1) * 10)
        assert images.shape == (3, 3, 16, 16) and images.abs().max() <= 1

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_every_objective_trains_and_resumes(self, name, tmp_path):
        dataset = data.Subset(data.Scenes(16), range(32))
        options = TrainingOptions(steps=2, batch_size=8)
        state = train(OBJECTIVES[name](tiny()), dataset, options, tmp_path, progress=False)
        resumed = train(OBJECTIVES[name](tiny()), dataset, options, tmp_path, resume=True, progress=False)
        assert all(torch.equal(state[key], resumed[key]) for key in state)
        assert all(value.isfinite().all() for value in state.values())


class TestAnnealedVAE:
    def test_capacity_rises_linearly_and_stays(self):
        vae = tiny()
        objective = AnnealedVAEObjective(vae, gamma=3.0, capacity=10.0, warmup=0.5)
        for progress, capacity in ((0.0, 0.0), (0.25, 5.0), (0.5, 10.0), (1.0, 10.0)):
            scalars = loss_of(objective, progress)[1]
            torch.testing.assert_close(scalars["penalty"], 3 * (scalars["kl"] - capacity).abs())


class TestTotalCorrelation:
    def correlated(self, count, deviation, correlation=0.8):
        """Posteriors whose aggregate is a Gaussian of that correlation, a sample of each, and its total correlation."""
        generator = torch.Generator().manual_seed(0)
        covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]]) - deviation**2 * torch.eye(2)
        mean = torch.randn(count, 2, generator=generator) @ torch.linalg.cholesky(covariance).T
        posterior = Normal(mean, torch.full_like(mean, deviation))
        return mean + deviation * torch.randn(mean.shape, generator=generator), posterior, -0.5 * math.log(1 - correlation**2)

    def test_stratified_estimate_nears_the_exact_value(self):
        latents, posterior, exact = self.correlated(2000, 0.4)
        assert float(total_correlation(latents, posterior, 2000)) == pytest.approx(exact, abs=0.05)

    def test_published_code_is_far_off_where_posteriors_are_narrow(self):
        estimates = {}
        for dataset_size in (64, 10_000):
            latents, posterior, exact = self.correlated(64, 0.05)
            for estimator in ("stratified", "as_published"):
                estimates[dataset_size, estimator] = float(total_correlation(latents, posterior, dataset_size, estimator)) - exact
        # a narrow posterior holds its own latent alone: its weight must be 1 / N, not 1 / (batch - 1)
        assert abs(estimates[10_000, "as_published"]) > 2 * abs(estimates[10_000, "stratified"])

    def test_weighted_estimate_is_off_by_a_constant(self):
        latents, posterior, _ = self.correlated(64, 0.3)
        values = [float(total_correlation(latents, posterior, size, "weighted")) for size in (100, 1000)]
        assert values[1] - values[0] == pytest.approx(math.log(10), abs=1e-4)  # (D - 1) log N

    @pytest.mark.parametrize("as_published", [False, True])
    def test_weights_of_a_row_sum_to_one(self, as_published):
        weights = stratified_weights(5, 50, as_published)
        assert weights.shape == (5, 5)
        if not as_published:
            torch.testing.assert_close(weights.sum(1), torch.ones(5))
            torch.testing.assert_close(weights.diagonal(), torch.full((5,), 1 / 50))
        else:
            torch.testing.assert_close(weights[:3, 0], torch.full((3,), 1 / 50))  # column 0 instead of the diagonal

    def test_beta_one_is_the_vae(self):
        first, second = loss_of(BetaVAEObjective(tiny()))[0], loss_of(BetaTCVAEObjective(tiny(), 100, beta=1.0))[0]
        torch.testing.assert_close(first, second)

    def test_batches_larger_than_the_dataset_are_refused(self):
        latents, posterior, _ = self.correlated(8, 0.3)
        with pytest.raises(ValueError, match="at least the batch of 8, got 5"):
            total_correlation(latents, posterior, 5)
        with pytest.raises(ValueError, match="at least 2, got 1"):
            stratified_weights(1, 5)


class TestFactorVAE:
    def test_the_discriminator_leaks_no_gradient_into_the_vae(self):
        alone, vae = tiny(), tiny()
        objective = FactorVAEObjective(vae, gamma=0.0, width=16, depth=2)
        with_discriminator = gradients(objective, vae)
        assert any(gradient.any() for gradient in (p.grad for p in objective.discriminator.parameters()))
        for one, other in zip(gradients(BetaVAEObjective(alone), alone), with_discriminator, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)

    def test_the_vae_leaks_no_gradient_into_the_discriminator(self):
        objective = FactorVAEObjective(tiny(), gamma=0.0, width=16, depth=2)
        expected = gradients(objective, objective.discriminator)
        objective.gamma = 1000.0
        for one, other in zip(expected, gradients(objective, objective.discriminator), strict=True):
            assert torch.equal(one, other)

    def test_gamma_moves_the_encoder(self):
        vae = tiny()
        objective = FactorVAEObjective(vae, gamma=0.0, width=16, depth=2)
        without = gradients(objective, vae.encoder)
        objective.gamma = 1000.0
        pairs = zip(without, gradients(objective, vae.encoder), strict=True)
        assert any(not torch.equal(one, other) for one, other in pairs if one is not None)

    def test_permuting_keeps_marginals_and_breaks_dependence(self):
        objective = FactorVAEObjective(tiny(), width=16, depth=2)
        seen = []
        objective.discriminator.forward = lambda both: seen.append(both) or both[:, :2]
        latents = torch.randn(256, 1).expand(-1, 4).contiguous()
        objective.discriminator_loss(latents, torch.Generator().manual_seed(0))
        kept, permuted = seen[0].chunk(2)
        assert torch.equal(kept, latents)
        assert torch.equal(permuted.sort(0).values, latents.sort(0).values)
        assert torch.corrcoef(permuted.T).fill_diagonal_(0).abs().max() < 0.3

    def test_the_discriminator_has_its_own_betas(self):
        groups = FactorVAEObjective(tiny(), width=16, depth=2).parameter_groups()
        assert groups[1]["betas"] == (0.5, 0.9) and "betas" not in groups[0]


class TestInfoVAE:
    def test_discrepancy_is_the_unbiased_estimate(self):
        first, second = torch.randn(5, 3), torch.randn(7, 3)

        def kernel(a, b):
            return math.exp(-float((a - b).square().sum()) / 6)

        expected = sum(kernel(a, b) for i, a in enumerate(first) for j, b in enumerate(first) if i != j) / 20
        expected += sum(kernel(a, b) for i, a in enumerate(second) for j, b in enumerate(second) if i != j) / 42
        expected -= 2 * sum(kernel(a, b) for a in first for b in second) / 35
        assert float(squared_mmd(first, second)) == pytest.approx(expected, abs=1e-6)

    def test_discrepancy_tells_distributions_apart(self):
        generator = torch.Generator().manual_seed(0)
        one, other = torch.randn(2, 500, 4, generator=generator)
        assert abs(float(squared_mmd(one, other))) < 0.005 < 0.1 < float(squared_mmd(one, other + 1))

    def test_alpha_zero_lambda_one_is_the_vae(self):
        first, second = loss_of(BetaVAEObjective(tiny()))[0], loss_of(InfoVAEObjective(tiny(), alpha=0.0, lambda_=1.0))[0]
        torch.testing.assert_close(first, second)

    def test_gradients_are_finite(self):
        vae = tiny()
        assert all(gradient.isfinite().all() for gradient in gradients(InfoVAEObjective(vae), vae) if gradient is not None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e30, "3"])
@pytest.mark.parametrize(
    "name, objective",
    [
        ("beta", BetaVAEObjective),
        ("gamma", AnnealedVAEObjective),
        ("capacity", AnnealedVAEObjective),
        ("lambda_", InfoVAEObjective),
        ("gamma", lambda vae, **options: FactorVAEObjective(vae, width=16, depth=2, **options)),
        ("beta", lambda vae, **options: BetaTCVAEObjective(vae, 100, **options)),
    ],
)
def test_weights_that_no_loss_can_have_are_refused(name, objective, value):
    with pytest.raises(ValueError, match=f"{name} must be finite and at least 0"):
        objective(tiny(), **{name: value})


def test_a_capacity_without_warmup_is_there_at_once():
    assert [capacity_at(progress, 10.0, 0.0) for progress in (0.0, 0.5)] == [10.0, 10.0]
    assert [capacity_at(progress, 10.0, 0.5) for progress in (0.0, 0.25, 0.7)] == [0.0, 5.0, 10.0]


def test_losses_of_a_growing_capacity_and_of_a_game_do_not_compare_on_the_way():
    vae = tiny()
    assert AnnealedVAEObjective(vae, warmup=0.5).comparable_from == 0.5
    assert FactorVAEObjective(vae, width=16, depth=2).comparable_from == 1.0
