"""Every registered op: each kernel that accepts the call, the eager reference and torch.compile of it, interleaved in one run.

    python bench/op_speed.py --ops group_norm_act attention --dtypes bfloat16 float32

Appends one JSON line for each call to op_speed.jsonl in the folder that --results names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from common import measure
from common.calls import arms, bytes_moved, calls
from multibeta import distribution, ops


def with_backward(function: Callable[[], Tensor]) -> Callable[[], None]:
    """The call and the gradients of all its inputs."""

    def run() -> None:
        y = function()
        y.backward(y.detach())

    return run


def compared(times: dict[str, dict]) -> str:
    """Each arm and how it compares with the reference, in one line."""
    base = times["reference"].get("median_ms", float("nan"))
    texts = [t.get("error") or f"{t['median_ms']:.3f} ms ({base / t['median_ms']:.1f}x)" for t in times.values()]
    return ", ".join(f"{arm} {text}" for arm, text in zip(times, texts, strict=True))


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--ops", nargs="+", choices=[op.name for op in ops.all_ops()], default=[op.name for op in ops.all_ops()])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=distribution.local_device().type)
    parser.add_argument("--backward", action="store_true", help="time the call and its gradients")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--repetitions", type=int, default=30)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    measure.tell_missing_packages()
    for name in arguments.ops:
        op = ops.find(name)
        for dtype in arguments.dtypes:
            for label, args, kwargs in calls(name, device, getattr(torch, dtype), arguments.backward):
                able: Mapping[str, Callable[[], object]]
                able, unable = arms(op, args, kwargs, arguments.compile)
                if arguments.backward:
                    able = {arm: with_backward(function) for arm, function in able.items()}
                time = measure.interleaved if arguments.backward else measure.kernel_times  # autograd is not captured
                times = time(able, device, repetitions=arguments.repetitions)
                moved = bytes_moved(name, args, kwargs)
                facts = {"op": name, "call": label, "dtype": dtype, "backward": arguments.backward, "bytes": moved}
                measure.record(arguments.results, "op_speed.jsonl", {**facts, "arms": times, "declined": unable})
                print(f"{name} {label} {dtype}{' + gradients' if arguments.backward else ''}: {compared(times)}", flush=True)


if __name__ == "__main__":
    main()
