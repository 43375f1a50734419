"""Every class of model answers to the same verbs, with the same arguments in the same order."""

import inspect
import math

import pytest
import torch

from multibeta.pipelines import PIPELINES, BaselineVAE, DenoisingMultiBetaVAE, DiffusionVAE, Pipeline

MODELS = ("model", "refiner", "baseline")
VERBS = (
    "levels",
    "sampling_options",
    "encode",
    "decode",
    "draw_latents",
    "render",
    "manipulate",
    "interpolate",
    "principal_directions",
    "attribute_direction",
    "from_pretrained",
    "save_pretrained",
    "to",
)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return rand(count, 3, 16, 16, seed=seed).clamp(-1, 1)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.fixture(params=MODELS)
def each(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def level(each):
    return each.levels()[0]


@pytest.fixture
def few(each):
    """Options of a short reverse process."""
    return each.sampling_options(steps=3) if each.denoises else {}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("pipeline", PIPELINES.values())
def test_verbs_take_the_same_arguments_in_the_same_order(pipeline, verb):
    def order(owner):
        return [(name, parameter.kind) for name, parameter in inspect.signature(getattr(owner, verb)).parameters.items()]

    assert order(pipeline) == order(Pipeline)


def test_generate_takes_what_it_always_took():
    names = ["self", "num_images", "sampler", "steps", "seed", "batch_size", "output_type", "callback"]
    for pipeline in (DenoisingMultiBetaVAE, DiffusionVAE):
        assert list(inspect.signature(pipeline.generate).parameters)[:8] == names
    names = [name for name in names if name not in ("sampler", "steps")]
    assert list(inspect.signature(BaselineVAE.generate).parameters)[:6] == names


def test_levels(model, refiner, baseline):
    assert model.levels() == (0.1, 0.3, 0.5, 0.7, 0.9)
    assert model.levels([0.2, 1]) == (0.2, 1) and model.levels(default=[0.7]) == (0.7,)
    for wrong, message in (
        ([], "at least one beta"),
        ([0.5, 1.2], r"in \[0, 1\], got 1.2"),
        ([math.nan], r"in \[0, 1\], got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            model.levels(wrong)
    for single in (refiner, baseline):
        assert single.levels() == single.levels(default=[0.7]) == (None,)
        with pytest.raises(
            ValueError, match=rf"a {type(single).__name__} has one representation and takes no betas, got \[0.5\]"
        ):
            single.levels([0.5])


def test_sampling_options(model, refiner, baseline):
    assert model.sampling_options() == {"sampler": "ode2", "steps": 20}
    assert refiner.sampling_options() == {"sampler": "ddim", "steps": 50}  # as many as there are
    assert refiner.sampling_options("ddpm", 3) == {"sampler": "ddpm", "steps": 3}
    assert baseline.sampling_options() == {} and not baseline.denoises
    for one, asked, message in (
        (model, {"sampler": "ddim"}, "sampler of a DenoisingMultiBetaVAE must be one of resample, .*, got 'ddim'"),
        (refiner, {"sampler": "ode2"}, "sampler of a DiffusionVAE must be one of ddpm, ddim, got 'ode2'"),
        (refiner, {"steps": 51}, "steps must lie between 1 and 50, the steps of the grid, got 51"),
        (model, {"steps": 0}, "between 1 and 50, .* got 0"),
        (model, {"steps": 2.0}, "steps must be an integer, got 2.0"),
        (refiner, {"steps": True}, "steps must be an integer, got True"),
        (baseline, {"steps": 2}, "a BaselineVAE decodes at once and takes no steps$"),
        (baseline, {"sampler": "ode", "steps": 2}, "takes no sampler or steps$"),
    ):
        with pytest.raises(ValueError, match=message):
            one.sampling_options(**asked)


def test_rendering_without_denoising_is_decoding(each, level):
    latents = each.encode(images(2), level, seeds=[1, 2])
    assert torch.equal(each.render(latents, level, denoise=False), each.decode(latents, level))
    with pytest.raises(ValueError, match="decoding at once takes no steps"):
        each.render(latents, level, denoise=False, steps=3)


def test_rendering_denoises_before_or_after_decoding(model, refiner, baseline):
    latents, seeds = model.encode(images(2), 0.7), [5, 6]
    expected = model.decode(model.denoise(latents, 0.7, "ancestral", 3, seeds))
    assert torch.equal(model.render(latents, 0.7, denoise=True, seeds=seeds, sampler="ancestral", steps=3), expected)
    latents = refiner.encode(images(2))
    expected = refiner.denoise(refiner.decode(latents), "ddpm", 3, seeds)
    assert torch.equal(refiner.render(latents, denoise=True, seeds=seeds, sampler="ddpm", steps=3), expected)
    with pytest.raises(ValueError, match="a BaselineVAE decodes at once and does not denoise"):
        baseline.render(baseline.encode(images(2)), denoise=True)


def test_generated_images_begin_with_drawn_latents(each, few):
    drawn = each.draw_latents([3, 4])
    assert drawn.shape == (2, *each.vae.config.latent_shape) and torch.equal(each.draw_latents([4]), drawn[1:])
    made = each.generate(5, seed=3, **few)
    assert made.shape == (5, 3, 16, 16)
    batches = list(each.generate_batches(5, seed=3, batch_size=2, **few))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    close(torch.cat(batches), made)


def test_a_choice_of_images_is_made_of_them_alone(each, few):
    made = each.generate(6, seed=3, **few)
    batches = list(each.generate_batches(6, seed=3, batch_size=2, indices=[5, 1, 2], **few))
    assert [len(batch) for batch in batches] == [2, 1]
    close(torch.cat(batches), made[[5, 1, 2]])
    assert list(each.generate_batches(6, indices=[], **few)) == []
    for wrong in ([6], [-1], [[0]], [0.5], [True]):
        with pytest.raises(ValueError, match="indices must be a sequence of integers from 0 to 5"):
            each.generate_batches(6, indices=wrong, **few)


def test_noise_that_images_share_is_that_of_the_first_in_any_choice(refiner):
    options = {"sampler": "ddpm", "steps": 3, "shared_noise": True}
    (chosen,) = refiner.generate_batches(3, indices=[2], **options)
    close(chosen, refiner.generate(3, **options)[2:])


def test_the_usual_sampling_is_used_where_none_is_named(model, refiner):
    for one in (model, refiner):
        usual = one.sampling_options()
        assert torch.equal(one.generate(1), one.generate(1, **usual))
        assert torch.equal(one.generate(1, None, None, 0), one.generate(1, usual["sampler"], usual["steps"]))


def test_a_baseline_takes_its_seed_second(baseline):
    assert torch.equal(baseline.generate(3, 7, 2), baseline.generate(3, seed=7, batch_size=2))
    with pytest.raises(ValueError, match="a BaselineVAE decodes at once and takes no sampler or steps"):
        baseline.generate(1, sampler="ode", steps=3)


def test_no_strength_renders_the_encoding(each, level, few):
    direction = each.principal_directions(images(8), level, 2).directions[0]
    assert direction.shape == each.vae.config.latent_shape
    expected = each.render(each.encode(images(2), level), level, denoise=each.denoises, **few)
    close(each.manipulate(images(2), direction, 0.0, level, **few), expected)
    moved = each.manipulate(images(2), direction, 5.0, level, **few)
    assert not torch.allclose(moved, expected, atol=1e-3)
    close(each.manipulate(each.encode(images(2), level), direction, 5.0, level, **few), moved)


def test_directions_come_from_the_encodings(each, level):
    encoded = each.encode(images(9), level)
    for given in (images(9), encoded):
        directions = each.principal_directions(given, level, 3)
        close(directions.mean, encoded.mean(0))
        close(each.attribute_direction(given[:4], given[4:], level), encoded[:4].mean(0) - encoded[4:].mean(0))
    with pytest.raises(ValueError, match="both sides, got 9 with and 0 without"):
        each.attribute_direction(images(9), images(0), level)


def test_no_images_are_no_paths(each, level, few):
    none = images(0)
    assert each.interpolate(none, none, 0.5, level, **few).shape == (0, 3, 16, 16)
    assert each.interpolate(none, none, [0.2, 0.5], level, **few).shape == (0, 2, 3, 16, 16)


def test_generate_refuses_what_it_does_not_know(each):
    for make in (each.generate, lambda *args, **options: next(each.generate_batches(*args, **options))):
        with pytest.raises(TypeError, match="tempo"):
            make(1, tempo=2)


@pytest.mark.parametrize("how", ["lerp", "slerp", None])
def test_a_path_leads_from_one_encoding_to_the_other(each, level, few, how):
    first, second, seeds = images(2), images(2, seed=1), [8, 9]
    path = each.interpolate(first, second, [0.0, 0.5, 1.0], level, how=how, seeds=seeds, **few)
    assert path.shape == (2, 3, 3, 16, 16)
    given = {"seeds": seeds} if each.denoises else {}
    for index, end in ((0, first), (2, second)):
        expected = each.render(each.encode(end, level), level, denoise=each.denoises, **given, **few)
        close(path[:, index], expected)
    close(each.interpolate(first, second, 0.5, level, how=how, seeds=seeds, **few), path[:, 1])


def test_dims_are_the_part_of_a_latent_that_changes(each, level, few):
    first, second = (each.encode(images(1, seed), level) for seed in (0, 1))
    still = each.interpolate(first, second, [0.0, 1.0], level, [], **few)
    close(still[:, 0], still[:, 1])
    mixed = first.clone()
    mixed[:, [1, 3]] = second[:, [1, 3]]
    end = each.interpolate(first, second, 1.0, level, dims=[1, 3], **few)
    close(end, each.interpolate(mixed, mixed, 0.0, level, **few))
    with pytest.raises(ValueError, match=r"dims must lie between 0 and \d, got \[99\]"):
        each.interpolate(first, second, 1.0, level, [99], **few)


def test_the_name_of_a_path_is_no_beta(each):
    with pytest.raises(ValueError, match="how= names a path, one of lerp, slerp, got 'lerp' as beta"):
        each.interpolate(images(1), images(1), 0.5, "lerp")


def test_images_win_where_latents_have_their_shape(model, monkeypatch):
    assert model._are_latents(rand(2, 4, 8, 8)) and not model._are_latents(images(2))
    monkeypatch.setattr(type(model.vae.config), "latent_shape", (3, 16, 16))
    assert not model._are_latents(images(2))
