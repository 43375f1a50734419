"""The pair of DiffusionVAE against its strings and formulas."""

from dataclasses import replace

import pytest
import torch

from multibeta.networks import (
    BLOCKS_32,
    BottleneckBlock,
    parse_blocks,
)
from small_networks import rand


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class TestResidualBlockPair:
    def test_published_strings_hold_every_kind_of_block(self):
        assert parse_blocks("128x2,128d2, 128t64,1u4") == [(128, "x", 2), (128, "d", 2), (128, "t", 64), (1, "u", 4)]

    @pytest.mark.parametrize("block", ["128", "128x", "x2", "64s2", "-4x1", ""])
    def test_other_blocks_are_refused(self, block):
        with pytest.raises(ValueError, match=f"RxN, RdK, RuK or AtB.*got '{block}'"):
            parse_blocks(f"1x1,{block}")

    def test_image_to_vector_and_back(self):
        encoder, decoder = BLOCKS_32.build()
        mean, log_variance = encoder(rand(2, 3, 32, 32))
        assert mean.shape == log_variance.shape == (2, *BLOCKS_32.latent_shape) == (2, 64, 1, 1)
        assert decoder(mean).shape == (2, 3, 32, 32)

    def test_a_block_is_its_formula(self):
        block, x = BottleneckBlock(8, pool=2), rand(2, 8, 4, 4)
        h = x
        for conv in (block.conv1, block.conv2, block.conv3, block.conv4):
            h = conv(h * 0.5 * (1 + torch.erf(h / 2**0.5)))
        pooled = (x + h).view(2, 8, 2, 2, 2, 2).mean((3, 5))
        torch.testing.assert_close(block(x), pooled)

    def test_a_block_is_named_by_its_place_in_the_string(self):
        encoder = BLOCKS_32.build()[0]
        kinds = [type(module).__name__ for module in encoder.blocks]
        assert kinds[:5] == ["BottleneckBlock", "BottleneckBlock", "Conv2d", "BottleneckBlock", "BottleneckBlock"]
        assert [module.pool for module in encoder.blocks if isinstance(module, BottleneckBlock)] == [
            1,
            2,
            1,
            1,
            2,
            1,
            1,
            2,
            1,
            4,
            1,
        ]
        assert encoder.blocks[-1].conv2.kernel_size == (1, 1)  # a vector has no neighbours
        assert encoder.blocks[0].conv2.kernel_size == (3, 3)

    def test_biases_start_at_zero_and_nothing_is_normalised(self):
        encoder, decoder = BLOCKS_32.build()
        for block in (module for pair in (encoder, decoder) for module in pair.modules() if isinstance(module, BottleneckBlock)):
            assert not any(conv.bias.any() for conv in block.children())
            assert block.conv4.weight.any()
        without_bias = {"conv_in.weight", "mean.weight", "log_variance.weight", "blocks.2.weight"}
        assert without_bias <= dict(encoder.named_parameters()).keys()
        assert not any(name.removesuffix("weight") + "bias" in dict(encoder.named_parameters()) for name in without_bias)

    def test_every_parameter_learns(self):
        encoder, decoder = BLOCKS_32.build()
        mean, log_variance = encoder(rand(2, 3, 32, 32))
        decoder(mean + log_variance).square().sum().backward()
        assert all(parameter.grad.any() for network in (encoder, decoder) for parameter in network.parameters())

    def test_blocks_that_miss_the_resolution_or_a_width(self):
        with pytest.raises(ValueError, match=r"encoder_blocks must change the resolution by 64, got a factor of 32"):
            replace(BLOCKS_32, resolution=64).build()
        with pytest.raises(ValueError, match=r"channels must give a width at \[8\]"):
            replace(BLOCKS_32, channels="32:32,16:64,4:128,1:64").build()
