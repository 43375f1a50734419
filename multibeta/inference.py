"""Networks prepared for inference: weights packed for the processor, upsampling folded into its convolution, time tabulated."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multibeta import ops
from multibeta.blocks import Conv2d, ResBlock, Upsample
from multibeta.networks import UNet


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` multiplies it faster than float32 (CUDA since Ampere, AMX, AVX512-BF16), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_instruction = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_instruction else torch.float32


@functools.cache
def why_not_packed() -> str | None:
    """Why weights cannot be packed for the CPU, or None where they can: found by packing and running one convolution."""
    try:
        conv = Conv2d(2, 2, 3, padding=1).requires_grad_(False)
        x = torch.ones(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(PackedConv2d(conv, torch.float32)(x, x), conv(x, x), rtol=1e-4, atol=1e-4)
        layer = nn.Linear(2, 2).requires_grad_(False)
        torch.testing.assert_close(
            PackedLinear(layer, torch.float32)(x[0, 0, :, :2]), layer(x[0, 0, :, :2]), rtol=1e-4, atol=1e-4
        )
    except (AttributeError, RuntimeError, AssertionError) as error:
        return f"oneDNN does not pack weights in torch {torch.__version__}: {str(error).splitlines()[0]}"
    return None


class PackedConv2d(nn.Module):
    """A convolution (N, C, H, W) to (N, O, H', W') on the CPU whose weight lies as oneDNN wants it; the sum is part of the pass.

    PyTorch lays the weight out anew at every call: 844 MB of bfloat16 for the 256 x 256 U-Net.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.input_shape: torch.Size | None = None
        self.load(conv, dtype)

    def load(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        """Take the weights of `conv`."""
        self._pack(conv.weight.detach().to(dtype))
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)

    def _pack(self, weight: Tensor) -> None:
        weight = weight.contiguous(memory_format=torch.channels_last).to_mkldnn()
        shape = None if self.input_shape is None else list(self.input_shape)
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *self.geometry, shape)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.shape != self.input_shape:  # the best layout depends on it; another is laid out anew at every call
            self.input_shape = x.shape
            self._pack(self.weight.to_dense())
        arguments = (self.weight, self.bias, *self.geometry)
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *arguments, "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise(x, residual, *arguments, "add", 1.0, None, [], None)


class PackedLinear(nn.Module):
    """A linear layer on the CPU whose weight lies as oneDNN wants it."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.load(linear, dtype)

    def load(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        """Take the weights of `linear`."""
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype).contiguous())
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PairConv2d(nn.Module):
    """A convolution of two inputs next to each other in channels, as a sum of two: the inputs stay where they are."""

    def __init__(self, conv: nn.Conv2d, channels: int, dtype: torch.dtype, pack: bool):
        super().__init__()
        self.channels = channels
        self.first, self.second = (prepare_conv(part, dtype, pack) for part in self._parts(conv))

    def _parts(self, conv: nn.Conv2d) -> tuple[nn.Conv2d, nn.Conv2d]:
        parts = []
        for weight, bias in ((conv.weight[:, : self.channels], conv.bias), (conv.weight[:, self.channels :], None)):
            geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
            part = nn.Conv2d(weight.shape[1], conv.out_channels, *geometry, bias=bias is not None, device="meta")
            part.weight = nn.Parameter(weight.detach(), requires_grad=False)
            part.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
            parts.append(part)
        return tuple(parts)

    def load(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        """Take the weights of `conv`."""
        for mine, part in zip((self.first, self.second), self._parts(conv), strict=True):
            mine.load(part, dtype)

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        return self.second(beside, self.first(x))


class DenseConv2d(Conv2d):
    """A convolution whose weight lies channels-last and is replaced in place: a captured graph keeps its address.

    `in_channels` beyond those of `conv` are ignored: tensor cores want rows of 16 bytes. `bias=False` leaves out its bias.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, *, in_channels: int | None = None, bias: bool = True):
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, bias and conv.bias is not None)
        in_channels = in_channels or conv.in_channels
        super().__init__(in_channels, conv.out_channels, *geometry, device=conv.weight.device, dtype=dtype)
        self.to(memory_format=torch.channels_last).requires_grad_(False)
        self.weight.zero_()
        self.load(conv, dtype)

    def load(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        """Take the weights of `conv`; input channels beyond its own keep weight zero."""
        self.weight[:, : conv.weight.shape[1]].copy_(conv.weight.detach())
        if self.bias is not None:
            self.bias.copy_(conv.bias.detach())


# Rows: the output pixels 2 i and 2 i + 1. Columns: what each of the three taps of a 3-tap filter adds to the two input pixels
# (i - 1, i) and (i, i + 1) that they see after nearest-neighbour doubling.
_PHASE_TAPS = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
_TRANSPOSED_TAPS = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])


