"""The second system on trained models."""

from dataclasses import replace

import pytest
import torch

import multibeta
from multibeta.diffusion_vae import ConditionalDiffusion
from multibeta.latents import LatentMixture
from multibeta.pipelines import (
    BaselineVAE,
    DenoisingMultiBetaVAE,
    DiffusionVAE,
    load_pretrained,
)

STEPS = 50


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return rand(count, 3, 16, 16, seed=seed).clamp(-1, 1)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=["form1", "form2", "eq7"])
def any_form(request, make_refiner):
    return make_refiner(form=request.param)


class TestDiffusionVAE:
    """The verbs of the second system."""

    @pytest.mark.parametrize("walk", [{}, {"sampler": "ddpm"}, {"eta": 0.5, "guidance": 0.3, "shared_noise": True}])
    def test_a_generated_image_depends_on_its_seed_and_index_alone(self, any_form, walk):
        expected = any_form.generate(5, steps=5, seed=3, **walk)
        assert expected.shape == (5, 3, 16, 16) and expected.abs().max() <= 1
        close(any_form.generate(5, steps=5, seed=3, batch_size=2, **walk), expected)
        close(any_form.generate(2, steps=5, seed=3, **walk), expected[:2])
        assert not torch.allclose(any_form.generate(2, steps=5, seed=4, **walk), expected[:2], atol=1e-2)

    @pytest.mark.parametrize("walk", [{}, {"sampler": "ddpm"}, {"guidance": 0.5}])
    def test_the_engine_makes_the_images_of_the_plain_loop(self, any_form, walk):
        found = any_form.generate(3, steps=5, seed=3, **walk)
        with multibeta.backend("reference"):
            close(found, any_form.generate(3, steps=5, seed=3, **walk))

    def test_generating_is_drawing_decoding_and_denoising(self, any_form):
        seeds = multibeta.ops.sample_seeds(3, torch.arange(4))
        expected = any_form.denoise(any_form.decode(any_form.draw_latents(seeds)), "ddpm", 5, seeds)
        close(any_form.generate(4, "ddpm", 5, seed=3), expected)

    def test_callback_counts_over_all_batches(self, refiner):
        seen = []
        refiner.generate(5, steps=3, batch_size=2, callback=lambda done, total, latent: seen.append((done, total, len(latent))))
        assert [news[:2] for news in seen] == [(done, 9) for done in range(1, 10)]
        assert [news[2] for news in seen] == [2] * 6 + [1] * 3

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_the_callback_of_diffusers_sees_model_step_and_latents(self, refiner, backend):
        seen = []
        with multibeta.backend(backend):
            refiner.generate(
                3, "ddpm", 5, spacing="uniform", batch_size=2, callback_on_step_end=lambda *news: seen.append(news) or news[-1]
            )
        assert [(index, int(step)) for _, index, step, _ in seen] == 2 * list(enumerate((40, 30, 20, 10, 0)))
        assert [given["latents"].shape[0] for *_, given in seen] == [2] * 5 + [1] * 5

    def test_output_types(self, refiner):
        assert refiner.generate(2, steps=2, output_type="np").shape == (2, 16, 16, 3)
        assert [picture.size for picture in refiner.generate(2, steps=2, output_type="pil")] == [(16, 16)] * 2

    def test_encodes_to_the_mean_or_to_a_sample_of_the_seed(self, refiner):
        x = images(4)
        posterior = refiner.vae.posterior(x)
        assert torch.equal(refiner.encode(x), posterior.mean)
        noise = (refiner.encode(x, seeds=[7, 7, 8, 9]) - posterior.mean) / posterior.stddev
        torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-3)
        assert (noise[0] - noise[2]).abs().mean() > 0.3

    def test_images_made_anew_do_not_depend_on_their_batch(self, any_form):
        x, seeds = images(4), [5, 6, 7, 8]
        for verb in (any_form.refine, any_form.reconstruct):
            together = verb(x, seeds, sampler="ddpm", steps=5)
            close(verb(x[2:3], seeds[2:3], sampler="ddpm", steps=5), together[2:3])

    def test_a_reconstruction_starts_from_a_trace_of_the_image(self, any_form):
        x, trace = images(3), float(any_form.diffusion.process.alpha_bars[-1].sqrt())
        seen, x_hat = {}, any_form.decode(any_form.encode(x, seeds=[0, 1, 2]))
        for verb in ("refine", "reconstruct"):
            any_form._reverse = lambda rows, initial, *rest, verb=verb, **_: seen.update({verb: initial}) or initial
            try:
                getattr(any_form, verb)(x, steps=5)
            finally:
                del any_form._reverse
        noise, initial = seen["refine"], seen["reconstruct"]
        residual = any_form.diffusion.process.residual(x, x_hat)
        torch.testing.assert_close(initial, trace * residual + (1 - trace**2) ** 0.5 * noise)

    def test_one_seed_shares_all_noise(self, any_form):
        x_hat = any_form.decode(any_form.encode(images(3)))
        walk = {"sampler": "ddpm", "steps": 5}
        shared = any_form.denoise(x_hat, seeds=[4, 5, 6], shared_noise=True, **walk)
        close(shared, any_form.denoise(x_hat, seeds=[4, 4, 4], **walk))
        alike = any_form.denoise(x_hat[:1].repeat(3, 1, 1, 1), shared_noise=True, **walk)
        close(alike, alike[:1].expand_as(alike))

    def test_temperature_scales_the_initial_noise(self, refiner):
        x_hat, noise = refiner.decode(refiner.encode(images(2))), rand(2, 3, 16, 16)
        warm, cold = (refiner.denoise(x_hat, steps=5, noise=scale * noise) for scale in (1, 0.5))
        close(refiner.denoise(x_hat, steps=5, noise=noise, temperature=0.5), cold)
        assert not torch.allclose(warm, cold, atol=1e-2)

    def test_an_unconditional_model_does_not_see_the_reconstruction(self, make_refiner):
        model, seeds = make_refiner(conditional=False), [1, 2, 3]
        first, second = (model.decode(model.encode(images(3, seed))) for seed in (0, 1))
        assert torch.equal(model.denoise(first, steps=5, seeds=seeds), model.denoise(second, steps=5, seeds=seeds))

    @pytest.mark.parametrize("how", ["lerp", "slerp"])
    @pytest.mark.parametrize("walk", [{}, {"sampler": "ddpm", "shared_noise": True}])
    def test_interpolation_ends_are_the_ends(self, any_form, how, walk):
        first, second, seeds = images(2), images(2, seed=1), [8, 9]
        path = any_form.interpolate(first, second, [0.0, 0.3, 1.0], how=how, seeds=seeds, steps=5, **walk)
        assert path.shape == (2, 3, 3, 16, 16)
        for index, end in ((0, first), (2, second)):
            x_hat = any_form.decode(any_form.encode(end))
            close(path[:, index], any_form.denoise(x_hat, seeds=seeds, steps=5, **walk))
        close(any_form.interpolate(first, second, 0.3, how=how, seeds=seeds, steps=5, **walk), path[:, 1])
        latents = any_form.encode(first), any_form.encode(second)
        close(any_form.interpolate(*latents, [0.0, 0.3, 1.0], how=how, seeds=seeds, steps=5, **walk), path)

    @pytest.mark.parametrize("how", ["lerp", "slerp"])
    def test_interpolation_of_the_noise_ends_at_the_ends(self, any_form, how):
        x, ends = images(2), ([8, 9], [10, 11])
        path = any_form.interpolate_noise(x, *ends, [0.0, 0.5, 1.0], how, steps=5)
        x_hat = any_form.decode(any_form.encode(x))
        for index, seeds in ((0, ends[0]), (2, ends[1])):
            close(path[:, index], any_form.denoise(x_hat, seeds=seeds, steps=5))
        close(any_form.interpolate_noise(x, *ends, 0.5, how, steps=5), path[:, 1])
        close(any_form.interpolate_noise(x, ends[0], ends[0], 0.5, how, steps=5), path[:, 0])

    def test_shared_noise_makes_neighbours_alike(self, refiner):
        """Fig. 7. The network is fixed, so that of the two walks only the noise differs."""
        first, second = images(4), images(4, seed=1)
        distances = []
        for shared in (True, False):
            path = refiner.interpolate(
                first, second, torch.linspace(0, 1, 6).tolist(), sampler="ddpm", steps=25, spacing="uniform", shared_noise=shared
            )
            distances.append(path.diff(dim=1).abs().mean())
        assert distances[0] < 0.5 * distances[1]

    def test_moving_along_a_direction(self, refiner):
        x, other = images(2), images(3, seed=1)
        direction = refiner.attribute_direction(other, x)
        assert direction.shape == (6, 1, 1)
        close(direction, refiner.encode(other).mean(0) - refiner.encode(x).mean(0))
        close(refiner.attribute_direction(x, x), torch.zeros(6, 1, 1))
        still = refiner.manipulate(x, direction, 0.0, steps=5)
        close(still, refiner.denoise(refiner.decode(refiner.encode(x)), steps=5))
        moved = refiner.manipulate(x, direction, 30.0, steps=5)
        close(moved, refiner.denoise(refiner.decode(refiner.encode(x) + 30 * direction), steps=5))
        close(refiner.manipulate(refiner.encode(x), direction, 30.0, steps=5), moved)
        assert not torch.allclose(moved, still, atol=1e-2)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda model: model.encode(images(1), 0.0), "one representation and takes no beta, got 0.0"),
            (lambda model: model.encode(torch.zeros(1, 3, 32, 32)), r"shape \(N, 3, 16, 16\), got \(1, 3, 32, 32\)"),
            (lambda model: model.decode(torch.zeros(1, 4, 1, 1)), r"shape \(N, \*\(6, 1, 1\)\), got \(1, 4, 1, 1\)"),
            (lambda model: model.denoise(2 * torch.ones(1, 3, 16, 16)), r"floats in \[-1, 1\], got torch.float32 from 2"),
            (lambda model: model.denoise(images(2), steps=5, seeds=[1]), "one seed per sample is needed"),
            (lambda model: model.generate(1, "ode2"), "ddpm, ddim, got 'ode2'"),
            (lambda model: model.generate(1, steps=STEPS + 1), "between 1 and 50, the steps of the grid, got 51"),
            (lambda model: model.generate(0), "must be positive, got 0 and 64"),
            (lambda model: model.interpolate(images(2), images(1), 0.5), "pairs must have one shape"),
            (lambda model: model.interpolate(images(1), images(1), 0.5, how="cubic"), "lerp, slerp, got 'cubic'"),
            (lambda model: model.interpolate(images(1), images(1), 0.5, "slerp"), "lerp, slerp, got 'slerp' as beta"),
            (lambda model: model.attribute_direction(images(3), images(0)), "both sides, got 3 with and 0 without"),
            (lambda model: model.fit_latents(images(3), 4), "between 1 and the 3 encodings, got 4"),
        ],
    )
    def test_errors_say_what_is_possible(self, refiner, call, message):
        with pytest.raises(ValueError, match=message):
            call(refiner)

    def test_stages_that_do_not_fit(self, refiner):
        for name, value in {"resolution": 8, "image_channels": 1}.items():
            diffusion, own = ConditionalDiffusion(replace(refiner.diffusion.config, **{name: value})), refiner.vae.config
            with pytest.raises(ValueError, match=f"VAE and diffusion do not fit: {name} is {getattr(own, name)} and {value}"):
                DiffusionVAE(refiner.vae, diffusion)

    def test_a_mixture_over_other_latents(self, refiner):
        other = LatentMixture(torch.ones(1), torch.zeros(1, 4, 1, 1), torch.ones(1, 4))
        with pytest.raises(ValueError, match=r"VAE and mixture do not fit: .* \(6, 1, 1\) and \(4, 1, 1\)"):
            DiffusionVAE(refiner.vae, refiner.diffusion, mixture=other)


