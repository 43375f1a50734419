"""torch.compile sees one graph: on fake CUDA tensors, which need no GPU, with one Triton operator for each norm."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from multibeta import inference, ops
from multibeta.blocks import AttentionBlock, GroupNormAct, ResBlock
from multibeta.kernels import attention as attention_kernels
from multibeta.networks import Decoder, Encoder, UNet

UNET = {"base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,)}
LEVELS = {"resolution": 16, "base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1, "embedding_channels": 16}

MODULES = {  # what makes the module; shapes of its inputs
    "ResBlock": (lambda: ResBlock(32, 64, 16), ((2, 32, 8, 8), (2, 16))),
    "AttentionBlock": (lambda: AttentionBlock(64, head_channels=16), ((2, 64, 8, 8),)),
    "UNet": (lambda: UNet(in_channels=4, out_channels=8, resolution=8, **UNET), ((2, 4, 8, 8), (2,))),
    "Encoder": (lambda: Encoder(image_channels=3, latent_channels=4, **LEVELS), ((2, 3, 16, 16), (2,))),
    "Decoder": (lambda: Decoder(image_channels=3, latent_channels=4, **LEVELS), ((2, 4, 8, 8), (2,))),
}

cuda_build = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA stops here, on fake tensors too")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fake_cuda(tensor):
    """An empty CUDA tensor of that shape within a FakeTensorMode, in bfloat16, channels-last."""
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return torch.empty(tensor.shape, device="cuda", dtype=torch.bfloat16, memory_format=layout)


def on_fake_cuda(name):
    """The module and its inputs: fake ones are not moved, and not every build of torch could."""
    make, shapes = MODULES[name]
    with torch.device("meta"):
        module, inputs = make(), [torch.empty(shape) for shape in shapes]
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[key] = nn.Parameter(fake_cuda(parameter))
    return module, [fake_cuda(tensor) for tensor in inputs]


def norms(module):
    return sum(isinstance(part, GroupNormAct) for part in module.modules())


def compiled_targets(module, inputs, **options):
    """Names of what the one graph of `module` calls, and the module's result."""
    targets = Counter()

    def record(graph, _):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph

    result = torch.compile(module, backend=record, fullgraph=True, **options)(*inputs)
    return targets, result


def count(targets, *parts):
    return sum(number for target, number in targets.items() if all(part in target for part in parts))


@pytest.mark.parametrize("any_batch", [False, pytest.param(True, marks=cuda_build)])
@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=cuda_build)])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_on_cuda_is_one_graph_with_a_triton_operator_for_each_norm(name, gradients, any_batch):
    pytest.importorskip("triton")
    with FakeTensorMode(), torch.set_grad_enabled(gradients):
        module, inputs = on_fake_cuda(name)
        for tensor in inputs:
            if any_batch:
                torch._dynamo.mark_dynamic(tensor, 0)
        targets, result = compiled_targets(module, inputs)
        assert result.is_cuda and result.dtype == torch.bfloat16 and result.requires_grad == gradients
    assert count(targets, "group_norm_act", "triton") == norms(module) > 0
    assert not count(targets, "aten.native_group_norm") and not count(targets, "functional.group_norm")


@cuda_build
def test_a_pair_on_cuda_is_not_concatenated():
    pytest.importorskip("triton")
    with FakeTensorMode(), torch.no_grad():
        parts = [fake_cuda(torch.empty(2, channels, 8, 8, device="meta")) for channels in (32, 16)]
        affine = [fake_cuda(torch.empty(48, device="meta")) for _ in range(2)]
        targets, result = compiled_targets(lambda *arguments: ops.group_norm_act_pair(*arguments, 12), [*parts, *affine])
        assert result.shape == (2, 48, 8, 8)
    assert count(targets, "group_norm_act", "triton") and not count(targets, "cat of type")


def test_one_library_is_pinned_within_the_graph():
    query, key, value = torch.rand(3, 2, 64, 4, 16)
    attention, _ = attention_kernels.pinned_sdpa("sdpa-flash")  # which the CPU has
    targets, result = compiled_targets(attention, (query, key, value))
    assert count(targets, "scaled_dot_product_attention") == 1
    torch.testing.assert_close(result, attention(query, key, value))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("any_batch", [False, True])
