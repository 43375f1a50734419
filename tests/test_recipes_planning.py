"""Steps from minutes: the arithmetic for given seconds, the measured part on a tiny recipe, and a run that is resumed."""

import dataclasses
import logging
import re

import pytest
import torch

from multibeta import data, recipes
from multibeta.recipes import planning
from multibeta.recipes.planning import LEAST_STEPS, MOST_EPOCHS, Measured, plan_time, with_plan
from multibeta.recipes.recipe import record, recorded_recipe
from tiny_recipes import tiny, tiny_diffusion_vae

BATCHES = {"vae_training": 64, "diffusion_training": 32}
FAST = Measured({"vae_training": 0.1, "diffusion_training": 0.05}, 1e-4)


ENCODINGS = 33


def fit_to_time(*arguments, **options):
    """The recipe alone."""
    return planning.fit_to_time(*arguments, **options)[0]


def plan(minutes, num_images=20_000, measured=FAST, encodings=ENCODINGS):
    return plan_time(minutes, measured, num_images, BATCHES, encodings)


@pytest.fixture
def measured(monkeypatch):
    """What is measured here is `FAST`; returns the numbers of images that it was measured with."""
    counts = []
    monkeypatch.setattr(planning, "measure", lambda _, images, device: counts.append(len(images)) or FAST)
    return counts


def known_minutes(monkeypatch, name="tiny", minutes=5.0):
    monkeypatch.setitem(planning.MINUTES, name, minutes)


class TestArithmetic:
    def test_the_minutes_are_filled(self):
        first, second = plan(40, encodings=0).stages.values()
        assert (first.steps, second.steps) == (10_800, 24_000)  # 0.45 and 0.5 of 2400 s, in steps of 0.1 and 0.05 s
        assert plan(40).total_minutes == pytest.approx(40, rel=0.01)

    def test_many_images_are_encoded_at_the_expense_of_both_stages(self):
        few, many = plan(40), plan(40, num_images=400_000)
        assert few.rest_seconds == pytest.approx(0.05 * 2400)
        assert many.rest_seconds == pytest.approx(ENCODINGS * 400_000 * 1e-4)
        ratios = [many.stages[name].steps / few.stages[name].steps for name in BATCHES]
        assert ratios == pytest.approx([(2400 - 1320) / (2400 - 120)] * 2, rel=0.01)
        assert many.total_minutes == pytest.approx(40, rel=0.01)

    def test_no_stage_has_fewer_steps_than_show_something(self):
        short = plan(0.01)
        assert {stage.steps for stage in short.stages.values()} == {LEAST_STEPS}
        assert short.total_minutes > 0.01

    def test_few_images_are_not_seen_for_ever(self):
        few = plan(600, num_images=400)
        for name, stage in few.stages.items():
            assert stage.steps == MOST_EPOCHS * 400 // BATCHES[name]
        assert few.total_minutes < 60
        assert {stage.steps for stage in plan(600, num_images=4).stages.values()} == {LEAST_STEPS}

    def test_what_follows_from_the_steps_follows(self):
        recipe = with_plan(tiny(), plan(40, encodings=0))
        first = recipe.vae_training
        assert (first.steps, first.warmup_steps) == (10_800, 500)
        assert first.validate_every == first.checkpoint_every == 1200  # two minutes of 0.1 s
        short = with_plan(tiny(), plan(1)).vae_training
        assert (short.steps, short.warmup_steps, short.validate_every) == (300, 15, 75)
        assert recipe.vae == tiny().vae and recipe.data == tiny().data

    def test_the_last_look_is_at_the_end(self):
        """Else the last two pictures are of almost the same step."""
        for minutes in (1, 7, 13, 40):
            training = with_plan(tiny(), plan(minutes, encodings=0)).vae_training
            since = training.steps % training.validate_every
            assert since == 0 or since > training.validate_every / 2

    def test_what_was_typed_stays(self):
        recipe = with_plan(tiny(), plan(40), {"--vae-training.warmup-steps"})
        assert recipe.vae_training.warmup_steps == tiny().vae_training.warmup_steps
        assert recipe.diffusion_training.warmup_steps == 500

    def test_a_stage_in_two_parts_keeps_their_proportion(self):
        untied = recipes.find("scenes64")
        planned = with_plan(untied, plan(40, encodings=0))
        steps, more = planned.vae_training.steps, planned.vae_objective.untie_steps
        assert steps + more == 10_800
        assert steps / more == pytest.approx(untied.vae_training.steps / untied.vae_objective.untie_steps, rel=0.01)

    def test_the_table_says_steps_batches_seconds_and_minutes(self):
        lines = plan(40, encodings=0).table().splitlines()
        assert lines[1].split() == ["1,", "VAE", "10800", "x", "64", "0.1", "18.0"]
        assert lines[2].split() == ["2,", "diffusion", "24000", "x", "32", "0.05", "20.0"]
        assert lines[-1].split() == ["total", "40.0"]


