"""What every test shares: at most two threads, fixed seeds, fresh memory that is not zero by luck."""

import dataclasses
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from multibeta import baselines, recipes
from multibeta.caches import cache_folder
from multibeta.diffusion_vae import CapacityVAE, ConditionalDiffusion, ConditionalDiffusionConfig
from multibeta.gaussian_diffusion import GaussianDiffusion, GaussianDiffusionConfig
from multibeta.kernels import cpp
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig
from multibeta.networks import BlockAutoencoderConfig, UNetShape
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusion, process_statistics
from multibeta.pipelines import BaselineVAE, DenoisingMultiBetaVAE, DiffusionVAE, LatentDiffusion
from multibeta.reproduce import codes, models
from multibeta.sampling import EngineOptions

pytest_plugins = ["browser", "dataset_files"]  # fixtures that several files of tests share

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
    monkeypatch.setattr(codes, "SWEEP", (0.2, 0.5))
    models.study_images.cache_clear()
    yield models.Study(
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
    models.study_images.cache_clear()


STEPS = 50  # of the grids of the models here


@pytest.fixture(scope="module")
def model():
    """A small `DenoisingMultiBetaVAE`: random weights, but a process that fits its encoder."""
    shape = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "num_groups": 4, "num_steps": STEPS}
    autoencoder = VAEConfig(resolution=16, mid_attention=False, embedding_channels=16, **shape)
    unet = DiffusionConfig(latent_resolution=8, attention_resolutions=(4,), head_channels=8, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, diffusion = MultiBetaVAE(autoencoder), NonlinearDiffusion(unet)
        nn.init.normal_(diffusion.unet.conv_out.weight, std=0.05)  # it starts at zero
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    diffusion.set_process(vae.sigmas(), *process_statistics(vae.encode, images, STEPS, nodes=10))
    return DenoisingMultiBetaVAE(vae, diffusion, {"recipe": "none"})


@pytest.fixture(scope="module")
def latent(model):
    """A small `LatentDiffusion` on the VAE of `model`, with a U-Net of the same shape."""
    shape = {field.name: getattr(model.diffusion.config, field.name) for field in dataclasses.fields(UNetShape)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diffusion = GaussianDiffusion(GaussianDiffusionConfig(latent_resolution=8, num_steps=40, **shape))
        nn.init.normal_(diffusion.unet.conv_out.weight, std=0.05)  # it starts at zero
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    diffusion.set_statistics(model.encode(images, 0.0))
    return LatentDiffusion(model.vae, diffusion, {"recipe": "none"})


@pytest.fixture(scope="module")
def baseline(model):
    """A `BaselineVAE` of the same shape."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BaselineVAE(baselines.VAE(model.vae.config), {"method": "beta-vae-4"})  # a config of the multi-beta VAE will do


@pytest.fixture(scope="session")
def make_refiner():
    """What makes a small `DiffusionVAE` of random weights, none of them zero; takes changes to the config of its diffusion."""
    blocks = BlockAutoencoderConfig(
        resolution=16, encoder_blocks="16d2,16t8,8d8,8t1,1x1", decoder_blocks="1u8,1t8,8u2,8t16,16x1", channels="16:8,8:8,1:6"
    )
    unet = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "attention_resolutions": (), "num_heads": 2}
    config = ConditionalDiffusionConfig(resolution=16, dropout=0.0, num_groups=4, num_steps=STEPS, **unet)

    def make(**changes):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            diffusion = ConditionalDiffusion(dataclasses.replace(config, **changes))
            for parameter in diffusion.parameters():
                nn.init.normal_(parameter, std=0.2)
            vae = CapacityVAE(blocks)
            for conv in (*vae.decoder.modules(), vae.encoder.mean):
                if isinstance(conv, nn.Conv2d):
                    nn.init.normal_(conv.weight, std=0.5)
            vae.encoder.mean.weight.data *= 20  # images must differ in their latents
        return DiffusionVAE(vae, diffusion, {"recipe": "none"}, engine_options=EngineOptions(dtype=torch.float32))

    return make


@pytest.fixture(scope="module")
def refiner(make_refiner):
    """A small `DiffusionVAE`."""
    return make_refiner()


@pytest.fixture
def photos(tmp_path):
    """A folder of twelve images of 20 by 24 pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(generator.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture
def error_of(capsys):
    """The one line on stderr of a command that fails."""
    from multibeta.cli import main  # needs tyro

    def fail(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("multibeta: ")]
        assert len(lines) == 1
        return lines[0]

    return fail


@pytest.fixture(scope="session")
def picture_size():
    """What reads the width and height of a picture."""

    def read(path):
        with Image.open(path) as image:
            return image.size

    return read


@pytest.fixture(scope="session")
def grid_size():
    """Width and height of a grid of 16-pixel images with gaps of 1, enlarged four times."""

    def measure(columns, rows=1, side=64, gap=4):
        return columns * (side + gap) - gap, rows * (side + gap) - gap

    return measure
