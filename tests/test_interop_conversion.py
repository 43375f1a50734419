"""Networks filled with weights of others compute what theirs compute; diffusers and its own converters are the judges."""

import copy

import pytest
import torch
from torch import nn

from interop_networks import (
    BETA,
    LDM_SMALL,
    LDM_UNET,
    SMALL,
    SMALL_UNET,
    STEPS,
    UNETS,
    autoencoder_kl,
    close,
    prefixed,
    random,
    same,
    without_bias,
)
from multibeta import interop
from multibeta.blocks import AttentionBlock, ResBlock
from multibeta.interop import diffusers_config, freeze, load_diffusers, load_ldm, to_diffusers, to_ldm
from multibeta.interop.mapping import DIFFUSERS
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig
from multibeta.networks import Decoder, Encoder, UNet


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


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
        for cls, part, channels in ((Encoder, theirs.encoder, (3, 8)), (Decoder, theirs.decoder, (4, 4))):
            ours = cls(**SMALL, attention_resolutions=(4,), latent_channels=channels[1])
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
        stem, _, end = name.rpartition(".")
        tensor = tensor.squeeze(-1) if "attentions" in name and end == "weight" else tensor
        if stem.endswith(".qkv"):
            heads = tensor.unflatten(0, (num_heads(tensor.shape[0] // 3), 3, -1))
            result |= {f"{stem[:-4]}.to_{part}.{end}": heads[:, index].flatten(0, 1) for index, part in enumerate("qkv")}
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

    @pytest.mark.parametrize(("cls", "shape"), [(UNet, LDM_UNET), (Encoder, LDM_SMALL), (Decoder, LDM_SMALL)])
    def test_there_and_back_is_bitwise(self, cls, shape):
        ours, again = random(cls(**shape)), cls(**shape)
        load_ldm(again, to_ldm(ours))
        same(again.state_dict(), ours.state_dict())
        state = to_ldm(ours)
        assert any("temb_proj" in name or "emb_layers" in name for name in state)

    def test_a_whole_checkpoint_with_its_averages(self):
        unet, average = random(UNet(**LDM_UNET)), random(UNet(**LDM_UNET))
        encoder, decoder = (freeze(random(cls(**LDM_SMALL, embedding_mlp=True)), 0.0) for cls in (Encoder, Decoder))
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
        for cls, expected in ((Encoder, encoder), (Decoder, decoder)):
            ours = cls(**LDM_SMALL)
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


class TestFreeze:
    @pytest.mark.parametrize("mlp", [False, True])
    def test_a_frozen_network_is_the_original_at_one_beta(self, mlp):
        for cls, channels in ((Encoder, 3), (Decoder, 4)):
            network, inputs = random(cls(**SMALL, embedding_mlp=mlp)), torch.randn(2, channels, 8, 8)
            before = copy.deepcopy(network.state_dict())
            frozen = freeze(network, 0.7)
            close(frozen(inputs, BETA), network(inputs, torch.tensor([0.7, 0.7])))
            same(network.state_dict(), before)

    def test_only_what_hears_beta_can_be_frozen(self):
        with pytest.raises(ValueError, match="freezes an Encoder or Decoder, got a UNet"):
            to_ldm(UNet(**LDM_UNET), beta=0.5)
