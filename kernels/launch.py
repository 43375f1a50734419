"""What the Triton kernels share at launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def device_reason(x: Tensor) -> str | None:
    """Why Triton cannot run where `x` lies, or None: it needs CUDA, or any device under its interpreter."""
    if x.is_cuda or triton.knobs.runtime.interpret:
        return None
    return f"x is on {x.device.type}, Triton needs a CUDA device"
