"""The third training: a flow map of a trained model, alone, as a stage of a recipe, and from a shell."""

import copy
import dataclasses
import json
import logging
import shutil

import pytest
import torch
from test_pipelines_flow_map import awake
from torch import nn

import multibeta
from multibeta import checkpoints, files, recipes
from multibeta.diffusion_vae import ConditionalSpans
from multibeta.pipelines import DenoisingMultiBetaVAE, load_pretrained
from multibeta.recipes import DistillationOptions, distillation
from tiny_recipes import tiny, tiny_latent_diffusion

QUICK = DistillationOptions(
    steps=6,
    batch_size=6,
    precision="fp32",
    validate_every=4,
    checkpoint_every=3,
    trajectory_steps=4,
    uses=2,
    pool=16,
    held_out=4,
    chunk=8,
    span_channels=16,
)


@pytest.fixture(scope="module", params=["model", "refiner"])
def teacher(request):
    """A small model of each system, whose network listens to its time."""
    model = copy.deepcopy(request.getfixturevalue(request.param))
    awake(model.diffusion)
    return model


def distill(teacher, folder, options=QUICK, **others):
    """A flow map of a copy, and that copy."""
    model = copy.deepcopy(teacher)
    with multibeta.backend("reference"):  # two engines may measure, and so round, differently
        return recipes.distill(model, folder, options, progress=False, **others), model


def of_a_gaussian(teacher):
    """What the network of a teacher returns where images are Gaussian."""
    if isinstance(teacher, DenoisingMultiBetaVAE):
        return lambda read, times: torch.zeros_like(read).repeat(1, 2, 1, 1)
    spans = ConditionalSpans(teacher.diffusion, 0.5)
    scale = (spans.noise / spans.total**2).float()
    return lambda read, steps: scale[steps + 1, None, None, None] * read[:, :3]


