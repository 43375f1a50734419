"""What the GPU protocol launches of the Triton kernels, compiled for an H100 without having one.

    python bench/compile_ahead.py runs/cache                              # here, with the Triton of the machine that has the GPU
    python bench/gpu_protocol.py --results runs/gpu --cache runs/cache    # there

Triton names a kernel by its source, its arguments, its target and its own files. So the folder serves any machine of that target
with the same release of Triton for Linux, wherever it lies (see `gpu_protocol.use_cache`); for any other it is passed over. What
Triton compiles to launch a kernel, a C stub for each signature, is not in it.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from common import agreement, layers
from common.calls import norm_call
from common.compilation import compiling
from common.networks import PRESETS
from multibeta import ops

Call = tuple[Callable, tuple, dict, bool]


def protocol_calls() -> Iterator[Call]:
    """Calls of the stages `norms` and `correctness` in bfloat16, on the CPU: (function, arguments, keywords, with gradients).

    Batches are of 1 and 2: kernels do not know how many samples there are beyond one.
    """
    recipe, cpu, dtype = PRESETS["celebahq256"], torch.device("cpu"), torch.bfloat16
    networks = layers.unet_layers(recipe) + layers.decoder_layers(recipe)
    norms = layers.of_type(networks, layers.Norm)
    for op in ops.all_ops():
        for kernel in (kernel for kernel in op.kernels if kernel.backend == "triton"):
            for batch, norm in itertools.product((1, 2), norms if op.name == "group_norm_act" else ()):
                form = {"activation": norm.activation, "shifted": norm.shifted}
                shape = (batch, norm.channels, norm.height, norm.width)
                yield kernel.function, *norm_call(shape, norm.groups, cpu, dtype, **form), False
            for case in agreement.cases(op, networks, cpu, (dtype,)):
                yield kernel.function, case.args, case.kwargs, case.gradients


def fill(folder: Path, calls: Iterable[Call], capability: int = 90) -> tuple[int, int]:
    """Compile what the calls launch into `folder`; returns how many kernels lie there and how many calls a kernel refused."""
    os.environ["TRITON_CACHE_DIR"] = str((folder / "triton").resolve())
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    refused = 0
    for function, args, kwargs, gradients in calls:
        with compiling(capability):
            try:
                agreement.outcome(function, args, kwargs, gradients)
            except (RuntimeError, ValueError):  # what kernels that do not serve a call raise, asked directly
                refused += 1
    return len(list((folder / "triton").glob("*/*.cubin"))), refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made where it is missing; what lies there is kept")
    folder = parser.parse_args().folder
    kernels, refused = fill(folder, protocol_calls())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    print(f"{kernels} kernels for sm_90, {size:.0f} MiB, in {folder}; {refused} calls refused")


if __name__ == "__main__":
    main()
