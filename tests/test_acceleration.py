"""Accelerated models compute what they computed: side by side with diffusers, and with blocks shaped like latent-diffusion's."""

import copy
import io
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao import quantization
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune

import multibeta
from multibeta import acceleration, inference, ops
from multibeta.acceleration import TOLERANCES, accelerate, blocks, check, report, restore
from multibeta.acceleration.notes import listening

DTYPES = [torch.float32, torch.bfloat16]
PACKS = inference.packs(torch.device("cpu"))
needs_packing = pytest.mark.skipif(not PACKS, reason="oneDNN does not pack weights here")


def unet(**changes):
    diffusers = pytest.importorskip("diffusers")
    options = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DModel(**options | changes).eval()


def conditional_unet():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def autoencoder():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKL(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


MODELS = {"unet": unet, "conditional unet": conditional_unet, "autoencoder": autoencoder}


def outputs(model, dtype=torch.float32, batch=2):
    inputs = acceleration.random_inputs(model, batch=batch)
    return model(**{name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}).sample


def close(found, expected, scale=1.0):
    """Within the tolerance of one block, or `scale` times it for a chain of them."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    found, expected = found.detach(), expected.detach()
    largest = expected.float().abs().max()
    assert float((found.float() - expected.float()).abs().max() / largest) <= scale * TOLERANCES[expected.dtype]


def gradients(model, forward):
    model.zero_grad()
    y = forward(model)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class LoRA(nn.Module):
    """What peft puts in a layer's place: the layer, and a low-rank product beside it."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        if isinstance(base_layer, nn.Conv2d):
            self.down = nn.Conv2d(base_layer.in_channels, rank, 3, padding=1, bias=False)
            self.up = nn.Conv2d(rank, base_layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base_layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def put_lora(model):
    torch.manual_seed(3)
    wrapped = {name: part for name, part in model.named_modules() if name.endswith(("conv1", "conv2", "to_q", "to_out.0"))}
    for name, part in wrapped.items():
        model.set_submodule(name, LoRA(part))
    assert wrapped
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models_compute_the_same(name, dtype):
    model = MODELS[name]().to(dtype)
    expected, keys = outputs(model, dtype), list(model.state_dict())
    parameters = dict(model.named_parameters())
    classes = [type(part) for part in model.modules()]
    assert accelerate(model) is model
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert any(type(part) is not cls for part, cls in zip(model.modules(), classes, strict=True))
    assert all(isinstance(part, cls) for part, cls in zip(model.modules(), classes, strict=True))
    close(outputs(model, dtype), expected, scale=2)
    assert restore(model) is model
    assert [type(part) for part in model.modules()] == classes
    assert torch.equal(outputs(model, dtype), expected)


@pytest.mark.parametrize("name", MODELS)
def test_all_gradients_are_the_same(name):
    model = MODELS[name]().train()
    expected = gradients(model, outputs)
    found = gradients(accelerate(model), outputs)
    assert set(found) == set(expected) == {key for key, _ in model.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in found.items():  # keys' biases have gradient zero but for rounding
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-5 * float(largest), msg=key)


def test_gradients_in_bfloat16():
    model = unet().to(torch.bfloat16)
    forward = lambda model: outputs(model, torch.bfloat16)  # noqa: E731
    expected = gradients(copy.deepcopy(model).float(), outputs)
    theirs, ours = gradients(model, forward), gradients(accelerate(model), forward)
    error, error_before = (
        sum(float((found[key].float() - expected[key]).norm() ** 2) for key in expected) for found in (ours, theirs)
    )
    assert error < 1.5 * error_before


@pytest.mark.parametrize(
    "changes",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"act_fn": "mish"},  # none of ours: normalised by the op, activated by its own
        {"downsample_type": "resnet", "upsample_type": "resnet"},
    ],
    ids=lambda changes: next(iter(changes)),
)
@torch.no_grad()
def test_variants_of_the_block_compute_the_same(changes):
    model = unet(**changes)
    expected = outputs(model)
    close(outputs(accelerate(model)), expected)


