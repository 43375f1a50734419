"""Packed weights follow those of the module, in whatever way these change."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accelerated_models import close, needs_packing, outputs, unet
from multibeta.acceleration import accelerate, restore


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
    actual = outputs(model, dtype)
    close(actual, outputs(restore(model), dtype), scale=2)


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
