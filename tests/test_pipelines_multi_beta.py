"""The first system on trained models."""

import copy
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.autograd import forward_ad

import multibeta
from multibeta import checkpoints
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.nonlinear_diffusion import SAMPLERS, NonlinearDiffusion
from multibeta.pipelines import (
    DenoisingMultiBetaVAE,
    load_pretrained,
)

STEPS = 50


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return rand(count, 3, 16, 16, seed=seed).clamp(-1, 1)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


class TestGenerate:
    @pytest.mark.parametrize("sampler", ["ode2", "ancestral"])
    def test_an_image_depends_on_its_seed_and_index_alone(self, model, sampler):
        expected = model.generate(8, sampler, 5, seed=3, batch_size=8)
        assert expected.shape == (8, 3, 16, 16) and expected.abs().max() <= 1
        for batch_size in (1, 3):
            found = model.generate(8, sampler, 5, seed=3, batch_size=batch_size)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.generate(3, sampler, 5, seed=3), expected[:3], rtol=0, atol=1e-5)

    def test_seeds_and_indices_give_different_images(self, model):
        first, second = (model.generate(3, steps=5, seed=seed).flatten(1) for seed in (0, 1))
        distances = torch.cdist(torch.cat([first, second]), torch.cat([first, second])) + 10 * torch.eye(6)
        assert distances.min() > 0.05

    def test_output_types(self, model):
        tensor, array, pictures = (model.generate(2, steps=2, output_type=kind) for kind in ("pt", "np", "pil"))
        assert isinstance(array, np.ndarray) and array.dtype == np.float32 and array.shape == (2, 16, 16, 3)
        np.testing.assert_allclose(array, (tensor.permute(0, 2, 3, 1).numpy() + 1) / 2, atol=1e-6)
        assert [(type(picture), picture.size, picture.mode) for picture in pictures] == [(Image.Image, (16, 16), "RGB")] * 2
        assert np.abs(np.asarray(pictures[1]) / 255 - array[1]).max() <= 0.5 / 255 + 1e-6

    def test_callback_counts_over_all_batches(self, model):
        seen = []
        model.generate(5, "heun", 3, batch_size=2, callback=lambda done, total, latent: seen.append((done, total, len(latent))))
        assert [news[:2] for news in seen] == [(done, 15) for done in range(1, 16)]
        assert [news[2] for news in seen] == [2] * 10 + [1] * 5

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_the_callback_of_diffusers_sees_model_step_and_latents(self, model, backend):
        seen, counted = [], []

        def on_step_end(pipeline, index, timestep, given):
            seen.append((pipeline, index, int(timestep), given["latents"]))
            return given

        with multibeta.backend(backend):
            expected = model.generate(3, "ode", 5, batch_size=2)
            found = model.generate(
                3, "ode", 5, batch_size=2, callback=lambda *news: counted.append(news), callback_on_step_end=on_step_end
            )
        assert torch.equal(found, expected)
        assert [news[1:3] for news in seen] == 2 * list(enumerate((50, 40, 30, 20, 10)))
        assert all(pipeline is model for pipeline, *_ in seen) and len(counted) == 10
        close(model.decode(seen[4][3]), expected[:2])  # what was kept is not overwritten

    def test_changed_latents_are_honoured_by_the_plain_loop_and_refused_by_the_engine(self, model):
        def replace_last(pipeline, index, timestep, given):
            return {"latents": torch.zeros_like(given["latents"])} if index == 4 else given

        def write_last(pipeline, index, timestep, given):
            given["latents"].mul_(0 if index == 4 else 1)
            return given

        for change in (replace_last, write_last):
            with pytest.raises(ValueError, match=r"the engine does not take: with multibeta\.backend\("):
                model.generate(2, "ode", 5, callback_on_step_end=change)
            with multibeta.backend("reference"):
                found = model.generate(2, "ode", 5, callback_on_step_end=change)
                close(found, model.decode(torch.zeros(2, 4, 8, 8)))
        with multibeta.backend("reference"), pytest.raises(ValueError, match=r"keep the shape \(2, 4, 8, 8\), got \(1,"):
            model.generate(2, "ode", 5, callback_on_step_end=lambda *news: {"latents": torch.zeros(1, 4, 8, 8)})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_images": 1, "seed": 1, "generator": torch.Generator()}, "a seed or a generator, not both: got seed=1"),
            ({"num_images": 1, "steps": STEPS + 1}, "between 1 and 50 .*got 51"),
            ({"num_images": 1, "sampler": "ddim"}, "got 'ddim'"),
            ({"num_images": 1, "output_type": "jpg"}, "pt, np, pil, got 'jpg'"),
            ({"num_images": 0}, "must be positive, got 0 and 64"),
            ({"num_images": 1, "batch_size": 0}, "must be positive, got 1 and 0"),
        ],
    )
    def test_errors_say_what_is_possible(self, model, arguments, message):
        with pytest.raises(ValueError, match=message):
            model.generate(**arguments)


