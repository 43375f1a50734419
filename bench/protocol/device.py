"""What is this device: its fast paths, and what it reaches on a product, on copies and per node of a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common import calls, layers, measure
from common.stages import Run
from multibeta import environment


def facts(run: Run) -> None:
    """Fast paths, what PyTorch prefers for attention."""
    for path in environment.fast_paths():
        run.record(fast_path=path.name, on=path.on, reason=path.reason)
    if not run.cuda:
        return
    for layer in layers.of_type(layers.unet_layers(run.recipe), layers.Attention):
        query, key, value = calls.attention_call((8, layer.length, layer.heads, layer.head_dim), run.device, run.dtype)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        choice = torch._fused_sdp_choice(query, key, value)  # pyright: ignore[reportPrivateImportUsage]
        run.record(what=str(layer), sdpa_choice=torch.nn.attention.SDPBackend(choice).name)
    run.record(flash_implementations=getattr(torch.nn.attention, "list_flash_attention_impls", list)())


def ceilings(run: Run) -> None:
    """What this device reaches on a large product, on copies within and beyond the L2 cache, and per node of a graph."""
    run.record(gemm_tflops=measure.gemm_ceiling(run.device, run.dtype))
    run.record(copy_gb_s=measure.copy_ceiling(run.device))
    for mebibytes in (4, 8, 16):  # source and target together: 8, 16 and 32
        run.record(copy_mib=2 * mebibytes, within_cache_gb_s=measure.copy_ceiling(run.device, mebibytes))
    one, nodes = torch.zeros(1, device=run.device), 1000
    chain = (measure.replayed if run.cuda else measure.repeated)(lambda: one.add_(1), nodes)
    times = measure.interleaved({"chain": chain}, run.device, repetitions=run.repetitions)
    run.record(microseconds_a_node=times["chain"]["median_ms"] * 1e3 / nodes)
    size = 64 if run.small else 8192
    run.compare(f"product of {size}^3", 1, fp8_arms(run, size, size, size)[0], flop=2 * size**3)


def fp8_arms(run: Run, rows: int, inner: int, columns: int) -> tuple[dict[str, Callable], float | None]:
    """A product by the fast dtype and by fp8 with a scale per tensor, and the relative error of the second."""
    x, weight = random_like(run, rows, inner), random_like(run, columns, inner)
    arms: dict[str, Callable] = {str(run.dtype).removeprefix("torch."): partial(F.linear, x, weight)}
    if not run.cuda:
        run.record(what=f"fp8 {rows}x{inner}x{columns}", arm="fp8", error="needs CUDA")
        return arms, None
    scales = [tensor.abs().max().float() / 448 for tensor in (x, weight)]
    low, low_weight = ((tensor / scale).to(torch.float8_e4m3fn) for tensor, scale in zip((x, weight), scales, strict=True))
    product = partial(
        torch._scaled_mm,  # pyright: ignore[reportPrivateImportUsage]
        low,
        low_weight.t(),
        scale_a=scales[0],
        scale_b=scales[1],
        out_dtype=run.dtype,
        use_fast_accum=True,
    )
    arms["fp8"] = product
    expected, error = F.linear(x.float(), weight.float()), None
    with contextlib.suppress(RuntimeError):  # which `compare` reports
        error = float((product().float() - expected).norm() / expected.norm())
    return arms, error


def random_like(run: Run, *shape: int) -> Tensor:
    """A random tensor in the fast dtype, channels-last where it is a map."""
    x = torch.randn(shape, device=run.device).to(run.dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x
