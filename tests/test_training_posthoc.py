"""Averages of any length after the training: closed forms, and every step of a training summed up directly."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from multibeta import checkpoints, data, evaluation, recipes
from multibeta.cli import main
from multibeta.pipelines import load_pretrained
from multibeta.training import TrainingOptions, TrainingStopped, reconstruct_ema, train
from multibeta.training.posthoc import PostHocAverages, combination, exponent_of, products
from tiny_recipes import tiny

WIDTHS = (0.05, 0.1)


def profile(steps, width):
    """What each of `steps` updates counts in an average of that width: the profile integrated over it."""
    edges = (np.arange(steps + 1) / steps) ** (exponent_of(width) + 1)
    return np.diff(edges)


class Pixels:
    resolution, channels = 2, 3

    def __len__(self):
        return 64

    def images(self, indices):
        return torch.randint(0, 256, (64, 3, 2, 2), generator=torch.Generator().manual_seed(0)).byte()[indices]


class Walk:
    """A network with statistics of batches, that remembers its weights after every update."""

    def __init__(self, stop_at=None):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 12))
        self.weights, self.stop_at = [], stop_at

    def __call__(self, batch, generator):
        if batch.step == self.stop_at:
            raise TrainingStopped("killed")
        if batch.step:
            self.remember()
        return (self.module(batch.images) - batch.images.flatten(1)).square().mean(), {}

    def remember(self):
        self.weights.append({name: value.detach().clone() for name, value in self.module.named_parameters()})


def options(steps=96, **changes):
    common = {"batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 5, "precision": "fp32", "posthoc_ema": WIDTHS}
    return TrainingOptions(steps, **common | {"snapshot_every": 6, "checkpoint_every": 24} | changes)


def run(folder, objective=None, chosen=None, **keywords):
    return train(objective or Walk(), Pixels(), chosen or options(), folder, progress=False, **keywords)


class TestProfiles:
    def test_exponents_are_the_published_ones(self):
        assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005) and exponent_of(0.10) == pytest.approx(6.94, abs=0.005)

    @pytest.mark.parametrize("width", [0.02, 0.1, 0.25])
    def test_the_width_is_the_deviation_of_the_profile(self, width):
        g = exponent_of(width)
        mean, square = (integrate.quad(lambda s, n=n: s**n * (g + 1) * s**g, 0, 1)[0] for n in (1, 2))
        assert np.sqrt(square - mean**2) == pytest.approx(width, rel=1e-6)

    @pytest.mark.parametrize(("time", "other"), [(3.0, 7.0), (7.0, 3.0), (5.0, 5.0)])
    def test_inner_products_are_the_integral(self, time, other):
        g, h = 2.5, 6.94

        def product(s):
            return (g + 1) * s**g / time ** (g + 1) * (h + 1) * s**h / other ** (h + 1)

        exact = integrate.quad(product, 0, min(time, other))[0]
        assert products(*map(np.array, ([time], [g], [other], [h])))[0, 0] == pytest.approx(exact, rel=1e-9)

    def test_a_width_that_was_tracked_is_one_snapshot(self):
        times = [float(t) for t in range(100, 1700, 100) for _ in WIDTHS]
        weights, error = combination(times, WIDTHS * 16, 1600.0, 0.1)
        assert error < 1e-6 and weights[-1] == pytest.approx(1, abs=1e-6) and np.abs(weights[:-1]).max() < 1e-6

    def test_the_error_is_that_of_the_profiles_and_falls_with_the_number_of_snapshots(self):
        errors = []
        for count in (8, 16, 32):
            times = np.repeat(np.arange(1, count + 1) * 3200 // count, 2)
            weights, error = combination(list(times), WIDTHS * count, 3200.0, 0.15)
            rows = [np.pad(profile(t, w), (0, 3200 - t)) for t, w in zip(times, WIDTHS * count, strict=True)]
            wanted = profile(3200, 0.15)
            direct = np.linalg.norm(weights @ np.array(rows) - wanted) / np.linalg.norm(wanted)
            assert direct == pytest.approx(error, rel=0.02)
            errors.append(error)
        assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[1] < 0.01

    @pytest.mark.parametrize(("count", "most"), [(16, 0.025), (32, 0.01)])
    def test_few_snapshots_meet_widths_from_below_to_twice_those_that_are_tracked(self, count, most):
        times = np.repeat(np.arange(1, count + 1) / count, 2)
        assert max(combination(list(times), WIDTHS * count, 1.0, width)[1] for width in np.linspace(0.07, 0.2, 14)) < most

    @pytest.mark.parametrize("width", [0.0, 0.29, float("nan")])
    def test_other_widths_are_refused(self, width):
        with pytest.raises(ValueError, match=r"sigma_rel must be .* above 0 and at most 0.28"):
            exponent_of(width)
        with pytest.raises(ValueError, match="posthoc_ema must be"):
            options(posthoc_ema=(width,))

    @pytest.mark.parametrize("left_out", [(), (3, 4, 5, 11)])
    def test_the_average_weighs_each_update_by_its_profile(self, tmp_path, left_out):
        module = nn.Module()
        module.at = nn.Parameter(torch.zeros(20))
        averages = PostHocAverages(module, WIDTHS, tmp_path)
        for step in set(range(20)) - {*left_out}:
            module.at.data = torch.eye(20)[step]
            averages.update(step)
        for width in WIDTHS:
            wanted = profile(20, width)
            for step in left_out:  # the next weights stand for it
                wanted[step + 1], wanted[step] = wanted[step + 1] + wanted[step], 0
            assert averages.state[f"at/{width}"].numpy() == pytest.approx(wanted, abs=1e-6)


class TestTraining:
    @pytest.mark.parametrize("width", [0.05, 0.07, 0.1, 0.15])
    def test_what_is_reconstructed_is_the_average_of_all_steps(self, tmp_path, width):
        objective = Walk()
        run(tmp_path, objective)
        objective.remember()
        state = reconstruct_ema(tmp_path, width)
        error = combination([t for t in range(6, 97, 6) for _ in WIDTHS], WIDTHS * 16, 96, width)[1]
        assert len(objective.weights) == 96 and state.keys() == objective.module.state_dict().keys()
        g = np.array([exponent_of(width)])
        size = float(products(np.array([96.0]), g, np.array([96.0]), g)[0, 0]) ** 0.5
        for name, last in objective.module.named_parameters():
            walked = torch.stack([weights[name] for weights in objective.weights]).double()
            direct = torch.einsum("t,t...->...", torch.from_numpy(profile(96, width)), walked)
            bound = error * size * walked.square().sum(0).sqrt()  # Cauchy-Schwarz: the profiles differ by `error` of their size
            assert ((state[name].double() - direct).abs() <= 1e-5 + bound).all()
            assert not torch.allclose(state[name], last, atol=1e-4)

    def test_what_is_not_averaged_is_that_of_the_last_step(self, tmp_path):
        objective = Walk()
        run(tmp_path, objective)
        assert torch.equal(reconstruct_ema(tmp_path, 0.07)["2.running_mean"], objective.module[2].running_mean)

    def test_it_changes_nothing_else(self, tmp_path):
        tracked, plain = run(tmp_path / "tracked"), run(tmp_path / "plain", chosen=options(posthoc_ema=()))
        assert all(torch.equal(tracked[name], plain[name]) for name in plain)
        assert not (tmp_path / "plain" / "snapshots").exists()

    def test_a_resumed_training_leaves_the_same_snapshots(self, tmp_path):
        run(tmp_path / "whole")
        with pytest.raises(TrainingStopped):
            run(tmp_path / "stopped", Walk(stop_at=40))
        assert max((tmp_path / "stopped" / "snapshots").iterdir()).name == "000000036"  # the checkpoint is of step 24
        run(tmp_path / "stopped", resume=True)
        names = sorted(path.name for path in (tmp_path / "whole" / "snapshots").iterdir())
        assert len(names) == 16 and names == sorted(path.name for path in (tmp_path / "stopped" / "snapshots").iterdir())
        for name in names:
            whole, resumed = (checkpoints.load_folder(tmp_path / each / "snapshots" / name)[0] for each in ("whole", "stopped"))
            assert all(torch.equal(resumed[key][part], whole[key][part]) for key in whole for part in whole[key])

    def test_snapshots_of_steps_that_are_made_again_go(self, tmp_path):
        with pytest.raises(TrainingStopped):
            run(tmp_path, Walk(stop_at=40))
        with pytest.raises(TrainingStopped):
            run(tmp_path, Walk(stop_at=26), options(120), resume=True)  # longer, so that its learning rate is another
        assert max((tmp_path / "snapshots").iterdir()).name == "000000024"

    def test_a_checkpoint_that_knows_nothing_of_it_is_resumed_without(self, tmp_path):
        chosen = options(posthoc_ema=())
        with pytest.raises(TrainingStopped):
            run(tmp_path, Walk(stop_at=30), chosen)
        config = tmp_path / "checkpoint" / "config.json"
        said = json.loads(config.read_text())
        del said["options"]["posthoc_ema"], said["options"]["snapshot_every"]
        config.write_text(json.dumps(said))
        with pytest.raises(ValueError, match="posthoc_ema was None, now"):
            run(tmp_path, chosen=options(), resume=True)
        run(tmp_path, chosen=chosen, resume=True)

    def test_a_width_far_from_the_tracked_ones_is_warned_of(self, tmp_path, caplog):
        run(tmp_path)
        with caplog.at_level(logging.WARNING):
            reconstruct_ema(tmp_path, 0.07)
            assert not caplog.records
            reconstruct_ema(tmp_path, 0.02)
        assert "width 0.02 is met with an error of" in caplog.text

    def test_without_snapshots_it_says_how_to_get_them(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no snapshots: train with posthoc_ema"):
            reconstruct_ema(tmp_path, 0.1)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder, recipe = tmp_path_factory.mktemp("run"), tiny()
    training = dataclasses.replace(recipe.diffusion_training, steps=6, posthoc_ema=WIDTHS, snapshot_every=1)
    recipes.run(dataclasses.replace(recipe, diffusion_training=training), folder, progress=False)
    return folder


class TestModel:
    def test_the_command_makes_a_model_with_another_average(self, run_folder, tmp_path, capsys):
        assert main(["average", str(run_folder), "--sigma-rel", "0.15", "--out", str(tmp_path / "longer")]) == 0
        assert "multibeta spectrum" in capsys.readouterr().out
        before, longer = load_pretrained(run_folder / "model"), load_pretrained(tmp_path / "longer")
        wanted = reconstruct_ema(run_folder / "diffusion", 0.15)
        got = longer.diffusion.state_dict()
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
        assert not torch.equal(got["unet.conv_out.weight"], before.diffusion.unet.conv_out.weight)
        assert torch.equal(longer.vae.decoder.conv_out.weight, before.vae.decoder.conv_out.weight)
        assert torch.equal(longer.diffusion.sigmas, before.diffusion.sigmas)  # the process is that of the VAE
        assert longer.spectrum is None and longer.info["sigma_rel"] == 0.15
        assert longer.generate(1, steps=2).isfinite().all()

    def test_of_several_widths_that_is_kept_whose_images_are_nearest(self, run_folder, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(evaluation, "usual_features", lambda train_set, *_, **__: evaluation.pixel_features(train_set))
        scenes, widths = recipes.open_data(tiny()), (0.05, 0.1, 0.2)
        features, real = evaluation.pixel_features(scenes[0]), data.to_float(scenes[1].images(range(6)))
        models = [load_pretrained(run_folder / "model"), *(recipes.average(run_folder, width) for width in widths)]
        distances = [features.distance(model.generate(6, "ode2", 3), real) for model in models]

        model, rows = evaluation.compare_averages(run_folder, widths, features, real, sampler="ode2", steps=3, progress=False)
        assert [row["sigma_rel"] for row in rows] == [None, *widths]
        assert [row["frechet"] for row in rows] == pytest.approx(distances, rel=1e-4)
        nearest = min(rows[1:], key=lambda row: row["frechet"])["sigma_rel"]
        assert model.info["sigma_rel"] == nearest

        flags = ["--num-images", "6", "--sampler", "ode2", "--steps", "3", "--out", str(tmp_path / "best")]
        assert main(["average", str(run_folder), "--sigma-rel", *map(str, widths), *flags]) == 0
        shown = [line.split() for line in capsys.readouterr().out.splitlines()]
        table = [[row["sigma_rel"] or "trained", row["frechet"]] for row in rows]
        assert shown[1:5] == [[f"{width}", f"{distance:.3f}"] for width, distance in table]
        saved, wanted = load_pretrained(tmp_path / "best"), reconstruct_ema(run_folder / "diffusion", nearest)
        assert all(torch.equal(value, wanted[name]) for name, value in saved.diffusion.state_dict().items())

    def test_what_cannot_be_is_said(self, run_folder, tmp_path, error_of):
        out = ("--out", str(tmp_path / "model"))
        alone = error_of("average", str(run_folder), "--sigma-rel", "0.1", "--num-images", "6", "--steps", "2", *out)
        assert "--num-images, --steps compare averages: name several widths" in alone
        real = torch.zeros(4, 3, 16, 16)
        with pytest.raises(ValueError, match="name at least one width"):
            evaluation.compare_averages(run_folder, (), lambda images: images, real)
        with pytest.raises(ValueError, match="sigma_rel must be"):
            evaluation.compare_averages(run_folder, (0.1, 0.4), lambda images: images, real)
        assert "sigma_rel must be" in error_of("average", str(run_folder), "--sigma-rel", "0.4", *out)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"widths": "0.1 0.4"}, "sigma_rel must be"),
            ({"widths": "0.1 nan"}, "sigma_rel must be finite"),
            ({"widths": "0.1 0.2 0.1"}, "name each width once, 0.1 came more often"),
            ({"out": "afile"}, "afile is a file: choose another folder"),
            ({"out": "afile/model"}, "afile is a file: choose another folder"),
            ({"out": "run"}, "run is the run itself: choose another --out"),
            ({"snapshots": False}, "holds no snapshots: train with posthoc_ema"),
            ({"steps": "0"}, "steps must lie between 1"),
        ],
    )
    def test_what_cannot_be_is_said_before_any_work(self, run_folder, tmp_path, monkeypatch, error_of, change, words):
        for module, name in ((evaluation, "usual_features"), (evaluation, "equally_many"), (recipes, "open_data")):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work has begun"))
        (tmp_path / "afile").touch()
        left_out = [] if change.get("snapshots", True) else ["snapshots"]
        shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns(*left_out))
        flags = ["--out", tmp_path / change.get("out", "new"), "--steps", change.get("steps", "2")]
        assert words in error_of("average", tmp_path / "run", "--sigma-rel", *change.get("widths", "0.1 0.2").split(), *flags)

    def test_a_run_that_follows_the_widths_is_none_of_them(self, run_folder, tmp_path):
        assert main(["average", "--sigma-rel", "0.15", str(run_folder), "--out", str(tmp_path / "a")]) == 0
        assert load_pretrained(tmp_path / "a").info["sigma_rel"] == 0.15

    def test_a_model_is_not_written_over(self, run_folder, tmp_path, error_of):
        assert "holds a model: choose another" in error_of(
            "average", str(run_folder), "--sigma-rel", "0.1", "--out", str(run_folder / "model")
        )
