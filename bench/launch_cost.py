"""What Python takes before a kernel is launched: eager calls of the ops that Triton serves, with every launch an empty function.

    python bench/launch_cost.py

Without a CUDA device the tensors lie on the CPU, as Triton's interpreter takes them. Prints microseconds a call and appends one
JSON line to launch_cost.jsonl in the folder that --results names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import triton  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from common import measure  # noqa: E402
from multibeta import ops  # noqa: E402

NORMS = {  # (N, C, H, W) and groups; small, so that a CPU's allocator counts as little as CUDA's
    "one-pass": ((2, 256, 8, 8), 32),
    "split": ((2, 9, 5, 7), 3),  # rows of groups that are less than a sector
}


@contextmanager
def launching_nothing() -> Iterator[list]:
    """Launches do nothing but count themselves, in the list that is yielded."""
    types: tuple[Any, ...] = (JITFunction, InterpretedFunction)
    launches = []
    runs = [launcher.run for launcher in types]
    for launcher in types:
        launcher.run = lambda self, *args, **kwargs: launches.append(None)
    try:
        yield launches
    finally:
        for launcher, run in zip(types, runs, strict=True):
            launcher.run = run


def norm_arguments(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, bias and shift."""
    x = torch.randn(shape, device=DEVICE).to(torch.bfloat16, memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1], device=DEVICE).to(x)
    return x, weight, bias, torch.randn(shape[:2], device=DEVICE).to(x)


def norms(shape: tuple[int, ...], groups: int) -> dict[str, Callable[[], object]]:
    """The forms of one norm, of inference and of training."""
    x, weight, bias, shift = norm_arguments(shape)
    trained_x, trained_weight, trained_bias = trained = [t.clone().requires_grad_() for t in (x, weight, bias)]

    def inference(**sums: Any) -> Callable[[], object]:
        return lambda: ops.group_norm_act(x, weight, bias, groups, shift=shift, activation="silu", **sums)

    def training() -> None:
        y = ops.group_norm_act(trained_x, trained_weight, trained_bias, groups, shift=shift, activation="silu")
        torch.autograd.grad(y, trained, x)

    return {"": inference(), ", x_bias and residual": inference(x_bias=bias, residual=x), ", with backward": training}


def pairs() -> dict[str, Callable[[], object]]:
    """A norm of two halves."""
    shape, groups = NORMS["one-pass"]
    x, weight, bias, shift = norm_arguments((shape[0], 2 * shape[1], *shape[2:]))
    first, second = (half.contiguous(memory_format=torch.channels_last) for half in x.chunk(2, dim=1))
    sums = {"x_bias": bias[: shape[1]], "residual": first}

    def inference(**sums: Any) -> Callable[[], object]:
        return lambda: ops.group_norm_act_pair(first, second, weight, bias, groups, shift=shift, activation="silu", **sums)

    return {"pair": inference(), "pair, x_bias and residual": inference(**sums)}


def samplers() -> dict[str, Callable[[], object]]:
    """The sampler's step, in place and not."""
    arguments, _ = next(iter(ops.find("sampler_step").examples()))
    step = [a.to(DEVICE) for a in arguments]
    (*tensors, row, seeds, index), keywords = next(iter(ops.find("sampler_update").examples()))
    latent, noise, delta = (t.to(DEVICE) for t in tensors)
    previous = tuple(t.to(DEVICE) for t in keywords["previous"])
    seeds = seeds.to(DEVICE)
    return {
        "sampler_step": lambda: ops.sampler_step(*step),
        "sampler_update": lambda: ops.sampler_update(latent, noise, delta, row, seeds, index, previous=previous),
    }


def microseconds(function: Callable[[], object], calls: int) -> float:
    """Processor time of one call, the mean of so many: what else runs on the machine counts little."""
    start = time.process_time()
    for _ in range(calls):
        function()
    return 1e6 * (time.process_time() - start) / calls


def measured(repetitions: int, calls: int) -> dict[str, dict]:
    """For each form of call its microseconds, median and spread over `repetitions` of so many calls, forms in turn; and its
    launches. What no kernel serves has the reason instead."""
    forms = {f"{path}{form}": call for path, norm in NORMS.items() for form, call in norms(*norm).items()}
    forms |= pairs() | samplers()
    rows, times = {}, {}
    with launching_nothing() as launches, ops.backend("triton"):
        for name, call in forms.items():
            try:
                microseconds(call, 20)
            except RuntimeError as error:
                rows[name] = {"error": measure.one_line(error)}
                continue
            launches.clear()
            call()
            rows[name], times[name] = {"launches": len(launches)}, []
        for _ in range(repetitions):
            for name in times:
                times[name].append(microseconds(forms[name], calls))
    for name, values in times.items():
        rows[name] |= {key.replace("_ms", "_us"): value for key, value in measure.summary(values).items()}
    return rows


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--calls", type=int, default=100, help="in a repetition")
    parser.add_argument("--label", default="", help="goes with the record")
    options = parser.parse_args()
    rows = measured(options.repetitions, options.calls)
    print(f"Processor time of an eager call with its launches stubbed, tensors on the {DEVICE}, Triton {triton.__version__}")
    print(f"{'call':36s}{'median us':>9s}   p10 to p90   launches")
    for name, row in rows.items():
        text = "{median_us:9.1f}   {p10_us:.1f} to {p90_us:.1f}   {launches}"
        print(f"{name:36s}{row.get('error') or text.format(**row)}")
    result = {"label": options.label, "device": DEVICE, "triton": triton.__version__, "calls": rows}
    measure.record(options.results, "launch_cost.jsonl", result)


if __name__ == "__main__":
    main()