def same(first, second):
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def scalars(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    return folder, *distill(teacher, folder)


class TestDistill:
    def test_leaves_a_model_with_a_map_and_nothing_else_changed(self, teacher, finished):
        _, flow_map, model = finished
        assert model.flow_map is flow_map and not flow_map.training
        assert not any(parameter.requires_grad for parameter in flow_map.parameters())
        assert same(model.vae, teacher.vae) and same(model.diffusion, teacher.diffusion)
        assert flow_map.unet.span_layers[-1].weight.any()  # it starts at zero
        assert flow_map.config.span_channels == 16 and flow_map.config.num_steps == model.num_steps
        assert flow_map.unet.conv_in.weight.is_contiguous()
        assert model.generate(2, "map", 1).isfinite().all()

    def test_the_map_has_the_averaged_weights(self, finished):
        folder, flow_map, _ = finished
        weights, _ = checkpoints.load_folder(folder / "checkpoint")
        assert all(torch.equal(value, weights["ema"][name]) for name, value in flow_map.state_dict().items())
        assert not torch.equal(weights["ema"]["unet.conv_out.weight"], weights["module"]["unet.conv_out.weight"])

    def test_leaves_pictures_and_measurements(self, finished):
        folder, _, _ = finished
        for step in (4, 6):
            assert (folder / f"samples-{step:06}.png").stat().st_size > 0
        seen, unseen, ratio = (scalars(folder, f"validation/{name}") for name in ("seen", "unseen", "ratio"))
        assert len(ratio) == len(scalars(folder, "validation/loss")) == 2 and min(seen) > 0
        assert ratio == pytest.approx([far / near for near, far in zip(seen, unseen, strict=True)])

    def test_the_second_system_knows_how_far_its_residuals_reach(self, finished):
        _, flow_map, model = finished
        if isinstance(model, DenoisingMultiBetaVAE):
            assert flow_map.config.deviation == 1.0
            return
        with multibeta.backend("reference"):
            ends = model.trajectories(torch.arange(64), torch.Generator().manual_seed(0), 4).latents[-1]
        assert flow_map.config.deviation == pytest.approx(float(ends.std()), rel=0.2)  # of other steps

    def test_an_interrupted_training_goes_on_exactly(self, teacher, finished, tmp_path, monkeypatch):
        look = distillation.look

        def fail(*arguments):
            raise RuntimeError("no more disk")

        monkeypatch.setattr(distillation, "look", fail)
        with pytest.raises(RuntimeError, match="no more disk"):
            distill(teacher, tmp_path)
        assert checkpoints.load_config(tmp_path / "checkpoint")["step"] == 3
        monkeypatch.setattr(distillation, "look", look)
        flow_map, _ = distill(teacher, tmp_path, resume=True)
        assert same(flow_map, finished[1])

    def test_a_finished_training_is_read_back(self, teacher, finished):
        folder, flow_map, _ = finished
        assert same(distill(teacher, folder, resume=True)[0], flow_map)
        with pytest.raises(FileExistsError):
            distill(teacher, folder)

    def test_a_finished_training_takes_more_steps(self, teacher, finished, tmp_path):
        shutil.copytree(finished[0], tmp_path / "run")
        longer = dataclasses.replace(QUICK, steps=7)
        flow_map, _ = distill(teacher, tmp_path / "run", longer, resume=True)
        assert not same(flow_map, finished[1])
        assert checkpoints.load_config(tmp_path / "run" / "checkpoint")["step"] == 7
        with pytest.raises(ValueError, match="has 7 finished steps, more than the 6 that are asked for"):
            distill(teacher, tmp_path / "run", resume=True)

    def test_another_teacher_or_other_options_are_refused(self, teacher, finished):
        other = copy.deepcopy(teacher)
        nn.init.normal_(other.diffusion.unet.conv_out.bias)
        with pytest.raises(ValueError, match=r"context\.teacher was"):
            distill(other, finished[0], resume=True)
        with pytest.raises(ValueError, match=r"context\.uses was 2, now 3"):
            distill(teacher, finished[0], dataclasses.replace(QUICK, uses=3), resume=True)

    def test_after_an_error_the_model_has_the_map_it_had(self, finished, tmp_path, monkeypatch):
        _, before, model = finished
        expected = model.generate(2, "map", 2)
        monkeypatch.setattr(distillation, "look", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recipes.distill(model, tmp_path / "again", QUICK, progress=False)
        assert model.flow_map is before and torch.equal(model.generate(2, "map", 2), expected)
        model = copy.deepcopy(model)
        model.flow_map = None
        with pytest.raises(ZeroDivisionError):
            recipes.distill(model, tmp_path / "first", QUICK, progress=False)
        assert model.flow_map is None

    def test_a_folder_in_use_is_refused_before_any_work(self, teacher, tmp_path, monkeypatch):
        monkeypatch.setattr(distillation.Starts, "fill", lambda *_, **__: pytest.fail("trajectories were made"))
        with files.occupy(tmp_path, "training in"), pytest.raises(FileExistsError, match=r"is in use: .* is training in it"):
            distill(teacher, tmp_path)

    def test_the_seed_decides(self, teacher, tmp_path):
        options = [dataclasses.replace(QUICK, steps=1, seed=seed) for seed in (0, 1)]
        first, second = (distill(teacher, tmp_path / str(each.seed), each)[0] for each in options)
        assert not same(first, second)

    def test_the_error_falls(self, teacher, tmp_path):
        """A network that must unlearn what it returns: its teacher is a Gaussian, whose heads over spans are almost zero."""
        teacher, errors = copy.deepcopy(teacher), []
        teacher.diffusion.unet.forward = of_a_gaussian(teacher)
        for steps in (1, 30):
            options = dataclasses.replace(QUICK, steps=steps, validate_every=30, uses=8, learning_rate=0.03, ema_decay=0.8)
            distill(teacher, tmp_path / str(steps), options)
            errors += scalars(tmp_path / str(steps), "validation/unseen")
        assert len(errors) == 2 and errors[1] < 0.7 * errors[0], errors

    def test_the_memory_of_trajectories_is_bounded(self, teacher, caplog, monkeypatch):
        caplog.set_level(logging.INFO)
        options = dataclasses.replace(QUICK, steps=20, pool=100, held_out=8)  # in chunks of 8
        assert distillation.pool_size(options, teacher) == 104 and not caplog.records
        kept = 2 * 5 if hasattr(teacher.diffusion, "spans") else 5 + 1  # latents and noise of five places, or with the sketch
        each = 4 * kept * torch.Size(teacher.walked_shape).numel()
        monkeypatch.setattr(distillation, "LARGEST_POOL", 20 * each)
        assert distillation.pool_size(options, teacher) == 24 and "20 trajectories are kept, not 100" in caplog.text
        monkeypatch.setattr(distillation, "LARGEST_POOL", 0)
        assert distillation.pool_size(options, teacher) == 8  # a batch of 6

    def test_a_short_training_keeps_no_more_than_it_takes_and_goes_on_with_these(self, teacher, tmp_path):
        short, longer = (dataclasses.replace(QUICK, steps=steps, pool=1000) for steps in (4, 9))
        assert [distillation.pool_size(each, teacher) for each in (short, longer)] == [24, 56]
        assert distillation.pool_size(dataclasses.replace(longer, steps=167), teacher) == 1000
        distill(teacher, tmp_path, short)
        distill(teacher, tmp_path, longer, resume=True)
        said = checkpoints.load_config(tmp_path / "checkpoint")
        assert (said["step"], said["dataset_size"]) == (9, 24)


class TestRefusals:
    """What no flow map can be learned of is said before anything is written."""

    def refuse(self, model, folder, message, options=QUICK):
        with pytest.raises(ValueError, match=message):
            recipes.distill(model, folder / "run", options, progress=False)
        assert not (folder / "run").exists()

    def test_models(self, model, latent, baseline, tmp_path):
        literal, foreign = copy.deepcopy(model), copy.deepcopy(model)
        literal.diffusion.config = dataclasses.replace(model.diffusion.config, parameterization="literal")
        foreign.diffusion.unet = nn.Conv2d(4, 8, 1)
        self.refuse(literal, tmp_path, 'heads in units of one, which parameterization "literal" has not')
        self.refuse(foreign, tmp_path, "a UNet of multibeta, the network is a Conv2d")
        for other in (latent, baseline):
            self.refuse(other, tmp_path, f"a DenoisingMultiBetaVAE or a DiffusionVAE, got a {type(other).__name__}")

    def test_options(self, model, tmp_path):
        self.refuse(model, tmp_path, "steps must be at least 1 to train a flow map, got 0", DistillationOptions())
        guided = dataclasses.replace(QUICK, guidance=0.5)
        self.refuse(model, tmp_path, "guidance is of a DiffusionVAE, got 0.5 for a DenoisingMultiBetaVAE", guided)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("steps", -1), ("batch_size", 0), ("uses", 0), ("pool", 0), ("held_out", 0), ("chunk", 0), ("span_channels", 0)),
            *(("trajectory_steps", 1), ("guidance", float("nan")), ("learning_rate", -1.0), ("shares", (1.0, 1.0, 0.0, 0.0))),
            *(("precision", "fp8"), ("validate_every", 0)),
        ],
    )
    def test_numbers_that_cannot_be(self, name, value):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(QUICK, **{name: value})

    def test_recipes(self, tmp_path):
        literal = dataclasses.replace(tiny().diffusion, parameterization="literal")
        for recipe, message in (
            (tiny_latent_diffusion(), "--flow-map.steps must be 0 for a LatentDiffusion"),
            (dataclasses.replace(tiny(), diffusion=literal), "--flow-map.steps must be 0 with .* literal"),
        ):
            with pytest.raises(ValueError, match=message):
                recipes.run(dataclasses.replace(recipe, flow_map=QUICK), tmp_path / "run", progress=False)
        assert not (tmp_path / "run" / "vae").exists()


