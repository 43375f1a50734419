"""A folder of images to a model in one call: which recipe is taken, how it is changed, what is held out and mirrored."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from PIL import Image

import multibeta
from multibeta import data, distribution, recipes
from multibeta.pipelines import DenoisingMultiBetaVAE
from multibeta.recipes import own_images, planning, presets
from multibeta.recipes.own_images import choose, default_folder, with_fields
from multibeta.recipes.recipe import split_counts
from tiny_recipes import tiny


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Twenty small images, in a place of their own."""
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "holidays").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 40, 48, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "holidays" / f"{index:02}.png")
    return tmp_path / "holidays"


@pytest.fixture
def tiny_photos(monkeypatch):
    """The recipe `photos32` with tiny networks, planned by given seconds."""
    photos = recipes.find("photos32")
    small = dataclasses.replace(tiny(), name="photos32", data=photos.data)
    monkeypatch.setitem(presets.RECIPES, "photos32", small)
    monkeypatch.setattr(planning, "LEAST_STEPS", 2)
    monkeypatch.setattr(planning, "MOST_EPOCHS", 1)
    seconds = planning.Measured({"vae_training": 1.0, "diffusion_training": 1.0}, 1e-3)
    monkeypatch.setattr(planning, "measure", lambda *_: seconds)
    return small


