"""The command line calls the library with what was typed, writes whole files, and explains errors in one line."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import types
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import multibeta
from multibeta import data, distribution, environment, recipes
from multibeta.baselines import VAE
from multibeta.diffusion_vae import CapacityVAE, ConditionalDiffusion, ConditionalDiffusionConfig
from multibeta.latents import NamedDirections
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig
from multibeta.networks import BlockAutoencoderConfig
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusion
from multibeta.pipelines import BaselineVAE, DenoisingMultiBetaVAE, DiffusionVAE, load_pretrained, named_directions
from multibeta.training import TrainingInterrupted

pytest.importorskip("tyro")
from multibeta.cli import main
from multibeta.cli.arguments import ended_numbers
from multibeta.cli.demo import few_evaluations
from multibeta.cli.pictures import Edit, Show
from multibeta.flow_map import FlowMap

SIDE = 16
COMMANDS = ("demo", "train", "sample", "show", "edit", "interpolate", "directions", "encode", "evaluate", "reproduce", "report")
COMMANDS += ("spectrum", "accelerate", "convert", "bench", "env")


def tiny_model(info=None):
    vae = VAEConfig(
        resolution=SIDE, base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, mid_attention=False, num_groups=4,
        embedding_channels=16, num_steps=60,
    )  # fmt: skip
    unet = DiffusionConfig(
        latent_resolution=8, base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(),
        head_channels=8, num_groups=4, num_steps=60,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DenoisingMultiBetaVAE(MultiBetaVAE(vae), NonlinearDiffusion(unet), info)


@pytest.fixture(autouse=True)
def small_and_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("multibeta.cli.pictures.DIRECTION_IMAGES", 20)
    monkeypatch.setattr("multibeta.pipelines.directions.DIRECTION_IMAGES", 60)
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny_model({"recipe": {"data": {"source": "scenes"}}}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def baseline(tmp_path):
    folder = tmp_path / "baseline"
    BaselineVAE(VAE(tiny_model().vae.config)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def refiner(tmp_path):
    """A DiffusionVAE with random weights whose latents differ, of 20 steps."""
    folder = tmp_path / "refiner"
    blocks = {"encoder_blocks": "16d2,16t8,8d8,8t1,1x1", "decoder_blocks": "1u8,1t8,8u2,8t16,16x1", "channels": "16:8,8:8,1:6"}
    unet = ConditionalDiffusionConfig(
        resolution=SIDE, base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_heads=2,
        dropout=0.0, num_groups=4, num_steps=20,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, diffusion = CapacityVAE(BlockAutoencoderConfig(resolution=SIDE, **blocks)), ConditionalDiffusion(unet)
    vae.encoder.mean.weight.data *= 100
    DiffusionVAE(vae, diffusion, {"recipe": {"data": {"source": "scenes"}}}).save_pretrained(folder)
    return str(folder)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_flags(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"multibeta {name}" in shown and ("--out" in shown or name in ("spectrum", "accelerate", "bench", "env"))


@pytest.mark.parametrize("folder", ["run", "run/model"])
def test_the_folder_of_a_run_stands_for_its_model(model, tmp_path, folder, picture_size):
    (tmp_path / "run" / "vae" / "checkpoint").mkdir(parents=True)
    shutil.copytree(model, tmp_path / "run" / "model")
    assert main(["sample", str(tmp_path / folder), "--out", str(tmp_path / "a.png"), "--num-images", "1", "--steps", "1"]) == 0
    assert picture_size(tmp_path / "a.png")


def test_a_run_without_a_model_says_how_to_go_on(tmp_path, error_of):
    run = tmp_path / "run"
    (run / "vae" / "checkpoint").mkdir(parents=True)
    assert "has no model yet: `multibeta train --resume`" in error_of("sample", run, "--out", tmp_path / "a.png")


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"multibeta {multibeta.__version__}, torch {torch.__version__}\n"


def test_who_reads_only_the_beginning_is_not_told_of_it():
    command = [sys.executable, "-m", "multibeta", "cache"]
    with subprocess.Popen(command, cwd=os.path.dirname(__file__), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


ORDERS = {
    "model --out a --strengths 1 -2": "model --out a --strengths 1 -2",
    "--strengths 1 -2e1 model image --out a": "model image --strengths 1 -2e1 --out a",
    "model --strengths 1 image --out a": "model image --strengths 1 --out a",
    "--out a --strengths 1 2 model --labels image": "--out a model --strengths 1 2 --labels image",
}


@pytest.mark.parametrize(("typed", "ordered"), ORDERS.items())
def test_several_numbers_end_where_no_number_follows(typed, ordered):
    assert ended_numbers(Edit, typed.split()) == ordered.split()
    assert ended_numbers(Show, typed.split()) == typed.split()  # it has no such flag


@pytest.mark.parametrize(("arguments", "status"), [("sample nothing --out a.png", 2), ("cache", 0)])
def test_where_nobody_reads_the_status_is_that_of_the_work(arguments, status):
    """Neither 0 for what has failed, nor 120 of an interpreter that could not say its last words."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "multibeta", *arguments.split()]
    assert subprocess.run(command, cwd=os.path.dirname(__file__), stdout=writer, stderr=writer).returncode == status
    os.close(writer)


