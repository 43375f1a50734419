"""How fast are the networks: steps of the U-Net, whole samplings, the VAE decoder, and which kernels their time goes to."""

from __future__ import annotations

import copy
import csv
import gc
import itertools
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

import multibeta
from common import layers, measure, networks, sampling
from common.stages import Run
from multibeta import inference
from multibeta.multibeta_vae import MultiBetaVAE

AUTOTUNE_S = 300.0  # of the U-Net, at the least: about fifty operations, 1 to 17 s each


def step(run: Run) -> None:
    """A step of the U-Net: eager bfloat16, then ours next to it."""
    time_steps(run, ("reference-bf16", "multibeta"), run.batches)


def step_float32(run: Run) -> None:
    """A step of the U-Net in eager float32."""
    time_steps(run, ("reference-fp32",), run.batches)


def step_diffusers(run: Run) -> None:
    """A step of the U-Net of diffusers in eager bfloat16."""
    time_steps(run, ("diffusers-bf16",), run.batches)


def compiled_diffusers(run: Run) -> None:
    """A step of the U-Net of diffusers, compiled, next to ours as it is."""
    time_steps(run, ("multibeta", "diffusers-compile"), large_and_small(run))


def compiled_multibeta(run: Run) -> None:
    """A step of ours, compiled."""
    time_steps(run, ("multibeta-compile",), large_and_small(run))


def autotuned_diffusers(run: Run) -> None:
    """A step of the U-Net of diffusers after a search of minutes, next to ours."""
    if not run.cuda or run.late(AUTOTUNE_S):
        run.record(what="U-Net step, autotuned", error="needs CUDA" if not run.cuda else f"takes {AUTOTUNE_S:.0f} s or more")
        return
    time_steps(run, ("multibeta", "diffusers-autotune"), large_and_small(run))


def large_and_small(run: Run) -> tuple[int, ...]:
    """The batches for which compilation is worth its minute."""
    return (run.batches[-1],) if run.small else (run.batches[-1], run.batches[0])


def time_steps(run: Run, names: tuple[str, ...], batches: Iterable[int]) -> None:
    """Steps of the U-Net by arms of `common.sampling`, each in turn with those before it, so that none waits for a later one.

    What building an arm took and what it runs with are recorded as well.
    """
    config = run.recipe.diffusion
    built: dict[str, sampling.Sampling] = {}

    def first(name: str, batch: int) -> None:
        if name not in built:
            built[name] = run.build_arm(name)
        built[name](*sampling.start(config, batch, run.device), 1)

    for batch in run.within(batches):
        able: dict[str, sampling.Sampling] = {}
        counts = {"evaluations": 1 if run.small else {1: 40, 8: 20}.get(batch, 4), "repetitions": 2 if run.small else 7}
        for name in names:
            try:
                needs = measure.first_call(partial(first, name, batch), run.device)
                engine = {"engine": built[name].engine.explain().splitlines()} if hasattr(built[name], "engine") else {}
                run.record(what=f"U-Net B{batch}, built", arm=name, **needs, **engine)
                arms = {**able, name: built[name]}
                rows = sampling.time_arms(arms, config, batch, run.device, run.gemm_tflops, **counts)
            except Exception as error:  # one arm that cannot run must not cost the others
                how = measure.missing_packages() if isinstance(error, ImportError) else {}
                run.record(what=f"U-Net B{batch}, built", arm=name, error=measure.one_line(error), missing_peers=how)
                print(f"  {name} at batch {batch}: {measure.one_line(error)}", flush=True)
                continue
            able = arms
            for row in rows:
                run.record(what=f"U-Net step B{batch}", batch=batch, rate=row["tflops"], unit="TF/s", **row)
            print(f"  U-Net step B{batch}, {name}: {rows[-1]['median_ms']:.3f} ms", flush=True)
    built.clear()
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()


