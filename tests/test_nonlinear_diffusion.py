import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from multibeta.basis import cosine_matrix, transformed
from multibeta.nonlinear_diffusion import (
    PARAMETERIZATIONS,
    SAMPLERS,
    DiffusionConfig,
    NonlinearDiffusion,
    NonlinearDiffusionObjective,
    process_statistics,
    sampler_rows,
)
from multibeta.nonlinear_diffusion.samplers import spaced_indices
from multibeta.sampling import sample
from multibeta.schedules import spatial, stratified_steps

STEPS = 50
SIGMAS = torch.exp(torch.linspace(-4, 0, STEPS + 1, dtype=torch.float64))
CURVES = torch.stack([SIGMAS, SIGMAS**0.1, SIGMAS**0.5, (SIGMAS + 1) / 2], dim=1)  # a sigma for each of four channels
TINY = {
    "latent_channels": 4,
    "latent_resolution": 4,
    "base_channels": 8,
    "channel_multipliers": (1,),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "head_channels": 8,
    "num_groups": 4,
    "num_steps": STEPS,
}
DETERMINISTIC = ("ode", "ode2", "heun")


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(parameterization="v", sigmas=SIGMAS, **fields):
    torch.manual_seed(0)
    config = DiffusionConfig(parameterization=parameterization, sigma_per_channel=sigmas.dim() == 2, **(TINY | fields))
    diffusion = NonlinearDiffusion(config)
    table = tuple(diffusion.latent_mean.shape)
    diffusion.set_process(sigmas, rand(*table, seed=1), rand(*table, seed=2).abs() + 0.1, rand(*table, seed=3).abs() + 0.1)
    return diffusion


MIXING = rand(4, 4, seed=9)


def encode(images, beta):
    """A process whose channels differ in size, rotate into each other and vanish towards beta = 1."""
    t = torch.as_tensor(beta, dtype=torch.float32).expand(len(images)).view(-1, 1, 1, 1)
    mixed = torch.einsum("dc,nchw->ndhw", MIXING, images)
    return (1 - t**2) * (images + 0.5) + t * (1 - t) * mixed


IMAGES = rand(512, 4, 4, 4, seed=5)


def measured_as(diffusion):
    """`encode`, as `process_statistics` takes it for a model."""
    return lambda images, beta: diffusion.as_measured(encode(images, beta))


both_kinds = pytest.mark.parametrize("sigmas", [SIGMAS, CURVES], ids=["one sigma", "a sigma per channel"])


