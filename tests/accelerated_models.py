"""Small models of diffusers that the tests of acceleration share, what they compute, and how closely it must be the same."""

import pytest
import torch
from torch import nn

from multibeta import acceleration, inference
from multibeta.acceleration import TOLERANCES

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


def close(actual, expected, scale=1.0):
    """Within the tolerance of one block, or `scale` times it for a chain of them."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    actual, expected = actual.detach(), expected.detach()
    largest = expected.float().abs().max()
    assert float((actual.float() - expected.float()).abs().max() / largest) <= scale * TOLERANCES[expected.dtype]


def gradients(model, forward):
    model.zero_grad()
    y = forward(model)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class LoRA(nn.Module):
    """What peft puts in a layer's place: the layer, and a low-rank product next to it."""

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
