"""A prepared network is the same function, to rounding."""

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from multibeta import inference, ops
from multibeta.blocks import Conv2d, Upsample, value
from multibeta.inference import bucket, preparation, upsampling
from multibeta.inference import replays as replays_module
from multibeta.inference.replays import Replays
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


def small_decoder():
    torch.manual_seed(0)
    shape = {"resolution": 16, "base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "num_groups": 4}
    return Decoder(**shape, embedding_channels=16).eval().requires_grad_(False)


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
@pytest.mark.parametrize("form", [inference.PlainUpsample, inference.FoldedUpsample, inference.TransposedUpsample])
def test_every_form_of_upsampling_follows_new_weights(pack, form):
    network = small_unet()
    latent, step = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    prepared = inference.prepare(network, torch.float32, pack=pack, tabulate=True)
    (name,) = [name for name, module in prepared.named_modules() if isinstance(module, inference.MeasuredUpsample)]
    options = () if form is inference.TransposedUpsample else (pack,)
    upsample = prepared.get_submodule(name)
    upsample.forms["of this test"] = form(network.get_submodule(name), torch.float32, *options)
    upsample.choices[2, 4, 4] = "of this test"
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


def test_the_choice_is_named():
    network = small_unet()
    prepared = inference.prepare(network, torch.float32, pack=PACK, tabulate=True)
    latent, step = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    report = inference.choose_upsampling(prepared, network, lambda: run(prepared, network, latent, step))
    assert report == {"up.1.2": "plain (of plain, folded by the size alone, so that seeds repeat)"}
    torch.testing.assert_close(run(prepared, network, latent, step), network(latent, step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side, form", [(7, "plain"), (8, "folded")])
def test_on_the_cpu_no_clock_chooses(monkeypatch, side, form):
    """The forms round differently, and a seed shall draw the same images in every process."""
    upsample = Upsample(4).requires_grad_(False)
    monkeypatch.setattr(ops, "latency_ms", None)
    for count in (1, 3, 16):
        measured, x = inference.MeasuredUpsample(upsample, torch.float32, pack=PACK), torch.randn(count, 4, side, side)
        assert measured.measure(x, upsample).startswith(form)
        assert measured.choices == {(bucket(count), side, side): form}
        torch.testing.assert_close(measured(x), upsample(x), rtol=1e-4, atol=1e-5)


class OnCUDA(torch.Tensor):
    """A tensor of the CPU that says that it is on CUDA."""

    is_cuda = True


@pytest.fixture
def measured_upsample(monkeypatch):
    """An upsampling, its measured form, and inputs that pass for those of a GPU."""
    monkeypatch.setattr(upsampling, "TransposedUpsample", lambda *_: lambda x: x)
    upsample = Upsample(4).requires_grad_(False)
    measured = inference.MeasuredUpsample(upsample, torch.float32, pack=PACK)
    return upsample, measured, lambda count: torch.randn(count, 4, 6, 6).as_subclass(OnCUDA)


def test_each_batch_has_its_choice(measured_upsample, monkeypatch):
    """Timed by a clock that likes one form at batch 1 and 2, the other from 3 on."""
    upsample, measured, inputs = measured_upsample

    def latency(function, device, repetitions):
        is_plain, count = isinstance(function.func, inference.PlainUpsample), len(function.args[0])
        return 1.0 + (is_plain == (count < 3)) + (not isinstance(function.func, torch.nn.Module))

    monkeypatch.setattr(ops, "latency_ms", latency)
    for count, form in ((1, "folded"), (2, "folded"), (3, "plain"), (4, "plain")):
        x = inputs(count)
        assert measured.measure(x, upsample).startswith(form)
        assert measured.choices[bucket(count), 6, 6] == form
    with monkeypatch.context() as deterministic:
        deterministic.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert measured.measure(inputs(1), upsample).startswith("plain (of plain, folded, transposed by the size alone")


def test_a_form_that_cannot_run_is_passed_over(measured_upsample, monkeypatch):
    def broken(self, x):
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED\nmore")

    upsample, measured, inputs = measured_upsample
    monkeypatch.setattr(inference.FoldedUpsample, "forward", broken)
    monkeypatch.setattr(ops, "latency_ms", lambda function, *_: function() is None or 1.0)
    assert "folded: failed on this shape, CUDNN_STATUS_NOT_SUPPORTED" in measured.measure(inputs(2), upsample)


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
        small_decoder(),
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


class TestDeferredSums:
    """What cuDNN adds in passes of its own, a bias or a residual, is left to the norm that reads the map."""

    def test_a_prepared_network_is_the_same_function(self):
        network = small_unet()
        latent, step = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 400.0, 1000.0])
        prepared = inference.prepare(network, torch.float32, pack=False, tabulate=True, defers=True)
        for _ in range(2):
            torch.testing.assert_close(run(prepared, network, latent, step), network(latent, step), rtol=1e-4, atol=1e-5)
            for parameter in network.parameters():
                parameter.data.mul_(1.1)
            inference.refresh(prepared, network, torch.float32)

    @pytest.mark.parametrize("form", ["plain", "folded", "transposed"])
    def test_a_prepared_decoder_is_the_same_function(self, form):
        decoder = small_decoder()
        latent, beta = torch.randn(2, 4, 8, 8), torch.tensor([0.0, 0.7])
        prepared = inference.prepare(decoder, torch.float32, pack=False, defers=True)
        for name, module in prepared.named_modules():
            if isinstance(module, inference.MeasuredUpsample):
                module.forms[form] = module._form(form, decoder.get_submodule(name))
                module.choices[2, 8, 8] = form
        torch.testing.assert_close(prepared(latent, beta), decoder(latent, beta), rtol=1e-4, atol=1e-5)


class Doubled(Conv2d):
    """A convolution whose forward is its own."""

    def forward(self, x, residual=None):
        return 2 * super().forward(x, residual)


class Blurred(Upsample):
    """An upsampling of another kind."""

    def forward(self, x):
        return self.conv(F.interpolate(value(x), scale_factor=2.0, mode="bilinear"))


class TestWeightsThatChange:
    """Every way in which weights change is followed, by one rule."""

    def change(self, how, network):
        parameters = list(network.parameters())
        with torch.no_grad():
            if how == "an optimizer":
                for parameter in parameters:
                    parameter.requires_grad_().grad = torch.ones_like(parameter)
                torch.optim.SGD(parameters, lr=0.05).step()
                network.requires_grad_(False)
            elif how == "copy_":
                for parameter in parameters:
                    parameter.copy_(1.1 * parameter)
            elif how == ".data":
                for parameter in parameters:
                    parameter.data.mul_(1.1)
            elif how == "biases through .data":
                for name, parameter in network.named_parameters():
                    if name.endswith("bias"):
                        parameter.data.add_(0.1)
            elif how == "assigned twice":
                for factor in (1.1, 1.2):
                    state = {name: factor * value for name, value in network.state_dict().items()}
                    network.load_state_dict(state, assign=True)
            elif how == "swapped":
                for name, parameter in list(network.named_parameters()):
                    owner, _, last = name.rpartition(".")
                    setattr(network.get_submodule(owner), last, torch.nn.Parameter(1.1 * parameter, requires_grad=False))
            elif how == "an average, stored and restored":
                kept = [parameter.data.clone() for parameter in parameters]
                for parameter in parameters:
                    parameter.data = 1.1 * parameter.data
                yield
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.data.copy_(value)
            elif how == "LoRA, fused and taken out":
                for sign in (1, -1):
                    generator = torch.Generator().manual_seed(0)
                    for parameter in (p for p in parameters if p.dim() > 1):
                        flat = parameter.data.view(len(parameter), -1)
                        down = torch.randn(1, flat.shape[1], generator=generator)
                        flat.add_(sign * 0.05 * torch.randn(len(flat), 1, generator=generator) @ down)
                    yield
            elif how == ".to(dtype) and back":
                network.bfloat16().float()
            elif how == "tensors swapped":
                for parameter in parameters:
                    torch.utils.swap_tensors(parameter, torch.nn.Parameter(1.1 * parameter, requires_grad=False))
            elif how == "other layers":
                network.conv_out = Conv2d(network.conv_out.in_channels, network.conv_out.out_channels, 1)
                network.requires_grad_(False)
            elif how == "layers of the same shapes":
                block = network.blocks[0]
                kept, block.conv1 = block.conv1, Conv2d(16, 16, 3, padding=2, dilation=2)
                block.conv1.load_state_dict(kept.state_dict())
                network.requires_grad_(False)
            elif how == "attributes of layers":
                network.norm_out.activation = "sigmoid"
                yield
                network.norm_out.num_groups = 2
            elif how == "padding":
                for conv in network.modules():
                    if isinstance(conv, Conv2d) and conv.kernel_size == (3, 3):
                        conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
                        yield
            elif how == "a class of another's":
                network.blocks[0].conv1.__class__ = Doubled
                yield
                next(block for block in network.blocks if isinstance(block, Upsample)).__class__ = Blurred
            elif how == "no bias":
                network.blocks[0].conv1.bias = None
        yield

    @pytest.mark.parametrize(
        "how",
        [
            "an optimizer",
            "copy_",
            ".data",
            "biases through .data",
            "assigned twice",
            "swapped",
            "an average, stored and restored",
            "LoRA, fused and taken out",
            "tensors swapped",
            ".to(dtype) and back",
            "other layers",
            "layers of the same shapes",
            "attributes of layers",
            "padding",
            "a class of another's",
            "no bias",
        ],
    )
    @pytest.mark.parametrize("defers", [False, True])
    def test_are_followed(self, how, defers, monkeypatch):
        network = small_decoder()
        latent, beta = torch.randn(2, 4, 8, 8), torch.tensor([0.0, 0.7])
        if defers:  # as on CUDA
            monkeypatch.setattr(preparation, "prepare", functools.partial(inference.prepare, defers=True))
        prepared = inference.Prepared(network, torch.float32, pack=not defers)
        before = prepared(latent, beta)
        for _ in self.change(how, network):
            result, expected = prepared(latent, beta), network(latent, beta)
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        assert how.startswith(("LoRA", "an average")) or not torch.equal(result, before)

    def test_nothing_is_made_anew_without_a_change(self):
        network = small_decoder()
        prepared = inference.Prepared(network, torch.float32)
        for _ in range(3):
            prepared(torch.randn(2, 4, 8, 8), torch.zeros(2))
        assert prepared.version == 1

    def test_a_snapshot_knows_its_tensors(self):
        weights = [torch.randn(5, 3, 3, 3), torch.randn(7), torch.randn(3, 4).t(), torch.randn(2, 6)[:, ::2], torch.empty(0)]
        snapshot = inference.Snapshot(weights)
        assert snapshot.is_of(weights)
        assert not snapshot.is_of(weights[:-1])
        assert not snapshot.is_of([weights[0].clone(), *weights[1:]])
        for tensor in weights[:-1]:
            tensor.data.mul_(1.5)
            assert not snapshot.is_of(weights)
            snapshot = inference.Snapshot(weights)
            assert snapshot.is_of(weights)


def test_a_first_call_in_inference_mode_and_the_next_outside():
    decoder = small_decoder()
    prepared, latent = inference.Prepared(decoder, torch.float32), torch.randn(2, 4, 8, 8)
    with torch.inference_mode():
        first = prepared(latent, torch.zeros(2))
    assert torch.equal(prepared(latent, torch.zeros(2)), first)
    decoder.conv_out.bias.add_(1)
    torch.testing.assert_close(prepared(latent, torch.zeros(2)), first + 1)
    with torch.inference_mode():
        decoder.conv_out.bias.data.sub_(1)
        torch.testing.assert_close(prepared(latent, torch.zeros(2)), first)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@torch.no_grad()
def test_layers_that_others_changed_are_called_themselves():
    """Quantised, wrapped or adapted, after the first call as before it."""

    class Adapter(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, *args):
            return 2 * self.base_layer(*args)

    class Packed(torch.Tensor):
        pass

    def quantise(network):
        torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, inplace=True)

    def pack(network):
        network.conv_out.weight = nn.Parameter((2 * network.conv_out.weight.detach()).as_subclass(Packed))

    changes = {
        "is quantised": quantise,
        "a weight of conv_out is a Packed": pack,
        "the convolutions of": lambda network: replace_layers(network, "conv1", Adapter),
        None: lambda network: replace_layers(network, "embedding_projection", Adapter),
    }
    for reason, change in changes.items():
        for make in (small_decoder, lambda: small_unet(in_channels=4)):
            network, inputs = make(), (torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]))
            prepared = inference.Prepared(network, torch.float32)
            before = prepared(*inputs)
            change(network)
            found, why = prepared(*inputs), inference.why_not_prepared(network)
            assert (why is None) if reason is None else reason in why
            torch.testing.assert_close(found, network(*inputs), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(found, before, rtol=1e-4, atol=1e-5)


def replace_layers(network, last, make):
    for name, layer in list(network.named_modules()):
        if name.endswith(f".{last}"):
            network.set_submodule(name, make(layer))


def test_a_network_is_called_itself_where_a_copy_would_not_do():
    """Transforms, hooks, a forward put on an object, tracing: `Prepared` gives way."""
    decoder, latent, beta = small_decoder(), torch.randn(2, 4, 8, 8), torch.zeros(2)
    prepared, direction = inference.Prepared(decoder, torch.float32), torch.randn(2, 4, 8, 8)
    expected = prepared(latent, beta)
    assert inference.why_not_prepared(decoder) is None
    _, tangent = torch.func.jvp(lambda z: prepared(z, beta), (latent,), (direction,))
    slope = (decoder(latent + 0.01 * direction, beta) - decoder(latent - 0.01 * direction, beta)) / 0.02
    torch.testing.assert_close(tangent, slope, rtol=0.02, atol=0.02 * float(slope.abs().max()))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(prepared(forward_ad.make_dual(latent, direction), beta))
        torch.testing.assert_close(dual.tangent, tangent, rtol=1e-4, atol=1e-4)
    seen = []
    hook = decoder.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    assert "blocks.0 has hooks" in inference.why_not_prepared(decoder)
    torch.testing.assert_close(prepared(latent, beta), expected, rtol=1e-4, atol=1e-5)
    assert seen
    hook.remove()
    decoder.conv_out.forward = lambda x: torch.full((len(x), 3, 16, 16), 7.0)
    assert "the forward of conv_out was replaced" in inference.why_not_prepared(decoder)
    assert (prepared(latent, beta) == 7).all()
    del decoder.conv_out.forward
    traced = torch.jit.trace(lambda z: prepared(z, beta), (latent,))
    torch.testing.assert_close(traced(2 * latent), decoder(2 * latent, beta), rtol=1e-4, atol=1e-5)
    assert prepared(latent[:0], beta[:0]).shape == (0, 3, 16, 16)


def test_autocast_is_the_callers():
    decoder, latent, beta = small_decoder(), torch.randn(2, 4, 8, 8), torch.zeros(2)
    fresh = inference.Prepared(decoder, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = fresh(latent, beta)
    torch.testing.assert_close(within, decoder(latent, beta), rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_prepare_themselves():
    decoder, latent = small_decoder(), torch.randn(2, 4, 8, 8)
    prepared = inference.Prepared(decoder, torch.float32)
    expected = prepared(latent, torch.zeros(2))
    for copied in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert copied.network is not decoder and copied.dtype == torch.float32
        torch.testing.assert_close(copied(latent, torch.zeros(2)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_that_are_not_packed_run_all_the_same(dtype):
    decoder, latent = small_decoder(), torch.randn(2, 4, 8, 8)
    result = inference.Prepared(decoder, dtype)(latent, torch.zeros(2))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), decoder(latent, torch.zeros(2)), rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not PACK, reason="oneDNN does not pack here")
def test_a_sum_that_onednn_cannot_make_is_made_beside_it(monkeypatch):
    """As for 1x1 maps under torch 2.11."""

    class NoSums:
        def __getattr__(self, name):
            def pointwise(x, *arguments):
                if isinstance(arguments[0], torch.Tensor) and not arguments[0].is_mkldnn:
                    raise RuntimeError("could not create a memory")
                return original._convolution_pointwise(x, *arguments)

            return pointwise if name == "_convolution_pointwise" else getattr(original, name)

    original = torch.ops.mkldnn
    conv, x = Conv2d(5, 5, 3, padding=1).requires_grad_(False), torch.randn(2, 5, 1, 1)
    packed = inference.PackedConv2d(conv, torch.float32)
    monkeypatch.setattr(torch.ops, "mkldnn", NoSums())
    torch.testing.assert_close(packed(x, x), conv(x, x), rtol=1e-5, atol=1e-5)
    assert packed.why_not_summed == {x.shape: "could not create a memory"}


class TestReplays:
    """Calls as graphs, by a capture that runs its step once and replays it."""

    @staticmethod
    def build(function, **kwargs):
        captured = []

        def capture(step, pool):
            captured.append(pool)
            step()
            return step

        return Replays(function, torch.device("cpu"), inference.Host, kwargs.get("capture", capture)), captured

    def test_the_second_call_of_a_shape_is_captured_and_results_are_copies(self):
        replays, captured = self.build(lambda x, y: 2 * x + y)
        for count, shape in ((0, (2, 3)), (1, (2, 3)), (1, (2, 3)), (1, (4, 3)), (2, (4, 3))):
            x, y = torch.randn(shape), torch.randn(shape)
            result = replays(x, y)
            assert torch.equal(result, 2 * x + y)
            assert len(captured) == count
        first = replays(x, y)
        replays(y, x)
        assert torch.equal(first, 2 * x + y)

    def test_a_graph_keeps_the_kernels_it_was_made_of(self):
        replays, captured = self.build(lambda x: x + 1)
        for _ in range(2):
            replays(torch.ones(2))
            with ops.backend("reference"):
                replays(torch.ones(2))
        assert len(captured) == 2

    def test_large_calls_and_more_than_so_many_shapes_are_not_captured(self, monkeypatch):
        monkeypatch.setattr(replays_module, "LARGEST", 8)
        monkeypatch.setattr(replays_module, "MOST", 2)
        replays, captured = self.build(lambda x: x + 1)
        for size in (9, 9, 1, 1, 2, 2, 3, 3):
            assert torch.equal(replays(torch.ones(size)), torch.full((size,), 2.0))
        assert len(captured) == 2

    def test_what_cannot_be_captured_runs_all_the_same_and_is_told(self, caplog):
        def capture(step, pool):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        replays, _ = self.build(lambda x: x + 1, capture=capture)
        for _ in range(3):
            assert torch.equal(replays(torch.ones(2)), torch.full((2,), 2.0))
        assert caplog.text.count("without CUDA graphs: operation not permitted when stream is capturing") == 1

    def test_threads_share_the_buffers_and_none_the_results(self):
        replays, _ = self.build(lambda x: x * 3)
        with ThreadPoolExecutor(8) as pool:
            numbers = [torch.full((64,), float(number)) for number in range(200)]
            for number, result in zip(numbers, pool.map(replays, numbers), strict=True):
                assert torch.equal(result, 3 * number)

    def test_a_call_waits_for_what_another_stream_left(self, monkeypatch):
        told = []
        monkeypatch.setattr(inference.Host, "mark", lambda self: len(told))
        monkeypatch.setattr(inference.Host, "follow", lambda self, mark: told.append(mark))
        replays, _ = self.build(lambda x: x + 1)
        for _ in range(4):
            replays(torch.ones(2))
        assert told == [0, 1]
        with replays.paused():  # other weights wait for the calls before, and the calls after for them
            assert told == [0, 1, 2]
        replays(torch.ones(2))
        assert told == [0, 1, 2, 3]
