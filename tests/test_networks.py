"""The networks are what their configs say, of the sizes that the papers print."""

from dataclasses import asdict, fields

import pytest
import torch

from multibeta.multibeta_vae import VAEConfig
from multibeta.networks import (
    AutoencoderConfig,
    BlockAutoencoderConfig,
    Decoder,
    Encoder,
    ToyDecoder,
    ToyEncoder,
    UNet,
    UNetConfig,
)
from small_networks import SMALL, SMALL_UNET, count


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
    "span_channels": 16,
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


@pytest.mark.parametrize("network", CONFIGS)
@pytest.mark.parametrize("other", [None, 16, asdict(LDM_CONFIG), BlockAutoencoderConfig()])
def test_a_config_of_another_class_is_named(network, other):
    wanted, given = type(CONFIGS[network]).__name__, type(other).__name__
    with pytest.raises(TypeError, match=f"config must be of class {wanted}, or its fields by name, got a {given}"):
        network(other)
    with pytest.raises(TypeError, match="tempo"):
        network(CONFIGS[network], tempo=2)
