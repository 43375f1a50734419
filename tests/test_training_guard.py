"""Updates that are left out, weights that are taken back, and the checkpoints that are kept for it."""

import dataclasses
import json
import logging
import math
import shutil

import pytest
import torch
from torch import nn

from multibeta import checkpoints, data, training
from multibeta.training import TrainingOptions, TrainingStopped, rotation
from multibeta.training.guard import LEAST_REMEMBERED, PATIENCE, Guard

IMAGES = data.Subset(data.Scenes(8), range(64))
OPTIONS = TrainingOptions(
    60,
    4,
    ema_decay=0.5,
    warmup_steps=0,
    precision="fp32",
    checkpoint_every=10,
    log_every=10,
    validate_every=60,
    spike_factor=10.0,
)


class Mean:
    """Learn the mean image; at some steps the loss is another multiple of the error."""

    def __init__(self, scales=None):
        self.module = nn.Module()
        self.module.mean = nn.Parameter(torch.zeros(3, 8, 8))
        self.scales, self.means = scales or {}, {}

    def __call__(self, batch, generator):
        self.means[batch.step] = self.module.mean.detach().clone()
        error = (batch.images - self.module.mean).square().mean()
        return self.scales.get(batch.step, 1.0) * error, {"error": error.detach()}


def trained(folder, scales=None, resume=False, **changes):
    """A training whose loss has other scales at some steps; returns its objective and the average of its weights."""
    objective = Mean(scales)
    options = dataclasses.replace(OPTIONS, **changes)
    return objective, training.train(objective, IMAGES, options, folder, resume=resume, progress=False)


def checkpoint_steps(folder):
    """Steps of the last checkpoint and of those that were kept before it, the newest first."""
    return [checkpoints.load_config(place)["step"] for place in (folder / "checkpoint", *rotation.earlier(folder / "checkpoint"))]


def test_a_norm_is_large_beside_the_median_of_those_before():
    guard = Guard(5.0)
    assert all(guard.refuses(1.0, 1e6) is None for _ in range(LEAST_REMEMBERED - 1))  # too few to tell
    guard = Guard(5.0)
    assert all(guard.refuses(1.0, 1.0 + 0.01 * number) is None for number in range(LEAST_REMEMBERED))
    assert guard.refuses(1.0, 5.4) is None
    assert "times the median of the last 21" in guard.refuses(1.0, 6.0)
    assert "not finite" in guard.refuses(math.nan, 1.0)
    assert guard.left_out == 2 and not guard.gives_up
    assert guard.refuses(1.0, 1.0) is None and guard.left_out == 0


def test_without_a_factor_nothing_is_refused():
    guard = Guard(0.0)
    assert all(guard.refuses(1.0, 10.0**number) is None for number in range(30)) and guard.refuses(math.nan, math.nan) is None


@pytest.mark.parametrize("scale", (1e4, math.inf))
def test_a_spike_is_left_out_and_nothing_else(tmp_path, caplog, scale):
    objective, _ = trained(tmp_path, {35: scale})
    assert "step 35 is left out" in caplog.text
    assert torch.equal(objective.means[35], objective.means[36])
    assert not torch.equal(objective.means[36], objective.means[37])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [round(line["left_out"] * 10) for line in lines] == [0, 0, 0, 1, 0, 0]
    assert all(line["loss"] is not None and line["loss"] < 10 for line in lines)


def test_after_some_spikes_in_a_row_the_last_checkpoint_is_taken(tmp_path, caplog):
    objective, _ = trained(tmp_path, dict.fromkeys(range(35, 35 + PATIENCE), 1e4))
    assert f"after step {35 + PATIENCE} training goes on with the weights of step 30" in caplog.text
    assert torch.equal(objective.means[35 + PATIENCE], objective.means[30])
    assert sorted(objective.means) == list(range(60))  # no images are seen again


def test_a_guarded_training_resumes_bit_for_bit(tmp_path):
    scales = {**dict.fromkeys(range(35, 35 + PATIENCE), 1e4), 45: 1e4, 46: math.nan, 51: 1e4}
    _, expected = trained(tmp_path / "whole", scales)
    stops = {}

    def stop(step, module):
        if step in stops:
            raise KeyboardInterrupt

    for step in (30, 40, 50):  # with spikes before each, and in between
        stops = {step}
        with pytest.raises(KeyboardInterrupt):
            options = dataclasses.replace(OPTIONS, validate_every=10)
            training.train(Mean(scales), IMAGES, options, tmp_path / "cut", resume=step > 30, on_validate=stop, progress=False)
    _, resumed = trained(tmp_path / "cut", scales, resume=True)
    assert torch.equal(resumed["mean"], expected["mean"])


def test_where_the_last_checkpoint_does_not_help_the_one_before_is_taken(tmp_path, caplog):
    spikes = dict.fromkeys(range(32, 32 + 2 * PATIENCE), math.inf)
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, spikes, keep_checkpoints=3)
    assert [f"weights of step {step}" in caplog.text for step in (30, 20, 10)] == [True, True, False]


def test_where_there_is_no_other_checkpoint_training_stops(tmp_path):
    with pytest.raises(TrainingStopped, match="no other checkpoint to go back to"):
        trained(tmp_path, dict.fromkeys(range(32, 60), math.inf))


