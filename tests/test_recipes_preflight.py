"""What can be known of a training is known before it begins, for a dry run too, and the error names what to change."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from multibeta import checkpoints, data, recipes, training
from multibeta.cli import main
from multibeta.pipelines import load_pretrained
from multibeta.recipes import preflight
from multibeta.recipes.recipe import record
from multibeta.training.checkpointing import check_folder, identity_of
from tiny_recipes import tiny, tiny_diffusion_vae

STAGES = ("vae", "diffusion")
SMALL = [
    *[
        "--vae.base-channels",
        "8",
        "--vae.channel-multipliers",
        "1",
        "2",
        "--vae.num-groups",
        "4",
        "--vae.embedding-channels",
        "16",
    ],
    *["--vae.num-steps", "20", "--diffusion.base-channels", "8", "--diffusion.channel-multipliers", "1"],
    *["--diffusion.attention-resolutions", "8", "--diffusion.head-channels", "8", "--diffusion.num-groups", "4"],
    *[word for stage in STAGES for word in (f"--{stage}-training.steps", "2", f"--{stage}-training.validate-every", "2")],
    *["--vae.resolution", "16"],
]


SMALL_BLOCKS = [
    *["--vae.resolution", "8", "--vae.channels", "8:8,4:8,1:8", "--vae.encoder-blocks", "8x1,8d2,8t4,4d4,4t1,1x1"],
    *["--vae.decoder-blocks", "1x1,1u4,1t4,4u2,4t8,8x1", "--diffusion.base-channels", "8", "--diffusion.num-groups", "4"],
    *["--diffusion.channel-multipliers", "1", "2", "--diffusion.attention-resolutions", "4", "--diffusion.num-heads", "2"],
    *["--diffusion.num-steps", "20", "--diffusion-objective.mixture-components", "2"],
    *[word for stage in STAGES for word in (f"--{stage}-training.steps", "2", f"--{stage}-training.validate-every", "2")],
]


def folder_of(path, count, side=24):
    path.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path / f"{index:02}.png")
    return path


@pytest.fixture
def photos(tmp_path):
    return folder_of(tmp_path / "photos", 12)


def refused(capsys, tmp_path, *arguments):
    """What a dry run and a run say of a recipe that cannot be; nothing begins."""
    lines = []
    for more in (["--dry-run"], []):
        assert main(["train", "--out", str(tmp_path / "run"), *map(str, arguments), *more]) == 2
        lines.append(capsys.readouterr().err.splitlines()[-1])
    assert lines[0] == lines[1] and not (tmp_path / "run" / "vae").exists()
    return lines[0]


def resolved(capsys, *arguments):
    assert main(["train", "--dry-run", *map(str, arguments)]) == 0
    return recipes.from_dict(json.loads(capsys.readouterr().out))


SHAPES = {
    # what is typed: what is said
    ("scenes32", "--vae.resolution 28"): "multiples of 8: --vae.resolution 24 or 32, or --diffusion.channel-multipliers with one",
    ("scenes32", "--vae.resolution 30"): "multiple of 4, got 30; both networks take multiples of 8: --vae.resolution 24 or 32",
    ("scenes32", "--vae.resolution 4"): "--vae.resolution 8",
    ("scenes32", "--vae.channel-multipliers 1 2 2 2 2 2"): "maps of 1 x 1 pixels",
    ("scenes32", "--diffusion.channel-multipliers 1 2 2 2 2"): "--diffusion.channel-multipliers with 4 numbers",
    ("scenes32", "--diffusion.head-channels 32"): "60 channels and heads of 32: change --diffusion.head-channels",
    ("scenes32", "--diffusion.num-heads 7"): "60 channels and 7 heads: change --diffusion.head-channels or --diffusion.num-heads",
    (
        "scenes32",
        "--diffusion.attention-resolutions 16 8",
    ): "--diffusion.attention-resolutions 16 never occurs: the maps there have 8 4",
    ("scenes32", "--vae.attention-resolutions 5"): "--vae.attention-resolutions 5 never occurs: the maps there have 32 16 8",
    ("scenes32", "--vae.num-groups 0"): "--vae.num-groups must be at least 1, got 0",
    ("scenes32", "--vae.latent-channels 0"): "--vae.latent-channels must be at least 1",
    ("scenes32", "--diffusion.base-channels 61"): "--diffusion.base-channels must be even, got 61",
    ("scenes32", "--vae.embedding-channels 15"): "--vae.embedding-channels must be even",
    ("scenes32", "--vae.image-channels 1"): "--vae.image-channels",
    ("scenes64", "--vae.resolution 40"): "both networks take multiples of 16: --vae.resolution 32 or 48",
    ("scenes64", "--diffusion.channel-multipliers 1 2"): "--diffusion.channel-multipliers with one number",
    ("scenes64", "--vae.attention-resolutions 8"): "never occurs: the maps there have no attention",
    ("diffusion-vae-scenes32", "--vae.resolution 28"): "blocks of this recipe make --vae.resolution 32",
    ("diffusion-vae-scenes32", "--vae.image-channels 1"): "--vae.image-channels",
    ("diffusion-vae-scenes32", "--diffusion.channel-multipliers 1 1 1 1 1 1 1"): "--diffusion.channel-multipliers with 6 numbers",
    ("diffusion-vae-scenes32", "--diffusion.num-heads 5"): "5 heads: change",
    ("diffusion-vae-scenes32", "--vae.channels 32:32,16:64,8:64,4:0,1:64"): "does not fit together",
    ("diffusion-vae-scenes32", "--vae.encoder-blocks 32x1,32d32,32x1"): "does not fit together",  # never becomes a latent
}


@pytest.mark.parametrize("recipe, flags", SHAPES)
def test_networks_that_do_not_fit_are_refused_with_what_does(recipe, flags, tmp_path, capsys):
    assert SHAPES[recipe, flags] in refused(capsys, tmp_path, "--recipe", recipe, *flags.split())


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_preset_fits(name):
    recipe = recipes.RECIPES[name]
    networks = preflight.check_networks(recipe)
    assert not preflight.check_attention(recipe) and not preflight.check_norms(*networks)
    assert all(tensor.is_meta for network in networks for tensor in network.parameters())


@pytest.mark.parametrize(
    "flags", ["--vae.resolution 24", "--vae.resolution 64", "--vae.channel-multipliers 1 2", "--vae.num-groups 7"]
)
def test_recipes_that_fit_are_let_through_and_run(flags, capsys):
    recipe = resolved(capsys, *flags.split())
    vae, diffusion = recipes.build(recipe)
    latents = vae.encode(torch.zeros(1, 3, recipe.vae.resolution, recipe.vae.resolution), 0.5)
    assert diffusion.heads(latents, torch.ones(1, dtype=torch.int64))[0].shape == latents.shape


def test_attention_of_a_preset_that_no_longer_occurs_is_a_word(capsys, caplog):
    resolved(capsys, "--recipe", "scenes32", "--vae.resolution", "16")
    assert "--diffusion.attention-resolutions 8 never occurs: the maps there have 4 2" in caplog.text


def test_norms_that_take_beta_out_are_a_word(capsys, caplog):
    resolved(capsys, "--vae.num-groups", "32")
    assert "32 channels in groups of one" in caplog.text and "--vae.num-groups 16 keeps it" in caplog.text


def test_small_images_are_told_a_resolution_that_the_recipe_takes(tmp_path, capsys):
    small = folder_of(tmp_path / "small", 12, side=28)
    said = refused(capsys, tmp_path, "--data.source", small)
    assert "choose --vae.resolution 24 (both networks take multiples of 8)" in said
    assert resolved(capsys, "--data.source", small, "--vae.resolution", 24).vae.resolution == 24
    blocks = refused(capsys, tmp_path, "--recipe", "diffusion-vae-scenes32", "--data.source", small)
    assert "the blocks of this recipe take 32 alone), or allow --data.upscale, which enlarges them" in blocks
    tiny = folder_of(tmp_path / "tiny", 12, side=5)
    assert "no resolution that small fits" in refused(capsys, tmp_path, "--data.source", tiny)


def test_batches_that_were_not_typed_fit_a_small_folder(photos, capsys, caplog):
    recipe = resolved(capsys, "--recipe", "scenes32", "--data.source", photos, "--vae.resolution", "16")
    assert (recipe.vae_training.batch_size, recipe.diffusion_training.batch_size) == (10, 10)  # two are held out
    assert "--vae-training.batch-size 10, not 64: there are no more images" in caplog.text
    recipe = resolved(capsys, "--recipe", "scenes32", "--data.source", photos, "--vae.resolution", "16", "--data.mirror")
    assert recipe.vae_training.batch_size == 20


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [64, 11])  # that of the preset, and another
def test_batches_that_were_typed_are_refused_at_every_stage(stage, size, photos, tmp_path, capsys):
    flags = ["--recipe", "scenes32", "--data.source", photos, "--vae.resolution", "16", f"--{stage}-training.batch-size", size]
    said = refused(capsys, tmp_path, *flags)
    assert f"--{stage}-training.batch-size {size} is more than the 10 images to train on" in said


def test_what_a_stage_needs_is_known_first(photos, tmp_path, capsys, monkeypatch):
    source = ["--data.source", photos, "--vae.resolution", "16"]
    assert "at least 2 images" in refused(capsys, tmp_path, *source, "--diffusion-objective.statistics-images", 1)
    assert "--data.num-test must be at least 0, got -1" in refused(capsys, tmp_path, *source, "--data.num-test", -1)
    assert "480000" in refused(capsys, tmp_path, "--data.num-train", 479_000)  # also of the recipe's own images
    blocks = [
        *["--recipe", "diffusion-vae-scenes32", "--data.source", folder_of(tmp_path / "large", 12, side=40)],
        *["--diffusion-objective.mixture-components", 11],
    ]
    assert "between 0 and the 10 images to train on, got 11" in refused(capsys, tmp_path, *blocks)
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda _: None)
    assert "needs scikit-learn" in refused(capsys, tmp_path, *blocks[:-1], 2)


NUMBERS = {
    # recipe: flag of a number to what it cannot be
    "scenes32-small": {
        **{
            f"--{stage}-training.{name}": values
            for stage in STAGES
            for name, values in {
                "adam-betas": ("0.9 1", "1 0.9", "-0.1 0.9", "nan 0.9", "0.9 inf"),
                "learning-rate": ("nan", "inf", "-1", "1e30"),
                "weight-decay": ("nan", "inf", "-1", "1e30"),
                "final-learning-rate": ("nan", "inf", "-1"),
                "clip-norm": ("nan", "inf", "-1"),
                "ema-decay": ("nan", "1", "-1"),
                "steps": ("0", "-1"),
                "warmup-steps": ("-1",),
                "accumulate": ("0", "33"),
                "log-every": ("0",),
            }.items()
        },
        "--vae.embedding-max-frequency": ("nan", "inf", "0", "-1", "1e30"),
        "--vae.collapse-exponent": ("nan", "inf", "0", "-1", "1e300"),
        "--vae.log-sigma-zero": ("nan", "-inf", "0", "1", "-1e30", "-1e-320"),
        "--vae.dropout": ("nan", "inf", "-1", "1.5"),
        "--vae.num-knots": ("1", "-1"),
        "--vae.num-steps": ("0", "-1", str(10**24)),
        "--vae.channel-multipliers": ("0 1", "1 -1"),
        "--vae-objective.balance": ("nan", "inf", "0", "-1", "1e30"),
        "--vae-objective.anneal": ("nan", "inf", "-1"),
        "--vae-objective.decoder-weight": ("nan", "inf", "-1", "1e30"),
        "--vae-objective.curve-learning-rate": ("nan", "inf", "-1", "1e30"),
        "--vae-objective.collapse-step": ("-1",),
        "--vae-objective.untie-steps": ("-1",),
        "--vae.sigma-per-channel": ("",),  # with axes to fold
        "--diffusion.dropout": ("nan", "-1"),
        "--diffusion.num-groups": ("0",),
        "--diffusion-objective.weight-exponent": ("nan", "inf", "-1e3"),
        "--diffusion-objective.noise-draws": ("0", "-1"),
        "--diffusion-objective.statistics-images": ("0", "-1"),
        "--data.white-level": ("0", "-1", "65536"),
        "--adversarial.weight": ("nan", "-1"),
        "--adversarial.start": ("1.5",),
        "--decoder-tuning.steps": ("-1",),
        "--decoder-tuning.discriminator-channels": ("0", "5"),
        "--decoder-tuning.largest-beta": ("1",),
    },
    "diffusion-vae-scenes32-small": {
        "--vae-objective.gamma": ("nan", "inf", "-1", "1e38"),
        "--vae-objective.capacity": ("nan", "inf", "-1"),
        "--vae-objective.warmup": ("nan", "inf", "-1"),
        "--diffusion.first-variance": ("nan", "inf", "0", "-1", "1", "2", "1e-30"),
        "--diffusion.last-variance": ("nan", "inf", "0", "-1", "1", "1.5", "0.9"),  # of 1000 steps nothing is left
        "--diffusion.num-steps": ("0", "-1"),
        "--diffusion-objective.condition-dropout": ("nan", "-1", "1.5"),
        "--diffusion-objective.mixture-components": ("-1",),
    },
}


@pytest.mark.parametrize("recipe, flag", [(recipe, flag) for recipe, flags in NUMBERS.items() for flag in flags])
def test_numbers_out_of_range_are_refused_by_a_dry_run_with_their_flag(recipe, flag, tmp_path, capsys):
    for value in NUMBERS[recipe][flag]:
        arguments = ["--dry-run", "--recipe", recipe, flag, *value.split(), "--out", str(tmp_path / "run")]
        assert main(["train", *arguments]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"multibeta: {flag} "), value


def test_a_run_refuses_what_its_dry_run_refuses(tmp_path, capsys):
    assert "--vae-objective.untie-steps must be at least 0" in refused(capsys, tmp_path, "--vae-objective.untie-steps", -1)
    assert "--vae-objective.balance" in refused(capsys, tmp_path, "--vae-objective.balance", 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda: recipes.DataOptions(white_level=True),
        lambda: recipes.DataOptions(white_level=1.5),
        lambda: recipes.DataOptions(num_test=1.5),
        lambda: training.TrainingOptions(steps=1.5),
        lambda: training.TrainingOptions(steps=True),
        lambda: training.TrainingOptions(steps=1, adam_betas=(0.9,)),
        lambda: recipes.VAEConfig(latent_channels=1.5),
        lambda: recipes.DiffusionConfig(num_steps="20"),
    ],
)
def test_numbers_are_of_their_kind_from_python_too(change):
    with pytest.raises(ValueError, match="must be"):
        change()


@pytest.mark.parametrize("level, reason", [(0, "at least 1"), (True, "an integer"), (1.5, "an integer")])
def test_a_white_level_that_is_none_is_not_taken_for_the_default(level, reason, photos):
    with pytest.raises(ValueError, match="white_level must"):
        data.open_dataset(photos, 16, white_level=level)


CAN_BE = {
    "one channel": ["scenes32-small", "--vae.latent-channels", "1"],
    "a sigma for each channel": ["scenes32-small", "--vae.sigma-per-channel", "--vae-objective.no-fold"],
    "capacity at once": ["diffusion-vae-scenes32-small", "--vae-objective.warmup", "0"],
}


@pytest.mark.parametrize("name", CAN_BE)
def test_numbers_at_the_ends_of_their_ranges_train(name, tmp_path):
    few = [word for stage in STAGES for word in (f"--{stage}-training.batch-size", "4")]
    few += ["--data.num-train", "40", "--data.num-test", "8", "--data.source", "scenes", "--out", str(tmp_path)]
    recipe, *flags = CAN_BE[name]
    shape = SMALL if recipe.startswith("scenes") else SMALL_BLOCKS
    assert main(["train", "--recipe", recipe, *shape, *flags, *few]) == 0
    model = load_pretrained(tmp_path / "model")
    assert all(weight.isfinite().all() for weight in model.vae.state_dict().values())


def test_a_run_called_from_python_is_checked_too(photos, tmp_path):
    recipe = dataclasses.replace(
        recipes.find("scenes32-small"),
        data=recipes.DataOptions(source=str(photos)),
        vae=dataclasses.replace(recipes.find("scenes32-small").vae, resolution=16),
    )
    fits = dataclasses.replace(recipe.vae_training, batch_size=4)
    for stage in preflight.STAGES:
        one = dataclasses.replace(recipe, **{"vae_training": fits, "diffusion_training": fits} | {stage: recipe.vae_training})
        with pytest.raises(ValueError, match=f"{preflight.flag(stage, 'batch_size')} 32 is more than the 10 images"):
            recipes.run(one, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="device cuda:99 cannot be used"):
        recipes.run(recipe, tmp_path / "run", device="cuda:99", progress=False)


def test_what_a_folder_holds_and_has_room_for_is_known_first(tmp_path, monkeypatch):
    recipe = recipes.find("scenes32-small")
    stale = tmp_path / "stale" / "diffusion" / "checkpoint"
    stale.mkdir(parents=True)
    (stale / "config.json").write_text(json.dumps({"format": 1, "files": [], "options": {}, "context": {}, "dataset_size": 3}))
    with pytest.raises(FileExistsError, match=r"diffusion.checkpoint exists: pass --resume"):
        recipes.run(recipe, tmp_path / "stale", progress=False)
    with pytest.raises(ValueError, match=r"diffusion.checkpoint was trained differently: .*dataset_size was 3, now 8000"):
        recipes.run(recipe, tmp_path / "stale", resume=True, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file: choose another folder"):
        recipes.run(recipe, tmp_path / "file" / "run", progress=False)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 2**20))
    with pytest.raises(OSError, match=r"take about \d+ MiB, .* has 1 MiB free"):
        recipes.run(recipe, tmp_path / "run", progress=False)


def test_no_held_out_images_are_no_reason_to_fail(tmp_path, capsys, caplog):
    few = folder_of(tmp_path / "few", 4)
    assert main(["train", "--recipe", "scenes32", "--data.source", str(few), "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert "no images are held out" in caplog.text
    assert (tmp_path / "run" / "vae" / "reconstructions-000002.png").exists()


def test_the_images_are_remembered_from_any_folder(photos, tmp_path, monkeypatch, capsys):
    arguments = ["train", "--recipe", "scenes32-small", "--data.source", "photos", "--out", str(tmp_path / "run"), *SMALL]
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    model = load_pretrained(tmp_path / "run" / "model")
    assert model.info["recipe"]["data"]["source"] == str(photos)
    assert model.info["working_folder"] == str(tmp_path)
    assert model.info["changes"]["data.source"] == ["scenes", str(photos)]

    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "# photos (DenoisingMultiBetaVAE)" in card and "- data: `.../photos`" in card and "- recipe: `scenes32-small`" in card
    assert "- vae: `2 steps of 10 images`" in card and "- vae.resolution: `16`, `32`" in card
    assert "- data.source: `.../photos`, `scenes`" in card and "built-in scenes" not in card and str(tmp_path) not in card

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main([*arguments[:4], str(photos), *arguments[5:], "--resume"]) == 0
    edit = ["edit", str(tmp_path / "run" / "model"), str(photos / "00.png"), "--out", str(tmp_path / "e.png"), "--steps", "2"]
    assert main(edit) == 0

    monkeypatch.chdir(tmp_path)  # a checkpoint of before, which has the path as it was typed
    for stage in STAGES:
        path = tmp_path / "run" / stage / "checkpoint" / "config.json"
        path.write_text(path.read_text().replace(str(photos), "photos"))
    assert main([*arguments, "--resume"]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main([*arguments[:4], str(photos), *arguments[5:], "--resume"]) == 2
    assert "context.data.source was" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, expected",
    [
        ("scenes", "scenes"),
        ("photos", "{here}/photos"),
        ("./scenes", "{here}/scenes"),
        ("shapes3d:data/3dshapes.h5", "shapes3d:{here}/data/3dshapes.h5"),
        ("celeba:~/celeba", "celeba:{home}/celeba"),
        ("~/photos", "{home}/photos"),
        ("/images/all", "/images/all"),
        ("a:b", "{here}/a:b"),  # no published dataset: a folder of that name
    ],
)
def test_sources_are_made_absolute(source, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/lovelace")
    absolute = data.absolute_source(source)
    assert absolute == expected.format(here=tmp_path, home="/home/lovelace")
    assert data.absolute_source(absolute) == absolute


def test_changes_are_what_differs_from_the_preset():
    preset = recipes.find("scenes32")
    assert recipes.changes(preset) == {}
    assert recipes.changes(dataclasses.replace(preset, name="mine")) is None
    other = dataclasses.replace(preset, vae=dataclasses.replace(preset.vae, resolution=64))
    assert recipes.changes(other) == {"vae.resolution": (32, 64)}  # the latent follows


def test_the_origin_of_a_recipe_may_be_worded_anew(tmp_path):
    options = training.TrainingOptions(steps=1)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    identity = identity_of(options, {"source": "built-in scenes, 60 minutes", "data": {"source": "scenes"}}, range(9))
    (checkpoint / "config.json").write_text(json.dumps({"format": 1, "files": [], **identity}))
    context = {"source": "built-in scenes", "data": {"source": "scenes"}}
    training.check_folder(tmp_path, options, range(9), resume=True, context=context)
    with pytest.raises(ValueError, match=r"context\.data\.source"):
        training.check_folder(tmp_path, options, range(9), resume=True, context={**context, "data": {"source": "photos"}})


# the fields of recipes when checkpoints were first resumed by newer code; no name is ever added here
FIRST_FIELDS = """
accumulate activation adam_betas anneal architecture attention_resolutions balance base_channels batch_size capacity
channel_multipliers channels checkpoint_every clip_norm collapse_exponent collapse_step condition_dropout conditional
curve_learning_rate data decoder_blocks decoder_weight diffusion diffusion_objective diffusion_training dropout
ema_decay embedding_channels embedding_max_frequency embedding_mlp encoder_blocks final_learning_rate first_variance
fold form gamma head_channels image_channels last_variance latent_channels latent_resolution learning_rate log_every
log_sigma_zero mid_attention mirror mixture_components name noise_draws num_groups num_heads num_knots num_res_blocks
num_steps num_test num_train parameterization precision reduction resolution schedule seed sigma_per_channel source
statistics_images steps untie_steps upscale vae vae_objective vae_training validate_every warmup warmup_steps
weight_decay weight_exponent white_level
"""


def without_newer(values):
    """What a checkpoint said when there were no other fields."""
    return {
        name: without_newer(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name in FIRST_FIELDS.split()
    }


@pytest.mark.parametrize("recipe", [tiny(), tiny_diffusion_vae()], ids=["multi-beta", "DiffusionVAE"])
def test_checkpoints_from_before_a_field_are_resumed(recipe, tmp_path):
    """A field that a preset does not set has its default, and that is what was so before there was the field."""
    for name, (options, context) in recipe.plan().items():
        saved = {"options": without_newer(dataclasses.asdict(options)), "context": without_newer(context)}
        checkpoints.save_folder(tmp_path / name / "checkpoint", {}, {**saved, "dataset_size": 16, "step": 2})
        check_folder(tmp_path / name, options, range(16), resume=True, context=context)


def test_what_a_resumed_run_changes_is_said_with_the_flags_that_give_it_back(tmp_path, caplog):
    begun = tiny()
    record(begun, tmp_path)
    longer = dataclasses.replace(begun, vae_training=dataclasses.replace(begun.vae_training, steps=9))
    preflight.say_changes(longer, tmp_path)
    assert not caplog.messages
    other = dataclasses.replace(begun.diffusion_objective, noise_draws=7)
    preflight.say_changes(dataclasses.replace(longer, diffusion_objective=other), tmp_path)
    before = begun.diffusion_objective.noise_draws
    assert f"which these flags give back: --diffusion-objective.noise-draws {before} (now 7)" in caplog.text


def test_what_is_typed_to_give_a_value():
    assert [preflight.typed("data", "mirror", each) for each in (False, True)] == ["--data.no-mirror", "--data.mirror"]
    assert preflight.typed("vae", "channel_multipliers", (1, 2)) == "--vae.channel-multipliers 1 2"


@pytest.mark.parametrize("name", ["mirror", "upscale"])
def test_switches_are_no_words(name):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
        recipes.DataOptions(**{name: "no"})


@pytest.mark.parametrize(("warmup", "warned"), [(1, False), (2, True), (100, True)])
def test_a_warm_up_that_is_most_of_a_stage_is_a_word(warmup, warned, tmp_path, caplog):
    training = dataclasses.replace(tiny().diffusion_training, warmup_steps=warmup)
    preflight.prepare(dataclasses.replace(tiny(), diffusion_training=training), tmp_path)
    words = f"diffusion: the learning rate rises for {warmup} of its 3 steps"
    assert (words in caplog.text) == warned and "vae: the learning rate" not in caplog.text