def fold_upsample(conv: nn.Conv2d) -> nn.Conv2d:
    """The 2x2 convolution, one group of output channels for each phase of the doubled pixels, that `phases_to_pixels` completes.

    The same function as doubling and a 3x3 filter with 4/9 of the multiplications: of the nine taps on a doubled image many
    meet the same pixel, and their weights add up (in float32).
    """
    taps = _PHASE_TAPS.to(conv.weight.device)
    weight = torch.einsum("ayk,bxl,oikl->aboiyx", taps, taps, conv.weight.detach().float()).flatten(0, 2)
    folded = nn.Conv2d(conv.in_channels, 4 * conv.out_channels, 2, padding=1, bias=conv.bias is not None, device="meta")
    folded.weight = nn.Parameter(weight, requires_grad=False)
    if conv.bias is not None:
        folded.bias = nn.Parameter(conv.bias.detach().float().repeat(4), requires_grad=False)
    return folded


def phases_to_pixels(phases: Tensor) -> Tensor:
    """(N, 4 C, H + 1, W + 1), the output of `fold_upsample`, to the doubled image (N, C, 2 H, 2 W), channels-last."""
    phases = phases.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))
    n, height, width = phases.shape[0], phases.shape[1] - 1, phases.shape[2] - 1
    pixels = phases.new_empty(n, height, 2, width, 2, phases.shape[-1])
    for a in range(2):
        for b in range(2):
            pixels[:, :, a, :, b] = phases[:, a : a + height, b : b + width, a, b]
    return pixels.view(n, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


class FoldedUpsample(nn.Module):
    """`blocks.Upsample` by `fold_upsample`. Shapes: (N, C, H, W) to (N, C, 2 H, 2 W)."""

    def __init__(self, upsample: Upsample, dtype: torch.dtype, pack: bool):
        super().__init__()
        self.conv = prepare_conv(fold_upsample(upsample.conv), dtype, pack)

    def load(self, upsample: Upsample, dtype: torch.dtype) -> None:
        """Take the weights of `upsample`."""
        self.conv.load(fold_upsample(upsample.conv), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return phases_to_pixels(self.conv(x))


class TransposedUpsample(nn.Module):
    """`blocks.Upsample` as one 4x4 transposed convolution of stride 2. Shapes: (N, C, H, W) to (N, C, 2 H, 2 W)."""

    def __init__(self, upsample: Upsample, dtype: torch.dtype):
        super().__init__()
        conv = upsample.conv
        weight = torch.empty(conv.in_channels, conv.out_channels, 4, 4, dtype=dtype, device=conv.weight.device)
        self.register_buffer("weight", weight.to(memory_format=torch.channels_last))
        self.register_buffer("bias", None if conv.bias is None else torch.empty_like(conv.bias, dtype=dtype))
        self.load(upsample, dtype)

    def load(self, upsample: Upsample, dtype: torch.dtype) -> None:
        """Take the weights of `upsample`, in place."""
        taps = _TRANSPOSED_TAPS.to(self.weight.device)
        self.weight.copy_(torch.einsum("yk,xl,oikl->ioyx", taps, taps, upsample.conv.weight.detach().float()))
        if self.bias is not None:
            self.bias.copy_(upsample.conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


class PlainUpsample(nn.Module):
    """`blocks.Upsample` as it is, on a prepared convolution."""

    def __init__(self, upsample: Upsample, dtype: torch.dtype, pack: bool):
        super().__init__()
        self.conv = prepare_conv(upsample.conv, dtype, pack)

    def load(self, upsample: Upsample, dtype: torch.dtype) -> None:
        """Take the weights of `upsample`."""
        self.conv.load(upsample.conv, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


Network = TypeVar("Network", bound=nn.Module)


def packs(device: torch.device) -> bool:
    """Whether weights are packed on `device`: on a CPU where oneDNN can."""
    return device.type == "cpu" and why_not_packed() is None


def prepare_conv(conv: nn.Conv2d, dtype: torch.dtype, pack: bool) -> PackedConv2d | DenseConv2d:
    """A convolution for inference, its weight packed or channels-last."""
    return PackedConv2d(conv, dtype) if pack else DenseConv2d(conv, dtype)


def prepare(network: Network, dtype: torch.dtype, *, pack: bool, tabulate: bool = False) -> Network:
    """A copy of `network` for inference in `dtype`, channels-last: same function to rounding, its weights a snapshot.

    Args:
        network: A network of `blocks`.
        pack: Pack weights for the CPU (see `packs`); torch.compile cannot trace packed weights.
        tabulate: For a `UNet` on tables of time: its ResBlocks lose their projection and take their shift as embedding, from
            `shift_table`; on CUDA its input has its channels padded to a multiple of 8.
    """
    prepared = copy.deepcopy(network).eval().requires_grad_(False)
    sources = dict(network.named_modules())
    for name, module in list(prepared.named_modules()):
        replacement, source = None, sources[name]
        if isinstance(module, Upsample):
            replacement = PlainUpsample(source, dtype, pack)
        elif isinstance(module, Conv2d) and not isinstance(sources[name.rpartition(".")[0]], Upsample):
            replacement = prepare_conv(source, dtype, pack)
        elif isinstance(module, nn.Linear) and pack:
            replacement = PackedLinear(source, dtype)
        elif isinstance(module, ResBlock) and tabulate:
            module.embedding_projection = None
        if isinstance(replacement, DenseConv2d) and tabulate and name.endswith("conv1"):
            replacement = DenseConv2d(source, dtype, bias=False)  # cuDNN adds a bias in a pass of its own: the shift brings it
        if replacement is not None and name.rpartition(".")[2] != "embedding_projection":
            prepared.set_submodule(name, replacement)
    if tabulate:
        prepare_pairs(prepared, network, dtype, pack)
    if tabulate and (conv_in := network.down[0][0]).weight.is_cuda:
        prepared.down[0][0] = DenseConv2d(conv_in, dtype, in_channels=-(-conv_in.in_channels // 8) * 8)
    return prepared.to(dtype=dtype, memory_format=torch.channels_last)


def prepare_pairs(prepared: UNet, network: UNet, dtype: torch.dtype, pack: bool) -> None:
    """Let the blocks that take a skip connection read both inputs where they lie, without a concatenation."""
    channels = network.middle[-1].conv2.out_channels
    for (mine, *_), (theirs, *_) in zip(prepared.up, network.up, strict=True):
        if isinstance(theirs.skip, Conv2d):
            mine.skip, mine.takes_pairs = PairConv2d(theirs.skip, channels, dtype, pack), True
        channels = theirs.conv2.out_channels


@torch.no_grad()
def shift_table(prepared: UNet, network: UNet, times: Tensor) -> Tensor:
    """The embeddings that the blocks of `prepared` take at `times` (S,), side by side: (S, sum of `shift_widths`), float32."""
    parts = []
    for chunk in times.split(256):
        shifts = network.shifts(chunk)
        for index, (mine, theirs) in enumerate(zip(prepared.res_blocks, network.res_blocks, strict=True)):
            if mine.conv1.bias is None:
                shifts[index] = shifts[index] + theirs.conv1.bias
        parts.append(torch.cat(shifts, dim=1).float())
    return torch.cat(parts)


def shift_widths(network: UNet) -> list[int]:
    """Channels that each block takes of a row of `shift_table`."""
    return [block.conv1.out_channels for block in network.res_blocks]


@torch.no_grad()
def refresh(prepared: nn.Module, network: nn.Module, dtype: torch.dtype) -> None:
    """Give `prepared` the present weights of `network`, in place where a captured graph may hold their addresses."""
    derived = [name for name, module in prepared.named_modules() if hasattr(module, "load")]
    for name in derived:
        if not any(name.startswith(f"{other}.") for other in derived):
            prepared.get_submodule(name).load(network.get_submodule(name), dtype)
    for name, parameter in prepared.named_parameters():
        if not any(name.startswith(f"{other}.") for other in derived):
            parameter.copy_(network.get_parameter(name))


@torch.no_grad()
def choose_upsampling(prepared: nn.Module, network: nn.Module, run: Callable[[], object], dtype: torch.dtype) -> dict[str, str]:
    """Give each upsampling the form that is fastest for the input it sees when `run` runs `prepared`.

    Returns:
        What was measured, for each layer by name.
    """
    inputs: dict[str, Tensor] = {}
    layers = {name: module for name, module in prepared.named_modules() if isinstance(module, PlainUpsample)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in layers.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    report = {}
    for name, x in inputs.items():
        source, pack = network.get_submodule(name), isinstance(layers[name].conv, PackedConv2d)
        forms: dict[str, nn.Module] = {"plain": layers[name], "folded": FoldedUpsample(source, dtype, pack)}
        if x.is_cuda:
            forms["transposed"] = TransposedUpsample(source, dtype)
        times = {form: ops.latency_ms(functools.partial(module, x), x.device) for form, module in forms.items()}
        best = min(times, key=times.__getitem__)
        prepared.set_submodule(name, forms[best])
        measured = ", ".join(f"{form} {milliseconds:.3f} ms" for form, milliseconds in times.items())
        report[name] = f"{best} ({measured})"
    return report


class Prepared(Generic[Network]):
    """`network` prepared on first use, and again, in place, whenever its weights have changed.

    Args:
        network, dtype, pack, tabulate: See `prepare`.
    """

    def __init__(self, network: Network, dtype: torch.dtype, *, pack: bool, tabulate: bool = False):
        self.network, self.dtype = network, dtype
        self.options = {"pack": pack, "tabulate": tabulate}
        self.report: dict[str, str] = {}
        self.version = 0
        self._prepared: Network | None = None
        self._versions: tuple[int, ...] = ()

    def get(self) -> Network:
        """The prepared copy, with the weights of now; `version` counts their changes."""
        versions = tuple(parameter._version for parameter in self.network.parameters())
        if self._prepared is None:
            self._prepared = prepare(self.network, self.dtype, **self.options)
        elif versions != self._versions:
            refresh(self._prepared, self.network, self.dtype)
        self.version += versions != self._versions
        self._versions = versions
        return self._prepared

    def measure(self, run: Callable[[], object]) -> None:
        """Choose each upsampling by what it sees when `run` runs the prepared copy; the first call decides."""
        if not self.report:
            self.report |= choose_upsampling(self.get(), self.network, run, self.dtype)

    @torch.no_grad()
    def __call__(self, x: Tensor, *conditions: Tensor) -> Tensor:
        """The prepared copy on (N, C, H, W), in its dtype."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        network = self.get()
        self.measure(lambda: network(x, *conditions))
        return network(x, *conditions)