@pytest.mark.parametrize("broken", ["stdout", "stderr"])
def test_work_whose_reader_has_gone_is_finished(model, tmp_path, monkeypatch, broken):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("Broken pipe")

    monkeypatch.setattr(sys, broken, Gone())
    assert main(["sample", model, "--num-images", "3", "--batch-size", "1", "--steps", "2", "--out", str(tmp_path / "a")]) == 0
    assert len(list((tmp_path / "a").glob("*.png"))) == 3


def test_a_broken_pipe_that_is_not_standard_output_is_an_error(monkeypatch, error_of):
    def broken():
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(environment, "describe", broken)
    assert "Broken pipe" in error_of("env")


@pytest.mark.parametrize("arguments", [["train", "--vae.unknown", "1"], ["unknown"], ["train", "--vae-training.steps", "few"]])
def test_unknown_words_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_sample_writes_a_grid_or_a_file_per_image(model, tmp_path, picture_size, grid_size):
    common = ["sample", model, "--num-images", "5", "--steps", "3", "--batch-size", "2", "--out"]
    assert main([*common, str(tmp_path / "samples.png")]) == 0
    assert main([*common, str(tmp_path / "samples")]) == 0
    assert picture_size(tmp_path / "samples.png") == grid_size(8)
    pictures = [f"{index:06}.png" for index in range(5)]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [*pictures, "index.json"]
    assert picture_size(tmp_path / "samples" / "000000.png") == (SIDE, SIDE)


def test_sample_depends_on_the_seed_alone(model, tmp_path):
    for name, flags in {"a": [], "b": ["--batch-size", "1"], "c": ["--seed", "1"]}.items():
        assert main(["sample", model, "--num-images", "2", "--steps", "2", "--out", str(tmp_path / name), *flags]) == 0
    first, again, other = (np.asarray(Image.open(tmp_path / name / "000001.png"), dtype=int) for name in "abc")
    assert abs(first - again).max() <= 1  # rounding of another batch size
    assert abs(first - other).max() > 1


def test_show_stacks_the_input_the_latent_decoded_and_denoised(model, refiner, photos, tmp_path, capsys, picture_size, grid_size):
    out = tmp_path / "shown.png"
    for folder, level in ((model, " at beta 0.6"), (refiner, "")):
        beta = ["--beta", "0.6"] if level else []
        assert main(["show", folder, str(photos / "03.png"), "scenes:77", "--out", str(out), "--steps", "2", *beta]) == 0
        assert picture_size(out) == grid_size(columns=2, rows=3)
        assert f"from above, input, latents{level} decoded at once, denoised\n" in capsys.readouterr().out
    shown = np.asarray(Image.open(out))
    scene = data.Scenes(SIDE).images([77])[0].permute(1, 2, 0).numpy()
    assert np.array_equal(shown[:64:4, 68::4], scene)
    assert main(["show", refiner, str(photos / "03.png"), "scenes:77", "--out", str(out), "--steps", "2", "--labels"]) == 0
    labelled = np.asarray(Image.open(out))
    assert labelled.shape[1] > shown.shape[1] and np.array_equal(labelled[:, -shown.shape[1] :], shown)
    assert not np.array_equal(shown[68:132], shown[136:200])


def test_show_adds_a_row_of_edits(model, tmp_path, capsys, error_of, picture_size, grid_size):
    arguments = ["show", model, "scenes:5", "--out", tmp_path / "shown.png", "--steps", "2", "--direction"]
    assert main([*map(str, arguments), "1", "--strength", "-0.5"]) == 0
    assert picture_size(tmp_path / "shown.png") == grid_size(columns=1, rows=4)
    assert "moved by -0.5 deviations along direction 1" in capsys.readouterr().out
    assert "direction must lie between 0" in error_of(*arguments, "999")


def test_edit_takes_files_folders_and_scenes(model, photos, tmp_path, picture_size, grid_size):
    out = tmp_path / "edited.png"
    images = [str(photos / "03.png"), str(photos), "scenes:77"]
    strengths = ["--strengths", "-2", "0.5"]
    assert main(["edit", model, *images, "--out", str(out), "--steps", "2", "--directions-from", str(photos), *strengths]) == 0
    assert picture_size(out) == grid_size(columns=3, rows=14)
    scene = data.Scenes(SIDE).images([77])[0].permute(1, 2, 0).numpy()
    shown = np.asarray(Image.open(out))[-64::4, :64:4]
    assert np.array_equal(shown, scene)  # the input is the first column


def test_interpolate_stands_between_its_inputs(model, photos, tmp_path, picture_size, grid_size):
    out = tmp_path / "path.png"
    arguments = ["interpolate", model, str(photos / "00.png"), "scenes:5", "--out", str(out), "--num", "3"]
    assert main([*arguments, "--steps", "2", "--dims", "0", "2"]) == 0
    assert picture_size(out) == grid_size(5)


