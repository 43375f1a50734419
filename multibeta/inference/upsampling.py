"""Upsampling folded into its convolution, in the form that suits the size of its input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multibeta import ops
from multibeta.blocks import FeatureMap, Sum, Upsample, value
from multibeta.inference.layers import DenseConv2d, prepare_conv

FOLDED_FROM = 64  # pixels of the input of an upsampling: on smaller ones four small convolutions cost more than they save


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

    def __init__(self, upsample: Upsample, dtype: torch.dtype, pack: bool, defers: bool = False) -> None:
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
        assert isinstance(conv, DenseConv2d), "packed, it adds its own"
        phases = conv._conv_forward(value(x), conv.weight, None)
        return Sum(phases_to_pixels(phases), conv.bias[: len(conv.bias) // 4], None)


class TransposedUpsample(nn.Module):
    """`blocks.Upsample` as one 4x4 transposed convolution of stride 2. Shapes: (N, C, H, W) to (N, C, 2 H, 2 W)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, upsample: Upsample, dtype: torch.dtype, defers: bool = False) -> None:
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
            assert upsample.conv.bias is not None, "it had one"
            self.bias.copy_(upsample.conv.bias.detach())

    def forward(self, x: FeatureMap) -> FeatureMap:
        if not self.defers or self.bias is None:
            return F.conv_transpose2d(value(x), self.weight, self.bias, stride=2, padding=1)
        return Sum(F.conv_transpose2d(value(x), self.weight, stride=2, padding=1), self.bias, None)


class PlainUpsample(nn.Module):
    """`blocks.Upsample` as it is, on a prepared convolution."""

    def __init__(self, upsample: Upsample, dtype: torch.dtype, pack: bool, defers: bool = False) -> None:
        super().__init__()
        self.conv = prepare_conv(upsample.conv, dtype, pack, defers=defers)

    def load(self, upsample: Upsample, dtype: torch.dtype) -> None:
        """Take the weights of `upsample`."""
        self.conv.load(upsample.conv, dtype)

    def forward(self, x: FeatureMap) -> FeatureMap:
        return self.conv(F.interpolate(value(x), scale_factor=2.0, mode="nearest"))


Form = PlainUpsample | FoldedUpsample | TransposedUpsample


def bucket(count: int) -> int:
    """The batch that stands for `count` samples where one is prepared for many: the next power of two."""
    return 1 << (count - 1).bit_length()


class MeasuredUpsample(nn.Module):
    """`blocks.Upsample` in the form that `measure` chose for the size of its input; plain for a size it has not seen.

    The forms round differently. On CUDA the fastest is taken; on the CPU, and where `torch.use_deterministic_algorithms` is on,
    no clock decides but the size alone, so that a seed draws the same images in every process.
    """

    def __init__(self, upsample: Upsample, dtype: torch.dtype, pack: bool, defers: bool = False) -> None:
        super().__init__()
        self.dtype, self.pack, self.defers = dtype, pack, defers
        self.forms = nn.ModuleDict({"plain": PlainUpsample(upsample, dtype, pack, defers)})
        self.choices: dict[tuple[int, ...], str] = {}

    def load(self, upsample: Upsample, dtype: torch.dtype) -> None:
        """Take the weights of `upsample`."""
        for form in self.forms.values():
            cast("Form", form).load(upsample, dtype)

    @staticmethod
    def _size(x: FeatureMap) -> tuple[int, ...]:
        return bucket(x.shape[0]), *x.shape[2:]

    def forward(self, x: FeatureMap) -> FeatureMap:
        return self.forms[self.choices.get(self._size(x), "plain")](x)

    def _form(self, name: str, upsample: Upsample) -> Form:
        if name in self.forms:
            return cast("Form", self.forms[name])
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


@torch.no_grad()
def choose_upsampling(prepared: nn.Module, network: nn.Module, run: Callable[[], object]) -> dict[str, str]:
    """Give each upsampling the form that suits the input it sees when `run` runs `prepared`.

    Returns:
        The choice and its reason, for each layer by name.
    """
    inputs: dict[str, Tensor] = {}

    def keeps_input(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: inputs.__setitem__(name, value(args[0]))

    layers = {name: module for name, module in prepared.named_modules() if isinstance(module, MeasuredUpsample)}
    hooks = [layer.register_forward_pre_hook(keeps_input(name)) for name, layer in layers.items()]
    run()
    for hook in hooks:
        hook.remove()
    return {name: layers[name].measure(x, cast("Upsample", network.get_submodule(name))) for name, x in inputs.items()}
