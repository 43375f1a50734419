"""The growth of volume along a walk: against closed forms, the Jacobian of the walk, and the trace itself."""

import functools
import math

import pytest
import torch
from closed_form import CHANNELS, SIDE, gaussian_model
from torch import nn

from multibeta.nonlinear_diffusion import sampler_rows
from multibeta.sampling import sample, sample_with_volume

GRID = 800
SIGMAS = torch.linspace(0.05, 1, GRID + 1).double()


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def curved(latents, step):
    """Predictions whose Jacobian is full and changes with the latent."""
    mixed = torch.tanh(latents.flatten(1) @ matrix(latents[0].numel()).to(latents)).view_as(latents)
    return latents * SIGMAS[step] / 2 + 0.5 * mixed, (0.4 * torch.sin(latents) - 0.2 * mixed) / GRID


@functools.cache
def matrix(size):
    return rand(size, size, seed=1) / size**0.5


def volume(steps, sampler="ode2", probes=None, latents=None, seeds=None, **options):
    latents = rand(3, 2, 2, 2).double() if latents is None else latents
    rows = sampler_rows(SIGMAS, sampler, steps, start=0, stop=GRID)
    seeds = torch.arange(len(latents)) if seeds is None else seeds
    return sample_with_volume(curved, rows, latents, seeds, num_probes=probes, **options)


@pytest.mark.parametrize(("sampler", "tolerance"), [("ode", 4e-3), ("ode2", 5e-4), ("heun", 5e-4)])
def test_it_is_that_of_the_jacobian_of_the_walk(sampler, tolerance):
    """Each step has a determinant, of which the trace is the first order: they meet as steps become fine."""
    latents = rand(3, 2, 2, 2).double()

    def error(steps):
        rows = sampler_rows(SIGMAS, sampler, steps, start=0, stop=GRID)
        jacobians = [torch.autograd.functional.jacobian(functools.partial(walked, rows), each[None]) for each in latents]
        expected = torch.stack([each.view(8, 8).slogdet().logabsdet for each in jacobians])
        return float((volume(steps, sampler, latents=latents)[1] - expected).abs().max())

    def walked(rows, latent):
        return sample.__wrapped__(curved, rows, latent, torch.zeros(1, dtype=torch.int64))

    assert error(100) < tolerance
    assert sampler != "ode" or error(50) > 1.8 * error(100)


def test_the_walk_is_that_of_the_loop():
    rows, latents = sampler_rows(SIGMAS, "heun", 20, start=0, stop=GRID), rand(3, 2, 2, 2)
    found, _ = sample_with_volume(curved, rows, latents, torch.arange(3))
    assert torch.equal(found, sample(curved, rows, latents, torch.arange(3)))


def test_probes_estimate_the_trace_without_bias():
    latents, count = rand(1, 2, 2, 2).double(), 4000
    trace = float(volume(5, latents=latents)[1])
    each = volume(5, probes=1, latents=latents.expand(count, -1, -1, -1), seeds=torch.arange(count))[1]
    assert abs(float(each.mean()) - trace) < 4 * float(each.std()) / math.sqrt(count)
    averaged = volume(5, probes=25, latents=latents.expand(400, -1, -1, -1), seeds=torch.arange(400))[1]
    assert float(averaged.std()) == pytest.approx(float(each.std()) / 5, rel=0.15)


def test_a_diagonal_jacobian_needs_one_probe():
    model, latents = gaussian_model("v", num_steps=40), rand(2, CHANNELS, SIDE, SIDE)
    rows, predict = model.diffusion.sampler_rows("heun", 4, start=0, stop=40), model.diffusion.predict
    one, exact = (sample_with_volume(predict, rows, latents, torch.arange(2), num_probes=count)[1] for count in (1, None))
    torch.testing.assert_close(one, exact, rtol=0, atol=1e-4)


def test_the_basis_of_the_rows_changes_no_trace():
    """The basis is orthonormal, and rows that all coefficients share say the same of the pixels."""
    model, latents = gaussian_model(basis="cosine", num_steps=40), rand(2, CHANNELS, SIDE, SIDE)
    nn.init.normal_(model.diffusion.unet.conv_out.weight, std=0.1)
    rows = model.diffusion.sampler_rows("ode2", 3, start=0, stop=40)
    walks = [
        sample_with_volume(model.diffusion.predict, rows, latents, torch.arange(2), num_probes=None, basis=basis)
        for basis in (None, model.diffusion.cosines)
    ]
    for plain, parted in zip(*walks, strict=True):
        torch.testing.assert_close(plain, parted, rtol=1e-4, atol=1e-4)


def test_it_belongs_to_the_seed_not_to_the_batch():
    latents, seeds = rand(5, 2, 2, 2), torch.tensor([7, -1, 2**40, 7, 3])
    together = volume(10, probes=2, latents=latents, seeds=seeds)[1]
    torch.testing.assert_close(volume(10, probes=2, latents=latents[1:4], seeds=seeds[1:4])[1], together[1:4], rtol=0, atol=1e-6)
    same = volume(10, probes=1, latents=latents[:1].expand(2, -1, -1, -1), seeds=torch.tensor([1, 2]))[1]
    assert same[0] != same[1]


def test_under_inference_mode():
    expected = volume(5, probes=1)[1]
    with torch.inference_mode():
        assert torch.equal(volume(5, probes=1)[1], expected)


@pytest.mark.parametrize("sampler", ["ancestral", "dpm2m"])
def test_other_walks_are_refused(sampler):
    diffusion = gaussian_model(num_steps=40).diffusion
    rows = diffusion.sampler_rows(sampler, 5)
    with pytest.raises(ValueError, match="samplers that follow an ODE: ode, ode2 and heun"):
        sample_with_volume(diffusion.predict, rows, rand(1, CHANNELS, SIDE, SIDE), torch.arange(1))


def test_numbers_of_probes():
    for wrong, message in ((0, "num_probes must be at least 1, got 0"), (1.5, "num_probes must be an integer, got 1.5")):
        with pytest.raises(ValueError, match=message):
            volume(5, probes=wrong)
