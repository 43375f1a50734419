import math

import pytest
import torch

from multibeta.checks import check_beta
from multibeta.multibeta_vae import VAEConfig
from multibeta.nonlinear_diffusion import DiffusionConfig
from multibeta.schedules import (
    BETA_SCHEDULES,
    BetaGrid,
    DecoderSigmaCurve,
    SigmaCurve,
    beta_grid,
    beta_schedule,
    beta_to_step,
    step_to_beta,
    stratified_steps,
)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
class TestGrid:
    def test_runs_from_zero_to_one_and_rises(self, schedule):
        grid = beta_grid(1000, schedule)
        assert grid.shape == (1001,)
        assert grid[0] == 0 and grid[-1] == 1
        assert (grid.diff() >= 0).all() and (grid[:950].diff() > 0).all()

    @pytest.mark.parametrize("num_steps", [50, 1000])
    def test_beta_to_step_inverts_step_to_beta(self, schedule, num_steps):
        for step in range(0, num_steps + 1, 7):
            found = beta_to_step(float(step_to_beta(step, num_steps, schedule)), num_steps, schedule)
            # near the flat top of a sinusoid several indices share one float32 beta
            assert step_to_beta(found, num_steps, schedule) == step_to_beta(step, num_steps, schedule)
            assert found == step or (schedule != "linear" and step > 0.99 * num_steps)


def test_schedules_are_the_formulas_of_their_names():
    u = torch.tensor([0.0, 0.25, 1 / 3, 1.0])
    torch.testing.assert_close(beta_schedule(u, "linear"), u)
    torch.testing.assert_close(beta_schedule(u, "sinusoidal"), torch.tensor([0, math.sin(math.pi / 8), 0.5, 1]))
    torch.testing.assert_close(beta_schedule(u, "sinusoidal_squared"), torch.tensor([0, math.sin(math.pi / 8) ** 2, 0.25, 1]))


def test_unknown_schedule_names_those_that_exist():
    with pytest.raises(ValueError, match="linear, sinusoidal, sinusoidal_squared, got 'cosine'"):
        beta_grid(10, "cosine")


def test_nearest_step_between_grid_points():
    assert beta_to_step(0.503, 100) == 50
    assert beta_to_step(0.508, 100) == 51


@pytest.mark.parametrize("beta", [1.3, -0.1, math.nan, torch.tensor([0.5, 1.3]), torch.tensor([0.2, math.nan])])
def test_beta_outside_the_unit_interval(beta):
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got"):
        check_beta(beta)


def test_beta_inside_the_unit_interval():
    for beta in (0, 1, 0.5, torch.tensor([0.0, 1.0])):
        check_beta(beta)


class TestSigmaCurve:
    def perturbed(self, scale, seed, flat=slice(0)):
        curve = SigmaCurve()
        with torch.no_grad():
            curve.raw_increments += scale * torch.randn(23, generator=torch.Generator().manual_seed(seed))
            curve.raw_increments[flat] = -50
            return curve(beta_grid(1000))

    @pytest.mark.parametrize("seed", range(5))
    def test_rises_strictly_to_one_whatever_its_parameters(self, seed):
        sigmas = self.perturbed(2, seed)
        assert (sigmas.diff() > 0).all()
        assert sigmas[0] > 0 and sigmas[-1] == 1

    @pytest.mark.parametrize("seed", range(5))
    def test_never_falls_even_where_float32_cannot_tell_neighbours_apart(self, seed):
        sigmas = self.perturbed(8, seed, flat=slice(18, 21))
        assert (sigmas.diff() == 0).any() and (sigmas.diff() >= 0).all()
        assert sigmas[-1] == 1

    @pytest.mark.parametrize("log_sigma_zero", [-3.0, -5.0])
    def test_starts_where_asked(self, log_sigma_zero):
        low, high = SigmaCurve(log_sigma_zero=log_sigma_zero)(torch.tensor([0.0, 1.0])).tolist()
        assert low == pytest.approx(math.exp(log_sigma_zero), rel=1e-5)
        assert high == 1

    def test_every_knot_learns(self):
        curve = SigmaCurve()
        curve(beta_grid(1000)).sum().backward()
        assert (curve.raw_increments.grad != 0).all()

    def test_a_curve_per_channel_is_that_channel_alone(self):
        together, alone = SigmaCurve(num_channels=3), SigmaCurve()
        with torch.no_grad():
            together.raw_increments.normal_(generator=torch.Generator().manual_seed(0))
        beta = torch.rand(7, generator=torch.Generator().manual_seed(1))
        assert together(beta).shape == (7, 3)
        for channel in range(3):
            alone.load_state_dict({"raw_increments": together.raw_increments[channel]})
            torch.testing.assert_close(together(beta)[:, channel], alone(beta))


class TestDecoderSigmaCurve:
    def test_never_falls_below_its_floor(self):
        curve = DecoderSigmaCurve(floor=1e-4)
        with torch.no_grad():
            curve.log_s.fill_(-50)
        torch.testing.assert_close(curve(beta_grid(10)), torch.full((11,), 1e-2))

    def test_passes_through_its_knots(self):
        curve = DecoderSigmaCurve(num_knots=3, floor=0.0)
        with torch.no_grad():
            curve.log_s.copy_(torch.tensor([-2.0, -1.0, 1.0]))
            log_s = curve(torch.tensor([0, 0.25, 0.5, 0.75, 1])).log()
        torch.testing.assert_close(log_s, torch.tensor([-2, -1.5, -1, 0, 1]))


class TestStratifiedSteps:
    @pytest.mark.parametrize(("low", "high"), [(0, 99), (1, 100)])
    def test_one_from_each_stratum(self, low, high):
        steps = stratified_steps(10, low, high, torch.Generator().manual_seed(0))
        assert sorted(((steps - low) // 10).tolist()) == list(range(10))
        assert steps.dtype == torch.int64

    def test_every_index_has_the_same_probability(self):
        generator = torch.Generator().manual_seed(0)
        draws = torch.cat([stratified_steps(4, 0, 10, generator) for _ in range(5000)])
        counts = torch.bincount(draws, minlength=11)
        assert len(counts) == 11
        expected = len(draws) / 11
        assert ((counts - expected).abs() < 4 * math.sqrt(expected)).all()

    def test_order_tells_nothing_about_the_index(self):
        generator = torch.Generator().manual_seed(0)
        first = torch.stack([stratified_steps(8, 0, 99, generator)[0] for _ in range(2000)]).double()
        assert abs(first.mean() - 49.5) < 4 * 100 / math.sqrt(12 * 2000)

    def test_a_seed_repeats(self):
        draws = [stratified_steps(16, 0, 1000, torch.Generator().manual_seed(3)) for _ in range(2)]
        assert torch.equal(*draws)


def test_the_grid_is_a_part_of_the_config_of_either_part_of_a_model():
    grid = BetaGrid(num_steps=70, schedule="sinusoidal")
    assert VAEConfig(**vars(grid)).grid == DiffusionConfig(**vars(grid)).grid == grid != BetaGrid()
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        BetaGrid(num_steps=0)