@pytest.mark.parametrize(
    "changes", [{"up": True}, {"down": True}, {"up": True, "kernel": "fir"}, {"down": True, "kernel": "sde_vp"}]
)
@torch.no_grad()
def test_blocks_that_resample_compute_the_same(changes):
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = resnet.ResnetBlock2D(
        in_channels=8, out_channels=12, temb_channels=6, groups=4, output_scale_factor=1.5, **changes
    ).eval()
    x, temb = torch.randn(2, 8, 6, 6), torch.randn(2, 6)
    expected = block(x, temb)
    close(accelerate(block)(x, temb), expected)


@torch.no_grad()
def test_sizes_that_do_not_halve_are_forced():
    model = conditional_unet()
    inputs = {"sample": torch.randn(1, 4, 9, 7), "timestep": 3, "encoder_hidden_states": torch.randn(1, 5, 12)}
    expected = model(**inputs).sample
    close(accelerate(model)(**inputs).sample, expected)


@torch.no_grad()
def test_masks_and_conditions_take_the_original_attention():
    model = conditional_unet()
    mask = torch.tensor([[1, 1, 0, 0, 1]])
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.randn(1, 5, 12)}
    expected = model(**inputs, encoder_attention_mask=mask).sample
    close(accelerate(model)(**inputs, encoder_attention_mask=mask).sample, expected)


@torch.no_grad()
def test_copies_pickles_and_state_dicts(tmp_path):
    model = accelerate(unet())
    expected = outputs(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert [type(part) for part in other.modules()] == [type(part) for part in model.modules()]
        close(outputs(other), expected)  # each measures for itself how to upsample
    fresh = unet()
    fresh.load_state_dict(model.state_dict())
    close(outputs(fresh), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(fresh).from_pretrained(tmp_path, low_cpu_mem_usage=False)), outputs(fresh))
    assert repr(model) == repr(fresh)


@pytest.mark.parametrize("change", ["in place", "data", "assigned", "load_state_dict", "dtype"])
@torch.no_grad()
def test_weights_are_followed(change):
    model = accelerate(unet())
    outputs(model)  # packs
    weights = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in model.state_dict().items()}
    if change == "load_state_dict":
        model.load_state_dict(weights)
    elif change == "dtype":
        model.to(torch.bfloat16)
    else:
        for name, parameter in list(model.named_parameters()):
            if change == "in place":
                parameter.copy_(weights[name])
            elif change == "data":  # leaves the version counter where it is
                parameter.data.copy_(weights[name])
            else:
                part, _, key = name.rpartition(".")
                setattr(model.get_submodule(part), key, nn.Parameter(weights[name]))
    dtype = torch.bfloat16 if change == "dtype" else torch.float32
    found = outputs(model, dtype)
    close(found, outputs(restore(model), dtype), scale=2)


@torch.no_grad()
def test_autocast_keeps_its_meaning():
    model = unet()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = outputs(model)
        found = outputs(accelerate(model))
    assert found.dtype == expected.dtype
    close(found.bfloat16(), expected.bfloat16(), scale=2)


@torch.no_grad()
def test_lora_before_and_after():
    model = put_lora(unet())
    expected = outputs(model)
    close(outputs(accelerate(model)), expected)
    assert any(isinstance(part, LoRA) for part in model.modules())

    model = accelerate(unet())
    outputs(model)
    put_lora(model)
    found = outputs(model)
    assert type(model.get_submodule("mid_block.resnets.0.conv1.down")) is nn.Conv2d
    close(outputs(accelerate(model)), found)  # a second call takes the new layers in
    assert type(model.get_submodule("mid_block.resnets.0.conv1.down")) is not nn.Conv2d
    close(outputs(restore(model)), found)


