"""The sampler "dpm2m" with exact predictors: DPM-Solver++(2M) where the process is linear, of second order where it is not."""

from itertools import pairwise

import pytest
import torch
from test_nonlinear_diffusion import build
from test_sampling import CHANNELS, PLANE, STEPS, Gaussian, rand

from multibeta.nonlinear_diffusion import MULTISTEP, Motion, multistep_rows
from multibeta.nonlinear_diffusion.samplers import grid_indices
from multibeta.sampling import sample

SEEDS = torch.arange(3)


def shrinking(speed=1.0):
    """A process that only shrinks, (1 - t)^speed x + t eps, as `multistep_rows` takes it, and its turns as log(sigma / F)."""
    times = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)[:, None]
    scale, sigmas = (1 - 0.99 * times) ** speed, 0.01 + 0.99 * times
    shrink = torch.cat([torch.ones(1, 1, dtype=torch.float64), scale[:-1] / scale[1:]])
    return scale, sigmas, Motion(shrink, torch.zeros_like(shrink), torch.zeros_like(shrink)), (sigmas / scale).log()[:, 0]


def test_of_one_image_a_single_step_is_exact():
    """While the image stays the same, so does its noise, over any stride: also where the encoding is moved about."""
    scale, sigmas, motion, turned = shrinking()
    image, noise = rand(3, 1, 2, 2), rand(3, 1, 2, 2, seed=1)
    shift, growth = (0.01 * rand(STEPS + 1, 1, seed=seed) for seed in (2, 3))
    moved, left = motion._replace(shift=shift, growth=growth), rand(3, 1, 2, 2, seed=4)
    encodings = [scale[STEPS] * image]
    for step in range(STEPS, 0, -1):
        encodings.append(moved.shrink[step] * encodings[-1] + moved.shift[step] + moved.growth[step] * left)
    for indices in ([STEPS, 0], [STEPS, 400, 0], [700, 300, 20, 3]):
        rows = multistep_rows(sigmas, moved, turned, indices)
        start, end = (encodings[STEPS - at] + sigmas[at] * noise for at in (indices[0], indices[-1]))
        walked = sample(lambda latent, step: (encodings[STEPS - step], left), rows, start, SEEDS)
        torch.testing.assert_close(walked, end, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("timesteps", [[999, 722, 302, 30], [999, 886, 757, 603, 410, 202, 73, 22, 5], [700, 200]])
def test_of_a_linear_process_it_is_dpm_solver(timesteps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="sample",
        final_sigmas_type="sigma_min", lower_order_final=False,
    )  # fmt: skip
    scheduler.set_timesteps(timesteps=timesteps)  # and 0, the lowest that it knows
    alpha_bars = scheduler.alphas_cumprod.double()
    scale, sigmas = alpha_bars.sqrt()[:, None], (1 - alpha_bars).sqrt()[:, None]
    shrink = torch.cat([torch.ones(1, 1, dtype=torch.float64), scale[:-1] / scale[1:]])
    still = torch.zeros_like(shrink)
    rows = multistep_rows(sigmas, Motion(shrink, still, still), (sigmas / scale).log()[:, 0], [*timesteps, 0])
    noise = theirs = rand(2, 1, 4, 4)

    def image(latent):  # any function of the latent
        return (1.3 * latent).sin()

    ours = sample(lambda latent, step: (scale[step] * image(latent), 0 * latent), rows, noise, SEEDS[:2])
    for step in scheduler.timesteps:
        theirs = scheduler.step(image(theirs), step, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def exact(gaussian: Gaussian):
    """What `multistep_rows` takes of a Gaussian process, and the exact predictions of its rows.

    What shrinks is the regression of f(x, t - tau) on f(x, t) of the same channel, u what it leaves, of variance one.
    """
    covariance, operators = gaussian.covariance, torch.stack([gaussian.operator(step) for step in range(STEPS + 1)])
    here, below = operators[1:], operators[:-1]
    variance = torch.einsum("tij,jk,tik->ti", operators, covariance, operators)
    shrink = torch.einsum("tij,jk,tik->ti", below, covariance, here) / variance[1:].clamp(min=1e-12)
    shrink[-1] = 1  # from f(x, 1) = 0
    left = below - shrink[..., None] * here
    growth = torch.einsum("tij,jk,tik->ti", left, covariance, left).sqrt()
    growth[-1] = 0

    def predict(latents, step):
        image = covariance @ operators[step].T @ torch.linalg.inv(gaussian.marginal(step)) @ latents.flatten(1).T
        rest = left[step - 1] @ image / growth[step - 1].clamp(min=1e-12)[:, None]
        return (operators[step] @ image).T.view_as(latents), rest.T.view_as(latents)

    sigmas = torch.stack([gaussian.sigma(step) for step in range(STEPS + 1)])
    shrink, growth = (torch.cat([table[:1], table]) for table in (shrink, growth))
    motion, turned = Motion(shrink, torch.zeros_like(shrink), growth), torch.atan2(sigmas, variance.sqrt()).mean(1)
    return sigmas, motion, turned, predict


def final_covariance(sigmas, motion, turned, predict, steps, marginal):
    """Covariance that a walk ends with from `marginal`, exactly: it is linear."""
    rows = multistep_rows(sigmas, motion, turned, grid_indices(STEPS, steps, None, 0))
    unit = torch.eye(len(marginal), dtype=torch.float64)[:, :, None, None]
    map_ = sample(predict, rows, unit, torch.zeros(len(unit), dtype=torch.int64)).flatten(1).T
    return map_ @ marginal @ map_.T


@pytest.mark.parametrize("gaussian", [PLANE, CHANNELS], ids=["one sigma", "a sigma per channel"])
def test_second_order_quarters_the_error_when_steps_double(gaussian):
    process, start, end = exact(gaussian), gaussian.marginal(STEPS), gaussian.marginal(0)
    limit = final_covariance(*process, 320, start)
    assert (limit - end).norm() < 6 / STEPS * end.norm()
    errors = [float((final_covariance(*process, steps, start) - limit).norm()) for steps in (10, 20, 40)]
    for coarse, fine in pairwise(errors):
        assert 3 < coarse / fine < 6


class TestOfAModel:
    @pytest.mark.parametrize("options", [{"parameterization": "v"}, {"parameterization": "residual"}, {"basis": "cosine"}])
    def test_its_predictions_are_those_of_the_other_samplers(self, options):
        """E[f | z] = z - sigma E[eps | z], and the difference of f is what shrinks and what is left."""
        diffusion = build(**{"parameterization": "residual"} | options)
        _, motion, _ = diffusion._motion()
        for step in (1, 20, 49):
            latents = rand(3, 4, 4, 4, seed=step).float()
            data, left = diffusion.predict_data(latents, step)
            noise, delta = diffusion.predict(latents, step)
            torch.testing.assert_close(data, latents - diffusion.sigmas[step] * noise, rtol=1e-4, atol=1e-4)
            shrink, shift, growth = (
                table[step].float().view(4, *2 * (1 if diffusion.cosines is None else 4,)) for table in motion
            )
            moved = shrink * diffusion.coefficients(data) + shift + growth * diffusion.coefficients(left)
            torch.testing.assert_close(diffusion.pixels(moved) - data, delta, rtol=1e-3, atol=1e-4)

    def test_it_walks_down_a_normalised_process_by_its_own_law(self):
        diffusion = build("residual")
        assert diffusion.usual_sampler == MULTISTEP and MULTISTEP in diffusion.samplers
        for wrong, message in (
            ({"start": 0, "stop": 50}, "dpm2m only walks down; use ode, ode2 or heun from 0 to 50"),
            ({"delta_sign": -1}, "dpm2m has no delta to subtract: delta_sign must be 1, got -1"),
            ({"start": 51}, "on the grid 0 ... 50, got 51 and 0"),
        ):
            with pytest.raises(ValueError, match=message):
                diffusion.sampler_rows(MULTISTEP, 10, **wrong)
        assert len(diffusion.sampler_rows(MULTISTEP, 10, start=7, stop=7)) == 0
        assert build("v").usual_sampler == "ode2"
        with pytest.raises(ValueError, match="must be one of resample, ancestral, ode, ode2, heun, got 'dpm2m'"):
            build("literal").sampler_rows(MULTISTEP, 10)

    def test_it_steps_equally_where_others_step_by_turns(self):
        diffusion = build("residual", spacing="turn")
        assert diffusion.sampler_rows(MULTISTEP, 5).steps.tolist() == [50, 40, 30, 20, 10]
        assert diffusion.sampler_rows("ode2", 5).steps.tolist() != [50, 40, 30, 20, 10]
