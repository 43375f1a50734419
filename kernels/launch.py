"""What the Triton kernels share at launch: operators, and what the device is asked."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from triton import knobs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("multibeta", "FRAGMENT")


def define(schema: str, function: Callable, fake: Callable | None = None) -> torch._ops.OpOverload:
    """The operator `multibeta::<schema>`, served by `function` and traced by `fake`; on the CPU too, for Triton's interpreter.

    A call takes 3 us before it reaches `function`, of a `torch.library.custom_op` 30.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for key in ("CUDA", "CPU"):
        _library.impl(name, function, key)
    if fake is not None:
        torch.library.register_fake(f"multibeta::{name}", fake, lib=_library)
    return getattr(torch.ops.multibeta, name).default


def device_reason(x: Tensor) -> str | None:
    """Why Triton cannot run where `x` lies, or None: it needs CUDA, or any device under its interpreter."""
    if x.is_cuda or knobs.runtime.interpret:
        return None
    return f"x is on {x.device.type}, Triton needs a CUDA device"


@functools.cache
def l2_bytes(device: torch.device) -> int | None:
    """Bytes of the L2 cache of a CUDA device, 50 MiB on an H100; None elsewhere."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else None
