"""Layers of torch on packed weights: which calls take them, and which the forward the layer came with."""

import torch
from torch import nn
from torch.autograd import forward_ad

from accelerated_models import close, needs_packing
from multibeta.acceleration import accelerate
from multibeta.acceleration.base import listening


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
def test_layers_without_outputs():
    layer, x = nn.Linear(4, 1, bias=False), torch.randn(3, 4)
    layer.weight = nn.Parameter(torch.empty(0, 4))
    assert accelerate(layer)(x).shape == (3, 0)


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
