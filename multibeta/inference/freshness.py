"""The one rule that decides whether what was made of weights (prepared copies, packed layers) is still of the weights of now."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


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

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._marks = [self._mark(tensor) for tensor in tensors]
        self._dense = [self._is_dense(tensor) for tensor in tensors]  # for as long as the marks hold
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

    @staticmethod
    def _is_dense(tensor: Tensor) -> bool:
        return tensor.is_contiguous() or tensor.is_contiguous(memory_format=_layout(tensor))

    def _sample(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sampled values, side by side for tensors of one dtype on one device: one comparison serves them all."""
        alike: dict[tuple, list[Tensor]] = {}
        for tensor, dense in zip(tensors, self._dense, strict=True):
            filled = tensor if dense else tensor.contiguous()
            alike.setdefault((tensor.dtype, tensor.device), []).append(filled.as_strided(*_sampled(filled.numel())))
        return [samples[0] if len(samples) == 1 else torch.cat(samples) for samples in alike.values()]


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


@functools.cache
def _sampled(numel: int) -> tuple[tuple[int], tuple[int]]:
    """Size and stride of the samples of so many values.

    The stride is the longest that stays inside and shares no divisor with `numel`: others would meet one tap of every filter.
    """
    longest = max(numel // Snapshot.SAMPLED, 1)
    step = next(step for step in range(longest, 0, -1) if math.gcd(step, numel) == 1)
    return (min(Snapshot.SAMPLED, numel),), (step,)


def structure_and_weights(network: nn.Module) -> tuple[list[tuple], list[Tensor]]:
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
