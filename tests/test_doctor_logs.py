"""What is wrong with a training shows in its log: trainings that are broken one way each, and sound ones."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from multibeta.doctor import OF_LOGS, Log, of_logs, read_log
from multibeta.recipes import RECIPES
from multibeta.training import TrainingOptions, TrainingStopped, train


class Pixels:
    """Random images of 48 values."""

    resolution, channels = 4, 3

    def __init__(self, size, seed=0):
        self.pixels = torch.randint(0, 256, (size, 3, 4, 4), generator=torch.Generator().manual_seed(seed)).byte()

    def __len__(self):
        return len(self.pixels)

    def images(self, indices):
        return self.pixels[indices]


class Regression:
    """A small network learns a function of the image, to which `noise` is added that belongs to the image and means nothing."""

    def __init__(self, noise=0.0):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.SiLU(), nn.Linear(64, 1))
        self.noise, self.direction = noise, torch.randn(48) / 5

    def __call__(self, batch, generator):
        flat = batch.images.flatten(1)
        target = flat @ self.direction + self.noise * (1e4 * flat.sum(1)).sin()
        loss = (self.module(batch.images)[:, 0] - target).square().mean()
        return loss, {"mse": loss.detach()}


def trained(folder, objective, size=512, **changes):
    """The log of a training of `objective` on `size` images, with options that suit it but for `changes`."""
    options = {"steps": 200, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 10, "ema_decay": 0.9, "precision": "fp32"}
    options |= {"log_every": 5, "validate_every": 20}
    options = TrainingOptions(**options | changes)
    train(objective, Pixels(size), options, folder, validation=Pixels(128, 1), progress=False)
    return read_log(folder, "vae")


def names(log):
    """What is wrong, by the diagnoses that say so."""
    return [diagnose.__name__ for diagnose in OF_LOGS if diagnose(log)]


def written(steps=400, batch_size=32, every=20, **scalars):
    """A log of a sound training of four minutes, with these scalars beside, numbers or functions of the share that is done."""
    options = dataclasses.replace(RECIPES["scenes32"].vae_training, steps=steps, batch_size=batch_size)
    usual = {"loss": lambda done: 1 / (1 + 5 * done), "grad_norm": 1.0, "seconds": lambda done: 240 * done}
    usual |= {"images_per_second": steps * batch_size / 240, "data_seconds_share": 0.05}
    records = [
        {"step": step} | {name: at(step / steps) if callable(at) else at for name, at in (usual | scalars).items()}
        for step in range(every, steps + 1, every)
    ]
    return Log("vae", records, options)


class TestTrainings:
    def test_of_a_sound_one_nothing_is_said(self, tmp_path):
        log = trained(tmp_path, Regression())
        assert log.series("validation/loss")[1][-1] < 0.1 * log.series("validation/loss")[1][0]
        assert names(log) == []

    def test_one_on_few_images_overfits(self, tmp_path):
        log = trained(tmp_path, Regression(noise=1.0), size=48, learning_rate=1e-2)
        assert names(log) == ["overfitting"]

    def test_one_that_ends_in_its_warm_up_has_not_converged(self, tmp_path):
        log = trained(tmp_path, Regression(), steps=60, validate_every=10, warmup_steps=120, learning_rate=1e-3)
        assert names(log) == ["warm_up_too_long", "still_falling"]

    def test_a_high_learning_rate_makes_gradients_jump(self, tmp_path):
        log = trained(tmp_path, Regression(), learning_rate=3.0, final_learning_rate=1.0)
        assert "learning_rate_too_high" in names(log)

    def test_one_whose_loss_became_infinite_was_stopped(self, tmp_path):
        with pytest.raises(TrainingStopped):
            trained(tmp_path, Regression(), learning_rate=1e7, final_learning_rate=1.0, warmup_steps=0, log_every=1)
        log = read_log(tmp_path, "vae")
        assert "not_finite" in names(log) and log.records[-1]["loss"] is None
        for precision, advised in {"fp32": False, "bf16": True}.items():  # the former is nothing to advise where it is
            known = dataclasses.replace(log, options=TrainingOptions(steps=200, precision=precision))
            assert ("--vae-training.precision fp32" in of_logs.not_finite(known).advice) == advised


class TestRecords:
    def test_of_a_sound_log_nothing_is_said(self):
        assert names(written()) == []

    def test_a_step_that_waits_for_its_images(self):
        assert names(written(data_seconds_share=0.8)) == ["waiting_for_images"]
        log = written(data_seconds_share=0.8)
        several = dataclasses.replace(log, options=dataclasses.replace(log.options, num_workers=4))
        assert of_logs.waiting_for_images(log).advice.startswith("--vae-training.num-workers 2, so that threads read ahead")
        assert of_logs.waiting_for_images(several).advice.startswith("raise --vae-training.num-workers (now 4), so that")
        assert names(written(data_seconds_share=0.8, seconds=lambda done: 20 * done)) == []  # nobody minds in a short one

    def test_time_that_goes_by_between_the_steps(self):
        assert names(written(images_per_second=4 * 400 * 32 / 240)) == ["waiting_between_steps"]

    def test_losses_that_do_not_compare_are_not_compared(self):
        falling_late = {"validation/loss": lambda done: 1 - done**3}
        assert names(written(**falling_late)) == ["still_falling"]
        rising = {"validation/loss": lambda done: 1 + max(done - 0.8, 0.0) - 2 * min(done, 0.5)}
        assert names(written(**rising)) == ["overfitting"]
        assert names(dataclasses.replace(written(**rising), comparable_from=0.95)) == []

    def test_a_later_training_makes_it_a_matter_of_that_one_too(self):
        falling_late = written(**{"validation/loss": lambda done: 1 - done**3})
        (finding,) = filter(None, (diagnose(dataclasses.replace(falling_late, followed=("diffusion",))) for diagnose in OF_LOGS))
        assert "unfinished model" in finding.means and "stage 2" in finding.advice

    def test_a_denoiser_that_knows_no_noise(self):
        assert names(written(noise_error=lambda done: 1 - 0.05 * done)) == ["noise_unknown"]
        assert names(written(noise_error=lambda done: 1 - 0.4 * done)) == []

    def test_a_capacity_that_is_not_used(self):
        assert names(written(kl=0.5, capacity=25.0)) == ["capacity_unused"]
        assert names(written(kl=24.0, capacity=25.0)) == []

    def test_a_flow_map_that_knows_its_trajectories(self):
        assert names(written(**{"validation/ratio": 2.0})) == ["unseen_trajectories"]
        assert names(written(**{"validation/ratio": 1.2})) == []

    def test_a_discriminator_that_tells_nothing_apart(self):
        alike = {"discriminator_loss": 1.0, "discriminator_real": 0.01, "discriminator_fake": -0.01, "adversarial_loss": 0.0}
        assert names(written(**alike)) == ["discriminator_blind"]

    def test_a_discriminator_that_has_won(self):
        grows = {"discriminator_fake": lambda done: -1 - 40 * done, "adversarial_loss": lambda done: 1 + 40 * done}
        assert names(written(discriminator_loss=0.01, discriminator_real=5.0, **grows)) == ["discriminator_won"]

    def test_a_game_that_goes_on(self):
        scores = {"discriminator_real": 0.6, "discriminator_fake": -0.6, "adversarial_loss": 0.6}
        assert names(written(discriminator_loss=0.5, **scores)) == []
        shorter = {"discriminator_real": 5.0, "discriminator_fake": -3.0, "adversarial_loss": 3.0}  # ahead, but not running away
        assert names(written(discriminator_loss=0.01, **shorter)) == []

    def test_a_guard_that_leaves_out_much(self):
        assert names(written(left_out=0.05)) == ["updates_left_out"]
        assert names(written(left_out=0.001)) == []

    def test_one_jump_is_an_accident(self):
        spikes = np.ones(20)
        spikes[10] = 5
        assert names(written(grad_norm=lambda done: spikes[round(20 * done) - 1])) == []
        spikes[15] = 5
        assert names(written(grad_norm=lambda done: spikes[round(20 * done) - 1])) == ["learning_rate_too_high"]
