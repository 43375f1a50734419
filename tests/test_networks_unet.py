"""The U-Net: what it starts from, and what its output depends on."""

import pytest
import torch
from torch import nn

from multibeta.blocks import AttentionBlock
from multibeta.networks import (
    UNet,
    UNetConfig,
)
from small_networks import SMALL_UNET, rand


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class TestUNet:
    @pytest.mark.parametrize(
        "changed", [{}, {"channel_multipliers": (1,)}, {"channel_multipliers": (1, 2, 2), "num_res_blocks": 2}]
    )
    def test_starts_at_zero(self, changed):
        unet = UNet(**{**SMALL_UNET, **changed})
        output = unet(rand(2, 4, 8, 8), torch.tensor([1, 1000]))
        assert output.shape == (2, 8, 8, 8)
        assert not output.any()

    def test_works_on_vector_latents(self):
        unet = UNet(**{**SMALL_UNET, "resolution": 1, "channel_multipliers": (1,), "in_channels": 6, "out_channels": 12})
        assert unet(rand(2, 6, 1, 1), torch.tensor([1, 2])).shape == (2, 12, 1, 1)

    def test_every_parameter_learns_once_the_zeros_have_moved(self):
        unet = UNet(**SMALL_UNET)
        for parameter in unet.parameters():
            nn.init.normal_(parameter, std=0.1)
        unet(rand(2, 4, 8, 8), torch.tensor([10, 700])).square().sum().backward()
        silent = [name for name, parameter in unet.named_parameters() if not parameter.grad.any()]
        assert not silent

    def test_output_depends_on_the_step(self):
        unet, latents = UNet(**SMALL_UNET), rand(1, 4, 8, 8)
        for parameter in unet.parameters():
            nn.init.normal_(parameter, std=0.1)
        assert not torch.allclose(unet(latents, torch.tensor([10])), unet(latents, torch.tensor([700])))

    def test_config_builds_its_shape(self):
        config = UNetConfig(base_channels=8, channel_multipliers=(1, 2), num_heads=2, head_channels=None, num_groups=4)
        unet = config.build_unet(in_channels=6, out_channels=3, resolution=8)
        assert unet(rand(2, 6, 8, 8), torch.tensor([1, 2])).shape == (2, 3, 8, 8)
        assert {block.num_heads for block in unet.modules() if isinstance(block, AttentionBlock)} == {2}