class TestLatentsOfDiffusionVAE:
    def test_are_of_the_prior(self, refiner):
        drawn = refiner.draw_latents(range(2000))
        assert drawn.shape == (2000, 6, 1, 1)
        assert abs(drawn.mean()) < 0.03 and drawn.std().item() == pytest.approx(1, abs=0.02)
        assert torch.equal(refiner.draw_latents([7]), drawn[7:8])

    @pytest.mark.parametrize("covariance_type", ["diag", "full"])
    def test_or_of_a_mixture_fitted_to_encodings(self, make_refiner, covariance_type):
        model, x = make_refiner(), images(400)
        before = model.generate(3, steps=5)
        model.fit_latents(x, 2, covariance_type)
        drawn, encoded = model.draw_latents(range(4000)), model.encode(x, seeds=multibeta.ops.sample_seeds(0, torch.arange(400)))
        torch.testing.assert_close(drawn.mean(0), encoded.mean(0), rtol=0, atol=0.1)
        torch.testing.assert_close(drawn.std(0), encoded.std(0), rtol=0.06, atol=0)
        assert torch.equal(model.draw_latents([7]), drawn[7:8])
        after = model.generate(3, steps=5)
        assert not torch.allclose(after, before, atol=1e-2)
        close(model.generate(3, steps=5, batch_size=1), after)

    def test_batches_are_fitted_as_one_set(self, make_refiner):
        model, x = make_refiner(), images(40)
        drawn = []
        for given in (x, x.split(7)):
            model.fit_latents(given, 2)
            drawn.append(model.draw_latents(range(5)))
        close(*drawn)


