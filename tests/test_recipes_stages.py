"""Both stages of a tiny recipe of each system, run and resumed."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import multibeta
from multibeta import checkpoints, data, recipes, training
from multibeta.nonlinear_diffusion import table_nodes, table_statistics
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, LatentDiffusion, load_pretrained
from multibeta.recipes import preflight, stages
from multibeta.recipes.stages import LatentDiffusionStages
from multibeta.report import write_report
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

    def test_trains_on_any_map_style_dataset_and_records_its_class(self, tmp_path, caplog):
        class Pets:
            def __init__(self, first=0):
                self.first = first

            def __len__(self):
                return 30

            def __getitem__(self, index):
                return Image.fromarray(np.random.default_rng(self.first + index).integers(0, 256, (20, 24, 3), "u1")), "a label"

        recipe, run = dataclasses.replace(tiny(), data=recipes.DataOptions()), tmp_path / "run"
        model = recipes.run(recipe, run, dataset=Pets(), progress=False)
        assert (model.info["images"]["training"], model.info["images"]["held_out"]) == (24, 6)
        assert load_pretrained(run / "model").info["recipe"]["data"]["source"] == "dataset: Pets"
        again = recipes.run(recipe, run, dataset=Pets(), progress=False, resume=True)
        assert torch.equal(again.vae.decoder.conv_out.weight, model.vae.decoder.conv_out.weight)
        with pytest.raises(ValueError, match="was trained on other images"):
            recipes.run(recipe, run, dataset=Pets(1), progress=False, resume=True)
        with pytest.raises(ValueError, match=r"source was '.*dataset: Pets', now 'scenes'"):
            recipes.run(recipe, run, progress=False, resume=True)
        with pytest.raises(ValueError, match=r"records dataset: Pets as its data, which cannot be opened: .*--data.* in Python"):
            write_report(model, tmp_path / "report.html", progress=False)

    def test_a_dataset_must_fit_the_recipe(self, tmp_path):
        small = [Image.new("RGB", (12, 12))] * 30
        for dataset, message in (
            (small, "item 0 of list cannot be read: .* too few for resolution 16 without upscale"),
            (data.Scenes(32), "Scenes has images of 32 pixels per side, 16 are asked for"),
            ([Image.new("RGB", (20, 20))] * 3, r"16 training and 0 test images need 16 images, dataset: list has 3: lower"),
        ):
            with pytest.raises(ValueError, match=message):
                recipes.run(tiny(), tmp_path / "run", dataset=dataset, progress=False)
        assert not (tmp_path / "run" / "vae").exists()

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


def longer(recipe, stage, steps):
    """The recipe with another number of steps in one stage."""
    return dataclasses.replace(recipe, **{stage: dataclasses.replace(getattr(recipe, stage), steps=steps)})


def steps_in(folder, stage):
    return json.loads((folder / stage / "checkpoint" / "config.json").read_text())["step"]


def same(first, second):
    return all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


class TestMoreSteps:
    @pytest.fixture
    def folder(self, finished, tmp_path):
        shutil.copytree(finished[0], tmp_path / "run")
        return tmp_path / "run"

    def test_of_stage_2_alone(self, finished, folder):
        model = recipes.run(longer(tiny(), "diffusion_training", 5), folder, resume=True, progress=False)
        assert (steps_in(folder, "vae"), steps_in(folder, "diffusion")) == (3, 5)
        assert same(finished[1].vae, model.vae) and not same(finished[1].diffusion.unet, model.diffusion.unet)
        assert model.info["recipe"]["diffusion_training"]["steps"] == 5

    def test_of_stage_1_are_refused_under_a_stage_2(self, folder):
        recipe = longer(tiny(), "vae_training", 5)
        with pytest.raises(ValueError) as error:
            recipes.run(recipe, folder, resume=True, progress=False)
        assert "vae/checkpoint is of a training of 3 steps" in str(error.value).replace("\\", "/")
        assert f"keep 3, or choose another folder, or delete {folder / 'diffusion'}, to train anew" in str(error.value)
        assert steps_in(folder, "vae") == 3
        shutil.rmtree(folder / "diffusion")  # as it says
        model = recipes.run(recipe, folder, resume=True, progress=False, warm_start=folder / "model")
        assert (steps_in(folder, "vae"), steps_in(folder, "diffusion")) == (5, 3)
        assert model.info["recipe"]["warm_start"] == str(folder / "model")

    def test_of_a_stage_1_whose_curves_were_untied_are_refused(self, tmp_path):
        recipe = tiny()
        recipe = dataclasses.replace(recipe, vae_objective=dataclasses.replace(recipe.vae_objective, untie_steps=2))
        for name in ("vae", "vae-untied"):
            options, context = recipe.plan()[name]
            place = tmp_path / name / "checkpoint"
            place.mkdir(parents=True)
            saved = {"options": dataclasses.asdict(options), "context": context}
            (place / "config.json").write_text(json.dumps({"format": 1, "files": [], **saved}))
        preflight.check_steps(recipe, tmp_path)
        with pytest.raises(ValueError, match="vae-untied was trained on what it made, which 9 steps would change"):
            preflight.check_steps(longer(recipe, "vae_training", 9), tmp_path)

    def test_which_weights_stage_1_gave_may_not_change_under_a_stage_2(self, folder):
        recipe = tiny()
        recipe = dataclasses.replace(recipe, vae_training=dataclasses.replace(recipe.vae_training, keep_best=False))
        with pytest.raises(ValueError, match=r"context\.vae_training\.keep_best was True, now False"):
            recipes.run(recipe, folder, resume=True, progress=False)


class TestWarmStart:
    @pytest.mark.parametrize("system", ["finished", "refined"])
    def test_starts_from_the_network_but_not_from_the_process(self, system, request, tmp_path, monkeypatch):
        folder, model = request.getfixturevalue(system)
        recipe = recipes.from_dict(model.info["recipe"])
        recipe = dataclasses.replace(recipe, vae_training=dataclasses.replace(recipe.vae_training, seed=1))
        began = {}

        def train(objective, *args, **options):
            began[options["description"]] = {name: value.clone() for name, value in objective.module.state_dict().items()}
            return training.train(objective, *args, **options)

        monkeypatch.setattr(stages, "train", train)
        started = recipes.run(recipe, tmp_path / "run", progress=False, warm_start=folder / "model")
        weights = began["stage 2 of 2, diffusion"]
        for name, value in model.diffusion.unet.state_dict().items():
            assert torch.equal(weights[f"unet.{name}"], value)
        if system == "finished":
            assert torch.equal(weights["latent_mean"], started.diffusion.latent_mean)
            assert not torch.equal(weights["latent_mean"], model.diffusion.latent_mean)
        place = str(folder / "model")
        assert started.info["recipe"]["warm_start"] == place and started.info["changes"] is None
        config = json.loads((tmp_path / "run" / "diffusion" / "checkpoint" / "config.json").read_text())
        assert config["context"]["warm_start"] == place
        with pytest.raises(ValueError, match=r"context\.warm_start was '.*', now 'scenes32'"):
            recipes.run(recipe, tmp_path / "run", resume=True, progress=False, warm_start="scenes32")
        monkeypatch.chdir(folder)
        again = recipes.run(recipe, tmp_path / "run", resume=True, progress=False, warm_start="model/../model/.")
        assert same(started.diffusion, again.diffusion)

    def test_a_resumed_run_knows_its_start_and_needs_it_no_more(self, finished, tmp_path):
        given = shutil.copytree(finished[0] / "model", tmp_path / "given")
        started = recipes.run(tiny(), tmp_path / "run", progress=False, warm_start=given)
        shutil.rmtree(given)
        shutil.rmtree(tmp_path / "run" / "model")
        again = recipes.run(tiny(), tmp_path / "run", resume=True, progress=False)
        assert same(started.diffusion, again.diffusion) and again.info["recipe"]["warm_start"] == str(given)
        shutil.rmtree(tmp_path / "run" / "diffusion")
        with pytest.raises(FileNotFoundError, match="given"):
            recipes.run(tiny(), tmp_path / "run", resume=True, progress=False)

    def test_another_shape_is_refused_with_its_fields_before_anything_is_trained(self, finished, tmp_path):
        recipe = tiny()
        recipe = dataclasses.replace(
            recipe, diffusion=dataclasses.replace(recipe.diffusion, base_channels=16, channel_multipliers=(1, 2))
        )
        words = "diffusion.base_channels is 8 there, 16 here; diffusion.channel_multipliers is 1 there, 1 2 here$"
        with pytest.raises(ValueError, match=f"is a network of another shape: {words}"):
            recipes.run(recipe, tmp_path / "run", progress=False, warm_start=finished[0] / "model")
        with pytest.raises(ValueError, match=r"--warm-start takes a DiffusionVAE .* holds a DenoisingMultiBetaVAE"):
            recipes.run(tiny_diffusion_vae(), tmp_path / "run", progress=False, warm_start=finished[0] / "model")
        with pytest.raises(FileNotFoundError, match="shipped: scenes32"):
            recipes.run(tiny(), tmp_path / "run", progress=False, warm_start="scenes33")
        assert not (tmp_path / "run").exists()

    def test_a_shipped_model_keeps_its_name(self):
        recipe = dataclasses.replace(recipes.find("scenes32-small"), warm_start="scenes32")
        recipes.check(recipe)
        assert recipes.located(recipe).warm_start == "scenes32"
        assert recipes.preflight.check_warm_start(recipe) is None
        assert ("warm_start", (None, "scenes32")) in recipes.changes(recipe).items()


class TestWhatIsMeasured:
    def test_is_stored_for_a_resumed_run(self, finished, refined, tmp_path, monkeypatch):
        for folder, recipe in ((finished[0], tiny()), (refined[0], tiny_diffusion_vae(mixture_components=2))):
            shutil.copytree(folder, tmp_path / recipe.model.__name__)
        monkeypatch.setattr(stages.MultiBetaStages, "_watched", None)
        monkeypatch.setattr(DiffusionVAE, "fit_latents", None)
        folder = tmp_path / "DenoisingMultiBetaVAE"
        assert same(recipes.run(tiny(), folder, resume=True, progress=False).vae, finished[1].vae)
        folder, recipe = tmp_path / "DiffusionVAE", tiny_diffusion_vae(mixture_components=2)
        assert same(recipes.run(recipe, folder, resume=True, progress=False).mixture, refined[1].mixture)

    def test_is_measured_anew_of_another_vae(self, finished, tmp_path, monkeypatch):
        shutil.copytree(finished[0] / "vae", tmp_path / "vae")
        shutil.copytree(finished[0] / "vae", tmp_path / "before")
        recipes.run(longer(tiny(), "vae_training", 4), tmp_path, resume=True, progress=False)
        first, second = (checkpoints.load_folder(tmp_path / name / "encodings") for name in ("before", "vae"))
        assert first[1]["key"]["vae"] != second[1]["key"]["vae"]
        assert not torch.equal(first[0]["result"]["encodings"], second[0]["result"]["encodings"])


class TestEncodingsBefore:
    """Stage 2 on f(x, beta) at nodes, of all images before it or of each batch as it comes."""

    def recipe(self, steps):
        recipe = longer(tiny(), "diffusion_training", steps)
        objective = dataclasses.replace(recipe.diffusion_objective, nodes=4, uniform_share=0.2)
        training = dataclasses.replace(recipe.diffusion_training, precision="fp32")
        return dataclasses.replace(recipe, diffusion_objective=objective, diffusion_training=training)

    def test_are_made_where_that_is_less_work(self):
        # 16 images at 5 nodes, or 4 images at 2 nodes a step
        assert [self.recipe(steps).encodes_before(16) for steps in (9, 10)] == [False, True]
        assert not tiny().encodes_before(16)
        assert not self.recipe(10**9).encodes_before(10**7)  # 25 GiB

    @pytest.mark.parametrize("steps", [3, 10])
    def test_the_process_is_that_of_the_table(self, finished, tmp_path, steps, monkeypatch):
        shutil.copytree(finished[0] / "vae", tmp_path / "vae")
        recipe = self.recipe(steps)
        model = recipes.run(recipe, tmp_path, resume=True, progress=False)
        images = data.to_float(recipes.open_data(recipe)[0].images(range(16)))
        nodes = table_nodes(50, 4)
        table = torch.stack([model.vae.encode(images, float(node) / 50) for node in nodes], dim=1)
        for name, expected in zip(
            ("latent_mean", "latent_deviation", "velocity_rms"), table_statistics(table, nodes), strict=True
        ):
            torch.testing.assert_close(getattr(model.diffusion, name), expected, rtol=1e-2, atol=1e-3)
        assert not (tmp_path / "diffusion" / "encodings").exists()
        monkeypatch.setattr(stages, "encoding_table", None)  # a finished run needs none
        again = recipes.run(recipe, tmp_path, resume=True, progress=False)
        assert same(again.diffusion, model.diffusion)

    def test_mirror_images_are_measured_as_well(self, finished, tmp_path, caplog):
        caplog.set_level("INFO")
        recipe = self.recipe(3)
        objective = dataclasses.replace(recipe.diffusion_objective, statistics_images=8)
        recipe = dataclasses.replace(
            recipe, diffusion_objective=objective, diffusion=dataclasses.replace(recipe.diffusion, basis="cosine")
        )
        images = data.Mirrored(recipes.open_data(recipe)[0])
        diffusion = recipes.build(recipe)[1]
        measured = stages.MultiBetaStages(recipe, images, [], tmp_path, progress=False)._statistics(finished[1].vae, diffusion)
        nodes, chosen = table_nodes(50, 4), data.to_float(images.images(range(0, 32, 4)))
        table = torch.stack([finished[1].vae.encode(chosen, float(node) / 50) for node in nodes], dim=1)
        expected = table_statistics(diffusion.as_measured(table), nodes)[0]
        torch.testing.assert_close(measured["latent_mean"], expected, rtol=1e-2, atol=1e-3)
        assert "each batch is encoded as it comes" in caplog.text

    def test_an_interrupted_run_goes_on_bitwise(self, finished, tmp_path, monkeypatch):
        whole, parted = (tmp_path / name for name in ("whole", "parted"))
        for place in (whole, parted):
            shutil.copytree(finished[0] / "vae", place / "vae")
        model = recipes.run(self.recipe(10), whole, resume=True, progress=False)

        def stop(step, module):
            if step >= 6:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(stages.MultiBetaStages, "draw_model", lambda self, model, path: stop(int(path.stem[-6:]), model))
            recipes.run(self.recipe(10), parted, resume=True, progress=False)
        assert (parted / "diffusion" / "encodings").exists() and steps_in(parted, "diffusion") < 10
        again = recipes.run(self.recipe(10), parted, resume=True, progress=False)
        assert same(again.diffusion, model.diffusion)


class TestWords:
    def test_say_which_training_it_is_and_where_its_picture_is(self, tmp_path, caplog):
        caplog.set_level("INFO")
        recipe = dataclasses.replace(tiny(), vae_training=dataclasses.replace(tiny().vae_training, validate_every=1))
        recipes.run(recipe, tmp_path, progress=False)
        assert "stage 1 of 2, VAE: 3 steps, then stage 2 (3 steps)" in caplog.text
        assert "stage 2 of 2, diffusion: 3 steps" in caplog.text
        assert caplog.text.count("and more of them to come") == 2
        assert f"after step 1: {tmp_path / 'vae' / 'reconstructions-000001.png'}, and" in caplog.text

    def test_on_the_time_left_hold_for_the_whole_run(self, tmp_path):
        recipe = dataclasses.replace(tiny(), vae_objective=dataclasses.replace(tiny().vae_objective, untie_steps=100))
        whole = stages.MultiBetaStages(recipe, [], [], tmp_path, whole=True)
        assert whole._outlook("vae")(20, 0.5) == "01:00 + stage 2 (3 steps)"  # the curves are untied at the same pace
        assert whole._outlook("vae-untied")(20, 0.5) == "00:10 + stage 2 (3 steps)"
        assert whole._outlook("vae")(20, None) == "? + stage 2 (3 steps)"
        assert whole._outlook("diffusion") is None  # which its own bar says
        planned = dataclasses.replace(whole, planned_seconds={"diffusion": 600.0})
        assert planned._outlook("vae")(20, 0.5) == "11:00 with stage 2" and planned._outlook("vae")(20, None) == "? with stage 2"
        assert dataclasses.replace(planned, recipe=tiny())._outlook("vae")(20, 0.5) == "10:10 with stage 2"
        assert dataclasses.replace(whole, whole=False)._outlook("vae") is None


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