def test_edits_and_paths_that_invert_begin_at_the_images_themselves(model, tmp_path, capsys, error_of):
    pipeline, walk = load_pretrained(model), {"steps": 3, "sampler": "ode2"}
    images = data.to_float(data.Scenes(SIDE).images([5, 9]))
    flags = ["--out", str(tmp_path / "out.png"), "--invert", "--steps", "3"]
    assert main(["edit", model, "scenes:5", "--strengths", "0", "--beta", "0.5", *flags]) == 0
    assert "along direction 0 at beta 0.5, inverted, by +0" in capsys.readouterr().out
    assert main(["interpolate", model, "scenes:5", "scenes:9", "--num", "2", "--beta", "0.5", *flags]) == 0
    shown = np.asarray(Image.open(tmp_path / "out.png"))[:64:4, 68:132:4]  # the first of the path
    expected = pipeline.manipulate(images[:1], torch.zeros(4, 8, 8), 0.0, 0.5, invert=True, **walk)
    assert np.abs(shown - data.to_uint8(expected)[0].permute(1, 2, 0).numpy().astype(int)).max() <= 1
    assert "must be one of ode, ode2, heun" in error_of("edit", model, "scenes:5", *flags, "--sampler", "ancestral")


def test_edit_goes_the_way_to_an_attribute(model, refiner, tmp_path, capsys, picture_size, grid_size):
    out = tmp_path / "edited.png"
    for folder, level in ((model, " at beta 0.7"), (refiner, "")):
        arguments = ["edit", folder, "scenes:5", "--attribute", "warm_wall", "--strengths", "0", "2", "--steps", "3"]
        assert main([*arguments, "--out", str(out)]) == 0
        assert picture_size(out) == grid_size(3)
        assert f"the way to warm_wall{level} by +0, +2" in capsys.readouterr().out


def test_directions_finds_some_and_shows_them(model, refiner, tmp_path, capsys, error_of, picture_size):
    out, picture = tmp_path / "directions.safetensors", tmp_path / "directions.png"
    few = ["--out", str(out), "--beta", "0.4"]
    assert main(["directions", model, "--kind", "attribute", *few, "--num", "2", "--picture", str(picture)]) == 0
    assert "2 attribute directions at beta 0.4, warm_floor, warm_wall" in capsys.readouterr().out
    assert NamedDirections.load(out).names == ("warm_floor", "warm_wall")
    assert picture_size(picture)[1] == 2 * 68 - 4  # a row for each
    assert main(["directions", model, *few]) == 0
    assert len(NamedDirections.load(out)) == 16
    assert main(["directions", refiner, "--out", str(out), "--kind", "channel"]) == 0
    learned = ["directions", refiner, "--out", str(out), "--kind", "disco", "--num", "3", "--steps", "1"]
    assert main(learned) == 0
    assert NamedDirections.load(out).names == ("disco 0", "disco 1", "disco 2")
    assert "pass --resume" in error_of(*learned)
    assert main([*learned, "--resume"]) == 0
    assert "of kind principal are not trained and take no --steps or --resume" in error_of(
        "directions", model, *few, "--steps", 3, "--resume"
    )
    assert "out must be a .safetensors file" in error_of("directions", model, "--out", tmp_path / "out.png")


def test_edit_and_show_take_directions_of_a_file(model, refiner, tmp_path, capsys, caplog, error_of, picture_size, grid_size):
    path, out = tmp_path / "directions.safetensors", tmp_path / "edited.png"
    named_directions(load_pretrained(model), "attribute", data.Scenes(SIDE), 0.4).save(path)
    few = ["scenes:5", "--out", str(out), "--steps", "2", "--directions", str(path)]
    edit = ["edit", model, *few, "--strengths", "0", "2", "--direction", "warm_wall"]
    assert main(edit) == 0
    assert picture_size(out) == grid_size(3)
    assert "deviations along warm_wall at beta 0.4 by +0, +2" in capsys.readouterr().out  # where they were found
    assert main(["show", model, *few, "--direction", "1"]) == 0
    assert "moved by +2 deviations along warm_wall" in capsys.readouterr().out
    assert main([*edit, "--beta", "0.6"]) == 0
    assert "the directions were found at beta 0.4, and serve less at 0.6" in caplog.text
    assert "no direction 'hat'; there are warm_floor, warm_wall" in error_of(*edit[:-1], "hat")
    assert "direction must lie between 0 and" in error_of(*edit[:-1], "99")
    assert "of another model" in error_of("edit", refiner, *few)
    assert "give one" in error_of(*edit, "--directions-from", "scenes")
    assert "or a name in the file of --directions, got 'hat'" in error_of("edit", model, *few[:-2], "--direction", "hat")


def test_edits_start_at_the_auto_beta_of_a_model_that_knows_it(model, tmp_path, capsys, caplog, error_of):
    walk = ["--out", str(tmp_path / "out.png"), "--steps", "2"]
    commands = {
        "show": ["show", model, "scenes:5", *walk],
        "edit": ["edit", model, "scenes:5", "--strengths", "1", *walk],
        "interpolate": ["interpolate", model, "scenes:5", "scenes:9", "--num", "2", *walk],
    }
    for command, beta in {"show": "0.9", "edit": "0.7", "interpolate": "0.7"}.items():
        assert main(commands[command]) == 0
        assert f" at beta {beta}" in capsys.readouterr().out
        assert f"does not know what each beta keeps of an image, going on at {beta}: `multibeta spectrum" in caplog.text
        caplog.clear()
    assert 'beta must be a number in [0, 1] here: for "auto" the model does not know' in error_of(
        *commands["edit"], "--beta", "auto"
    )
    assert main(["spectrum", model, "--data", "scenes", "--num-images", "4", "--save"]) == 0
    auto = load_pretrained(model).auto_beta
    for command in commands.values():
        for flags in ([], ["--beta", "auto"]):
            capsys.readouterr()
            assert main([*command, *flags]) == 0
            assert f" at beta {auto:g} (auto)" in capsys.readouterr().out
    assert main(["encode", model, "scenes", "--limit", "2", "--beta", "auto", "--out", str(tmp_path / "codes.npz")]) == 0
    assert f"at beta {auto:g}" in capsys.readouterr().out and "does not know" not in caplog.text