def test_lora_trains():
    model = put_lora(unet().requires_grad_(False))
    expected = gradients(model, outputs)
    found = gradients(accelerate(model), outputs)
    assert set(found) == set(expected) and all(".down." in key or ".up." in key for key in found)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_hooks_fire_where_they_fired():
    model, expected = unet(), {}
    hooked = {name: part for name, part in model.named_modules() if "mid_block" in name and not list(part.children())}
    hooked |= {name: part for name, part in model.named_modules() if name.endswith(("resnets.0", "attentions.0"))}
    seen = {}
    for name, part in hooked.items():
        part.register_forward_hook(lambda module, args, output, name=name: seen.__setitem__(name, output))
    outputs(model)
    expected = dict(seen)
    seen.clear()
    outputs(accelerate(model))
    assert set(seen) == set(expected)
    for name, output in seen.items():
        close(output, expected[name], scale=2)


@torch.no_grad()
def test_twice_is_once():
    model = accelerate(unet())
    classes = [type(part) for part in model.modules()]
    assert [type(part) for part in accelerate(model).modules()] == classes
    names = {row.name for row in report(model) if row.accelerated}
    assert {"conv_in", "mid_block.resnets.0", "mid_block.attentions.0", "up_blocks.0.upsamplers.0"} <= names


@torch.no_grad()
def test_the_reference_backend_is_the_original():
    model = unet()
    expected = outputs(model)
    accelerate(model)
    with multibeta.backend("reference"):
        assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_blocks_have_no_breaks(dtype):
    block = unet().to(dtype).mid_block
    x, temb = torch.randn(2, 32, 4, 4, dtype=dtype), torch.randn(2, 64, dtype=dtype)
    for part, arguments in ((block.resnets[0], (x, temb)), (block.attentions[0], (x,))):
        expected = part(*arguments)
        compiled = torch.compile(accelerate(part), backend="aot_eager", fullgraph=True)
        close(compiled(*arguments), expected)
        with torch.no_grad():
            close(compiled(*arguments), expected)
    torch._dynamo.reset()


def test_weights_on_meta_are_refused():
    with torch.device("meta"):
        model = unet()
    with pytest.raises(ValueError, match=r"conv_in\.weight is on the meta device: load them first"):
        accelerate(model)


def test_pipelines_are_refused():
    with pytest.raises(TypeError, match=r"takes an nn\.Module, got a str; of a pipeline, its unet and its vae"):
        accelerate("pipeline")


class TestLeftAlone:
    def reason(self, model, name):
        accelerate(model)
        (row,) = (row for row in report(model) if row.name == name)
        assert not row.accelerated
        return row.reason

    def test_processors_of_others(self):
        model = unet()

        class Mine:
            def __call__(self, attn, hidden_states, **kwargs):
                return hidden_states

        model.mid_block.attentions[0].set_processor(Mine())
        assert self.reason(model, "mid_block.attentions.0") == "its processor is Mine"

    @torch.no_grad()
    def test_processors_that_come_later(self):
        model = accelerate(unet())

        class Mine:
            def __call__(self, attn, hidden_states, **kwargs):
                return 2 * hidden_states

        attention, x = model.mid_block.attentions[0], torch.randn(1, 32, 4, 4)
        attention.set_processor(Mine())
        assert torch.equal(attention(x), 2 * x)

    def test_subclasses(self):
        class Mine(nn.Conv2d):
            def forward(self, x):
                return 2 * super().forward(x)

        model = nn.Sequential(Mine(2, 2, 1))
        assert self.reason(model, "0") == "a subclass of Conv2d, whose forward may differ"

    def test_blocks_that_are_not_known(self):
        class Mine(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(1))

        assert self.reason(nn.Sequential(Mine(), nn.Linear(2, 2)), "0") == "not a known block"

    def test_quantised_weights(self):
        class Packed(torch.Tensor):
            pass

        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
        model[1].weight = nn.Parameter(torch.ones(2, 2).as_subclass(Packed))
        assert self.reason(model, "0") == "its weight is torch.int8: quantised"
        assert self.reason(model, "1") == "its weight is a Packed"

    def test_norms_without_parameters(self):
        model = nn.Sequential(nn.GroupNorm(2, 4, affine=False), nn.GroupNorm(2, 4))
        model[1].bias = None
        assert {row.reason for row in report(accelerate(model))} <= {"it has no weight or no bias"}

    def test_forwards_put_on_the_object(self):
        model = nn.Sequential(nn.Linear(2, 2))
        model[0].forward = lambda x: x
        assert self.reason(model, "0") == "its forward was replaced on the object"

    def test_paddings_of_other_kinds(self):
        model = nn.Sequential(nn.Conv2d(2, 2, 3, padding="same"), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
        assert "'same'" in self.reason(model, "0") and "circular" in self.reason(model, "1")


QUANTISING = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def quantise(model):
    return quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


class Packed(torch.Tensor):
    def new_empty(self, *size, **options):
        return super().new_empty(*size, **options).as_subclass(Packed)


def quantise_by_class(model):
    """As quantisers of others do: layers that are linear, replaced or given weights of another kind."""

    class Rounded(nn.Linear):
        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features)
            self.load_state_dict(linear.state_dict())

        def forward(self, x):
            return F.linear(x, self.weight.round(decimals=2), self.bias)

    for name, part in list(model.named_modules()):
        if isinstance(part, nn.Linear) and "to_q" in name:
            part.weight = nn.Parameter(part.weight.detach().round(decimals=2).as_subclass(Packed))
        elif isinstance(part, nn.Linear):
            model.set_submodule(name, Rounded(part))
    return model


