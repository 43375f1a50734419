"""Compile the Triton kernels for NVIDIA GPUs without having one: registers, spills, widths and number of memory accesses.

    python bench/aot.py                       # every example configuration, for sm_80, sm_90 and sm_100
    python bench/aot.py --results runs/aot    # the same, kept in aot_kernels.json, which holds the rows of each version of Triton

The operators themselves run, on CPU tensors, with compilation in place of each launch: what is compiled is what a launch with the
same shapes, dtypes, strides and alignments would be.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.compiler import CompiledKernel

from common import measure
from common.compilation import compiling
from multibeta.kernels import group_norm_act, sampler_update
from multibeta.kernels.columns import ONE_HEAD_COLUMNS, SAMPLER_COLUMNS, TWO_HEAD_COLUMNS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """What a thread holds and how it reads and writes global memory.

    Returns:
        registers; stack_bytes; spill_bytes, the stack beyond the arrays that the program itself declares; shared_bytes;
        load_bits and store_bits, the widths of the accesses that move most; narrow_loads, the load instructions that move less
        than 128 bits.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", cubin.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", output)}
    ptx, stack = kernel.asm["ptx"], usage["STACK"] + usage["LOCAL"]
    arrays = sum(int(size) for size in re.findall(r"\.local \.align \d+ \.b8\s+__local_depot\d+\[(\d+)\]", ptx))

    def widths(instruction: str) -> Counter:
        accesses = re.findall(rf"{instruction}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
        return Counter(int(vector or 1) * int(word) for vector, word in accesses)

    def widest_traffic(counts: Counter) -> int:
        return max(counts, key=lambda bits: bits * counts[bits])

    loads = widths("ld")
    return {
        "registers": usage["REG"],
        "stack_bytes": stack,
        "spill_bytes": max(stack - triton.cdiv(arrays, 8) * 8, 0),  # the stack grows by 8 bytes
        "shared_bytes": usage["SHARED"],
        "load_bits": widest_traffic(loads),
        "store_bits": widest_traffic(widths("st")),
        "narrow_loads": sum(count for bits, count in loads.items() if bits < 128),
    }


def group_norm_act_rows(
    shape: tuple[int, int], dtype: torch.dtype, capability: int, *, groups: int = 32, layout: str = "channels_last"
) -> list[dict]:
    """One row for each kernel that `group_norm_act` launches, at its fullest: all sums and SiLU, forward, backward, inference.

    Args:
        shape: Channels and pixels; as nearly square as they go.
    """
    channels, pixels = shape
    height = next(h for h in range(int(pixels**0.5), 0, -1) if pixels % h == 0)
    x = torch.empty(1, channels, height, pixels // height, dtype=dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    affine, shift, statistics = x.new_empty(channels), x.new_empty(1, channels), torch.empty(1, groups)
    norm = (affine, affine, groups, 1e-6, shift)
    rows = []
    for use, call in (
        ("training", lambda: group_norm_act.forward(x, *norm, x, "silu")),
        ("training", lambda: group_norm_act.backward(x, x, affine, affine, statistics, statistics, shift, "silu")),
        ("inference", lambda: group_norm_act.infer(x, None, *norm, "silu")),
        ("sum_inference", lambda: group_norm_act.infer_sum(x, None, *norm, affine, x, "silu")),
    ):
        rows += _rows(call, capability, channels=channels, pixels=pixels, dtype=dtype, layout=layout, use=use)
    return rows


def group_norm_act_pair_rows(shape: tuple[int, int], dtype: torch.dtype, capability: int, *, groups: int = 32) -> list[dict]:
    """One row for each kernel that normalises two tensors joined in channels, channels-last, the first with all sums.

    Args:
        shape: Channels and pixels of either.
    """
    channels, pixels = shape
    x = torch.empty(1, channels, pixels, 1, dtype=dtype, memory_format=torch.channels_last)
    affine, shift = x.new_empty(2 * channels), x.new_empty(1, 2 * channels)
    call = (x, x, affine, affine, 2 * groups, 1e-6, shift, affine[:channels], x, "silu")
    description = {"channels": channels, "pixels": pixels, "dtype": dtype, "layout": "channels_last", "use": "pair"}
    return _rows(lambda: group_norm_act.infer_sum(*call), capability, **description)


def _rows(call: Callable[[], object], capability: int, **description: object) -> list[dict]:
    """The kernels that a call launches, each with the description of the call."""
    if "dtype" in description:
        description["dtype"] = str(description["dtype"]).removeprefix("torch.")
    with compiling(capability) as compiled:
        call()
    return [
        {**description, "kernel": name, "target": f"sm_{capability}", "warps": kernel.metadata.num_warps, **resources(kernel)}
        for name, kernel in compiled
    ]


def sampler_rows(
    samples: int, shape: tuple[int, int, int], capability: int, *, per_channel: bool = False, heads: int = 2
) -> list[dict]:
    """One row each for `sampler_update` with history and `sampler_step`, on the heads of a channels-last bfloat16 output.

    Args:
        per_channel: Whether each channel has coefficients of its own, or all share one row.
        heads: Of the network that `sampler_step` follows; with one it takes a condition.
    """
    latent = torch.zeros(samples, *shape)
    output = torch.empty(samples, 2 * shape[0], *shape[1:], dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    (noise, delta), seeds = output.chunk(2, dim=1), torch.zeros(samples, dtype=torch.int64)
    row = torch.zeros(shape[0], SAMPLER_COLUMNS) if per_channel else torch.zeros(SAMPLER_COLUMNS)
    columns = TWO_HEAD_COLUMNS if heads == 2 else ONE_HEAD_COLUMNS
    tables = (row[None], torch.zeros(1, shape[0], columns), torch.zeros(1, dtype=torch.int64))
    network_input = torch.empty_like(noise, memory_format=torch.channels_last)
    step = (latent, network_input, torch.stack([latent, latent]), output if heads == 2 else noise, *tables)
    call = {"samples": samples, "channels": shape[0], "pixels": shape[1] * shape[2], "per_channel": per_channel, "heads": heads}

    def both() -> None:
        sampler_update.sampler_update(latent, noise, delta, row, seeds, 7, previous=(noise, delta))
        sampler_update.sampler_step(*step, torch.zeros(1).long(), seeds, latent if heads == 1 else None)

    rows = _rows(both, capability, **call)
    return [{**row, "kernel": f"sampler_{row['kernel']}"} for row in rows]


def all_rows(targets: list[int]) -> list[dict]:
    """Every example configuration for sm_90; for other targets channels-last bfloat16, which the library runs."""
    rows = []
    for capability in targets:
        forms = [("channels_last", torch.bfloat16)]
        if capability == 90:
            forms += [("channels_last", torch.float32), ("contiguous", torch.bfloat16), ("contiguous", torch.float32)]
        for layout, dtype in forms:
            for shape in group_norm_act.EXAMPLES:
                rows += group_norm_act_rows(shape, dtype, capability, layout=layout)
        for per_channel in (False, True):
            rows += sampler_rows(8, (4, 32, 32), capability, per_channel=per_channel)
            rows += sampler_rows(8, (3, 128, 128), capability, per_channel=per_channel, heads=1)
    return rows


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100])
    options = parser.parse_args()
    rows = all_rows(options.targets)
    if options.results is not None:
        keep(rows, options.results)
    for row in rows:
        print(json.dumps(row))
    spilling = [row for row in rows if row["spill_bytes"]]
    print(f"Triton {triton.__version__}: {len(rows)} kernels, {len(spilling)} of them spill")
    for row in spilling:
        print(row)


def keep(rows: list[dict], folder: Path) -> None:
    """Write the rows of this version of Triton to aot_kernels.json in `folder`, next to those of others."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "aot_kernels.json"
    by_version = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    by_version[triton.__version__] = rows
    tables = (f'"{version}": [\n' + ",\n".join(map(json.dumps, by_version[version])) + "\n]" for version in sorted(by_version))
    output.write_text("{" + ",\n".join(tables) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