class TestSavingDiffusionVAE:
    @pytest.mark.parametrize("mixture", [False, True])
    def test_a_loaded_model_is_the_saved_one(self, make_refiner, tmp_path, mixture):
        model = make_refiner(form="eq7")
        if mixture:
            model.fit_latents(images(40), 2)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "mixture.safetensors").exists() == mixture
        loaded = load_pretrained(tmp_path)
        assert isinstance(loaded, DiffusionVAE) and loaded.info == {"recipe": "none"}
        assert (loaded.vae.config, loaded.diffusion.config) == (model.vae.config, model.diffusion.config)
        with multibeta.backend("reference"):  # two engines may measure, and so round, differently
            assert torch.equal(loaded.generate(3, "ddpm", 5), model.generate(3, "ddpm", 5))

    def test_half_precision_refines_in_float32(self, make_refiner, tmp_path):
        model = make_refiner()
        model.fit_latents(images(40), 2)
        model.save_pretrained(tmp_path)
        half = DiffusionVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.dtype == half.diffusion.unet.conv_out.weight.dtype == torch.bfloat16
        generated = half.generate(2, steps=5)
        assert generated.dtype == half.encode(images(1)).dtype == torch.float32 and generated.isfinite().all()

    def test_classes_refuse_the_folders_of_others(self, model, baseline, refiner, tmp_path):
        for saved in (model, baseline, refiner):
            saved.save_pretrained(tmp_path)
            for kind in {DenoisingMultiBetaVAE, BaselineVAE, DiffusionVAE} - {type(saved)}:
                with pytest.raises(ValueError, match=f"holds a {type(saved).__name__}, not a {kind.__name__}"):
                    kind.from_pretrained(tmp_path)
