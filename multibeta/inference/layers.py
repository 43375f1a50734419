"""Layers prepared for inference: weights packed for the CPU or channels-last, sums left to whoever reads them."""

from __future__ import annotations

import logging
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from multibeta.blocks import Conv2d, FeatureMap, Sum, value
from multibeta.kernels import probes

logger = logging.getLogger("multibeta")

PACKED_DTYPES = (torch.float32, torch.bfloat16)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` multiplies it faster than float32 (CUDA since Ampere, AMX, AVX512-BF16), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_instruction = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_instruction else torch.float32


@probes.probe
def why_not_packed() -> str | None:
    """Why weights cannot be packed for the CPU, or None where they can: learned by packing and running one layer of each type."""
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


def packs(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether weights are packed on `device` in `dtype`: on a CPU where oneDNN can."""
    return device.type == "cpu" and dtype in PACKED_DTYPES and why_not_packed() is None


def geometry_of(conv: nn.Conv2d) -> tuple[_size_2_t, _size_2_t, str | _size_2_t, _size_2_t, int]:
    """Kernel size, stride, padding, dilation and groups, as `nn.Conv2d` takes them."""
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return cast("tuple[_size_2_t, _size_2_t, str | _size_2_t, _size_2_t, int]", geometry)


class PackedConv2d(nn.Module):
    """A convolution (N, C, H, W) to (N, O, H', W') on the CPU whose weight lies as oneDNN wants it; the sum is part of the pass.

    PyTorch lays the weight out anew at every call: 844 MB of bfloat16 for the 256 x 256 U-Net.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
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
        self.weight = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight, *self.geometry, shape)

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

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
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
    ) -> None:
        in_channels, bias, self.defers = in_channels or conv.in_channels, bias and conv.bias is not None, defers
        # on meta, which draws no random numbers
        super().__init__(in_channels, conv.out_channels, *geometry_of(conv), bias=bias, device="meta")
        for name, parameter in list(self.named_parameters()):
            zeros = torch.zeros(parameter.shape, dtype=dtype, device=conv.weight.device)
            zeros = zeros.contiguous(memory_format=torch.channels_last) if name == "weight" else zeros
            setattr(self, name, nn.Parameter(zeros, requires_grad=False))
        self.load(conv, dtype)

    def load(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        """Take the weights of `conv`; input channels beyond its own keep weight zero."""
        self.weight[:, : conv.weight.shape[1]].copy_(conv.weight.detach())
        if self.bias is not None:
            assert conv.bias is not None, "it had one"
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

    def __init__(self, conv: nn.Conv2d, channels: int, dtype: torch.dtype, pack: bool) -> None:
        super().__init__()
        self.channels = channels
        layer = PackedConv2d if pack else PointwiseConv2d
        self.first, self.second = (layer(part, dtype) for part in self._parts(conv))

    def _parts(self, conv: nn.Conv2d) -> list[nn.Conv2d]:
        parts = []
        for weight, bias in ((conv.weight[:, : self.channels], conv.bias), (conv.weight[:, self.channels :], None)):
            part = nn.Conv2d(weight.shape[1], conv.out_channels, *geometry_of(conv), bias=bias is not None, device="meta")
            part.weight = nn.Parameter(weight.detach(), requires_grad=False)
            part.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
            parts.append(part)
        return parts

    def load(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        """Take the weights of `conv`."""
        for mine, part in zip((self.first, self.second), self._parts(conv), strict=True):
            mine.load(part, dtype)

    def forward(self, x: FeatureMap, beside: FeatureMap) -> Tensor:
        return self.second(value(beside), self.first(value(x)))
