"""The report of the second system: its paper's figures, numbers that are those of the page, another model beside it."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

from browser import WIDTHS, visited
from multibeta import data, evaluation, recipes
from multibeta.baselines import VAE
from multibeta.diffusion_vae import ConditionalDiffusionConfig
from multibeta.latents import LatentMixture
from multibeta.metrics import FactorClassifier
from multibeta.multibeta_vae import VAEConfig
from multibeta.networks import AutoencoderConfig, BlockAutoencoderConfig
from multibeta.nonlinear_diffusion import DiffusionConfig
from multibeta.pipelines import BaselineVAE, DenoisingMultiBetaVAE, DiffusionVAE
from multibeta.report import diffusion_vae as diffusion_vae_report
from multibeta.report import multi_beta
from multibeta.report.facts import chosen_recipe
from multibeta.report.page import number
from multibeta.report.write import write_report
from report_pages import PAGE_BYTES, check_sliders, most_bytes

SECTIONS = [
    *("samples", "reconstructions", "distances", "latents", "noise", "shared"),
    *("attributes", "beside", "training", "environment"),
]
STEPS = 20
IMAGES = recipes.DataOptions(source="scenes", num_train=40, num_test=16)
RECIPE = dataclasses.replace(
    recipes.find("diffusion-vae-scenes32-small"),
    name="tiny",
    data=IMAGES,
    vae=BlockAutoencoderConfig(
        resolution=16, encoder_blocks="16d2,16t8,8d8,8t1,1x1", decoder_blocks="1u8,1t8,8u2,8t16,16x1", channels="16:8,8:8,1:6"
    ),
    diffusion=ConditionalDiffusionConfig(
        base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_heads=2, dropout=0.0,
        num_groups=4, num_steps=STEPS,
    ),
)  # fmt: skip


def info(recipe):
    return {"recipe": json.loads(json.dumps(recipes.to_dict(recipe))), "command": "multibeta train"}


@pytest.fixture(scope="module")
def model():
    """Random weights, latents that differ, and a mixture that new ones come from."""
    vae, diffusion = recipes.build(RECIPE)
    vae.encoder.mean.weight.data *= 100
    for parameter in diffusion.parameters():
        nn.init.normal_(parameter, std=0.2)
    mixture = LatentMixture(torch.tensor([0.5, 0.5]), 3 * torch.randn(2, *vae.config.latent_shape), torch.ones(2, 6))
    return DiffusionVAE(vae, diffusion, info(RECIPE), mixture)


@pytest.fixture(scope="module")
def first_system():
    """A Denoising Multi-beta VAE of images of the same size, trained with the same split."""
    shape = {"base_channels": 8, "num_res_blocks": 1, "num_groups": 4}
    vae = VAEConfig(
        resolution=16, channel_multipliers=(1, 2), mid_attention=False, embedding_channels=16, num_steps=STEPS, **shape
    )
    diffusion = DiffusionConfig(channel_multipliers=(1,), attention_resolutions=(), head_channels=8, **shape)
    recipe = dataclasses.replace(recipes.find("scenes32-small"), name="first", data=IMAGES, vae=vae, diffusion=diffusion)
    return DenoisingMultiBetaVAE(*recipes.build(recipe), info(recipe))


@pytest.fixture(scope="module", autouse=True)
def untrained_judge():
    """A classifier that is not trained, and few steps: what they measure is not the report's to test."""

    def features(train_set, test_set, *, steps, progress):
        network = FactorClassifier(test_set.factor_sizes, resolution=16, width=8).eval()
        accuracy = dict.fromkeys(test_set.factor_names, 0.5)
        return evaluation.Features("features of a classifier", lambda x: network.features(x).detach(), network, accuracy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation.features, "classifier_features", features)
        patch.setattr("multibeta.pipelines.multi_beta.USUAL_STEPS", 2)
        patch.setattr(diffusion_vae_report, "QUICK_STEPS", 4)
        yield