class TestEncode:
    def test_without_seeds_it_is_the_mean(self, model):
        x = images(3)
        assert torch.equal(model.encode(x, 0.4), model.vae.encode(x, 0.4))

    def test_noise_belongs_to_the_seed_of_the_sample(self, model):
        x, seeds = images(4), [7, 7, 2**40, -1]
        together = model.encode(x, 0.4, seeds=seeds)
        torch.testing.assert_close(model.encode(x[2:3], 0.4, seeds=seeds[2:3]), together[2:3], rtol=0, atol=1e-5)
        noise = (together - model.encode(x, 0.4)) / model.vae.sigma(torch.tensor([0.4]))
        torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-3)
        assert (noise[0] - noise[2]).abs().mean() > 0.5

    def test_noise_has_the_deviation_sigma(self, model):
        x = images(1).expand(64, -1, -1, -1)
        for beta in (0.2, 1.0):
            noise = model.encode(x, beta, seeds=range(64)) - model.encode(x, beta)
            expected = float(model.vae.sigma(torch.tensor(beta)))
            assert noise.std().item() == pytest.approx(expected, rel=0.03)

    @pytest.mark.parametrize("beta", [1.3, -0.1, math.nan])
    def test_beta_outside_the_unit_interval(self, model, beta):
        for call in (model.encode, lambda x, b: model.denoise(torch.zeros(1, 4, 8, 8), b)):
            with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got"):
                call(images(1), beta)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (torch.zeros(1, 3, 16, 16, dtype=torch.int16), r"floats in \[-1, 1\], got torch.int16 .*uint8, from 0 to 255"),
            (255 * torch.ones(1, 3, 16, 16), r"floats in \[-1, 1\], got torch.float32 from 255"),
            (torch.zeros(1, 3, 32, 32), r"shape \(N, 3, 16, 16\), got \(1, 3, 32, 32\)"),
            (torch.zeros(3, 16, 16), r"shape \(N, 3, 16, 16\), got \(3, 16, 16\)"),
            (torch.zeros(1, 16, 16, 3), r"shape \(N, 3, 16, 16\), got \(1, 16, 16, 3\)"),
        ],
    )
    def test_images_of_another_kind(self, model, wrong, message):
        with pytest.raises(ValueError, match=message):
            model.encode(wrong, 0.5)

    def test_one_seed_per_image(self, model):
        with pytest.raises(ValueError, match="one seed per sample is needed"):
            model.encode(images(3), 0.5, seeds=[1, 2])


class TestDecode:
    def test_stays_in_the_range_of_images(self, model):
        decoded = model.decode(100 * rand(2, 4, 8, 8))
        assert decoded.shape == (2, 3, 16, 16) and decoded.abs().max() <= 1

    def test_latents_of_another_shape(self, model):
        with pytest.raises(ValueError, match=r"shape \(N, \*\(4, 8, 8\)\), got \(2, 4, 4, 4\)"):
            model.decode(torch.zeros(2, 4, 4, 4))


class TestDenoise:
    def evaluations(self, model, *arguments):
        seen = []
        model.denoise(rand(2, 4, 8, 8), *arguments, callback=lambda done, total, latent: seen.append(total))
        return len(seen)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_at_beta_zero_it_is_the_identity(self, model, sampler):
        latents = rand(2, 4, 8, 8)
        assert torch.equal(model.denoise(latents, 0.0, sampler), latents)

    def test_close_to_zero_it_takes_the_steps_there_are(self, model):
        assert self.evaluations(model, 0.04, "ode", 50) == 2
        assert self.evaluations(model, 0.001, "ode", 50) == 0
        assert self.evaluations(model, 0.5, "ode", 50) == 25
        assert self.evaluations(model, 0.5, "ode", 7) == 7

    def test_more_steps_than_the_grid_has(self, model):
        with pytest.raises(ValueError, match="between 1 and 50, the steps of the grid, got 51"):
            model.denoise(rand(1, 4, 8, 8), 0.5, steps=51)

    def test_seeds_steer_the_ancestral_noise(self, model):
        latents = rand(2, 4, 8, 8)
        default, same, other = (model.denoise(latents, 0.5, "ancestral", 10, seeds) for seeds in (None, [0, 1], [5, 6]))
        assert torch.equal(default, same) and not torch.allclose(default, other)

    def test_inverse_of_the_ode(self, model):
        latents = rand(2, 4, 8, 8)
        noise = model.invert(latents, steps=STEPS)
        error = (model.denoise(noise, 1.0, "ode2", STEPS) - latents).abs().mean()
        assert error < 0.1 * (noise - latents).abs().mean()


