"""The samplers with exact predictors, where the right answer is known in closed form."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from scipy.stats import wasserstein_distance

from multibeta.nonlinear_diffusion import sampler_rows
from multibeta.sampling import sample
from multibeta.schedules import SamplerRows

STEPS = 1000
SIGMAS = torch.linspace(0.01, 1, STEPS + 1, dtype=torch.float64)
MEANS = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, -1.2]], dtype=torch.float64)
STD = 0.12
COUNT = 4000


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scale(step):
    """a(t) of f(x, t) = a(t) x: 1 at beta = 0, 0 at beta = 1."""
    return math.cos(math.pi / 2 * step / STEPS)


def mixture(count, seed):
    """Data at beta = 0: three modes of deviation `STD`, (count, 2, 1, 1)."""
    mode = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))
    return (MEANS[mode] + STD * rand(count, 2, seed=seed + 1))[:, :, None, None]


def predict_mixture(latents, step):
    """E[eps | z] and E[f(x, t - tau) - f(x, t) | z] for the mixture, exactly."""
    a, sigma, z = scale(step), SIGMAS[step], latents.flatten(1)
    variance = a**2 * STD**2 + sigma**2
    distance = z[:, None] - a * MEANS
    weights = (-distance.square().sum(-1) / (2 * variance)).softmax(1)
    x = (weights[..., None] * (MEANS + a * STD**2 / variance * distance)).sum(1)
    return ((z - a * x) / sigma).view_as(latents), ((scale(step - 1) - a) * x).view_as(latents)


@cache
def walked(sampler, steps, delta_sign=1):
    rows = sampler_rows(SIGMAS, sampler, steps, delta_sign=delta_sign)
    return sample(predict_mixture, rows, rand(COUNT, 2, 1, 1, seed=7), torch.arange(COUNT))


def mode_deviations(samples):
    """Deviation of the samples around the nearest mode, per mode, (3,)."""
    x = samples.flatten(1)
    nearest = (x[:, None] - MEANS).square().sum(-1).argmin(1)
    return torch.stack([(x[nearest == mode] - MEANS[mode]).square().mean().sqrt() for mode in range(3)])


def sliced_wasserstein(first, second, directions=24):
    """Mean Wasserstein distance over evenly spread projections."""
    angles = torch.arange(directions, dtype=torch.float64) * math.pi / directions
    axes = torch.stack([angles.cos(), angles.sin()])
    columns = (first.flatten(1) @ axes).T, (second.flatten(1) @ axes).T
    return sum(wasserstein_distance(*pair) for pair in zip(*columns, strict=True)) / directions


class TestMixture:
    @pytest.mark.parametrize(("sampler", "steps"), [("ancestral", STEPS), ("ode", STEPS), ("ode2", 50), ("heun", 50)])
    def test_exact_predictions_give_modes_of_the_right_width(self, sampler, steps):
        # z_0 = x + sigma_0 eps
        torch.testing.assert_close(
            mode_deviations(walked(sampler, steps)).mean().item(), math.hypot(STD, 0.01), rtol=0.03, atol=0
        )

    def test_algorithm_2_loses_half_the_variance(self):
        width = mode_deviations(walked("resample", STEPS)).mean().item()
        assert width == pytest.approx(STD / math.sqrt(2), rel=0.05)

    def test_the_printed_sign_of_delta_misses_the_modes(self):
        samples = walked("ode", 100, -1)
        assert mode_deviations(samples).min() > 2 * STD
        floor = sliced_wasserstein(self.real(0), self.real(10))
        assert sliced_wasserstein(samples, self.real(0)) > 10 * floor

    def test_algorithm_2_hides_the_sign_where_modes_are_far_apart(self):
        # it draws all noise anew around E[f | z], which falls back onto the modes; see TestGaussian for one mode
        plus, minus = (mode_deviations(walked("resample", 200, sign)).mean().item() for sign in (1, -1))
        assert minus == pytest.approx(plus, rel=0.02)

    @staticmethod
    def real(seed):
        return mixture(COUNT, seed)

    @pytest.mark.parametrize(("sampler", "steps"), [("ancestral", STEPS), ("ode", STEPS), ("ode2", 50), ("heun", 50)])
    def test_distance_to_the_data_is_that_of_more_data(self, sampler, steps):
        samples = walked(sampler, steps)
        floor = sum(sliced_wasserstein(self.real(seed), self.real(seed + 10)) for seed in range(4)) / 4
        distance = sum(sliced_wasserstein(samples, self.real(seed)) for seed in range(4)) / 4
        assert distance < 1.6 * floor

    def test_algorithm_2_is_measurably_further_away(self):
        floor = sliced_wasserstein(self.real(0), self.real(10))
        assert sliced_wasserstein(walked("resample", STEPS), self.real(0)) > 1.6 * floor

    @pytest.mark.parametrize("sampler", ["ode2", "ancestral"])
    @pytest.mark.parametrize("start", [300, 600])
    def test_walks_from_any_beta_back_to_the_data(self, sampler, start):
        latents = scale(start) * mixture(COUNT, 3) + SIGMAS[start] * rand(COUNT, 2, 1, 1, seed=100)
        rows = sampler_rows(SIGMAS, sampler, 50 if sampler == "ode2" else start, start=start)
        samples = sample(predict_mixture, rows, latents, torch.arange(COUNT))
        assert mode_deviations(samples).mean().item() == pytest.approx(math.hypot(STD, 0.01), rel=0.04)
        floor = sliced_wasserstein(self.real(3), self.real(13))
        assert sliced_wasserstein(samples, self.real(3)) < 2 * floor

    @pytest.mark.parametrize("sampler", ["ode2", "heun"])
    def test_walking_up_inverts_walking_down(self, sampler):
        noise, seeds = rand(500, 2, 1, 1, seed=8), torch.arange(500)

        def errors(steps):
            down, up = sampler_rows(SIGMAS, sampler, steps), sampler_rows(SIGMAS, sampler, steps, start=0, stop=STEPS)
            data = sample(predict_mixture, down, noise, seeds)
            return (sample(predict_mixture, up, data, seeds) - noise).abs()

        coarse, fine = errors(50), errors(400)
        assert fine.mean() < 0.3 * coarse.mean()
        assert fine.mean() < 0.01
        assert fine.flatten().quantile(0.95) < 0.05

    def test_inversion_keeps_what_ancestral_noise_destroys(self):
        data = mixture(500, 5)
        up = sampler_rows(SIGMAS, "ode2", 400, start=0, stop=STEPS)
        noise = sample(predict_mixture, up, data, torch.arange(500))
        deviation = noise.std()
        again = sample(predict_mixture, sampler_rows(SIGMAS, "ode2", 400), noise, torch.arange(500))
        assert deviation.item() == pytest.approx(1, abs=0.1)
        # the round trip, to a fraction of a mode's width
        assert (again - data).abs().mean() < 0.1 * STD


COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)


def operator(step):
    """A(t) of f(x, t) = A(t) x: shrinks both axes at different rates and turns them."""
    t = step / STEPS
    shrink = torch.tensor([[1 - t, 0.0], [0.0, (1 - t) ** 2]], dtype=torch.float64)
    angle = torch.tensor(0.8 * t)
    turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=torch.float64)
    return turn @ shrink


def marginal(step):
    """Covariance of z_t for x ~ N(0, COVARIANCE)."""
    a = operator(step)
    return a @ COVARIANCE @ a.T + SIGMAS[step] ** 2 * torch.eye(2, dtype=torch.float64)


def predict_gaussian(latents, step):
    """E[eps | z] and E[delta | z] for x ~ N(0, COVARIANCE): linear in z."""
    precision, a = torch.linalg.inv(marginal(step)), operator(step)
    z = latents.flatten(1).T
    delta = (operator(step - 1) - a) @ COVARIANCE @ a.T @ precision @ z
    return (SIGMAS[step] * precision @ z).T.view_as(latents), delta.T.view_as(latents)


def final_covariance(sampler, steps, delta_sign=1):
    """Covariance a sampler ends with, exactly: its deterministic part is linear, its fresh noise adds."""
    rows = sampler_rows(SIGMAS, sampler, steps, delta_sign=delta_sign)
    unit = torch.eye(2, dtype=torch.float64)[:, :, None, None]
    silent = rows.coefficients * torch.tensor([1, 1, 1, 0, 1, 1])
    if sampler in ("ode", "ode2", "heun"):
        map_ = sample(predict_gaussian, rows, unit, torch.zeros(2, dtype=torch.int64)).flatten(1).T
        return map_ @ marginal(STEPS) @ map_.T
    covariance = marginal(STEPS)
    for index in range(len(rows)):
        one = SamplerRows(rows.steps[index : index + 1], silent[index : index + 1])
        map_ = sample(predict_gaussian, one, unit, torch.zeros(2, dtype=torch.int64)).flatten(1).T
        covariance = map_ @ covariance @ map_.T + rows.coefficients[index, 3] ** 2 * torch.eye(2, dtype=torch.float64)
    return covariance


def covariance_error(sampler, steps, delta_sign=1):
    return float((final_covariance(sampler, steps, delta_sign) - marginal(0)).norm() / marginal(0).norm())


class TestGaussian:
    @pytest.mark.parametrize("sampler", ["ode", "ancestral"])
    def test_first_order_halves_the_error_when_steps_double(self, sampler):
        errors = [covariance_error(sampler, steps) for steps in (25, 50, 100, 200)]
        for coarse, fine in pairwise(errors):
            assert 1.7 < coarse / fine < 2.4

    @pytest.mark.parametrize("sampler", ["ode2", "heun"])
    def test_second_order_quarters_it(self, sampler):
        # down to the limit of the grid: delta over one step of it is the velocity to first order
        limit = final_covariance(sampler, 320)
        assert (limit - marginal(0)).norm() < 2 / STEPS * marginal(0).norm()
        errors = [float((final_covariance(sampler, steps) - limit).norm()) for steps in (10, 20, 40)]
        for coarse, fine in pairwise(errors):
            assert 3 < coarse / fine < 6

    def test_few_steps_of_second_order_beat_many_of_first(self):
        few = max(covariance_error(sampler, 20) for sampler in ("ode2", "heun"))
        assert few < covariance_error("ode", 100)

    def test_every_correct_sampler_ends_at_the_closed_form(self):
        for sampler, steps in (("ode", STEPS), ("ancestral", STEPS), ("ode2", 100), ("heun", 100)):
            assert covariance_error(sampler, steps) < 0.01, sampler

    def test_algorithm_2_does_not_converge(self):
        errors = [covariance_error("resample", steps) for steps in (250, STEPS)]
        assert min(errors) > 0.45

    @pytest.mark.parametrize("sampler", ["resample", "ancestral", "ode"])
    def test_the_printed_sign_of_delta_shrinks_the_data(self, sampler):
        plus, minus = (covariance_error(sampler, 100, sign) for sign in (1, -1))
        assert minus > 0.7 and minus > 1.3 * plus


class TestLoop:
    SEEDS = torch.tensor([5, 0, -3, 2**50, 9, 11, 4, 77])

    @staticmethod
    def predict(latents, step):
        return torch.tanh(latents) * 0.3, 0.001 * latents * step / STEPS

    @pytest.mark.parametrize("sampler", ["ancestral", "resample", "ode2", "heun"])
    def test_a_sample_does_not_depend_on_its_batch(self, sampler):
        rows, initial = sampler_rows(SIGMAS, sampler, 20), rand(8, 3, 5, 5).float()
        together = sample(self.predict, rows, initial, self.SEEDS)
        alone = sample(self.predict, rows, initial[7:], self.SEEDS[7:])
        assert torch.equal(together[7:], alone)
        order = torch.tensor([3, 7, 1])
        assert torch.equal(sample(self.predict, rows, initial[order], self.SEEDS[order]), together[order])

    def test_seeds_decide_the_noise(self):
        rows, initial = sampler_rows(SIGMAS, "ancestral", 20), rand(8, 3, 5, 5).float()
        first = sample(self.predict, rows, initial, self.SEEDS)
        assert torch.equal(sample(self.predict, rows, initial, self.SEEDS), first)
        assert not torch.isclose(sample(self.predict, rows, initial, self.SEEDS + 1), first).any(0).all()

    @pytest.mark.parametrize(("sampler", "evaluations"), [("ode2", 10), ("ancestral", 10), ("heun", 19)])
    def test_callback_counts_evaluations(self, sampler, evaluations):
        seen, asked = [], []

        def predict(latents, step):
            asked.append(step)
            return self.predict(latents, step)

        rows = sampler_rows(SIGMAS, sampler, 10)
        result = sample(predict, rows, rand(2, 1, 2, 2), torch.arange(2), callback=lambda *news: seen.append(news))
        assert [news[:2] for news in seen] == [(done, evaluations) for done in range(1, evaluations + 1)]
        assert torch.equal(seen[-1][2], result)
        assert asked == rows.steps.tolist()

    def test_an_exception_in_the_callback_cancels(self):
        asked = []

        def predict(latents, step):
            asked.append(step)
            return self.predict(latents, step)

        def cancel(done, total, latent):
            if done == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sample(predict, sampler_rows(SIGMAS, "ode", 10), rand(2, 1, 2, 2), torch.arange(2), callback=cancel)
        assert len(asked) == 3

    def test_one_seed_per_sample(self):
        with pytest.raises(ValueError, match="got 3 seeds for 2 samples"):
            sample(self.predict, sampler_rows(SIGMAS, "ode", 10), rand(2, 1, 2, 2), torch.arange(3))

    def test_no_rows_leave_the_latent_alone(self):
        initial = rand(2, 1, 2, 2)
        rows = sampler_rows(SIGMAS, "ode", 5, start=10, stop=10)
        assert torch.equal(sample(self.predict, rows, initial, torch.arange(2)), initial)

    def test_keeps_the_dtype_and_the_input(self):
        initial = rand(2, 1, 2, 2).float()
        before = initial.clone()
        assert sample(self.predict, sampler_rows(SIGMAS, "ancestral", 5), initial, torch.arange(2)).dtype == torch.float32
        assert torch.equal(initial, before)
