"""Networks from and to files: folders of diffusers, checkpoints of latent-diffusion, folders of our own; compiled ones too."""

import copy
import json
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from interop_networks import (
    BETA,
    LDM_SMALL,
    LDM_UNET,
    SMALL,
    SMALL_UNET,
    STEPS,
    autoencoder_kl,
    close,
    prefixed,
    random,
    same,
    without_bias,
)
from multibeta import checkpoints, interop
from multibeta.interop import diffusers_config, freeze, load_diffusers, to_diffusers, to_ldm
from multibeta.interop.files import write_weights
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig
from multibeta.networks import Decoder, Encoder, UNet
from multibeta.weights import read_weights


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


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
        actual = interop.model_networks(types.SimpleNamespace(vae=torch.compile(vae)), 0.5).modules
        for name, network in expected.items():
            same(actual[name].state_dict(), network.state_dict())

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


class TestFiles:
    def test_diffusers_folder_to_ours_and_back(self, diffusers, tmp_path):
        unet = random(diffusers.UNet2DModel.from_config(diffusers_config(UNet(**SMALL_UNET)) | {"sample_size": 8}))
        vae = autoencoder_kl(diffusers)
        without_bias(vae.post_quant_conv)
        unet.save_pretrained(tmp_path / "theirs" / "unet")
        vae.save_pretrained(tmp_path / "theirs" / "vae")

        actual = interop.read_networks(tmp_path / "theirs")
        interop.write_networks(actual, "multibeta", tmp_path / "ours")
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
            freeze(random(cls(**LDM_SMALL, latent_channels=channels)), 0.2) for cls, channels in ((Encoder, 8), (Decoder, 4))
        )
        file = tmp_path / "theirs.safetensors"
        networks = interop.Networks({"unet": unet, "encoder": encoder, "decoder": decoder})
        interop.write_networks(networks, "ldm", file)
        with pytest.raises(ValueError, match="do not show the heads"):
            interop.read_networks(file)
        actual = interop.read_networks(file, head_channels=16, mean_only=True)
        images, latent = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
        close(actual.modules["unet"](images, STEPS), unet(images, STEPS))
        close(actual.modules["encoder"](images, BETA), encoder(images, BETA).chunk(2, dim=1)[0])
        close(actual.modules["decoder"](latent, BETA), decoder(latent, BETA))
        assert actual.arguments["encoder"]["channel_multipliers"] == (1, 1) and actual.arguments["unet"]["resolution"] == 16
        with pytest.raises(ValueError, match="an AutoencoderKL encodes to mean and log variance, 8 channels"):
            interop.write_networks(actual, "diffusers", tmp_path / "out")
        assert interop.read_networks(file, parts=["vae"], latent="decoder").modules.keys() == {"encoder", "decoder"}

    @pytest.mark.parametrize("old", [False, True])
    def test_latent_diffusion_checkpoint_to_ours(self, old, tmp_path):
        unet = random(UNet(**LDM_UNET)).half()
        state = prefixed("model.diffusion_model.", to_ldm(unet))
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt", _use_new_zipfile_serialization=not old)
        actual = interop.read_networks(tmp_path / "model.ckpt", head_channels=16).modules["unet"]
        same(actual.state_dict(), unet.float().state_dict())
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
