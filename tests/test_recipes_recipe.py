"""A recipe: what follows from its VAE, its JSON, the options of its objectives."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import multibeta
from multibeta import recipes
from multibeta.diffusion_vae import CapacityObjectiveOptions, ConditionalDiffusionObjectiveOptions
from multibeta.multibeta_vae import MultiBetaObjective, MultiBetaObjectiveOptions
from multibeta.networks import BlockAutoencoderConfig
from multibeta.nonlinear_diffusion import NonlinearDiffusionObjectiveOptions
from multibeta.pipelines import DenoisingMultiBetaVAE
from multibeta.recipes import RECIPES
from tiny_recipes import tiny, tiny_diffusion_vae

PRETRAINED = Path(multibeta.__file__).parent / "pretrained"


def test_the_shipped_model_is_what_its_recipe_says():
    model = DenoisingMultiBetaVAE.from_pretrained("scenes32")
    assert recipes.from_dict(model.info["recipe"]) == recipes.find("scenes32")
    assert "--recipe scenes32" in model.info["command"]


def test_a_recipe_that_was_saved_before_fields_were_added_takes_their_defaults():
    saved = json.loads((PRETRAINED / "scenes32" / "config.json").read_text())["info"]["recipe"]
    recipe = recipes.from_dict(saved)
    added = {"untie_steps": 0, "fold": True}
    assert "untie_steps" not in saved["vae_objective"] and "model" not in saved
    assert recipes.to_dict(recipe)["vae_objective"] == saved["vae_objective"] | added
    assert "mirror" not in saved["data"] and recipe.data.mirror is False
    assert "sigma_per_channel" not in saved["vae"] and recipe.vae.sigma_per_channel is False


class TestOptionsOfTheObjectives:
    """What an objective takes is declared next to it; a recipe adds what happens around its training, by fields of its own."""

    ADDED = (
        (recipes.VAEObjectiveOptions, MultiBetaObjectiveOptions, ["fold", "untie_steps"]),
        (recipes.DiffusionObjectiveOptions, NonlinearDiffusionObjectiveOptions, ["statistics_images"]),
        (recipes.CapacityObjectiveOptions, CapacityObjectiveOptions, []),
        (recipes.RefinerObjectiveOptions, ConditionalDiffusionObjectiveOptions, ["mixture_components"]),
    )

    @pytest.mark.parametrize(("options", "of_objective", "added"), ADDED)
    def test_a_recipe_adds_to_them(self, options, of_objective, added):
        own, names = dataclasses.asdict(of_objective()), [field.name for field in dataclasses.fields(options)]
        assert names == [*own, *added]  # flat, as the JSON of recipes and the flags of `train` have them
        assert dataclasses.asdict(options()).items() >= own.items()

    @pytest.mark.parametrize("recipe", [tiny, tiny_diffusion_vae])
    def test_they_reach_the_objectives(self, recipe):
        recipe = recipe()
        vae, diffusion = recipes.build(recipe)
        assert recipe.first_objective(vae).options == recipe.vae_objective
        assert recipe.second_objective(vae, diffusion).options == recipe.diffusion_objective

    def test_by_name_they_differ_from_those_given(self):
        options = recipes.VAEObjectiveOptions(balance=3.0, anneal=0.5)
        vae, _ = recipes.build(tiny())
        assert MultiBetaObjective(vae, options, anneal=0.0).options == dataclasses.replace(options, anneal=0.0)
        assert MultiBetaObjective(vae, balance=3.0).options == MultiBetaObjectiveOptions(balance=3.0)
        with pytest.raises(TypeError, match=r"MultiBetaObjectiveOptions.*'colour'"):
            MultiBetaObjective(vae, colour=3)
        with pytest.raises(ValueError, match="balance must be finite and above 0"):
            MultiBetaObjective(vae, balance=0)

    def test_the_fold_is_no_part_of_what_stage_1_learns(self):
        base = tiny()
        unfolded = dataclasses.replace(base, vae_objective=dataclasses.replace(base.vae_objective, fold=False))
        assert base.plan()["vae"] == unfolded.plan()["vae"] and base.plan()["diffusion"] != unfolded.plan()["diffusion"]


class TestRecipe:
    def test_latent_shape_and_grid_of_the_diffusion_follow_the_vae(self):
        base = RECIPES["scenes32"]
        vae = dataclasses.replace(base.vae, latent_channels=6, channel_multipliers=(1, 2), num_steps=70, schedule="sinusoidal")
        diffusion = dataclasses.replace(base, vae=vae).diffusion
        assert (diffusion.latent_channels, diffusion.latent_resolution) == (6, 16)
        assert (diffusion.num_steps, diffusion.schedule) == (70, "sinusoidal")

    def test_images_of_the_refiner_follow_the_vae(self):
        blocks = {"encoder_blocks": "16d16,16t1,1x1", "decoder_blocks": "1u16,1t16,16x1", "channels": "16:8,1:6"}
        vae = BlockAutoencoderConfig(resolution=16, image_channels=1, **blocks)
        diffusion = dataclasses.replace(RECIPES["diffusion-vae-scenes32"], vae=vae).diffusion
        assert (diffusion.resolution, diffusion.image_channels) == (16, 1)

    def test_a_recipe_without_the_class_of_its_model_is_of_the_first_system(self):
        values = recipes.to_dict(tiny())
        assert values.pop("model") == "DenoisingMultiBetaVAE"
        assert recipes.from_dict(values) == tiny()
        assert recipes.to_dict(tiny_diffusion_vae())["model"] == "DiffusionVAE"

    def test_build_follows_the_seed_and_leaves_the_global_one(self):
        torch.manual_seed(5)
        first = recipes.build(tiny())[0].state_dict()
        after = torch.rand(1)
        second = recipes.build(tiny())[0].state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(1), after)
        seeded = dataclasses.replace(tiny(), vae_training=dataclasses.replace(tiny().vae_training, seed=1))
        assert not torch.equal(recipes.build(seeded)[0].encoder.conv_in.weight, first["encoder.conv_in.weight"])

    def test_data_is_split_without_overlap(self):
        train, test = recipes.open_data(tiny())
        assert (len(train), len(test), train.resolution) == (16, 8, 16)
        assert not set(train.indices.tolist()) & set(test.indices.tolist())
