"""A prepared network is the same function, to rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from multibeta import inference, ops
from multibeta.blocks import Conv2d, Upsample
from multibeta.networks import Decoder, ToyDecoder, UNet


def small_unet(**changes):
    options = {
        "in_channels": 3,
        "out_channels": 6,
        "resolution": 8,
        "base_channels": 16,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "head_channels": 8,
        "num_groups": 4,
    }
    network = UNet(**(options | changes)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # the residual branches and the output start at zero
        if not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
    return network


def run(prepared, network, latent, step, dtype=torch.float32):
    table = inference.shift_table(prepared, network, step).to(dtype)
    shifts = iter(table.split(inference.shift_widths(network), dim=1))
    return prepared.run(latent.to(dtype).contiguous(memory_format=torch.channels_last), shifts)


PACK = inference.packs(torch.device("cpu"))
BOTH = pytest.mark.parametrize(
    "pack", [pytest.param(True, marks=pytest.mark.skipif(not PACK, reason="oneDNN does not pack here")), False]
)


@pytest.mark.parametrize(
    ("height", "width", "channels", "bias"),
    [(4, 4, 6, True), (3, 5, 2, False), (1, 1, 3, True)],  # usual; odd, without bias; one pixel: all taps at the border
)
def test_folded_and_transposed_upsampling_are_exact(height, width, channels, bias):
    upsample = Upsample(channels).double()
    upsample.conv.bias.data.mul_(bias)
    x = torch.randn(2, channels, height, width, dtype=torch.float64)
    expected = upsample(x)
    transposed = inference.TransposedUpsample(upsample, torch.float64)
    torch.testing.assert_close(transposed(x), expected, rtol=1e-6, atol=1e-6)  # weights are folded in float32
    folded = inference.fold_upsample(upsample.conv).double()
    torch.testing.assert_close(inference.phases_to_pixels(folded(x)), expected, rtol=1e-6, atol=1e-6)


def test_folding_saves_five_ninths_of_the_multiplications():
    conv = Upsample(6).conv
    multiplications_per_input_pixel = 4 * conv.weight.numel()
    assert inference.fold_upsample(conv).weight.numel() / multiplications_per_input_pixel == pytest.approx(4 / 9)


@pytest.mark.skipif(not PACK, reason="oneDNN does not pack here")
@pytest.mark.parametrize("stride", [1, 2])
def test_a_packed_convolution_adds_the_residual(stride):
    conv = Conv2d(5, 7, 3, stride=stride, padding=1)
    x = torch.randn(2, 5, 8, 8).contiguous(memory_format=torch.channels_last)
    residual = torch.randn_like(conv(x))
    packed = inference.PackedConv2d(conv, torch.float32)
    torch.testing.assert_close(packed(x), conv(x), rtol=1e-5, atol=1e-5)
    before = residual.clone()
    torch.testing.assert_close(packed(x, residual), conv(x) + residual, rtol=1e-5, atol=1e-5)
    assert torch.equal(residual, before)


@BOTH
def test_a_prepared_network_is_the_same_function(pack):
    network = small_unet()
    latent, step = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 400.0, 1000.0])
    expected = network(latent, step)
    result = run(inference.prepare(network, torch.float32, pack=pack, tabulate=True), network, latent, step)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    rounded = run(
        inference.prepare(network, torch.bfloat16, pack=pack, tabulate=True), network, latent, step, torch.bfloat16
    ).float()
    assert (rounded - expected).norm() < 0.02 * expected.norm()


@BOTH
def test_every_choice_of_upsampling_follows_new_weights(pack):
    network = small_unet()
    latent, step = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    for form, options in (
        (inference.PlainUpsample, (pack,)),
        (inference.FoldedUpsample, (pack,)),
        (inference.TransposedUpsample, ()),
    ):
        prepared = inference.prepare(network, torch.float32, pack=pack, tabulate=True)
        (name,) = [name for name, module in prepared.named_modules() if isinstance(module, inference.PlainUpsample)]
        prepared.set_submodule(name, form(network.get_submodule(name), torch.float32, *options))
        changed = small_unet()
        for parameter in changed.parameters():
            parameter.data.mul_(1.1)
        inference.refresh(prepared, changed, torch.float32)
        torch.testing.assert_close(run(prepared, changed, latent, step), changed(latent, step), rtol=1e-4, atol=1e-4)


def test_refresh_keeps_the_addresses_a_graph_may_hold():
    network = small_unet()
    prepared = inference.prepare(network, torch.bfloat16, pack=False, tabulate=True)
    addresses = [tensor.data_ptr() for tensor in (*prepared.parameters(), *prepared.buffers())]
    inference.refresh(prepared, copy.deepcopy(network), torch.bfloat16)
    assert [tensor.data_ptr() for tensor in (*prepared.parameters(), *prepared.buffers())] == addresses


def test_the_choice_is_measured_and_named():
    network = small_unet()
    prepared = inference.prepare(network, torch.float32, pack=PACK, tabulate=True)
    latent, step = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    report = inference.choose_upsampling(prepared, network, lambda: run(prepared, network, latent, step), torch.float32)
    assert list(report) == ["up.1.2"]
    assert all(form in report["up.1.2"] for form in ("plain", "folded", " ms"))
    torch.testing.assert_close(run(prepared, network, latent, step), network(latent, step), rtol=1e-4, atol=1e-5)


def test_skip_connections_are_not_concatenated(monkeypatch):
    class NoConcatenation(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten.cat.default
            return function(*args, **(kwargs or {}))

    def pair(x, beside, *affine, **options):
        seen.append((x.shape[1], beside.shape[1]))
        return x.new_zeros(len(x), x.shape[1] + beside.shape[1], *x.shape[2:])

    network, seen = small_unet(), []
    prepared = inference.prepare(network, torch.float32, pack=PACK, tabulate=True)
    shifts = inference.shift_table(prepared, network, torch.zeros(1)).split(inference.shift_widths(network), dim=1)
    monkeypatch.setattr(ops, "group_norm_act_pair", pair)
    with NoConcatenation():
        prepared.run(torch.randn(1, 3, 8, 8).to(memory_format=torch.channels_last), iter(shifts))
    assert seen == [(32, 32), (32, 16), (32, 16), (16, 16)]


def test_padded_input_channels_are_ignored():
    conv = Conv2d(3, 4, 3, padding=1)
    padded = inference.DenseConv2d(conv, torch.float32, in_channels=8)
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(padded(x), F.conv2d(x[:, :3], conv.weight, conv.bias, padding=1))


@pytest.mark.parametrize(
    "decoder",
    [
        Decoder(
            resolution=16, base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4, embedding_channels=16
        ),
        ToyDecoder(resolution=16, latent_channels=4, channels=(8, 8), num_groups=4, embedding_channels=16),
    ],
    ids=["upsampling", "transposed convolutions"],
)
def test_a_prepared_decoder_follows_its_weights(decoder):
    latent, beta = torch.randn(2, 4, 8, 8)[:, :, : 1 if isinstance(decoder, ToyDecoder) else 8], torch.tensor([0.0, 0.7])
    latent = latent[..., : latent.shape[2]]
    decoder = copy.deepcopy(decoder).eval().requires_grad_(False)
    prepared = inference.Prepared(decoder, torch.float32, pack=PACK)
    for _ in range(2):
        torch.testing.assert_close(prepared(latent, beta), decoder(latent, beta), rtol=1e-4, atol=1e-5)
        for parameter in decoder.parameters():
            parameter.mul_(1.1)
    assert prepared.version == 2
