"""What the heads of a flow map mean over spans, in both systems, and the rows of its walks."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from test_nonlinear_diffusion import CURVES, IMAGES, SIGMAS, STEPS, TINY, build, measured_as, rand
from torch import nn

from multibeta import ops
from multibeta.diffusion_vae import FORMS, ConditionalDiffusion, ConditionalDiffusionConfig, ConditionalSpans
from multibeta.diffusion_vae.spans import BLEND
from multibeta.flow_map import FlowMap
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusion, process_statistics
from multibeta.sampling import sample
from multibeta.spans import Spanned

KINDS = list(itertools.product(["v", "residual"], ["pixel", "cosine"], ["one sigma", "a sigma per channel"]))
every_kind = pytest.mark.parametrize(("parameterization", "basis", "curves"), KINDS, ids=list(map("-".join, KINDS)))
every_form = pytest.mark.parametrize("form", FORMS)
CHAIN = ConditionalDiffusionConfig(
    resolution=4,
    base_channels=8,
    channel_multipliers=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    num_heads=2,
    dropout=0.0,
    num_groups=4,
    num_steps=STEPS,
    last_variance=0.2,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def awake(diffusion):
    """A teacher none of whose layers is zero, so that it listens to its time."""
    for parameter in diffusion.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return diffusion.eval().requires_grad_(False)


def teacher_of(parameterization="v", basis="pixel", curves="one sigma", **fields):
    """A small process, measured of images."""
    diffusion = build(parameterization, sigmas := SIGMAS if curves == "one sigma" else CURVES, basis=basis, **fields)
    diffusion.set_process(sigmas, *process_statistics(measured_as(diffusion), IMAGES[:64], STEPS, nodes=STEPS))
    return awake(diffusion)


def chain_of(form="form1"):
    """The same of the second system."""
    torch.manual_seed(0)
    return awake(ConditionalDiffusion(replace(CHAIN, form=form)))


def map_of(diffusion, **others):
    return FlowMap.of(diffusion.unet, diffusion.config, STEPS, span_channels=16, **others)


def spans_drawn(count, seed=0):
    """Random spans between grid indices, one of them from end to end."""
    pairs = torch.stack([torch.randperm(STEPS + 1, generator=generator(seed + index))[:2] for index in range(count)])
    pairs = torch.cat([pairs, torch.tensor([[STEPS, 0]])])
    return pairs.amax(1), pairs.amin(1)


def gaussian(num_steps, deviation, mean=lambda t: torch.zeros_like(t)):
    """A process f = m_t + F_t g of standard normal g, F and m functions of t, which a "residual" knows to only shrink."""
    diffusion = NonlinearDiffusion(DiffusionConfig(parameterization="residual", **(TINY | {"num_steps": num_steps})))
    t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    sigmas, sizes = torch.exp(4 * (t - 1)), torch.tensor([1.0, 0.5, 2.0, 0.2], dtype=torch.float64)
    tables = [of(t)[:, None] * sizes for of in (mean, deviation)]
    moved = torch.stack([torch.nn.functional.pad(table.diff(dim=0), (0, 0, 1, 0)) for table in tables]).square().sum(0).sqrt()
    diffusion.set_process(sigmas, *tables, moved * num_steps)
    return diffusion


def moved_by_zero_heads(diffusion, starts, ends, latents):
    """X over spans for v = u = 0, (n, K) float64."""
    row = ops.TwoHeadRow(*diffusion.spans().rows(starts, ends).unbind(-1))
    zeros, sigma = torch.zeros_like(latents), diffusion.spans().sigma
    noise_prediction, delta = row.predictions(latents, zeros, zeros)
    return latents + (sigma[ends] - sigma[starts]) * noise_prediction + (starts - ends)[:, None] * delta


class TestAsBuilt:
    @every_kind
    def test_without_a_span_it_is_the_teacher(self, parameterization, basis, curves):
        diffusion = teacher_of(parameterization, basis, curves)
        flow_map, latents = map_of(diffusion), rand(3, 4, 4, 4)
        for step in (1, 20, STEPS):
            found = diffusion.predict_span(flow_map, latents, step, step)
            torch.testing.assert_close(found, diffusion.predict(latents, step), rtol=1e-5, atol=1e-5)

    @every_form
    def test_without_a_span_it_is_the_teacher_of_the_second_system(self, form):
        diffusion, residual, reconstruction = chain_of(form), rand(3, 3, 4, 4), rand(3, 3, 4, 4, seed=1).tanh()
        predict = ConditionalSpans(diffusion, 0.7).predictor(map_of(diffusion), reconstruction)
        for step in (0, 20, STEPS - 1):
            found, _ = predict(residual, step, step)
            expected = diffusion(residual, torch.full((3,), step), reconstruction)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_the_network_is_that_of_the_teacher_whatever_the_span(self):
        diffusion, latents = teacher_of(), rand(3, 4, 4, 4)
        flow_map, times = map_of(diffusion), torch.tensor([100.0, 600.0, 1000.0])
        expected = diffusion.unet(latents, times)
        for span in (0.0, 100.0):
            assert torch.equal(flow_map(latents, torch.stack([times, torch.full((3,), span)], dim=1)), expected)
        nn.init.normal_(flow_map.unet.span_layers[-1].weight)
        first, second = (flow_map(latents, torch.stack([times, torch.full((3,), span)], dim=1)) for span in (0.0, 100.0))
        assert (first - second).abs().mean() > 0.01


class TestSpans:
    @every_kind
    def test_rows_of_no_span_are_those_of_the_teacher(self, parameterization, basis, curves):
        diffusion, steps = teacher_of(parameterization, basis, curves), torch.arange(STEPS + 1)
        torch.testing.assert_close(diffusion.spans().rows(steps, steps), diffusion.head_rows(steps), rtol=1e-12, atol=1e-12)

    def test_zero_heads_transport_a_gaussian_as_finely_as_the_grid_goes(self):
        """z_s - m_s = (tot_s / tot_t) (z_t - m_t), but for sums over the grid in the place of integrals: an error like 1 / N."""
        errors = []
        for num_steps in (100, 200, 400):
            diffusion = gaussian(num_steps, lambda t: torch.cos(1.4 * t), lambda t: torch.sin(3 * t))
            spans = diffusion.spans()
            starts, ends = (torch.tensor(each) * num_steps // 10 for each in ([8, 8, 5, 9], [0, 5, 1, 8]))
            found = moved_by_zero_heads(diffusion, starts, ends, spans.mean[starts] + spans.total[starts])
            errors.append(((found - spans.mean[ends]) / spans.total[ends] - 1).abs().amax(1))
        assert errors[-1].max() < 1 / num_steps
        for rough, fine in itertools.pairwise(errors):
            torch.testing.assert_close(fine / rough, torch.full((4,), 0.5, dtype=torch.float64), rtol=0.05, atol=0)

    def test_where_the_encoding_stands_still_the_error_is_one_of_the_second_order(self):
        errors = []
        for num_steps in (100, 200, 400):
            spans = (diffusion := gaussian(num_steps, torch.ones_like)).spans()
            starts, ends = torch.tensor([num_steps]), torch.tensor([0])
            found = moved_by_zero_heads(diffusion, starts, ends, spans.total[starts])
            errors.append(float((found / spans.total[ends] - 1).abs().max()))
        for rough, fine in itertools.pairwise(errors):
            assert fine / rough == pytest.approx(0.25, rel=0.02)

    def test_a_new_process_is_noticed(self):
        diffusion, ends = teacher_of(), (torch.tensor([STEPS]), torch.tensor([0]))
        before = diffusion.spans().rows(*ends)
        assert diffusion.spans() is diffusion.spans()
        tables = diffusion.latent_mean, 2 * diffusion.latent_deviation, diffusion.velocity_rms
        diffusion.set_process(diffusion.sigmas, *tables)
        assert not torch.allclose(diffusion.spans().rows(*ends), before)

    def test_literal_heads_have_none(self):
        with pytest.raises(ValueError, match='"literal" has not'):
            build("literal").spans()


class TestSpanTargets:
    """What a network learns over spans of any walk, put back, is that walk."""

    @every_kind
    def test_put_back_they_give_the_later_latent(self, parameterization, basis, curves):
        diffusion, (starts, ends) = teacher_of(parameterization, basis, curves), spans_drawn(12)
        latents, later, noise_moved = (rand(13, 4, 4, 4, seed=seed) for seed in (1, 2, 3))
        targets = diffusion.span_targets(Spanned(starts, ends, latents, later, noise_moved))
        heads = torch.cat([diffusion.pixels(head) for head in targets.outputs], dim=1)
        for each, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            rows, seen = diffusion.spans().sampler_rows([(start, end, end)]), []

            def network(read, times, each=each, seen=seen):
                seen.extend([read, times])
                return heads[each : each + 1]

            found = sample(
                lambda *at, network=network: diffusion.predict_span(network, *at),
                rows, latents[each : each + 1], torch.tensor([0]), basis=diffusion.cosines,
            )  # fmt: skip
            torch.testing.assert_close(found, later[each : each + 1], rtol=1e-5, atol=3e-5)
            torch.testing.assert_close(seen[0], targets.network_input[each : each + 1])
            assert seen[1].tolist() == [[start * 1000 / STEPS, (start - end) * 1000 / STEPS]]

    @every_kind
    def test_counts_say_how_the_error_of_each_head_moves_the_end(self, parameterization, basis, curves):
        diffusion, (starts, ends) = teacher_of(parameterization, basis, curves), spans_drawn(5)
        latents = rand(6, 4, 4, 4)
        targets = diffusion.span_targets(Spanned(starts, ends, latents, latents, rand(6, 4, 4, 4, seed=1)))
        row = ops.TwoHeadRow(*(diffusion.shaped(each.float()) for each in diffusion.spans().rows(starts, ends).unbind(-1)))
        moved = diffusion.shaped((diffusion.spans().sigma[ends] - diffusion.spans().sigma[starts]).float())
        stride, (v, u) = (starts - ends).view(-1, 1, 1, 1), targets.outputs

        def end(first, second):
            noise_prediction, delta = row.predictions(diffusion.coefficients(latents), first, second)
            return moved * noise_prediction + stride * delta

        by_each = torch.stack([end(v + 1, u) - end(v, u), end(v, u + 1) - end(v, u)])
        expected = by_each / by_each.norm(dim=0)
        torch.testing.assert_close(torch.stack([each.expand_as(v) for each in targets.counts]), expected, rtol=0, atol=2e-3)

    @every_kind
    def test_of_no_span_they_are_the_heads_of_the_teacher(self, parameterization, basis, curves):
        diffusion, latents = teacher_of(parameterization, basis, curves), rand(3, 4, 4, 4)
        starts, ends = torch.tensor([20, 30, STEPS]), torch.tensor([20, 10, STEPS])
        found = diffusion.span_targets(Spanned(starts, ends, latents, latents, torch.zeros_like(latents))).outputs
        for head, expected in zip(found, diffusion.heads(latents, starts), strict=True):
            torch.testing.assert_close(head[[0, 2]], expected[[0, 2]])
            assert head.isfinite().all() and not torch.allclose(head[1], expected[1], atol=1e-2)


class TestConditionalSpans:
    PAIRS = torch.combinations(torch.arange(STEPS + 1), 2).flip(1)  # every span of the chain

    @pytest.mark.parametrize("deviation", [0.3, 1.0])
    def test_a_zero_head_transports_a_gaussian_exactly(self, deviation):
        """r_s = (tot_s / tot_t) r_t, over spans where an error of the noise would move r_s by more than the blend."""
        spans, (starts, ends) = ConditionalSpans(chain_of(), deviation), self.PAIRS.T
        _, from_latent = spans.factors(starts, ends)
        kept = spans.signal[ends] / spans.signal[starts]
        by_noise = spans.noise[ends] - kept * spans.noise[starts]
        found = kept + by_noise * from_latent
        far = by_noise.abs() >= BLEND * spans.total[ends]
        torch.testing.assert_close(found[far], (spans.total[ends] / spans.total[starts])[far], rtol=1e-12, atol=0)
        assert 0.5 < far.float().mean() < 1

    def test_a_head_of_the_gaussian_over_a_short_span_is_of_unit_size(self):
        """Between noise prediction and v: of Gaussian r_t the head has no more than size 1, and is never divided by nothing."""
        spans, (starts, ends) = ConditionalSpans(chain_of(), 0.5), self.PAIRS.T
        from_output, from_latent = spans.factors(starts, ends)
        kept = spans.signal[ends] / spans.signal[starts]
        by_noise = spans.noise[ends] - kept * spans.noise[starts]
        exact = (spans.total[ends] / spans.total[starts] - kept) / by_noise  # of the latent, in the noise prediction
        assert ((exact - from_latent) * spans.total[starts] <= from_output * (1 + 1e-9)).all() and (from_output > 0).all()

    @pytest.mark.parametrize("deviation", [0.15, 1.0])
    def test_an_error_of_the_head_moves_the_end_by_its_size_at_most(self, deviation):
        """Times the turn and the blend, also from noise, which has next to nothing of the signal that is to come."""
        spans, (starts, ends) = ConditionalSpans(chain_of(), deviation), self.PAIRS.T
        by_noise = spans.noise[ends] - spans.signal[ends] / spans.signal[starts] * spans.noise[starts]
        moved = by_noise.abs() * spans.factors(starts, ends)[0] / spans.total[ends]
        assert (moved <= spans.turn[starts] - spans.turn[ends] + BLEND).all()
        assert (by_noise.abs() / spans.total[ends]).max() > 10  # what an error of the noise would have done

    def test_heads_over_spans_of_walks_are_of_unit_size(self):
        """Whatever the velocity is where a walk stands: here 20 at the noise and 1 at the data, as of a teacher that clips."""
        indices = torch.arange(STEPS, -1, -1)
        spans, pace = ConditionalSpans(chain_of(), 0.15), torch.linspace(math.log(20), 0, STEPS).double().exp()
        moves = (pace * spans.turn[indices].diff()).view(-1, 1, 1, 1, 1) * rand(1, 8, 3, 4, 4).double()
        ways = torch.nn.functional.pad(moves.cumsum(0), (0, 0, 0, 0, 0, 0, 0, 0, 1, 0))
        latents = spans.total[indices].view(-1, 1, 1, 1, 1) * ways
        velocities = spans.velocities(indices, latents, 9)
        assert velocities[0] < 1.5 and 12 < velocities[-1] < 25
        taught = ConditionalSpans(spans.diffusion, 0.15, 0.0, velocities)
        starts, ends = self.PAIRS.T
        here, there = (latents[STEPS - each, 0].float() for each in (starts, ends))
        heads = taught.span_targets(Spanned(starts, ends, here, there, None, torch.zeros_like(here))).outputs[0]
        sizes = heads[starts - ends > 3].square().mean((1, 2, 3)).sqrt()
        assert sizes.min() > 0.4 and sizes.max() < 2

    @every_form
    def test_targets_put_back_give_the_later_latent(self, form):
        spans, (starts, ends) = ConditionalSpans(chain_of(form), 0.7, 0.0, (0.9, 2.0, 9.0)), spans_drawn(12)
        latents, later, reconstruction = (0.2 * rand(13, 3, 4, 4, seed=seed) for seed in (1, 2, 3))
        targets = spans.span_targets(Spanned(starts, ends, latents, later, None, reconstruction))
        for each, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            one, seen = slice(each, each + 1), []

            def network(read, times, one=one, seen=seen):
                seen.extend([read, times])
                return targets.outputs[0][one]

            predict = spans.predictor(network, reconstruction[one])
            found = sample(predict, spans.sampler_rows([(start, end, end)]), latents[one], torch.tensor([0]))
            torch.testing.assert_close(found, later[one], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(seen[0], targets.network_input[one])
            assert seen[1].tolist() == [[start - 1, start - end]]

    @pytest.mark.parametrize("guidance", [0.0, 1.5])
    @every_form
    def test_of_no_span_they_are_the_noise_of_the_teacher(self, form, guidance):
        diffusion = chain_of(form)
        latents, reconstruction, starts = rand(3, 3, 4, 4), rand(3, 3, 4, 4, seed=1).tanh(), torch.tensor([1, 20, STEPS])
        unmoved = Spanned(starts, starts, latents, latents, None, reconstruction)
        targets = ConditionalSpans(diffusion, guidance=guidance).span_targets(unmoved)
        expected, _ = zip(
            *(diffusion.predictor(reconstruction, guidance=guidance)(latents, at) for at in (0, 19, 49)), strict=True
        )
        torch.testing.assert_close(targets.outputs[0], torch.stack([each[i] for i, each in enumerate(expected)]))

    @every_form
    def test_images_are_clipped_where_a_span_ends_there(self, form):
        diffusion = chain_of(form)
        latents, reconstruction = 5 * rand(2, 3, 4, 4), rand(2, 3, 4, 4, seed=1).tanh()
        predict = ConditionalSpans(diffusion).predictor(lambda read, times: torch.zeros(2, 3, 4, 4), reconstruction)
        for end, clipped in ((-1, True), (10, False)):
            image = diffusion.process.image(predict(latents, 40, end)[1], reconstruction)
            assert (float(image.abs().max()) <= 1 + 1e-6) == clipped


class TestRows:
    @every_kind
    def test_a_span_moves_by_both_heads(self, parameterization, basis, curves):
        """z_s = z_t + (sigma_s - sigma_t) e + (t - s) d where no noise is added; d is of each grid step."""
        diffusion = teacher_of(parameterization, basis, curves)
        spans, rows = diffusion.spans(), diffusion.spans().sampler_rows([(50, 30, 30), (30, 0, 0)])
        named = rows.named
        assert rows.steps.tolist() == [50, 30] and rows.ends.tolist() == [30, 0]
        assert (named.latent == 1).all() and not named.fresh_noise.any() and not named.offset.any()
        assert [each.unique().tolist() for each in named.delta] == [[20], [30]]
        torch.testing.assert_close(named.noise_prediction, spans.sigma[[30, 0]] - spans.sigma[[50, 30]])

    def test_no_path_is_no_row(self):
        rows = teacher_of(basis="cosine").spans().sampler_rows([])
        assert len(rows) == 0 and rows.coefficients.shape == (0, 64, 7) and rows.ends.tolist() == []

    def test_noise_comes_back_in_full_where_the_encoding_stands_still(self):
        """The exact map of a Gaussian, then noise: of variance F^2 + sigma_s^2; and f is left where the span would be at `to`."""
        spans = gaussian(STEPS, torch.ones_like).spans()
        for here, low, to in ((50, 30, 40), (40, 0, 20), (30, 30, 30)):
            named, moved = spans.sampler_rows([(here, low, to)]).named, spans.sigma[low] - spans.sigma[here]
            exact = torch.where(moved < 0, (spans.total[low] - spans.total[here]) / moved, 0)
            variance = (spans.total[here] + named.noise_prediction * exact) ** 2 + named.fresh_noise**2
            torch.testing.assert_close(variance[0], spans.total[to] ** 2, rtol=1e-6, atol=0)
            assert named.delta.unique().tolist() == [here - to] and (named.latent == 1).all()

    @pytest.mark.parametrize("deviation", [0.3, 1.0])
    def test_the_second_system_takes_a_latent_up_its_own_chain(self, deviation):
        """r_s = (signal_s / signal_low) r_low + c xi has the variance of r_s, and its signal."""
        spans = ConditionalSpans(chain_of(), deviation)
        for here, low, to in ((50, 30, 40), (40, 0, 20), (30, 30, 30)):
            named = spans.sampler_rows([(here, low, to)]).named
            signal, noise = named.delta, named.noise_prediction  # of the latent, as they weigh r_0 and the noise
            assert float(signal) == pytest.approx(float(spans.signal[to]))
            variance = signal**2 * deviation**2 + noise**2 + named.fresh_noise**2
            assert float(variance) == pytest.approx(float(spans.total[to] ** 2))
            assert bool(named.fresh_noise > 0) == (low < to) and float(named.latent) == 0

    def test_steps_of_the_second_system_are_indices_of_the_chain(self):
        rows = ConditionalSpans(chain_of()).sampler_rows([(50, 20, 30), (30, 0, 0)])
        assert rows.steps.tolist() == [49, 29] and rows.ends.tolist() == [19, -1]