def halve_by_table(model):
    for part in model.modules():
        if type(part) in {nn.Linear: 0, nn.Conv2d: 1}:
            part.weight.data.mul_(0.5)
    return model


def parametrise(model):
    for name in ("conv_in", "mid_block.resnets.0.conv2", "mid_block.attentions.0.to_q"):
        layer = parametrizations.weight_norm(model.get_submodule(name))
        layer.parametrizations.weight.original0.data.mul_(2)
    return model


def parametrise_and_back(model):
    for part in parametrise(model).modules():
        if parametrize.is_parametrized(part):
            parametrize.remove_parametrizations(part, "weight")
    return model


def normalise(model):
    for name in ("conv_in", "mid_block.resnets.0.conv2", "mid_block.attentions.0.to_q"):
        nn.utils.weight_norm(model.get_submodule(name)).weight_g.data.mul_(2)
    return model


def pruned(model):
    for name in ("conv_in", "mid_block.resnets.0.conv2", "mid_block.attentions.0.to_q"):
        prune.l1_unstructured(model.get_submodule(name), "weight", 0.5)
    prune.remove(model.conv_in, "weight")
    return model


CHANGES = [quantise, quantise_by_class, halve_by_table, put_lora, parametrise, parametrise_and_back, normalise, pruned]


