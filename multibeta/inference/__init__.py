"""Networks prepared for inference: weights packed for the processor, upsampling folded into its convolution, time tabulated."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multibeta import ops
from multibeta.blocks import Conv2d, FeatureMap, ResBlock, Sum, Upsample, value
from multibeta.kernels import probes
from multibeta.networks import UNet

logger = logging.getLogger("multibeta")

PACKED_DTYPES = (torch.float32, torch.bfloat16)
FOLDED_FROM = 64  # pixels of the input of an upsampling: on smaller ones four small convolutions cost more than they save


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` multiplies it faster than float32 (CUDA since Ampere, AMX, AVX512-BF16), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_instruction = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_instruction else torch.float32


class Snapshot:
    """What tensors were: the one rule that decides whether something made of weights is still of the weights of now.

    A tensor that is another one, lies elsewhere, or was written in place is always noticed, by identity, address and version.
    Writes through `.data`, as averages of weights and the merging of LoRA make them, leave no trace but the values themselves:
    they are noticed where they change one of `SAMPLED` values spread over each tensor, as a change of whole layers does, and one
    of single weights or of one channel need not.
    """

    # To sum all weights at every call takes 3 to 16 % of a convolution on 16 x 16 or 8 x 8 maps and 9 to 55 % of a linear layer
    # (EPYC, one thread, weights in memory), and would miss filters that change places. To compare 64 takes 6 us.
    SAMPLED = 64

    def __init__(self, tensors: Sequence[Tensor]):
        self._marks = [self._mark(tensor) for tensor in tensors]
        self._values = [values.detach().clone() for values in self._sample(tensors)]

    @torch.no_grad()
    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `tensors` are those of the snapshot, unchanged."""
        if self._marks != [self._mark(tensor) for tensor in tensors]:
            return False
        return all(map(torch.equal, self._values, self._sample(tensors)))

    @staticmethod
    def _mark(tensor: Tensor) -> tuple:
        version = None if tensor.is_inference() else tensor._version
        return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device, tensor.shape, tensor.stride()

    @classmethod
    def _sample(cls, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sampled values, side by side for tensors of one dtype on one device: one comparison serves them all."""
        if len(tensors) == 1:
            return [cls._sample_of(tensors[0])]
        alike: dict[tuple, list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.dtype, tensor.device), []).append(cls._sample_of(tensor))
        return [torch.cat(samples) for samples in alike.values()]

    @classmethod
    def _sample_of(cls, tensor: Tensor) -> Tensor:
        if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=_layout(tensor))):
            tensor = tensor.contiguous()
        numel = tensor.numel()
        return tensor.as_strided((min(cls.SAMPLED, numel),), (_sample_step(numel),))


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


@functools.cache
def _sample_step(numel: int) -> int:
    """The longest step that stays inside and shares no divisor with `numel`: others would meet one tap of every filter."""
    longest = max(numel // Snapshot.SAMPLED, 1)
    return next(step for step in range(longest, 0, -1) if math.gcd(step, numel) == 1)


@probes.probe
def why_not_packed() -> str | None:
    """Why weights cannot be packed for the CPU, or None where they can: found by packing and running one layer of each kind."""
    conv, layer = Conv2d(2, 2, 3, padding=1, device="meta"), nn.Linear(2, 2, device="meta")  # which draw no random numbers
    for module in (conv.to_empty(device="cpu"), layer.to_empty(device="cpu")):
        for parameter in module.requires_grad_(False).parameters():
            parameter.fill_(0.5)
    x = torch.ones(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    row = x[0, 0, :, :2]
    try:
        torch.testing.assert_close(PackedConv2d(conv, torch.float32)(x, x), conv(x, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(PackedLinear(layer, torch.float32)(row), layer(row), rtol=1e-4, atol=1e-4)
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
        self.why_not_summed: dict[torch.Size, str] = {}  # of inputs: torch 2.11 cannot for some 1x1 maps
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
        if residual is not None and x.shape not in self.why_not_summed:
            try:
                return torch.ops.mkldnn._convolution_pointwise(x, residual, *arguments, "add", 1.0, None, [], None)
            except RuntimeError as error:
                self.why_not_summed[x.shape] = str(error).splitlines()[0]
                logger.info("oneDNN makes the sum of a convolution of %s in a pass of its own: %s", tuple(x.shape), error)
        y = torch.ops.mkldnn._convolution_pointwise(x, *arguments, "none", [], "")
        return y if residual is None else residual + y


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


class DenseConv2d(Conv2d):
    """A convolution whose weight lies channels-last and is replaced in place: a captured graph keeps its address.

    `in_channels` beyond those of `conv` are ignored: tensor cores want rows of 16 bytes. `bias=False` leaves out its bias.
    `defers` leaves bias and residual to whoever reads the result, as a `blocks.Sum`: cuDNN adds each in a pass of its own.
    """

    def __init__(
        self, conv: nn.Conv2d, dtype: torch.dtype, *, in_channels: int | None = None, bias: bool = True, defers: bool = False
    ):
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, bias and conv.bias is not None)
        in_channels, self.defers = in_channels or conv.in_channels, defers
        super().__init__(in_channels, conv.out_channels, *geometry, device="meta")  # which draws no random numbers
        for name, parameter in list(self.named_parameters()):
            zeros = torch.zeros(parameter.shape, dtype=dtype, device=conv.weight.device)
            zeros = zeros.contiguous(memory_format=torch.channels_last) if name == "weight" else zeros
            setattr(self, name, nn.Parameter(zeros, requires_grad=False))
        self.load(conv, dtype)

    def load(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        """Take the weights of `conv`; input channels beyond its own keep weight zero."""
        self.weight[:, : conv.weight.shape[1]].copy_(conv.weight.detach())
        if self.bias is not None:
            self.bias.copy_(conv.bias.detach())

    def forward(self, x: FeatureMap, residual: FeatureMap | None = None) -> FeatureMap:
        """(N, C, H, W), residual shaped like the result, to the result or what will be it."""
        residual = None if residual is None else value(residual)
        if not self.defers:
            return super().forward(value(x), residual)
        y = self._conv_forward(value(x), self.weight, None)
        return y if self.bias is None and residual is None else Sum(y, self.bias, residual)


class PointwiseConv2d(DenseConv2d):
    """A 1x1 convolution as a matrix product over the pixels of a channels-last map, which adds the bias as it ends."""

    def forward(self, x: FeatureMap, residual: FeatureMap | None = None) -> Tensor:
        """(N, C, H, W), residual shaped like the result and overwritten by it, to the result."""
        rows, weight = pixels(value(x)), self.weight.flatten(1)
        if residual is None:
            y = F.linear(rows, weight, self.bias)
        else:
            y = pixels(value(residual)).addmm_(rows, weight.t())
            y = y if self.bias is None else y.add_(self.bias)
        n, _, height, width = x.shape
        return y.view(n, height, width, -1).permute(0, 3, 1, 2)


def pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) to its pixels, (N H W, C): a view of a channels-last map."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def prepare_conv(
    conv: nn.Conv2d, dtype: torch.dtype, pack: bool, *, bias: bool = True, defers: bool = False
) -> PackedConv2d | DenseConv2d:
    """A convolution for inference, its weight packed or channels-last; `bias` and `defers`, if not packed: see `DenseConv2d`."""
    if pack:
        return PackedConv2d(conv, dtype)
    return DenseConv2d(conv, dtype, bias=bias, defers=defers)


class PairConv2d(nn.Module):
    """A 1x1 convolution of two inputs next to each other in channels, as a sum of two: the inputs stay where they are."""

    def __init__(self, conv: nn.Conv2d, channels: int, dtype: torch.dtype, pack: bool):
        super().__init__()
        self.channels = channels
        kind = PackedConv2d if pack else PointwiseConv2d
        self.first, self.second = (kind(part, dtype) for part in self._parts(conv))

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

    def forward(self, x: FeatureMap, beside: FeatureMap) -> Tensor:
        return self.second(value(beside), self.first(value(x)))


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

    def __init__(self, upsample: Upsample, dtype: torch.dtype, pack: bool, defers: bool = False):
        super().__init__()
        self.defers = defers
        self.conv = prepare_conv(fold_upsample(upsample.conv), dtype, pack)

    def load(self, upsample: Upsample, dtype: torch.dtype) -> None:
        """Take the weights of `upsample`."""
        self.conv.load(fold_upsample(upsample.conv), dtype)

    def forward(self, x: FeatureMap) -> FeatureMap:
        conv = self.conv
        if not self.defers or conv.bias is None:
            return phases_to_pixels(conv(value(x)))
        phases = conv._conv_forward(value(x), conv.weight, None)
        return Sum(phases_to_pixels(phases), conv.bias[: len(conv.bias) // 4], None)


class TransposedUpsample(nn.Module):
    """`blocks.Upsample` as one 4x4 transposed convolution of stride 2. Shapes: (N, C, H, W) to (N, C, 2 H, 2 W)."""

    def __init__(self, upsample: Upsample, dtype: torch.dtype, defers: bool = False):
        super().__init__()
        self.defers, conv = defers, upsample.conv
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

    def forward(self, x: FeatureMap) -> FeatureMap:
        if not self.defers or self.bias is None:
            return F.conv_transpose2d(value(x), self.weight, self.bias, stride=2, padding=1)
        return Sum(F.conv_transpose2d(value(x), self.weight, stride=2, padding=1), self.bias, None)


class PlainUpsample(nn.Module):
    """`blocks.Upsample` as it is, on a prepared convolution."""

    def __init__(self, upsample: Upsample, dtype: torch.dtype, pack: bool, defers: bool = False):
        super().__init__()
        self.conv = prepare_conv(upsample.conv, dtype, pack, defers=defers)

    def load(self, upsample: Upsample, dtype: torch.dtype) -> None:
        """Take the weights of `upsample`."""
        self.conv.load(upsample.conv, dtype)

    def forward(self, x: FeatureMap) -> FeatureMap:
        return self.conv(F.interpolate(value(x), scale_factor=2.0, mode="nearest"))


def bucket(count: int) -> int:
    """The batch that stands for `count` samples where one is prepared for many: the next power of two."""
    return 1 << (count - 1).bit_length()


class MeasuredUpsample(nn.Module):
    """`blocks.Upsample` in the form that `measure` chose for the size of its input; plain for a size it has not seen.

    The forms round differently. On CUDA the fastest is taken; on the CPU, and where `torch.use_deterministic_algorithms` is on,
    no clock decides but the size alone, so that a seed draws the same images in every process.
    """

    def __init__(self, upsample: Upsample, dtype: torch.dtype, pack: bool, defers: bool = False):
        super().__init__()
        self.dtype, self.pack, self.defers = dtype, pack, defers
        self.forms = nn.ModuleDict({"plain": PlainUpsample(upsample, dtype, pack, defers)})
        self.choices: dict[tuple[int, ...], str] = {}

    def load(self, upsample: Upsample, dtype: torch.dtype) -> None:
        """Take the weights of `upsample`."""
        for form in self.forms.values():
            form.load(upsample, dtype)

    @staticmethod
    def _size(x: FeatureMap) -> tuple[int, ...]:
        return bucket(x.shape[0]), *x.shape[2:]

    def forward(self, x: FeatureMap) -> FeatureMap:
        return self.forms[self.choices.get(self._size(x), "plain")](x)

    def _form(self, name: str, upsample: Upsample) -> nn.Module:
        if name in self.forms:
            return self.forms[name]
        if name == "folded":
            return FoldedUpsample(upsample, self.dtype, self.pack, self.defers)
        return TransposedUpsample(upsample, self.dtype, self.defers)

    def measure(self, x: Tensor, upsample: Upsample) -> str:
        """Choose the form for inputs of the size of `x`; returns the choice and its reason.

        A form that cannot run is passed over, and said to be.
        """
        names = ("plain", "folded", *(("transposed",) if x.is_cuda else ()))
        if not x.is_cuda or torch.are_deterministic_algorithms_enabled():
            best = "folded" if x.shape[-2:].numel() >= FOLDED_FROM else "plain"
            forms, reason = {best: self._form(best, upsample)}, f"of {', '.join(names)} by the size alone, so that seeds repeat"
        else:
            forms = {name: self._form(name, upsample) for name in names}
            times, failures = ops.measure(
                {name: functools.partial(form, x) for name, form in forms.items()}, x.device, latency=ops.latency_ms
            )
            best = min(times, key=times.__getitem__, default="plain")
            reason = ", ".join(ops.measured_lines(times, failures))
        self.forms[best] = forms[best]
        self.choices[self._size(x)] = best
        return f"{best} ({reason})"


Network = TypeVar("Network", bound=nn.Module)


def packs(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether weights are packed on `device` in `dtype`: on a CPU where oneDNN can."""
    return device.type == "cpu" and dtype in PACKED_DTYPES and why_not_packed() is None


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a prepared form of `kind` computes what `module` does: it has the forward of that class, and no other padding."""
    if not isinstance(module, kind) or type(module).forward is not kind.forward:
        return False
    if not isinstance(module, nn.Conv2d):
        return True
    padded_with_zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return padded_with_zeros and type(module)._conv_forward is nn.Conv2d._conv_forward


def _has_geometry(conv: nn.Conv2d, kernel: int, padding: int) -> bool:
    geometry = conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups
    return _is_plain(conv, Conv2d) and geometry == ((kernel, kernel), (padding, padding), (1, 1), (1, 1), 1)


def _is_upsample(module: nn.Module) -> bool:
    return _is_plain(module, Upsample) and _has_geometry(module.conv, 3, 1)


def prepare(network: Network, dtype: torch.dtype, *, pack: bool, tabulate: bool = False, defers: bool | None = None) -> Network:
    """A copy of `network` for inference in `dtype`, channels-last: same function to rounding, its weights a snapshot.

    Args:
        network: A network of `blocks`.
        pack: Pack weights for the CPU (see `packs`); torch.compile cannot trace packed weights.
        tabulate: For a `UNet` on tables of time: its ResBlocks lose their projection and take their shift as embedding, from
            `shift_table`; on CUDA its input has its channels padded to a multiple of 8.
        defers: Let convolutions leave their bias and the sum with the residual to the norm that reads them (see `blocks.Sum`); by
            default on CUDA, where both are passes of their own and a kernel of ours adds them.
    """
    on_cuda = next(network.parameters()).is_cuda
    defers = not pack and (on_cuda if defers is None else defers)
    prepared = copy.deepcopy(network).eval().requires_grad_(False)
    sources = dict(network.named_modules())
    for name, module in list(prepared.named_modules()):
        replacement, source, path = None, sources[name], name.split(".")
        parent, _, last = name.rpartition(".")
        if _is_upsample(source):
            replacement = MeasuredUpsample(source, dtype, pack, defers)
        elif _is_plain(source, Conv2d) and not _is_upsample(sources[parent]):
            if not pack and last == "skip" and _has_geometry(source, 1, 0):
                replacement = PointwiseConv2d(source, dtype)
            else:  # a table of shifts brings the bias of the first convolution of a block
                bias = not (tabulate and last == "conv1")
                replacement = prepare_conv(source, dtype, pack, bias=bias, defers=defers and last != "conv_out")
        elif _is_plain(source, nn.Linear) and pack and "embedding_projection" not in path:
            replacement = PackedLinear(source, dtype)
        elif isinstance(module, ResBlock) and tabulate:
            module.embedding_projection = None
        if replacement is not None:
            prepared.set_submodule(name, replacement)
    if tabulate:
        prepare_pairs(prepared, network, dtype, pack)
        conv_in = network.down[0][0]
        if on_cuda and _is_plain(conv_in, Conv2d):
            channels = -(-conv_in.in_channels // 8) * 8
            prepared.down[0][0] = DenseConv2d(conv_in, dtype, in_channels=channels, defers=defers)
    return prepared.to(dtype=dtype, memory_format=torch.channels_last)


def prepare_pairs(prepared: UNet, network: UNet, dtype: torch.dtype, pack: bool) -> None:
    """Let the blocks that take a skip connection read both inputs where they lie, without a concatenation."""
    channels = network.middle[-1].conv2.out_channels
    for (mine, *_), (theirs, *_) in zip(prepared.up, network.up, strict=True):
        if isinstance(theirs.skip, Conv2d) and _has_geometry(theirs.skip, 1, 0):
            mine.skip, mine.takes_pairs = PairConv2d(theirs.skip, channels, dtype, pack), True
        channels = theirs.conv2.out_channels


@torch.no_grad()
def shift_table(prepared: UNet, network: UNet, times: Tensor) -> Tensor:
    """The embeddings that the blocks of `prepared` take at `times` (S,), side by side: (S, sum of `shift_widths`), float32."""
    parts = []
    for chunk in times.split(256):
        shifts = network.shifts(chunk)
        for index, (mine, theirs) in enumerate(zip(prepared.res_blocks, network.res_blocks, strict=True)):
            if mine.conv1.bias is None and theirs.conv1.bias is not None:
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
    for name, buffer in prepared.named_buffers():
        if not any(name.startswith(f"{other}.") for other in derived):
            buffer.copy_(network.get_buffer(name))


@torch.no_grad()
def choose_upsampling(prepared: nn.Module, network: nn.Module, run: Callable[[], object]) -> dict[str, str]:
    """Give each upsampling the form that suits the input it sees when `run` runs `prepared`.

    Returns:
        The choice and its reason, for each layer by name.
    """
    inputs: dict[str, Tensor] = {}
    layers = {name: module for name, module in prepared.named_modules() if isinstance(module, MeasuredUpsample)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, value(args[0])))
        for name, layer in layers.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return {name: layers[name].measure(x, network.get_submodule(name)) for name, x in inputs.items()}


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """`device` is the current one of its kind: streams, events and graphs that are made belong to it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def ordinary_tensors(device: torch.device) -> Iterator[None]:
    """No gradients and no autocast, and tensors made in the block may be written later, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def why_not_prepared(network: nn.Module) -> str | None:
    """Why a call must go through `network` itself and not through a prepared copy, or None."""
    if (transform := ops.active_transform()) is not None:
        return transform
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "it is traced"
    if isinstance(network, UNet) and (type(network).forward, type(network).run) != (UNet.forward, UNet.run):
        return f"{type(network).__name__} has a forward of its own"
    for name, module in network.named_modules():
        if type(module).__module__.startswith("torch.ao.nn."):
            return f"{name} is quantised, which no copy in another dtype would be"
        if others := [type(tensor).__name__ for tensor in module._parameters.values() if type(tensor) not in _TENSORS]:
            return f"a weight of {name} is a {others[0]}, which no copy would compute with"
        if isinstance(module, ResBlock) and not (isinstance(module.conv1, nn.Conv2d) and isinstance(module.conv2, nn.Conv2d)):
            return f"the convolutions of {name} are wrapped, which no copy would follow"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the network'} has hooks, which a copy would not call"
        if "forward" in vars(module) or "_conv_forward" in vars(module):
            return f"the forward of {name or 'the network'} was replaced on the object"
    return None


def _inspect(network: nn.Module) -> tuple[list[tuple], list[Tensor]]:
    """What a prepared copy is made for: layers, their plain attributes and which weights they share; and the weights."""
    layers: list[tuple] = []
    seen: dict[int, int] = {}
    weights: list[Tensor] = []
    for module in network.modules():
        held = vars(module)
        plain = [value for key, value in held.items() if type(value) in _PLAIN and key != "training"]
        for key, tensor in (held["_parameters"] | held["_buffers"]).items():
            if tensor is not None:
                plain += [key, tensor.shape, tensor.device, seen.setdefault(id(tensor), len(seen))]
                weights.append(tensor)
        layers.append((id(module), type(module), plain))
    return layers, weights


_PLAIN = frozenset((bool, int, float, str, tuple))
_TENSORS = (nn.Parameter, Tensor, type(None))


class Prepared(Generic[Network]):
    """`network` prepared on first use, again, in place, whenever its weights have changed, and anew where its layers have.

    `Snapshot` is the rule. Copies and pickles take the network and prepare it themselves.

    Args:
        network, dtype, tabulate: See `prepare`.
        pack: Pack weights where the device can.
    """

    def __init__(self, network: Network, dtype: torch.dtype, *, pack: bool = True, tabulate: bool = False):
        self.network, self.dtype, self.pack, self.tabulate = network, dtype, pack, tabulate
        self.report: dict[str, str] = {}
        self.version = 0
        self._prepared: Network | None = None
        self._structure: list[tuple] = []
        self._snapshot = Snapshot([])
        self._measured: set[tuple[int, ...]] = set()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple:
        return functools.partial(type(self), pack=self.pack, tabulate=self.tabulate), (self.network, self.dtype)

    def get(self) -> Network:
        """The prepared copy, with the weights of now; `version` counts their changes."""
        device = next(self.network.parameters()).device
        with self._lock, ordinary_tensors(device):
            structure, weights = _inspect(self.network)
            if structure != self._structure:
                self._prepared, self._structure = None, []
                pack = self.pack and packs(device, self.dtype)
                self._prepared = prepare(self.network, self.dtype, pack=pack, tabulate=self.tabulate)
                self.report.clear()
                self._measured.clear()
            elif self._snapshot.is_of(weights):
                return self._prepared
            else:
                refresh(self._prepared, self.network, self.dtype)
            self._structure, self._snapshot = structure, Snapshot(weights)
            self.version += 1
            return self._prepared

    def measure(self, size: tuple[int, ...], run: Callable[[], object]) -> None:
        """Choose each upsampling by what it sees when `run` runs the prepared copy on inputs of this size, once for each size."""
        with self._lock:
            if size not in self._measured:
                self._measured.add(size)
                found = choose_upsampling(self.get(), self.network, run)
                self.report |= {f"{name} at batch {size[0]}": text for name, text in found.items()}

    def __call__(self, x: Tensor, *conditions: Tensor) -> Tensor:
        """The prepared copy on (N, C, H, W), in its dtype; `network` itself where `why_not_prepared` says so."""
        if not len(x) or why_not_prepared(self.network) is not None:
            return self.network(x, *conditions)
        with ordinary_tensors(x.device), on_device(x.device):
            network = self.get()
            x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
            self.measure((bucket(len(x)), *x.shape[1:]), lambda: network(x, *conditions))
            return network(x, *conditions)