class TestHeads:
    @both_kinds
    @pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
    @pytest.mark.parametrize("step", [1, 20, STEPS])
    def test_perfect_heads_predict_the_noise_and_the_difference(self, parameterization, step, sigmas, monkeypatch):
        diffusion = build(parameterization, sigmas)
        encoding, previous, noise = (rand(3, 4, 4, 4, seed=s) for s in (10, 11, 12))
        steps = torch.full((3,), step)
        targets = diffusion.targets(encoding, previous, noise, steps)
        monkeypatch.setattr(diffusion, "heads", lambda latents, steps: targets)
        latents = encoding + spatial(diffusion.sigmas[step : step + 1]) * noise
        noise_prediction, delta = diffusion.predict(latents, step)
        torch.testing.assert_close(noise_prediction, noise, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(delta, previous - encoding, rtol=1e-4, atol=1e-4)

    def test_literal_targets_are_equation_19(self):
        encoding, previous, noise = (rand(3, 4, 4, 4, seed=s) for s in (10, 11, 12))
        first, second = build("literal").targets(encoding, previous, noise, torch.tensor([1, 2, 3]))
        assert torch.equal(first, noise) and torch.equal(second, previous - encoding)

    @both_kinds
    def test_network_sees_unit_latents(self, sigmas, monkeypatch):
        diffusion, step = build(sigmas=sigmas), 30
        seen = []
        monkeypatch.setattr(
            diffusion.unet, "forward", lambda latents, step: seen.append((latents, step)) or latents.repeat(1, 2, 1, 1)
        )
        sigma, mean, deviation, _ = diffusion.tables(torch.tensor([step]))
        latents = mean + deviation * rand(4000, 4, 4, 4) + sigma * rand(4000, 4, 4, 4, seed=1)
        diffusion.predict(latents, step)
        (scaled, at) = seen[0]
        torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), rtol=0.02, atol=0)
        torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
        assert (at == 1000 * step / STEPS).all()

    @both_kinds
    def test_start_has_the_moments_of_the_process(self, sigmas):
        diffusion = build(sigmas=sigmas)
        start = diffusion.initial(rand(4000, 4, 4, 4))
        sigma, mean, deviation, _ = diffusion.tables(torch.tensor([STEPS]))
        torch.testing.assert_close(start.mean((0, 2, 3)), mean.flatten(), rtol=0, atol=0.05)
        torch.testing.assert_close(start.var((0, 2, 3)), (deviation**2 + sigma**2).flatten(), rtol=0.03, atol=0)
        noise = rand(2, 4, 4, 4)
        assert torch.equal(build("literal").initial(noise), noise)

    @pytest.mark.parametrize(("built", "given"), [(SIGMAS, CURVES), (CURVES, SIGMAS), (CURVES, CURVES[:, :3])])
    def test_a_process_of_the_other_kind_is_refused(self, built, given):
        diffusion = build(sigmas=built)
        kind, shapes = built.dim() == 2, [str(tuple(sigmas.shape)) for sigmas in (built, given)]
        message = f"with sigma_per_channel={kind} sigmas must be {shapes[0]}, got {shapes[1]}"
        with pytest.raises(ValueError, match=re.escape(message)):
            diffusion.set_process(given, *(torch.ones(STEPS + 1, 4) for _ in range(3)))

    @pytest.mark.parametrize("name", ["latent_mean", "latent_deviation", "velocity_rms"])
    def test_tables_that_would_be_spread_and_numbers_that_are_none_are_refused(self, name):
        diffusion, tables = (
            build(),
            {table: torch.ones(STEPS + 1, 4) for table in ("latent_mean", "latent_deviation", "velocity_rms")},
        )
        with pytest.raises(ValueError, match=re.escape(f"{name} must be (51, 4), got (4,)")):
            diffusion.set_process(SIGMAS, **(tables | {name: torch.ones(4)}))
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            diffusion.set_process(SIGMAS, **(tables | {name: torch.full((STEPS + 1, 4), torch.nan)}))


def blurred(images, beta):
    """A process that only blurs: each cosine coefficient shrinks by a speed of its own, faster for high frequencies."""
    matrix = cosine_matrix(4)
    frequency = torch.arange(4)[:, None] + torch.arange(4)
    t = torch.as_tensor(beta, dtype=torch.float32).expand(len(images)).view(-1, 1, 1, 1)
    return transformed((1 - t ** (4 / (1 + frequency))) * transformed(images, matrix), matrix.T)


