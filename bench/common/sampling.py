"""Ways to sample with one U-Net: the plain loop on ours and on that of diffusers, the engine, compiled and not; timed in turn."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import multibeta
from common import measure, networks
from multibeta import ops
from multibeta.networks import UNet
from multibeta.nonlinear_diffusion import DiffusionConfig, sampler_rows
from multibeta.sampling import Engine, EngineOptions, sample

SIGMAS = torch.linspace(0.05, 1, 1001)
HEAD_ROW = ops.TwoHeadRow(  # noise_prediction is the first head, delta a thousandth of the second
    noise_from_output=1.0, noise_from_latent=0, noise_offset=0, delta_from_second=1e-3, input_from_latent=1, input_offset=0
)
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
Sampling = Callable[[Tensor, Tensor, int], Tensor]  # initial latents (N, C, H, W), seeds (N,), steps


def plain(
    network: Callable[..., Any],
    dtype: torch.dtype,
    head: Callable[..., Tensor],
    context: Callable[[], contextlib.AbstractContextManager] = torch.no_grad,
    backend: str = "auto",
) -> Sampling:
    """The plain loop on `network`, whose output `head` takes from what it returns, with rows and our ops by `backend`."""

    def run(initial: Tensor, seeds: Tensor, steps: int) -> Tensor:
        def predict(latent: Tensor, step: int) -> tuple[Tensor, Tensor]:
            times = torch.full((len(latent),), float(step), device=latent.device)
            x = latent.to(dtype, memory_format=torch.preserve_format if dtype == torch.float32 else torch.channels_last)
            first, second = head(network(x, times)).float().chunk(2, dim=1)
            return first, 1e-3 * second

        with context(), multibeta.backend(backend):
            return sample(predict, sampler_rows(SIGMAS, "ode2", steps), initial, seeds)

    return run


class OnEngine:
    """The engine on `network`."""

    def __init__(self, network: UNet, options: EngineOptions) -> None:
        self.engine = Engine(network, options)

    def __call__(self, initial: Tensor, seeds: Tensor, steps: int) -> Tensor:
        rows = sampler_rows(SIGMAS, "ode2", steps)
        head_rows = ops.pack(HEAD_ROW, (len(rows), initial.shape[1])).float()
        return self.engine.sample(rows, head_rows, rows.steps.float(), initial, seeds)


def build_arm(
    name: str, config: DiffusionConfig, device: torch.device, dtype: torch.dtype | None, *, backend: str = "inductor"
) -> Sampling:
    """One of `ARMS`.

    Args:
        dtype: Multibeta's reduced precision; None for the engine's choice.
        backend: Of torch.compile, for the arms of diffusers.
    """
    if name.endswith(("compile", "autotune")):
        measure.allow_many_compilations()
    if name.startswith("diffusers"):
        network = networks.diffusers_unet(config, device)
        take = lambda output: output.sample  # noqa: E731
        if name == "diffusers-fp32":
            return plain(network, torch.float32, take)
        if name == "diffusers-compile" and device.type == "cpu":
            compiled = torch.compile(networks.channels_last(network), backend=backend, dynamic=False)
            return plain(compiled, torch.float32, take, functools.partial(autocast, device))
        network = networks.channels_last(network.to(torch.bfloat16))
        if name in ("diffusers-compile", "diffusers-autotune"):  # and one graph of our own, which costs less than torch's
            if device.type != "cuda":
                raise RuntimeError(f"{name} needs CUDA")
            mode = "max-autotune-no-cudagraphs" if name == "diffusers-autotune" else None
            network = networks.Captured(torch.compile(network, backend=backend, mode=mode, fullgraph=True, dynamic=False))
        return plain(network, torch.bfloat16, take)
    network = networks.build_unet(config, device)
    if name == "reference-fp32":
        return plain(network, torch.float32, lambda output: output, backend="reference")
    if name == "reference-bf16":
        network = networks.channels_last(network.to(torch.bfloat16))
        return plain(network, torch.bfloat16, lambda output: output, backend="reference")
    precision = torch.float32 if name == "multibeta-fp32" else dtype
    return OnEngine(network, EngineOptions(dtype=precision, compile=name == "multibeta-compile"))


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
) -> tuple[dict[str, Sampling], dict[str, dict[str, float | None]], dict[str, str]]:
    """Arms that have made their first evaluation, the seconds and the memory it took, and why the others failed."""
    initial, seeds = start(config, batch, device)
    arms, needs, failed = {}, {}, {}

    def build(name: str) -> None:
        arm = build_arm(name, config, device, dtype)
        arm(initial, seeds, 1)
        arms[name] = arm

    for name in names:
        try:
            needs[name] = measure.first_call(functools.partial(build, name), device)
        except Exception as error:  # one arm that cannot run must not cost the others
            failed[name] = measure.one_line(error)
    return arms, needs, failed


def time_arms(
    arms: dict[str, Sampling],
    config: DiffusionConfig,
    batch: int,
    device: torch.device,
    ceiling: float | None,
    *,
    evaluations: int,
    repetitions: int = 10,
) -> list[dict[str, Any]]:
    """Milliseconds of one evaluation by each arm, and the rates that follow; MFU is a fraction of `ceiling`, in TFLOP/s."""
    initial, seeds = start(config, batch, device)
    calls = {name: functools.partial(arm, initial, seeds, evaluations) for name, arm in arms.items()}
    times = measure.interleaved(calls, device, repetitions=repetitions, warmup=1)
    work, rows = networks.unet_flops(config) * batch, []
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
    arms: dict[str, Sampling], config: DiffusionConfig, batch: int, device: torch.device, steps: int
) -> dict[str, float]:
    """How far the final latents of each arm of this network lie from those of "reference-fp32", from the same seeds."""
    initial, seeds = start(config, batch, device)
    expected = arms["reference-fp32"](initial, seeds, steps)
    return {
        name: float((arm(initial, seeds, steps) - expected).norm() / expected.norm())
        for name, arm in arms.items()
        if name.startswith(("multibeta", "reference-b"))
    }
