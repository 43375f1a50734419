"""An accelerated block keeps all but its class: copies, pickles, state dicts, and the tools of others that look at classes."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, parametrize, prune

from accelerated_models import (
    close,
    outputs,
    put_lora,
    unet,
)
from multibeta.acceleration import accelerate, base, report, restore


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
        for actual in (other, copy.deepcopy(other), restore(copy.deepcopy(other)), accelerate(copy.deepcopy(other))):
            close(outputs(actual), expected, scale=2)
        assert torch.equal(outputs(restore(other)), expected)
        assert not any(isinstance(part, base.Accelerated) for part in other.modules())
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