class TestCosineBasis:
    def test_the_matrix_is_that_of_scipy_and_orthonormal(self):
        scipy_fft = pytest.importorskip("scipy.fft")
        maps = rand(3, 4, 8, 8)
        expected = torch.from_numpy(scipy_fft.dctn(maps.numpy(), axes=(2, 3), norm="ortho"))
        torch.testing.assert_close(transformed(maps, cosine_matrix(8)), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            transformed(transformed(maps, cosine_matrix(8)), cosine_matrix(8).T), maps, rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize("step", [1, 20, 45])
    def test_perfect_heads_predict_the_noise_and_the_difference(self, step, monkeypatch):
        diffusion = build("residual", basis="cosine")
        encoding, previous, noise = (rand(3, 4, 4, 4, seed=s) for s in (10, 11, 12))
        targets = diffusion.targets(encoding, previous, noise, torch.full((3,), step))
        monkeypatch.setattr(diffusion, "heads", lambda latents, steps: targets)
        predictions = diffusion.predict(encoding + diffusion.sigmas[step].float() * noise, step)
        torch.testing.assert_close(predictions, (noise, previous - encoding), rtol=1e-3, atol=1e-3)

    def test_a_process_that_blurs_leaves_a_residual_in_pixels_and_none_in_coefficients(self):
        left = {}
        for basis in ("pixel", "cosine"):
            diffusion = build("residual", basis=basis)
            statistics = process_statistics(
                lambda images, beta, of=diffusion: of.as_measured(blurred(images, beta)), IMAGES, STEPS, nodes=STEPS
            )
            diffusion.set_process(SIGMAS, *statistics)
            steps = torch.arange(5, STEPS - 5)
            left[basis] = float((diffusion.delta_tables(steps)[2] * STEPS / diffusion.tables(steps)[2]).mean())
        assert left["cosine"] < 0.05 < 0.2 < left["pixel"]

    def test_autocast_rounds_no_target(self):
        diffusion = build("residual", basis="cosine")
        diffusion.set_process(SIGMAS, *process_statistics(measured_as(diffusion), IMAGES, STEPS, nodes=STEPS))
        arguments = encode(IMAGES[:8], 0.4), encode(IMAGES[:8], 0.38), rand(8, 4, 4, 4), torch.full((8,), 20)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = diffusion.targets(*arguments)
        torch.testing.assert_close(rounded, diffusion.targets(*arguments), rtol=0, atol=0)

    def test_the_network_sees_pixels_of_unit_coefficients(self, monkeypatch):
        diffusion, seen = build("residual", basis="cosine"), []
        monkeypatch.setattr(diffusion.unet, "forward", lambda x, step: seen.append(x) or torch.cat([x, x], dim=1))
        sigma, mean, deviation, _ = diffusion.tables(torch.tensor([30]))
        latents = diffusion.pixels(mean + (deviation**2 + sigma**2).sqrt() * rand(4000, 4, 4, 4))
        first, _ = diffusion.heads(latents, torch.full((4000,), 30))
        torch.testing.assert_close(diffusion.coefficients(seen[0]), first, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(first.std(0), torch.ones(4, 4, 4), rtol=0.06, atol=0)

    def test_start_has_the_moments_of_the_process(self):
        diffusion = build("residual", basis="cosine")
        start = diffusion.coefficients(diffusion.initial(rand(4000, 4, 4, 4)))
        sigma, mean, deviation, _ = diffusion.tables(torch.tensor([STEPS]))
        torch.testing.assert_close(start.mean(0), mean[0], rtol=0, atol=0.15)
        torch.testing.assert_close(start.var(0), (deviation**2 + sigma**2)[0], rtol=0.1, atol=0)


class TestSpacing:
    SHARES = torch.linspace(1, 9, STEPS, dtype=torch.float64)

    @pytest.mark.parametrize("steps", [1, 7, STEPS])
    def test_steps_take_equal_parts_of_the_way(self, steps):
        indices = spaced_indices(STEPS, 0, steps, self.SHARES)
        assert indices[0] == STEPS and indices[-1] == 0 and len(indices) == steps + 1
        parts = [float(self.SHARES[low:high].sum()) for high, low in itertools.pairwise(indices)]
        assert min(parts) > 0
        if steps == 7:
            assert max(parts) - min(parts) < 2 * float(self.SHARES.max())
        assert spaced_indices(0, STEPS, steps, self.SHARES) == indices[::-1]

    def test_part_of_the_way_and_even_shares(self):
        assert spaced_indices(30, 10, 5, torch.ones(STEPS)) == spaced_indices(30, 10, 5)
        spaced = spaced_indices(30, 10, 5, self.SHARES)
        assert spaced[0] == 30 and spaced[-1] == 10 and sorted(set(spaced), reverse=True) == spaced

    def test_shares_of_nothing_still_make_steps(self):
        shares = torch.zeros(STEPS)
        shares[-1] = 1
        assert (
            spaced_indices(STEPS, 0, 5, shares) == [50, 49, 48, 47, 46, 0] or len(set(spaced_indices(STEPS, 0, 5, shares))) == 6
        )

    def test_the_model_spaces_as_its_config_says(self):
        diffusion = build("residual", spacing="turn")
        diffusion.set_process(SIGMAS, *process_statistics(encode, IMAGES, STEPS, nodes=STEPS))
        rows = diffusion.sampler_rows("ode", 5)
        assert [*rows.steps.tolist(), 0] == spaced_indices(STEPS, 0, 5, diffusion.step_shares())
        assert rows.steps.tolist() != sampler_rows(SIGMAS, "ode", 5).steps.tolist()


class TestTargets:
    @both_kinds
    def test_every_channel_has_size_one_at_every_step(self, sigmas):
        diffusion = build(sigmas=sigmas)
        diffusion.set_process(sigmas, *process_statistics(encode, IMAGES, STEPS, nodes=STEPS))
        for step in (1, 10, 25, 40, 49):
            previous, encoding = encode(IMAGES, (step - 1) / STEPS), encode(IMAGES, step / STEPS)
            steps = torch.full((len(IMAGES),), step)
            v, velocity = diffusion.targets(encoding, previous, rand(*IMAGES.shape, seed=step), steps)
            torch.testing.assert_close(v.var((0, 2, 3)), torch.ones(4), rtol=0.08, atol=0)
            torch.testing.assert_close(velocity.square().mean((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)

    @both_kinds
    def test_the_rest_of_a_residual_has_size_one_and_tells_nothing_of_the_encoding(self, sigmas):
        diffusion = build("residual", sigmas)
        diffusion.set_process(sigmas, *process_statistics(encode, IMAGES, STEPS, nodes=STEPS))
        for step in (1, 10, 25, 40, 49):
            previous, encoding = encode(IMAGES, (step - 1) / STEPS), encode(IMAGES, step / STEPS)
            v, rest = diffusion.targets(encoding, previous, rand(*IMAGES.shape, seed=step), torch.full((len(IMAGES),), step))
            torch.testing.assert_close(v.var((0, 2, 3)), torch.ones(4), rtol=0.08, atol=0)
            torch.testing.assert_close(rest.square().mean((0, 2, 3)), torch.ones(4), rtol=0.03, atol=0)
            together = torch.stack([rest, encoding]).transpose(1, 2).flatten(2)
            for values in together.unbind(1):  # of a channel
                assert abs(torch.corrcoef(values)[0, 1]) < 0.03

    def test_a_process_that_only_shrinks_leaves_no_residual(self):
        def shrinking(images, beta):
            t = torch.as_tensor(beta, dtype=torch.float32).view(-1, 1, 1, 1)
            return (1 - t**3) * (images + 0.5) * torch.tensor([1.0, 2.0, 0.5, 1.5])[:, None, None] + t

        diffusion, noise = build("residual"), rand(*IMAGES.shape)
        diffusion.set_process(SIGMAS, *process_statistics(shrinking, IMAGES, STEPS, nodes=STEPS))
        for step in (1, 10, 40, 49):
            encoding, previous = shrinking(IMAGES, step / STEPS), shrinking(IMAGES, (step - 1) / STEPS)
            v, rest = diffusion.targets(encoding, previous, noise, torch.full((len(IMAGES),), step))
            assert rest.abs().max() < 0.3  # in units of the least residual, a hundredth of a velocity
            diffusion.heads = lambda latents, steps, v=v: (v, torch.zeros_like(v))
            latents = encoding + SIGMAS[step].float() * noise
            torch.testing.assert_close(diffusion.predict(latents, step)[1], previous - encoding, rtol=1e-2, atol=1e-4)

    @pytest.mark.parametrize("schedule", ["linear", "sinusoidal_squared"])
    def test_statistics_are_exact_at_their_nodes_and_linear_between(self, schedule):
        mean, deviation, rms = process_statistics(encode, IMAGES, STEPS, schedule, nodes=10)
        assert mean.shape == deviation.shape == rms.shape == (STEPS + 1, 4)

        def beta(step):
            return step / STEPS if schedule == "linear" else math.sin(math.pi / 2 * step / STEPS) ** 2

        for step in range(5, STEPS + 1, 5):
            f, before = encode(IMAGES, beta(step)), encode(IMAGES, beta(step - 1))
            torch.testing.assert_close(mean[step], f.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(deviation[step], f.std((0, 2, 3)).clamp(min=1e-4), rtol=1e-3, atol=1e-5)
            slope = ((before - f) * STEPS).square().mean((0, 2, 3)).sqrt()
            torch.testing.assert_close(rms[step], slope, rtol=1e-3, atol=1e-4)
        for table in (mean, deviation, rms):
            torch.testing.assert_close(table[12], 0.6 * table[10] + 0.4 * table[15])

    def test_nothing_divides_by_zero_when_the_encodings_stand_still(self):
        _, deviation, rms = process_statistics(lambda images, beta: torch.zeros_like(images), IMAGES[:4], STEPS)
        assert (deviation > 0).all() and (rms > 0).all()


class TestObjective:
    def batch(self, count=512):
        return SimpleNamespace(images=IMAGES[:count], progress=0.0)

    @both_kinds
    def test_predicting_nothing_costs_one_in_both_heads(self, sigmas):
        diffusion = build(sigmas=sigmas)
        diffusion.set_process(sigmas, *process_statistics(encode, IMAGES, STEPS, nodes=STEPS))
        loss, scalars = NonlinearDiffusionObjective(diffusion, encode)(self.batch(), torch.Generator().manual_seed(0))
        assert scalars["noise_error"].item() == pytest.approx(1, abs=0.05)
        assert scalars["delta_error"].item() == pytest.approx(1, abs=0.05)
        assert loss.item() == pytest.approx(2, abs=0.1)

    def test_as_printed_delta_starves(self):
        diffusion = build("literal")
        diffusion.set_process(SIGMAS, *process_statistics(encode, IMAGES, STEPS))
        _, scalars = NonlinearDiffusionObjective(diffusion, encode)(self.batch(), torch.Generator().manual_seed(0))
        assert scalars["noise_error"] > 0.9
        assert scalars["delta_error"] < 1e-2 * scalars["noise_error"]

    def test_encodings_are_float32_under_autocast(self):
        convolution, seen = nn.Conv2d(4, 4, 1), []

        def recording(images, beta):
            encoding = convolution(images)
            seen.append((encoding.dtype, encoding.requires_grad))
            return encoding

        diffusion = build()
        with torch.autocast("cpu", torch.bfloat16):
            assert convolution(IMAGES[:1]).dtype == torch.bfloat16
            loss, _ = NonlinearDiffusionObjective(diffusion, recording)(self.batch(8), torch.Generator())
        assert seen == [(torch.float32, False)]
        assert loss.dtype == torch.float32

    def test_encodes_the_same_image_at_neighbouring_steps(self):
        seen = []

        def recording(images, beta):
            seen.append((images, beta))
            return encode(images, beta)

        NonlinearDiffusionObjective(build(), recording)(self.batch(100), torch.Generator().manual_seed(0))
        ((images, beta),) = seen
        late, early = beta.chunk(2)
        assert torch.equal(*images.chunk(2))
        torch.testing.assert_close(late - early, torch.full((100,), 1 / STEPS), rtol=1e-4, atol=1e-6)
        assert set((late * STEPS).round().int().tolist()) == set(range(1, STEPS + 1))  # never 0

    def test_noise_draws_share_their_encodings(self):
        encoded, seen = [], []

        def recording(images, beta):
            encoded.append(len(images))
            return torch.zeros_like(images)

        diffusion = build()
        forward = diffusion.unet.forward
        diffusion.unet.forward = lambda latents, step: seen.append((latents, step)) or forward(latents, step)
        NonlinearDiffusionObjective(diffusion, recording, noise_draws=3)(self.batch(8), torch.Generator().manual_seed(0))
        ((latents, steps),) = seen
        assert encoded == [16] and len(latents) == 24
        assert torch.equal(steps[:8], steps[8:16]) and torch.equal(steps[:8], steps[16:])
        assert not torch.isclose(latents[:8], latents[8:16]).all(dim=(1, 2, 3)).any()

    @both_kinds
    @pytest.mark.parametrize("basis", ["pixel", "cosine"])
    def test_turn_weights_are_what_errors_of_the_heads_make_of_a_step(self, basis, sigmas, monkeypatch):
        diffusion = build("residual", sigmas, basis=basis)
        diffusion.set_process(sigmas, *process_statistics(measured_as(diffusion), IMAGES, STEPS, nodes=STEPS))
        errors = rand(2, 3, 4, 4, 4, seed=8)
        for step in (5, 25, 40):
            moves = []
            for heads in (torch.zeros_like(errors), errors):
                monkeypatch.setattr(diffusion, "heads", lambda latents, steps, heads=heads: heads)
                noise, delta = diffusion.predict(rand(3, 4, 4, 4), step)
                before, sigma = (spatial(diffusion.sigmas[at : at + 1]).float() for at in (step - 1, step))
                moves.append(diffusion.coefficients((before - sigma) * noise + delta))
            _, _, deviation, _ = diffusion.tables(torch.tensor([step]))
            weight, counts = diffusion.turn_weights(torch.full((3,), step))
            means = diffusion.turns().mean(1)
            mean = torch.maximum(means[step - 1], 0.1 * means.mean())
            own = weight * 1.1 * mean  # its turn, and a tenth of the mean below it
            change = (moves[1] - moves[0]) / (deviation**2 + sigma**2).sqrt() / own
            turns = (own - 0.1 * mean).expand_as(change) > 1e-3 * mean  # else signal returns there, and has no weight of its own
            of_first, expected = change - counts * errors[1], -(1 - 0.1 * mean / own) * errors[0]
            torch.testing.assert_close(of_first[turns], expected[turns], rtol=0.1, atol=0.1)

    def test_of_a_linear_process_the_other_head_does_not_count(self):
        diffusion = build("residual")
        angle = torch.linspace(0.02, math.pi / 2 - 0.02, STEPS + 1)
        deviation = angle.cos()[:, None].expand(-1, 4)
        rms = torch.cat([deviation[:1] * 0, -deviation.diff(dim=0)]) * STEPS
        diffusion.set_process(angle.sin(), torch.zeros(STEPS + 1, 4), deviation, rms)
        weight, counts = diffusion.turn_weights(torch.arange(2, STEPS))
        torch.testing.assert_close(weight, torch.ones_like(weight))
        assert counts.max() < 0.02

    def test_a_share_of_the_loss_is_the_error_of_the_move(self):
        def loss(share, **errors):
            diffusion = build("residual")
            diffusion.heads = lambda latents, steps: (errors["first"] + 0 * latents, errors["second"] + 0 * latents)
            diffusion.targets = lambda *tensors: (torch.zeros(64, 4, 4, 4), torch.zeros(64, 4, 4, 4))
            diffusion.turn_weights = lambda steps: (torch.tensor(1.0), torch.tensor(0.5))
            objective = NonlinearDiffusionObjective(diffusion, encode, move_share=share)
            return objective(self.batch(64), torch.Generator().manual_seed(0))[0].item()

        assert loss(1.0, first=1.0, second=2.0) == pytest.approx(0)  # they cancel
        assert loss(0.0, first=1.0, second=2.0) == pytest.approx(2 + 0.1 * 4)
        assert loss(0.8, first=1.0, second=-2.0) == pytest.approx(0.8 * 4 + 0.2 * (2 + 0.1 * 4))
        with pytest.raises(ValueError, match="weight_exponent must be 0"):
            NonlinearDiffusionObjective(build("residual"), encode, move_share=0.5, weight_exponent=1.0)
        with pytest.raises(ValueError, match='move_share must be None but for parameterization "residual", got 0'):
            NonlinearDiffusionObjective(build(), encode, move_share=0.5)

    def test_weight_exponent_weighs_the_noise_term_by_sigma(self):
        def terms(exponent):
            objective = NonlinearDiffusionObjective(build(), encode, weight_exponent=exponent)
            loss, scalars = objective(self.batch(64), torch.Generator().manual_seed(0))
            return (loss - scalars["delta_error"]).item(), scalars["noise_error"].item()

        plain, noise_error = terms(0.0)
        weighted, same = terms(2.0)
        assert plain == pytest.approx(noise_error, rel=1e-5) and same == noise_error
        assert weighted < 0.5 * plain

    @both_kinds
    def test_the_weight_of_a_channel_is_its_own(self, sigmas, monkeypatch):
        diffusion, ones = build(sigmas=sigmas), torch.ones(64, 4, 4, 4)
        monkeypatch.setattr(diffusion, "heads", lambda latents, steps: (0 * ones, 0 * ones))
        monkeypatch.setattr(diffusion, "targets", lambda *tensors: (ones, 0 * ones))
        objective = NonlinearDiffusionObjective(diffusion, encode, weight_exponent=2.0)
        loss, _ = objective(self.batch(64), torch.Generator().manual_seed(0))
        steps = stratified_steps(64, 1, STEPS, torch.Generator().manual_seed(0))
        assert loss.item() == pytest.approx(sigmas[steps].square().mean().item(), rel=1e-5)


class TestSamplerRows:
    @pytest.mark.parametrize("steps", [STEPS, 7, 1])
    def test_ancestral_is_the_posterior_of_equations_15_to_17(self, steps):
        rows = sampler_rows(SIGMAS, "ancestral", steps)
        indices = [*rows.steps.tolist(), 0]
        for row, i, j in zip(rows.coefficients, indices, indices[1:], strict=False):
            f_t, f_s, z_t = 0.7, 1.1, 2.3
            # z_s ~ N(f_s, sigma_s^2), z_t | z_s ~ N(z_s + f_t - f_s, sigma_t^2 - sigma_s^2): multiply the two
            precisions = 1 / SIGMAS[j] ** 2, 1 / (SIGMAS[i] ** 2 - SIGMAS[j] ** 2)
            variance = 1 / sum(precisions)
            mean = variance * (precisions[0] * f_s + precisions[1] * (z_t - f_t + f_s))
            noise, delta = (z_t - f_t) / SIGMAS[i], (f_s - f_t) / (i - j)
            on_latent, on_noise, on_delta, on_fresh, *others = row.tolist()
            assert on_latent * z_t + on_noise * noise + on_delta * delta == pytest.approx(float(mean), rel=1e-12)
            assert on_fresh**2 == pytest.approx(float(variance), rel=1e-10)
            assert others == [0, 0, 0]

    def test_all_single_step_samplers_are_one_family(self):
        for sampler in ("resample", "ancestral", "ode"):
            rows = sampler_rows(SIGMAS, sampler, 13)
            indices = torch.tensor([*rows.steps.tolist(), 0])
            here, there, fresh = SIGMAS[indices[:-1]], SIGMAS[indices[1:]], rows.named.fresh_noise
            expected = (there**2 - fresh**2).clamp(min=0).sqrt() - here
            torch.testing.assert_close(rows.named.noise_prediction, expected, rtol=1e-9, atol=1e-9)
        assert not sampler_rows(SIGMAS, "ode", 13).coefficients[:, 3].any()
        rows = sampler_rows(SIGMAS, "resample", 13)
        torch.testing.assert_close(rows.named.fresh_noise[:-1], SIGMAS[rows.steps[1:]])

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_printed_sign_flips_delta_only(self, sampler):
        plus, minus = (sampler_rows(SIGMAS, sampler, 10, delta_sign=sign) for sign in (1, -1))
        flipped = plus.coefficients * torch.tensor([1, 1, -1, 1, 1, -1, 1])
        assert torch.equal(minus.coefficients, flipped) and torch.equal(minus.steps, plus.steps)

    @pytest.mark.parametrize("sampler", ["resample", "ancestral", "ode"])
    def test_a_full_walk_takes_every_delta_once(self, sampler):
        rows = sampler_rows(SIGMAS, sampler, STEPS)
        assert rows.steps.tolist() == list(range(STEPS, 0, -1))
        assert (rows.named.delta == 1).all()

    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize(("start", "stop", "steps"), [(STEPS, 0, 7), (31, 4, 9), (STEPS, 49, 1)])
    def test_the_strides_cover_the_walk(self, sampler, start, stop, steps):
        rows = sampler_rows(SIGMAS, sampler, steps, start=start, stop=stop)
        assert float((rows.named.delta + rows.named.previous_delta).sum()) == pytest.approx(start - stop, rel=1e-12)
        if sampler in DETERMINISTIC:
            moved = float((rows.named.noise_prediction + rows.named.previous_noise_prediction).sum())
            assert moved == pytest.approx(float(SIGMAS[stop] - SIGMAS[start]), rel=1e-12)
        assert rows.steps[0] == start
        assert (rows.named.latent == 1).all()

    @pytest.mark.parametrize("sampler", DETERMINISTIC)
    def test_walking_up_never_asks_for_the_delta_of_index_zero(self, sampler):
        rows = sampler_rows(SIGMAS, sampler, 10, start=0, stop=STEPS)
        assert rows.steps.min() == 1
        assert float((rows.named.delta + rows.named.previous_delta).sum()) == pytest.approx(-STEPS, rel=1e-12)
        assert not rows.named.fresh_noise.any()

    @pytest.mark.parametrize(("sampler", "evaluations"), [*((name, 10) for name in SAMPLERS[:4]), ("heun", 19)])
    def test_number_of_evaluations(self, sampler, evaluations):
        assert len(sampler_rows(SIGMAS, sampler, 10)) == evaluations

    @pytest.mark.parametrize("sampler", ["ode2", "heun"])
    def test_second_order_samplers_are_exact_for_predictions_linear_in_time(self, sampler):
        # eps_hat(i) = a + b i; the exact change of z is the sum over the grid of both terms at its midpoints
        def walk(coefficients, steps):
            noise_line, delta_line = coefficients
            rows = sampler_rows(SIGMAS, sampler, steps)
            start = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
            return float(
                sample(
                    lambda z, i: (z * 0 + noise_line[0] + noise_line[1] * i, z * 0 + delta_line[0] + delta_line[1] * i),
                    rows, start, torch.zeros(1, dtype=torch.int64),
                )
            )  # fmt: skip

        lines = ((0.3, 0.02), (0.1, -0.004))
        middles = torch.arange(STEPS, dtype=torch.float64) + 0.5
        noise_sum = -((0.3 + 0.02 * middles) * SIGMAS.diff()).sum()
        delta_sum = (0.1 - 0.004 * torch.arange(1, STEPS + 1)).sum()
        exact = float(noise_sum + delta_sum)
        # only the first step of ode2 and the last of heun are of first order
        errors = [abs(walk(lines, steps) - exact) for steps in (5, 10, 25)]
        assert errors[0] > 3 * errors[1] > 9 * errors[2]

    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("steps", [STEPS, 7, 1])
    def test_each_channel_has_the_rows_of_its_curve(self, sampler, steps):
        walks = [(STEPS, 0)] + [(0, STEPS)] * (sampler in DETERMINISTIC)
        for start, stop in walks:
            rows = sampler_rows(CURVES, sampler, steps, start=start, stop=stop)
            for channel, curve in enumerate(CURVES.T):
                alone = sampler_rows(curve, sampler, steps, start=start, stop=stop)
                assert torch.equal(rows.steps, alone.steps)
                assert torch.equal(rows.coefficients[:, channel], alone.coefficients)

    def test_flat_sigma_at_the_top_stays_finite(self):
        flat = torch.cat([SIGMAS[:-10], SIGMAS[-1:].expand(10)])
        for sampler in SAMPLERS:
            for steps in (STEPS, 7):
                assert sampler_rows(flat, sampler, steps).coefficients.isfinite().all()

    def test_nothing_to_walk(self):
        assert len(sampler_rows(SIGMAS, "ode", 5, start=20, stop=20)) == 0
        rows = sampler_rows(CURVES, "ode", 5, start=20, stop=20)
        assert rows.coefficients.shape == (0, 4, 7)
        assert build(sigmas=CURVES).head_rows(rows.steps).shape == (0, 4, 9)

    @pytest.mark.parametrize(
        ("arguments", "keywords", "message"),
        [
            (("ode", 0), {}, "between 1 and 50 .*got 0"),
            (("ode", STEPS + 1), {}, "between 1 and 50 .*got 51"),
            (("ode", 11), {"start": 10}, "between 1 and 10 .*got 11"),
            (("ddim", 10), {}, "resample, ancestral, ode, ode2, heun, got 'ddim'"),
            (("ancestral", 10), {"start": 0, "stop": STEPS}, "'ancestral' only walks down; use ode, ode2 or heun"),
            (("resample", 10), {"start": 0, "stop": STEPS}, "'resample' only walks down"),
            (("ode", 10), {"start": STEPS + 1}, "on the grid 0 ... 50, got 51 and 0"),
            (("ode", 10), {"stop": -1}, "on the grid 0 ... 50, got 50 and -1"),
            (("ode", 10), {"start": 20.5}, "on the grid 0 ... 50, got 20.5 and 0"),
            (("ode", 2.5), {}, "steps must be an integer, got 2.5"),
            (("ode", True), {}, "steps must be an integer, got True"),
            (("ode", 10), {"delta_sign": 2}, "delta_sign must be 1 or -1, got 2"),
        ],
    )
    def test_errors_say_what_is_possible(self, arguments, keywords, message):
        with pytest.raises(ValueError, match=message):
            sampler_rows(SIGMAS, *arguments, **keywords)

    @pytest.mark.parametrize("sigmas", [SIGMAS.flip(0), SIGMAS * torch.nan, CURVES.flip(0)], ids=["falling", "nan", "one falls"])
    def test_sigmas_that_are_no_process_are_refused(self, sigmas):
        with pytest.raises(ValueError, match="sigmas must be finite and not fall from beta = 0 to 1"):
            sampler_rows(sigmas, "ode", 10)

    def test_sigmas_of_another_shape_are_refused(self):
        with pytest.raises(ValueError, match=re.escape("sigmas must be (N + 1,) or (N + 1, C), got (51, 4, 1)")):
            sampler_rows(CURVES[:, :, None], "ode", 10)
