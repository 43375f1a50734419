"""Both stages of a tiny recipe of each system, run and resumed."""

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image

import multibeta
from multibeta import data, recipes
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, load_pretrained
from tiny_recipes import tiny, tiny_diffusion_vae


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, recipes.run(tiny(), folder, progress=False, command="tiny")


class TestRun:
    def test_trains_both_stages(self, finished):
        _, model = finished
        vae, diffusion = recipes.build(tiny())
        assert not torch.equal(model.vae.decoder.conv_out.weight, vae.decoder.conv_out.weight)
        assert model.diffusion.unet.conv_out.weight.any()  # it starts at zero
        assert torch.equal(model.diffusion.sigmas, model.vae.sigmas())
        assert not torch.equal(model.diffusion.velocity_rms, diffusion.velocity_rms)

    def test_takes_images_of_any_object_that_is_a_dataset(self, tmp_path, monkeypatch):
        class Bars:
            resolution, channels = 16, 3

            def __len__(self):
                return 40

            def images(self, indices):
                bright = torch.as_tensor(indices)[:, None] % 16 > torch.arange(16)
                return (255 * bright[:, None, None]).expand(-1, 3, 16, -1).to(torch.uint8)

        monkeypatch.chdir(tmp_path)
        images = data.split(Bars(), 32, 8)
        vae = recipes.train_vae(tiny(), *images, "bars", progress=False)
        model = recipes.train_diffusion(tiny(), vae, *images, "bars", progress=False)
        assert model.info["images"]["training"] == 32
        assert load_pretrained("bars/model").generate(1, steps=2).shape == (1, 3, 16, 16)

    def test_leaves_a_model_that_loads(self, finished):
        folder, model = finished
        loaded = DenoisingMultiBetaVAE.from_pretrained(folder / "model")
        with multibeta.backend("reference"):  # two engines may measure, and so round, differently
            assert torch.equal(loaded.generate(2, steps=3), model.generate(2, steps=3))
        assert loaded.info["command"] == "tiny"
        assert recipes.from_dict(loaded.info["recipe"]) == tiny()

    def test_knows_what_each_beta_keeps_of_held_out_images(self, finished):
        folder, model = finished
        loaded = load_pretrained(folder / "model")
        assert loaded.info["spectrum"]["num_images"] == tiny().data.num_test
        assert loaded.spectrum == model.spectrum and loaded.auto_beta == model.auto_beta
        _, held_out = recipes.open_data(tiny())
        mean = loaded.encode(data.to_float(held_out.images(range(8))), 0.5)
        sigma = loaded.vae.sigma(torch.tensor(0.5))
        nats = next(row["nats"] for row in loaded.spectrum if row["beta"] == 0.5)
        assert nats == pytest.approx(
            float((mean.square() + sigma**2 - 1 - 2 * sigma.log()).flatten(1).sum(1).mean() / 2), rel=1e-3
        )

    def test_measures_training_images_where_none_are_held_out(self, tmp_path):
        recipe = dataclasses.replace(tiny(), data=dataclasses.replace(tiny().data, num_train=6, num_test=0))
        assert recipes.run(recipe, tmp_path, progress=False).info["spectrum"]["num_images"] == 6

    def test_leaves_pictures_and_measurements(self, finished):
        folder, _ = finished
        for picture in ("vae/reconstructions-000003.png", "diffusion/samples-000003.png"):
            assert (folder / picture).stat().st_size > 0
        for stage in ("vae", "diffusion"):
            lines = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
            assert any("loss" in line for line in lines)

    def test_resuming_a_finished_run_returns_the_same_model(self, finished):
        folder, model = finished
        again = recipes.run(tiny(), folder, resume=True, progress=False)
        for first, second in ((model.vae, again.vae), (model.diffusion, again.diffusion)):
            states = first.state_dict(), second.state_dict()
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    def test_a_finished_folder_is_not_overwritten_by_accident(self, finished):
        with pytest.raises(FileExistsError):
            recipes.run(tiny(), finished[0], progress=False)


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refined")
    return folder, recipes.run(tiny_diffusion_vae(mixture_components=2), folder, progress=False, command="tiny")


class TestRunDiffusionVAE:
    def test_trains_both_stages(self, refined):
        _, model = refined
        vae, _ = recipes.build(tiny_diffusion_vae())
        assert not torch.equal(model.vae.decoder.conv_out.weight, vae.decoder.conv_out.weight)
        assert model.diffusion.unet.conv_out.weight.any()  # it starts at zero
        assert not any(parameter.requires_grad for part in (model.vae, model.diffusion) for parameter in part.parameters())

    def test_leaves_a_model_that_loads_with_its_mixture(self, refined):
        folder, model = refined
        loaded = load_pretrained(folder / "model")
        assert isinstance(loaded, DiffusionVAE) and len(loaded.mixture.weights) == 2
        with multibeta.backend("reference"):  # two engines may measure, and so round, differently
            assert torch.equal(loaded.generate(2, steps=3), model.generate(2, steps=3))
        assert loaded.info["command"] == "tiny"
        assert recipes.from_dict(loaded.info["recipe"]) == tiny_diffusion_vae(mixture_components=2)

    def test_learns_the_mirror_images_as_well(self, refined):
        folder, _ = refined
        for stage in ("vae", "diffusion"):
            assert json.loads((folder / stage / "checkpoint" / "config.json").read_text())["dataset_size"] == 2 * 16

    def test_leaves_pictures(self, refined):
        folder, _ = refined
        for picture in ("vae/reconstructions-000003.png", "diffusion/samples-000003.png"):
            assert (folder / picture).stat().st_size > 0

    def test_resuming_a_finished_run_returns_the_same_model(self, refined):
        folder, model = refined
        again = recipes.run(tiny_diffusion_vae(mixture_components=2), folder, resume=True, progress=False)
        with multibeta.backend("reference"):
            assert torch.equal(again.generate(2, steps=3), model.generate(2, steps=3))

    def test_the_unconditional_baseline_shares_the_first_stage(self, refined, tmp_path):
        folder, model = refined
        shutil.copytree(folder / "vae", tmp_path / "vae")
        recipe = tiny_diffusion_vae()
        recipe = dataclasses.replace(recipe, diffusion=dataclasses.replace(recipe.diffusion, conditional=False, form="form1"))
        baseline = recipes.run(recipe, tmp_path, resume=True, progress=False)
        assert torch.equal(baseline.vae.decoder.conv_out.weight, model.vae.decoder.conv_out.weight)
        assert not baseline.diffusion.config.conditional and baseline.diffusion.unet.conv_out.weight.any()
        assert baseline.generate(2, steps=3).isfinite().all()


@pytest.mark.parametrize("recipe", [tiny, tiny_diffusion_vae])
def test_grey_models_are_trained_from_colour_images(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "cache"))
    recipe, scenes = recipe(), multibeta.data.Scenes(16)
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(scenes.images(range(0, 480_000, 20_000))):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / f"{index:02}.png")
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, source=str(tmp_path / "photos"), num_test=4),
        vae=dataclasses.replace(recipe.vae, image_channels=1),
    )
    train_images, _ = recipes.open_data(recipe)
    assert train_images.channels == 1
    model = recipes.run(recipe, tmp_path / "run", progress=False)
    assert model.generate(2, steps=2, seed=0).shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match=r"scenes has RGB images of 3 channels, 1 are asked for.*--vae.image-channels 3"):
        recipes.open_data(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source="scenes")))
