"""The samplers with exact predictors, where the right answer is known in closed form."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import pytest
import torch
from scipy.stats import wasserstein_distance

import multibeta
from multibeta.inference import searching_algorithms
from multibeta.nonlinear_diffusion import SAMPLERS, sampler_rows
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


@dataclass(frozen=True)
class Gaussian:
    """z_t = A(t) x + sigma_t eps for x ~ N(0, covariance): the exact predictions, and what a sampler makes of them.

    Attributes:
        covariance: (d, d).
        operator: Grid index to A, (d, d).
        sigmas: (STEPS + 1,), or (STEPS + 1, d).
    """

    covariance: torch.Tensor
    operator: Callable[[int], torch.Tensor]
    sigmas: torch.Tensor

    def sigma(self, step):
        return self.sigmas[step].expand(len(self.covariance))

    def marginal(self, step):
        """Covariance of z_t."""
        a = self.operator(step)
        return a @ self.covariance @ a.T + self.sigma(step).square().diag()

    def predict(self, latents, step):
        """E[eps | z] and E[delta | z], linear in z."""
        precision, a = torch.linalg.inv(self.marginal(step)), self.operator(step)
        z = latents.flatten(1).T
        delta = (self.operator(step - 1) - a) @ self.covariance @ a.T @ precision @ z
        return (self.sigma(step).diag() @ precision @ z).T.view_as(latents), delta.T.view_as(latents)

    def final_covariance(self, rows):
        """Covariance the rows end with, exactly: their deterministic part is linear, their fresh noise adds."""
        if not rows.named.fresh_noise.any():
            return self.pushed(rows, self.marginal(STEPS))
        silent = rows.coefficients * torch.tensor([1, 1, 1, 0, 1, 1, 1])
        covariance = self.marginal(STEPS)
        for index in range(len(rows)):
            one = SamplerRows(rows.steps[index : index + 1], silent[index : index + 1])
            fresh = rows.named.fresh_noise[index].expand(len(covariance))
            covariance = self.pushed(one, covariance) + fresh.square().diag()
        return covariance

    def pushed(self, rows, covariance):
        """`covariance` after the linear map that rows without fresh noise are."""
        unit = torch.eye(len(covariance), dtype=torch.float64)[:, :, None, None]
        map_ = sample(self.predict, rows, unit, torch.zeros(len(unit), dtype=torch.int64)).flatten(1).T
        return map_ @ covariance @ map_.T

    def rows(self, sampler, steps, delta_sign=1):
        return sampler_rows(self.sigmas, sampler, steps, delta_sign=delta_sign)

    def error_of(self, rows):
        """Relative error of the final covariance."""
        return float((self.final_covariance(rows) - self.marginal(0)).norm() / self.marginal(0).norm())

    def error(self, sampler, steps, delta_sign=1):
        return self.error_of(self.rows(sampler, steps, delta_sign))


def shrink_and_turn(step):
    """A(t) that shrinks both axes at different rates and turns them."""
    t = step / STEPS
    shrink = torch.tensor([[1 - t, 0.0], [0.0, (1 - t) ** 2]], dtype=torch.float64)
    angle = torch.tensor(0.8 * t)
    turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=torch.float64)
    return turn @ shrink


def mix(step):
    """A(t) of four channels: each shrinks at its own rate, and a part of every other comes and goes."""
    t = step / STEPS
    rates = torch.tensor([1.0, 1.3, 1.6, 2.0], dtype=torch.float64)
    return ((1 - t) ** rates).diag() + t * (1 - t) * rand(4, 4, seed=21)


TIMES = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
CURVES = torch.stack(  # to 1 at beta = 1: concave, straight in the logarithm, convex, straight
    [0.02 + 0.98 * (TIMES * math.pi / 2).sin(), 0.05 ** (1 - TIMES), 0.1 + 0.9 * TIMES**2, 0.3 + 0.7 * TIMES], dim=1
)
PLANE = Gaussian(torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64), shrink_and_turn, SIGMAS)
FACTOR = 0.5 * rand(4, 4, seed=22)
CHANNELS = Gaussian(FACTOR @ FACTOR.T + 0.1 * torch.eye(4, dtype=torch.float64), mix, CURVES)


@pytest.mark.parametrize("gaussian", [PLANE, CHANNELS], ids=["one sigma", "a sigma per channel"])
class TestGaussian:
    @pytest.mark.parametrize("sampler", ["ode", "ancestral"])
    def test_first_order_halves_the_error_when_steps_double(self, gaussian, sampler):
        errors = [gaussian.error(sampler, steps) for steps in (25, 50, 100, 200)]
        for coarse, fine in pairwise(errors):
            assert 1.7 < coarse / fine < 2.4

    @pytest.mark.parametrize("sampler", ["ode2", "heun"])
    def test_second_order_quarters_it(self, gaussian, sampler):
        # down to the limit of the grid: delta over one step of it is the velocity to first order
        limit = gaussian.final_covariance(gaussian.rows(sampler, 320))
        assert (limit - gaussian.marginal(0)).norm() < 6 / STEPS * gaussian.marginal(0).norm()
        errors = [float((gaussian.final_covariance(gaussian.rows(sampler, steps)) - limit).norm()) for steps in (10, 20, 40)]
        for coarse, fine in pairwise(errors):
            assert 3 < coarse / fine < 6

    def test_few_steps_of_second_order_beat_many_of_first(self, gaussian):
        few = max(gaussian.error(sampler, 20) for sampler in ("ode2", "heun"))
        assert few < gaussian.error("ode", 100)

    def test_every_correct_sampler_ends_at_the_closed_form(self, gaussian):
        for sampler, steps in (("ode", STEPS), ("ancestral", STEPS), ("ode2", 100), ("heun", 100)):
            assert gaussian.error(sampler, steps) < 0.01, sampler

    def test_algorithm_2_does_not_converge(self, gaussian):
        errors = [gaussian.error("resample", steps) for steps in (250, STEPS)]
        assert min(errors) > 0.45

    @pytest.mark.parametrize("sampler", ["resample", "ancestral", "ode"])
    def test_the_printed_sign_of_delta_shrinks_the_data(self, gaussian, sampler):
        plus, minus = (gaussian.error(sampler, 100, sign) for sign in (1, -1))
        assert minus > 0.7 and minus > 1.3 * plus


class TestSigmaPerChannel:
    @pytest.mark.parametrize("sampler", ["ancestral", "ode", "ode2"])
    def test_one_sigma_for_all_channels_does_not_converge(self, sampler):
        root_mean_square = CURVES.square().mean(1).sqrt()
        wrong = [CHANNELS.error_of(sampler_rows(root_mean_square, sampler, steps)) for steps in (250, STEPS)]
        right = [CHANNELS.error(sampler, steps) for steps in (250, STEPS)]
        assert right[1] < right[0] < 0.02 and right[1] < 0.01
        assert wrong[1] > wrong[0] > 0.2

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_equal_curves_walk_as_the_one_they_share(self, sampler, dtype, backend):
        shared = sampler_rows(SIGMAS, sampler, 20)
        own = sampler_rows(SIGMAS[:, None].expand(-1, 3), sampler, 20)
        assert torch.equal(own.steps, shared.steps)
        assert torch.equal(own.coefficients, shared.coefficients[:, None].expand(-1, 3, -1))
        initial = rand(8, 3, 5, 5).to(dtype)
        with multibeta.backend(backend):
            walks = [sample(TestLoop.predict, rows, initial, TestLoop.SEEDS) for rows in (own, shared)]
        assert torch.equal(*walks)


class TestLoop:
    @pytest.mark.parametrize(
        ("initial", "message"),
        [
            (torch.ones(2, 1, 2, 2, dtype=torch.complex64), "must be of floating point, got torch.complex64: .*float32"),
            (torch.ones(2, 1, 2, 2).to(torch.float8_e5m2), "must be of floating point, got torch.float8_e5m2: .*float32"),
            (torch.ones(2, 1, 2, 2).to_sparse(), r"must be a dense tensor \(torch\.strided\), got torch\.sparse_coo"),
            (torch.ones(2, 1, 2, 2, device="meta"), "must have values, got a tensor on the meta device"),
        ],
    )
    def test_latents_that_hold_no_plain_numbers(self, initial, message):
        rows = sampler_rows(torch.linspace(0, 1, 11), "ode", 5)
        with pytest.raises(ValueError, match=f"latents {message}"):
            sample(lambda latent, step: (latent, latent), rows, initial, torch.arange(2))

    def test_the_flag_of_cudnn_is_what_it_was_when_searches_of_threads_end_in_any_order(self):
        before = torch.backends.cudnn.benchmark
        searches = [searching_algorithms() for _ in range(2)]
        for search in searches:
            search.__enter__()
        searches[0].__exit__(None, None, None)
        assert torch.backends.cudnn.benchmark
        searches[1].__exit__(None, None, None)
        assert torch.backends.cudnn.benchmark == before

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
        with pytest.raises(ValueError, match=r"got \(3,\) seeds for 2 samples"):
            sample(self.predict, sampler_rows(SIGMAS, "ode", 10), rand(2, 1, 2, 2), torch.arange(3))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("sampler", ["ancestral", "ode2"])
    def test_the_result_has_the_dtype_of_the_start_and_the_way_is_float32_at_least(self, sampler, dtype):
        seen = []

        def predict(latents, step):
            seen.append(latents.dtype)
            return self.predict(latents, step)

        initial, rows = rand(2, 3, 5, 5).to(dtype), sampler_rows(SIGMAS, sampler, 10)
        found = sample(predict, rows, initial, self.SEEDS[:2])
        assert found.dtype == dtype and set(seen) == {torch.promote_types(dtype, torch.float32)}
        torch.testing.assert_close(found, sample(self.predict, rows, initial.to(seen[0]), self.SEEDS[:2]).to(dtype))

    @pytest.mark.parametrize(
        ("initial", "seeds", "message"),
        [
            (torch.ones(3, 5, 5), range(3), r"latents must have shape \(N, C, H, W\), got \(3, 5, 5\)"),
            (torch.ones(2, 3, 5, 5, dtype=torch.int32), range(2), r"latents must be of floating point, got torch\.int32"),
            (torch.full((2, 3, 5, 5), torch.nan), range(2), "latents must be finite, got 150 numbers"),
            (torch.ones(2, 3, 5, 5), [0.5, 1], r"a seed must be an integer .*got 0\.5"),
            (torch.ones(2, 3, 5, 5), torch.ones(2), r"seeds must be integers, got torch\.float32"),
            (torch.ones(2, 4, 5, 5), range(2), r"rows for 4 channels must be \(10, 7\) or \(10, 4, 7\), got \(10, 3, 7\)"),
        ],
    )
    def test_errors_say_what_is_possible(self, initial, seeds, message):
        rows = sampler_rows(SIGMAS[:, None].expand(-1, 3), "ode", 10)
        with pytest.raises(ValueError, match=message):
            sample(self.predict, rows, initial, seeds)

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("index", [0, 1])
    def test_predictions_of_another_shape_are_refused(self, index, backend):
        def predict(latents, step):
            found = list(self.predict(latents, step))
            found[index] = found[index][:1]
            return found

        message = r"predictions must have the latent's shape \(2, 3, 5, 5\), got \(1, 3, 5, 5\)"
        with multibeta.backend(backend), pytest.raises(ValueError, match=message):
            sample(predict, sampler_rows(SIGMAS, "ode", 10), rand(2, 3, 5, 5), range(2))

    def test_no_rows_leave_the_latent_alone(self):
        initial = rand(2, 1, 2, 2)
        rows = sampler_rows(SIGMAS, "ode", 5, start=10, stop=10)
        assert torch.equal(sample(self.predict, rows, initial, torch.arange(2)), initial)

    def test_keeps_the_dtype_and_the_input(self):
        initial = rand(2, 1, 2, 2).float()
        before = initial.clone()
        assert sample(self.predict, sampler_rows(SIGMAS, "ancestral", 5), initial, torch.arange(2)).dtype == torch.float32
        assert torch.equal(initial, before)
