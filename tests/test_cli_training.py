"""`multibeta train`: flags become a recipe, folders a model that the other commands use."""

import dataclasses
import itertools
import json

import pytest

from multibeta import recipes
from multibeta.pipelines import DenoisingMultiBetaVAE
from multibeta.recipes import planning

pytest.importorskip("tyro")
from multibeta.cli import main

SIDE = 16
TINY = [
    *("--vae.resolution", str(SIDE), "--vae.base-channels", "8", "--vae.channel-multipliers", "1", "2"),
    *("--vae.num-steps", "60", "--diffusion.base-channels", "8", "--diffusion.channel-multipliers", "1"),
    *("--diffusion.attention-resolutions", "--diffusion.head-channels", "8", "--diffusion.num-groups", "4"),
    *("--vae-training.steps", "2", "--vae-training.batch-size", "4"),
    *("--diffusion-training.steps", "2", "--diffusion-training.batch-size", "4"),
]


@pytest.fixture(autouse=True)
def small_and_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("multibeta.cli.pictures.DIRECTION_IMAGES", 20)
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "cache"))


def dry_run(capsys, *arguments):
    assert main(["train", "--dry-run", *arguments]) == 0
    return recipes.from_dict(json.loads(capsys.readouterr().out))


def test_a_dry_run_looks_at_the_folder(model, tmp_path, capsys, caplog, error_of):
    run = tmp_path / "run"
    model.save_pretrained(run / "model")
    dry_run(capsys, "--out", str(run))
    assert f"{run / 'model'} exists: pass --resume" in caplog.text
    assert "is a file: choose another folder" in error_of("train", "--dry-run", "--out", run / "model" / "config.json")


def test_dry_run_without_overrides_is_the_preset(capsys):
    assert dry_run(capsys, "--recipe", "toy64") == recipes.find("toy64")


def test_dry_run_reads_the_flags_of_the_recipe_it_is_given(capsys):
    recipe = dry_run(capsys, "--recipe", "diffusion-vae-scenes32-small")
    assert recipe == recipes.find("diffusion-vae-scenes32-small")
    flags = ["--vae-objective.gamma", "3", "--diffusion.no-conditional", "--diffusion.form", "form1", "--seed", "7"]
    recipe = dry_run(capsys, "--recipe", "diffusion-vae-scenes32", *flags)
    assert (recipe.vae_objective.gamma, recipe.diffusion.conditional, recipe.diffusion.form) == (3.0, False, "form1")
    assert (recipe.vae_training.seed, recipe.diffusion_training.seed) == (7, 7)


def test_dry_run_reflects_overrides_and_fits_the_diffusion(capsys):
    recipe = dry_run(capsys, "--recipe=scenes32", "--vae.resolution", "64", "--vae-training.adam-betas", "0.8", "0.9")
    assert recipe.vae.resolution == 64
    assert recipe.vae_training.adam_betas == (0.8, 0.9)
    assert recipe.diffusion.latent_resolution == 16


def test_a_warm_start_is_in_the_recipe_and_must_fit(capsys, error_of):
    assert dry_run(capsys, "--recipe", "scenes32", "--warm-start", "scenes32").warm_start == "scenes32"
    words = "--warm-start scenes32 is a network of another shape: diffusion.base_channels is 60 there, 128 here"
    assert words in error_of("train", "--dry-run", "--recipe", "scenes64", "--warm-start", "scenes32")
    assert "no folder nothing" in error_of("train", "--dry-run", "--warm-start", "nothing")


def test_one_seed_reaches_both_stages_and_leaves_the_data(capsys):
    recipe = dry_run(capsys, "--seed", "7")
    assert (recipe.vae_training.seed, recipe.diffusion_training.seed, recipe.data.seed) == (7, 7, 0)


def test_a_small_folder_is_used_whole(photos, capsys):
    recipe = dry_run(capsys, "--recipe", "scenes32", "--data.source", str(photos), "--vae.resolution", str(SIDE))
    assert (recipe.data.source, recipe.data.num_train) == (str(photos), None)


def test_a_number_of_training_images_that_was_typed_stays(photos, capsys, error_of):
    folder = ["--recipe", "scenes32", "--data.source", str(photos), "--vae.resolution", str(SIDE), "--data.num-train"]
    assert dry_run(capsys, *folder, "8").data.num_train == 8
    assert "99 training and 2 test images need 101 images" in error_of("train", "--dry-run", *folder, "99")


