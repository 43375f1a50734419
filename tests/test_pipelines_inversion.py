"""Edits that invert: up the probability-flow ODE from the latent at 0, and back."""

import itertools

import pytest
import torch
from closed_form import CHANNELS, SIDE, gaussian_model

from multibeta import ops

PROCESSES = [
    {},
    {"parameterization": "v"},
    {"parameterization": "literal"},
    {"basis": "cosine", "spacing": "turn"},
    {"sigma_per_channel": True},
]


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return rand(count, 3, 16, 16, seed=seed).clamp(-1, 1)


def on_the_flow(model, index, normal):
    """m + sqrt(F^2 + sigma^2) u of a Gaussian process at a grid index, which the ODE leads from one index to another."""
    sigma, mean, deviation, _ = model.diffusion.tables(torch.tensor([index]))
    return model.diffusion.pixels(mean + (deviation**2 + sigma**2).sqrt() * normal)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", ["ode2", "heun"])
def test_a_gaussian_latent_is_taken_to_its_quantile_at_any_beta(process, sampler):
    model, normal = gaussian_model(**process), rand(4, CHANNELS, SIDE, SIDE)
    latents = on_the_flow(model, 0, normal)
    for beta, tolerance in ((0.3, 2e-3), (0.7, 4e-3)):
        found = model.invert(latents, sampler, 50, beta=beta)
        torch.testing.assert_close(found, on_the_flow(model, round(200 * beta), normal), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("sampler", "order"), [("ode", 1), ("ode2", 2), ("heun", 2)])
def test_the_error_of_the_way_there_and_back_falls_with_the_order_of_the_sampler(sampler, order):
    model = gaussian_model("v", num_steps=800)
    latents = on_the_flow(model, 0, rand(4, CHANNELS, SIDE, SIDE))

    def error(steps):
        return float((model.denoise(model.invert(latents, sampler, steps, beta=0.7), 0.7, sampler, steps) - latents).abs().mean())

    errors = [error(steps) for steps in (10, 20, 40)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 0.8 * 2**order
    assert errors[-1] < (0.02 if order == 1 else 5e-4)


def test_no_edit_gives_back_what_was_encoded_at_zero(model):
    x, direction = images(2), rand(4, 8, 8)
    expected = model.decode(model.encode(x, 0.0))

    def error(steps, **how):
        return float((model.manipulate(x, direction, 0.0, 0.5, steps=steps, **how) - expected).abs().mean())

    assert error(50, invert=True) < 0.3 * error(5, invert=True)
    assert error(50, invert=True) < 0.1 * error(50)


def test_an_edit_moves_the_inverted_latent(model):
    x, direction, walk = images(2), rand(4, 8, 8), {"sampler": "heun", "steps": 6}
    inverted = model.invert(model.encode(x, 0.0), beta=0.5, **walk)
    expected = model.decode(model.denoise(inverted + 0.4 * direction, 0.5, **walk))
    found = model.manipulate(x, direction, 0.4, 0.5, invert=True, **walk)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    of_latents = model.manipulate(model.encode(x, 0.0), direction, 0.4, 0.5, invert=True, **walk)  # at 0
    torch.testing.assert_close(of_latents, found, rtol=0, atol=1e-5)
    assert (found - model.manipulate(x, direction, 0.4, 0.5, **walk)).abs().max() > 1e-3


def test_a_path_of_inverted_ends_leads_from_one_image_to_the_other(model):
    first, second = images(2), images(2, seed=1)
    path = model.interpolate(first, second, [0.0, 0.5, 1.0], 0.4, invert=True, steps=20)
    still = [model.manipulate(end, torch.zeros(4, 8, 8), 0.0, 0.4, invert=True, steps=20) for end in (first, second)]
    torch.testing.assert_close(path[:, [0, 2]], torch.stack(still, dim=1), rtol=0, atol=1e-4)
    of_latents = model.interpolate(*(model.encode(x, 0.0) for x in (first, second)), 0.5, 0.4, invert=True, steps=20)
    torch.testing.assert_close(path[:, 1], of_latents, rtol=0, atol=1e-4)


def test_close_to_zero_it_takes_the_steps_there_are(model):
    latents = rand(2, 4, 8, 8)
    assert torch.equal(model.invert(latents, beta=0.0), latents)
    assert torch.equal(model.invert(latents, beta=0.001), latents)
    torch.testing.assert_close(model.invert(latents, beta=0.04), model.invert(latents, steps=2, beta=0.04), rtol=0, atol=0)


def test_it_edits_by_a_sampler_that_can(model):
    assert model.sampling_options(invert=True) == {"sampler": "ode2", "steps": 50}
    residual = gaussian_model()
    assert residual.usual_sampling["sampler"] == "dpm2m"
    assert residual.sampling_options(steps=7, invert=True) == {"sampler": "ode2", "steps": 7}
    x, direction = images(1), rand(CHANNELS, SIDE, SIDE)
    edited = residual.manipulate(x, direction, 0.3, 0.5, invert=True)
    assert torch.equal(edited, residual.manipulate(x, direction, 0.3, 0.5, invert=True, sampler="ode2", steps=50))
    assert not torch.equal(edited, residual.manipulate(x, direction, 0.3, 0.5, invert=True, sampler="heun"))


@pytest.mark.parametrize("sampler", ["ancestral", "resample", "dpm2m", "map", "map_noise", "ddim"])
def test_samplers_that_only_walk_down_are_refused(model, sampler):
    for verb in (
        lambda: model.invert(rand(1, 4, 8, 8), sampler, beta=0.5),
        lambda: model.manipulate(images(1), rand(4, 8, 8), 1.0, 0.5, invert=True, sampler=sampler),
        lambda: model.interpolate(images(1), images(1), 0.5, 0.5, invert=True, sampler=sampler),
        lambda: model.sampling_options(sampler, invert=True),
    ):
        with pytest.raises(ValueError, match=f"to invert, sampler must be one of ode, ode2, heun, .* got '{sampler}'"):
            verb()


@pytest.mark.parametrize("name", ["baseline", "latent", "refiner"])
def test_models_of_one_representation_have_nothing_to_invert_to(request, name):
    pipeline = request.getfixturevalue(name)
    latents = ops.standard_normal(torch.arange(2), 0, pipeline.vae.config.latent_shape)
    for verb in (
        lambda: pipeline.invert(latents),
        lambda: pipeline.manipulate(images(1), latents[0], 1.0, invert=True),
        lambda: pipeline.interpolate(images(1), images(1), 0.5, invert=True),
        lambda: pipeline.sampling_options(invert=True),
    ):
        with pytest.raises(ValueError, match=f"a {type(pipeline).__name__} has one representation, and no beta to invert"):
            verb()


def test_what_is_no_beta(model):
    for beta, message in ((1.3, r"lie in \[0, 1\]"), (torch.ones(2), "one number for all"), ("much", 'or "auto"')):
        with pytest.raises(ValueError, match=message):
            model.invert(rand(2, 4, 8, 8), beta=beta)