class TestFitToTime:
    def test_a_recipe_without_minutes_keeps_its_steps(self, measured, tmp_path):
        assert planning.fit_to_time(tiny(), None, tmp_path) == (tiny(), None) and measured == []

    def test_minutes_that_are_given_are_planned_and_said(self, measured, tmp_path, caplog):
        caplog.set_level(logging.INFO, "multibeta")
        planned = fit_to_time(tiny(), 2, tmp_path)
        assert planned == with_plan(tiny(), plan_time(2, FAST, 16, {"vae_training": 4, "diffusion_training": 4}, 1))
        assert measured == [16] and "540 x 4" in caplog.text
        plan = planning.fit_to_time(tiny(), 2, tmp_path)[1]
        assert plan.second_seconds + plan.stages["vae_training"].seconds == pytest.approx(60 * plan.total_minutes)
        assert not list(tmp_path.iterdir())

    def test_a_recipe_for_photos_has_minutes_of_its_own_unless_steps_were_typed(self, measured, tmp_path, monkeypatch):
        known_minutes(monkeypatch)
        assert fit_to_time(tiny(), None, tmp_path, flags={"--vae-training.steps"}) == tiny() and measured == []
        assert fit_to_time(tiny(), None, tmp_path).vae_training.steps == 1350 and measured == [16]

    def test_mirror_images_count(self, measured, tmp_path):
        fit_to_time(tiny_diffusion_vae(), 1, tmp_path)
        assert measured == [32]

    @pytest.mark.parametrize("flag", ["--vae-training.steps", "--diffusion-training.steps", "--vae-objective.untie-steps"])
    def test_minutes_and_steps_contradict_each_other(self, flag, tmp_path):
        with pytest.raises(ValueError, match=f"--minutes 3 plans the steps of both stages, and {flag} says some: give one"):
            fit_to_time(tiny(), 3, tmp_path, flags={flag})

    @pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), True])
    def test_minutes_are_a_time(self, minutes, tmp_path):
        with pytest.raises(ValueError, match="minutes must be finite and above 0"):
            fit_to_time(tiny(), minutes, tmp_path)

    def test_a_plan_that_is_longer_or_shorter_than_asked_for_says_why(self, measured, tmp_path, caplog):
        caplog.set_level(logging.INFO, "multibeta")
        fit_to_time(tiny(), 0.1, tmp_path)
        assert re.search(r"300 steps a stage are the least that show something: 0\.\d+ minutes, longer", caplog.text)
        fit_to_time(tiny(), 60, tmp_path)
        assert "more than 400 epochs" in caplog.text


def tiny_untied():
    return recipes.untied(dataclasses.replace(tiny(), vae_training=dataclasses.replace(tiny().vae_training, steps=8)), "untied")


@pytest.mark.parametrize("recipe", [tiny, tiny_diffusion_vae, tiny_untied])
def test_what_is_measured_is_of_this_recipe(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "TIMED_STEPS", 2)
    recipe = recipe()
    images, _ = recipes.open_data(recipe)
    found = planning.measure(recipe, images)
    assert all(seconds > 0 for seconds in (*found.steps.values(), found.encoding)) and found.steps.keys() == BATCHES.keys()
    assert not list(tmp_path.iterdir())


def test_a_run_is_resumed_with_the_steps_it_began_with(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(planning, "LEAST_STEPS", 2)
    monkeypatch.setattr(planning, "MOST_EPOCHS", 1)
    planned = fit_to_time(tiny(), 1, tmp_path)
    assert planned.vae_training.steps == planned.diffusion_training.steps == 4
    recipes.run(planned, tmp_path, progress=False)
    assert recorded_recipe(tmp_path) == planned
    monkeypatch.setattr(planning, "measure", None)  # never again
    assert fit_to_time(tiny(), 1, tmp_path, resume=True) == planned
    known_minutes(monkeypatch)
    assert fit_to_time(tiny(), None, tmp_path, resume=True) == planned
    longer = dataclasses.replace(tiny(), vae_training=dataclasses.replace(tiny().vae_training, steps=9))
    resumed = fit_to_time(longer, None, tmp_path, flags={"--vae-training.steps"}, resume=True)
    assert (resumed.vae_training.steps, resumed.diffusion_training.steps) == (9, 4)
    recipes.run(fit_to_time(tiny(), 1, tmp_path, resume=True), tmp_path, resume=True, progress=False)


def test_a_begun_run_that_does_not_say_its_steps_asks_for_them(monkeypatch, tmp_path):
    known_minutes(monkeypatch)
    monkeypatch.setattr(planning.checkpoints, "exists", lambda _: True)
    with pytest.raises(ValueError, match=r"type --vae-training\.steps and --diffusion-training\.steps"):
        fit_to_time(tiny(), None, tmp_path, resume=True)
    assert fit_to_time(tiny(), None, tmp_path, flags=set(planning.STEP_FLAGS), resume=True) == tiny()
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match=r"recipe\.json does not describe a recipe"):
        fit_to_time(tiny(), None, tmp_path, resume=True)


def test_resuming_what_never_began_plans(measured, tmp_path):
    assert fit_to_time(tiny(), 2, tmp_path, resume=True).vae_training.steps == 540


def test_a_recipe_is_recorded_as_it_is(tmp_path):
    for recipe in (tiny(), tiny_diffusion_vae(), recipes.find("photos64")):
        record(recipe, tmp_path)
        assert recorded_recipe(tmp_path) == recipe
    assert recorded_recipe(tmp_path / "elsewhere") is None


def test_measuring_leaves_the_global_generator(monkeypatch):
    monkeypatch.setattr(planning, "TIMED_STEPS", 2)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    planning.measure(tiny(), data.Scenes(16))
    assert torch.equal(torch.rand(1), expected)
