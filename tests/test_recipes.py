import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image

import multibeta
from multibeta import recipes
from multibeta.blocks import ResBlock
from multibeta.multibeta_vae import MultiBetaVAE, untie_sigma
from multibeta.networks import BlockAutoencoderConfig, ConditionedConv
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, load_pretrained
from multibeta.recipes import RECIPES, DiffusionVAERecipe, MultiBetaRecipe

MULTI_BETA = [name for name, recipe in RECIPES.items() if isinstance(recipe, MultiBetaRecipe)]
DIFFUSION_VAE = [name for name, recipe in RECIPES.items() if isinstance(recipe, DiffusionVAERecipe)]
TRAINING = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "validate_every": 3, "checkpoint_every": 2}


def tiny():
    """Three steps of each stage on a few 16x16 scenes."""
    base = RECIPES["scenes32-small"]
    return dataclasses.replace(
        base,
        name="tiny",
        data=dataclasses.replace(base.data, num_train=16, num_test=8),
        vae=dataclasses.replace(
            base.vae,
            resolution=16,
            base_channels=8,
            channel_multipliers=(1, 2),
            num_groups=4,
            embedding_channels=16,
            num_steps=50,
        ),
        vae_training=dataclasses.replace(base.vae_training, **TRAINING),
        diffusion=dataclasses.replace(
            base.diffusion, base_channels=8, channel_multipliers=(1,), attention_resolutions=(), head_channels=8, num_groups=4
        ),
        diffusion_training=dataclasses.replace(base.diffusion_training, **TRAINING),
    )


def tiny_diffusion_vae(**objective):
    """The same of the second system."""
    base = RECIPES["diffusion-vae-scenes32-small"]
    blocks = {"encoder_blocks": "16d2,16t8,8d8,8t1,1x1", "decoder_blocks": "1u8,1t8,8u2,8t16,16x1", "channels": "16:8,8:8,1:6"}
    unet = {"base_channels": 8, "channel_multipliers": (1, 2), "num_steps": 20, "num_heads": 2}
    return dataclasses.replace(
        base,
        name="tiny",
        data=dataclasses.replace(base.data, num_train=16, num_test=8, mirror=True),
        vae=BlockAutoencoderConfig(resolution=16, **blocks),
        vae_training=dataclasses.replace(base.vae_training, **TRAINING),
        diffusion=dataclasses.replace(base.diffusion, **unet),
        diffusion_objective=dataclasses.replace(base.diffusion_objective, **objective),
        diffusion_training=dataclasses.replace(base.diffusion_training, **TRAINING),
    )


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


def test_the_shipped_model_is_what_its_recipe_says():
    model = DenoisingMultiBetaVAE.from_pretrained("scenes32")
    assert recipes.from_dict(model.info["recipe"]) == recipes.find("scenes32")
    assert "--recipe scenes32" in model.info["command"]


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