@pytest.fixture(scope="module")
def written(model, first_system, untrained_judge, tmp_path_factory):
    """A report beside the first system, with the training's records: its page and numbers."""
    folder = tmp_path_factory.mktemp("report")
    for stage, keys in (("vae", ("reconstruction", "kl", "capacity", "penalty")), ("diffusion", ("noise_error",))):
        (folder / stage).mkdir()
        records = ({"step": step, **dict.fromkeys(keys, 1 / step)} for step in (20, 40))
        (folder / stage / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    options = {"quick": True, "progress": False, "training_folder": folder, "beside": first_system, "beta": 0.8}
    numbers = write_report(model, folder / "page.html", **options)
    assert json.loads((folder / "page.json").read_text()) == numbers
    return (folder / "page.html").read_text(encoding="utf-8"), numbers


def test_every_section_is_there_in_order(written):
    assert re.findall(r'<section id="(\w+)">', written[0]) == SECTIONS
    assert "DiffusionVAE" in written[0] and "Eq. 10" in written[0] and "Eq. 11" in written[0]


def test_every_picture_is_inside_the_page_and_says_what_it_shows(written):
    pictures = re.findall(r'<img src="(data:image/[\w+]+);base64,[^"]+" alt="([^"]*)"', written[0])
    assert len(pictures) == written[0].count("<img") == 15
    assert all(alt for _, alt in pictures)
    assert [kind for kind, _ in pictures].count("data:image/svg+xml") == 1


def test_a_page_is_small_however_large_its_images(written):
    assert len(written[0]) < most_bytes(written[0], more_pictures=4) < PAGE_BYTES  # those of a flow map


def test_sliders_show_what_they_are_moved_to(chromium, written, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(written[0], encoding="utf-8")
    assert check_sliders(chromium, path.as_uri()) == 2
    for width in WIDTHS:
        with visited(chromium, path.as_uri(), width) as visit:
            assert visit.overflow == 0


def test_samples_come_from_the_prior_and_from_the_mixture(model, written):
    page, numbers = written
    assert "Latents of the prior" in page and "Latents of the mixture" in page
    rows = [(row["latents"], row["sampler"], row["steps"]) for row in numbers["generation"]["samples"]]
    assert rows == [(latents, *walk) for latents in ("prior", "mixture") for walk in ((None, None), ("ddim", 4))]
    assert [walk["sampler"] for walk in diffusion_vae_report.samplings(model, quick=False)] == ["ddim", "ddpm"]


def test_the_page_shows_its_numbers(written):
    page, numbers = written
    shown = [row[key] for row in numbers["generation"]["samples"] for key in ("frechet", "sharpness")]
    shown += [numbers["generation"][key] for key in ("real_floor", "autoencoder_floor", "refined_floor", "refined_sharpness")]
    shown += [value for key, value in numbers["neighbour_difference"].items() if key != "paths"]
    shown += numbers["noise_interpolation"]["lerp"] + numbers["noise_interpolation"]["slerp"]
    shown += [row[key] for row in numbers["reconstructions"].values() for key in ("frechet", "sharpness", "mse")]
    shown += [row[made]["mse"] for row in numbers["beside"] for made in ("decoded", "denoised")]
    assert all(f"<td>{number(value)}</td>" in page for value in shown)


def test_every_factor_is_judged_before_and_after_refining(written):
    page, numbers = written
    assert all(len(row["accuracy"]) == len(data.Scenes.factor_names) for row in numbers["reconstructions"].values())
    assert "wall<br>hue" in page and "chance" in page


def test_attributes_are_those_that_split_the_images_most_evenly(written):
    page, numbers = written
    names = [row["name"] for row in numbers["attributes"]]
    assert names == [name for name in data.Scenes.attribute_names if name in names] and len(names) == 8
    assert all(f"{row['name'].replace('_', ' ')} ({row['share']:.0%})" in page for row in numbers["attributes"])


def test_both_systems_are_shown_on_the_same_images(written):
    page, numbers = written
    assert "this model: DiffusionVAE, tiny; beside it: Denoising Multi-β VAE, first" in page
    assert "decoded at β = 0.8" in page and "may not be new to it" not in page
    assert [(row["model"]["class"], row["beta"]) for row in numbers["beside"]] == [
        ("DiffusionVAE", None), ("DenoisingMultiBetaVAE", 0.8)
    ]  # fmt: skip
    found, own = (row["mse"] for row in (numbers["beside"][0]["denoised"], numbers["reconstructions"]["refined"]))
    assert found == pytest.approx(own, rel=1e-4)  # the same walk of the same images


def test_the_first_report_takes_the_second_system_beside_it(model, first_system, tmp_path, monkeypatch):
    other = dataclasses.replace(RECIPE, data=dataclasses.replace(IMAGES, num_train=30))
    beside = DiffusionVAE(model.vae, model.diffusion, info(other))
    monkeypatch.setattr(multi_beta, "QUICK_SAMPLINGS", ({"sampler": "ode2", "steps": 2, "delta_sign": 1},))
    numbers = write_report(first_system, tmp_path / "page.html", quick=True, progress=False, beside=beside)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert [row["beta"] for row in numbers["beside"]] == [0.9, None]
    assert [row["own_split"] for row in numbers["beside"]] == [True, False] and "may not be new to it" in page


def test_images_without_factors_and_attributes(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "cache"))
    images = data.to_float(data.Scenes(16).images(range(0, 300000, 10000)))
    for index, image in enumerate(images):
        data.save_grid(image[None], tmp_path / "images" / f"{index}.png", columns=1)
    prior = DiffusionVAE(model.vae, model.diffusion, model.info)
    numbers = write_report(prior, tmp_path / "page.html", str(tmp_path / "images"), quick=True, progress=False)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert numbers["attributes"] == [] and 'id="attributes"' not in page and 'id="beside"' not in page
    shares = numbers["directions"]["variance_share"]
    assert len(shares) == 6 and sum(shares) == pytest.approx(1) and f"0 · {shares[0]:.0%}" in page  # the latent has 6 numbers
    assert "No factors of these images are known" in page and "not trained with this split" in page
    assert "Latents of the mixture" not in page and numbers["model"]["mixture_components"] is None


def test_models_without_a_report_are_refused_before_any_work(model, first_system, tmp_path):
    baseline = BaselineVAE(
        VAE(AutoencoderConfig(architecture="toy", resolution=16, base_channels=8, num_groups=4, channel_multipliers=(1, 2)))
    )
    other = recipes.build(recipes.find("diffusion-vae-scenes32-small"))
    path = tmp_path / "new" / "page.html"
    with pytest.raises(ValueError, match="DenoisingMultiBetaVAE or a DiffusionVAE, got a BaselineVAE: `multibeta evaluate`"):
        write_report(baseline, path)
    with pytest.raises(ValueError, match="images of one size, got 3 channels and 16 pixels and 3 channels and 32 pixels"):
        write_report(model, path, beside=DiffusionVAE(*other))
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got 1.5"):
        write_report(model, path, beside=first_system, beta=1.5)
    assert not path.parent.exists()


def test_a_model_without_a_recipe_is_measured_on_scenes(model):
    recipe = chosen_recipe(DiffusionVAE(model.vae, model.diffusion), None)
    assert recipe.data.source == "scenes" and recipe.vae == model.vae.config


def test_neighbours_on_a_path():
    paths = torch.tensor([[0.0, 1.0, 3.0]])[..., None, None, None].expand(2, 3, 3, 4, 4)
    assert diffusion_vae_report.neighbour_difference(paths) == 2.5


def test_decoded_rows_stand_over_refined_ones():
    decoded = torch.arange(6.0)[:, None, None, None]
    assert diffusion_vae_report.two_rows(decoded, -decoded, 3).flatten().tolist() == [0, 1, 2, 0, -1, -2, 3, 4, 5, -3, -4, -5]


def test_latents_of_the_prior_are_drawn_beside_a_mixture(model):
    sources = evaluation.latent_sources(model)
    assert list(sources) == ["prior", "mixture"] and sources["mixture"] is model and model.mixture is not None
    assert sources["prior"].draw_latents(torch.arange(200)).abs().mean() < model.draw_latents(torch.arange(200)).abs().mean()
    assert list(evaluation.latent_sources(DiffusionVAE(model.vae, model.diffusion))) == ["prior"]


def test_before_and_after_are_of_one_latent(model, first_system):
    images = data.to_float(data.Scenes(16).images(range(3)))
    before, after = evaluation.decoded_and_denoised(model, images, steps=4)
    latents = model.encode(images, seeds=range(3))
    torch.testing.assert_close(before, model.decode(latents), rtol=0, atol=1e-5)
    torch.testing.assert_close(after, model.refine(images, steps=4), rtol=0, atol=1e-3)
    before, after = evaluation.decoded_and_denoised(first_system, images, 0.8, sampler="ode2", steps=4)
    latents = first_system.encode(images, 0.8, seeds=range(3))
    torch.testing.assert_close(before, first_system.decode(latents, 0.8), rtol=0, atol=1e-5)
    expected = first_system.decode(first_system.denoise(latents, 0.8, sampler="ode2", steps=4))
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("walks", "message"),
    [
        ([], "at least one walk"),
        (
            [{"sampler": "ddim", "steps": 4}, {"sampler": "ode2"}],
            "sampler of a DiffusionVAE must be one of ddpm, ddim, got 'ode2'",
        ),
        ([{"steps": STEPS + 1}], "steps must lie between 1 and 20, .*got 21"),
    ],
)
def test_walks_that_the_model_has_not_are_refused_before_any_work(model, walks, message):
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate_images(model, None, None, samplings=walks)
    with pytest.raises(ValueError, match=message):
        evaluation.generation(model, None, None, None, walks)


def test_what_a_walk_leaves_open_is_what_is_usual(model):
    assert evaluation.checked_samplings(model, [{}, {"steps": 3, "eta": 0.5}]) == [
        {"sampler": "ddim", "steps": STEPS},
        {"sampler": "ddim", "steps": 3, "eta": 0.5},
    ]
    assert [walk["steps"] for walk in evaluation.checked_samplings(model)] == [STEPS, STEPS]