class TestEdit:
    def test_no_strength_is_a_reconstruction(self, model):
        x, direction = images(2), rand(4, 8, 8)
        expected = model.decode(model.denoise(model.encode(x, 0.5), 0.5, "ode2", 10))
        assert torch.equal(model.manipulate(x, direction, 0.0, 0.5, steps=10), expected)

    def test_is_denoised_as_usual(self, model):
        x, direction = images(2), rand(4, 8, 8)
        usual = {"sampler": "ode2", "steps": 20}
        for verb in (
            lambda **sampling: model.manipulate(x, direction, 1.0, 0.5, **sampling),
            lambda **sampling: model.interpolate(x[:1], x[1:], 0.5, 0.5, **sampling),
            lambda **sampling: model.render(model.encode(x, 0.5), 0.5, denoise=True, **sampling),
        ):
            assert torch.equal(verb(), verb(**usual)) and not torch.equal(verb(), verb(sampler="ode", steps=3))

    def test_strength_moves_the_image(self, model):
        x, direction = images(2), rand(4, 8, 8)
        still, little, far = (model.manipulate(x, direction, strength, 0.5, steps=5) for strength in (0.0, 0.1, 1.0))
        assert 0 < (little - still).abs().mean() < (far - still).abs().mean()

    def test_directions_come_from_the_encodings(self, model):
        found = model.principal_directions(images(300), 0.5, 3)
        assert found.directions.shape == (3, 4, 8, 8)
        torch.testing.assert_close(found.mean, model.encode(images(300), 0.5).mean(0), rtol=0, atol=1e-5)

    def test_interpolation_ends_at_the_reconstructions(self, model):
        first, second, direction = images(2), images(2, seed=1), torch.zeros(4, 8, 8)
        path = model.interpolate(first, second, [0.0, 0.5, 1.0], 0.4, steps=10)
        assert path.shape == (2, 3, 3, 16, 16)
        for index, end in ((0, first), (2, second)):
            expected = model.manipulate(end, direction, 0.0, 0.4, steps=10)
            torch.testing.assert_close(path[:, index], expected, rtol=0, atol=1e-4)
        middle = model.interpolate(first, second, 0.5, 0.4, steps=10)
        torch.testing.assert_close(path[:, 1], middle, rtol=0, atol=1e-4)

    def test_interpolating_no_channel_stays_at_the_first(self, model):
        first, second = images(1), images(1, seed=1)
        path = model.interpolate(first, second, [0.0, 1.0], 0.4, dims=[], steps=5)
        torch.testing.assert_close(path[:, 0], path[:, 1], rtol=0, atol=1e-5)

    def test_pairs_of_other_shapes(self, model):
        with pytest.raises(ValueError, match="pairs must have one shape"):
            model.interpolate(images(2), images(1), 0.5, 0.5)


def test_stages_that_do_not_fit(model):
    of_vae, of_diffusion = model.vae.config, model.diffusion.config
    other = replace(of_diffusion, latent_resolution=4)
    with pytest.raises(ValueError, match=r"do not fit: the shape of latents is \(4, 8, 8\) and \(4, 4, 4\)"):
        DenoisingMultiBetaVAE(MultiBetaVAE(of_vae), NonlinearDiffusion(other))
    for name, value in {"num_steps": 20, "schedule": "sinusoidal", "sigma_per_channel": True}.items():
        message = f"VAE and diffusion do not fit: {name} is {getattr(of_vae, name)} and {value}"
        with pytest.raises(ValueError, match=message):
            DenoisingMultiBetaVAE(MultiBetaVAE(of_vae), NonlinearDiffusion(replace(of_diffusion, **{name: value})))


def test_parts_whose_sigmas_differ_are_joined_with_a_word(caplog, model):
    DenoisingMultiBetaVAE(model.vae, model.diffusion)
    assert not caplog.records
    DenoisingMultiBetaVAE(model.vae, NonlinearDiffusion(model.diffusion.config))
    assert re.search(r"sigma of VAE and diffusion differ by up to 0\.\d+: NonlinearDiffusion\.set_process", caplog.text)


