"""Every layout that diffusers writes is read, and gives what diffusers itself reads; else the message says what is there."""

import json
import logging
import shutil

import pytest
import torch
from torch import nn

from multibeta import acceleration, cli, interop
from multibeta.interop import folders
from multibeta.networks import UNet

diffusers = pytest.importorskip("diffusers")

UNET = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
VAE = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "use_post_quant_conv": False,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
LAYOUTS = {
    "one file": {},
    "variant": {"variant": "fp16"},
    "shards": {"max_shard_size": "100KB"},
    "shards of a variant": {"max_shard_size": "100KB", "variant": "fp16"},
    "torch.save": {"safe_serialization": False},
    "torch.save, variant": {"safe_serialization": False, "variant": "non_ema"},
    "torch.save, shards": {"safe_serialization": False, "max_shard_size": "100KB"},
    "torch.save, shards of a variant": {"safe_serialization": False, "max_shard_size": "100KB", "variant": "bf16"},
}
IMAGES, LATENTS, STEPS, BETA = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([0.2, 0.9])


def drawn(model, seed=0):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def unet(seed=0):
    return drawn(diffusers.UNet2DModel(**UNET), seed)


def vae(seed=0):
    return drawn(diffusers.AutoencoderKL(**VAE), seed)


def close(actual, expected, factor=1e-5):
    assert (actual - expected).abs().max() <= factor * expected.abs().max()


def is_unet(networks, expected):
    close(networks.modules["unet"](IMAGES, STEPS.float()), expected.float()(IMAGES, STEPS).sample)


def is_vae(networks, expected):
    expected = expected.float()
    close(networks.modules["encoder"](IMAGES, BETA), expected.encode(IMAGES).latent_dist.parameters)
    close(networks.modules["decoder"](LATENTS, BETA), expected.decode(LATENTS).sample)


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.WARNING, "multibeta")
    return caplog


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
class TestLayouts:
    def test_a_model(self, options, tmp_path, messages):
        model = unet()
        model.save_pretrained(tmp_path, **options)
        is_unet(interop.read_networks(tmp_path), model)
        actual = [text for text in messages.messages if "its only weights are taken, of the variant" in text]
        assert bool(actual) == ("variant" in options)
        is_unet(interop.read_networks(tmp_path, variant=options.get("variant")), model)

    def test_a_model_to_accelerate(self, options, tmp_path):
        model = unet()
        model.save_pretrained(tmp_path, **options)
        for variant in (None, options.get("variant")):
            loaded = acceleration.load(tmp_path, variant=variant)
            assert torch.equal(loaded(IMAGES, 3).sample, model(IMAGES, 3).sample)

    def test_a_pipeline(self, options, tmp_path):
        pipeline = diffusers.LDMPipeline(vqvae=vae(), unet=unet(1), scheduler=diffusers.DDIMScheduler())
        pipeline.save_pretrained(tmp_path, **options)
        networks = interop.read_networks(tmp_path)
        assert list(networks.modules) == ["unet", "encoder", "decoder"]
        is_unet(networks, unet(1))
        is_vae(networks, vae())
        with pytest.raises(ValueError, match="name one of its parts: unet, vqvae"):
            acceleration.load(tmp_path)