class TestChoice:
    def test_images_that_are_named_take_a_recipe_for_photos(self):
        assert choose(source="~/photos") is choose(source="celeba:faces") is recipes.find("photos32")
        assert choose() is choose(source="scenes") is recipes.find("scenes32")
        assert choose("toy64", "~/photos") is recipes.find("toy64")

    @pytest.mark.parametrize("side", [32, 64, 128])
    def test_their_resolution_chooses_among_them(self, side):
        assert choose(source="photos", resolution=side) == recipes.find(f"photos{side}")

    @pytest.mark.parametrize("side, name", [(16, "photos32"), (48, "photos32"), (96, "photos64"), (256, "photos128")])
    def test_another_resolution_is_derived_and_keeps_attention_at_its_levels(self, side, name):
        derived, preset = choose(source="photos", resolution=side), recipes.find(name)
        assert derived.name == name and derived.vae == dataclasses.replace(preset.vae, resolution=side)
        networks = recipes.preflight.check_networks(derived)
        assert not recipes.preflight.check_attention(derived) and not recipes.preflight.check_norms(*networks)

    def test_for_a_recipe_that_is_named_it_is_that_of_its_vae(self):
        for name, source in (("photos32", "photos"), ("scenes32", None)):
            preset = recipes.find(name)
            assert choose(name, source, 64) == dataclasses.replace(preset, vae=dataclasses.replace(preset.vae, resolution=64))

    def test_a_resolution_is_a_number_of_pixels(self):
        for wrong in (0, -32, 1.5, True):
            with pytest.raises(ValueError, match="resolution must be"):
                choose(source="photos", resolution=wrong)

    def test_a_run_is_called_after_its_images(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        named = {"~/photos": "photos", "/data/cats/": "cats", "celeba:x/y": "celeba", "a:b": "a:b", ".": tmp_path.name}
        assert {source: default_folder(source).as_posix() for source in named} == {s: f"runs/{n}" for s, n in named.items()}


class TestHeldOut:
    @pytest.mark.parametrize(
        "held, expected",
        [(3786, (3408, 378)), (50_000, (49_000, 1000)), (30, (27, 3)), (12, (10, 2)), (5, (3, 2)), (3, (2, 1)), (2, (1, 1))],
    )
    def test_a_tenth_of_a_folder_is_held_out(self, held, expected):
        assert split_counts(recipes.find("photos32"), held) == expected

    def test_a_number_that_is_said_counts_as_for_every_recipe(self):
        photos, scenes = recipes.find("photos32"), recipes.find("scenes32")
        for num_test in (0, 7, 500):
            counted = [
                split_counts(dataclasses.replace(r, data=dataclasses.replace(r.data, num_train=None, num_test=num_test)), 3786)
                for r in (photos, scenes)
            ]
            assert counted[0] == counted[1] == (3786 - num_test, num_test)


class TestMirroring:
    def test_photos_are_mirrored_and_labelled_factors_are_not(self, caplog):
        photos = recipes.find("photos32")
        assert all(recipes.find(name).data.mirror for name in recipes.PHOTOS)
        values, _ = with_fields(photos, {"data": {"source": "scenes"}})
        assert recipes.resolve(photos, values, None).data.mirror is False
        assert "scenes knows floor_hue" in caplog.text and "--data.mirror does" in caplog.text
        assert recipes.resolve(photos, values, None, {"--data.mirror"}).data.mirror is True

    def test_what_is_there_is_said_in_one_line(self, folder, caplog):
        caplog.set_level(logging.INFO, "multibeta")
        photos = recipes.find("photos32")
        values, flags = with_fields(photos, {"data": {"source": str(folder)}})
        resolved = recipes.resolve(photos, values, None, flags)
        assert "20 images: 18 to train on, and their mirror images, 2 held out" in caplog.messages
        assert resolved.vae_training.batch_size == 36
        values, flags = with_fields(photos, {"data": {"source": str(folder), "mirror": False}})
        recipes.resolve(photos, values, None, flags)
        assert "20 images: 18 to train on, 2 held out" in caplog.messages


class TestTrain:
    def test_a_folder_becomes_a_model_in_one_call(self, folder, tiny_photos, caplog):
        caplog.set_level(logging.INFO, "multibeta")
        distribution.say_device.cache_clear()
        model = multibeta.train("holidays", 16, 1, progress=False)
        assert isinstance(model, DenoisingMultiBetaVAE) and model.generate(2, steps=2).shape == (2, 3, 16, 16)
        loaded = DenoisingMultiBetaVAE.from_pretrained("runs/holidays/model")
        recipe = recipes.from_dict(loaded.info["recipe"])
        assert (recipe.name, recipe.data.source, recipe.vae.resolution) == ("photos32", str(folder), 16)
        assert recipe.vae_training.steps == recipe.diffusion_training.steps == 9  # one epoch of 36 images in batches of 4
        assert caplog.messages[0] == "no recipe was named: it is photos32"
        assert caplog.messages[1].startswith("computing on ")
        assert "9 x 4" in caplog.text

        with pytest.raises(FileExistsError, match="pass --resume"):
            multibeta.train("holidays", 16, 1, progress=False)
        again = multibeta.train("holidays", 16, 1, resume=True, progress=False)
        assert (
            again.encode(data.to_float(data.Scenes(16).images([0])), 0.5)
            == model.encode(data.to_float(data.Scenes(16).images([0])), 0.5)
        ).all()

    def test_fields_of_the_recipe_may_be_said(self, folder, tiny_photos, tmp_path, monkeypatch):
        monkeypatch.setattr(planning, "measure", None)  # steps are said
        fields = {"vae": {"latent_channels": 3}, "vae_training": {"steps": 1}, "diffusion_training": {"steps": 2}}
        out = tmp_path / "run"
        model = multibeta.train(folder, out=out, seed=3, progress=False, data={"mirror": False, "num_test": 4}, **fields)
        recipe = recipes.from_dict(model.info["recipe"])
        assert recipe.diffusion.latent_channels == 3 and recipe.data.mirror is False
        assert (recipe.vae_training.steps, recipe.diffusion_training.steps, recipe.vae_training.seed) == (1, 2, 3)
        assert model.info["images"]["held_out"] == 4 and (out / "model").is_dir()

    @pytest.mark.parametrize(
        "given, said",
        [
            ({"colour": {"red": 1}}, "no part 'colour': there are data, vae, vae_objective"),
            ({"vae": {"depth": 3}}, "vae must be a dict of some of architecture, resolution"),
            ({"vae_training": 300}, "vae_training must be a dict of some of steps"),
            ({"vae_training": {"steps": 0}}, "--vae-training.steps must be at least 1, got 0"),
            (
                {"minutes": 5, "vae_training": {"steps": 5}},
                "--minutes 5 plans the steps of both stages, and --vae-training.steps",
            ),
            ({"resolution": 16, "vae": {"resolution": 8}}, "two resolutions"),
            ({"device": "cuda:99"}, "device cuda:99 cannot be used"),
            ({"device": "gpu"}, "device gpu cannot be used"),
        ],
    )
    def test_what_cannot_be_is_said_before_anything_is_written(self, given, said, folder, tiny_photos):
        with pytest.raises(ValueError, match=said):
            multibeta.train(folder, progress=False, **given)
        assert not (folder.parent / "runs").exists()

    @pytest.mark.parametrize("there", (False, True))
    def test_it_trains_on_the_gpu_where_there_is_one(self, there, folder, monkeypatch):
        def stop(device):
            raise ValueError(f"asked for {device}")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setattr(own_images.preflight, "check_device", stop)
        with pytest.raises(ValueError, match=f"asked for {'cuda' if there else 'cpu'}$"):
            multibeta.train(folder, progress=False)

    def test_a_dataset_trains_as_a_folder_does(self, tiny_photos, tmp_path, monkeypatch):
        class Pets:
            def __len__(self):
                return 30

            def __getitem__(self, index):
                return np.random.default_rng(index).integers(0, 256, (20, 24, 3), "u1"), "a label"

        monkeypatch.chdir(tmp_path)
        model = multibeta.train(Pets(), progress=False)
        assert model.info["images"]["training"] == 54 and model.info["recipe"]["data"]["source"] == "dataset: Pets"
        assert (tmp_path / "runs" / "Pets" / "model" / "config.json").exists()
        again = multibeta.train(Pets(), progress=False, resume=True)
        assert torch.equal(again.vae.decoder.conv_out.weight, model.vae.decoder.conv_out.weight)

    def test_what_is_no_dataset_is_refused(self):
        with pytest.raises(TypeError, match="dataset"):
            multibeta.train(3)

    def test_a_folder_that_is_not_there_is_said_first(self, tmp_path, monkeypatch):
        monkeypatch.setattr(own_images, "run", None)
        with pytest.raises(FileNotFoundError, match="a folder of images"):
            multibeta.train(tmp_path / "nowhere")
