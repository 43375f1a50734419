"""Sampling throughput: this library, its eager reference, and diffusers' UNet2DModel of the same shape, interleaved in one run.

    python bench/sample_throughput.py --preset celeba64 --batch 8
    python bench/sample_throughput.py --preset celebahq256 --batch 64 --device cuda --steps 1000 20

Every arm walks the same rows of `ode2` from the same noise. Appends one JSON line to sample_throughput.jsonl in the folder that
--results names.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import measure
import peers
import torch
from torch import Tensor, nn

import multibeta
from multibeta import environment, recipes
from multibeta.nonlinear_diffusion import DiffusionConfig, sampler_rows
from multibeta.sampling import Engine, EngineOptions, sample

SIGMAS = torch.linspace(0.05, 1, 1001)
HEAD_ROW = torch.tensor([1.0, 0, 0, 1e-3, 1, 0])  # noise_prediction is the first head, delta a thousandth of the second
ARMS = (
    "reference-fp32",
    "reference-bf16",
    "diffusers-fp32",
    "diffusers-bf16",
    "diffusers-compile",
    "multibeta-fp32",
    "multibeta",
    "diffusers-autotune",  # CUDA only
    "multibeta-compile",
)
Walk = Callable[[Tensor, Tensor, int], Tensor]


def plain(
    network: nn.Module, dtype: torch.dtype, head: Callable, context: Callable = torch.no_grad, backend: str = "auto"
) -> Walk:
    """The plain loop on `network`, whose output `head` takes from what it returns, with rows and our ops by `backend`."""

    def walk(initial: Tensor, seeds: Tensor, steps: int) -> Tensor:
        def predict(latent: Tensor, step: int) -> tuple[Tensor, Tensor]:
            times = torch.full((len(latent),), float(step), device=latent.device)
            x = latent.to(dtype, memory_format=torch.preserve_format if dtype == torch.float32 else torch.channels_last)
            first, second = head(network(x, times)).float().chunk(2, dim=1)
            return first, 1e-3 * second

        with context(), multibeta.backend(backend):
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


def build_arm(
    name: str, config: DiffusionConfig, device: torch.device, dtype: torch.dtype | None, *, backend: str = "inductor"
) -> Walk:
    """One of `ARMS`; `dtype` is of multibeta's reduced precision, None for the engine's choice; `backend` compiles the peers."""
    if name.endswith(("compile", "autotune")):
        measure.allow_many_compilations()
    if name.startswith("diffusers"):
        network = peers.diffusers_unet(config, device)
        take = lambda output: output.sample  # noqa: E731
        if name == "diffusers-fp32":
            return plain(network, torch.float32, take)
        if name == "diffusers-compile" and device.type == "cpu":
            compiled = torch.compile(network.to(memory_format=torch.channels_last), backend=backend, dynamic=False)
            return plain(compiled, torch.float32, take, functools.partial(autocast, device))
        network = network.to(torch.bfloat16).to(memory_format=torch.channels_last)
        if name in ("diffusers-compile", "diffusers-autotune"):  # and one graph of our own, which costs less than torch's
            if device.type != "cuda":
                raise RuntimeError(f"{name} needs CUDA")
            mode = "max-autotune-no-cudagraphs" if name == "diffusers-autotune" else None
            network = peers.Captured(torch.compile(network, backend=backend, mode=mode, fullgraph=True, dynamic=False))
        return plain(network, torch.bfloat16, take)
    network = peers.build_unet(config, device)
    if name == "reference-fp32":
        return plain(network, torch.float32, lambda output: output, backend="reference")
    if name == "reference-bf16":
        network = network.to(torch.bfloat16).to(memory_format=torch.channels_last)
        return plain(network, torch.bfloat16, lambda output: output, backend="reference")
    precision = torch.float32 if name == "multibeta-fp32" else dtype
    return engine(network, EngineOptions(dtype=precision, compile=name == "multibeta-compile"))


@contextlib.contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    """bfloat16 autocast without gradients."""
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        yield


def start(config: DiffusionConfig, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The initial latents and the seeds of every arm."""
    shape = (batch, config.latent_channels, config.latent_resolution, config.latent_resolution)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device), torch.arange(batch, device=device)