def test_train_refuses_what_cannot_be_meant(photos, tmp_path, error_of):
    def error(*arguments):
        return error_of("train", "--out", tmp_path / "run", *arguments)

    assert "scenes32-small" in error("--recipe", "unknown")
    assert "multiple of 4" in error("--vae.resolution", 30)
    assert "follows from the VAE" in error("--diffusion.latent-channels", 8)
    assert "smaller than resolution 32" in error("--data.source", photos)
    assert "no folder" in error("--data.source", tmp_path / "nowhere")
    second = ("--recipe", "diffusion-vae-scenes32")
    assert "must change the resolution by 64" in error(*second, "--vae.resolution", 64)
    assert "follows from the VAE" in error(*second, "--diffusion.resolution", 64)
    assert 'must be "form1"' in error(*second, "--diffusion.no-conditional", "--diffusion.form", "eq7")
    assert "--vae-training.steps must be at least 1, got 0" in error("--vae-training.steps", 0)
    assert not (tmp_path / "run").exists()


def test_train_on_a_folder_makes_a_model_that_the_other_commands_use(photos, tmp_path, capsys, error_of, picture_size, grid_size):
    run, grid = tmp_path / "run", tmp_path / "edited.png"
    arguments = ["train", "--recipe", "scenes32-small", "--data.source", str(photos), "--out", str(run), *TINY]
    assert main(arguments) == 0
    assert f"multibeta sample {run / 'model'}" in capsys.readouterr().out
    trained = DenoisingMultiBetaVAE.from_pretrained(run / "model")
    assert trained.info["command"].startswith("multibeta train --recipe scenes32-small")
    assert trained.info["recipe"]["data"]["source"] == str(photos)

    assert "--resume" in error_of(*arguments)
    assert main([*arguments, "--resume"]) == 0
    assert main(["edit", str(run / "model"), str(photos / "00.png"), "--out", str(grid), "--steps", "2"]) == 0
    assert picture_size(grid) == grid_size(6)


def test_the_paths_of_a_flow_map_stay_where_nothing_was_left_to_train(photos, tmp_path, monkeypatch, capsys):
    def choose(model, images):
        chosen.append(model)
        model.flow_map.config = dataclasses.replace(model.flow_map.config, paths=((7,),))
        return True

    chosen: list = []
    monkeypatch.setattr("multibeta.cli.distillation.evaluation.choose_recorded_paths", choose)
    run, flags = tmp_path / "run", {"steps": 2, "batch-size": 4, "pool": 8, "chunk": 4, "held-out": 4, "trajectory-steps": 4}
    arguments = ["train", "--recipe", "scenes32-small", "--data.source", str(photos), "--out", str(run), *TINY]
    arguments += [text for name, number in flags.items() for text in (f"--flow-map.{name}", str(number))]
    assert main(arguments) == 0 and main([*arguments, "--resume"]) == 0
    assert len(chosen) == 1 and "nothing was left to train of the flow map" in capsys.readouterr().out
    assert DenoisingMultiBetaVAE.from_pretrained(run / "model").flow_map.config.paths == ((7,),)


def test_training_the_second_system_makes_a_model_to_sample_from(photos, tmp_path, capsys, error_of, picture_size, grid_size):
    run, out = tmp_path / "run", tmp_path / "samples.png"
    blocks = {"encoder-blocks": "16d2,16t8,8d8,8t1,1x1", "decoder-blocks": "1u8,1t8,8u2,8t16,16x1", "channels": "16:8,8:8,1:6"}
    vae = [word for name, value in blocks.items() for word in (f"--vae.{name}", value)]
    unet = ["--diffusion.base-channels", "8", "--diffusion.channel-multipliers", "1", "2", "--diffusion.num-steps", "20"]
    steps = [
        word
        for stage in ("vae", "diffusion")
        for word in (f"--{stage}-training.steps", "2", f"--{stage}-training.batch-size", "4")
    ]
    source = ["--data.source", str(photos), "--vae.resolution", str(SIDE)]
    arguments = ["train", "--recipe", "diffusion-vae-scenes32-small", "--out", str(run), *source, *vae, *unet, *steps]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"multibeta sample {run / 'model'}" in shown and f"multibeta report {run / 'model'}" in shown
    assert f"multibeta doctor {run}\n" in shown
    assert main([*arguments, "--resume"]) == 0
    assert main(["sample", str(run / "model"), "--num-images", "3", "--steps", "5", "--sampler", "ddpm", "--out", str(out)]) == 0
    assert picture_size(out) == grid_size(8)
    assert "ddpm, ddim, got 'ode'" in error_of("sample", run / "model", "--sampler", "ode", "--out", out)


