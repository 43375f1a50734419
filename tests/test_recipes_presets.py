"""Every preset can be built, and is what its source says."""

import dataclasses
import json

import pytest
import torch

from multibeta import recipes
from multibeta.blocks import ResBlock
from multibeta.multibeta_vae import MultiBetaVAE, untie_sigma
from multibeta.networks import ConditionedConv
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE
from multibeta.recipes import RECIPES, DiffusionVAERecipe, MultiBetaRecipe

MULTI_BETA = [name for name, recipe in RECIPES.items() if isinstance(recipe, MultiBetaRecipe)]
DIFFUSION_VAE = [name for name, recipe in RECIPES.items() if isinstance(recipe, DiffusionVAERecipe)]


class TestPresets:
    @pytest.mark.parametrize("name", RECIPES)
    def test_survive_json(self, name):
        recipe = RECIPES[name]
        again = recipes.from_dict(json.loads(json.dumps(recipes.to_dict(recipe))))
        assert again == recipe and type(again) is type(recipe)

    @pytest.mark.parametrize("name", MULTI_BETA)
    def test_build_networks_that_fit(self, name):
        with torch.device("meta"):
            vae, diffusion = recipes.build(RECIPES[name])
        latents = torch.empty(1, *vae.config.latent_shape, device="meta")
        steps = torch.ones(1, dtype=torch.int64, device="meta")
        first, second = diffusion.heads(latents, steps)
        assert first.shape == second.shape == latents.shape
        assert len(diffusion.sigmas) == vae.config.num_steps + 1

    @pytest.mark.parametrize("name", DIFFUSION_VAE)
    def test_build_stages_that_fit(self, name):
        with torch.device("meta"):
            DiffusionVAE(*recipes.build(RECIPES[name]))

    @pytest.mark.parametrize("name", [name for name in DIFFUSION_VAE if "scenes" in name])
    def test_scenes_refine_one_image(self, name):
        model = DiffusionVAE(*recipes.build(RECIPES[name]))
        assert model.refine(torch.zeros(1, 3, 32, 32), steps=2).shape == (1, 3, 32, 32)

    def test_the_second_paper_is_its_tables_2_and_3(self):
        recipe = RECIPES["diffusion-vae-celebahq128"]
        with torch.device("meta"):
            sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in recipes.build(recipe)]
        assert recipe.vae.latent_shape == (1024, 1, 1) and sizes == [21_098_275, 95_167_747]
        first, second = recipe.vae_training, recipe.diffusion_training
        assert (first.batch_size, first.learning_rate, second.batch_size, second.learning_rate) == (128, 1e-4, 64, 2e-5)
        assert (second.warmup_steps, second.ema_decay, recipe.diffusion.dropout) == (5000, 0.9999, 0.1)
        assert recipe.vae_objective.gamma == 100 and recipe.vae_objective.capacity == 25
        assert first.steps == 500 * (30_000 // 128)
        assert recipe.vae_objective.warmup * first.steps == pytest.approx(100_000, rel=0.01)
        assert second.final_learning_rate == first.final_learning_rate == 1

    @pytest.mark.parametrize("name", [name for name in MULTI_BETA if name.startswith("scenes")])
    def test_scenes_run_one_image_through(self, name):
        vae, diffusion = recipes.build(RECIPES[name])
        vae = untie_sigma(vae) if RECIPES[name].vae_objective.untie_steps else vae  # as its training ends
        model = DenoisingMultiBetaVAE(vae, diffusion)
        image = torch.zeros(1, 3, *2 * [vae.config.resolution])
        assert model.decode(model.denoise(model.encode(image, 0.5), 0.5, steps=2)).shape == image.shape

    @pytest.mark.parametrize("name", MULTI_BETA)
    def test_no_norm_removes_beta(self, name):
        # beta shifts whole channels, which a norm with one channel a group would take out again
        with torch.device("meta"):
            vae = MultiBetaVAE(RECIPES[name].vae)
        blocks = [block for block in vae.modules() if isinstance(block, ResBlock | ConditionedConv)]
        norms = [block.norm2 if isinstance(block, ResBlock) else block.norm for block in blocks]
        assert norms and all(norm.num_channels >= 2 * norm.num_groups for norm in norms)

    def test_names_are_their_own(self):
        assert all(name == recipe.name and recipe.source for name, recipe in RECIPES.items())
        assert recipes.find("celebahq256") is RECIPES["celebahq256"]

    def test_an_unknown_name_lists_those_that_exist(self):
        with pytest.raises(ValueError, match=f"'cifar'; there are {', '.join(RECIPES)}"):
            recipes.find("cifar")

    def test_literal_is_the_paper_as_printed(self):
        literal = recipes.literal(RECIPES["scenes32"])
        assert literal.diffusion.parameterization == "literal"
        objective = literal.vae_objective
        assert (objective.balance, objective.decoder_weight, objective.fold) == (None, 0.0, False)
        assert literal.vae == dataclasses.replace(RECIPES["scenes32"].vae, collapse_exponent=None)

    def test_untied_spends_the_same_budget_and_trains_a_curve_per_channel(self):
        shared, untied = RECIPES["scenes64-isotropic"], RECIPES["scenes64"]
        assert untied.vae_training.steps + untied.vae_objective.untie_steps == shared.vae_training.steps
        assert untied.diffusion.sigma_per_channel and not shared.diffusion.sigma_per_channel
        assert untied.vae == shared.vae
