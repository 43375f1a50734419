"""Floating point operations of a training: counted once, they tell from the seconds of a step how well the device is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Dense peak per second of one GPU by data type, as its maker gives it, by a part of its name.
PEAKS = {
    "H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "H100 NVL": {"bf16": 835e12, "fp32": 60e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp32": 91.6e12},
}
TF32_PEAKS = {"H100 PCIe": 378e12, "H100 NVL": 418e12, "H100": 495e12, "H200": 495e12, "A100": 156e12, "L40S": 183e12}


def _attention(query: Tensor, key: Tensor, *others: Any, **options: Any) -> int:
    return 4 * query.numel() * key.shape[-2]  # two products


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, *others: Any, **options: Any) -> int:
    return 5 * _attention(query, key) // 2  # five, as of the attention that torch knows


_ATTENTION = {  # of which torch knows no formula
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_counting: ContextVar[Counter | None] = ContextVar("counting", default=None)


class Counter(TorchDispatchMode):
    """While it is active, counts operations of products, convolutions and attention, forward and backward.

    A multiplication and addition are 2, by the formulas of torch's `FlopCounterMode`, whose hooks on modules do not bear
    `torch.autograd.grad`. Those of activations that are computed again are no part of the model's, and left out.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # brings Triton along

        super().__init__()
        self.formulas, self.total = {**flop_registry, **_ATTENTION}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (formula := self.formulas.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result

    @contextlib.contextmanager
    def leaving_out(self) -> Iterator[None]:
        """In a `with` block what is computed does not count."""
        before = self.total
        try:
            yield
        finally:
            self.total = before


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Count what a `with` block computes; what torch.compile would run is run eagerly meanwhile."""
    with Counter() as counter:
        token = _counting.set(counter)
        try:
            yield counter
        finally:
            _counting.reset(token)


def uncounted() -> contextlib.AbstractContextManager:
    """What is computed in a `with` block, maybe later and by another thread, does not count in what is `counted` now."""
    counter = _counting.get()
    return contextlib.nullcontext() if counter is None else counter.leaving_out()


def peak_of(device: torch.device, precision: str) -> float | None:
    """Dense peak of a device, operations a second: of "bf16", or of "fp32", that of TF32 if convolutions may use it; or None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = next((part for part in PEAKS if all(word in name for word in part.split())), None)
    if known is None:
        return None
    return TF32_PEAKS[known] if precision == "fp32" and torch.backends.cudnn.allow_tf32 else PEAKS[known][precision]
