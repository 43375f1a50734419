"""DiffusionVAE: processes against Gaussian conditioning, samplers against closed forms, objectives against their definitions."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from multibeta import data, ops
from multibeta.diffusion_vae import (
    FORMS,
    VARIANCES,
    CapacityObjective,
    CapacityVAE,
    ConditionalDiffusion,
    ConditionalDiffusionConfig,
    ConditionalDiffusionObjective,
    ForwardProcess,
    sampler_rows,
    spaced_indices,
)
from multibeta.networks import BlockAutoencoderConfig
from multibeta.sampling import sample
from multibeta.schedules import SamplerRows, ddpm_variances, posterior_weights
from multibeta.training import Batch, TrainingOptions, train

STEPS = 1000
VARIANCE = ddpm_variances(STEPS)
ALPHA_BARS = (1 - VARIANCE).cumprod(0)
TINY = ConditionalDiffusionConfig(
    resolution=8,
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    num_heads=2,
    dropout=0.0,
    num_groups=4,
)
TINY_VAE = BlockAutoencoderConfig(
    resolution=8, encoder_blocks="8x1,8d2,8t4,4d4,4t1,1x1", decoder_blocks="1x1,1u4,1t4,4u2,4t8,8x1", channels="8:8,4:8,1:6"
)

every_form = pytest.mark.parametrize("form", FORMS)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(**changes):
    """A small model none of whose layers is zero, in evaluation mode."""
    torch.manual_seed(0)
    diffusion = ConditionalDiffusion(replace(TINY, **changes)).eval()
    for parameter in diffusion.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return diffusion


def iterated(form):
    """x_t = a_t x_0 + b_t x_hat + N(0, variance_t) by iterating Eq. 7, for "form2" after its own first step: (T, 3)."""
    a, b, variance, rows = 1.0, 0.0, 0.0, []
    for t, v in enumerate(VARIANCE.tolist()):
        keep = math.sqrt(1 - v)
        added = {"form1": 0.0, "eq7": 1 - keep, "form2": 1.0 if t == 0 else 1 - keep}[form]
        a, b, variance = keep * a, keep * b + added, (1 - v) * variance + v
        rows.append([a, b, variance])
    return torch.tensor(rows, dtype=torch.float64)


class TestForwardProcess:
    @every_form
    def test_marginal_is_equation_7_iterated(self, form):
        process, table = ForwardProcess(form, VARIANCE), iterated(form)
        image, reconstruction, noise = (rand(STEPS, 1, 1, 1, seed=seed) for seed in range(3))
        residual = process.diffuse(process.residual(image, reconstruction), noise, torch.arange(STEPS))
        a, b, variance = table[:, :, None, None, None].unbind(1)
        expected = a * image + b * reconstruction + variance.sqrt() * noise
        torch.testing.assert_close(process.noisy_image(residual, reconstruction), expected, rtol=0, atol=1e-12)

    def test_equation_8_as_printed_is_not_it(self):
        a = iterated("eq7")[:, 0]
        printed = (1 - ALPHA_BARS).sqrt()
        assert a[0] > 0.9999 and a[-1] < 0.007
        assert printed[0] < 0.011 and printed[-1] > 0.9999  # the image would appear as noise is added

    @every_form
    @pytest.mark.parametrize(("t", "s"), [(1, 0), (17, 16), (500, 499), (999, 998), (990, 980), (800, 17)])
    def test_posterior_is_the_conditional_of_the_joint_gaussian(self, form, t, s):
        process, table = ForwardProcess(form, VARIANCE), iterated(form)
        image, reconstruction, noisy = 0.3, -0.8, 0.45
        (a, b, variance), (next_a, next_b, next_variance) = table[t].tolist(), table[s].tolist()
        # x_t is x_s times `keep` plus what does not depend on it, so their covariance is keep var(x_s)
        keep = math.sqrt(float((1 - VARIANCE[s + 1 : t + 1]).prod()))
        covariance = torch.tensor([[next_variance, keep * next_variance], [keep * next_variance, variance]], dtype=torch.float64)
        gain = covariance[0, 1] / covariance[1, 1]
        mean = next_a * image + next_b * reconstruction + gain * (noisy - a * image - b * reconstruction)
        conditional_variance = covariance[0, 0] - gain * covariance[0, 1]

        on_clean, on_noisy, posterior_variance = posterior_weights(float(process.alpha_bars[t]), float(process.alpha_bars[s]))
        residual = process.residual(image, reconstruction), noisy - process.noisy_image(0.0, reconstruction)
        next_residual = on_clean * residual[0] + on_noisy * residual[1]
        assert process.noisy_image(next_residual, reconstruction) == pytest.approx(float(mean), abs=1e-12)
        assert posterior_variance == pytest.approx(float(conditional_variance), abs=1e-12)

    def test_the_last_step_lands_on_the_prediction(self):
        assert posterior_weights(float(ALPHA_BARS[0]), 1.0) == (1.0, 0.0, 0.0)

    @every_form
    def test_image_and_noise_are_recovered(self, form):
        process = ForwardProcess(form, VARIANCE)
        image, reconstruction, noise = (rand(5, 3, 2, 2, seed=seed) for seed in range(3))
        steps = torch.tensor([0, 10, 300, 700, 999])
        residual = process.diffuse(process.residual(image, reconstruction), noise, steps)
        clean = process.image(process.denoised(residual, noise, steps), reconstruction)
        torch.testing.assert_close(clean, image, rtol=0, atol=1e-12)

    def test_form2_and_equation_7_differ_in_the_residual_alone(self):
        form2, eq7 = (ForwardProcess(form, VARIANCE) for form in ("form2", "eq7"))
        image, reconstruction, residual = (rand(4, 3, 2, 2, seed=seed) for seed in range(3))
        assert torch.equal(form2.residual(image, reconstruction), image)
        assert torch.equal(eq7.residual(image, reconstruction), image - reconstruction)
        assert torch.equal(form2.image(residual, reconstruction), residual)  # the published chain ends at r_0 + x_hat
        assert torch.equal(eq7.image(residual, reconstruction), residual + reconstruction)
        assert torch.equal(form2.noisy_image(residual, reconstruction), eq7.noisy_image(residual, reconstruction))
        assert torch.equal(form2.alpha_bars, eq7.alpha_bars)

    def test_form1_is_a_plain_ddpm(self):
        process, (image, reconstruction) = ForwardProcess("form1", VARIANCE), rand(2, 4, 3, 2, 2)
        for same in (process.residual, process.image, process.noisy_image):
            assert torch.equal(same(image, reconstruction), image)

    @every_form
    def test_prior_is_the_end_of_the_process(self, form):
        process = ForwardProcess(form, VARIANCE)
        noise, reconstruction = rand(2, 3, 2, 2), rand(2, 3, 2, 2, seed=1)
        end = process.diffuse(process.residual(rand(2, 3, 2, 2, seed=2), reconstruction), noise, torch.full((2,), STEPS - 1))
        torch.testing.assert_close(process.prior(noise), end, rtol=0, atol=0.03)  # sqrt(alpha_bar_T) = 0.006
        assert torch.equal(process.prior(noise, temperature=0.7), 0.7 * noise)

    @every_form
    def test_without_reconstruction_is_the_same_image_and_noise(self, form):
        process = ForwardProcess(form, VARIANCE)
        image, reconstruction, noise = (rand(3, 3, 2, 2, seed=seed) for seed in range(3))
        nothing, steps = torch.zeros_like(image), torch.tensor([3, 400, 998])
        with_, without = (process.diffuse(process.residual(image, x_hat), noise, steps) for x_hat in (reconstruction, nothing))
        torch.testing.assert_close(process.without_reconstruction(with_, reconstruction, steps), without)

    def test_unknown_form(self):
        with pytest.raises(ValueError, match="form1, form2, eq7, got 'form3'"):
            ForwardProcess("form3", VARIANCE)


class TestVariances:
    def test_published_schedule(self):
        assert VARIANCE.dtype == torch.float64 and len(VARIANCE) == 1000
        assert torch.equal(VARIANCE, torch.linspace(1e-4, 0.02, 1000).double())
        assert float(ALPHA_BARS[-1]) == pytest.approx(0.00635**2, rel=1e-3)

    def test_a_hundred_steps_of_it_are_no_diffusion_to_noise(self):
        assert float((1 - ddpm_variances(100)).prod()) == pytest.approx(0.364, abs=1e-3)


class TestSpacing:
    @pytest.mark.parametrize(("steps", "first"), [(1000, 999), (100, 990), (50, 980), (30, 986)])
    def test_uniform_has_one_stride_and_starts_below_the_end(self, steps, first):
        indices = spaced_indices(STEPS, steps)
        assert len(indices) == steps and indices[0] == first and indices[-1] == 0
        assert len({high - low for high, low in pairwise(indices)}) == 1

    @pytest.mark.parametrize(("steps", "distinct"), [(50, 49), (100, 96), (250, 230), (500, 422), (1000, 688)])
    def test_quad_is_the_published_formula_without_its_duplicates(self, steps, distinct):
        indices = spaced_indices(STEPS, steps, "quad")
        published = [int(s) for s in list(np.linspace(0, np.sqrt(STEPS * 0.8), steps) ** 2)]
        assert len(published) == steps and len(indices) == distinct
        assert indices == sorted(set(published), reverse=True)
        assert indices[0] == 800 and float(ALPHA_BARS[800].sqrt()) == pytest.approx(0.039, abs=1e-3)

    def test_numbers_of_steps_without_a_stride(self):
        message = "no stride takes 600 uniform steps out of 1000: a stride of 2 takes 500, of 1 1000"
        with pytest.raises(ValueError, match=message):
            spaced_indices(STEPS, 600)

    @pytest.mark.parametrize("steps", [0, 1001])
    def test_steps_out_of_range(self, steps):
        with pytest.raises(ValueError, match=f"between 1 and 1000, got {steps}"):
            spaced_indices(STEPS, steps)

    def test_unknown_spacing(self):
        with pytest.raises(ValueError, match="uniform, quad, got 'cubic'"):
            spaced_indices(STEPS, 10, "cubic")


class TestRows:
    @pytest.mark.parametrize("variance", VARIANCES)
    def test_all_steps_are_the_published_coefficients(self, variance):
        rows = sampler_rows(ALPHA_BARS, "ddpm", STEPS, variance=variance)
        before = torch.cat([torch.ones(1, dtype=torch.float64), ALPHA_BARS[:-1]])
        on_clean = VARIANCE * before.sqrt() / (1 - ALPHA_BARS)
        on_noisy = (1 - VARIANCE).sqrt() * (1 - before) / (1 - ALPHA_BARS)
        fresh = VARIANCE if variance == "fixedlarge" else VARIANCE * (1 - before) / (1 - ALPHA_BARS)
        fresh = fresh * (torch.arange(STEPS) > 0)  # no noise at the end
        expected = torch.stack([on_noisy, 0 * fresh, on_clean, fresh.sqrt(), *3 * [0 * fresh]], dim=1).flip(0)
        assert torch.equal(rows.steps, torch.arange(STEPS).flip(0))
        torch.testing.assert_close(rows.coefficients, expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("spacing", ["uniform", "quad"])
    @pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
    def test_ddim_keeps_the_marginals(self, spacing, eta):
        rows = sampler_rows(ALPHA_BARS, "ddim", 50, spacing=spacing, eta=eta)
        next_alpha_bar = torch.cat([ALPHA_BARS[rows.steps[1:]], torch.ones(1, dtype=torch.float64)])
        _, on_noise, on_clean, fresh, *_ = rows.coefficients.unbind(1)
        torch.testing.assert_close(on_clean, next_alpha_bar.sqrt())
        torch.testing.assert_close(on_noise**2 + fresh**2, 1 - next_alpha_bar, rtol=0, atol=1e-12)
        assert bool(fresh.any()) == (eta > 0) and fresh[-1] == 0

    def test_ddim_with_all_noise_is_ddpm(self):
        for spacing in ("uniform", "quad"):
            ddim = sampler_rows(ALPHA_BARS, "ddim", 100, spacing=spacing, eta=1.0)
            ddpm = sampler_rows(ALPHA_BARS, "ddpm", 100, spacing=spacing)
            noise, clean, alpha_bar = 0.7, -0.4, ALPHA_BARS[ddim.steps]
            noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
            moved = [rows.coefficients[:, :3].unbind(1) for rows in (ddim, ddpm)]
            means = [on_noisy * noisy + on_noise * noise + on_clean * clean for on_noisy, on_noise, on_clean in moved]
            torch.testing.assert_close(*means, rtol=0, atol=1e-12)
            torch.testing.assert_close(ddim.named.fresh_noise, ddpm.named.fresh_noise, rtol=0, atol=1e-12)

    def test_a_truncated_walk_is_the_end_of_the_whole(self):
        whole, truncated = sampler_rows(ALPHA_BARS, "ddpm", STEPS), sampler_rows(ALPHA_BARS, "ddpm", 300, start=299)
        assert truncated.steps[0] == 299
        assert torch.equal(truncated.steps, whole.steps[-300:])
        assert torch.equal(truncated.coefficients, whole.coefficients[-300:])

    def test_no_row_uses_the_prediction_before(self):
        for sampler in ("ddpm", "ddim"):
            assert not sampler_rows(ALPHA_BARS, sampler, 50).coefficients[:, 4:].any()

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"sampler": "euler"}, "ddpm, ddim, got 'euler'"),
            ({"variance": "learned"}, "fixedsmall, fixedlarge, got 'learned'"),
            ({"eta": 1.5}, "eta must lie in [0, 1], got 1.5"),
            ({"start": 1000}, "between 0 and 999, got 1000"),
            ({"start": 99, "steps": 200}, "between 1 and 100, got 200"),
        ],
    )
    def test_bad_arguments(self, changed, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            sampler_rows(ALPHA_BARS, **{"sampler": "ddpm", "steps": 50, **changed})


COVARIANCE = torch.tensor([[0.5, 0.25], [0.25, 0.3]], dtype=torch.float64)
UNIT = torch.eye(2, dtype=torch.float64)[:, :, None, None]
DDPM = ForwardProcess("form1", VARIANCE)


def predict_gaussian(residual, step):
    """E[eps | r_t] and E[r_0 | r_t] for r_0 ~ N(0, COVARIANCE)."""
    alpha_bar = ALPHA_BARS[step]
    marginal = alpha_bar * COVARIANCE + (1 - alpha_bar) * torch.eye(2)
    noise = ((1 - alpha_bar).sqrt() * torch.linalg.solve(marginal, residual.flatten(1).T)).T.view_as(residual)
    return noise, DDPM.denoised(residual, noise, torch.full((len(residual),), step))


def covariance_error(*arguments, **options):
    """Relative error of the covariance a sampler ends with from N(0, I): every row is linear, its fresh noise adds."""
    rows = sampler_rows(ALPHA_BARS, *arguments, **options)
    covariance = torch.eye(2, dtype=torch.float64)
    for index in range(len(rows)):
        silent = rows.coefficients[index : index + 1] * torch.tensor([1, 1, 1, 0, 1, 1, 1])
        row = SamplerRows(rows.steps[index : index + 1], silent)
        map_ = sample(predict_gaussian, row, UNIT, torch.zeros(2, dtype=torch.int64)).flatten(1).T
        covariance = map_ @ covariance @ map_.T + rows.named.fresh_noise[index] ** 2 * torch.eye(2)
    return float((covariance - COVARIANCE).norm() / COVARIANCE.norm())


class TestGaussian:
    @pytest.mark.parametrize(
        ("options", "bound"),
        [
            ({"sampler": "ddpm"}, 0.012),
            ({"sampler": "ddpm", "variance": "fixedlarge"}, 0.002),
            ({"sampler": "ddim"}, 0.005),
            ({"sampler": "ddim", "eta": 0.5}, 0.007),
        ],
    )
    def test_exact_predictions_end_at_the_covariance_of_the_data(self, options, bound):
        assert covariance_error(steps=STEPS, **options) < bound

    @pytest.mark.parametrize("options", [{"sampler": "ddpm"}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5}])
    def test_the_error_is_of_first_order(self, options):
        errors = [covariance_error(steps=steps, **options) for steps in (125, 250, 500)]
        for coarse, fine in pairwise(errors):
            assert 1.7 < coarse / fine < 2.1

    def test_fixedlarge_is_of_first_order(self):
        coarse, fine = (covariance_error("ddpm", steps, variance="fixedlarge") for steps in (125, 250))
        assert 1.9 < coarse / fine < 2.3

    @pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
    def test_quad_spends_its_steps_better(self, sampler):
        assert covariance_error(sampler, 100, spacing="quad") < 0.75 * covariance_error(sampler, 100)

    @every_form
    @pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
    def test_every_form_gives_the_data_given_the_reconstruction(self, form, sampler):
        """x_0 ~ N(0.6 x_hat + 0.1, 0.04) and the network of `form` exact: it sees x_t and x_hat, and nothing of r_t."""
        diffusion, deviation = build(form=form, image_channels=1), 0.2
        shift, offset = FORMS[form]

        def network(inputs, steps):
            noisy, reconstruction = inputs.double().chunk(2, dim=1)
            alpha_bar = ALPHA_BARS[steps][:, None, None, None]
            mean = alpha_bar.sqrt() * (0.6 * reconstruction + 0.1) + (shift - offset * alpha_bar.sqrt()) * reconstruction
            return (1 - alpha_bar).sqrt() * (noisy - mean) / (alpha_bar * deviation**2 + 1 - alpha_bar)

        diffusion.unet.forward = network
        count = 2000
        reconstruction = torch.tensor([-0.9, 0.5]).repeat(count // 2).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
        rows = sampler_rows(diffusion.process.alpha_bars, sampler, 250, variance="fixedlarge")
        start = diffusion.process.prior(rand(count, 1, 2, 2, dtype=torch.float32))
        residual = sample(diffusion.predictor(reconstruction, clip=False), rows, start, torch.arange(count))
        images = diffusion.process.image(residual, reconstruction)
        for group, x_hat in enumerate((-0.9, 0.5)):
            assert images[group::2].mean().item() == pytest.approx(0.6 * x_hat + 0.1, abs=0.015)
            assert images[group::2].std().item() == pytest.approx(deviation, rel=0.04)


class TestPredictor:
    RECONSTRUCTION = rand(4, 3, 8, 8, seed=5, dtype=torch.float32).clamp(-1, 1)
    SEEDS = torch.tensor([5, -3, 2**50, 9])

    def walk(self, diffusion, rows, seeds=SEEDS, reconstruction=RECONSTRUCTION, **options):
        noise = ops.standard_normal(seeds, STEPS, (3, 8, 8), stream=1)
        residual = sample(diffusion.predictor(reconstruction, **options), rows, diffusion.process.prior(noise), seeds)
        return diffusion.process.image(residual, reconstruction)

    @every_form
    def test_clipping_keeps_the_predicted_image_in_range(self, form):
        diffusion, residual = build(form=form), 5 * rand(4, 3, 8, 8, dtype=torch.float32)
        noise, clipped = diffusion.predictor(self.RECONSTRUCTION)(residual, 600)
        same_noise, free = diffusion.predictor(self.RECONSTRUCTION, clip=False)(residual, 600)
        assert torch.equal(noise, same_noise)  # the noise is not computed anew from the clipped image
        image = diffusion.process.image(free, self.RECONSTRUCTION)
        assert image.abs().max() > 1
        torch.testing.assert_close(diffusion.process.image(clipped, self.RECONSTRUCTION), image.clamp(-1, 1))

    @every_form
    @pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
    def test_images_end_in_range(self, form, sampler):
        images = self.walk(build(form=form), sampler_rows(ALPHA_BARS, sampler, 10))
        assert images.abs().max() <= 1 + 1e-6
        assert self.walk(build(form=form), sampler_rows(ALPHA_BARS, sampler, 10), clip=False).abs().max() > 1

    @pytest.mark.parametrize("options", [{"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.5}])
    def test_a_sample_does_not_depend_on_its_batch(self, options):
        diffusion, rows = build(), sampler_rows(ALPHA_BARS, steps=10, **options)
        together = self.walk(diffusion, rows)
        order = torch.tensor([2, 0])
        again = self.walk(diffusion, rows, self.SEEDS[order], self.RECONSTRUCTION[order])
        torch.testing.assert_close(again, together[order], rtol=1e-4, atol=1e-4)
        assert not torch.isclose(together[0], together[1], atol=1e-2).all()

    @every_form
    def test_the_network_sees_the_noisy_image_and_the_index(self, form):
        diffusion, seen = build(form=form), []
        diffusion.unet.forward = lambda inputs, steps: seen.append((inputs, steps)) or inputs[:, :3]
        residual = rand(4, 3, 8, 8, dtype=torch.float32)
        diffusion.predictor(self.RECONSTRUCTION)(residual, 990)
        (inputs, steps) = seen[0]
        assert torch.equal(steps, torch.full((4,), 990))
        expected = residual + FORMS[form][0] * self.RECONSTRUCTION
        assert torch.equal(inputs, torch.cat([expected, self.RECONSTRUCTION], dim=1))

    @every_form
    def test_guidance_moves_away_from_the_prediction_without_reconstruction(self, form):
        diffusion, residual, step = build(form=form), rand(4, 3, 8, 8, dtype=torch.float32), torch.full((4,), 300)
        conditional = diffusion(residual, step, self.RECONSTRUCTION)
        nothing = torch.zeros_like(residual)
        free = residual + FORMS[form][1] * ALPHA_BARS[300].sqrt().float() * self.RECONSTRUCTION
        unconditional = diffusion(free, step, nothing)
        for guidance in (0.0, 1.5):
            guided, _ = diffusion.predictor(self.RECONSTRUCTION, guidance=guidance)(residual, 300)
            torch.testing.assert_close(guided, (1 + guidance) * conditional - guidance * unconditional)
        guided, _ = diffusion.predictor(nothing, guidance=3.0)(residual, 300)
        torch.testing.assert_close(guided, diffusion(residual, step, nothing))  # nothing to move away from

    def test_equal_seeds_share_all_noise_as_published(self):
        """The published sampler with one tensor of noise per step for every image (Fig. 7), step by step."""
        diffusion, rows = build(), sampler_rows(ALPHA_BARS, "ddpm", 20, spacing="uniform")
        seed, shape = torch.tensor([7]), (3, 8, 8)
        ddpm_latents = torch.cat([ops.standard_normal(seed, step, shape) for step in rows.steps.tolist()])
        x = ops.standard_normal(seed, STEPS, shape, stream=1).expand(4, -1, -1, -1)
        new_variances = [1 - ALPHA_BARS[0]]
        ascending = rows.steps.flip(0).tolist()
        new_variances += [1 - ALPHA_BARS[high] / ALPHA_BARS[low] for low, high in pairwise(ascending)]
        for index, step in enumerate(rows.steps.tolist()):
            alpha_bar, v = ALPHA_BARS[step], new_variances[ascending.index(step)]
            before = alpha_bar / (1 - v)
            noise = diffusion(x, torch.full((4,), step), self.RECONSTRUCTION)
            clean = ((1 / alpha_bar).sqrt() * x - (1 / alpha_bar - 1).sqrt() * noise).clamp(-1, 1)
            mean = v * before.sqrt() / (1 - alpha_bar) * clean + (1 - v).sqrt() * (1 - before) / (1 - alpha_bar) * x
            deviation = (v * (1 - before) / (1 - alpha_bar)).sqrt() if step > 0 else 0.0
            x = (mean + deviation * torch.stack([ddpm_latents[index]] * 4)).float()
        shared = self.walk(diffusion, rows, seed.expand(4))
        torch.testing.assert_close(shared, x, rtol=1e-3, atol=1e-3)
        alike = self.walk(diffusion, rows, seed.expand(4), self.RECONSTRUCTION[:1].expand(4, -1, -1, -1))
        torch.testing.assert_close(alike, alike[:1].expand_as(alike), rtol=1e-4, atol=1e-4)
        assert not torch.isclose(shared, self.walk(diffusion, rows), atol=1e-2).all()

    @pytest.mark.parametrize("eta", [0.0, 0.4])
    def test_ddim_of_form2_is_the_published_formula(self, eta):
        """DiffuseVAE walks x_t, adds x_hat in three places, and subtracts it at the end."""
        diffusion, rows = build(form="form2"), sampler_rows(ALPHA_BARS, "ddim", 20, eta=eta)
        noise = ops.standard_normal(self.SEEDS, STEPS, (3, 8, 8), stream=1)
        x_hat, x = self.RECONSTRUCTION, noise + self.RECONSTRUCTION
        steps = [*rows.steps.tolist(), -1]
        for step, following in pairwise(steps):
            alpha_bar, before = ALPHA_BARS[step], ALPHA_BARS[following] if following >= 0 else torch.tensor(1.0).double()
            eps = diffusion.unet(torch.cat([x, x_hat], dim=1), torch.full((4,), step)).double()
            clean = ((1 / alpha_bar).sqrt() * (x - x_hat) - (1 / alpha_bar - 1).sqrt() * eps).clamp(-1, 1)
            sigma = eta * ((1 - before) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / before).sqrt()
            weight = (1 - before - sigma**2).sqrt()
            mean = clean * before.sqrt() + weight * (eps + x_hat / (1 - alpha_bar).sqrt())
            mean = mean + (1 - weight / (1 - alpha_bar).sqrt()) * x_hat
            x = (mean + sigma * ops.standard_normal(self.SEEDS, step, (3, 8, 8))).float()
        torch.testing.assert_close(self.walk(diffusion, rows), x - x_hat, rtol=1e-3, atol=1e-3)

    def test_temperature_scales_the_initial_noise_alone(self):
        seen = []

        def predict(residual, step):
            seen.append(residual)
            return torch.zeros_like(residual), torch.zeros_like(residual)

        rows, noise = sampler_rows(ALPHA_BARS, "ddpm", 10), rand(4, 3, 8, 8)
        walks = []
        for temperature in (1.0, 0.5):
            seen.clear()
            sample(predict, rows, DDPM.prior(noise, temperature), self.SEEDS)
            walks.append(list(seen))
        torch.testing.assert_close(walks[1][0], 0.5 * walks[0][0])
        kept = rows.named.latent[:-1].cumprod(0)  # what is left of the initial noise; the fresh noise is the same
        for index, (warm, cold) in enumerate(zip(walks[0][1:], walks[1][1:], strict=True)):
            torch.testing.assert_close(warm - cold, 0.5 * kept[index] * noise)

    def test_guidance_needs_a_condition(self):
        diffusion = build(conditional=False)
        with pytest.raises(ValueError, match="nothing to be guided by, got guidance=1"):
            diffusion.predictor(torch.zeros(1, 3, 8, 8), guidance=1.0)


class TestConditionalDiffusion:
    @pytest.mark.parametrize(("conditional", "expected"), [(True, 95_167_747), (False, 95_164_291)])
    def test_published_number_of_parameters(self, conditional, expected):
        with torch.device("meta"):
            diffusion = ConditionalDiffusion(ConditionalDiffusionConfig(conditional=conditional))
        assert sum(parameter.numel() for parameter in diffusion.parameters()) == expected
        assert diffusion.unet.down[0][0].in_channels == (6 if conditional else 3)

    def test_attention_at_sixteen_pixels_is_another_network(self):
        with torch.device("meta"):
            diffusion = ConditionalDiffusion(ConditionalDiffusionConfig(attention_resolutions=(16,)))
        assert round(sum(parameter.numel() for parameter in diffusion.parameters()) / 1e6, 2) == 92.87

    def test_without_condition_the_reconstruction_is_not_seen(self):
        diffusion, residual = build(conditional=False), rand(2, 3, 8, 8, dtype=torch.float32)
        steps = torch.tensor([3, 900])
        assert torch.equal(diffusion(residual, steps, torch.ones_like(residual)), diffusion(residual, steps, 0 * residual))

    @pytest.mark.parametrize("form", ["form2", "eq7"])
    def test_without_condition_no_form_shifts(self, form):
        with pytest.raises(ValueError, match=f"form must be \"form1\", got '{form}'"):
            ConditionalDiffusion(replace(TINY, conditional=False, form=form))


class TestConditionalObjective:
    IMAGES = rand(64, 3, 8, 8, seed=3, dtype=torch.float32).clamp(-1, 1)

    def batch(self, count=64):
        return Batch(self.IMAGES[:count], torch.arange(count), 0, 0.0)

    @staticmethod
    def blur(images, generator):
        return 0.5 * images + 0.1 * torch.randn(images.shape, generator=generator)

    def spied(self, form="form1", **options):
        """An objective of a network that predicts `noise_guess`, and what it was given."""
        diffusion, seen = build(form=form), []
        diffusion.unet.forward = lambda inputs, steps: seen.append((inputs, steps)) or torch.zeros_like(inputs[:, :3])
        return ConditionalDiffusionObjective(diffusion, self.blur, **options), seen

    def test_predicting_nothing_costs_one(self):
        objective, _ = self.spied()
        loss, scalars = objective(self.batch(), generator())
        assert loss.item() == pytest.approx(1.0, abs=0.03)
        assert scalars["noise_error"] is loss

    @every_form
    def test_the_network_is_given_the_noisy_image_of_each_index(self, form):
        objective, seen = self.spied(form)
        objective.module.unet.forward = lambda inputs, steps: seen.append((inputs, steps)) or self.noise_of(form, inputs, steps)
        loss, _ = objective(self.batch(), generator())
        assert loss.item() < 1e-3  # the noise that the exact inverse of the process finds is the target
        steps = seen[0][1]
        assert sorted((steps // 100).unique().tolist()) == list(range(10))
        assert steps.min() >= 0 and steps.max() <= STEPS - 1

    def test_every_index_is_trained(self):
        diffusion, seen = build(num_steps=5), []
        diffusion.unet.forward = lambda inputs, steps: seen.append(steps) or torch.zeros_like(inputs[:, :3])
        ConditionalDiffusionObjective(diffusion, self.blur)(self.batch(5), generator())
        assert sorted(seen[0].tolist()) == list(range(5))

    def noise_of(self, form, inputs, steps):
        noisy, reconstruction = inputs.double().chunk(2, dim=1)
        alpha_bar, (shift, offset) = ALPHA_BARS[steps][:, None, None, None], FORMS[form]
        centre = (shift - offset * alpha_bar.sqrt()) * reconstruction
        return (noisy - alpha_bar.sqrt() * self.IMAGES - centre) / (1 - alpha_bar).sqrt()

    @every_form
    def test_condition_dropout_takes_the_whole_batch(self, form):
        for rate, expected in ((0.0, 0), (1.0, 40), (0.5, None)):
            objective, seen = self.spied(form, condition_dropout=rate)
            for seed in range(40):
                objective(self.batch(4), generator(seed))
            dropped = [not inputs[:, 3:].any() for inputs, _ in seen]
            present = [bool(inputs[:, 3:].flatten(1).any(1).all()) for inputs, _ in seen]
            assert [not kept for kept in present] == dropped  # all of a batch or none
            assert sum(dropped) == expected if expected is not None else 10 < sum(dropped) < 30

    def test_the_reconstruction_is_frozen(self):
        vae = CapacityVAE(TINY_VAE)
        objective = ConditionalDiffusionObjective(build(), vae.reconstruct)
        objective(self.batch(8), generator())[0].backward()
        assert all(parameter.grad is None for parameter in vae.parameters())
        assert all(parameter.grad is not None for parameter in objective.module.parameters())

    def test_same_seed_same_loss(self):
        objective = ConditionalDiffusionObjective(build(), CapacityVAE(TINY_VAE).reconstruct)
        losses = [objective(self.batch(8), generator(seed))[0].item() for seed in (1, 1, 2)]
        assert losses[0] == losses[1] != losses[2]

    @pytest.mark.parametrize("conditional", [True, False])
    def test_trains_and_resumes(self, conditional, tmp_path):
        diffusion = build(resolution=16, conditional=conditional)
        reconstruct = self.blur if conditional else lambda images, generator: torch.zeros_like(images)
        objective = ConditionalDiffusionObjective(diffusion, reconstruct, condition_dropout=0.1)
        dataset, options = data.Subset(data.Scenes(16), range(16)), TrainingOptions(steps=2, batch_size=4)
        state = train(objective, dataset, options, tmp_path, progress=False)
        resumed = train(objective, dataset, options, tmp_path, resume=True, progress=False)
        assert all(torch.equal(state[key], resumed[key]) and value.isfinite().all() for key, value in state.items())


class TestCapacityVAE:
    def test_images_in_their_range(self):
        vae = CapacityVAE(TINY_VAE)
        seen = []
        vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        images = torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8)
        assert vae.encode(images).shape == (1, 6, 1, 1)
        assert seen[0].min() == 0 and seen[0].max() == 1
        decoded = vae.decode(100 * rand(5, 6, 1, 1, dtype=torch.float32))
        assert decoded.shape == (5, 3, 8, 8) and decoded.abs().max() <= 1

    def test_deviation_is_half_the_log_variance(self):
        vae = CapacityVAE(TINY_VAE)
        mean, log_variance = vae.encoder(torch.full((1, 3, 8, 8), 0.75))
        posterior = vae.posterior(torch.full((1, 3, 8, 8), 0.5))
        torch.testing.assert_close(posterior.mean, mean)
        torch.testing.assert_close(posterior.variance, log_variance.exp())

    def test_reconstructions_decode_a_sample_not_the_mean(self):
        vae, images = CapacityVAE(TINY_VAE), torch.zeros(4, 3, 8, 8)
        first, again, other = (vae.reconstruct(images, generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
        posterior = vae.posterior(images)
        noise = torch.randn(posterior.mean.shape, generator=generator(1))
        assert torch.equal(first, vae.decode(posterior.mean + posterior.stddev * noise))
        assert not torch.isclose(first[0], first[1]).all()


class TestCapacityObjective:
    def objective(self, **options):
        torch.manual_seed(0)
        return CapacityObjective(CapacityVAE(TINY_VAE), **options)

    def evaluate(self, objective, progress=1.0):
        images = rand(8, 3, 8, 8, dtype=torch.float32).clamp(-1, 1)
        return objective(Batch(images, torch.arange(8), 0, progress), generator(2))

    @pytest.mark.parametrize("reduction", ["batch_mean", "batch_sum"])
    def test_loss_is_the_published_one(self, reduction):
        objective, images = self.objective(capacity=0.02, reduction=reduction), rand(8, 3, 8, 8, dtype=torch.float32).clamp(-1, 1)
        loss, _ = self.evaluate(objective)
        vae, x = objective.vae, (images + 1) / 2
        mean, log_variance = vae.encoder(x)
        z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator(2))
        recons = F.mse_loss(vae.decoder(z).sigmoid(), x, reduction="sum")
        kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
        if reduction == "batch_sum":
            published = recons + 100 * (kl - 0.02).abs()
        else:
            published = recons + 8 * 100 * (kl / 8 - 0.02).abs()
        torch.testing.assert_close(loss, published / 8 / images[0].numel())

    def test_batch_sum_is_batch_mean_with_a_share_of_the_capacity(self):
        summed, _ = self.evaluate(self.objective(capacity=25.0, reduction="batch_sum"))
        mean, _ = self.evaluate(self.objective(capacity=25.0 / 8))
        torch.testing.assert_close(summed, mean)
        assert not torch.isclose(summed, self.evaluate(self.objective(capacity=25.0))[0])

    @pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.0), (0.2, 5.0), (0.4, 10.0), (0.9, 10.0)])
    def test_capacity_grows_and_is_logged_per_image(self, progress, expected):
        for reduction, share in (("batch_mean", expected), ("batch_sum", expected / 8)):
            objective = self.objective(capacity=10.0, warmup=0.4, reduction=reduction)
            scalars = self.evaluate(objective, progress)[1]
            assert float(scalars["capacity"]) == pytest.approx(share)
            torch.testing.assert_close(scalars["penalty"], 100 * (scalars["kl"] - share).abs(), check_dtype=False)
            assert float(scalars["below_capacity"]) == (scalars["kl"] < share)

    def test_a_capacity_above_which_the_kl_stays_has_no_gradient(self):
        gradients = []
        for capacity in (0.0, 1e-4):
            objective = self.objective(capacity=capacity)
            loss, scalars = self.evaluate(objective)
            assert scalars["below_capacity"] == 0
            loss.backward()
            gradients.append([parameter.grad for parameter in objective.vae.parameters()])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))

    def test_trains(self, tmp_path):
        larger = BlockAutoencoderConfig(
            resolution=16, encoder_blocks="16d2,16t8,8d8,8t1,1x1", decoder_blocks="1u16,1t16,16x1", channels="16:8,8:8,1:6"
        )
        vae = CapacityVAE(larger)
        dataset, options = data.Subset(data.Scenes(16), range(16)), TrainingOptions(steps=2, batch_size=4)
        state = train(CapacityObjective(vae), dataset, options, tmp_path, progress=False)
        assert all(value.isfinite().all() for value in state.values())