@pytest.mark.parametrize(("name", "value"), [("schedule", "sinusoidal"), ("num_steps", 20)])
def test_a_saved_model_whose_parts_do_not_fit_is_refused(model, tmp_path, name, value):
    of_diffusion = model.diffusion.config
    parts = {"vae": replace(model.vae.config, **{name: value}), "diffusion": of_diffusion}
    weights = {"vae": MultiBetaVAE(parts["vae"]).state_dict(), "diffusion": model.diffusion.state_dict()}
    config = {"class": "DenoisingMultiBetaVAE", **{part: asdict(shape) for part, shape in parts.items()}}
    checkpoints.save_folder(tmp_path / "model", weights, config)
    with pytest.raises(ValueError, match=f"do not fit: {name} is {value} and {getattr(of_diffusion, name)}"):
        load_pretrained(tmp_path / "model")


class TestWhatACopyWouldNotFollow:
    """Derivatives, hooks and tracing take the plain loop and the decoder itself."""

    def walk(self, model, latents):
        return model.denoise(latents, 0.7, sampler="ode", steps=3)

    def test_derivatives(self, model):
        latents, direction = torch.randn(2, 2, *model.vae.config.latent_shape)
        for function in (lambda z: self.walk(model, z), lambda z: model.decode(z, 0.5)):
            function(latents)  # prepared
            _, tangent = torch.func.jvp(function, (latents,), (direction,))
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(function(forward_ad.make_dual(latents, direction))).tangent
            with multibeta.backend("reference"):
                difference = (function(latents + 0.01 * direction) - function(latents - 0.01 * direction)) / 0.02
            for found in (tangent, dual):
                assert (found - difference).norm() < 0.05 * difference.norm()

    def test_hooks(self, model):
        latents, calls = torch.randn(1, *model.vae.config.latent_shape), []
        part = model.diffusion.unet.middle[0]
        hook = part.register_forward_hook(lambda *_: calls.append(1))
        try:
            self.walk(model, latents)
        finally:
            hook.remove()
        assert len(calls) == 3
        self.walk(model, latents)
        assert len(calls) == 3

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    @pytest.mark.parametrize("accelerated", [False, True])
    @pytest.mark.parametrize("make", ["model", "baseline", "refiner"])
    def test_quantised_parts(self, make, accelerated, request):
        model = copy.deepcopy(request.getfixturevalue(make))
        walk = {"steps": 3} if hasattr(model, "diffusion") else {}
        plain = model.generate(2, **walk)
        for name in model.parts:
            part = getattr(model, name)
            part = multibeta.accelerate(part) if accelerated else part
            setattr(model, name, torch.ao.quantization.quantize_dynamic(part, {nn.Linear}))
        found = model.generate(2, **walk)
        with multibeta.backend("reference"):
            expected = model.generate(2, **walk)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        assert not torch.equal(found, plain)

    def test_another_decoder(self, model):
        model, latents = copy.deepcopy(model), torch.randn(1, *model.vae.config.latent_shape)
        before = model.decode(latents, 0.5)
        model.vae.decoder = torch.compile(copy.deepcopy(model.vae.decoder), backend="eager")
        torch.testing.assert_close(model.decode(latents, 0.5), before, rtol=1e-3, atol=1e-3)
        model.vae.decoder.conv_out.bias.data.add_(0.5)
        with multibeta.backend("reference"):
            expected = model.decode(latents, 0.5)
        torch.testing.assert_close(model.decode(latents, 0.5), expected, rtol=1e-3, atol=1e-3)
        assert (expected - before).abs().max() > 0.4

    def test_a_compiled_decode(self, model):
        latents = torch.randn(1, *model.vae.config.latent_shape)
        decode = torch.compile(lambda z: model.decode(z, 0.5), backend="eager")
        with multibeta.backend("reference"):
            expected = model.decode(latents, 0.5)
        torch.testing.assert_close(decode(latents), expected, rtol=1e-3, atol=1e-3)

    def test_latents_that_are_no_real_numbers(self, model):
        latents = torch.ones(1, *model.vae.config.latent_shape)
        for dtype in (torch.int64, torch.complex64):
            with pytest.raises(ValueError, match=f"latents must be of floating point, got {dtype}"):
                self.walk(model, latents.to(dtype))
            with pytest.raises(ValueError, match=f"latents must be of floating point, got {dtype}"):
                model.decode(latents.to(dtype))

    def test_seeds_that_are_no_integers(self, model):
        latents = torch.ones(2, *model.vae.config.latent_shape)
        with pytest.raises(ValueError, match=r"a seed must be an integer .*got 0\.5"):
            model.denoise(latents, 0.7, steps=2, seeds=[0.5, 1.5])

    def test_no_images_are_none(self, model):
        assert model.decode(torch.empty(0, *model.vae.config.latent_shape)).shape[0] == 0
        images = torch.empty(0, model.vae.config.image_channels, *[model.vae.config.resolution] * 2)
        assert model.encode(images, 0.5).shape == (0, *model.vae.config.latent_shape)