@QUANTISING
class TestToolsOfOthers:
    """What chooses layers by their class finds them, and results are right at once, after copies, and after `restore`."""

    @pytest.mark.parametrize("change", CHANGES)
    @torch.no_grad()
    def test_they_do_what_they_did(self, change):
        model = unet()
        other = accelerate(copy.deepcopy(model))
        before = outputs(other)  # packs
        model, other = change(model), change(other)
        expected = outputs(model)
        assert (expected - before).abs().max() > 1e-3 * before.abs().max()
        assert [type(part).__name__ for part in other.modules()] == [type(part).__name__ for part in model.modules()]
        for found in (other, copy.deepcopy(other), restore(copy.deepcopy(other)), accelerate(copy.deepcopy(other))):
            close(outputs(found), expected, scale=2)
        assert torch.equal(outputs(restore(other)), expected)
        assert not any(isinstance(part, acceleration.classes.Accelerated) for part in other.modules())
        close(outputs(accelerate(other)), expected, scale=2)

    @torch.no_grad()
    def test_what_was_quantised_is_in_the_report(self):
        rows = {row.name: row for row in report(quantise(accelerate(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 1)))))}
        assert rows["0"].reason == "its weight is packed by torch.ao: quantised" and rows["1"].accelerated

    @torch.no_grad()
    def test_fusion(self):
        layers, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), torch.randn(2, 3, 6, 6)
        layers[1].running_mean.fill_(0.3)
        fused = quantization.fuse_modules(accelerate(copy.deepcopy(layers)), [["0", "1", "2"]])
        assert [type(part).__name__ for part in fused] == ["ConvReLU2d", "Identity", "Identity"]
        close(fused(x), layers(x))

    @torch.no_grad()
    def test_static_quantisation_of_linear_layers(self):
        layer, x = nn.Linear(8, 8), torch.randn(16, 8)
        model = nn.Sequential(quantization.QuantStub(), accelerate(copy.deepcopy(layer)), quantization.DeQuantStub()).eval()
        model.qconfig = quantization.get_default_qconfig("x86")
        quantization.prepare(model, inplace=True)(x)
        quantization.convert(model, inplace=True)
        assert type(model[1]).__module__.startswith("torch.ao.nn.quantized")
        assert (model(x) - layer(x)).abs().max() < 0.1 * layer(x).abs().max()

    def test_classes_are_equal_to_those_they_stand_for(self):
        linear, conv = type(accelerate(nn.Linear(2, 2))), type(accelerate(nn.Conv2d(2, 2, 1)))
        assert linear == nn.Linear and nn.Linear == linear and linear is not nn.Linear
        assert linear in {nn.Linear} and {linear: 1}[nn.Linear] and hash(linear) == hash(nn.Linear)
        assert len({linear, conv, nn.Linear, nn.Conv2d, nn.Module, *linear.__bases__, *conv.__bases__}) == 5

    def test_scripts_are_of_the_original(self):
        layers, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Linear(4, 2)), torch.randn(1, 3, 6, 6)
        assert torch.equal(torch.jit.script(accelerate(layers))(x), restore(layers)(x))

    @torch.no_grad()
    def test_traces_of_quantised_models(self):
        block = quantise(accelerate(unet())).mid_block.resnets[0]
        inputs = torch.randn(2, 32, 4, 4), torch.randn(2, 64)
        close(torch.jit.trace(block, inputs)(*inputs), block(*inputs), scale=2)