def test_spectrum_shows_what_is_stored_and_measures_where_nothing_is(model, refiner, photos, monkeypatch, capsys, error_of):
    assert main(["spectrum", model, "--num-images", "3"]) == 0  # of the scenes, which the model records
    assert load_pretrained(model).spectrum is None
    capsys.readouterr()
    assert main(["spectrum", model, "--data", str(photos), "--save"]) == 0
    saved = capsys.readouterr().out
    assert load_pretrained(model).info["spectrum"]["num_images"] == 12 and "saved in its config.json" in saved
    assert main(["spectrum", model]) == 0
    shown = capsys.readouterr().out
    assert saved.startswith(shown)
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0] == ["beta", "nats", "mse", "denoised", "identity"] and lines[1][0] == "0" and lines[1][4] == "1.000"
    assert [line[0] for line in lines if line[-1] == "auto"] == [f"{load_pretrained(model).auto_beta:g}"]
    assert "holds a DiffusionVAE, which has one representation" in error_of("spectrum", refiner)
    assert "num_images must be at least 1" in error_of("spectrum", model, "--num-images", 0)
    monkeypatch.setattr("multibeta.cli.spectrum.why_not_writable", lambda folder: "Read-only file system")
    assert f"the folder of the model, {model}: Read-only file system" in error_of("spectrum", model, "--save")


def test_edit_and_interpolate_take_the_second_system(refiner, photos, tmp_path, capsys, picture_size, grid_size):
    walk = ["--sampler", "ddpm", "--steps", "3"]
    outs = [tmp_path / f"{name}.png" for name in ("edited", "path", "noise")]
    assert main(["edit", refiner, "scenes:5", str(photos), "--direction", "1", "--out", str(outs[0]), *walk]) == 0
    path = ["interpolate", refiner, "scenes:5", "scenes:99", "--num", "4", "--how", "slerp", "--shared-noise", *walk]
    assert main([*path, "--out", str(outs[1])]) == 0
    assert main(["interpolate", refiner, "scenes:5", "--noise", "--num", "4", "--out", str(outs[2]), "--steps", "3"]) == 0
    assert [picture_size(out) for out in outs] == [grid_size(6, rows=13), grid_size(6), grid_size(6)]
    shown = capsys.readouterr().out
    assert "deviations along direction 1 by" in shown and "beta" not in shown
    assert "the first image, 4 images of the path, the second image" in shown
    assert "the image, its reconstruction, 4 images of the path" in shown


def test_the_points_of_a_path_share_noise_only_when_told(refiner, tmp_path):
    made = {}
    for name, flags in {"own": [], "shared": ["--shared-noise"]}.items():
        arguments = ["interpolate", refiner, "scenes:5", "scenes:5", "--num", "2", "--sampler", "ddpm", "--steps", "3", *flags]
        assert main([*arguments, "--out", str(tmp_path / f"{name}.png")]) == 0
        grid = np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=int)
        made[name] = abs(grid[:, 68:132] - grid[:, 136:200]).max()  # the two points of a path from an image to itself
    assert made["shared"] <= 1 < made["own"]


def test_encode_writes_codes_with_names_or_factors(model, photos, tmp_path):
    assert main(["encode", model, str(photos), "--out", str(tmp_path / "photos.npz"), "--batch-size", "5"]) == 0
    assert main(["encode", model, "scenes", "--out", str(tmp_path / "scenes.npz"), "--limit", "6", "--beta", "0.25"]) == 0
    with np.load(tmp_path / "photos.npz") as found:
        assert found["codes"].shape == (12, 4 * 8 * 8) and found["codes"].dtype == np.float32
        assert found["names"].tolist() == [f"{index:02}.png" for index in range(12)]
        images = data.to_float(data.ImageFolder(photos, SIDE, progress=False).images([11]))
        expected = tiny_model().encode(images, 0.5).flatten().numpy()
        np.testing.assert_allclose(found["codes"][11], expected, atol=1e-5)
    with np.load(tmp_path / "scenes.npz") as found:
        assert found["beta"] == 0.25
        assert found["factors"].shape == (6, 6)
        assert found["factor_names"].tolist() == list(data.Scenes.factor_names)


def test_sample_decodes_the_noise_of_a_baseline(baseline, tmp_path, capsys):
    out = tmp_path / "samples"
    assert main(["sample", baseline, "--num-images", "3", "--seed", "4", "--out", str(out)]) == 0
    expected = data.to_uint8(load_pretrained(baseline).generate(3, seed=4)).permute(0, 2, 3, 1).numpy()
    for index, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(out / f"{index:06}.png")), image)
    assert "sampling" not in capsys.readouterr().err  # one decoding has no steps to show


