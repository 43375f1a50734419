"""Plain diffusion of a latent: its schedule and samplers are those of the field, its objective trains v."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from multibeta import sampling
from multibeta.draws import PieceGenerator
from multibeta.gaussian_diffusion import (
    SAMPLERS,
    GaussianDiffusion,
    GaussianDiffusionConfig,
    GaussianDiffusionObjective,
    sampler_rows,
    trailing_indices,
)
from multibeta.schedules import cosine_variances
from multibeta.training import Batch
from small_networks import SMALL_UNET, rand

UNET = {name: value for name, value in SMALL_UNET.items() if name != "resolution"}
CONFIG = GaussianDiffusionConfig(latent_channels=3, latent_resolution=8, num_steps=100, **UNET)
ALPHA_BARS = (1 - cosine_variances(1000)).cumprod(0)


@pytest.fixture
def diffusion():
    model = GaussianDiffusion(CONFIG)
    nn.init.normal_(model.unet.conv_out.weight, std=0.1)  # it starts at zero
    return model.eval().requires_grad_(False)


def batch_of(count, start=0):
    indices = torch.arange(start, start + count)
    return Batch(indices[:, None, None, None].float().expand(-1, 3, 8, 8) / 100, indices, 0, 0.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestSchedule:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("steps", [20, 50])
    def test_samples_as_diffusers_does(self, sampler, steps):
        diffusers = pytest.importorskip("diffusers")
        scheduler = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}[sampler](
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            clip_sample=False,
            timestep_spacing="trailing",
        )
        scheduler.set_timesteps(steps)
        rows = sampler_rows(ALPHA_BARS, sampler, steps)
        assert rows.steps.tolist() == scheduler.timesteps.tolist()
        predictions = dict(zip(rows.steps.tolist(), rand(steps, 2, 3, 4, 4).double(), strict=True))
        initial = expected = rand(2, 3, 4, 4, seed=1).double()
        if sampler == "ddpm":  # both without noise of their own
            rows.coefficients[:, 3] = 0
            scheduler._get_variance = lambda *_, **__: torch.tensor(0.0)
        for step in scheduler.timesteps:
            expected = scheduler.step(predictions[int(step)], step, expected).prev_sample
        made = sampling.sample(lambda _, step: (predictions[step], torch.zeros(2, 3, 4, 4).double()), rows, initial, [0, 1])
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)  # its schedule is float32

    def test_alpha_bar_is_a_squared_cosine_until_the_cap(self):
        time = (torch.arange(1, 1001).double() / 1000 + 0.008) / 1.008
        wanted = torch.cos(time * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        torch.testing.assert_close(ALPHA_BARS[:-1], wanted[:-1])
        assert 0 < ALPHA_BARS[-1] < 1e-8 and cosine_variances(1000)[-1] == 0.999

    def test_starts_where_there_is_only_noise(self):
        for steps in (1, 3, 7, 50, 1000):
            indices = trailing_indices(1000, steps)
            assert indices[0] == 999 and len(indices) == steps and np.all(np.diff(indices) < 0) and indices[-1] >= 0

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            (("ode", 5), "sampler must be one of ddim, ddpm, got 'ode'"),
            (("ddim", 0), "steps must lie between 1 and 1000, got 0"),
            (("ddim", 1001), "steps must lie between 1 and 1000, got 1001"),
        ],
    )
    def test_nonsense_is_refused(self, asked, message):
        with pytest.raises(ValueError, match=message):
            sampler_rows(ALPHA_BARS, *asked)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_exact_predictions_reach_the_distribution(self, sampler):
        # u_0 ~ N(1, 0.5^2): the best v is known
        def predict(latent, step):
            alpha_bar = float(ALPHA_BARS[step])
            signal, deviation = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
            clean = 1 + 0.25 * signal * (latent - signal) / (0.25 * alpha_bar + 1 - alpha_bar)
            noise = (latent - signal * clean) / deviation
            return signal * noise - deviation * clean, torch.zeros_like(latent)

        made = sampling.sample(predict, sampler_rows(ALPHA_BARS, sampler, 250), rand(4, 8, 32, 32), torch.arange(4))
        assert float(made.mean()) == pytest.approx(1, abs=0.02) and float(made.std()) == pytest.approx(0.5, abs=0.02)


class TestModel:
    def test_v_gives_back_latent_and_noise(self, diffusion):
        clean, noise, steps = rand(5, 3, 8, 8), rand(5, 3, 8, 8, seed=1), torch.tensor([0, 3, 50, 98, 99])
        noisy, v = diffusion.diffused(clean, noise, steps)
        signal = diffusion.alpha_bars[steps].float().sqrt()[:, None, None, None]
        deviation = (1 - signal**2).sqrt()
        torch.testing.assert_close(signal * noisy - deviation * v, clean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(deviation * noisy + signal * v, noise, rtol=1e-4, atol=1e-4)

    def test_latents_are_normalised_by_channel(self, diffusion):
        scale, offset = torch.tensor([[1.0, 5.0, 0.1], [0.0, 3.0, -2.0]])[:, :, None, None]
        latents = rand(200, 3, 8, 8) * scale + offset
        diffusion.set_statistics(latents)
        normalised = diffusion.normalised(latents)
        torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
        torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-4)
        torch.testing.assert_close(diffusion.denormalised(normalised), latents)
        with pytest.raises(ValueError, match=r"must have 3 channels, got \(2, 4, 8, 8\)"):
            diffusion.set_statistics(rand(2, 4, 8, 8))
        with pytest.raises(ValueError, match="latents must be finite"):
            diffusion.set_statistics(torch.full((2, 3, 8, 8), math.nan))

    def test_the_engine_walks_as_the_plain_loop(self, diffusion):
        for sampler in SAMPLERS:
            rows, noise, seeds = sampler_rows(diffusion.alpha_bars, sampler, 5), rand(2, 3, 8, 8), torch.arange(2)
            plain = sampling.sample(diffusion.predict, rows, noise, seeds)
            engine = sampling.Engine(diffusion.unet, sampling.EngineOptions(dtype=torch.float32))
            made = engine.sample(rows, diffusion.head_rows(rows.steps), rows.steps * 10.0, noise, seeds)
            torch.testing.assert_close(made, plain, rtol=1e-3, atol=1e-3)


class TestObjective:
    def test_a_table_replaces_the_encoder_in_training_alone(self, diffusion):
        asked = []

        def encode(images):
            asked.append(len(images))
            return images * 2

        table = batch_of(20).images * 2
        objective = GaussianDiffusionObjective(diffusion, encode, encodings=table)
        validation = objective(dataclasses.replace(batch_of(4, 10), held_out=True), generator())[0]
        assert asked == [4]
        diffusion.train()
        training = objective(batch_of(4, 10), generator())[0]
        assert asked == [4] and torch.equal(training, validation)  # the same latents and noise

    def test_is_the_error_of_v(self, diffusion):
        seen = {}

        def forward(noisy, steps):
            seen.update(noisy=noisy, steps=steps)
            return torch.zeros_like(noisy)

        diffusion.forward = forward
        latents = rand(10, 3, 8, 8)
        objective = GaussianDiffusionObjective(diffusion, lambda images: latents, noise_draws=3)
        loss, scalars = objective(batch_of(10), generator())
        assert len(seen["noisy"]) == 30 and seen["steps"].max() < 100
        strata = seen["steps"].view(3, 10).sort(dim=1).values // 10
        assert torch.equal(strata, torch.arange(10).expand(3, -1))  # one t from each tenth, in every draw
        assert loss == scalars["v_error"] and 0.9 < float(loss) < 1.1  # v has unit variance

    @pytest.mark.parametrize("draws", [1, 2])
    def test_does_not_depend_on_how_a_batch_is_cut(self, diffusion, draws):
        objective = GaussianDiffusionObjective(diffusion, lambda images: images, noise_draws=draws)
        whole = objective(batch_of(6), generator(7))[0]
        pieces = [objective(batch_of(2, start), PieceGenerator.of(1, 7, start, 6))[0] for start in (0, 2, 4)]
        torch.testing.assert_close(torch.stack(pieces).mean(), whole)
