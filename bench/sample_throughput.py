"""Sampling throughput: this library, its eager reference, and diffusers' UNet2DModel of the same shape, interleaved in one run.

    python bench/sample_throughput.py --preset celeba64 --batch 8
    python bench/sample_throughput.py --preset celebahq256 --batch 64 --device cuda --steps 1000 20
    python bench/sample_throughput.py --few-step scenes32 --batch 64

Every arm takes the same steps of `ode2` from the same noise. With --few-step a trained model with a flow map makes images in one
to four evaluations, beside its sampler in 20 and in 1000 and diffusers' U-Net of this shape with its best multistep scheduler.
Appends one JSON line to sample_throughput.jsonl, or few_steps.jsonl, in the folder that --results names.
"""

from __future__ import annotations

import functools

import torch

from common import few_steps, measure
from common.networks import PRESETS, unet_flops
from common.sampling import ARMS, build_arms, relative_errors, start, time_arms
from multibeta import distribution


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="celeba64", help="whose U-Net runs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=distribution.local_device().type)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of multibeta; by default the fastest")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:-2])
    parser.add_argument("--evaluations", type=int, default=3, help="evaluations of the network in one timed call")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="also time whole samplings of so many steps, once each")
    parser.add_argument("--check-steps", type=int, default=50, help="steps of ode2 after which latents are compared; 0 for none")
    parser.add_argument("--few-step", metavar="MODEL", help="a trained model with a flow map, in place of a preset")
    parser.add_argument("--num-images", type=int, default=0, help="with --few-step, on each side of a distance; 0 for none")
    arguments = parser.parse_args()
    device, batch = torch.device(arguments.device), arguments.batch
    config = PRESETS[arguments.preset].diffusion
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None

    torch.backends.cudnn.benchmark = True  # for all arms alike: cuDNN keeps the first algorithm chosen for a shape
    if arguments.few_step:
        with measure.Monitor(device) as monitor:
            counts = {"repetitions": arguments.repetitions, "num_images": arguments.num_images}
            result = few_steps.measured(arguments.few_step, batch, device, dtype, **counts)
        measure.record(arguments.results, "few_steps.jsonl", {**result, "clocks": monitor.summary()})
        few_steps.report(result)
        return
    arms, needs, failed = build_arms(arguments.arms, config, batch, device, dtype)
    with measure.Monitor(device) as monitor:
        ceiling = measure.gemm_ceiling(device, torch.bfloat16)
        counts = {"evaluations": arguments.evaluations, "repetitions": arguments.repetitions}
        rows = time_arms(arms, config, batch, device, ceiling, **counts)
    for row in rows:
        arm = functools.partial(arms[row["arm"]], *start(config, batch, device))
        row |= needs[row["arm"]]
        row["whole_seconds"] = {n: measure.seconds(functools.partial(arm, n), device) for n in arguments.steps}
    result = {
        "preset": arguments.preset,
        "batch": batch,
        "gflop_per_evaluation": unet_flops(config) * batch / 1e9,
        "clocks": monitor.summary(),
        "arms": rows,
        "failed": failed,
        "engine": {name: arm.engine.explain().splitlines() for name, arm in arms.items() if hasattr(arm, "engine")},
    }
    if arguments.check_steps and "reference-fp32" in arms:
        result["relative_error"] = relative_errors(arms, config, batch, device, arguments.check_steps)
    measure.record(arguments.results, "sample_throughput.jsonl", result)
    report(result)


def report(result: dict) -> None:
    """The table."""
    print(f"{result['preset']}, batch {result['batch']}: {result['gflop_per_evaluation']:.1f} GFLOP an evaluation")
    for name, reason in result["failed"].items():
        print(f"{name}: {reason}")
    measure.tell_missing_packages()
    if not result["arms"]:
        return
    base = result["arms"][0]["median_ms"]
    print(f"{'arm':20s} {'ms/evaluation':>14s} {'p10-p90':>16s} {'speed-up':>9s} {'img/s @1000':>12s} {'@20':>8s} {'MFU':>6s}")
    for row in result["arms"]:
        times, gain = "{median_ms:14.2f} {p10_ms:7.2f}-{p90_ms:8.2f}".format(**row), base / row["median_ms"]
        print(
            f"{row['arm']:20s} {times} {gain:8.2f}x "
            f"{row['images_per_second_1000']:12.4f} {row['images_per_second_20']:8.2f} {row['mfu']:6.1%}"
        )
    for name, error in result.get("relative_error", {}).items():
        print(f"{name}: relative error of the final latents against the reference {error:.2e}")


if __name__ == "__main__":
    main()