def test_encode_writes_the_codes_of_a_baseline_without_a_beta(baseline, photos, tmp_path, capsys):
    assert main(["encode", baseline, str(photos), "--out", str(tmp_path / "photos.npz")]) == 0
    images = data.to_float(data.ImageFolder(photos, SIDE, progress=False).images(range(12)))
    with np.load(tmp_path / "photos.npz") as found:
        assert found.files == ["codes", "names"]
        np.testing.assert_allclose(found["codes"], load_pretrained(baseline).encode(images).flatten(1), atol=1e-5)
    assert "beta" not in capsys.readouterr().out


def test_flags_of_another_class_of_model_are_refused(baseline, tmp_path, error_of):
    out = tmp_path / "out.png"

    def error(*arguments):
        return error_of(*arguments, "--out", out)

    assert "takes no --steps" in error("sample", baseline, "--steps", 7)
    assert "takes no --sampler or --steps" in error("sample", baseline, "--sampler", "ode", "--steps", 7)
    codes = ("--out", tmp_path / "codes.npz")
    assert "takes no betas, got [0.5]" in error_of("encode", baseline, tmp_path / "nowhere", "--beta", 0.5, *codes)
    for name, images in {"edit": ["scenes:1"], "interpolate": ["scenes:1", "scenes:2"], "report": []}.items():
        line = error(name, baseline, *images)
        assert f"{name} needs a DenoisingMultiBetaVAE or a DiffusionVAE, {baseline} holds a BaselineVAE, which sample" in line
    assert not out.exists()


def test_flags_of_the_other_system_are_refused(model, refiner, photos, tmp_path, error_of):
    out = tmp_path / "out.png"

    def error(name, *arguments):
        return error_of(name, *arguments, "--out", out)

    two = ("scenes:1", "scenes:2")
    assert "takes no betas, got [0.5]" in error("edit", refiner, "scenes:1", "--beta", 0.5)
    assert "takes no betas, got [0.5]" in error("interpolate", refiner, *two, "--beta", 0.5)
    assert "a DiffusionVAE takes no --dims" in error("interpolate", refiner, *two, "--dims", 0)
    assert "takes no --how or --shared-noise" in error("interpolate", model, *two, "--how", "lerp", "--shared-noise")
    assert "a DenoisingMultiBetaVAE takes no --noise" in error("interpolate", model, "scenes:1", "--noise")
    assert "name a second image, or --noise" in error("interpolate", refiner, "scenes:1")
    assert "name no second" in error("interpolate", refiner, *two, "--noise")
    assert "ddpm, ddim, got 'ode2'" in error("interpolate", refiner, *two, "--sampler", "ode2")
    assert "got 'ddim'" in error("edit", model, "scenes:1", "--sampler", "ddim")
    assert "give one" in error("edit", refiner, "scenes:1", "--direction", 0, "--attribute", "large")
    assert "has one representation, and no beta to invert" in error("edit", refiner, "scenes:1", "--invert")
    assert "has one representation, and no beta to invert" in error("interpolate", refiner, *two, "--invert")
    assert "no attribute 'hat'; they have warm_floor, " in error("edit", refiner, "scenes:1", "--attribute", "hat")
    assert "they have none" in error("edit", refiner, "scenes:1", "--attribute", "hat", "--directions-from", photos)
    assert not out.exists()


def test_evaluate_writes_all_numbers_and_prints_a_table(model, tmp_path, capsys):
    out = tmp_path / "new" / "scores.json"
    flags = ["--betas", "0.3", "0.5", "--num-images", "50", "--auroc", "exact", "--no-fidelity", "--seed", "3"]
    assert main(["evaluate", model, "--out", str(out), *flags]) == 0
    result = json.loads(out.read_text())
    assert [row["beta"] for row in result["rows"]] == [0.3, 0.5]
    assert (result["data"]["source"], result["rows"][0]["tad"]["auroc"]) == ("scenes", "exact")
    assert result["rows"][0]["mig"]["seed"] == 3 and "generation" not in result
    shown = capsys.readouterr().out
    assert f"{result['rows'][1]['mig']['mig']:.3f}" in shown and shown.splitlines()[-1].startswith(f"{out}: ")


def test_evaluate_measures_the_likelihood_where_asked(model, baseline, tmp_path, capsys, error_of, monkeypatch):
    monkeypatch.setattr("multibeta.evaluation.likelihood.GAUSSIAN_IMAGES", 100)
    flags = ["--out", str(tmp_path / "scores.json"), "--betas", "0.5", "--num-images", "12", "--no-fidelity", "--likelihood"]
    assert main(["evaluate", model, *flags]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())["likelihood"]
    bits, error = found["bits_per_dimension"], found["error"]["bits_per_dimension"]
    shown = capsys.readouterr().out
    assert (
        f"at most {bits:.3f} ± {error:.3f} bits per dimension of 12 images, of which the model may have seen any, by ode2"
        in shown
    )
    assert f"a Gaussian of the pixels of 100 others: {found['gaussian']:.3f} ± " in shown
    message = error_of("evaluate", baseline, "--data", "scenes", *flags[:2], *flags[-2:])
    assert "a likelihood is known of a DenoisingMultiBetaVAE, not of a BaselineVAE: leave it out" in message


