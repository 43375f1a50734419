"""Networks filled with weights of others compute what theirs compute; diffusers and its own converters are the judges."""

import copy
import json
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from multibeta import checkpoints, interop
from multibeta.blocks import AttentionBlock, ResBlock
from multibeta.interop import diffusers_config, freeze, load_diffusers, load_ldm, to_diffusers, to_ldm
from multibeta.interop.files import write_weights
from multibeta.interop.mapping import DIFFUSERS
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig
from multibeta.networks import Decoder, Encoder, UNet
from multibeta.weights import read_weights

SMALL_UNET = {
    "in_channels": 3,
    "out_channels": 5,
    "resolution": 8,
    "base_channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 8,
    "num_groups": 8,
}
UNETS = {
    "attention below": {},
    "attention above, two blocks": {"attention_resolutions": (8,), "num_res_blocks": 2},
    "three levels, one head": {"channel_multipliers": (1, 2, 2), "attention_resolutions": (8, 2), "head_channels": None},
    "one level": {"channel_multipliers": (1,), "attention_resolutions": ()},
    "as many heads everywhere": {"channel_multipliers": (1, 1), "head_channels": None, "num_heads": 4},
}
SMALL = {
    "resolution": 8,
    "base_channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "num_groups": 8,
    "embedding_channels": 12,
}
LDM_SMALL = {**SMALL, "base_channels": 64, "channel_multipliers": (1, 1), "num_groups": 32}  # theirs has 32 groups, always
LDM_UNET = {**SMALL_UNET, "base_channels": 64, "head_channels": 16, "num_groups": 32}
STEPS, BETA = torch.tensor([3.0, 700.0]), torch.tensor([0.2, 0.9])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


