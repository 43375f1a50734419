"""Accelerated models compute what they computed, side by side with diffusers, and what is not known is left alone."""

import copy

import pytest
import torch
from torch import nn

import multibeta
from accelerated_models import (
    DTYPES,
    MODELS,
    LoRA,
    close,
    gradients,
    outputs,
    put_lora,
    unet,
)
from multibeta.acceleration import accelerate, report, restore


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
    actual = gradients(accelerate(model), outputs)
    assert set(actual) == set(expected) == {key for key, _ in model.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in actual.items():  # keys' biases have gradient zero but for rounding
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-5 * float(largest), msg=key)


def test_gradients_in_bfloat16():
    model = unet().to(torch.bfloat16)
    forward = lambda model: outputs(model, torch.bfloat16)  # noqa: E731
    expected = gradients(copy.deepcopy(model).float(), outputs)
    theirs, ours = gradients(model, forward), gradients(accelerate(model), forward)
    error, error_before = (
        sum(float((actual[key].float() - expected[key]).norm() ** 2) for key in expected) for actual in (ours, theirs)
    )
    assert error < 1.5 * error_before


@torch.no_grad()
def test_autocast_keeps_its_meaning():
    model = unet()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = outputs(model)
        actual = outputs(accelerate(model))
    assert actual.dtype == expected.dtype
    close(actual.bfloat16(), expected.bfloat16(), scale=2)


@torch.no_grad()
def test_lora_before_and_after():
    model = put_lora(unet())
    expected = outputs(model)
    close(outputs(accelerate(model)), expected)
    assert any(isinstance(part, LoRA) for part in model.modules())

    model = accelerate(unet())
    outputs(model)
    put_lora(model)
    actual = outputs(model)
    assert type(model.get_submodule("mid_block.resnets.0.conv1.down")) is nn.Conv2d
    close(outputs(accelerate(model)), actual)  # a second call takes the new layers in
    assert type(model.get_submodule("mid_block.resnets.0.conv1.down")) is not nn.Conv2d
    close(outputs(restore(model)), actual)


def test_lora_trains():
    model = put_lora(unet().requires_grad_(False))
    expected = gradients(model, outputs)
    actual = gradients(accelerate(model), outputs)
    assert set(actual) == set(expected) and all(".down." in key or ".up." in key for key in actual)
    for key, gradient in actual.items():
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