def test_evaluate_measures_a_baseline_on_a_folder(baseline, photos, tmp_path, capsys):
    arguments = ["evaluate", baseline, "--data", photos, "--out", tmp_path / "scores.json"]
    assert main([str(argument) for argument in arguments]) == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["generation"]["num_images"] == result["generation"]["num_real"] == 12
    assert result["skipped"].keys() == {"mig", "tad"} and "no known factors" in capsys.readouterr().out


def test_evaluate_probes_codes_of_a_folder_of_classes(model, photos, tmp_path, capsys, error_of):
    flags = ["--probe", "--no-fidelity", "--betas", "0.3", "0.8", "--out", str(tmp_path / "a.json")]
    assert "a probe needs known classes" in error_of("evaluate", model, "--data", photos, *flags)
    for name, colour in (("dark", 20), ("light", 200)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (SIDE, SIDE), (colour, colour + 3 * index, colour)).save(
                tmp_path / "classes" / name / f"{index}.png"
            )
    assert main(["evaluate", model, "--data", str(tmp_path / "classes"), *flags]) == 0
    written, shown = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    assert [row["probe"].keys() >= {"accuracy", "nearest_1", "nearest_5", "sampled"} for row in written["rows"]] == [True] * 2
    assert main(["encode", model, str(tmp_path / "classes"), "--out", str(tmp_path / "a.npz"), "--limit", "5"]) == 0
    codes = np.load(tmp_path / "a.npz")
    assert [codes["class_names"][label] for label in codes["labels"]] == [name.split("/")[0] for name in codes["names"]]
    assert written["data"]["class_names"] == ["dark", "light"] and "probe of 2 classes, learned from 8 images" in shown


def test_evaluate_refines_what_a_second_system_sketches(refiner, tmp_path):
    flags = ["--num-images", "6", "--sampler", "ddpm", "--steps", "2", "--data", str(tmp_path / "photos")]
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(data.Scenes(SIDE).images(range(0, 80000, 10000)).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / "photos" / f"{index}.png")
    assert main(["evaluate", refiner, "--out", str(tmp_path / "scores.json"), *flags]) == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    for found in (result["generation"], result["rows"][0]["denoised"]):
        assert (found["sampler"], found["steps"]) == ("ddpm", 2)
    assert "sampler" not in result["rows"][0]["direct"]


def test_evaluate_refuses_walks_that_a_model_cannot_take_before_it_opens_images(model, refiner, baseline, tmp_path, error_of):
    def error(which, *arguments):
        return error_of("evaluate", which, "--data", tmp_path / "nowhere", "--out", tmp_path / "out.json", *arguments)

    assert "ddpm, ddim, got 'ode2'" in error(refiner, "--sampler", "ode2")
    assert "got 'ddim'" in error(model, "--sampler", "ddim")
    for which in (model, refiner):
        assert "steps must lie between 1 and" in error(which, "--steps", -5)
        assert "steps must lie between 1 and" in error(which, "--steps", 10**6)
    assert "a BaselineVAE decodes at once and takes no sampler or steps" in error(baseline, "--sampler", "ode", "--steps", 3)


def test_a_recorded_folder_that_is_gone_is_named_with_the_flag_that_replaces_it(tmp_path, error_of):
    gone = tiny_model()
    gone.info["recipe"] = {"name": "mine", "data": {"source": str(tmp_path / "gone")}}
    gone.save_pretrained(tmp_path / "model")
    for flag, arguments in (
        ("--data", ("evaluate", tmp_path / "model", "--out", tmp_path / "scores.json")),
        ("--directions-from", ("edit", tmp_path / "model", "scenes:1", "--out", tmp_path / "edited.png")),
    ):
        line = error_of(*arguments)
        assert f"the model records {tmp_path / 'gone'} as its data" in line and f"name other images with {flag}" in line
        assert "the model records" not in error_of(*arguments, flag, tmp_path / "elsewhere")


def test_evaluate_refuses_what_cannot_be_measured(model, photos, tmp_path, error_of):
    out = tmp_path / "scores.json"

    def error(*arguments):
        return error_of("evaluate", model, "--out", out, *arguments)

    assert "must be a .json file" in error_of("evaluate", model, "--out", tmp_path / "scores.txt")
    assert "num_images must be at least 1" in error("--num-images", 0)
    assert "beta must lie in [0, 1], got 1.3" in error("--betas", 1.3)
    assert "NAME:PATH" in error("--data", tmp_path / "nowhere")
    assert "DCI needs known factors" in error("--data", photos, "--dci")
    assert "at least 4 images are needed" in error("--num-images", 2)
    assert "nothing is downloaded" in error("--features", tmp_path / "inception.pth")
    assert "need the feature network" in error("--reference", tmp_path / "stats.npz")
    tiny_model().save_pretrained(tmp_path / "bare")
    assert "with --data" in error_of("evaluate", tmp_path / "bare", "--out", out)
    assert not out.exists()


