"""What is saved is read back equal, or refused with a reason before anything is written."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import multibeta
from multibeta import interop, saving
from multibeta.baselines import VAE
from multibeta.diffusion_vae import CapacityVAE, ConditionalDiffusion, ConditionalDiffusionConfig
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig
from multibeta.networks import AutoencoderConfig, BlockAutoencoderConfig, UNet
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusion
from multibeta.pipelines import BaselineVAE, DenoisingMultiBetaVAE, DiffusionVAE, load_pretrained

NETWORK = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "num_groups": 4}
SHAPE = NETWORK | {"resolution": 16, "mid_attention": False, "embedding_channels": 16}


def denoiser():
    unet = NETWORK | {"latent_resolution": 8, "attention_resolutions": (4,), "head_channels": 8}
    vae, diffusion = VAEConfig(**SHAPE, num_steps=20), DiffusionConfig(**unet, num_steps=20)
    return DenoisingMultiBetaVAE(MultiBetaVAE(vae), NonlinearDiffusion(diffusion))


def baseline():
    return BaselineVAE(VAE(AutoencoderConfig(**SHAPE)))


def refiner():
    blocks = {"encoder_blocks": "16d2,16t8,8d8,8t1,1x1", "decoder_blocks": "1u8,1t8,8u2,8t16,16x1", "channels": "16:8,8:8,1:6"}
    unet = NETWORK | {"attention_resolutions": (), "num_heads": 2, "num_steps": 20}
    vae, diffusion = BlockAutoencoderConfig(resolution=16, **blocks), ConditionalDiffusionConfig(resolution=16, **unet)
    return DiffusionVAE(CapacityVAE(vae), ConditionalDiffusion(diffusion))


MODELS = {"DenoisingMultiBetaVAE": denoiser, "BaselineVAE": baseline, "DiffusionVAE": refiner}


def states(model):
    """All tensors of a model, under the names of plain modules."""
    parts = {name: saving.unwrapped(getattr(model, name)).state_dict() for name in model.parts}
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)  # dtypes too


def replaced(path, make):
    """A change of a model that puts `make` of a module in its place."""

    def change(model):
        parent, _, name = path.rpartition(".")
        for step in parent.split(".") if parent else ():
            model = model[int(step)] if step.isdigit() else getattr(model, step)
        if name.isdigit():
            model[int(name)] = make(model[int(name)])
        else:
            setattr(model, name, make(getattr(model, name)))

    return change


def wrap_at_all_depths(model):
    unet = model.diffusion.unet
    unet.middle[0] = torch.compile(unet.middle[0])
    model.diffusion.unet = nn.DataParallel(torch.compile(unet))
    model.diffusion = torch.compile(model.diffusion)


WRAPPED = {
    "compiled part": replaced("vae", torch.compile),
    "compiled network": replaced("vae.encoder", torch.compile),
    "compiled U-Net": replaced("diffusion.unet", torch.compile),
    "compiled block": replaced("vae.decoder.blocks.0", torch.compile),
    "compiled in place": lambda model: model.vae.compile(),
    "compiled method": lambda model: setattr(model.vae, "decode", torch.compile(model.vae.decode)),
    "parallel part": replaced("vae", nn.DataParallel),
    "parallel network": replaced("diffusion.unet", nn.DataParallel),
    "averaged": replaced("vae", AveragedModel),
    "wrapped at all depths": wrap_at_all_depths,
    "accelerated": lambda model: multibeta.accelerate(model.diffusion),
}


@pytest.mark.parametrize("change", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_are_left_out(change, tmp_path):
    model = denoiser()
    expected = copy.deepcopy(states(model))
    change(model)
    before = [type(module) for part in model.parts for module in getattr(model, part).modules()]
    model.save_pretrained(tmp_path / "model")
    same(states(load_pretrained(tmp_path / "model")), expected)
    assert [type(module) for part in model.parts for module in getattr(model, part).modules()] == before
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| `vae` | `MultiBetaVAE` |" in card and "OptimizedModule" not in card


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_class_is_saved_compiled(make, tmp_path):
    model = make()
    expected = copy.deepcopy(states(model))
    for name in model.parts:
        setattr(model, name, torch.compile(getattr(model, name)))
    model.save_pretrained(tmp_path / "model")
    same(states(load_pretrained(tmp_path / "model")), expected)


class Louder(MultiBetaVAE):
    def decode(self, latents, beta=0.0):
        return 2 * super().decode(latents, beta)


class Described(MultiBetaVAE):
    def describe(self):
        return "mine"


class Adapter(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.lora_down = base_layer, nn.Conv2d(3, 2, 1)


def share_weights(model):
    blocks = model.vae.encoder.blocks
    blocks[0].conv2.weight = blocks[0].conv1.weight


def quantise(model):
    model.vae = torch.ao.quantization.quantize_dynamic(model.vae, {nn.Linear}, torch.qint8)


class Packed(torch.Tensor):
    """What torchao puts in a weight's place: its shape and its dtype, other contents."""