def whole_sampling(run: Run) -> None:
    """Whole samplings: few steps of every batch, 1000 of the smaller ones."""
    arm, (few, many) = run.build_arm("multibeta"), (2, 4) if run.small else (20, 1000)
    counts = [(batch, few) for batch in run.batches] + [(batch, many) for batch in run.batches[:2]]
    for batch, steps in run.within(counts):
        initial, seeds = sampling.start(run.recipe.diffusion, batch, run.device)
        arm(initial, seeds, 1)
        seconds = measure.seconds(partial(arm, initial, seeds, steps), run.device)
        rate = {"seconds": seconds, "images_per_second": batch / seconds}
        run.record(what=f"sampling of {steps} steps B{batch}", arm="multibeta", **rate)


def kernel_sums(run: Run) -> None:
    """Time of each kernel in one step of the engine and of eager bfloat16, as CSV next to the record."""
    config, path, steps = run.recipe.diffusion, run.folder / "kernel_sums.csv", 2 if run.small else 10
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * run.cuda
    wanted = DeviceType.CUDA if run.cuda else DeviceType.CPU  # kernels, not their launches
    own_time = "self_device_time_total" if run.cuda else "self_cpu_time_total"
    for name, batch in run.within(itertools.product(("multibeta", "reference-bf16"), (run.batches[-1], run.batches[0]))):
        arm = partial(run.build_arm(name), *sampling.start(config, batch, run.device))
        arm(2)
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            arm(steps)
            measure.synchronize(run.device)
        events = [event for event in profiler.key_averages() if event.device_type == wanted]
        sums = [(getattr(event, own_time) / steps, event.count / steps, event.key) for event in events]
        sums.sort(reverse=True)
        lines = [(name, batch, *row) for row in sums]
        header = [("arm", "batch", "microseconds_a_step", "calls_a_step", "kernel")] * (not path.exists())
        with path.open("a", newline="") as file:
            csv.writer(file).writerows(header + lines)
        total = sum(row[0] for row in sums)
        run.record(what=f"kernels B{batch}", arm=name, microseconds_a_step=total, top=sums[:10])


def vae_decoder(run: Run) -> None:
    """The VAE decoder: eager, with the fused kernels, prepared for inference."""
    with torch.device(run.device):
        torch.manual_seed(0)
        reference = MultiBetaVAE(run.recipe.vae).decoder.eval().requires_grad_(False)
    counts, batch = layers.decoder_layers(run.recipe), run.decoder_batch
    flop = sum(layer.flop * counts[layer] for layer in layers.of_type(counts, layers.Conv, layers.Linear, layers.Attention))
    fused = networks.channels_last(copy.deepcopy(reference).to(run.dtype))
    latent, beta = torch.randn(batch, *run.recipe.vae.latent_shape, device=run.device), torch.zeros(batch, device=run.device)
    half = latent.to(run.dtype, memory_format=torch.channels_last)
    prepared = inference.Prepared(reference, run.dtype, pack=inference.packs(run.device))

    def decode(backend: str, network: Callable[..., Tensor], x: Tensor) -> Tensor:
        with multibeta.backend(backend), torch.no_grad():
            return network(x, beta)

    arms = {
        "prepared": partial(decode, "auto", prepared, half),
        "fused": partial(decode, "auto", fused, half),
        "eager": partial(decode, "reference", fused, half),
        "eager fp32": partial(decode, "reference", reference, latent),
    }
    expected = arms["eager fp32"]().float()
    for name, arm in run.within(arms.items()):
        try:
            error = float((arm().float() - expected).norm() / expected.norm())
            run.record(what=f"VAE decoder B{batch}, checked", arm=name, relative_error=error, upsampling=prepared.report)
        except Exception as error:  # `compare` reports it too
            run.record(what=f"VAE decoder B{batch}, checked", arm=name, error=measure.one_line(error))
    run.compare("VAE decoder", batch, arms, flop=batch * flop)
