"""The flow map of both systems: its teacher's trajectories, the verbs in one to four evaluations, saving."""

import copy
import itertools
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import multibeta
from multibeta.flow_map import FlowMap
from multibeta.nonlinear_diffusion import NonlinearDiffusion, walk_rows
from multibeta.pipelines import DenoisingMultiBetaVAE, load_pretrained, resolve_pretrained
from multibeta.sampling import EngineOptions

STEPS = 50
BOTH = ("map", "map_noise")
CHOSEN = {"paths": ((20,),), "noise_paths": ((20, 30),)}  # of two evaluations
TABLES = ("sigmas", "latent_mean", "latent_deviation", "velocity_rms")
every_walk = pytest.mark.parametrize(("sampler", "steps"), list(itertools.product(BOTH, (1, 2, 4))))


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return rand(count, 3, 16, 16, seed=seed).clamp(-1, 1)


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def awake(module):
    """None of its layers is zero, so that it listens to times and spans."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def mapped(model, **others):
    """A copy of a model that computes in float32, with a flow map."""
    diffusion = copy.deepcopy(model.diffusion)
    awake(diffusion)
    flow_map = FlowMap.of(diffusion.unet, diffusion.config, STEPS, span_channels=16, **(CHOSEN | others))
    awake(flow_map)
    return type(model)(model.vae, diffusion, {}, engine_options=EngineOptions(dtype=torch.float32), flow_map=flow_map)


@pytest.fixture(scope="module")
def walker(model):
    return mapped(model)


@pytest.fixture(scope="module")
def one_headed(refiner):
    return mapped(refiner, deviation=0.5)


@pytest.fixture(scope="module", params=["walker", "one_headed"])
def either(request):
    return request.getfixturevalue(request.param)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestTrajectories:
    SEEDS = torch.tensor([5, 2**40, 7])

    def test_are_walks_of_the_teacher(self, walker):
        """Each latent leads to the next by the rows of "ode2", and noise and deltas add up to all that it moved."""
        found, diffusion = walker.trajectories(self.SEEDS, generator(), 6), walker.diffusion
        indices = found.steps.tolist()
        assert indices[0] == STEPS and indices[-1] == 0 and len(indices) == len(found.latents) == len(found.noise_moves)
        torch.testing.assert_close(found.latents[0], walker.draw_latents(self.SEEDS))
        assert not found.noise_moves[0].any() and found.condition is None
        rows = walk_rows(diffusion.sigmas, "ode2", indices).named
        predictions = [diffusion.predict(latent, step) for latent, step in zip(found.latents, indices[:-1], strict=False)]
        before = (torch.zeros_like(found.latents[0]),) * 2
        for k, now in enumerate(predictions):
            noise, delta = (
                float(weight[k]) * now[head] + float(old[k]) * before[head]
                for head, (weight, old) in enumerate(
                    ((rows.noise_prediction, rows.previous_noise_prediction), (rows.delta, rows.previous_delta))
                )
            )
            close(found.noise_moves[k + 1] - found.noise_moves[k], noise)
            close(found.latents[k + 1] - found.latents[k], noise + delta)
            before = now

    @pytest.mark.parametrize("guidance", [0.0, 0.5])
    def test_are_walks_of_the_teacher_of_the_second_system(self, one_headed, guidance):
        found = one_headed.trajectories(self.SEEDS, generator(), 6, guidance=guidance)
        indices, condition = found.steps.tolist(), one_headed.decode(one_headed.draw_latents(self.SEEDS))
        assert indices[0] == STEPS and indices[-1] == 0 and len(found.latents) == len(indices) and found.noise_moves is None
        torch.testing.assert_close(found.condition, condition)
        alpha_bars = torch.cat([torch.ones(1).double(), one_headed.diffusion.process.alpha_bars])
        predict = one_headed.diffusion.predictor(condition, guidance=guidance)
        for k, (step, following) in enumerate(itertools.pairwise(indices)):
            noise, clean = predict(found.latents[k], step - 1)
            expected = alpha_bars[following].sqrt().float() * clean + (1 - alpha_bars[following]).sqrt().float() * noise
            close(found.latents[k + 1], expected)

    def test_the_engine_walks_as_the_plain_loop(self, either):
        found = either.trajectories(self.SEEDS, generator(), 6)
        with multibeta.backend("reference"):
            expected = either.trajectories(self.SEEDS, generator(), 6)
        assert torch.equal(found.steps, expected.steps)
        close(found.latents, expected.latents)
        if found.noise_moves is not None:
            close(found.noise_moves, expected.noise_moves)

    def test_belong_to_their_seeds(self, either):
        together = either.trajectories(self.SEEDS, generator(), 6)
        alone = either.trajectories(self.SEEDS[1:2], generator(), 6)
        close(alone.latents[:, 0], together.latents[:, 1])
        assert not torch.equal(either.trajectories(self.SEEDS, generator(1), 6).steps, together.steps)


class TestVerbs:
    def verbs(self, either, **walk):
        """What each verb makes by a sampler."""
        x, other = images(2), images(2, seed=1)
        beta = (0.6,) if isinstance(either, DenoisingMultiBetaVAE) else ()
        direction = rand(*either.vae.config.latent_shape)
        yield either.generate(3, seed=3, **walk)
        yield either.render(either.encode(x, *beta), *beta, denoise=True, seeds=[8, 9], **walk)
        yield either.manipulate(x, direction, 0.5, *beta, **walk)
        yield either.interpolate(x, other, [0.0, 0.5, 1.0], *beta, **walk)

    @every_walk
    def test_the_engine_makes_the_images_of_the_plain_loop(self, either, sampler, steps):
        found = list(self.verbs(either, sampler=sampler, steps=steps))
        with multibeta.backend("reference"):
            for image, expected in zip(found, self.verbs(either, sampler=sampler, steps=steps), strict=True):
                assert expected.abs().max() <= 1 and expected.std() > 0.01
                close(image, expected)

    @every_walk
    def test_an_image_depends_on_its_seed_and_index_alone(self, either, sampler, steps):
        expected = either.generate(3, sampler, steps, seed=3)
        close(either.generate(3, sampler, steps, seed=3, batch_size=2), expected)

    def test_evaluations_are_as_many_as_were_asked_for(self, either):
        for sampler, steps in itertools.product(BOTH, (1, 2, 4)):
            seen = []
            either.generate(2, sampler, steps, callback=lambda done, total, latent, seen=seen: seen.append((done, total)))
            assert seen == [(done, steps) for done in range(1, steps + 1)]

    def test_noise_is_drawn_by_one_of_them_alone(self, either):
        x = images(2)
        latents = (
            (either.encode(x, 1.0), 1.0) if isinstance(either, DenoisingMultiBetaVAE) else (either.decode(either.encode(x)),)
        )
        start = {} if isinstance(either, DenoisingMultiBetaVAE) else {"noise": rand(2, 3, 16, 16)}
        for sampler, steps in itertools.product(BOTH, (1, 2, 4)):
            first, same, second = (either.denoise(*latents, sampler, steps, seeds, **start) for seeds in ([0, 1], None, [5, 6]))
            assert torch.equal(first, same)
            assert torch.allclose(first, second, atol=1e-4) == (sampler == "map" or steps == 1)

    @pytest.mark.parametrize("sampler", BOTH)
    def test_more_evaluations_than_paths_were_chosen_for(self, either, sampler):
        assert either.generate(1, sampler, STEPS).isfinite().all()
        with pytest.raises(ValueError, match="between 1 and 50"):
            either.generate(1, sampler, STEPS + 1)

    def test_a_chosen_path_is_taken(self, walker):
        seen = []
        walker.generate(1, "map_noise", 2, callback_on_step_end=lambda *news: seen.append(int(news[2])) or news[-1])
        walker.generate(1, "map", 2, callback_on_step_end=lambda *news: seen.append(int(news[2])) or news[-1])
        assert seen == [50, 30, 50, 20]

    def test_one_evaluation_is_the_map_itself(self, walker):
        latents, diffusion = rand(2, 4, 8, 8), walker.diffusion
        noise, delta = diffusion.predict_span(walker.flow_map, latents, STEPS, 0)
        expected = latents + (diffusion.sigmas[0] - diffusion.sigmas[STEPS]) * noise + STEPS * delta
        close(walker.denoise(latents, 1.0, "map", 1), expected)

    def test_one_evaluation_is_the_map_itself_of_the_second_system(self, one_headed):
        x_hat, noise = one_headed.decode(one_headed.encode(images(2))), rand(2, 3, 16, 16)
        spans = one_headed.span_teacher(one_headed.flow_map.config)
        assert spans.deviation == 0.5
        image = spans.predictor(one_headed.flow_map, x_hat)(noise, STEPS - 1, -1)[1]
        close(one_headed.denoise(x_hat, "map", 1, noise=noise), one_headed.diffusion.process.image(image, x_hat))


class TestDenoise:
    @pytest.mark.parametrize("sampler", BOTH)
    def test_at_beta_zero_it_is_the_identity(self, walker, sampler):
        latents = rand(2, 4, 8, 8)
        for backend in ("auto", "reference"):
            with multibeta.backend(backend):
                assert torch.equal(walker.denoise(latents, 0.0, sampler, 2), latents)

    @pytest.mark.parametrize(("sampler", "expected"), [("map", [30, 12]), ("map_noise", [30, 18])])
    def test_from_a_middle_beta_the_path_begins_there(self, walker, sampler, expected):
        seen = []
        walker.denoise(
            rand(1, 4, 8, 8), 0.6, sampler, 2, callback_on_step_end=lambda *news: seen.append(int(news[2])) or news[-1]
        )
        assert seen == expected

    def test_close_to_zero_it_takes_the_steps_there_are(self, walker):
        seen = []
        walker.denoise(rand(1, 4, 8, 8), 0.04, "map", 4, callback=lambda done, total, latent: seen.append(total))
        assert seen == [2, 2]

    def test_two_halves_are_the_walk(self, walker, monkeypatch):
        """The map stands where its teacher does: what leaves a span enters the next."""
        latents, seen = rand(2, 4, 8, 8), []
        monkeypatch.setattr(walker.flow_map, "config", replace(walker.flow_map.config, paths=()))  # equal steps
        whole = walker.denoise(latents, 1.0, "map", 5, callback=lambda done, total, latent: seen.append(latent.clone()))
        close(walker.denoise(seen[0], 0.8, "map", 4), whole)


class TestErrors:
    @pytest.mark.parametrize("sampler", BOTH)
    def test_without_a_map_they_say_how_to_get_one(self, model, refiner, sampler):
        calls = (
            lambda: model.generate(1, sampler, 1),
            lambda: model.denoise(rand(1, 4, 8, 8), 0.5, sampler, 1),
            lambda: model.manipulate(images(1), rand(4, 8, 8), 1.0, 0.5, sampler=sampler, steps=1),
            lambda: model.sampling_options(sampler, 1),
            lambda: refiner.generate(1, sampler, 1),
            lambda: refiner.denoise(images(1), sampler, 1),
            lambda: refiner.refine(images(1), sampler=sampler, steps=1),
        )
        for call in calls:
            with pytest.raises(
                ValueError, match="need a flow map, which this model has not: `multibeta distill MODEL --out FOLDER`"
            ):
                call()

    def test_what_a_map_cannot(self, walker, one_headed):
        for sampler in BOTH:
            with pytest.raises(ValueError, match=f"one of ode, ode2, heun, which walk up too, got '{sampler}'"):
                walker.invert(rand(1, 4, 8, 8), sampler, 2)
            with pytest.raises(ValueError, match="no delta to subtract: delta_sign must be 1, got -1"):
                walker.generate(1, sampler, 2, delta_sign=-1)
            for guidance in (0.5, -1.0):
                with pytest.raises(ValueError, match=f"under guidance=0 and takes no other, got {guidance}"):
                    one_headed.generate(1, sampler, 2, guidance=guidance)

    def test_a_map_under_guidance_takes_that_alone(self, refiner):
        guided = mapped(refiner, guidance=0.5)
        assert torch.equal(guided.generate(2, "map", 2, guidance=0.5), guided.generate(2, "map", 2))
        with pytest.raises(ValueError, match=r"under guidance=0\.5 and takes no other, got 0\.3"):
            guided.generate(1, "map", 2, guidance=0.3)

    @pytest.mark.parametrize("changed", [{"in_channels": 5}, {"out_channels": 5}, {"resolution": 4}, {"num_steps": 20}])
    def test_a_map_of_another_shape(self, either, changed):
        ((name, value),), config = changed.items(), either.flow_map.config
        with torch.device("meta"):
            other = FlowMap(replace(config, paths=(), noise_paths=(), **changed))
        with pytest.raises(ValueError, match=f"diffusion and flow map do not fit: {name} is {getattr(config, name)} and {value}"):
            either.flow_map = other
        assert either.flow_map.config == config

    def test_what_is_no_map_and_who_takes_none(self, walker, latent):
        with pytest.raises(TypeError, match="got a UNet as flow_map"):
            walker.flow_map = walker.diffusion.unet
        with pytest.raises(TypeError, match="a LatentDiffusion takes no flow map"):
            latent.flow_map = walker.flow_map

    def test_any_network_may_have_a_map(self, walker):
        """A map needs of its teacher no more than the process."""
        foreign = NonlinearDiffusion(walker.diffusion.config, unet=nn.Identity())
        foreign.set_process(*(getattr(walker.diffusion, name) for name in TABLES))
        options = {"engine_options": walker.engine.options, "flow_map": walker.flow_map}
        close(DenoisingMultiBetaVAE(walker.vae, foreign, **options).generate(2, "map", 2), walker.generate(2, "map", 2))


class TestSaving:
    def test_a_loaded_model_has_the_map(self, either, tmp_path):
        either.save_pretrained(tmp_path)
        assert "flow_map.safetensors" in (tmp_path / "README.md").read_text()
        loaded = load_pretrained(tmp_path)
        assert loaded.flow_map.config == either.flow_map.config and loaded.samplers == either.samplers
        with multibeta.backend("reference"):
            for sampler in BOTH:
                assert torch.equal(loaded.generate(2, sampler, 2), either.generate(2, sampler, 2))

    def test_a_model_without_one_still_loads(self, either, tmp_path):
        plain = type(either)(either.vae, either.diffusion)
        assert plain.flow_map is None and not set(BOTH) & set(plain.samplers)
        plain.save_pretrained(tmp_path)
        assert not (tmp_path / "flow_map.safetensors").exists() and load_pretrained(tmp_path).flow_map is None

    def test_is_read_back_in_its_dtype(self, either, tmp_path):
        mixed = copy.deepcopy(either)
        mixed.flow_map.to(torch.bfloat16)
        mixed.save_pretrained(tmp_path)
        loaded = load_pretrained(tmp_path)
        assert loaded.flow_map.unet.conv_out.weight.dtype == torch.bfloat16
        assert loaded.diffusion.unet.conv_out.weight.dtype == torch.float32
        with multibeta.backend("reference"):
            assert torch.equal(loaded.generate(2, "map", 2), mixed.generate(2, "map", 2))

    def test_moves_and_counts_with_the_model(self, either):
        own, plain = copy.deepcopy(either), type(either)(either.vae, either.diffusion)
        weights = sum(parameter.numel() for parameter in either.flow_map.parameters())
        counts = [int(re.search(r"([\d,]+) parameters", repr(each))[1].replace(",", "")) for each in (own, plain)]
        assert counts[0] - counts[1] == weights
        own.to(torch.bfloat16)
        assert own.flow_map.unet.conv_out.weight.dtype == torch.bfloat16 and "bfloat16 on cpu" in repr(own)
        found = own.generate(2, "map", 2)
        assert found.dtype == torch.float32 and found.isfinite().all()

    def test_can_be_taken_and_given_back(self, either):
        own, expected = copy.deepcopy(either), either.generate(2, "map", 2)
        kept, own.flow_map = own.flow_map, None
        assert not set(BOTH) & set(own.samplers)
        with pytest.raises(ValueError, match="need a flow map"):
            own.generate(2, "map", 2)
        own.flow_map = kept
        close(own.generate(2, "map", 2), expected)
        assert not any(parameter.requires_grad for parameter in own.flow_map.parameters())

    def test_new_weights_are_noticed(self, either):
        own = copy.deepcopy(either)
        before = own.generate(2, "map", 1)
        own.flow_map.unet.conv_out.bias.add_(0.3)
        found = own.generate(2, "map", 1)
        assert (found - before).abs().mean() > 1e-3
        with multibeta.backend("reference"):
            close(found, own.generate(2, "map", 1))


def test_a_wrong_sampler_is_told_of_those_of_the_map(either):
    with pytest.raises(ValueError, match=r"must be one of .*, map, map_noise, got 'mapp'"):
        either.generate(1, sampler="mapp", steps=2)


@pytest.fixture(scope="module")
def scenes32():
    return load_pretrained("scenes32")


@pytest.fixture(scope="module")
def noise():
    return rand(48, 4, 8, 8)


class TestTheShippedModel:
    """`scenes32`, whose map was trained on walks of the model itself, and rounded to float16."""

    def test_is_less_than_fifteen_megabytes(self):
        assert sum(file.stat().st_size for file in resolve_pretrained("scenes32").iterdir()) < 15e6

    @pytest.mark.parametrize("middle", [250, 500, 750])
    def test_two_spans_are_one(self, scenes32, noise, middle, monkeypatch):
        """X(X(z, 1, t), t, 0) = X(z, 1, 0), the property that makes it a flow: to a twentieth of the variance."""
        monkeypatch.setattr(scenes32.flow_map, "config", replace(scenes32.flow_map.config, paths=((middle,),)))
        one, two = (scenes32.denoise(noise, beta=1.0, sampler="map", steps=steps) for steps in (1, 2))
        assert (two - one).square().mean() < 0.05 * one.var()

    def test_one_evaluation_ends_near_where_the_walk_does(self, scenes32, noise):
        walked, other = (scenes32.denoise(z, beta=1.0, sampler="ode2", steps=50) for z in (noise, noise.flip(0)))
        one = scenes32.denoise(noise, beta=1.0, sampler="map", steps=1)
        near, far = ((one - each).square().mean() for each in (walked, other))
        assert near < 0.1 * far

    def test_both_samplers_have_chosen_paths(self, scenes32):
        assert len(scenes32.flow_map.config.paths) == len(scenes32.flow_map.config.noise_paths) == 3


def test_a_network_that_takes_the_place_of_the_maps_is_followed(model):
    shape = {"span_channels": 8}
    model.flow_map = FlowMap.of(model.diffusion.unet, model.diffusion.config, model.num_steps, **shape)
    try:
        before = model.generate(1, sampler="map", steps=1)
        other = FlowMap.of(model.diffusion.unet, model.diffusion.config, model.num_steps, **shape).unet
        torch.nn.init.normal_(other.conv_out.weight, std=0.5)
        model.flow_map.unet = other.eval().requires_grad_(False)
        assert not torch.equal(model.generate(1, sampler="map", steps=1), before)
    finally:
        model.flow_map = None
