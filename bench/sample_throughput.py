"""Sampling throughput: this library, its eager reference, and diffusers' UNet2DModel of the same shape, interleaved in one run.

    python bench/sample_throughput.py --preset celeba64 --batch 8
    python bench/sample_throughput.py --preset celebahq256 --batch 64 --device cuda --steps 1000 20

Every arm walks the same rows of `ode2` from the same noise. Appends one JSON line to bench/results/sample_throughput.jsonl.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import measure
import peers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import multibeta
from multibeta import environment, recipes
from multibeta.nonlinear_diffusion import DiffusionConfig, sampler_rows
from multibeta.sampling import Engine, EngineOptions, sample

SIGMAS = torch.linspace(0.05, 1, 1001)
HEAD_ROW = torch.tensor([1.0, 0, 0, 1e-3, 1, 0])  # noise_prediction is the first head, delta a thousandth of the second
ARMS = (
    "reference-fp32",
    "diffusers-fp32",
    "diffusers-bf16",
    "diffusers-compile",
    "multibeta-fp32",
    "multibeta",
    "multibeta-compile",
)
Walk = Callable[[Tensor, Tensor, int], Tensor]


def plain(network: nn.Module, dtype: torch.dtype, head: Callable, context: Callable = lambda: torch.no_grad()) -> Walk:
    """The plain loop on `network`, whose output `head` takes from what it returns."""

    def walk(initial: Tensor, seeds: Tensor, steps: int) -> Tensor:
        def predict(latent: Tensor, step: int) -> tuple[Tensor, Tensor]:
            times = torch.full((len(latent),), float(step), device=latent.device)
            x = latent.to(dtype).contiguous(memory_format=torch.channels_last)
            first, second = head(network(x, times)).float().chunk(2, dim=1)
            return first, 1e-3 * second

        with context(), multibeta.backend("reference"):
            return sample(predict, sampler_rows(SIGMAS, "ode2", steps), initial, seeds)

    return walk


def engine(network: nn.Module, options: EngineOptions) -> Walk:
    """The engine on `network`."""
    runner = Engine(network, options)

    def walk(initial: Tensor, seeds: Tensor, steps: int) -> Tensor:
        rows = sampler_rows(SIGMAS, "ode2", steps)
        return runner.sample(rows, HEAD_ROW.expand(len(rows), initial.shape[1], 6), rows.steps.float(), initial, seeds)

    walk.engine = runner
    return walk


def build_arm(name: str, config: DiffusionConfig, device: torch.device, dtype: torch.dtype | None) -> Walk:
    """One of `ARMS`; `dtype` is that of multibeta's reduced precision, None for the engine's choice."""
    if name.startswith("diffusers"):
        network = peers.diffusers_unet(config).to(device)
        take = lambda output: output.sample  # noqa: E731
        if name == "diffusers-fp32":
            return plain(network, torch.float32, take)
        if name == "diffusers-compile" and device.type == "cpu":
            compiled = torch.compile(network.to(memory_format=torch.channels_last))
            return plain(compiled, torch.float32, take, lambda: _autocast(device))
        network = network.to(torch.bfloat16).to(memory_format=torch.channels_last)
        if name == "diffusers-compile":
            network = torch.compile(network, mode="max-autotune", fullgraph=True)
        return plain(network, torch.bfloat16, take)
    network = peers.build_unet(config).to(device)
    if name == "reference-fp32":
        return plain(network, torch.float32, lambda output: output)
    precision = torch.float32 if name == "multibeta-fp32" else dtype
    return engine(network, EngineOptions(dtype=precision, compile=name == "multibeta-compile"))


class _autocast(torch.autocast):
    """bfloat16 autocast without gradients."""

    def __init__(self, device: torch.device):
        super().__init__(device.type, dtype=torch.bfloat16)
        self.no_grad = torch.no_grad()

    def __enter__(self):
        self.no_grad.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.no_grad.__exit__(*exception)


def flops(config: DiffusionConfig) -> int:
    """Floating point operations of one evaluation of one sample, of the network as it is defined."""
    network = copy.deepcopy(peers.build_unet(config))
    latent = torch.zeros(1, config.latent_channels, config.latent_resolution, config.latent_resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), multibeta.backend("reference"):
        network(latent, torch.zeros(1))
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(recipes.RECIPES), default="celeba64", help="whose U-Net runs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=environment.device().type)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of multibeta; by default the fastest")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:-1])
    parser.add_argument("--evaluations", type=int, default=3, help="evaluations of the network in one timed call")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="also time whole samplings of so many steps, once each")
    parser.add_argument("--check-steps", type=int, default=50, help="steps of ode2 after which latents are compared; 0 for none")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    config = recipes.find(arguments.preset).diffusion
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None

    shape = (arguments.batch, config.latent_channels, config.latent_resolution, config.latent_resolution)
    initial = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    seeds = torch.arange(arguments.batch, device=device)
    arms = {name: build_arm(name, config, device, dtype) for name in arguments.arms}
    count = arguments.evaluations
    calls = {name: (lambda walk=walk: walk(initial, seeds, count)) for name, walk in arms.items()}
    with measure.Monitor(device) as monitor:
        ceiling = measure.gemm_ceiling(device, torch.bfloat16)
        times = measure.interleaved(calls, device, repetitions=arguments.repetitions)
    work = flops(config) * arguments.batch
    rows = []
    for name, timing in times.items():
        step_ms = timing["median_ms"] / count
        rows.append(
            {
                "arm": name,
                **{key: timing[key] / count for key in ("median_ms", "p10_ms", "p90_ms")},
                "images_per_second_1000": arguments.batch / step_ms,
                "images_per_second_20": arguments.batch / step_ms * 50,
                "mfu": work / step_ms / 1e9 / ceiling,
                "peak_memory_mib": measure.peak_memory_mib(calls[name], device),
                "whole_seconds": {n: measure.seconds(lambda: arms[name](initial, seeds, n), device) for n in arguments.steps},  # noqa: B023
            }
        )
    result = {
        "preset": arguments.preset,
        "batch": arguments.batch,
        "gflop_per_evaluation": work / 1e9,
        "gemm_ceiling_bf16_tflops": ceiling,
        "clocks": monitor.summary(),
        "arms": rows,
        "engine": {name: walk.engine.explain().splitlines() for name, walk in arms.items() if hasattr(walk, "engine")},
    }
    if arguments.check_steps and "reference-fp32" in arms:
        expected = arms["reference-fp32"](initial, seeds, arguments.check_steps)
        result["relative_error"] = {
            name: float((walk(initial, seeds, arguments.check_steps) - expected).norm() / expected.norm())
            for name, walk in arms.items()
            if hasattr(walk, "engine")
        }
    measure.record("sample_throughput.jsonl", result)
    report(result)


def report(result: dict) -> None:
    """The table."""
    print(f"{result['preset']}, batch {result['batch']}: {result['gflop_per_evaluation']:.1f} GFLOP an evaluation, "
          f"bf16 GEMM {result['gemm_ceiling_bf16_tflops']:.2f} TFLOP/s")  # fmt: skip
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
