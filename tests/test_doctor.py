"""A run is examined: a sound one gets its few numbers, one that is broken in a known way the words for it."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch

from multibeta import checkpoints, data, doctor, recipes
from multibeta.cli import main
from multibeta.doctor import OF_MODELS, examine, measure
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.pipelines import DenoisingMultiBetaVAE, load_pretrained
from multibeta.recipes.recipe import record
from multibeta.recipes.stages import MultiBetaStages
from tiny_recipes import tiny, tiny_diffusion_vae, tiny_latent_diffusion


def recipe(**objective):
    """Small and short, and yet trained well enough: 16x16 scenes, half a minute."""
    training = {"batch_size": 16, "warmup_steps": 20, "validate_every": 75, "log_every": 10, "ema_decay": 0.98}
    training |= {"precision": "fp32", "learning_rate": 5e-3}
    base, objective = tiny(), {"balance": 2.0, "curve_learning_rate": 15.0} | objective
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, num_train=512, num_test=64),
        vae=dataclasses.replace(base.vae, base_channels=16, channel_multipliers=(1, 1)),
        vae_objective=dataclasses.replace(base.vae_objective, **objective),
        vae_training=dataclasses.replace(base.vae_training, **training | {"steps": 220}),
        diffusion=dataclasses.replace(base.diffusion, base_channels=16),
        diffusion_objective=dataclasses.replace(base.diffusion_objective, statistics_images=100),
        diffusion_training=dataclasses.replace(base.diffusion_training, **training | {"steps": 150}),
    )


def trained(recipe, folder):
    """The folder of a run of both stages, without what `recipes.run` measures at its end."""
    folder.mkdir(exist_ok=True)
    record(recipe, folder)
    stages = MultiBetaStages(recipe, *recipes.open_data(recipe), folder, progress=False, measures=False)
    stages.train_diffusion(stages.train_vae())
    return folder


def interrupted(run, folder, *, done, steps):
    """A run whose stage 1 knows nothing yet, after as many steps as are `done`, examined."""
    shutil.rmtree(folder / "vae", ignore_errors=True)
    shutil.copytree(run / "vae", folder / "vae")
    shutil.copy(run / "recipe.json", folder)
    (folder / "vae" / "metrics.jsonl").write_text(json.dumps({"step": done, "loss": 1.0}) + "\n")
    states, config = checkpoints.load_folder(folder / "vae" / "checkpoint")
    head = states["ema"]["decoder.conv_out.weight"]
    states["ema"] |= {"decoder.conv_out.weight": 0 * head}  # grey images
    config |= {"step": done, "options": config["options"] | {"steps": steps, "warmup_steps": 0}}
    checkpoints.save_folder(folder / "vae" / "checkpoint", states, config)
    return examine(folder)


def with_steps(recipe, steps):
    """The recipe with so many steps of each stage."""
    trainings = {name: dataclasses.replace(getattr(recipe, name), steps=steps) for name in ("vae_training", "diffusion_training")}
    return dataclasses.replace(recipe, **trainings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(recipe(), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def sound(run):
    return load_pretrained(run / "model")


@pytest.fixture(scope="module")
def images():
    return data.to_float(recipes.open_data(recipe())[1].images(range(40)))


@pytest.fixture
def changed(sound):
    """A copy of the sound model, to be broken."""
    return copy.deepcopy(sound)


def names(model, images, **options):
    """What is wrong, by the diagnoses that say so."""
    measured = measure(model, images, **options)
    return [diagnose.__name__ for diagnose in OF_MODELS if diagnose(measured)]


def says_more_steps(finding):
    """Whether what is advised are more steps, and these alone, so that a training that goes on is not told."""
    return finding.undertrained and "--resume with more --vae-training.steps" in finding.advice and "lower" not in finding.advice


def scale_latents(vae, factor):
    """The same function of images, with latents that are larger by a factor."""
    with torch.no_grad():
        vae.encoder.conv_out.weight.mul_(factor)
        vae.encoder.conv_out.bias.mul_(factor)
        vae.decoder.conv_in.weight.div_(factor)


class TestSound:
    def test_a_sound_run_is_told_so_with_its_numbers(self, run, capsys):
        assert main(["doctor", str(run)]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "nothing is wrong"
        shown = [line.split()[0] for line in said[2:]]
        assert shown == ["reconstruction", "sigma", "f(x,", "heads", "vae", "diffusion"]
        assert "220 of 220 steps" in said[-2] and "held-out loss" in said[-1]

    def test_so_is_its_model_alone(self, run, images):
        examination = examine(run / "model")
        assert examination.healthy and [log.name for log in examination.logs] == ["vae", "diffusion"]  # of the run around it

    def test_a_run_in_its_first_stage_is_measured_by_its_checkpoint(self, run, tmp_path):
        shutil.copytree(run / "vae", tmp_path / "vae")
        shutil.copy(run / "recipe.json", tmp_path)
        whole, part = examine(run), examine(tmp_path)
        assert part.healthy and part.measured.heads == [] and [log.name for log in part.logs] == ["vae"]
        assert part.notes == ["diffusion has not begun: --resume goes on"] and "nothing is wrong so far" in str(part)
        assert part.measured.mse == pytest.approx(whole.measured.mse, rel=0.05)  # but for the best weights, and the fold

    def test_a_model_of_before_stage_one_went_on_is_not_measured(self, run, tmp_path):
        folder = shutil.copytree(run, tmp_path / "run")
        shutil.rmtree(folder / "diffusion")
        going_on = interrupted(run, folder, done=400, steps=900)  # grey images
        assert going_on.measured.mse > 0.9 * going_on.measured.variance and not going_on.measured.heads
        assert any("model is of before stage 1 went on" in note for note in going_on.notes)

    def test_too_few_steps_are_no_fault_of_a_training_that_goes_on(self, run, tmp_path, capsys):
        interrupted(run, tmp_path, done=40, steps=3000)
        assert main(["doctor", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert said.startswith("vae: 40 of 3000 steps are done: --resume goes on\n\nnothing is wrong so far")
        short = interrupted(run, tmp_path, done=40, steps=40)
        assert "it underfits" in {finding.name for finding in short.findings}

    def test_a_training_without_a_checkpoint_is_not_called_sound(self, tmp_path, capsys):
        (tmp_path / "vae").mkdir()
        record(recipe(), tmp_path)
        (tmp_path / "vae" / "metrics.jsonl").write_text('{"step": 20, "loss": 1.0}\n')
        assert main(["doctor", str(tmp_path)]) == 1
        said = capsys.readouterr().out
        assert "vae: it is not finished and has no checkpoint\n  seen  20 of 220 steps" in said and "--resume begins it" in said

    def test_of_images_that_only_python_has_the_logs_alone_are_read(self, tmp_path):
        images = data.Subset(data.Scenes(16), range(24))
        recipes.run(tiny(), tmp_path, dataset=images, progress=False)
        examination = examine(tmp_path)
        assert examination.measured is None and [log.name for log in examination.logs] == ["vae", "diffusion"]
        assert examination.notes == [
            "its logs alone are read: the model is of a dataset: Subset, which only Python has; --data names images"
        ]
        assert examine(tmp_path, images).measured is not None

    def test_what_it_measures_is_what_the_evaluation_measures(self, sound, images):
        from multibeta.evaluation import head_fit

        measured = measure(sound, images)
        assert measured.heads == head_fit(sound, images)
        assert measured.facts["deviation_zero"]["value"] == measured.rows[0]["encoding_deviation"]
        at = measured.equal_beta
        below = max((row for row in measured.rows if row["beta"] <= at), key=lambda row: row["beta"])
        assert below["encoding_deviation"] >= below["sigma"]

    @pytest.mark.parametrize("other", [tiny_latent_diffusion, tiny_diffusion_vae])
    def test_other_systems_are_examined_by_their_logs_and_reconstructions(self, other, tmp_path):
        recipes.run(other(), tmp_path, progress=False)
        examination = examine(tmp_path)
        assert examination.measured.rows == [] and examination.measured.mse > 0
        assert {"posterior collapse", "it underfits"} & {finding.name for finding in examination.findings}  # after three steps


class TestBroken:
    def test_posterior_collapse(self, images, tmp_path):
        short = with_steps(recipe(balance=1e-4, anneal=0.0), 20)
        vae = recipes.train_vae(short, *recipes.open_data(short), tmp_path, progress=False)
        model = DenoisingMultiBetaVAE(vae, recipes.build(short)[1])
        assert "posterior_collapse" in names(model, images, second_stage=False)
        measured = measure(model, images, second_stage=False)
        done = dataclasses.replace(measured, options={"balance": 2.0, "anneal": 1.0}, network={"activation": "silu"})
        advice = "raise --vae-objective.balance (now 2.0), or lower --vae-training.learning-rate"
        assert doctor.of_models.posterior_collapse(done).advice == advice

    def test_an_end_that_is_not_the_prior(self, images, changed):
        free = MultiBetaVAE(dataclasses.replace(changed.vae.config, collapse_exponent=None))
        free.load_state_dict(changed.vae.state_dict())  # as Eq. 3 prints it
        changed.vae = free.eval()
        assert "prior_not_reached" in names(changed, images)
        measured = measure(changed, images)
        finding = doctor.of_models.prior_not_reached(dataclasses.replace(measured, options={"balance": 2.0}))
        assert finding.advice == "pin it by --vae.collapse-exponent 8"
        pinned = dataclasses.replace(measured, options={"balance": 2.0}, network={"collapse_exponent": 8.0})
        assert says_more_steps(doctor.of_models.prior_not_reached(pinned))

    def test_a_sigma_that_stays_where_it_should_rise(self, images, changed):
        with torch.no_grad():
            changed.vae.sigma.raw_increments[10:12] = -200.0
            changed.diffusion.sigmas.copy_(changed.vae.sigmas())
        assert "sigma_not_rising" in names(changed, images)

    def test_an_encoder_that_oscillates_in_beta(self, images, changed):
        for network in (changed.vae.encoder, changed.vae.decoder):
            network.embedding.max_frequency = 5000.0
        assert "rough_encoder" in names(changed, images)
        measured = measure(changed, images)
        fast = dataclasses.replace(measured, network=measured.network | {"embedding_max_frequency": 5000.0})
        assert doctor.of_models.rough_encoder(fast).advice == "lower --vae.embedding-max-frequency, to 94.2 or less"
        assert says_more_steps(doctor.of_models.rough_encoder(measured))  # where it is as low already

    @pytest.mark.parametrize(("factor", "word"), [(0.2, "low"), (20.0, "high")])
    def test_a_balance_that_is_off(self, images, changed, factor, word):
        scale_latents(changed.vae, factor)
        measured, verb = measure(changed, images), {"low": "raise", "high": "lower"}[word]
        off, mended = {"low": (0.1, 1.0), "high": (None, 4.0)}[word]
        for options in ({}, {"balance": off}):
            finding = doctor.of_models.balance_off(dataclasses.replace(measured, options=options))
            assert word in finding.name and finding.advice.startswith(f"{verb} --vae-objective.balance")
        finding = doctor.of_models.balance_off(dataclasses.replace(measured, options={"balance": mended}))
        assert says_more_steps(finding) and "balance" not in finding.name

    def test_a_second_head_that_is_trained_as_printed(self, images, run, tmp_path):
        literal = with_steps(recipe(), 40)
        literal = dataclasses.replace(literal, diffusion=dataclasses.replace(literal.diffusion, parameterization="literal"))
        vae, parts = load_pretrained(run / "model").vae, recipes.open_data(literal)
        model = recipes.train_diffusion(literal, vae, *parts, tmp_path, progress=False, measures=False)
        assert names(model, images) == ["delta_starved"]
        starved = measure(model, images)
        assert "--diffusion.parameterization" in doctor.of_models.delta_starved(starved).advice
        known = dataclasses.replace(starved, parameterization="v", steps={"diffusion": 40})
        assert doctor.of_models.delta_starved(known).advice == "--resume with more --diffusion-training.steps (now 40)"

    def test_a_stage_two_of_another_stage_one(self, images, changed):
        with torch.no_grad():
            changed.vae.sigma.raw_increments.add_(0.5)
        assert "other_process" in names(changed, images)

    def test_a_stage_one_that_was_stopped_early_is_told_with_what_follows(self, tmp_path):
        findings = examine(trained(with_steps(recipe(), 8), tmp_path)).findings
        assert {finding.where for finding in findings if finding.undertrained} == {
            "vae"
        }  # what stage 2 lacks is known when it learns from a better one
        (finding,) = (each for each in findings if each.name == "it underfits")
        assert finding.advice.startswith(
            "delete the folder diffusion of the run, or choose another folder, then --resume with more --vae-training.steps "
            "(now 8): stage 2 has to be trained anew on it"
        )


class TestCommand:
    def test_a_broken_run_ends_with_status_one_and_says_what_to_do(self, run, tmp_path, capsys):
        shutil.copytree(run, tmp_path / "run")
        log = tmp_path / "run" / "diffusion" / "metrics.jsonl"
        records = [json.loads(line) | {"data_seconds_share": 0.9} for line in log.read_text().splitlines()]
        records = [record | {"seconds": 10 * record["seconds"] + 200} if "seconds" in record else record for record in records]
        log.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert main(["doctor", str(tmp_path / "run")]) == 1
        said = capsys.readouterr().out
        assert "diffusion: it waits for images\n  seen  of the seconds" in said
        assert "\n  do    --diffusion-training.num-workers 2" in said

    def test_other_images_may_be_named(self, run, capsys):
        assert main(["doctor", str(run), "--data", "scenes", "--num-images", "20"]) == 0

    def test_where_nothing_is_it_says_so(self, tmp_path, error_of):
        assert "neither a model nor the log of a training" in error_of("doctor", str(tmp_path))
        assert "no shipped model of that name" in error_of("doctor", "nothing")