REFUSED = {
    "parametrised": (lambda model: parametrizations.weight_norm(model.vae.encoder.conv_in), "remove_parametrizations"),
    "weight_norm": (lambda model: nn.utils.weight_norm(model.vae.encoder.conv_in), r"remove_weight_norm\(layer\)"),
    "spectral_norm": (lambda model: nn.utils.spectral_norm(model.vae.encoder.conv_in), r"remove_spectral_norm\(layer\)"),
    "pruned": (lambda model: prune.l1_unstructured(model.vae.encoder.conv_in, "weight", 0.5), r"prune\.remove\(layer, name\)"),
    "quantised": (quantise, "quantised layers: save the model before"),
    "quantised tensors": (
        lambda model: setattr(model.vae.encoder.conv_in, "weight", nn.Parameter(torch.zeros(8, 3, 3, 3).as_subclass(Packed))),
        r"encoder\.conv_in\.weight is a Packed, which no file of tensors gives back",
    ),
    "adapted": (replaced("vae.encoder.conv_in", Adapter), "adapters: merge them into the layers first"),
    "another layer": (replaced("diffusion.unet.conv_out", nn.Identity), r"diffusion cannot .* 2 missing: unet\.conv_out\.weight"),
    "another activation": (
        replaced("vae.encoder.norm_out", lambda norm: nn.GroupNorm(4, norm.num_channels)),
        r"encoder\.norm_out is a GroupNorm, there it is a GroupNormAct",
    ),
    "more layers": (lambda model: model.vae.add_module("head", nn.Linear(2, 2)), r"2 unexpected: head\.weight, head\.bias"),
    "another shape": (
        lambda model: setattr(model.vae.encoder.conv_in, "weight", nn.Parameter(torch.zeros(9, 3, 3, 3))),
        r"1 of another shape: encoder\.conv_in\.weight \(9, 3, 3, 3\) instead of \(8, 3, 3, 3\)",
    ),
    "integers": (
        lambda model: setattr(
            model.vae.encoder.conv_in, "weight", nn.Parameter(torch.zeros(8, 3, 3, 3, dtype=torch.int8), requires_grad=False)
        ),
        r"encoder\.conv_in\.weight torch\.int8 instead of torch\.float32",
    ),
    "shared": (share_weights, "share memory: save one and tie it again"),
    "without values": (lambda model: model.vae.to("meta"), "is on the meta device, without values: load them first"),
    "another function": (lambda model: setattr(model.vae, "__class__", Louder), "it is a Louder with decode of its own"),
    "another module": (
        lambda model: setattr(model, "vae", nn.Linear(2, 2)),
        "it is a Linear, and would be read as a MultiBetaVAE",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_come_back_is_refused_and_the_old_model_stays(change, reason, tmp_path):
    model = denoiser()
    model.save_pretrained(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    change(model)
    with pytest.raises(ValueError, match=reason):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=reason):
        model.save_pretrained(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_changes_no_function_is_saved(tmp_path):
    model = denoiser()
    model.vae.__class__ = Described
    prune.l1_unstructured(model.vae.encoder.conv_in, "weight", 0.5)
    prune.remove(model.vae.encoder.conv_in, "weight")
    model.save_pretrained(tmp_path / "model")
    same(states(load_pretrained(tmp_path / "model")), states(model))


def test_values_that_are_not_finite_are_saved_with_a_warning(tmp_path, caplog):
    model = denoiser()
    model.vae.encoder.conv_in.weight.data[0] = float("nan")
    with caplog.at_level(logging.WARNING, "multibeta"):
        model.save_pretrained(tmp_path / "model")
    assert caplog.messages[-1] == "vae is saved with values that are not finite, in encoder.conv_in.weight"
    same(states(load_pretrained(tmp_path / "model")), states(model))


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_a_model_comes_back_in_the_dtype_it_had(self, make, dtype, tmp_path):
        model = make().to(dtype=dtype)
        model.save_pretrained(tmp_path / "model")
        for loaded in (load_pretrained(tmp_path / "model"), type(model).from_pretrained(tmp_path / "model")):
            assert loaded.dtype == dtype
            same(states(loaded), states(model))
        other = load_pretrained(tmp_path / "model", dtype=torch.float32)
        assert {tensor.dtype for tensor in states(other).values() if tensor.is_floating_point()} == {torch.float32}
        assert f" | {str(dtype).removeprefix('torch.')} |" in (tmp_path / "model" / "README.md").read_text()

    def test_every_network_keeps_its_own(self, tmp_path):
        model = denoiser()
        model.vae.encoder.to(torch.bfloat16)
        model.vae.decoder.to(torch.float16)
        model.diffusion.unet.to(torch.float16).conv_out.float()
        model.save_pretrained(tmp_path / "model")
        same(states(load_pretrained(tmp_path / "model")), states(model))
        card = (tmp_path / "model" / "README.md").read_text()
        assert " | bfloat16, float16 |" in card and " | float16, float32 |" in card

    def test_eight_bits(self, tmp_path):
        model = denoiser()
        model.vae.decoder.to(torch.float8_e4m3fn)
        model.save_pretrained(tmp_path / "model")
        same(
            {n: t.float() for n, t in states(load_pretrained(tmp_path / "model")).items()},
            {n: t.float() for n, t in states(model).items()},
        )

    def test_curves_and_tables_are_float32_however_they_were_saved(self, tmp_path):
        model = denoiser()
        model.vae.to(torch.bfloat16)
        model.diffusion.to(torch.bfloat16)
        model.save_pretrained(tmp_path / "model")
        loaded = load_pretrained(tmp_path / "model")
        assert loaded.dtype == loaded.diffusion.unet.conv_out.weight.dtype == torch.bfloat16
        assert loaded.diffusion.sigmas.dtype == loaded.vae.sigma.raw_increments.dtype == torch.float32
        assert torch.equal(loaded.vae.sigma.raw_increments, model.vae.sigma.raw_increments.float())

    def test_a_bfloat16_model_does_what_it_did(self, tmp_path):
        model = denoiser().to(dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "model")
        loaded = load_pretrained(tmp_path / "model")
        with multibeta.backend("reference"):  # two engines may measure, and so round, differently
            assert torch.equal(loaded.generate(2, steps=3), model.generate(2, steps=3))

    def test_networks_of_others_are_kept_in_theirs(self, tmp_path):
        shape = NETWORK | {"in_channels": 3, "out_channels": 3, "resolution": 8, "attention_resolutions": (), "num_heads": 1}
        unet = UNet(**shape).to(torch.bfloat16)
        interop.write_networks(interop.Networks({"unet": torch.compile(unet)}, {"unet": shape}), "multibeta", tmp_path / "ours")
        same(interop.load_networks(tmp_path / "ours")["unet"].state_dict(), unet.state_dict())