class TestCheck:
    def test_rows_say_what_serves_each_block(self):
        model = unet()
        rows = {row.name: row for row in check(model, torch.randn(1, 3, 8, 8), 5, repetitions=1)}
        row = rows["mid_block.resnets.0"]
        assert row.accelerated and row.type == "ResnetBlock2D" and row.error <= TOLERANCES[torch.float32]
        assert row.before_ms > 0 and row.after_ms > 0 and "group_norm_act: " in row.path
        assert "attention: " in rows["mid_block.attentions.0"].path
        assert all(row.accelerated for row in rows.values())
        assert {row.name for row in report(model) if row.accelerated} == set(rows)
        text = acceleration.table(list(rows.values()))
        assert "mid_block.resnets.0 ResnetBlock2D: " in text and text.splitlines()[-1].startswith(f"{len(rows)} blocks: ")

    def test_a_block_that_fails_is_put_back_and_named(self, monkeypatch):
        model = unet()
        sound = blocks.attend
        monkeypatch.setattr(blocks, "attend", lambda *qkv: 1.5 * sound(*qkv))
        x = torch.randn(1, 3, 8, 8)
        expected = model(x, 5).sample
        rows = check(model, x, 5, repetitions=1)
        failed = {row.name: row for row in rows if not row.accelerated}
        assert set(failed) == {name for name, part in model.named_modules() if type(part).__name__ == "Attention"}
        assert all("differs from the original by" in row.reason for row in failed.values())
        attention = model.mid_block.attentions[0]
        assert type(attention.to_q) is nn.Linear and type(model.conv_in) is not nn.Conv2d
        close(model(x, 5).sample, expected)
        assert "left as it is, differs" in acceleration.table(rows)

    def test_a_block_that_raises_is_put_back(self, monkeypatch):
        def broken(*arguments):
            raise RuntimeError("no such kernel\nat all")

        monkeypatch.setattr(blocks, "attend", broken)
        rows = check(unet(), torch.randn(1, 3, 8, 8), 5, repetitions=1)
        assert {row.reason for row in rows if not row.accelerated} == {"no such kernel"}

    def test_hooks_of_others_count_for_neither_form(self):
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].register_forward_hook(lambda module, args, output: 2 * output)
        (row,) = check(model, torch.randn(2, 4), repetitions=1)
        assert row.accelerated and row.error <= TOLERANCES[torch.float32]

    def test_no_repetitions_are_refused(self):
        with pytest.raises(ValueError, match="repetitions must be at least 1, got 0"):
            check(nn.Linear(2, 2), torch.randn(1, 2), repetitions=0)

    def test_modes_stay_and_blocks_not_met_are_named(self):
        model = autoencoder().train()
        model.decoder.eval()
        rows = check(model, torch.randn(1, 3, 16, 16), repetitions=1)
        assert model.encoder.training and not model.decoder.training
        assert not [row.reason for row in rows if not row.accelerated]
        rows = check(
            nn.ModuleDict({"a": nn.Linear(2, 2)}).apply(lambda m: setattr(m, "eval", lambda: lambda: None)), repetitions=1
        )
        assert [row.path for row in rows] == ["not run by these inputs"]


# Stand-ins with the structure that the blocks of latent-diffusion document


class SiLU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Upsample(nn.Module):
    def __init__(self, channels, use_conv=True):
        super().__init__()
        self.use_conv, self.dims = use_conv, 2
        if use_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        doubled = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(doubled) if self.use_conv else doubled


