"""Plain latent diffusion as a model: new images from noise, and an autoencoder at beta = 0."""

import dataclasses

import pytest
import torch

import multibeta
from multibeta import data
from multibeta.evaluation import evaluate
from multibeta.gaussian_diffusion import GaussianDiffusion
from multibeta.pipelines import LatentDiffusion, load_pretrained


def images(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def test_its_autoencoder_is_the_lossless_end_of_the_vae(latent, model):
    assert torch.equal(latent.encode(images(2)), model.encode(images(2), 0.0))
    assert torch.equal(latent.encode(images(2), seeds=[3, 4]), model.encode(images(2), 0.0, seeds=[3, 4]))
    latents = latent.encode(images(2))
    torch.testing.assert_close(latent.decode(latents), model.decode(latents, 0.0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"a LatentDiffusion has one representation and takes no beta, got 0\.5"):
        latent.encode(images(2), 0.5)
    assert latent.levels() == (None,)


def test_generates_by_either_sampler(latent):
    assert latent.sampling_options() == {"sampler": "ddim", "steps": 40}  # as many as there are
    made = {sampler: latent.generate(3, sampler, 4, seed=5) for sampler in latent.samplers}
    assert made["ddim"].shape == (3, 3, 16, 16) and not torch.equal(made["ddim"], made["ddpm"])
    drawn = latent.draw_latents(multibeta.ops.sample_seeds(5, torch.arange(3)))
    torch.testing.assert_close(latent.decode(latent.denoise(drawn, steps=4)), made["ddim"], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="sampler must be one of ddim, ddpm, got 'ode2'"):
        latent.generate(1, "ode2")


def test_an_image_does_not_depend_on_its_batch(latent):
    with multibeta.backend("reference"):
        together, apart = latent.generate(3, "ddpm", 3), latent.generate(3, "ddpm", 3, batch_size=1)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)


def test_edits_move_the_latent_and_decode_it(latent):
    encoded = latent.encode(images(2))
    direction = torch.ones(latent.vae.config.latent_shape)
    assert torch.equal(latent.manipulate(images(2), direction, 0.5), latent.decode(encoded + 0.5 * direction))
    path = latent.interpolate(images(1), images(1, seed=1), [0.0, 0.5])
    middle = (encoded[:1] + latent.encode(images(1, seed=1))) / 2
    torch.testing.assert_close(path[0, 1:], latent.decode(middle), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="decodes at once and does not denoise"):
        latent.render(encoded, denoise=True)


def test_a_saved_model_is_the_same(latent, tmp_path):
    latent.save_pretrained(tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    assert isinstance(loaded, LatentDiffusion) and torch.equal(loaded.diffusion.latent_mean, latent.diffusion.latent_mean)
    with multibeta.backend("reference"):
        assert torch.equal(loaded.generate(2, steps=3), latent.generate(2, steps=3))


def test_parts_that_do_not_fit_are_refused(latent):
    other = GaussianDiffusion(dataclasses.replace(latent.diffusion.config, latent_resolution=4, attention_resolutions=()))
    with pytest.raises(ValueError, match=r"VAE and diffusion do not fit: the shape of latents is \(4, 8, 8\) and \(4, 4, 4\)"):
        LatentDiffusion(latent.vae, other)


def test_measures_take_it_for_an_autoencoder_that_generates(latent):
    class Unlabelled:
        resolution, channels, images = 16, 3, data.Scenes(16).images

        def __len__(self):
            return 40

    scores = evaluate(latent, Unlabelled(), num_images=8, steps=2, features=lambda x: x.flatten(1)[:, ::97], progress=False)
    (row,) = scores["rows"]
    assert "direct" in row and "denoised" not in row and scores["generation"]["steps"] == 2
