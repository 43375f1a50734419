"""What models make of images, and new images: one measure for every class of model."""

import pytest
import torch

import multibeta
from multibeta import data, evaluation
from multibeta.evaluation.images import rendered
from multibeta.pipelines import DiffusionVAE

SHORT = {"sampler": "ode2", "steps": 3, "delta_sign": 1}


@pytest.fixture(scope="module")
def sets():
    return data.split(data.Scenes(16), 40, 12)


@pytest.fixture(scope="module")
def pixels(sets):
    return evaluation.pixel_features(sets[0], components=8)


@pytest.fixture(scope="module")
def real(sets):
    return evaluation.equally_many(*sets, 12)


def test_noise_of_the_reverse_process_belongs_to_the_image_and_not_to_its_batch(model, refiner):
    for each, sampler, beta in ((model, "ancestral", 0.5), (refiner, "ddpm", None)):
        options = {"sampler": sampler, "steps": 2, "denoise": True, "seed": 3}
        with multibeta.backend("reference"):  # whose float32 does not round otherwise in another batch
            whole, cut = (
                torch.cat(list(rendered(each, data.Scenes(16), torch.arange(9), beta, batch_size=size, **options)))
                for size in (9, 4)
            )
        torch.testing.assert_close(whole, cut, atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [True, False])
def test_images_decoded_and_denoised_are_of_one_latent(model, refiner, real, samples):
    images, seeds = real[1][:3], torch.arange(3)
    for each, beta, sampling in ((model, 0.8, {"sampler": "ancestral"}), (refiner, None, {"sampler": "ddpm"})):
        decoded, denoised = evaluation.decoded_and_denoised(each, images, beta, samples=samples, steps=3, **sampling)
        latents = each.encode(images, beta, seeds=seeds if samples else None)
        torch.testing.assert_close(decoded, each.decode(latents, beta), rtol=0, atol=1e-4)
        expected = each.render(latents, beta, denoise=True, seeds=seeds, steps=3, **sampling)
        torch.testing.assert_close(denoised, expected, rtol=0, atol=1e-3)


def test_a_level_is_compared_decoded_and_denoised(model, real, pixels):
    rows = evaluation.compare_denoising(model, pixels, real[1], real[2], (0.3, 0.8), steps=3)
    assert [row["beta"] for row in rows] == [0.3, 0.8]
    assert all(row.keys() == {"beta", "direct", "denoised", "direct_mean", "denoised_mean"} for row in rows)
    decoded = evaluation.batched(lambda x: model.decode(model.encode(x, 0.8), 0.8), real[1])
    assert rows[1]["direct_mean"]["mse"] == pytest.approx(float((decoded - real[1]).square().mean()), rel=1e-4)
    assert rows[1]["direct_mean"]["frechet"] == pytest.approx(pixels.distance(decoded, real[1]), rel=1e-3)
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got 1.2"):
        evaluation.compare_denoising(model, pixels, real[1], None, (1.2,))


def test_one_representation_is_compared_once(refiner, real, pixels):
    (row,) = evaluation.compare_denoising(refiner, pixels, real[1], None, steps=3)
    assert row.keys() == {"beta", "direct", "denoised"} and row["beta"] is None
    with pytest.raises(ValueError, match="takes no betas"):
        evaluation.compare_denoising(refiner, pixels, real[1], None, (0.5,))


def test_new_images_of_a_multi_beta_vae_have_two_floors(model, real, pixels):
    train_images, held_out, _ = real
    result = evaluation.generation(model, pixels, train_images, held_out, [SHORT, SHORT | {"seed": 3}], progress=False)
    rebuilt = model.decode(model.encode(train_images, 0.0))
    assert result["real_floor"] == pixels.distance(train_images, held_out) and "refined_floor" not in result
    assert result["autoencoder_floor"] == pytest.approx(pixels.distance(rebuilt, held_out), rel=1e-4)
    for row, seed in zip(result["samples"], (0, 3), strict=True):
        assert {key: row[key] for key in ("latents", *SHORT)} == {"latents": "prior", **SHORT}
        made = model.generate(len(held_out), seed=seed, **SHORT)
        assert row["frechet"] == pytest.approx(pixels.distance(made, held_out), rel=1e-4)


def test_new_images_of_a_refiner_are_measured_decoded_and_refined_from_every_source(refiner, real, pixels):
    mixed = DiffusionVAE(refiner.vae, refiner.diffusion, engine_options=refiner.engine.options)
    mixed.fit_latents(real[0], 2, "diag")
    result = evaluation.generation(mixed, pixels, *real[:2], [{"sampler": "ddpm", "steps": 3, "seed": 5}], progress=False)
    assert {"refined_floor", "refined_sharpness", "autoencoder_floor", "real_floor"} <= result.keys()
    rows = [(row["latents"], row["sampler"], row["steps"]) for row in result["samples"]]
    assert rows == [(name, *way) for name in ("prior", "mixture") for way in ((None, None), ("ddpm", 3))]
    made = {"prior": refiner.generate(12, "ddpm", 3, seed=5), "mixture": mixed.generate(12, "ddpm", 3, seed=5)}
    for row in result["samples"][1::2]:
        assert row["frechet"] == pytest.approx(pixels.distance(made[row["latents"]], real[1]), rel=1e-3)


def test_both_stages_of_a_refiner_in_one_dictionary(refiner, sets, pixels):
    way = {"sampler": "ddim", "steps": 3}
    result = evaluation.evaluate_images(refiner, *sets, num_images=8, samplings=[way], features=pixels, progress=False)
    assert result.keys() == {"reconstructions", "generation", "classifier_accuracy", "factor_names"}
    assert result["reconstructions"].keys() == {"decoded", "refined"}


def test_ways_to_denoise_that_are_usually_compared_are_those_a_model_has(model, refiner):
    samplers = [sampling["sampler"] for sampling in evaluation.checked_samplings(model)]
    assert samplers == ["ode2", "ode2", "dpm2m", "dpm2m", "heun", "ode", "ancestral", "resample", "resample"]
    assert evaluation.checked_samplings(refiner) == [{"sampler": name, "steps": 50} for name in ("ddim", "ddpm")]
    assert evaluation.checked_samplings(refiner, [{"eta": 0.5}]) == [{"eta": 0.5, "sampler": "ddim", "steps": 50}]
    with pytest.raises(ValueError, match="the sign of delta must be 1 or -1, got 0"):
        evaluation.checked_samplings(model, [SHORT | {"delta_sign": 0}])