def build_arms(
    names: Iterable[str], config: DiffusionConfig, batch: int, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[dict[str, Walk], dict[str, dict[str, float | None]], dict[str, str]]:
    """Arms that have made their first evaluation, the seconds and the memory it took, and why the others failed."""
    initial, seeds = start(config, batch, device)
    arms, needs, failed = {}, {}, {}

    def build(name: str) -> None:
        walk = build_arm(name, config, device, dtype)
        walk(initial, seeds, 1)
        arms[name] = walk

    for name in names:
        try:
            needs[name] = measure.first_call(functools.partial(build, name), device)
        except Exception as error:  # one arm that cannot run must not cost the others
            failed[name] = measure.one_line(error)
    return arms, needs, failed


def time_arms(
    arms: dict[str, Walk],
    config: DiffusionConfig,
    batch: int,
    device: torch.device,
    ceiling: float | None,
    *,
    evaluations: int,
    repetitions: int = 10,
) -> list[dict[str, object]]:
    """Milliseconds of one evaluation by each arm, and the rates that follow; MFU is a fraction of `ceiling`, in TFLOP/s."""
    initial, seeds = start(config, batch, device)
    calls = {name: functools.partial(walk, initial, seeds, evaluations) for name, walk in arms.items()}
    times = measure.interleaved(calls, device, repetitions=repetitions, warmup=1)
    work, rows = peers.unet_flops(config) * batch, []
    for name, timing in times.items():
        step_ms = timing["median_ms"] / evaluations
        rows.append(
            {
                "arm": name,
                **{key: timing[key] / evaluations for key in ("median_ms", "p10_ms", "p90_ms")},
                "repetitions": repetitions,
                "images_per_second_1000": batch / step_ms,
                "images_per_second_20": batch / step_ms * 50,
                "tflops": work / step_ms / 1e9,
                "mfu": work / step_ms / 1e9 / ceiling if ceiling else None,
            }
        )
    return rows


def relative_errors(
    arms: dict[str, Walk], config: DiffusionConfig, batch: int, device: torch.device, steps: int
) -> dict[str, float]:
    """How far the final latents of each arm of this network lie from those of "reference-fp32", from the same seeds."""
    initial, seeds = start(config, batch, device)
    expected = arms["reference-fp32"](initial, seeds, steps)
    return {
        name: float((walk(initial, seeds, steps) - expected).norm() / expected.norm())
        for name, walk in arms.items()
        if name.startswith(("multibeta", "reference-b"))
    }


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--preset", choices=tuple(recipes.RECIPES), default="celeba64", help="whose U-Net runs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=environment.device().type)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of multibeta; by default the fastest")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:-2])
    parser.add_argument("--evaluations", type=int, default=3, help="evaluations of the network in one timed call")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="also time whole samplings of so many steps, once each")
    parser.add_argument("--check-steps", type=int, default=50, help="steps of ode2 after which latents are compared; 0 for none")
    arguments = parser.parse_args()
    device, batch = torch.device(arguments.device), arguments.batch
    config = recipes.find(arguments.preset).diffusion
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None

    torch.backends.cudnn.benchmark = True  # for all arms alike: cuDNN keeps the first algorithm chosen for a shape
    arms, needs, failed = build_arms(arguments.arms, config, batch, device, dtype)
    with measure.Monitor(device) as monitor:
        ceiling = measure.gemm_ceiling(device, torch.bfloat16)
        counts = {"evaluations": arguments.evaluations, "repetitions": arguments.repetitions}
        rows = time_arms(arms, config, batch, device, ceiling, **counts)
    for row in rows:
        walk = functools.partial(arms[row["arm"]], *start(config, batch, device))
        row |= needs[row["arm"]]
        row["whole_seconds"] = {n: measure.seconds(functools.partial(walk, n), device) for n in arguments.steps}
    result = {
        "preset": arguments.preset,
        "batch": batch,
        "gflop_per_evaluation": peers.unet_flops(config) * batch / 1e9,
        "clocks": monitor.summary(),
        "arms": rows,
        "failed": failed,
        "engine": {name: walk.engine.explain().splitlines() for name, walk in arms.items() if hasattr(walk, "engine")},
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
    measure.tell_missing_peers()
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