class ResBlock(nn.Module):
    def __init__(self, channels, out_channels, embedding, scale_shift=False, up=False):
        super().__init__()
        self.updown, self.use_scale_shift_norm = up, scale_shift
        self.in_layers = nn.Sequential(GroupNorm32(4, channels), SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.h_upd, self.x_upd = (Upsample(channels, use_conv=False) if up else nn.Identity() for _ in range(2))
        self.emb_layers = nn.Sequential(SiLU(), nn.Linear(embedding, (1 + scale_shift) * out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(4, out_channels), SiLU(), nn.Dropout(0.1), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        return self._forward(x, emb)

    def _forward(self, x, emb):
        h = self.in_layers[2](self.h_upd(self.in_layers[:2](x)))
        shift = self.emb_layers(emb)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = shift.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + shift)
        return self.skip_connection(self.x_upd(x)) + h


class QKVAttention(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def parts(self, qkv):
        return (part.unflatten(1, (self.heads, -1)) for part in qkv.chunk(3, dim=1))

    def forward(self, qkv):
        query, key, value = self.parts(qkv)
        scores = torch.einsum("nhct,nhcs->nhts", query, key) / math.sqrt(query.shape[2])
        return torch.einsum("nhts,nhcs->nhct", scores.float().softmax(-1).to(value.dtype), value).flatten(1, 2)


class QKVAttentionLegacy(QKVAttention):
    def parts(self, qkv):
        return qkv.unflatten(1, (self.heads, 3, -1)).unbind(2)


class AttentionBlock(nn.Module):
    def __init__(self, channels, heads, attention):
        super().__init__()
        self.num_heads = heads
        self.norm, self.attention = GroupNorm32(4, channels), attention(heads)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        return self._forward(x)

    def _forward(self, x):
        tokens = x.flatten(2)
        return (tokens + self.proj_out(self.attention(self.qkv(self.norm(tokens))))).reshape(x.shape)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, temb_channels=0):
        super().__init__()
        self.in_channels, self.out_channels, self.use_conv_shortcut = in_channels, out_channels, False
        self.norm1, self.norm2 = nn.GroupNorm(4, in_channels, 1e-6), nn.GroupNorm(4, out_channels, 1e-6)
        self.conv1, self.conv2 = (nn.Conv2d(c, out_channels, 3, padding=1) for c in (in_channels, out_channels))
        self.dropout = nn.Dropout(0.0)
        if temb_channels:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (x if self.in_channels == self.out_channels else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        query, key, value = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(query.transpose(1, 2) @ key / math.sqrt(x.shape[1]), dim=2)
        return x + self.proj_out((value @ weights.transpose(1, 2)).reshape(x.shape))


LDM_BLOCKS = {
    "ResBlock": (lambda: ResBlock(8, 16, 12), True),
    "ResBlock, same width": (lambda: ResBlock(8, 8, 12), True),
    "ResBlock, scale and shift": (lambda: ResBlock(8, 16, 12, scale_shift=True), True),
    "ResBlock, up": (lambda: ResBlock(8, 16, 12, up=True), True),
    "AttentionBlock": (lambda: AttentionBlock(8, 2, QKVAttention), False),
    "AttentionBlock, legacy": (lambda: AttentionBlock(8, 2, QKVAttentionLegacy), False),
    "ResnetBlock": (lambda: ResnetBlock(8, 16, 12), True),
    "AttnBlock": (lambda: AttnBlock(8), False),
    "Upsample": (lambda: Upsample(8), False),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LDM_BLOCKS)
def test_blocks_of_latent_diffusion_compute_the_same(name, dtype):
    make, embedded = LDM_BLOCKS[name]
    block = make().eval()
    for part in block.modules():  # GroupNorm32 keeps float32
        if not isinstance(part, GroupNorm32):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    x = torch.randn(2, 8, 6, 5, dtype=dtype)
    arguments = (x, torch.randn(2, 12, dtype=dtype)) if embedded else (x,)
    before = gradients(block, lambda block: block(*arguments))
    with torch.no_grad():
        expected = block(*arguments)
        (row,) = check(block, *arguments, repetitions=1)
        assert row.accelerated and row.type == name.split(",")[0], row.reason
        close(block(*arguments), expected)
    if dtype == torch.float32:
        after = gradients(block, lambda block: block(*arguments))
        assert set(after) == set(before)
        for key, gradient in after.items():
            torch.testing.assert_close(gradient, before[key], rtol=1e-3, atol=1e-4, msg=key)


def test_classes_with_the_name_alone_are_left_alone():
    class ResBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

    block = ResBlock()
    rows = report(accelerate(block))
    assert rows[0].reason == "not the block of latent-diffusion: it has no in_layers"
    assert [row.name for row in rows if row.accelerated] == ["conv"]


# Layers of torch


@needs_packing
@torch.no_grad()
def test_weights_are_packed_where_no_gradient_is_wanted():
    conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)
    accelerate(conv)
    with listening() as notes:
        conv(x)
        assert notes == ["conv: packed"]
        with torch.enable_grad():
            assert conv(x).requires_grad
        conv.double()(x.double())
        conv.float()(x[0])
        conv(x[:0])
    assert notes[1:] == [
        "conv: gradients are wanted", "conv: weights are packed in float32 and bfloat16, got torch.float64",
        "conv: x is (4, 5, 5)", "conv: x is (0, 4, 5, 5)",
    ]  # fmt: skip


@torch.no_grad()
def test_biases_are_followed():
    layers = nn.Conv2d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1), nn.Linear(4, 4)
    for layer, x in zip(layers, (torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5), torch.randn(3, 4)), strict=True):
        accelerate(layer)(x)
        layer.bias.data.add_(1)
        close(layer(x), type(layer).original_class.forward(layer, x))
        layer.bias = None
        close(layer(x), type(layer).original_class.forward(layer, x))