class TestStage:
    def test_a_finished_run_gets_a_map_and_an_interrupted_one_goes_on(self, tmp_path, monkeypatch):
        assert recipes.run(tiny(), tmp_path, progress=False).flow_map is None
        recipe, look = dataclasses.replace(tiny(), flow_map=dataclasses.replace(QUICK, steps=4)), distillation.look
        monkeypatch.setattr(distillation, "look", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recipes.run(recipe, tmp_path, progress=False, resume=True)
        assert load_pretrained(tmp_path).flow_map is None
        assert checkpoints.load_config(tmp_path / "flow_map" / "checkpoint")["step"] == 4
        monkeypatch.setattr(distillation, "look", look)
        model = recipes.run(recipe, tmp_path, progress=False, resume=True)
        loaded = load_pretrained(tmp_path)
        assert isinstance(loaded, DenoisingMultiBetaVAE) and same(loaded.flow_map, model.flow_map)
        assert recipes.from_dict(loaded.info["recipe"]) == recipe and loaded.info["flow_map"]["steps"] == 4
        with pytest.raises(FileExistsError):
            recipes.run(recipe, tmp_path, progress=False)


class TestCommand:
    FLAGS = (
        *("--steps", "3", "--batch-size", "6", "--precision", "fp32", "--trajectory-steps", "4"),
        *("--pool", "16", "--held-out", "4", "--chunk", "8", "--span-channels", "16"),
    )

    def test_trains_saves_and_refuses_what_is_there(self, model, tmp_path, capsys, picture_size):
        main = pytest.importorskip("multibeta.cli", exc_type=ImportError).main
        model.save_pretrained(tmp_path / "teacher")
        arguments = ["distill", str(tmp_path / "teacher"), "--out", str(tmp_path / "run"), *self.FLAGS]
        assert main(arguments) == 0
        assert f"multibeta sample {tmp_path / 'run' / 'model'} --sampler map --steps 1" in capsys.readouterr().out
        made = load_pretrained(tmp_path / "run")
        assert made.flow_map is not None and made.info["recipe"] == "none"
        assert made.info["flow_map"]["steps"] == 3
        assert same(made.diffusion, model.diffusion)
        assert main(arguments) == 2
        assert "pass --resume to go on with its training, or choose another --out" in capsys.readouterr().err
        assert main([*arguments, "--resume"]) == 0 and same(load_pretrained(tmp_path / "run").flow_map, made.flow_map)
        out = tmp_path / "samples.png"
        assert main(["sample", str(tmp_path / "run"), "--sampler", "map", "--steps", "1", "--out", str(out)]) == 0
        assert picture_size(out)

    def test_paths_that_were_chosen_stay_where_nothing_was_left_to_train(self, model, tmp_path, monkeypatch, capsys):
        main = pytest.importorskip("multibeta.cli", exc_type=ImportError).main
        model.save_pretrained(tmp_path / "model")
        arguments = ["distill", str(tmp_path / "model"), "--out", str(tmp_path / "run"), "--steps", "2", "--batch-size", "4"]
        arguments += ["--pool", "8", "--chunk", "4", "--held-out", "4", "--trajectory-steps", "4", "--span-channels", "8"]

        def choose(model, images):
            model.flow_map.config = dataclasses.replace(model.flow_map.config, paths=((7,),))
            return True

        def stop(model, images):
            raise KeyboardInterrupt

        monkeypatch.setattr("multibeta.cli.distillation.evaluation.choose_recorded_paths", stop)
        assert main(arguments) == 130
        assert "with its evaluations at equal steps: --resume chooses better" in capsys.readouterr().err
        assert load_pretrained(tmp_path / "run" / "model").flow_map.config.paths == ()
        assert main([*arguments, "--resume", "--path-images", "0"]) == 0  # chooses none
        assert load_pretrained(tmp_path / "run" / "model").flow_map.config.paths == ()
        monkeypatch.setattr("multibeta.cli.distillation.evaluation.choose_recorded_paths", choose)
        assert main([*arguments, "--resume"]) == 0
        monkeypatch.setattr("multibeta.cli.distillation.evaluation.choose_recorded_paths", stop)
        assert main([*arguments, "--resume"]) == 0 and "nothing was left to train" in capsys.readouterr().out
        assert load_pretrained(tmp_path / "run" / "model").flow_map.config.paths == ((7,),)

    def test_stopped_before_the_first_step_it_says_how_to_go_on(self, model, tmp_path, monkeypatch, capsys):
        main = pytest.importorskip("multibeta.cli", exc_type=ImportError).main
        model.save_pretrained(tmp_path / "model")
        arguments = ["distill", str(tmp_path / "model"), "--out", str(tmp_path / "run"), *self.FLAGS, "--path-images", "0"]

        def stop(*arguments, **options):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(distillation.Starts, "fill", stop)
            assert main(arguments) == 130
        assert "the same command with --resume goes on" in capsys.readouterr().err and not (tmp_path / "run").exists()
        assert main([*arguments, "--resume"]) == 0 and load_pretrained(tmp_path / "run").flow_map is not None

    def test_a_second_run_in_the_folder_is_refused_while_paths_are_chosen(self, model, tmp_path, monkeypatch, error_of):
        main, said = pytest.importorskip("multibeta.cli", exc_type=ImportError).main, []
        model.save_pretrained(tmp_path / "model")
        arguments = ["distill", tmp_path / "model", "--out", tmp_path / "run", *self.FLAGS]

        def choose(model, images):
            said.append(error_of(*arguments, "--resume"))
            return False

        monkeypatch.setattr("multibeta.cli.distillation.evaluation.choose_recorded_paths", choose)
        assert main([*map(str, arguments)]) == 0
        assert len(said) == 1 and "is distilling in it" in said[0]

    @pytest.mark.parametrize("images", [31, -1])
    def test_paths_are_not_chosen_on_a_handful_of_images(self, model, tmp_path, error_of, images):
        model.save_pretrained(tmp_path / "teacher")
        said = error_of("distill", tmp_path / "teacher", "--out", tmp_path / "run", f"--path-images={images}", *self.FLAGS)
        assert f"path_images must be 0 or at least 32, got {images}" in said and not (tmp_path / "run").exists()

    def test_refuses_a_model_that_has_no_walks(self, latent, tmp_path, error_of):
        latent.save_pretrained(tmp_path / "teacher")
        said = error_of("distill", tmp_path / "teacher", "--out", tmp_path / "run", *self.FLAGS)
        assert "distill needs a DenoisingMultiBetaVAE or a DiffusionVAE" in said and not (tmp_path / "run").exists()