def test_errors_are_one_line(model, photos, tmp_path, error_of):
    def error(*arguments):
        return error_of(*arguments)

    out = ("--out", tmp_path / "out.png")
    (tmp_path / "empty").mkdir()
    assert "beta must lie in [0, 1], got 1.3" in error("edit", model, "scenes:1", *out, "--beta", 1.3)
    assert "direction must lie between 0" in error("edit", model, "scenes:1", *out, "--direction", 999)
    assert "at least one image" in error("edit", model, *out)
    assert "dims must lie between" in error("interpolate", model, "scenes:1", "scenes:2", *out, "--dims", 9)
    assert "num must be at least 2" in error("interpolate", model, "scenes:1", "scenes:2", *out, "--num", 1)
    assert "[0, 479999]" in error("edit", model, "scenes:480000", *out)
    assert "No such file" in error("edit", model, tmp_path / "nothing.jpg", *out)
    assert "steps must lie between 1 and 60" in error("sample", model, *out, "--steps", 61)
    assert "must be a .png or .npz file" in error("sample", model, "--out", tmp_path / "out.jpg")
    assert "shipped" in error("sample", "nothing", *out)
    codes = ("--out", tmp_path / "codes.npz")
    assert "found no images" in error("encode", model, tmp_path / "empty", *codes)
    assert "out must be a .npz file, got codes" in error("encode", model, photos, "--out", "codes")
    assert "limit must be at least 1" in error("encode", model, photos, *codes, "--limit", 0)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("there", "flags", "device", "said"),
    (
        (True, (), "cuda", "computing on A Big GPU"),
        (True, ("--device", "cpu"), "cpu", "computing on the CPU: it was asked for, there is a GPU"),
        (False, (), "cpu", "computing on the CPU: torch sees no GPU"),
    ),
)
def test_commands_compute_on_the_gpu_where_there_is_one(monkeypatch, caplog, tmp_path, there, flags, device, said):
    def load(name, device):
        raise ValueError(f"asked for on {device}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Big GPU")
    monkeypatch.setattr("multibeta.cli.arguments.load_pretrained", load)
    distribution.say_device.cache_clear()
    caplog.set_level("INFO", "multibeta")
    for command, out in {"sample": "samples", "evaluate": "scores.json"}.items():
        with pytest.raises(ValueError, match=f"asked for on {device}$"):
            main([command, "scenes32", "--debug", *flags, "--out", str(tmp_path / out)])
    assert [record.message for record in caplog.records] == [said]
    distribution.say_device.cache_clear()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["sample", "nothing", "--debug", "--out", str(tmp_path / "out.png")])


def test_a_model_without_its_data_asks_for_some(tmp_path, error_of):
    tiny_model().save_pretrained(tmp_path / "bare")
    line = error_of("edit", tmp_path / "bare", "scenes:1", "--out", tmp_path / "out.png")
    assert "--directions-from" in line


