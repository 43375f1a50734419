"""Encoders and decoders: shapes, and beta in every block."""

import pytest
import torch
from torch import nn

from multibeta.blocks import ResBlock
from multibeta.networks import (
    BetaEmbedding,
    ConditionedConv,
    Decoder,
    Encoder,
    ToyDecoder,
    ToyEncoder,
)
from small_networks import SMALL, SMALL_TOY, count, rand


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class TestBetaReachesEveryBlock:
    PAIRS = ((Encoder, SMALL, (2, 3, 16, 16)), (Decoder, SMALL, (2, 4, 8, 8)),
             (ToyEncoder, SMALL_TOY, (2, 3, 16, 16)), (ToyDecoder, SMALL_TOY, (2, 6, 1, 1)))  # fmt: skip

    @pytest.mark.parametrize(("kind", "arguments", "shape"), PAIRS)
    def test_gradient_reaches_every_projection(self, kind, arguments, shape):
        network = kind(**arguments)
        network(rand(*shape), torch.tensor([0.2, 0.8])).square().sum().backward()
        blocks = [module for module in network.modules() if isinstance(module, ResBlock | ConditionedConv)]
        assert len(blocks) == {Encoder: 4, Decoder: 6, ToyEncoder: 2, ToyDecoder: 2}[kind]
        for block in blocks:
            gradient = block.embedding_projection.weight.grad
            assert gradient.abs().max() > 1e-6

    @pytest.mark.parametrize(("kind", "arguments", "shape"), PAIRS)
    def test_each_sample_has_its_own_beta(self, kind, arguments, shape):
        network, inputs = kind(**arguments), rand(*shape)
        mixed = network(inputs, torch.tensor([0.2, 0.8]))
        for index, beta in enumerate((0.2, 0.8)):
            alone = network(inputs[index : index + 1], torch.tensor([beta]))
            torch.testing.assert_close(mixed[index : index + 1], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mixed, network(inputs, torch.tensor([0.8, 0.2])))

    def test_embedding_network_is_optional(self):
        assert count(BetaEmbedding(16, "silu")) == 0
        assert count(BetaEmbedding(16, "silu", mlp=True)) == 2 * (16 * 16 + 16)
        assert BetaEmbedding(16, "silu", mlp=True)(torch.tensor([0.0, 1.0])).shape == (2, 16)


class TestShapes:
    @pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 3)])
    def test_autoencoder_halves_once_less_than_it_has_levels(self, multipliers):
        arguments = {**SMALL, "channel_multipliers": multipliers, "attention_resolutions": (8,), "mid_attention": True}
        side = 16 // 2 ** (len(multipliers) - 1)
        images, beta = rand(2, 3, 16, 16), torch.tensor([0.0, 1.0])
        latents = Encoder(**arguments)(images, beta)
        assert latents.shape == (2, 4, side, side)
        assert Decoder(**arguments)(latents, beta).shape == images.shape

    def test_toy_latent_is_a_vector(self):
        encoder, decoder, beta = ToyEncoder(), ToyDecoder(), torch.tensor([0.5])
        latent = encoder(rand(1, 3, 64, 64), beta)
        assert latent.shape == (1, 32, 1, 1)
        assert decoder(latent, beta).shape == (1, 3, 64, 64)

    def test_toy_pair_is_fully_convolutional(self):
        for network in (ToyEncoder(), ToyDecoder()):
            linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
            assert linear and all(name.endswith("embedding_projection") for name in linear)

    def test_attention_sits_at_the_resolutions_named(self):
        def attention_blocks(**changed):
            network = Encoder(**{**SMALL, **changed})
            return sum(type(module).__name__ == "AttentionBlock" for module in network.modules())

        assert attention_blocks() == 0
        assert attention_blocks(attention_resolutions=(8,)) == 1
        assert attention_blocks(attention_resolutions=(16, 8), mid_attention=True, num_res_blocks=2) == 5