@pytest.fixture
def quick_plan(monkeypatch):
    """Plans are made of given seconds, for one epoch of a folder; returns what was measured."""
    measured = []
    monkeypatch.setattr(planning, "LEAST_STEPS", 2)
    monkeypatch.setattr(planning, "MOST_EPOCHS", 1)
    seconds = planning.Measured({"vae_training": 0.1, "diffusion_training": 0.2}, 1e-3)
    monkeypatch.setattr(planning, "measure", lambda recipe, images, device: measured.append(recipe.name) or seconds)
    return measured


AT_SIDE = ["--resolution", str(SIDE)]
NETWORKS = [*TINY[2:-8], "--vae-training.batch-size", "4", "--diffusion-training.batch-size", "4"]  # without sides and steps


def test_a_folder_alone_is_enough(photos, quick_plan, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", str(photos), *AT_SIDE, *NETWORKS]
    assert main(arguments) == 0
    said = caplog.messages
    assert "no recipe was named: it is photos32" in said and quick_plan == ["photos32"]
    assert "12 images: 10 to train on, and their mirror images, 2 held out" in said
    assert any("5 x 4" in line and "total" in line for line in said)
    run = tmp_path / "runs" / photos.name
    recipe = recipes.from_dict(DenoisingMultiBetaVAE.from_pretrained(run / "model").info["recipe"])
    assert (recipe.name, recipe.vae_training.steps, recipe.data.mirror) == ("photos32", 5, True)
    assert main([*arguments, "--resume"]) == 0 and quick_plan == ["photos32"]  # not measured again


def test_a_run_goes_on_with_the_recipe_that_it_records(photos, tmp_path, capsys, caplog, error_of):
    images, run = ["--recipe", "scenes32-small", "--data.source", str(photos)], tmp_path / "run"
    assert main(["train", *images, *TINY, "--seed", "3", "--out", str(run)]) == 0
    begun, again = recipes.recorded_recipe(run), ["--out", str(run), "--resume"]
    capsys.readouterr()
    assert dry_run(capsys, *again) == begun and begun.vae_training.seed == 3
    assert f"going on with the recipe that {run} records, scenes32-small on {photos}" in caplog.messages
    assert "there is no folder" not in caplog.text
    assert main(["train", *again, "--diffusion-training.steps", "4"]) == 0
    longer = dataclasses.replace(begun, diffusion_training=dataclasses.replace(begun.diffusion_training, steps=4))
    assert recipes.recorded_recipe(run) == longer
    assert "vae_training.seed" not in error_of("train", *again, "--vae.base-channels", "16")
    assert "give back: --vae.base-channels 8 (now 16); --out and --resume alone take all of them" in caplog.text
    (run / "recipe.json").write_text(json.dumps(recipes.to_dict(dataclasses.replace(longer, name="of my own"))))
    assert dry_run(capsys, *again).name == "of my own"


def test_the_recipe_follows_what_is_named(photos, quick_plan, capsys):
    source = ["--data.source", str(photos), "--data.upscale"]
    typed = (source, [*source, "--resolution", "64"], ["--seed", "1", str(photos), *source, *AT_SIDE])
    taken = [dry_run(capsys, *flags).name for flags in typed]
    assert taken == ["photos32", "photos64", "photos32"] == quick_plan
    assert dry_run(capsys, "--resolution", "64") == recipes.choose("scenes32", resolution=64)
    assert dry_run(capsys, "--recipe", "scenes32", *source).name == "scenes32" and len(quick_plan) == 3


def test_a_dry_run_prints_the_plan(photos, quick_plan, capsys, caplog):
    recipe = dry_run(capsys, str(photos), *AT_SIDE, "--minutes", "3", "--data.no-mirror", *NETWORKS)
    assert (recipe.vae_training.steps, recipe.data.mirror) == (2, False)
    assert "measuring 10 steps of each stage, to plan 3 minutes" in caplog.text and "2 x 4" in caplog.text
    assert "12 images: 10 to train on, 2 held out" in caplog.messages


def test_steps_that_were_typed_are_not_planned(photos, quick_plan, capsys, error_of):
    steps = ["--vae-training.steps", "7", "--diffusion-training.steps", "8"]
    recipe = dry_run(capsys, str(photos), *AT_SIDE, *steps)
    assert (recipe.vae_training.steps, recipe.diffusion_training.steps, quick_plan) == (7, 8, [])
    said = error_of("train", str(photos), *AT_SIDE, *steps, "--minutes", "5")
    assert "--minutes 5 plans the steps of both stages, and --diffusion-training.steps and --vae-training.steps says" in said
    assert "minutes must be finite and above 0, got -1.0" in error_of("train", str(photos), *AT_SIDE, "--minutes", "-1")


def test_a_recipe_for_photos_asks_for_a_folder(quick_plan, tmp_path, monkeypatch, capsys, caplog, error_of):
    monkeypatch.chdir(tmp_path)
    assert dry_run(capsys, "--recipe", "photos32") == recipes.find("photos32")
    assert "name yours with --data.source" in caplog.text
    assert "there is no folder" in error_of("train", "--recipe", "photos32") and quick_plan == []


def test_a_pattern_that_the_shell_took_apart_should_be_quoted(error_of):
    said = error_of("train", "--recipe", "photos64", "shards:a-0.tar", "shards:a-1.tar", "shards:a-2.tar", "--out", "run")
    assert "got 3, shards:a-0.tar shards:a-1.tar first: quote a pattern" in said
    assert "multibeta train 'shards:photos-{000000..000099}.tar'" in said


def test_images_and_resolution_are_named_once(photos, capsys, error_of):
    assert "say two: give one" in error_of("train", str(photos), "--resolution", "64", "--vae.resolution", "32")
    assert "before other flags: multibeta train" in error_of("train", "--vae.latent-channels", "4", str(photos))
    assert "name the images once" in error_of("train", str(photos), "--data.source", "scenes")
    assert "multiples of 8: --vae.resolution 24 or 32" in error_of("train", str(photos), "--resolution", "30")
    assert "resolution must be at least 1, got -1" in error_of("train", str(photos), "--resolution", "-1")
    assert main_refuses(["train", str(photos), "--resolution", "few"])


def test_a_run_is_not_kept_among_its_images(photos, quick_plan, tmp_path, monkeypatch, error_of, caplog):
    monkeypatch.chdir(photos)
    assert f"within the images, {photos}: the pictures of the run" in error_of("train", ".", *AT_SIDE)
    (tmp_path / "link").symlink_to(photos)
    assert "within the images" in error_of("train", tmp_path / "link", *AT_SIDE, "--out", photos / "run")
    assert sorted(path.suffix for path in photos.iterdir()) == [".png"] * len(list(photos.iterdir()))


def test_minutes_are_a_time_before_images_are_read(error_of, photos, caplog):
    caplog.set_level("INFO")
    assert "minutes must be finite and above 0, got 0" in error_of("train", photos, *AT_SIDE, "--minutes", "0")
    assert "held out" not in caplog.text


def test_the_built_in_scenes_are_told_from_a_folder_of_their_name(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    dry_run(capsys, "scenes")
    assert "./scenes" not in caplog.text
    (tmp_path / "scenes").mkdir()
    dry_run(capsys, "scenes")
    assert "the images are the built-in scenes: the folder of that name is ./scenes" in caplog.text


@pytest.mark.parametrize("recipe", ("scenes32", "latent-diffusion-32", "diffusion-vae-scenes32"))
def test_every_field_of_a_recipe_is_explained(recipe, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["train", "--recipe", recipe, "--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    assert sum(line.startswith("--vae-training.") for line in lines) >= len(dataclasses.fields(recipes.TrainingOptions))
    bare = [flag for flag, below in itertools.pairwise(lines) if flag.startswith("--") and below.startswith("(default")]
    assert not bare


def main_refuses(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code == 2
