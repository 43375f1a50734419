"""Both stages of a tiny recipe of each system, run and resumed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import multibeta
from multibeta import data, recipes
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, LatentDiffusion, load_pretrained
from multibeta.recipes.stages import LatentDiffusionStages
from tiny_recipes import tiny, tiny_diffusion_vae, tiny_latent_diffusion


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


@pytest.fixture(scope="module")
def beside(finished, tmp_path_factory):
    """The run of latent diffusion that goes on from the stage 1 of `finished`."""
    folder = tmp_path_factory.mktemp("beside")
    shutil.copytree(finished[0] / "vae", folder / "vae")
    return folder, recipes.run(tiny_latent_diffusion(), folder, resume=True, progress=False, command="tiny")


class TestRunLatentDiffusion:
    def test_shares_the_first_stage(self, finished, beside):
        for first, second in zip(finished[1].vae.state_dict().values(), beside[1].vae.state_dict().values(), strict=True):
            assert torch.equal(first, second)  # folded alike
        assert beside[1].diffusion.unet.conv_out.weight.any()  # it starts at zero
        channels = [each.diffusion.unet.conv_out.weight.shape[0] for each in (finished[1], beside[1])]
        assert channels == [8, 4]

    def test_leaves_a_model_that_loads_and_pictures(self, beside):
        folder, model = beside
        loaded = load_pretrained(folder / "model")
        assert isinstance(loaded, LatentDiffusion) and recipes.from_dict(loaded.info["recipe"]) == tiny_latent_diffusion()
        with multibeta.backend("reference"):
            assert torch.equal(loaded.generate(2, steps=3), model.generate(2, steps=3))
        assert (folder / "diffusion/samples-000003.png").stat().st_size > 0

    def test_resuming_a_finished_run_returns_the_same_model(self, beside):
        folder, model = beside
        again = recipes.run(tiny_latent_diffusion(), folder, resume=True, progress=False)
        states = model.diffusion.state_dict(), again.diffusion.state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    def test_mirror_images_have_latents_of_their_own(self, beside, monkeypatch):
        _, model = beside
        images = recipes.open_data(tiny_latent_diffusion())
        stages = LatentDiffusionStages(
            tiny_latent_diffusion(), data.Mirrored(images[0]), images[1], Path("nowhere"), progress=False
        )
        objective = stages.second_objective(model.vae, model.diffusion)
        assert objective.encodings.shape == (32, *model.vae.config.latent_shape)
        expected = model.encode(data.to_float(data.Mirrored(images[0]).images([3, 31])))
        torch.testing.assert_close(objective.encodings[[3, 31]], expected, rtol=0, atol=1e-5)
        monkeypatch.setattr("multibeta.recipes.stages.MEMORY_LIMIT_BYTES", 0)
        assert stages.second_objective(model.vae, model.diffusion).encodings is None


@pytest.mark.parametrize("recipe", [tiny, tiny_latent_diffusion, tiny_diffusion_vae])
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
