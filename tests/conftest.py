"""What every test shares: at most two threads, fixed seeds, fresh memory that is not zero by luck."""

import dataclasses
import os
import random

import numpy as np
import pytest
import torch

from multibeta import recipes
from multibeta.caches import cache_folder
from multibeta.kernels import cpp
from multibeta.networks import BlockAutoencoderConfig
from multibeta.reproduce import study

pytest_plugins = ["dataset_files"]  # fixtures of the tests of multibeta.data

os.environ.setdefault("MULTIBETA_CACHE", str(cache_folder()))  # processes of tests that move the home compile nothing anew
cpp.load()  # before a test moves all caches
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Global generators start every test alike."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def nan_empty():
    """Memory from `torch.empty` and its kin holds NaN, so that an element never written shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture
def tiny_study(monkeypatch):
    """A `Study` of seconds: networks of 16 pixels, two betas."""
    preset, refiner = recipes.find("scenes64-isotropic"), recipes.find("diffusion-vae-scenes32")
    toy = dataclasses.replace(
        preset.vae, resolution=16, base_channels=8, channel_multipliers=(1, 1), latent_channels=6, num_steps=20
    )
    unet = dataclasses.replace(preset.diffusion, base_channels=8, num_groups=4, head_channels=4)
    training = dataclasses.replace(preset.diffusion_training, steps=1, batch_size=4)
    tiny = dataclasses.replace(preset, vae=toy, diffusion=unet, diffusion_training=training)
    monkeypatch.setitem(recipes.RECIPES, "scenes64-isotropic", tiny)
    blocks = {"encoder_blocks": "16d2,16t8,8d8,8t1,1x1", "decoder_blocks": "1u8,1t8,8u2,8t16,16x1", "channels": "16:8,8:8,1:6"}
    narrow = dataclasses.replace(refiner.diffusion, base_channels=8, channel_multipliers=(1, 2), num_steps=20, num_heads=2)
    small = dataclasses.replace(refiner, vae=BlockAutoencoderConfig(resolution=16, **blocks), diffusion=narrow)
    monkeypatch.setitem(recipes.RECIPES, "diffusion-vae-scenes32", small)
    monkeypatch.setattr(study, "SWEEP", (0.2, 0.5))
    study.open_data.cache_clear()
    yield study.Study(
        seeds=(0, 1),
        steps=4,
        batch_size=4,
        diffusion_steps=2,
        num_train=40,
        num_images=100,
        dci_train=60,
        dci_test=40,
        disco_steps=1,
        disco_width=2,
    )
    study.open_data.cache_clear()