def test_what_was_measured_is_in_the_graph(any_batch, gradients, monkeypatch):
    """The kernel pinned for the shape; where it declines because of gradients, the next that did not fail; in a graph for any
    batch, the first, and the graph stays one for any batch."""

    def kernel(name, function):
        return ops.Kernel("sdpa", lambda query, key, value: function(value), lambda *_: declined(name), name=name)

    def declined(name):
        return "no backward" if name == "cos" and torch.is_grad_enabled() else None

    kernels = [kernel("relu", torch.relu), kernel("sin", torch.sin), kernel("cos", torch.cos)]
    module, x = AttentionBlock(64, head_channels=16), torch.rand(2, 64, 8, 8)
    op, shape = ops.find("attention"), (torch.Size([2, 64, 4, 16]), torch.float32, x.device)
    pin = ops.Pin(kernels[2], ["cos: 0.100 ms", "relu: failed"], {"relu": "failed"})
    monkeypatch.setattr(op, "kernels", kernels)
    monkeypatch.setattr(op, "pins", {(shape,) * 3: pin})
    if any_batch:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.set_grad_enabled(gradients):
        targets, _ = compiled_targets(module, [x])
    expected = "relu" if any_batch else "sin" if gradients else "cos"
    assert [name for name in ("relu", "sin", "cos") if count(targets, f"method {name} ")] == [expected]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_on_the_cpu_is_one_graph(name, gradients):
    make, shapes = MODULES[name]
    module, inputs = make(), [torch.rand(shape) for shape in shapes]
    with torch.set_grad_enabled(gradients):
        targets, result = compiled_targets(module, inputs)
        torch.testing.assert_close(result, module(*inputs), rtol=1e-5, atol=1e-5)
    if ops.explain("group_norm_act", torch.ones(1, 4, 2, 2), *torch.ones(2, 4), 2).startswith("group_norm_act: cpp"):
        assert count(targets, "group_norm_act", "cpp") == norms(module) > 0


class Passes(TorchDispatchMode):
    """Counts what runs over whole feature maps beside the norms: convolutions, their biases, sums."""

    def __init__(self):
        super().__init__()
        self.convolutions = self.biases = self.sums = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.convolutions += 1
            self.biases += args[2] is not None
            return fake_cuda(function(*args, **(kwargs or {})))  # channels-last, as cuDNN leaves it: torch without CUDA does not
        if function in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            self.sums += isinstance(args[0], torch.Tensor) and args[0].dim() == 4
        return function(*args, **(kwargs or {}))


class TestPreparedNetworks:
    """The networks of 256 x 256 images as the engine runs them on CUDA."""

    def unet(self):
        """What runs it, shapes of the inputs, and itself: on meta tensors, which every build of torch can copy."""
        with torch.device("meta"):
            network = UNet().eval().requires_grad_(False)
        prepared = inference.prepare(network, torch.bfloat16, pack=False, tabulate=True, defers=True)
        widths = inference.shift_widths(network)
        run = lambda latent, shifts: prepared.run(latent, iter(shifts.split(widths, dim=1)))  # noqa: E731
        return run, ((64, 4, 32, 32), (64, sum(widths))), prepared

    def decoder(self):
        with torch.device("meta"):
            network = Decoder().eval().requires_grad_(False)
        prepared = inference.prepare(network, torch.bfloat16, pack=False, defers=True)
        return prepared, ((8, 4, 32, 32), (8,)), prepared

    def fake(self, network, shapes):
        """The inputs, and the weights in place, as fake CUDA tensors."""
        for part in network.modules():
            for key, held in part._parameters.items():
                if held is not None:
                    fake = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="cuda")
                    part._parameters[key] = nn.Parameter(fake, requires_grad=False)
        return [fake_cuda(torch.empty(shape, device="meta")) for shape in shapes]

    def passes(self, run, shapes, network):
        pytest.importorskip("triton")
        with FakeTensorMode(), torch.no_grad():
            inputs = self.fake(network, shapes)
            with Passes() as passes:
                run(*inputs)
        return passes

    def test_no_pass_is_left_that_a_norm_could_make(self):
        passes = self.passes(*self.unet())
        assert passes.convolutions == 17 * 2 + 2 + 2 + 2  # of blocks, down, up, first and last; 1x1 are matrix products
        assert passes.biases == 1  # of the last, on 8 channels
        assert passes.sums == 4  # before two convolutions down and two up, which are no norms

    def test_the_network_as_it_is_makes_more_of_them(self):
        with torch.device("meta"):
            network = UNet().eval().requires_grad_(False).to(torch.bfloat16)
        passes = self.passes(network, ((64, 4, 32, 32), (64,)), network)
        assert passes.biases == passes.convolutions == 17 * 2 + 11 + 2 + 2 + 2  # blocks, their skips, down, up, first and last
        assert passes.sums == 17 + 16  # residuals of blocks and of attention

    def test_a_decoder_keeps_none_either(self):
        passes = self.passes(*self.decoder())
        assert passes.biases == 1
        assert passes.sums == 3 * 2  # the bias and the residual of the block before each upsampling

    @pytest.mark.parametrize("kind", [pytest.param("unet", marks=cuda_build), "decoder"])
    def test_is_one_graph(self, kind):
        pytest.importorskip("triton")
        run, shapes, prepared = getattr(self, kind)()
        with FakeTensorMode(), torch.no_grad():
            targets, result = compiled_targets(run, self.fake(prepared, shapes))
        assert result.shape == ((64, 8, 32, 32) if kind == "unet" else (8, 3, 256, 256))
        assert count(targets, "group_norm_act", "triton") == norms(prepared)


def test_importing_multibeta_asks_nothing_of_the_driver():
    """A process that asked could not fork workers that use CUDA."""
    code = (
        "import torch\n"
        "def asked(*_): raise AssertionError\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = asked\n"
        "import multibeta\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