def random(module):
    """The module with all weights drawn, those that start at zero too."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


def same_gradients(ours, theirs, style, outputs):
    """The gradients of our parameters are theirs, made of them as the weights are."""
    for output in outputs:
        output.square().sum().backward()
    own, foreign = dict(ours.named_parameters()), dict(theirs.named_parameters())
    scale = max(parameter.grad.abs().max() for parameter in own.values())
    for row in style.rows(ours):
        if row.theirs[0] in foreign:
            expected = row.rule.read(*[foreign[name].grad for name in row.theirs])
            assert (own[row.ours].grad - expected).abs().max() <= 1e-5 * scale, row


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


class TestUNetOfDiffusers:
    @pytest.mark.parametrize("changed", UNETS.values(), ids=UNETS)
    def test_outputs_gradients_and_weights_are_theirs(self, diffusers, changed):
        ours = random(UNet(**SMALL_UNET | changed))
        config = diffusers_config(ours)
        theirs = random(diffusers.UNet2DModel.from_config(config)).eval()
        report = load_diffusers(ours, theirs.state_dict(), config=theirs.config)
        assert {row.ours for row in report.rows} == ours.state_dict().keys() and not report.left_out
        same(to_diffusers(ours), theirs.state_dict())

        latent = torch.randn(2, 3, 8, 8)
        outputs = ours(latent, STEPS), theirs(latent, STEPS).sample
        close(*outputs)
        same_gradients(ours, theirs, DIFFUSERS, outputs)

    def test_an_embedding_in_our_order_is_read_as_it_is(self, diffusers):
        ours = UNet(**SMALL_UNET)
        theirs = random(diffusers.UNet2DModel.from_config(diffusers_config(ours) | {"flip_sin_to_cos": False}))
        load_diffusers(ours, theirs.state_dict(), config=theirs.config)
        latent = torch.randn(2, 3, 8, 8)
        close(ours(latent, STEPS), theirs(latent, STEPS).sample)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("freq_shift", 1), ("norm_eps", 1e-6), ("downsample_padding", 0), ("act_fn", "gelu"), ("center_input_sample", True),
            ("resnet_time_scale_shift", "scale_shift"), ("attention_head_dim", 4), ("norm_num_groups", 4),
            ("attn_norm_num_groups", 4), ("mid_block_scale_factor", 2), ("downsample_type", "resnet"),
            ("class_embed_type", "timestep"), ("time_embedding_type", "fourier"), ("mid_block_type", None),
            ("add_attention", False), ("time_embedding_dim", 8),
            ("_class_name", "UNet2DConditionModel"),
        ],
    )  # fmt: skip
    def test_a_config_of_another_function_is_named(self, field, value):
        ours = UNet(**SMALL_UNET)
        state, config = to_diffusers(ours), diffusers_config(ours)
        load_diffusers(ours, state, config=config)
        with pytest.raises(ValueError, match=f"are different functions: .*{field if field != 'attention_head_dim' else 'heads'}"):
            load_diffusers(ours, state, config=config | {field: value})

    def test_what_diffusers_cannot_build(self):
        for changed, reason in (
            ({"activation": "sigmoid"}, "activation sigmoid, theirs is silu"),
            ({"channel_multipliers": (2, 2)}, "32 channels at the first level, theirs has the 16"),
            ({"head_channels": None, "num_heads": 2, "attention_resolutions": (8,)}, "heads of 8, 16 channels"),
            ({"base_channels": 12, "channel_multipliers": (1, 2), "head_channels": 4}, "norms of 6, 8 groups"),
        ):
            with pytest.raises(ValueError, match=reason):
                to_diffusers(UNet(**SMALL_UNET | changed))


def autoencoder_kl(diffusers, **changed):
    """A small AutoencoderKL with weights drawn; its latents have 4 channels."""
    shape = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return random(diffusers.AutoencoderKL(**{**shape, **types, **changed}))


def without_bias(conv):
    nn.init.zeros_(conv.bias)


class TestAutoencoderOfDiffusers:
    @pytest.mark.parametrize("changed", [{}, {"mid_block_add_attention": False}, {"layers_per_block": 2, "latent_channels": 2}])
    def test_encoder_and_decoder_are_theirs_at_every_beta(self, diffusers, changed):
        theirs = autoencoder_kl(diffusers, **changed)
        without_bias(theirs.post_quant_conv)
        shape = SMALL | {
            "num_res_blocks": theirs.config.layers_per_block,
            "latent_channels": theirs.config.latent_channels,
            "mid_attention": theirs.config.mid_block_add_attention,
        }
        encoder, decoder = Encoder(**shape), Decoder(**shape)
        for network in (encoder, decoder):
            load_diffusers(network, theirs.state_dict(), config=theirs.config, without_embedding="zero")
        images = torch.randn(2, 3, 8, 8)
        mean = theirs.encode(images).latent_dist.mean
        close(encoder(images, BETA), mean)
        close(decoder(mean, BETA), theirs.decode(mean).sample)

    def test_level_attention_gradients_and_the_way_back(self, diffusers):
        types = {
            "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        }
        theirs = autoencoder_kl(diffusers, use_quant_conv=False, use_post_quant_conv=False, **types)
        for kind, part, channels in ((Encoder, theirs.encoder, (3, 8)), (Decoder, theirs.decoder, (4, 4))):
            ours = kind(**SMALL, attention_resolutions=(4,), latent_channels=channels[1])
            load_diffusers(ours, part.state_dict(), without_embedding="zero")
            same(to_diffusers(ours), part.state_dict())
            inputs = torch.randn(2, channels[0], 8, 8)
            outputs = ours(inputs, BETA), part(inputs)
            close(*outputs)
            same_gradients(ours, part, DIFFUSERS, outputs)

    def test_an_encoder_of_twice_the_channels_takes_the_log_variance_too(self, diffusers):
        theirs, encoder = autoencoder_kl(diffusers), Encoder(**SMALL, latent_channels=8)
        report = load_diffusers(encoder, theirs.state_dict(), without_embedding="zero")
        images = torch.randn(2, 3, 8, 8)
        close(encoder(images, BETA), theirs.encode(images).latent_dist.parameters)
        last = next(row for row in report.rows if row.ours == "conv_out.bias")
        assert last.theirs == ("encoder.conv_out.bias", "quant_conv.bias") and last.how == "with quant_conv"
        assert report.left_out == {"decoder": len(theirs.decoder.state_dict()), "post_quant_conv": 2}

    def test_a_bias_after_the_latent_goes_into_the_encoder_or_nowhere(self, diffusers):
        theirs, encoder, decoder = autoencoder_kl(diffusers), Encoder(**SMALL), Decoder(**SMALL)
        before = copy.deepcopy(decoder.state_dict())
        with pytest.raises(ValueError, match=r'post_quant_conv has a bias.*latent="decoder"'):
            load_diffusers(decoder, theirs.state_dict(), without_embedding="zero")
        same(decoder.state_dict(), before)
        with pytest.raises(ValueError, match="needs an encoder of 4 channels, the mean alone, got 8"):
            load_diffusers(Encoder(**SMALL, latent_channels=8), theirs.state_dict(), without_embedding="zero", latent="decoder")
        for network in (encoder, decoder):
            load_diffusers(network, theirs.state_dict(), without_embedding="zero", latent="decoder")
        images = torch.randn(2, 3, 8, 8)
        mean = theirs.encode(images).latent_dist.mean
        close(encoder(images, BETA), theirs.post_quant_conv(mean))
        close(decoder(encoder(images, BETA), BETA), theirs.decode(mean).sample)

    def test_published_names_of_attention(self, diffusers):
        theirs = autoencoder_kl(diffusers)
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        old = theirs.state_dict()
        for new, published in names.items():
            old = {name.replace(f".{new}.", f".{published}."): tensor for name, tensor in old.items()}
        first, second = Encoder(**SMALL), Encoder(**SMALL)
        load_diffusers(first, theirs.state_dict(), without_embedding="zero")
        report = load_diffusers(second, old, without_embedding="zero")
        same(first.state_dict(), second.state_dict())
        assert any(name.endswith("query.weight") for row in report.rows for name in row.theirs)

    def test_a_network_that_hears_beta_must_be_frozen(self):
        encoder = random(Encoder(**SMALL))
        with pytest.raises(ValueError, match="no autoencoder of diffusers hears beta"):
            to_diffusers(encoder)
        with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got 1.5"):
            to_diffusers(encoder, beta=1.5)

    def test_a_multi_beta_vae_at_one_beta_is_an_autoencoder_kl(self, diffusers):
        vae = random(MultiBetaVAE(VAEConfig(**SMALL, embedding_mlp=True)))
        encoder, decoder = interop.freeze_vae(vae, 0.3)
        theirs = diffusers.AutoencoderKL.from_config(diffusers_config(encoder, decoder)).eval()
        theirs.load_state_dict(prefixed("encoder.", to_diffusers(encoder)) | prefixed("decoder.", to_diffusers(decoder)))
        images, latents = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
        posterior = theirs.encode(images).latent_dist
        close(posterior.mean, vae.encode(images, 0.3))
        close(posterior.std, vae.sigma(torch.tensor([0.3])).expand_as(posterior.std))
        close(theirs.decode(latents).sample, vae.decode(latents, 0.3))

    def test_encoder_and_decoder_of_other_groups_have_no_config(self):
        encoder, decoder = Encoder(**SMALL, latent_channels=8), Decoder(**SMALL | {"num_groups": 4})
        with pytest.raises(ValueError, match="must have the same groups, got 4, 8"):
            diffusers_config(encoder, decoder)

    def test_norms_that_diffusers_cannot_have_are_refused_without_a_config_too(self):
        uneven = {"base_channels": 12, "channel_multipliers": (1, 2)}
        state = to_diffusers(freeze(Encoder(**SMALL | uneven | {"num_groups": 6}), 0.0))
        with pytest.raises(ValueError, match="norms of 6, 8 groups, theirs have all the same"):
            load_diffusers(Encoder(**SMALL | uneven), state, without_embedding="zero")


class TestBlocksAlone:
    def test_resnet_block_and_attention_of_diffusers(self, diffusers):
        from diffusers.models.attention_processor import Attention
        from diffusers.models.resnet import ResnetBlock2D

        x, embedding = torch.randn(2, 16, 5, 7), torch.randn(2, 12)
        theirs = random(ResnetBlock2D(in_channels=16, out_channels=24, temb_channels=12, groups=8, eps=1e-6))
        ours = ResBlock(16, 24, 12, num_groups=8)
        load_diffusers(ours, theirs.state_dict())
        close(ours(x, embedding), theirs(x, embedding))
        same(to_diffusers(ours), theirs.state_dict())

        options = {"residual_connection": True, "bias": True, "_from_deprecated_attn_block": True}
        theirs = random(Attention(16, heads=4, dim_head=4, eps=1e-6, norm_num_groups=8, **options))
        ours = AttentionBlock(16, num_heads=4, num_groups=8)
        load_diffusers(ours, theirs.state_dict())
        close(ours(x), theirs(x))
        same(to_diffusers(ours), theirs.state_dict())

    @pytest.mark.parametrize("new_order", [False, True])
    def test_both_orders_of_openai(self, new_order):
        ours, channels, heads = random(AttentionBlock(64, num_heads=4, eps=1e-5)), 64, 4
        weights = {name.replace("projection", "proj_out"): tensor.clone() for name, tensor in ours.state_dict().items()}
        qkv = torch.randn(3 * channels, channels, 1)
        state = {**weights, "qkv.weight": qkv, "proj_out.weight": weights["proj_out.weight"][..., None]}
        load_ldm(ours, state, config={"use_new_attention_order": new_order})
        x = torch.randn(2, channels, 3, 5)

        tokens = torch.einsum("oi,nil->nol", qkv[..., 0], ours.norm(x).flatten(2)) + weights["qkv.bias"][:, None]
        parts = tokens.view(2, 3, heads, 16, 15) if new_order else tokens.view(2, heads, 3, 16, 15).transpose(1, 2)
        query, key, value = parts.unbind(1)
        attended = (query.transpose(-1, -2) @ key / 4).softmax(-1) @ value.transpose(-1, -2)
        projected = ours.projection(attended.transpose(1, 2).reshape(2, 15, channels)).transpose(1, 2)
        close(ours(x), x + projected.view_as(x))

    def test_blocks_of_both_networks_of_latent_diffusion(self):
        assert to_ldm(ResBlock(32, 64, 12)).keys() >= {"norm1.weight", "temb_proj.weight", "nin_shortcut.bias"}
        assert to_ldm(ResBlock(32, 64, 12, eps=1e-5)).keys() >= {
            "in_layers.0.weight",
            "emb_layers.1.weight",
            "skip_connection.bias",
        }
        assert to_ldm(AttentionBlock(32)).keys() >= {"q.weight", "k.bias", "proj_out.weight"}
        for block in (ResBlock(32, 64, 12), ResBlock(32, 32, 12, eps=1e-5), AttentionBlock(32), ResBlock(32, 64)):
            again = copy.deepcopy(block)
            load_ldm(again, to_ldm(random(block)))
            same(again.state_dict(), block.state_dict())

    def test_blocks_that_latent_diffusion_lacks(self):
        for block, reason in (
            (AttentionBlock(64, num_heads=2), "2 heads, theirs is 1"),
            (AttentionBlock(64, num_groups=16), "num_groups 16, theirs is 32"),
            (ResBlock(32, 32, 8, eps=1e-3), "eps 0.001, theirs is 1e-06"),
            (ResBlock(32, 32, eps=1e-5), "no projection of the embedding"),
            (nn.Linear(2, 2), "UNet, Encoder, Decoder, ResBlock or AttentionBlock, not a Linear"),
        ):
            with pytest.raises(ValueError, match=reason):
                to_ldm(block)


def split_attention(state, num_heads):
    """The converter of diffusers leaves query, key and value of `AttentionBlock` in one: apart as QKVAttentionLegacy has them."""
    result = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        tensor = tensor.squeeze(-1) if "attentions" in name and kind == "weight" else tensor
        if stem.endswith(".qkv"):
            heads = tensor.unflatten(0, (num_heads(tensor.shape[0] // 3), 3, -1))
            result |= {f"{stem[:-4]}.to_{part}.{kind}": heads[:, index].flatten(0, 1) for index, part in enumerate("qkv")}
        else:
            result[name.replace(".proj_out.", ".to_out.0.").replace(".norm.", ".group_norm.")] = tensor
    return result


class TestLatentDiffusion:
    @pytest.mark.parametrize("changed", [{}, {"head_channels": None, "num_heads": 4, "channel_multipliers": (1, 1)}])
    def test_the_unet_survives_their_names_and_the_converter_of_diffusers(self, diffusers, changed):
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        ours = random(UNet(**LDM_UNET | changed))
        config = diffusers_config(ours)
        converted = convert_ldm_unet_checkpoint(prefixed("model.diffusion_model.", to_ldm(ours)), config)
        theirs = diffusers.UNet2DModel.from_config(config).eval()
        width = config["attention_head_dim"]
        theirs.load_state_dict(split_attention(converted, lambda channels: channels // width))
        latent = torch.randn(2, 3, 8, 8)
        close(ours(latent, STEPS), theirs(latent, STEPS).sample)

    def test_the_autoencoder_survives_their_names_and_the_converter_of_diffusers(self, diffusers):
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        encoder, decoder = random(Encoder(**LDM_SMALL, latent_channels=8)), random(Decoder(**LDM_SMALL))
        config = diffusers_config(encoder, decoder)
        states = {name: to_ldm(network, beta=0.4) for name, network in (("encoder", encoder), ("decoder", decoder))}
        whole = prefixed("first_stage_model.encoder.", states["encoder"]) | prefixed(
            "first_stage_model.decoder.", states["decoder"]
        )
        theirs = diffusers.AutoencoderKL.from_config(config).eval()
        theirs.load_state_dict(convert_ldm_vae_checkpoint(whole, config))
        images, latents = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
        beta = torch.tensor([0.4, 0.4])
        close(theirs.encode(images).latent_dist.parameters, encoder(images, beta))
        close(theirs.decode(latents).sample, decoder(latents, beta))

    @pytest.mark.parametrize(("kind", "shape"), [(UNet, LDM_UNET), (Encoder, LDM_SMALL), (Decoder, LDM_SMALL)])
    def test_there_and_back_is_bitwise(self, kind, shape):
        ours, again = random(kind(**shape)), kind(**shape)
        load_ldm(again, to_ldm(ours))
        same(again.state_dict(), ours.state_dict())
        state = to_ldm(ours)
        assert any("temb_proj" in name or "emb_layers" in name for name in state)

    def test_a_whole_checkpoint_with_its_averages(self):
        unet, average = random(UNet(**LDM_UNET)), random(UNet(**LDM_UNET))
        encoder, decoder = (freeze(random(kind(**LDM_SMALL, embedding_mlp=True)), 0.0) for kind in (Encoder, Decoder))
        flat = {f"model_ema.diffusion_model{name.replace('.', '')}": tensor for name, tensor in to_ldm(average).items()}
        whole = {
            **{"betas": torch.zeros(3), "scale_factor": torch.ones(()), "model_ema.decay": torch.ones(()), **flat},
            **prefixed("model.diffusion_model.", to_ldm(unet)),
            **prefixed("first_stage_model.encoder.", to_ldm(encoder)),
            **prefixed("first_stage_model.decoder.", to_ldm(decoder)),
        }
        config = {"num_head_channels": 16, "num_heads": -1, "use_scale_shift_norm": False}
        for ema, expected in ((False, unet), (True, average)):
            ours = UNet(**LDM_UNET)
            load_ldm(ours, whole, config=config, ema=ema)
            same(ours.state_dict(), expected.state_dict())
        for kind, expected in ((Encoder, encoder), (Decoder, decoder)):
            ours = kind(**LDM_SMALL)
            report = load_ldm(ours, whole, without_embedding="zero")
            same(to_ldm(ours), to_ldm(expected))
            assert report.left_out["betas"] == 1 and report.left_out["model"] == len(to_ldm(unet))
        with pytest.raises(ValueError, match="averaged weights were asked for"):
            load_ldm(UNet(**LDM_UNET), prefixed("model.diffusion_model.", to_ldm(unet)), ema=True)

    def test_a_codebook_leaves_no_log_variance_to_drop(self):
        encoder = freeze(random(Encoder(**LDM_SMALL, latent_channels=8)), 0.0)
        state = prefixed("encoder.", to_ldm(encoder))
        load_ldm(Encoder(**LDM_SMALL), state, without_embedding="zero")
        with pytest.raises(ValueError, match=r"2 of another shape: conv_out\.weight \(8, "):
            load_ldm(Encoder(**LDM_SMALL), state | {"quantize.embedding.weight": torch.zeros(5, 8)}, without_embedding="zero")

    def test_a_config_of_another_function_is_named(self):
        ours = UNet(**LDM_UNET)
        load_ldm(ours, to_ldm(ours), config={"num_heads": 8, "num_head_channels": -1})
        for config, reason in (
            ({"num_head_channels": 64}, "2 heads at 128 channels, here there are 8"),
            ({"use_scale_shift_norm": True}, "use_scale_shift_norm True, here it is False"),
            ({"conv_resample": False}, "conv_resample False, here it is True"),
        ):
            with pytest.raises(ValueError, match=reason):
                load_ldm(ours, to_ldm(ours), config=config)


class TestStrictness:
    def test_what_does_not_fit_is_named_and_nothing_changes(self):
        ours = random(UNet(**LDM_UNET))
        before, state = copy.deepcopy(ours.state_dict()), to_ldm(random(UNet(**LDM_UNET)))
        renamed = dict(state)
        renamed["label_emb.weight"] = renamed.pop("out.0.bias")
        renamed["out.2.bias"] = torch.zeros(6)
        expected = (
            r"1 missing: out\.0\.bias; 1 unexpected: label_emb\.weight; 1 of another shape: out\.2\.bias \(6,\) instead of \(5,\)"
        )
        with pytest.raises(ValueError, match=expected):
            load_ldm(ours, renamed)
        same(ours.state_dict(), before)
        deeper = UNet(**LDM_UNET | {"num_res_blocks": 2})
        with pytest.raises(ValueError, match=r"missing: .* and \d+ more"):
            load_ldm(deeper, state)

    def test_a_network_without_embedding_must_be_asked_for(self):
        frozen = freeze(random(Encoder(**SMALL)), 0.5)
        state, ours = to_diffusers(frozen), Encoder(**SMALL)
        with pytest.raises(ValueError, match=r'no projection of an embedding.*4 blocks of the Encoder.*without_embedding="zero"'):
            load_diffusers(ours, state)
        load_diffusers(ours, state, without_embedding="zero")
        images = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(ours(images, BETA), ours(images, 1 - BETA), rtol=0, atol=0)
        with pytest.raises(ValueError, match='must be None or "zero", got True'):
            load_diffusers(ours, state, without_embedding=True)
        with pytest.raises(ValueError, match=r"\d+ unexpected: .*temb_proj"):
            load_ldm(Encoder(**LDM_SMALL), to_ldm(random(Encoder(**LDM_SMALL))), without_embedding="zero")

    def test_the_part_is_found_or_asked_for(self):
        encoder = freeze(random(Encoder(**SMALL)), 0.5)
        two = prefixed("first.encoder.", to_diffusers(encoder)) | prefixed("second.encoder.", to_diffusers(encoder))
        with pytest.raises(
            ValueError, match=r"wanted one Encoder.*found 2 of them, at 'first.encoder.', 'second.encoder.'.*prefix="
        ):
            load_diffusers(Encoder(**SMALL), two, without_embedding="zero")
        load_diffusers(Encoder(**SMALL), two, without_embedding="zero", prefix="second.encoder.")
        with pytest.raises(
            ValueError, match=r"found none; names begin with conv_in, temb; temb.dense belongs to its class Model"
        ):
            load_ldm(UNet(**LDM_UNET), {"conv_in.weight": torch.zeros(1), "temb.dense.0.weight": torch.zeros(1)})

    def test_the_report_is_a_table(self):
        ours = UNet(**SMALL_UNET)
        report = load_diffusers(ours, to_diffusers(ours))
        lines = str(report).splitlines()
        assert lines[0].split() == ["ours", "shape", "theirs", "how"] and len(lines) == 1 + len(ours.state_dict())
        row = next(line.split("  ") for line in lines if line.startswith("middle.1.qkv.weight"))
        cells = [cell.strip() for cell in row if cell.strip()]
        assert cells[1:] == [
            "96 x 32",
            " + ".join(f"mid_block.attentions.0.to_{part}.weight" for part in "qkv"),
            "query, key, value stacked",
        ]
        assert "2 [cos, sin] to [sin, cos]" in report.summary()


class TestChangedNetworks:
    """Networks that others have wrapped or changed."""

    @pytest.mark.parametrize("inside", [False, True])
    def test_compiled_ones_are_written_and_filled_as_plain_ones(self, inside, tmp_path):
        plain, other = random(UNet(**SMALL_UNET)), random(UNet(**SMALL_UNET))
        expected, network = to_diffusers(plain), copy.deepcopy(plain)
        if inside:
            network.middle[0] = torch.compile(network.middle[0])
        else:
            network = torch.compile(network)
        same(to_diffusers(network), expected)
        for to in ("diffusers", "multibeta"):
            interop.write_networks(interop.Networks({"unet": network}, {"unet": SMALL_UNET}), to, tmp_path / to)
            same(interop.read_networks(tmp_path / to).modules["unet"].state_dict(), plain.state_dict())
        load_diffusers(network, to_diffusers(other))
        same(to_diffusers(network), to_diffusers(other))

    def test_a_compiled_model_has_the_same_networks(self):
        vae = random(MultiBetaVAE(VAEConfig(**SMALL)))
        expected = interop.model_networks(types.SimpleNamespace(vae=vae), 0.5).modules
        found = interop.model_networks(types.SimpleNamespace(vae=torch.compile(vae)), 0.5).modules
        for name, network in expected.items():
            same(found[name].state_dict(), network.state_dict())

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    def test_what_has_no_counterpart_is_named_with_what_to_do(self, tmp_path):
        def changed(change):
            network = random(UNet(**SMALL_UNET))
            return change(network) or network

        quantised = changed(lambda unet: torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, torch.qint8))
        for network, reason in (
            (changed(lambda unet: parametrizations.weight_norm(unet.conv_out) and None), "remove_parametrizations"),
            (changed(lambda unet: prune.l1_unstructured(unet.conv_out, "weight", 0.5) and None), r"prune\.remove"),
            (changed(lambda unet: unet.set_submodule("conv_out", nn.Sequential(unet.conv_out))), r"has no conv_out\.0\.weight"),
            (quantised, "quantised layers: save the model before"),
            (changed(lambda unet: unet.to("meta")), "on the meta device, without values"),
        ):
            with pytest.raises(ValueError, match=reason):
                to_diffusers(network)
            for to in ("diffusers", "multibeta"):
                with pytest.raises(ValueError, match=r"cannot be saved|has no conv_out"):
                    interop.write_networks(interop.Networks({"unet": network}, {"unet": SMALL_UNET}), to, tmp_path / to)
        assert not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match="on the meta device: give it memory first"):
            load_diffusers(UNet(**SMALL_UNET).to("meta"), to_diffusers(random(UNet(**SMALL_UNET))))


class TestFreeze:
    @pytest.mark.parametrize("mlp", [False, True])
    def test_a_frozen_network_is_the_original_at_one_beta(self, mlp):
        for kind, channels in ((Encoder, 3), (Decoder, 4)):
            network, inputs = random(kind(**SMALL, embedding_mlp=mlp)), torch.randn(2, channels, 8, 8)
            before = copy.deepcopy(network.state_dict())
            frozen = freeze(network, 0.7)
            close(frozen(inputs, BETA), network(inputs, torch.tensor([0.7, 0.7])))
            same(network.state_dict(), before)

    def test_only_what_hears_beta_can_be_frozen(self):
        with pytest.raises(ValueError, match="freezes an Encoder or Decoder, got a UNet"):
            to_ldm(UNet(**LDM_UNET), beta=0.5)


class TestFiles:
    def test_diffusers_folder_to_ours_and_back(self, diffusers, tmp_path):
        unet = random(diffusers.UNet2DModel.from_config(diffusers_config(UNet(**SMALL_UNET)) | {"sample_size": 8}))
        vae = autoencoder_kl(diffusers)
        without_bias(vae.post_quant_conv)
        unet.save_pretrained(tmp_path / "theirs" / "unet")
        vae.save_pretrained(tmp_path / "theirs" / "vae")

        found = interop.read_networks(tmp_path / "theirs")
        interop.write_networks(found, "multibeta", tmp_path / "ours")
        ours = interop.load_networks(tmp_path / "ours")
        images, latent = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
        close(ours["unet"](images, STEPS), unet(images, STEPS).sample)
        close(ours["encoder"](images, BETA), vae.encode(images).latent_dist.parameters)
        close(ours["decoder"](latent, BETA), vae.decode(latent).sample)

        interop.write_networks(interop.read_networks(tmp_path / "ours"), "diffusers", tmp_path / "again")
        again = diffusers.UNet2DModel.from_pretrained(tmp_path / "again", subfolder="unet")
        same(again.state_dict(), unet.state_dict())
        again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "again", subfolder="vae").eval()
        close(again.encode(images).latent_dist.parameters, vae.encode(images).latent_dist.parameters)

    def test_latent_diffusion_file_to_ours(self, tmp_path):
        unet = random(UNet(**LDM_UNET))
        encoder, decoder = (
            freeze(random(kind(**LDM_SMALL, latent_channels=channels)), 0.2) for kind, channels in ((Encoder, 8), (Decoder, 4))
        )
        file = tmp_path / "theirs.safetensors"
        networks = interop.Networks({"unet": unet, "encoder": encoder, "decoder": decoder})
        interop.write_networks(networks, "ldm", file)
        with pytest.raises(ValueError, match="do not show the heads"):
            interop.read_networks(file)
        found = interop.read_networks(file, head_channels=16, mean_only=True)
        images, latent = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
        close(found.modules["unet"](images, STEPS), unet(images, STEPS))
        close(found.modules["encoder"](images, BETA), encoder(images, BETA).chunk(2, dim=1)[0])
        close(found.modules["decoder"](latent, BETA), decoder(latent, BETA))
        assert found.arguments["encoder"]["channel_multipliers"] == (1, 1) and found.arguments["unet"]["resolution"] == 16
        with pytest.raises(ValueError, match="an AutoencoderKL encodes to mean and log variance, 8 channels"):
            interop.write_networks(found, "diffusers", tmp_path / "out")
        assert interop.read_networks(file, parts=["vae"], latent="decoder").modules.keys() == {"encoder", "decoder"}

    @pytest.mark.parametrize("old", [False, True])
    def test_latent_diffusion_checkpoint_to_ours(self, old, tmp_path):
        unet = random(UNet(**LDM_UNET)).half()
        state = prefixed("model.diffusion_model.", to_ldm(unet))
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt", _use_new_zipfile_serialization=not old)
        found = interop.read_networks(tmp_path / "model.ckpt", head_channels=16).modules["unet"]
        same(found.state_dict(), unet.float().state_dict())
        with pytest.raises(ValueError, match=r"holds no vae as multibeta, .*, but other tensors"):
            interop.read_networks(tmp_path / "model.ckpt", parts=["vae"])

    def test_what_a_folder_of_ours_lacks_is_said(self, tmp_path):
        interop.write_networks(
            interop.Networks({"unet": UNet(**SMALL_UNET)}, {"unet": SMALL_UNET}), "multibeta", tmp_path / "ours"
        )
        assert interop.read_networks(tmp_path / "ours").modules.keys() == {"unet"}
        with pytest.raises(ValueError, match="holds no vae as multibeta"):
            interop.read_networks(tmp_path / "ours", parts=["vae"])

    def test_a_resolution_that_the_levels_cannot_halve(self, tmp_path):
        interop.write_networks(interop.Networks({"unet": UNet(**SMALL_UNET)}), "diffusers", tmp_path)
        with pytest.raises(ValueError, match="multiple of 2, for 2 levels, got 9"):
            interop.read_networks(tmp_path, resolution=9)

    def test_others_may_read_what_is_written_where_the_umask_lets_them(self, tmp_path):
        write_weights(tmp_path / "weights.safetensors", {"a": torch.ones(2)})
        (tmp_path / "plain").touch()
        assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_an_unknown_model_or_an_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match="holds no unet or vae"):
            interop.read_networks(tmp_path)
        (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
        with pytest.raises(ValueError, match="holds a VQModel"):
            interop.read_networks(tmp_path)
        with pytest.raises(FileNotFoundError, match="is not a file"):
            interop.read_networks(tmp_path / "nothing.ckpt")

    def test_an_interrupted_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        file = tmp_path / "weights.safetensors"
        write_weights(file, {"a": torch.ones(2)})

        def fail(*_):
            raise OSError("the disk is full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="full"):
            write_weights(file, {"a": torch.zeros(2)})
        same(read_weights(file), {"a": torch.ones(2)})

    def test_a_lightning_checkpoint_names_its_callbacks_and_runs_nothing(self, tmp_path, monkeypatch):
        def module(name, **members):
            if "." in name:
                module(name.rpartition(".")[0])
            made = types.ModuleType(name)
            for member, value in members.items():
                value.__module__ = name
                setattr(made, member, value)
            monkeypatch.setitem(sys.modules, name, made)

        callback, other = type("ModelCheckpoint", (), {}), type("Config", (), {})
        module("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint=callback)
        module("somewhere", Config=other)
        checkpoint = {"state_dict": {"a": torch.ones(2)}, "callbacks": {callback: {"best": "x"}}}
        torch.save(checkpoint, tmp_path / "fine.ckpt")
        torch.save(checkpoint | {"config": other, "more": types.SimpleNamespace}, tmp_path / "foreign.ckpt")
        monkeypatch.undo()
        same(read_weights(tmp_path / "fine.ckpt"), {"a": torch.ones(2)})
        with pytest.raises(
            ValueError, match=r"holds the classes somewhere.Config, types.SimpleNamespace, which could execute code"
        ):
            read_weights(tmp_path / "foreign.ckpt")

    def test_a_damaged_config_of_ours_is_named(self, tmp_path):
        networks = interop.Networks({"unet": UNet(**SMALL_UNET)}, {"unet": SMALL_UNET})
        interop.write_networks(networks, "multibeta", tmp_path)
        path = tmp_path / "config.json"
        whole = json.loads(path.read_text())
        unet = whole["networks"]["unet"]
        damaged = [whole | {"networks": value} for value in (None, [], "unet", 3, {"unet": None}, {"unet": [1]}, {"vae": unet})]
        damaged += [whole | {"networks": {"unet": unet, "encoder": {}}}, whole | {"files": None}, whole | {"files": ["../unet"]}]
        for field, values in {
            "base_channels": (-1, 0, "a", None, 10**6),
            "resolution": (16.0, "a"),
            "channel_multipliers": (2, [], ["a"], [1.5]),
            "num_groups": (0, [1]),
            "self": (1,),
        }.items():
            damaged += [whole | {"networks": {"unet": unet | {field: value}}} for value in values]
        for config in damaged:
            path.write_text(json.dumps(config))
            with pytest.raises(ValueError) as raised:
                interop.load_networks(tmp_path)
            assert str(tmp_path) in str(raised.value), config
        for config in (3, "networks class", [whole]):
            path.write_text(json.dumps(config))
            assert interop.load_networks(tmp_path) is None and not interop.files.is_ours(tmp_path)

    def test_a_damaged_config_of_diffusers_is_named(self, tmp_path):
        networks = interop.Networks({"unet": UNet(**SMALL_UNET)})
        interop.write_networks(networks, "diffusers", tmp_path)
        path = tmp_path / "unet" / "config.json"
        whole = json.loads(path.read_text())
        for name, value in {"block_out_channels": None, "down_block_types": 3}.items():
            for config in (whole | {name: value}, {key: kept for key, kept in whole.items() if key != name}):
                path.write_text(json.dumps(config))
                with pytest.raises(ValueError, match=r"config\.json") as raised:
                    interop.read_networks(tmp_path)
                assert str(tmp_path) in str(raised.value)

    def test_a_damaged_folder_of_ours_is_refused(self, tmp_path):
        networks = interop.Networks({"unet": UNet(**SMALL_UNET)}, {"unet": SMALL_UNET})
        interop.write_networks(networks, "multibeta", tmp_path / "ours")
        assert checkpoints.exists(tmp_path / "ours")
        (tmp_path / "ours" / "unet.safetensors").write_bytes(b"nothing")
        with pytest.raises(ValueError, match="damaged"):
            interop.load_networks(tmp_path / "ours")
