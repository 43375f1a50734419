"""The last training: the decoder of a trained model against a discriminator, alone, in a recipe, and from a shell."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch

from multibeta import checkpoints, data, recipes
from multibeta.adversarial import ADAM_BETAS, AdversarialObjective, AdversarialOptions
from multibeta.multibeta_vae import MultiBetaObjective
from multibeta.pipelines import load_pretrained
from multibeta.recipes import DecoderTuningOptions, decoder_tuning, preflight
from tiny_recipes import tiny, tiny_diffusion_vae, tiny_latent_diffusion

QUICK = DecoderTuningOptions(
    steps=6,
    batch_size=4,
    precision="fp32",
    validate_every=4,
    checkpoint_every=3,
    discriminator_layers=1,
    discriminator_channels=4,
)
SCENES = data.Scenes(16)
TRAIN, TEST = data.Subset(SCENES, range(0, 480_000, 30_000)), data.Subset(SCENES, range(7, 480_000, 60_000))


def tune(model, folder, options=QUICK, **others):
    """A copy whose decoder is tuned."""
    tuned = copy.deepcopy(model)
    recipes.tune_decoder(tuned, TRAIN, TEST, folder, options, progress=False, **others)
    return tuned


def same(first, second):
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    return folder, tune(model, folder)


class TestTuning:
    def test_changes_the_decoder_alone(self, model, finished):
        folder, tuned = finished
        assert not same(tuned.vae.decoder, model.vae.decoder) and same(tuned.diffusion, model.diffusion)
        for part in ("encoder", "sigma", "decoder_sigma"):
            assert same(getattr(tuned.vae, part), getattr(model.vae, part))
        assert not any(parameter.requires_grad for parameter in tuned.vae.parameters()) and not tuned.vae.training
        assert tuned.info["decoder_tuning"] == dataclasses.asdict(QUICK) and "decoder_tuning" not in model.info
        assert same(tuned.vae.decoder, loaded(folder / "checkpoint", "ema", tuned.vae.decoder))

    def test_leaves_pictures_and_what_a_doctor_reads(self, finished):
        folder, _ = finished
        for step in (4, 6):
            assert (folder / f"reconstructions-{step:06}.png").stat().st_size > 0
        last = {name for line in lines(folder) for name in line}
        assert last >= {"discriminator_loss", "discriminator_real", "discriminator_fake"}
        assert last >= {"adversarial_weight", "adversarial_loss", "validation/sharpness", "validation/sharpness_before"}
        assert {"opponent", "opponent_optimizer"} <= checkpoints.load_folder(folder / "checkpoint")[0].keys()

    def test_an_interrupted_tuning_goes_on_exactly(self, model, finished, tmp_path, monkeypatch):
        look = decoder_tuning.look
        monkeypatch.setattr(decoder_tuning, "look", lambda *arguments: 1 / 0)
        stopped = copy.deepcopy(model)
        with pytest.raises(ZeroDivisionError):
            recipes.tune_decoder(stopped, TRAIN, TEST, tmp_path, QUICK, progress=False)
        assert same(stopped.vae, model.vae)
        assert checkpoints.load_config(tmp_path / "checkpoint")["step"] == 3
        monkeypatch.setattr(decoder_tuning, "look", look)
        resumed, (folder, tuned) = tune(model, tmp_path, resume=True), finished
        assert same(resumed.vae, tuned.vae)
        ours, theirs = (checkpoints.load_folder(place / "checkpoint")[0] for place in (tmp_path, folder))
        assert all(torch.equal(value, theirs[name][key]) for name, state in ours.items() for key, value in state.items())

    def test_a_finished_tuning_takes_more_steps_and_no_other_model(self, model, finished, tmp_path):
        shutil.copytree(finished[0], tmp_path / "run")
        longer = tune(model, tmp_path / "run", dataclasses.replace(QUICK, steps=7), resume=True)
        assert not same(longer.vae, finished[1].vae)
        with pytest.raises(FileExistsError):
            tune(model, finished[0])
        with pytest.raises(ValueError, match=r"context\.vae was"):
            tune(finished[1], finished[0], resume=True)
        with pytest.raises(ValueError, match=r"context\.weight was 0\.5, now 0\.1"):
            tune(model, finished[0], dataclasses.replace(QUICK, weight=0.1), resume=True)

    def test_of_latent_diffusion_as_well(self, latent, tmp_path):
        tuned = tune(latent, tmp_path, dataclasses.replace(QUICK, steps=1, weight=0.0))  # without a discriminator
        assert not same(tuned.vae.decoder, latent.vae.decoder) and same(tuned.vae.encoder, latent.vae.encoder)
        assert "opponent" not in checkpoints.load_folder(tmp_path / "checkpoint")[0]

    def test_what_is_known_of_each_beta_is_measured_anew(self, model, tmp_path):
        known = copy.deepcopy(model)
        known.measure_spectrum(data.to_float(TEST.images(range(8))), progress=False)
        tuned = tune(known, tmp_path, dataclasses.replace(QUICK, steps=1, learning_rate=0.1))
        assert [row["mse"] for row in tuned.spectrum] != [row["mse"] for row in known.spectrum]
        assert [row["nats"] for row in tuned.spectrum] == [row["nats"] for row in known.spectrum]

    def test_other_models_and_no_steps_are_refused(self, model, baseline, tmp_path):
        with pytest.raises(ValueError, match="a DenoisingMultiBetaVAE or a LatentDiffusion, got a BaselineVAE"):
            tune(baseline, tmp_path)
        with pytest.raises(ValueError, match="steps must be at least 1"):
            tune(model, tmp_path, DecoderTuningOptions())
        with pytest.raises(ValueError, match="discriminator_layers must be at most 2 for 16 x 16 pixels, got 3"):
            tune(model, tmp_path, dataclasses.replace(QUICK, discriminator_layers=3))


def loaded(folder, name, like):
    other = copy.deepcopy(like)
    other.load_state_dict(checkpoints.load_folder(folder)[0][name])
    return other


class TestRecipe:
    def test_a_finished_run_gets_a_tuned_decoder(self, tmp_path):
        plain = recipes.run(tiny(), tmp_path, progress=False)
        recipe = dataclasses.replace(tiny(), decoder_tuning=dataclasses.replace(QUICK, steps=4))
        tuned = recipes.run(recipe, tmp_path, progress=False, resume=True)
        assert same(plain.vae.encoder, tuned.vae.encoder) and not same(plain.vae.decoder, tuned.vae.decoder)
        assert same(plain.diffusion, tuned.diffusion)
        saved = load_pretrained(tmp_path)
        assert "decoder: `tuned in 4 steps of 4 images`" in (tmp_path / "model" / "README.md").read_text()
        assert same(saved.vae, tuned.vae) and recipes.from_dict(saved.info["recipe"]) == recipe
        assert recipes.changes(recipe) is None and saved.info["decoder_tuning"]["steps"] == 4
        again = recipes.run(recipe, tmp_path, progress=False, resume=True)
        assert same(again.vae, tuned.vae)

    def test_stage_one_may_be_against_a_discriminator(self, tmp_path):
        adversarial = dataclasses.replace(tiny().adversarial, weight=0.5, discriminator_layers=1, discriminator_channels=4)
        recipe = dataclasses.replace(tiny(), adversarial=adversarial)
        train_set, test_set = recipes.open_data(recipe)
        recipes.train_vae(recipe, train_set, test_set, tmp_path, progress=False)
        assert "adversarial_weight" in lines(tmp_path / "vae")[0]
        with pytest.raises(ValueError, match=r"context\.adversarial was"):
            recipes.train_vae(tiny(), train_set, test_set, tmp_path, progress=False, resume=True)

    def test_the_faces_of_the_paper_are(self):
        recipe = recipes.find("celeba64")
        vae, _ = preflight.check_networks(recipe)
        objective = recipe.first_objective(vae)
        assert isinstance(objective, AdversarialObjective) and isinstance(objective.reconstruction, MultiBetaObjective)
        assert sum(parameter.numel() for parameter in objective.discriminator.parameters()) == 2_765_633
        assert recipe.adversarial.start * recipe.vae_training.steps == 50_000  # latent-diffusion's begins at 50,001
        assert recipe.vae_training.adam_betas == ADAM_BETAS != recipe.diffusion_training.adam_betas

    @pytest.mark.parametrize("part", ["adversarial", "decoder_tuning"])
    def test_a_discriminator_that_does_not_fit_is_refused_with_its_flag(self, part, tmp_path):
        options = dataclasses.replace(QUICK, discriminator_layers=5)
        options = options if part == "decoder_tuning" else dataclasses.replace(tiny().adversarial, weight=1.0)
        words = rf"--{part.replace('_', '-')}\.discriminator-layers must be at most 2 for 16 x 16 pixels"
        with pytest.raises(ValueError, match=words):
            recipes.run(dataclasses.replace(tiny(), **{part: options}), tmp_path / "run", progress=False)
        assert not (tmp_path / "run" / "vae").exists()

    def test_both_systems_on_this_vae_have_it_and_the_other_has_not(self):
        assert tiny_latent_diffusion().decoder_tuning.steps == 0 and not hasattr(tiny_diffusion_vae(), "decoder_tuning")


class TestCommand:
    FLAGS = ("--steps", "2", "--batch-size", "4", "--discriminator-layers", "1", "--discriminator-channels", "4")

    @pytest.mark.parametrize(
        ("command", "prefix", "options"),
        [
            (("tune-decoder",), "", DecoderTuningOptions),
            (("train", "--recipe", "scenes32"), "decoder-tuning.", DecoderTuningOptions),
            (("train", "--recipe", "scenes32"), "adversarial.", AdversarialOptions),
        ],
    )
    def test_every_option_has_words(self, command, prefix, options, capsys):
        main = pytest.importorskip("multibeta.cli", exc_type=ImportError).main
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        shown = " ".join(line.strip("\u2502 ") for line in capsys.readouterr().out.splitlines())
        for field in dataclasses.fields(options):
            flag = f"--{prefix}{field.name.replace('_', '-')} "
            _, found, words = shown.replace(",", " ,").partition(flag)
            assert found and len(words.partition("(default:")[0].split()) > 4, flag

    def test_tunes_saves_and_refuses_what_is_there(self, model, photos, tmp_path, capsys):
        main = pytest.importorskip("multibeta.cli", exc_type=ImportError).main
        model.save_pretrained(tmp_path / "model")
        arguments = ["tune-decoder", str(tmp_path / "model"), "--out", str(tmp_path / "run"), *self.FLAGS]
        assert main(arguments) == 2
        assert "name a folder or scenes with --data" in capsys.readouterr().err
        arguments += ["--data", str(photos)]
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert f"multibeta sample {tmp_path / 'run' / 'model'} --out samples.png" in said
        last = lines(tmp_path / "run" / "decoder")[-1]
        before, now = (last[f"validation/{name}"] for name in ("sharpness_before", "sharpness"))
        assert f"{before:.3f} before, {now:.3f} now" in said
        tuned = load_pretrained(tmp_path / "run")
        assert same(tuned.vae.encoder, model.vae.encoder) and not same(tuned.vae.decoder, model.vae.decoder)
        assert main(arguments) == 2 and "pass --resume" in capsys.readouterr().err
        assert main([*arguments, "--resume"]) == 0 and same(load_pretrained(tmp_path / "run").vae, tuned.vae)

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (("--weight", "0", "--penalty", "1"), "--penalty does nothing without --weight above 0"),
            (("--perceptual-weight", "2"), "--perceptual-weight does nothing without --vgg"),
            (("--vgg", "no-such.pth"), "no-such.pth is not a file"),
            (("--steps", "0"), "steps must be at least 1"),
        ],
    )
    def test_what_would_be_ignored_is_refused_before_the_model_is_read(self, flags, words, tmp_path, error_of):
        assert words in error_of("tune-decoder", tmp_path / "no-model", "--out", tmp_path / "run", *flags)

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (("--decoder-tuning.vgg", "x"), "--decoder-tuning.vgg does nothing without --decoder-tuning.steps above 0"),
            (("--decoder-tuning.steps", "0", "--decoder-tuning.seed", "1"), "--decoder-tuning.seed does nothing without"),
            (
                ("--adversarial.no-beta-weighted",),
                "--adversarial.beta-weighted does nothing without --adversarial.weight above 0",
            ),
            (("--adversarial.discriminator-layers", "2"), "--adversarial.discriminator-layers does nothing"),
            (("--adversarial.perceptual-weight", "2"), "--adversarial.perceptual-weight does nothing without --adversarial.vgg"),
            (("--flow-map.uses", "2"), "--flow-map.uses does nothing without --flow-map.steps above 0"),
        ],
    )
    def test_a_training_refuses_what_would_be_ignored(self, flags, words, tmp_path, error_of):
        assert words in error_of("train", "--recipe", "scenes32-small", "--out", tmp_path / "run", *flags)
        assert not (tmp_path / "run").exists()