@torch.no_grad()
def test_a_bias_may_come_later():
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(3, 4)
    accelerate(layer)(x)
    layer.bias = nn.Parameter(torch.ones(4))
    close(layer(x), F.linear(x, layer.weight, layer.bias))


@needs_packing
@pytest.mark.parametrize("shape", [(3, 64, 3, 3), (64, 3, 3, 3), (8, 5, 3, 3), (2, 2, 1, 1)])  # 27 weights apart: one tap alone
@torch.no_grad()
def test_writes_through_data_are_seen_at_every_tap(shape):
    size = shape[-1]
    conv, x = nn.Conv2d(shape[1], shape[0], size, padding=size // 2), torch.randn(1, shape[1], 4, 4)
    accelerate(conv)(x)
    for tap in range(size * size):
        conv.weight.data.flatten(2)[:, :, tap].add_(1)
        close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=size // 2))


@torch.no_grad()
def test_layers_without_outputs():
    layer, x = nn.Linear(4, 1, bias=False), torch.randn(3, 4)
    layer.weight = nn.Parameter(torch.empty(0, 4))
    assert accelerate(layer)(x).shape == (3, 0)


def test_inference_mode_and_training_take_turns():
    model = unet()
    expected = outputs(model).detach()
    accelerate(model)
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            close(outputs(model).clone(), expected)
    outputs(model).sum().backward()
    with torch.enable_grad():
        close(outputs(model.requires_grad_(False)), expected)


@needs_packing
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("folded", [True, False])
@torch.no_grad()
def test_both_forms_of_upsampling_agree(dtype, folded, monkeypatch):
    times = iter([1.0, 2.0] if folded else [2.0, 1.0])
    monkeypatch.setattr(ops, "latency_ms", lambda function, device, repetitions: next(times))
    block, x = Upsample(8).to(dtype), torch.randn(2, 8, 5, 6, dtype=dtype)
    expected = block(x)
    with listening() as notes:
        close(accelerate(block)(x), expected)
    assert notes[0].startswith("upsample: folded" if folded else "upsample: plain")
    block.conv.weight.data.mul_(2)  # followed by the folded weights as well
    block.conv.bias.data.add_(3)
    close(block(x), restore(block)(x))


def test_a_model_is_read_from_its_folder(tmp_path):
    unet().save_pretrained(tmp_path / "unet")
    model = acceleration.load(tmp_path / "unet", torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    with pytest.raises(ValueError, match="name one of its parts: unet"):
        acceleration.load(tmp_path)
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps({"_class_name": "Nonsense"}))
    with pytest.raises(ValueError, match="names the class 'Nonsense'"):
        acceleration.load(tmp_path / "unet")
    with pytest.raises(ValueError, match="no inputs are known for a Linear"):
        linear = nn.Linear(2, 2)
        linear.config = None
        acceleration.random_inputs(linear)


@needs_packing
@pytest.mark.parametrize("change", ["padding_mode", "dilation", "_conv_forward"])
@torch.no_grad()
def test_geometry_that_changes_after_a_call_is_followed(change):
    conv, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 6, 6)
    close(accelerate(conv)(x), conv.original_class.forward(conv, x))
    if change == "padding_mode":  # as for seamless textures
        conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    elif change == "dilation":
        conv.dilation = conv.padding = (2, 2)
    else:
        conv._conv_forward = lambda x, weight, bias: 7 * x
    close(conv(x), conv.original_class.forward(conv, x))


@needs_packing
def test_derivatives_of_every_kind_reach_the_original_forward():
    layers, x, direction = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Linear(6, 6)), *torch.randn(2, 2, 4, 6, 6)
    layers.requires_grad_(False)
    expected = layers(direction) - layers(0 * direction)  # it is affine
    with torch.no_grad():
        accelerate(layers)(x)
    close(torch.func.jvp(layers, (x,), (direction,))[1], expected)
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(layers(forward_ad.make_dual(x, direction))).tangent, expected)
    close(torch.func.vmap(layers)(x[None])[0], layers(x))