def test_an_interrupted_training_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise TrainingInterrupted("stopped after step 3: --resume goes on")

    monkeypatch.setattr(recipes, "run", interrupt)
    monkeypatch.setattr("multibeta.cli.demo.SHIPPED", "no-such-model")
    assert main(["train", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("multibeta: stopped after step 3: --resume goes on\n")
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith(f"multibeta: stopped; run multibeta demo --out {tmp_path} again to go on\n")


def test_report_passes_its_flags_on(model, tmp_path, monkeypatch, capsys):
    calls = stub_report(monkeypatch)
    out = tmp_path / "report.html"
    assert main(["report", model, "--out", str(out), "--data", "scenes", "--quick"]) == 0
    assert calls == [(out, {"source": "scenes", "quick": True, "progress": True, "training_folder": None})]


@pytest.mark.parametrize("name", ["report.txt", "report", "report.json"])
def test_report_writes_an_html_file(name, model, tmp_path, error_of):
    assert "must be a .html file" in error_of("report", model, "--out", tmp_path / name)


def test_report_opens_the_model_beside(model, refiner, tmp_path, monkeypatch, error_of):
    calls = stub_report(monkeypatch)
    flags = ["--out", str(tmp_path / "report.html"), "--beside", model]
    assert main(["report", refiner, *flags]) == main(["report", refiner, *flags, "--beta", "0.8"]) == 0
    assert [type(options["beside"]) for _, options in calls] == [DenoisingMultiBetaVAE] * 2
    assert "beta" not in calls[0][1] and calls[1][1]["beta"] == 0.8
    assert "--beside MODEL" in error_of("report", refiner, "--beta", 0.8)


def test_report_finds_the_curves_beside_a_trained_model(model, tmp_path, monkeypatch):
    calls = stub_report(monkeypatch)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "metrics.jsonl").touch()
    for folder in (model, str(tmp_path)):
        assert main(["report", folder, "--out", str(tmp_path / "report.html")]) == 0
        assert calls.pop()[1]["training_folder"] == tmp_path


def test_demo_trains_once_and_goes_on_without_a_shipped_model(tmp_path, monkeypatch, capsys):
    calls, trained = stub_report(monkeypatch), []

    def run(recipe, folder, **options):
        trained.append((recipe.name, options["resume"]))
        tiny_model().save_pretrained(folder / "model")

    monkeypatch.setattr(recipes, "run", run)
    monkeypatch.setattr("multibeta.cli.demo.SHIPPED", "no-such-model")
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    assert main(["demo", "--out", str(out)]) == 0
    assert "shipped model is missing" in capsys.readouterr().out
    assert trained == [("scenes32-small", False)]
    assert [target for target, _ in calls] == [out / "report.html"] * 2


def test_demo_shows_the_shipped_model_first(model, tmp_path, monkeypatch, capsys, picture_size, grid_size):
    stub_report(monkeypatch)
    monkeypatch.setattr(recipes, "run", lambda *_, **__: None)
    monkeypatch.setattr("multibeta.pipelines.base.shipped_models", lambda: [tmp_path / "model"])
    monkeypatch.setattr("multibeta.cli.demo.SHIPPED", "model")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2  # the training was skipped: there is no model to report
    assert picture_size(tmp_path / "demo" / "samples.png") == grid_size(8, rows=8)
    assert picture_size(tmp_path / "demo" / "edited.png") == grid_size(6, rows=4)
    assert picture_size(tmp_path / "demo" / "interpolated.png") == grid_size(10)
    assert picture_size(tmp_path / "demo" / "sharpened.png") == grid_size(4, rows=3)
    assert capsys.readouterr().out.count("took") == 5


def test_demo_shows_few_evaluations_of_a_model_with_a_flow_map(tmp_path, picture_size, capsys):
    whole = tiny_model()
    whole.flow_map = FlowMap.of(whole.diffusion.unet, whole.diffusion.config, whole.num_steps, span_channels=8)
    few_evaluations(whole, tmp_path / "few.png")
    said, (width, height) = capsys.readouterr().out, picture_size(tmp_path / "few.png")
    assert all(f"{name} {steps}: " in said for steps, name in ((1, "map"), (4, "map"), (whole.num_steps, "ancestral")))
    assert width > height  # labels beside eight images a row, five rows


def stub_report(monkeypatch):
    """Replace the report by a list of its calls."""
    calls = []
    module = types.ModuleType("multibeta.report")
    module.write_report = lambda model, out, **options: calls.append((out, options))
    monkeypatch.setitem(sys.modules, "multibeta.report", module)
    return calls


@pytest.fixture
def grey_model(tmp_path):
    whole = tiny_model()
    vae = MultiBetaVAE(dataclasses.replace(whole.vae.config, image_channels=1))
    DenoisingMultiBetaVAE(vae, whole.diffusion).save_pretrained(tmp_path / "grey")
    return str(tmp_path / "grey")


@pytest.fixture
def mixed_photos(tmp_path):
    """Grey and colour, of 8 and of 16 bits, under names that say nothing."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(12):
        values = np.random.default_rng(number).integers(0, 4096, (20, 24), dtype=np.uint16)
        small = Image.fromarray((values >> 4).astype(np.uint8))
        image = (Image.fromarray(values), small, small.convert("RGB"))[number % 3]
        image.save(folder / f"{number:02}{('', '.jfif', '.png')[number % 3]}", ("PNG", "JPEG", "PNG")[number % 3])
    return folder


def test_a_grey_model_takes_images_of_any_kind(grey_model, mixed_photos, tmp_path, capsys):
    photos = [str(mixed_photos / name) for name in ("00", "01.jfif", "02.png")]
    out, steps = str(tmp_path / "out.png"), ["--steps", "2"]
    assert (
        main(["edit", grey_model, *photos, str(mixed_photos), "--out", out, "--directions-from", str(mixed_photos), *steps]) == 0
    )
    assert main(["interpolate", grey_model, *photos[:2], "--out", out, "--num", "2", *steps]) == 0
    assert main(["sample", grey_model, "--out", out, "--num-images", "2", *steps]) == 0
    assert main(["encode", grey_model, str(mixed_photos), "--out", str(tmp_path / "codes.npz")]) == 0
    with np.load(tmp_path / "codes.npz") as stored:
        assert len(stored["codes"]) == 12 and stored["names"][0] == "00"
    scores = ["--out", str(tmp_path / "scores.json"), "--num-images", "10", "--betas", "0.5", *steps]
    assert main(["evaluate", grey_model, "--data", str(mixed_photos), *scores]) == 0
    capsys.readouterr()
    assert main(["encode", grey_model, "scenes", "--out", str(tmp_path / "codes.npz")]) == 2
    assert "scenes has RGB images of 3 channels, 1 are asked for" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["truncated.jpg", "fifo.png", "drawing.svg", "bomb.png"])
def test_errors_about_an_image_name_its_file(model, mixed_photos, tmp_path, capsys, given):
    path = tmp_path / given
    if given == "fifo.png":
        os.mkfifo(path)
    elif given == "bomb.png":
        header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
        path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + zlib.crc32(header).to_bytes(4, "big"))
    else:
        path.write_bytes((mixed_photos / "01.jfif").read_bytes()[:300] if given == "truncated.jpg" else b"<svg/>")
    for command in ("edit", "interpolate"):
        assert main([command, model, str(mixed_photos / "02.png"), str(path), "--out", str(tmp_path / "out.png")]) == 2
        assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_a_dry_run_shares_its_cache_with_the_training(mixed_photos, tmp_path, caplog):
    typed = ["train", "--recipe", "scenes32-small", "--data.source", str(mixed_photos), "--vae.resolution", "16", "--dry-run"]
    assert main([*typed, "--data.upscale"]) == 0
    (cache,) = (tmp_path / "cache").glob("mixed-*.npy")
    assert f"to a cache of 0.0 MiB in {tmp_path / 'cache'}" in caplog.text
    assert main(typed) == 0
    assert list((tmp_path / "cache").glob("mixed-*.npy")) == [cache]