class TestVariants:
    @pytest.fixture
    def folder(self, tmp_path):
        unet().save_pretrained(tmp_path)
        unet(1).half().save_pretrained(tmp_path, variant="fp16")
        unet(2).save_pretrained(tmp_path, variant="non_ema", max_shard_size="100KB")
        return tmp_path

    def test_the_one_that_is_named_is_read_and_else_that_without(self, folder, messages):
        for variant, model in ((None, unet()), ("", unet()), ("fp16", unet(1).half()), ("non_ema", unet(2))):
            is_unet(interop.read_networks(folder, variant=variant), model)
            loaded = acceleration.load(folder, variant=variant)
            close(loaded(IMAGES, 3).sample, model.float()(IMAGES, 3).sample)
        assert not messages.messages

    def test_one_that_is_not_there_is_refused_with_those_that_are(self, folder):
        shown = (
            r"no weights of the variant 'bf16', but: fp16 \(diffusion_pytorch_model\.fp16\.safetensors\), without a variant "
            r"\(diffusion_pytorch_model\.safetensors\), non_ema \(diffusion_pytorch_model\.safetensors\.index\.non_ema\.json\)"
        )
        for read in (interop.read_networks, acceleration.load):
            with pytest.raises(FileNotFoundError, match=shown):
                read(folder, variant="bf16")

    def test_several_without_a_plain_one_must_be_chosen(self, folder):
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        for read in (interop.read_networks, acceleration.load):
            with pytest.raises(ValueError, match=r"several variants, choose one by variant=: fp16 \(.*\), non_ema \("):
                read(folder)
        is_unet(interop.read_networks(folder, variant="non_ema"), unet(2))

    def test_the_index_of_older_versions(self, folder):
        new = folder / "diffusion_pytorch_model.safetensors.index.non_ema.json"
        new.rename(folder / "diffusion_pytorch_model.safetensors.non_ema.index.json")
        is_unet(interop.read_networks(folder, variant="non_ema"), unet(2))

    def test_a_part_of_a_pipeline_that_lacks_it_gives_what_it_has(self, tmp_path, messages):
        unet().save_pretrained(tmp_path / "unet", variant="fp16")
        unet(1).save_pretrained(tmp_path / "unet")
        vae().save_pretrained(tmp_path / "vae")
        networks = interop.read_networks(tmp_path, variant="fp16")
        is_unet(networks, unet())
        is_vae(networks, vae())
        assert messages.messages == [f"{tmp_path / 'vae'} has no weights of the variant fp16, others are taken"]
        with pytest.raises(FileNotFoundError, match="no weights of the variant 'bf16'"):
            interop.read_networks(tmp_path, variant="bf16")

    def test_they_are_of_diffusers(self, tmp_path):
        shape = {"in_channels": 3, "out_channels": 3, "resolution": 8, "base_channels": 8, "num_groups": 4, "num_heads": 1}
        shape |= {"channel_multipliers": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
        interop.write_networks(interop.Networks({"unet": UNet(**shape)}, {"unet": shape}), "multibeta", tmp_path / "ours")
        with pytest.raises(ValueError, match="variant='fp16' chooses among the weights in a folder of diffusers"):
            interop.read_networks(tmp_path / "ours", variant="fp16")

    def test_on_the_command_line(self, folder, tmp_path, capsys):
        cli.main(["convert", str(folder), "--to", "multibeta", "--out", str(tmp_path / "ours"), "--variant", "non_ema"])
        close(interop.load_networks(tmp_path / "ours")["unet"](IMAGES, STEPS.float()), unet(2)(IMAGES, STEPS).sample)
        cli.main(["accelerate", str(folder), "--variant", "fp16", "--repetitions", "1"])
        assert "conv_in Conv2d" in capsys.readouterr().out


class TestParts:
    def test_one_of_its_weight_files_stands_for_a_folder(self, tmp_path):
        unet().save_pretrained(tmp_path)
        unet(1).save_pretrained(tmp_path, variant="ema", max_shard_size="100KB")
        is_unet(interop.read_networks(tmp_path / "diffusion_pytorch_model.safetensors"), unet())
        is_unet(interop.read_networks(tmp_path / "diffusion_pytorch_model.safetensors.index.ema.json"), unet(1))
        with pytest.raises(
            ValueError, match=r"head_channels can be given for weight files of latent-diffusion, .* is of diffusers"
        ):
            interop.read_networks(tmp_path / "diffusion_pytorch_model.safetensors", head_channels=8)

    def test_a_copy_of_a_part_is_no_second_one(self, tmp_path):
        unet().save_pretrained(tmp_path / "unet")
        unet(1).save_pretrained(tmp_path / "unet_ema")
        is_unet(interop.read_networks(tmp_path), unet())
        is_unet(interop.read_networks(tmp_path / "unet_ema"), unet(1))
        shutil.move(tmp_path / "unet", tmp_path / "first")
        with pytest.raises(ValueError, match="more than one unet, in first, unet_ema: name the folder of one"):
            interop.read_networks(tmp_path)

    def test_what_cannot_be_read_is_left_out_or_named(self, tmp_path, messages):
        vae().save_pretrained(tmp_path / "vae")
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
        networks = interop.read_networks(tmp_path)
        assert list(networks.modules) == ["encoder", "decoder"]
        is_vae(networks, vae())
        assert messages.messages == [f"{tmp_path / 'unet'} holds a UNet2DConditionModel, which cannot be read and is left out"]
        shown = "holds a UNet2DConditionModel, what can be read are UNet2DModel and AutoencoderKL"
        with pytest.raises(ValueError, match=shown):
            interop.read_networks(tmp_path, parts=["unet"])
        with pytest.raises(ValueError, match=shown):
            interop.read_networks(tmp_path / "unet")


class TestWhatIsMissing:
    def test_no_weights(self, tmp_path):
        unet().save_pretrained(tmp_path)
        (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "model.safetensors")
        shown = r"no weights, which are called diffusion_pytorch_model\.safetensors; it holds config\.json, model\.safetensors"
        for read in (interop.read_networks, acceleration.load):
            with pytest.raises(FileNotFoundError, match=shown):
                read(tmp_path)

    def test_no_config(self, tmp_path):
        unet().save_pretrained(tmp_path / "unet")
        (tmp_path / "unet" / "config.json").unlink()
        with pytest.raises(ValueError, match=r"but diffusion_pytorch_model\.safetensors$"):
            interop.read_networks(tmp_path / "unet")
        with pytest.raises(ValueError, match=r"has the names of diffusers, whose shape is in a config\.json"):
            interop.read_networks(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
        with pytest.raises(ValueError, match=r"no config\.json of a diffusers model; it holds unet/"):
            acceleration.load(tmp_path)

    def test_nothing_of_the_kind(self, tmp_path):
        (tmp_path / "model.ckpt").touch()
        (tmp_path / "scheduler").mkdir()
        for read in (interop.read_networks, acceleration.load):
            with pytest.raises(ValueError, match=r"model\.ckpt, scheduler/"):
                read(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"no config\.json of a diffusers model, it is no folder: name one"):
            acceleration.load(tmp_path / "nothing")

    def test_shards(self, tmp_path):
        unet().save_pretrained(tmp_path, max_shard_size="100KB")
        first, *others = sorted(tmp_path.glob("*-of-*"))
        kept = first.read_bytes()
        first.unlink()
        with pytest.raises(FileNotFoundError, match=rf"lacks 1 of {1 + len(others)} shards: {first.name}"):
            interop.read_networks(tmp_path)
        first.write_bytes(others[0].read_bytes())
        with pytest.raises(ValueError, match="and its shards name other tensors: "):
            interop.read_networks(tmp_path)
        first.write_bytes(kept)
        (index,) = tmp_path.glob("*.index.json")
        mapped = json.loads(index.read_text())
        index.write_text(json.dumps(mapped | {"weight_map": dict.fromkeys(mapped["weight_map"], "../elsewhere.safetensors")}))
        with pytest.raises(ValueError, match=r"names '\.\./elsewhere\.safetensors', which is no file beside it"):
            interop.read_networks(tmp_path)
        index.write_text("{}")
        with pytest.raises(ValueError, match="is no index of shards, or damaged"):
            interop.read_networks(tmp_path)

    def test_long_folders_are_cut(self, tmp_path):
        for number in range(15):
            (tmp_path / f"{number:02}.txt").touch()
        assert folders.contents(tmp_path).endswith("11.txt, 3 more")
