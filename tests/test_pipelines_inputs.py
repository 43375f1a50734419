"""Verbs take images in every form that `generate` gives them in, and mean the same by each."""

import numpy as np
import pytest
import torch
from PIL import Image

from multibeta.data import load_images, to_float, to_uint8
from multibeta.pipelines import DenoisingMultiBetaVAE
from multibeta.pipelines.inputs import as_images, image_options


@pytest.fixture(scope="module")
def shown():
    """Three images of 8 bits, (N, C, H, W) uint8."""
    return torch.randint(256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def forms(images):
    """uint8 images (N, C, H, W) in every other form."""
    pixels = images.movedim(1, 3).numpy()
    yield images
    yield from (pixels, pixels / 255, (pixels / 255).astype(np.float32), np.asfortranarray(pixels))
    pictures = [Image.fromarray(each) for each in pixels]
    yield from (pictures, tuple(pictures), [picture.convert("RGBA") for picture in pictures])


def test_every_form_is_the_same_images_to_every_verb(model, refiner, baseline, shown):
    x, other = to_float(shown), to_float(shown).flip(0)
    step, vector = torch.ones(4, 8, 8), torch.ones(6, 1, 1)
    verbs = (
        lambda x: model.encode(x, 0.5),
        lambda x: model.encode(x, 0.5, seeds=[1, 2, 3]),
        lambda x: model.manipulate(x, step, 1.0, 0.5, steps=2),
        lambda x: model.interpolate(x, other, 0.5, 0.5, steps=2),
        lambda x: model.interpolate(other, x, 0.5, 0.5, steps=2),
        lambda x: model.principal_directions(x, 0.5).directions.abs(),
        lambda x: model.attribute_direction(x, other[:1], 0.5),
        lambda x: model.attribute_direction(other[:1], x, 0.5),
        refiner.encode,
        lambda x: refiner.denoise(x, steps=2),
        lambda x: refiner.refine(x, steps=2),
        lambda x: refiner.reconstruct(x, steps=2),
        lambda x: refiner.manipulate(x, vector, 1.0, steps=2),
        lambda x: refiner.interpolate(x, other, [0.0, 0.5], steps=2),
        lambda x: refiner.interpolate_noise(x, [1, 2, 3], [4, 5, 6], 0.5, steps=2),
        baseline.encode,
    )
    for verb in verbs:
        expected = verb(x)
        for form in forms(shown):
            torch.testing.assert_close(verb(form), expected, rtol=1e-3, atol=1e-3)


def test_conversions_are_exact_to_the_last_bit_of_a_byte(model, shown):
    for form in forms(shown):
        converted = as_images(form, model)
        assert converted.dtype == torch.float32 and converted.is_contiguous()
        assert torch.equal(to_uint8(converted), shown) and torch.allclose(converted, to_float(shown), atol=1e-6)
    floats = to_float(shown).double()
    assert as_images(floats, model) is floats


@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
def test_what_generate_gives_goes_round(model, output_type):
    expected = model.generate(3, steps=2, seed=5)
    again = as_images(model.generate(3, steps=2, seed=5, output_type=output_type), model)
    assert torch.allclose(again, expected, atol=1e-6 if output_type != "pil" else 1.01 / 255)


def test_pictures_are_prepared_for_the_model(model):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 4), dtype=np.uint8))
    latents = model.encode(picture, 0.5)  # one picture is a batch of one
    assert torch.equal(latents, model.encode(load_images(picture, 16), 0.5))
    assert model.manipulate(picture, torch.ones(4, 8, 8), 1.0, 0.5, steps=2).shape == (1, 3, 16, 16)
    assert model.interpolate(picture, [picture.rotate(90)], [0.0, 1.0], 0.5, steps=2).shape == (1, 2, 3, 16, 16)


def test_the_white_level_of_a_model_holds_for_pictures_too(model):
    deep = Image.fromarray(np.full((20, 20), 4095, dtype=np.uint16))
    trained = DenoisingMultiBetaVAE(model.vae, model.diffusion, {"recipe": {"data": {"white_level": 4095}}})
    assert image_options(trained)["white_level"] == 4095
    assert (as_images(deep, trained) == 1).all() and (as_images(deep, model) < -0.8).all()


def test_latents_stand_for_images_as_before(model, shown):
    latents = model.encode(shown, 0.5)
    one = model.manipulate(latents, torch.ones(4, 8, 8), 1.0, 0.5, steps=2)
    torch.testing.assert_close(one, model.manipulate(shown, torch.ones(4, 8, 8), 1.0, 0.5, steps=2))
    mixed = model.interpolate(latents, shown.flip(0), 0.5, 0.5, steps=2)
    torch.testing.assert_close(mixed, model.interpolate(shown, shown.flip(0), 0.5, 0.5, steps=2))


def test_a_mixture_is_fitted_to_pictures(make_refiner, shown):
    means = []
    for form in (to_float(shown), *forms(shown)):
        fitted = make_refiner()
        fitted.fit_latents(form, 1, "diag")
        means.append(fitted.mixture.means)
    assert all(torch.allclose(each, means[0], atol=1e-3) for each in means)