def test_the_last_checkpoints_are_kept(tmp_path):
    trained(tmp_path, keep_checkpoints=3)
    assert checkpoint_steps(tmp_path) == [60, 50, 40]
    trained(tmp_path, resume=True, steps=70, keep_checkpoints=2)  # as many as are asked for now
    assert checkpoint_steps(tmp_path) == [70, 60]
    trained(tmp_path, resume=True, steps=80, keep_checkpoints=1)
    assert checkpoint_steps(tmp_path) == [80]


def test_kept_checkpoints_are_those_of_their_steps(tmp_path):
    trained(tmp_path / "long", keep_checkpoints=3)
    trained(tmp_path / "short", checkpoint_every=40)
    shutil.rmtree(tmp_path / "short" / "checkpoint")
    shutil.copytree(tmp_path / "long" / "earlier" / "00000050", tmp_path / "short" / "checkpoint")
    _, resumed = trained(tmp_path / "short", resume=True)
    assert torch.equal(resumed["mean"], checkpoints.load_folder(tmp_path / "long" / "checkpoint")[0]["ema"]["mean"])


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog):
    _, expected = trained(tmp_path, keep_checkpoints=2)
    damaged = tmp_path / "checkpoint" / "module.safetensors"
    damaged.unlink()  # what is kept is linked to it
    damaged.write_bytes(b"damaged")
    _, resumed = trained(tmp_path, resume=True, keep_checkpoints=2)
    assert "module.safetensors is truncated or damaged" in caplog.text and "Going on from" in caplog.text
    assert torch.equal(resumed["mean"], expected["mean"])


def test_what_was_damaged_is_not_kept(tmp_path):
    trained(tmp_path, keep_checkpoints=3)
    damaged = tmp_path / "checkpoint" / "module.safetensors"
    damaged.unlink()
    damaged.write_bytes(b"damaged")
    trained(tmp_path, resume=True, steps=80, keep_checkpoints=3)
    assert checkpoint_steps(tmp_path) == [80, 70, 60]
    for place in rotation.earlier(tmp_path / "checkpoint"):
        checkpoints.load_folder(place)


@pytest.mark.parametrize("lost", ("the folder", "its config"))
def test_a_lost_last_checkpoint_is_passed_over_as_well(tmp_path, lost):
    trained(tmp_path, keep_checkpoints=2)
    if lost == "the folder":
        shutil.rmtree(tmp_path / "checkpoint")
    else:
        (tmp_path / "checkpoint" / "config.json").unlink()  # what is kept is linked to it
        (tmp_path / "checkpoint" / "config.json").write_text("{")
    with pytest.raises(FileExistsError, match="pass --resume"):
        trained(tmp_path, keep_checkpoints=2)
    trained(tmp_path, resume=True, keep_checkpoints=2)
    assert checkpoint_steps(tmp_path) == [60, 50]


def test_checkpoints_of_another_training_are_not_gone_on_with(tmp_path):
    trained(tmp_path, keep_checkpoints=3)
    shutil.rmtree(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"00000050 was trained differently: options\.seed was 0, now 7"):
        trained(tmp_path, resume=True, seed=7)


def test_a_roll_back_passes_over_a_damaged_checkpoint(tmp_path, caplog):
    def damage():
        file = tmp_path / "checkpoint" / "module.safetensors"
        file.unlink()
        file.write_bytes(b"damaged")

    scales = dict.fromkeys(range(32, 32 + PATIENCE), math.inf)
    options = dataclasses.replace(OPTIONS, keep_checkpoints=2, validate_every=10)
    damaging = {30: damage}
    training.train(
        Mean(scales), IMAGES, options, tmp_path, on_validate=lambda step, _: damaging.get(step, dict)(), progress=False
    )
    assert "module.safetensors is truncated or damaged" in caplog.text and "the weights of step 20" in caplog.text


def test_left_out_steps_do_not_wear_out_the_checkpoints(tmp_path):
    with pytest.raises(TrainingStopped, match="no other checkpoint to go back to"):
        trained(tmp_path, dict.fromkeys(range(32, 60), math.nan), keep_checkpoints=3, checkpoint_every=4)
    assert checkpoint_steps(tmp_path) == [32, 28, 24]


def test_spikes_before_the_first_checkpoint_are_left_out(tmp_path, caplog):
    objective, _ = trained(tmp_path, dict.fromkeys(range(2, 7), math.nan))
    assert torch.equal(objective.means[2], objective.means[7]) and not torch.equal(objective.means[7], objective.means[8])


def test_an_opponent_is_left_out_with_its_objective(tmp_path, caplog):
    objective = Mean({35: math.nan})
    objective.opponent = Mean({35: math.nan, 40: math.nan})
    training.train(objective, IMAGES, OPTIONS, tmp_path, progress=False)
    theirs = objective.opponent.means
    assert torch.equal(theirs[35], theirs[36]) and torch.equal(theirs[40], theirs[41]) and not torch.equal(theirs[41], theirs[42])
    assert "step 40 is left out of the opponent: loss nan" in caplog.text


@pytest.mark.parametrize(
    "change", ({"spike_factor": 0.5}, {"spike_factor": math.nan}, {"keep_checkpoints": 0}, {"spike_factor": -1})
)
def test_impossible_options_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(OPTIONS, **change)
