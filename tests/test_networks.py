from dataclasses import asdict, fields, replace

import pytest
import torch
from torch import nn

from multibeta.blocks import AttentionBlock, ResBlock
from multibeta.multibeta_vae import VAEConfig
from multibeta.networks import (
    BLOCKS_32,
    AutoencoderConfig,
    BetaEmbedding,
    BlockAutoencoderConfig,
    BottleneckBlock,
    ConditionedConv,
    Decoder,
    Encoder,
    ToyDecoder,
    ToyEncoder,
    UNet,
    UNetConfig,
    parse_blocks,
)

SMALL = {
    "resolution": 16,
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "mid_attention": False,
    "num_groups": 4,
    "embedding_channels": 16,
}
SMALL_TOY = {"resolution": 16, "channels": (8, 16), "latent_channels": 6, "num_groups": 4, "embedding_channels": 16}
SMALL_UNET = {
    "resolution": 8,
    "base_channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 8,
    "num_groups": 4,
}


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class TestParameterCounts:
    @pytest.fixture(autouse=True)
    def on_meta(self):
        with torch.device("meta"):
            yield

    def test_the_paper_vae_has_148_million(self):
        assert count(Encoder(), Decoder()) == 148_368_391

    def test_the_paper_unet_by_its_text_and_by_its_count(self):
        assert count(UNet()) == 421_953_800
        assert count(UNet(attention_resolutions=(32,))) == 377_327_880

    def test_celeba_autoencoder(self):
        shape = {"resolution": 64, "base_channels": 32, "channel_multipliers": (1, 2, 4), "embedding_channels": 128}
        assert count(Encoder(**shape), Decoder(**shape)) == 3_474_215 + 210_528

    def test_celeba_unet(self):
        unet = UNet(
            resolution=16,
            base_channels=64,
            channel_multipliers=(1, 2, 4, 4),
            attention_resolutions=(16, 8, 4),
            head_channels=None,
            num_heads=8,
        )
        assert count(unet) == 25_723_784

    def test_diffusion_vae_pair_of_residual_blocks(self):
        encoder, decoder = BlockAutoencoderConfig().build()
        assert (count(encoder), count(decoder)) == (14_404_480, 6_693_795)
        assert count(encoder, decoder) == 21_098_275

    def test_groups_and_frequencies_cost_no_parameters(self):
        assert count(Encoder(num_groups=16, embedding_max_frequency=500.0)) == count(Encoder())


LDM_CONFIG = AutoencoderConfig(**SMALL, attention_resolutions=(16,))  # attention shows the resolution
TOY_CONFIG = AutoencoderConfig(architecture="toy", resolution=16, base_channels=8, channel_multipliers=(1, 2), num_groups=4)
CONFIGS = {
    Encoder: LDM_CONFIG,
    Decoder: LDM_CONFIG,
    ToyEncoder: TOY_CONFIG,
    ToyDecoder: TOY_CONFIG,
    UNet: UNetConfig(**SMALL_UNET),
}
OTHERS = {
    "resolution": 32,
    "image_channels": 1,
    "latent_channels": 5,
    "in_channels": 5,
    "out_channels": 5,
    "base_channels": 24,
    "channel_multipliers": (2, 2),
    "num_res_blocks": 2,
    "attention_resolutions": (8,),
    "mid_attention": True,
    "head_channels": 4,
    "num_heads": 1,
    "activation": "sigmoid",
    "dropout": 0.5,
    "num_groups": 2,
    "embedding_channels": 32,
    "embedding_mlp": True,
    "embedding_max_frequency": 20.0,
}
NOT_OF_THE_SMALL_PAIR = {"num_res_blocks", "attention_resolutions", "mid_attention", "dropout", "embedding_mlp"}


class TestConfigIsTheArgument:
    """A network is what its config says, and every field of the config says something."""

    @staticmethod
    def described(network):
        """Everything that a config could have changed: modules, shapes, plain attributes."""
        attributes = [
            (name, {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | bool)})
            for name, module in network.named_modules()
        ]
        return repr(network), attributes, {name: tensor.shape for name, tensor in network.state_dict().items()}

    @pytest.mark.parametrize("network", CONFIGS)
    def test_every_field_reaches_the_network(self, network):
        config = CONFIGS[network]
        silent = {
            field.name
            for field in fields(config)
            if field.name != "architecture"
            and self.described(network(config, **{field.name: OTHERS[field.name]})) == self.described(network(config))
        }
        assert silent == (NOT_OF_THE_SMALL_PAIR if network in (ToyEncoder, ToyDecoder) else set())

    @pytest.mark.parametrize("network", CONFIGS)
    def test_fields_by_name_are_the_config(self, network):
        config, states = CONFIGS[network], []
        for build in (lambda: network(config), lambda: network(**asdict(config))):
            torch.manual_seed(7)
            states.append(build().state_dict())
        assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    @pytest.mark.parametrize("network", CONFIGS)
    def test_an_unknown_field_names_the_config(self, network):
        with pytest.raises(TypeError, match=f"{type(CONFIGS[network]).__name__}.*'colour'"):
            network(colour=3)

    def test_a_network_takes_the_config_of_its_model(self):
        config = VAEConfig(**SMALL, attention_resolutions=(16,))
        assert self.described(Encoder(config)) == self.described(Encoder(LDM_CONFIG))

    def test_a_number_out_of_range_is_named(self):
        with pytest.raises(ValueError, match="num_groups must be at least 1, got 0"):
            Encoder(num_groups=0)
        with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
            UNet(in_channels=0)


class TestEveryBlockHearsBeta:
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
