"""Everything to measure on a GPU in ten minutes: the cheap and decisive first, nothing lost that was measured.

    python bench/gpu_protocol.py --results runs/gpu                      # all stages, then the table and the verdicts
    python bench/gpu_protocol.py --results runs/gpu --stages step norms  # some of them
    python bench/gpu_protocol.py --results runs/gpu --verdicts           # of what is there, as after a kill
    python bench/gpu_protocol.py --plan                                  # the command for a bare machine, the seconds a stage

Each stage is a process with a time limit, interrupted and then killed beyond it, and each result is appended at once to
gpu_protocol.jsonl in the folder --results, by default runs/gpu, beside which lies kernel_sums.csv. A measurement that raises is
recorded and the next goes on; so is a peer that is not installed, with the way to bring it. A kernel that disagrees with the
float64 reference is not timed. Clocks and power are read, never set. Precision is torch's default, which lets float32
convolutions use TF32, but for the drift, and is stated with every stage; cuDNN searches for its algorithms, for all arms alike.

    python bench/gpu_protocol.py --device cpu --small

runs every stage on tiny sizes, which proves the script and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gc
import importlib.util
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import agreement
import layers
import measure
import op_speed
import sample_throughput
import torch
import torch.nn.functional as F
from staged import Run, Stage, latest, newest, run_stage, run_stages, table
from torch import Tensor, nn

import multibeta
from multibeta import environment, inference, ops
from multibeta.blocks import Upsample
from multibeta.multibeta_vae import MultiBetaVAE

ROOT = Path(__file__).resolve().parents[1]
FOLDER, FILE = Path("runs") / "gpu", "gpu_protocol.jsonl"
BUDGET_S = 560.0  # of the ten minutes of a command; the rest is for the first import and the table
AUTOTUNE_S = 60.0  # of the U-Net, at the least
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "MULTIBETA_CACHE": "multibeta"}


def facts(run: Run) -> None:
    """Fast paths, what PyTorch prefers for attention."""
    for path in environment.fast_paths():
        run.record(fast_path=path.name, on=path.on, reason=path.reason)
    if not run.cuda:
        return
    for layer in of_kind(layers.unet_layers(run.recipe), layers.Attention):
        query, key, value = op_speed.attention_call((8, layer.length, layer.heads, layer.head_dim), run.device, run.dtype)
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        choice = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(*heads_first)).name
        run.record(what=str(layer), sdpa_choice=choice)
    run.record(flash_implementations=getattr(torch.nn.attention, "list_flash_attention_impls", list)())


def parity(run: Run) -> None:
    """The tests of the Triton kernels, which run interpreted elsewhere, on the device."""
    if importlib.util.find_spec("triton") is None:
        run.record(what="parity", error="triton is not installed")
        return
    files = ["sampler_update"] if run.small else sorted(path.stem for path in (ROOT / "tests" / "interpreted").glob("*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["-p", "parity_log", *(["-k", "philox"] if run.small else [])]
    if importlib.util.find_spec("xdist") is not None and not run.small:
        command += ["-n", "8"]
    path = os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    told = {"PYTHONPATH": path, "PARITY_LOG": str(run.folder.resolve() / run.file)}
    interpreted = {} if run.cuda else {"TRITON_INTERPRET": "1"}
    tests = [f"interpreted/{name}.py" for name in files]
    subprocess.run([*command, *tests], cwd=ROOT / "tests", env=os.environ | told | interpreted, stdout=subprocess.DEVNULL)
    outcomes = Counter(line["outcome"] for line in run.lines() if "test" in line)
    run.record(what="parity", **outcomes)


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


def step(run: Run) -> None:
    """A step of the U-Net: eager bfloat16, then ours beside it."""
    time_steps(run, ("reference-bf16", "multibeta"), run.batches)


def step_float32(run: Run) -> None:
    """A step of the U-Net in eager float32."""
    time_steps(run, ("reference-fp32",), run.batches)


def step_diffusers(run: Run) -> None:
    """A step of the U-Net of diffusers in eager bfloat16."""
    time_steps(run, ("diffusers-bf16",), run.batches)


def compiled_diffusers(run: Run) -> None:
    """A step of the U-Net of diffusers, compiled, beside ours as it is."""
    time_steps(run, ("multibeta", "diffusers-compile"), large_and_small(run))


def compiled_multibeta(run: Run) -> None:
    """A step of ours, compiled."""
    time_steps(run, ("multibeta-compile",), large_and_small(run))


def autotuned_diffusers(run: Run) -> None:
    """A step of the U-Net of diffusers after a search of minutes, beside ours."""
    if not run.cuda or run.late(AUTOTUNE_S):
        run.record(what="U-Net step, autotuned", error="needs CUDA" if not run.cuda else f"takes {AUTOTUNE_S:.0f} s or more")
        return
    time_steps(run, ("multibeta", "diffusers-autotune"), large_and_small(run))


def large_and_small(run: Run) -> tuple[int, ...]:
    """The batches for which compilation is worth its minute."""
    return (run.batches[-1],) if run.small else (run.batches[-1], run.batches[0])


def time_steps(run: Run, names: tuple[str, ...], batches: Iterable[int]) -> None:
    """Steps of the U-Net by arms of `sample_throughput`, each in turn with those before it, so that none waits for a later one.

    What building an arm took and what it runs with are recorded as well.
    """
    config, walks = run.recipe.diffusion, {}

    def first(name: str, batch: int) -> None:
        if name not in walks:
            walks[name] = run.build_arm(name)
        walks[name](*sample_throughput.start(config, batch, run.device), 1)

    for batch in run.within(batches):
        able: dict[str, sample_throughput.Walk] = {}
        counts = {"evaluations": 1 if run.small else {1: 40, 8: 20}.get(batch, 4), "repetitions": 2 if run.small else 7}
        for name in names:
            try:
                needs = measure.first_call(partial(first, name, batch), run.device)
                engine = {"engine": walks[name].engine.explain().splitlines()} if hasattr(walks[name], "engine") else {}
                run.record(what=f"U-Net B{batch}, built", arm=name, **needs, **engine)
                arms = {**able, name: walks[name]}
                rows = sample_throughput.time_arms(arms, config, batch, run.device, run.gemm_tflops, **counts)
            except Exception as error:  # one arm that cannot run must not cost the others
                how = measure.missing_peers() if isinstance(error, ImportError) else {}
                run.record(what=f"U-Net B{batch}, built", arm=name, error=measure.one_line(error), missing_peers=how)
                print(f"  {name} at batch {batch}: {measure.one_line(error)}", flush=True)
                continue
            able = arms
            for row in rows:
                run.record(what=f"U-Net step B{batch}", batch=batch, rate=row["tflops"], unit="TF/s", **row)
            print(f"  U-Net step B{batch}, {name}: {rows[-1]['median_ms']:.3f} ms", flush=True)
    walks.clear()
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()


def drift(run: Run) -> None:
    """How far the final latents of 20 steps lie from those of eager float32, and what the rest of a batch changes."""
    torch.backends.cudnn.allow_tf32 = False  # drift is counted from true float32
    run.record(precision=measure.precision())
    config, batch, steps = run.recipe.diffusion, run.batches[1], 3 if run.small else 20
    initial, seeds = sample_throughput.start(config, batch, run.device)
    expected = run.build_arm("reference-fp32")(initial, seeds, steps)
    for name in ("multibeta", "reference-bf16"):
        walk = run.build_arm(name)
        error = float((walk(initial, seeds, steps) - expected).norm() / expected.norm())
        run.record(what=f"drift of {steps} steps B{batch}", arm=name, relative_error=error)
        if name == "multibeta":
            initial, seeds = sample_throughput.start(config, 3, run.device)
            together, alone = (walk(initial[:n], seeds[:n], 5)[:1] for n in (3, 1))
            run.record(what="one sample alone and among 3", difference=float((together - alone).norm() / alone.norm()))
            initial, seeds = sample_throughput.start(config, batch, run.device)


def norms(run: Run) -> None:
    """Every GroupNorm of the U-Net and the decoder, every pair of the U-Net, eager and by each kernel, warm and cold.

    The largest are timed with the sums too that convolutions leave to them, and maps cut into blocks in one round as well.
    """
    unet, decoder = layers.unet_layers(run.recipe), layers.decoder_layers(run.recipe)
    plain = of_kind(unet, layers.Norm)
    largest = sorted((n for n in plain if not n.shifted), key=lambda n: n.channels * n.height * n.width)[-3:]
    calls = [(run.batches[-1], layer, False) for layer in of_kind(unet, layers.Norm, layers.Pair)]
    calls += [(run.decoder_batch, layer, False) for layer in of_kind(decoder, layers.Norm)]
    calls += [(run.batches[-1], layer, True) for layer in largest]
    for batch, layer, sums in run.within(calls[:4] if run.small else calls):
        shape, where = (batch, layer.channels, layer.height, layer.width), (layer.groups, run.device, run.dtype)
        if isinstance(layer, layers.Pair):
            op, (args, kwargs) = ops.find("group_norm_act_pair"), pair_call(run, layer, batch)
        else:
            op, options = ops.find("group_norm_act"), {"activation": layer.activation, "shifted": layer.shifted}
            args, kwargs = op_speed.norm_call(shape, *where, **options, x_bias=sums, residual=sums)
        able, unable = run.checked(op, args, kwargs)
        if run.cuda and batch == run.decoder_batch and "triton" in able:
            able["triton, one round"] = partial(in_one_round, able["triton"])
        what = f"{layer} + bias + residual" if sums else layer
        run.compare(what, batch, able, moved=op_speed.bytes_moved(op.name, args, kwargs), declined=unable)


def in_one_round(norm: Callable[[], Tensor]) -> Tensor:
    """A norm that reads a map cut into blocks whole before it reads it again, whether it fits the L2 cache or not."""
    from multibeta.kernels import launch

    sized, launch.l2_bytes = launch.l2_bytes, lambda device: None
    try:
        return norm()
    finally:
        launch.l2_bytes = sized


def pair_call(run: Run, layer: layers.Pair, batch: int) -> tuple[tuple, dict]:
    shape = (batch, layer.channels, layer.height, layer.width)
    return op_speed.pair_call(shape, layer.beside, layer.groups, run.device, run.dtype, activation=layer.activation)


def sampler_kernels(run: Run) -> None:
    """The sampler's kernels: latent, history and network output are read and written."""
    for name, batch in run.within(itertools.product(("sampler_update", "sampler_step"), reversed(run.batches))):
        for label, args, kwargs in op_speed.sampler_calls(name, (batch, *run.recipe.vae.latent_shape), run.device, run.dtype):
            able, unable = run.checked(ops.find(name), args, kwargs)
            moved = 8 * args[0].numel() * args[0].element_size()
            run.compare(f"{name} {label}", batch, able, moved=moved, declined=unable)


def kernel_sums(run: Run) -> None:
    """Time of each kernel in one step of the engine and of eager bfloat16, as CSV beside the record."""
    config, path, steps = run.recipe.diffusion, run.folder / "kernel_sums.csv", 2 if run.small else 10
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * run.cuda
    wanted = torch.autograd.DeviceType.CUDA if run.cuda else torch.autograd.DeviceType.CPU  # kernels, not their launches
    own_time = "self_device_time_total" if run.cuda else "self_cpu_time_total"
    for name, batch in run.within(itertools.product(("multibeta", "reference-bf16"), (run.batches[-1], run.batches[0]))):
        walk = partial(run.build_arm(name), *sample_throughput.start(config, batch, run.device))
        walk(2)
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            walk(steps)
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
    found, batch = layers.decoder_layers(run.recipe), run.decoder_batch
    flop = sum(layer.flop * found[layer] for layer in of_kind(found, layers.Conv, layers.Linear, layers.Attention))
    fused = copy.deepcopy(reference).to(run.dtype).to(memory_format=torch.channels_last)
    latent, beta = torch.randn(batch, *run.recipe.vae.latent_shape, device=run.device), torch.zeros(batch, device=run.device)
    half = latent.to(run.dtype, memory_format=torch.channels_last)
    prepared = inference.Prepared(reference, run.dtype, pack=inference.packs(run.device))

    def decode(backend: str, network: nn.Module, x: Tensor) -> Tensor:
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


def words(run: Run) -> None:
    """The noise of the Triton kernels beside that of the CPU."""
    if run.cuda:
        run.record(noise=agreement.noise(run.device))


def correctness(run: Run) -> None:
    """Every kernel of every op against the float64 reference: bfloat16 first; all shapes and activations; batches."""
    found = layers.unet_layers(run.recipe) + layers.decoder_layers(run.recipe)
    every = sorted(ops.all_ops(), key=lambda op: op.name == "group_norm_act")  # last, for it takes longest
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    for dtype, op in run.within(itertools.product(dtypes[:1] if run.small else dtypes, every)):
        for kernel in op.kernels:
            check_kernel(run, op, kernel, run.within(agreement.cases(op, found, run.device, (dtype,))))


def check_kernel(run: Run, op: ops.Op, kernel: ops.Kernel, cases: Iterable[agreement.Case]) -> None:
    """Record what one kernel gets wrong, call by call, and how many calls it declined."""
    checked, faults, declined = 0, 0, Counter()
    for label, args, kwargs, gradients in cases:
        if (reason := kernel.accepts(*args, **kwargs)) is not None:
            declined[reason] += 1
            continue
        checked += 1
        facts, fault = {"op": op.name, "kernel": str(kernel), "call": label}, None
        try:
            error, tolerance = agreement.worst_error(op, kernel.function, args, kwargs, gradients=gradients)
            facts |= {"relative_error": error, "tolerance": tolerance}
            if not error <= tolerance:
                fault = f"relative error {error:.1e}, {tolerance:.1e} is allowed"
            elif not agreement.batch_free(op, kernel.function, args, kwargs):
                fault = "a sample depends on its batch"
        except Exception as error:
            fault = measure.one_line(error)
        run.record(**facts, fault=fault)
        if fault is not None:
            faults += 1
            print(f"  {op.name} by {kernel}, {label}: {fault}", flush=True)
    if declined:
        run.record(op=op.name, kernel=str(kernel), declined=dict(declined))
    if checked:
        print(f"  {op.name} by {kernel}: {checked} calls, {faults} faults", flush=True)


def of_kind(found: Iterable[layers.Layer], *kinds: type) -> list[layers.Layer]:
    """The layers of these kinds."""
    return [layer for layer in found if isinstance(layer, kinds)]


def convolutions(run: Run) -> None:
    """Every convolution and linear layer of the U-Net, cuDNN's search off and on; every upsampling in its three forms."""
    found, batch, spent = layers.unet_layers(run.recipe), run.batches[-1], Counter()
    for layer in run.within(of_kind(found, layers.Conv, layers.Linear, layers.Doubling)):
        if isinstance(layer, layers.Doubling):
            arms = upsample_arms(run, layer, batch)
        else:
            arms = conv_arms(run, layer, batch) if isinstance(layer, layers.Conv) else linear_arms(run, layer, batch)
        times = run.compare(layer, batch, arms, flop=batch * layer.flop, count=found[layer])
        able = [timing["median_ms"] for timing in times.values() if "error" not in timing]
        if isinstance(layer, layers.Conv) and able:
            spent += Counter(ms=found[layer] * min(able), flop=found[layer] * batch * layer.flop)
    if spent:
        what, rate = f"all convolutions B{batch}", spent["flop"] / spent["ms"] / 1e9
        run.record(what=what, arm="best", median_ms=spent["ms"], rate=rate, unit="TF/s")


def random_like(run: Run, *shape: int) -> Tensor:
    """A random tensor in the fast dtype, channels-last where it is a map."""
    x = torch.randn(shape, device=run.device).to(run.dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def conv_arms(run: Run, layer: layers.Conv, batch: int) -> dict[str, Callable]:
    x = random_like(run, batch, layer.in_channels, layer.height, layer.width)
    weight = random_like(run, layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)

    def convolve(search: bool) -> Tensor:
        # cuDNN keeps one algorithm for a shape and the tf32 flag, found either way: the flag, idle here, keeps the two apart
        with torch.backends.cudnn.flags(enabled=True, benchmark=search, allow_tf32=search):
            return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding)

    return {"heuristic": partial(convolve, False), "searched": partial(convolve, True)}


def linear_arms(run: Run, layer: layers.Linear, batch: int) -> dict[str, Callable]:
    x, weight = random_like(run, batch * layer.tokens, layer.in_features), random_like(run, layer.out_features, layer.in_features)
    return {"linear": partial(F.linear, x, weight)}


def upsample_arms(run: Run, layer: layers.Doubling, batch: int) -> dict[str, Callable]:
    source, x = Upsample(layer.channels).to(run.device), random_like(run, batch, layer.channels, layer.height, layer.width)
    forms = {
        "plain": inference.PlainUpsample(source, run.dtype, False),
        "folded": inference.FoldedUpsample(source, run.dtype, False),
        "transposed": inference.TransposedUpsample(source, run.dtype),
    }
    return {name: partial(form.requires_grad_(False), x) for name, form in forms.items()}


def attention(run: Run) -> None:
    """Every backend of attention on every shape of the U-Net and the decoder."""
    op = ops.find("attention")
    found = layers.unet_layers(run.recipe) + layers.decoder_layers(run.recipe)
    batches = tuple(reversed(run.batches))[: 1 if run.small else None]
    for batch, layer in run.within(itertools.product(batches, of_kind(found, layers.Attention))):
        shape = layer.length, layer.heads, layer.head_dim
        args, sample = (op_speed.attention_call((n, *shape), run.device, run.dtype) for n in (batch, 2))
        able, unable = run.checked(op, args, {}, sample=sample)
        run.compare(layer, batch, able, flop=batch * layer.flop, declined=unable)


def whole_sampling(run: Run) -> None:
    """Whole samplings: few steps of every batch, 1000 of the smaller ones."""
    walk, (few, many) = run.build_arm("multibeta"), (2, 4) if run.small else (20, 1000)
    counts = [(batch, few) for batch in run.batches] + [(batch, many) for batch in run.batches[:2]]
    for batch, steps in run.within(counts):
        initial, seeds = sample_throughput.start(run.recipe.diffusion, batch, run.device)
        walk(initial, seeds, 1)
        seconds = measure.seconds(partial(walk, initial, seeds, steps), run.device)
        rate = {"seconds": seconds, "images_per_second": batch / seconds}
        run.record(what=f"sampling of {steps} steps B{batch}", arm="multibeta", **rate)


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
        torch._scaled_mm, low, low_weight.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=run.dtype, use_fast_accum=True
    )
    arms["fp8"] = product
    expected, error = F.linear(x.float(), weight.float()), None
    with contextlib.suppress(RuntimeError):  # which `compare` reports
        error = float((product().float() - expected).norm() / expected.norm())
    return arms, error


def fp8(run: Run) -> None:
    """fp8 on the linear layers and 1x1 convolutions of the U-Net: milliseconds a step that it would save."""
    found = layers.unet_layers(run.recipe)
    for batch in reversed(run.batches[1:]):
        saved, measured = 0.0, False
        for layer in run.within(of_kind(found, layers.Linear, layers.Conv)):
            if isinstance(layer, layers.Conv) and layer.kernel > 1:
                continue
            if isinstance(layer, layers.Linear):
                rows, inner, columns = batch * layer.tokens, layer.in_features, layer.out_features
            else:
                rows, inner, columns = batch * layer.height * layer.width, layer.in_channels, layer.out_channels
            if rows == batch:  # the time embedding, which is a table
                continue
            arms, error = fp8_arms(run, rows, inner, columns)
            times = run.compare(layer, batch, arms, flop=batch * layer.flop, fp8_relative_error=error, count=found[layer])
            wide, low = (times.get(name, {}).get("median_ms") for name in (str(run.dtype).removeprefix("torch."), "fp8"))
            if wide and low:
                saved, measured = saved + found[layer] * max(0.0, wide - low), True
        if measured:
            run.record(what="fp8 linears", batch=batch, saved_ms_a_step=saved)
            print(f"  fp8 would save {saved:.3f} ms a step at batch {batch}", flush=True)


def op_calls(run: Run) -> None:
    """The calls of `op_speed` whose limit is a copy or a product."""
    calls = ((op, *call) for op in ops.all_ops() for call in op_speed.calls(op.name, run.device, run.dtype, False))
    for op, label, args, kwargs in run.within(itertools.islice(calls, 1) if run.small else calls):
        if moved := op_speed.bytes_moved(op.name, args):
            able, unable = run.checked(op, args, kwargs)
            run.compare(f"{op.name} {label}", len(args[0]), able, moved=moved, declined=unable)


STAGES = {
    "facts": Stage((facts,), 12),
    "parity": Stage((parity,), 60),
    "ceilings": Stage((ceilings,), 20),
    "step": Stage((step, step_float32, step_diffusers), 90),
    "drift": Stage((drift,), 12),
    "compiled": Stage((compiled_diffusers, compiled_multibeta), 120),
    "norms": Stage((norms, sampler_kernels), 35),
    "kernel_sums": Stage((kernel_sums,), 22),
    "decoder": Stage((vae_decoder,), 25),
    "correctness": Stage((words, correctness), 60),
    "autotune": Stage((convolutions, attention, whole_sampling, fp8, op_calls, autotuned_diffusers), 85),
}


def ended(stage: str, lines: list[dict]) -> str:
    """How a stage ended, in a few words, from its lines."""
    if not lines:
        return "did not run"
    troubles = [line["ended"] for line in lines if "ended" in line]
    troubles += [f"{line.get('what', 'a part')} raised {line['error']}" for line in lines if "error" in line and "at" in line]
    troubles += ["its time was up" for line in lines if "stopped" in line][:1]
    if not troubles:
        return "done" if any("seconds" in line for line in lines) else "ended in the middle"
    return "; ".join(troubles[:3])


def checks(lines: list[dict]) -> Iterator[str]:
    """Whether what was timed is right: parity, noise, correctness, drift."""
    outcomes = Counter(line["outcome"] for line in lines if "test" in line)
    where = "by the interpreter, on the CPU" if latest(lines, "device") == "cpu" else "on the device"
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    yield f"parity {where}: {told}" if outcomes else "parity: NOT TESTED"
    checked = sum("fault" in line for line in lines)
    if faults := [line for line in lines if line.get("fault")]:
        yield f"correctness: {len(faults)} faults, the first {faults[0]['op']} by {faults[0]['kernel']}: {faults[0]['fault']}"
    elif checked:
        yield f"correctness: {checked} calls against float64, no faults"
    else:
        yield "correctness: NOT TESTED"
    for line in lines:
        if "noise" in line:
            same = line["noise"]["same_words"]
            yield "the noise of the Triton kernels is " + ("that of the CPU, bit for bit" if same else "NOT that of the CPU")
        if "relative_error" in line and str(line.get("what", "")).startswith("drift"):
            allowed = "as of bfloat16, below 2e-02" if line["relative_error"] < 2e-2 else "TOO MUCH for bfloat16"
            yield f"{line['what']}, {line['arm']}: {line['relative_error']:.1e}, {allowed}"


def speeds(lines: list[dict]) -> Iterator[str]:
    """What the rates say to do next; arms are compared within a stage."""
    best = {(line["what"], line["arm"]): line for line in lines if "rate" in line}
    gemm, copy_rate = latest(lines, "gemm_tflops"), latest(lines, "copy_gb_s")
    if (found := best.get(("all convolutions B64", "best"))) and gemm:
        share = found["rate"] / gemm
        advice = "convolutions first" if share < 0.65 else "folding and attention only" if share > 0.85 else "no clear case"
        yield f"convolutions reach {share:.0%} of a large product at batch 64: {advice}"
    norms = [line for (what, arm), line in best.items() if what.startswith(("norm ", "pair ")) and arm == "triton"]
    if norms and copy_rate:
        worst = min(norms, key=lambda line: line.get("cold_rate", line["rate"]))
        share = worst.get("cold_rate", worst["rate"]) / copy_rate
        advice = "tune it before anything else" if share < 0.7 else "good enough"
        yield f"group_norm_act by triton reaches {share:.0%} or more of a copy, cold: {advice} ({worst['what']})"
    steps = {(line["stage"], line["what"], line["arm"]): line for line in best_of_stages(lines)}
    for (stage, what, arm), theirs in sorted(steps.items()):
        if arm != "multibeta" and (ours := steps.get((stage, what, "multibeta"))):
            gain = theirs["median_ms"] / ours["median_ms"]
            yield f"{what}: {gain:.2f}x over {arm}" + (": no speed to claim" if gain < 1.05 else "")


def best_of_stages(lines: list[dict]) -> Iterator[dict]:
    """The timed steps of the U-Net, the latest of each arm in each stage: those that were timed in turn."""
    yield from {
        (line["stage"], line["what"], line["arm"]): line
        for line in lines
        if "rate" in line and line["what"].startswith("U-Net step")
    }.values()


def verdicts(lines: list[dict]) -> Iterator[str]:
    """How each stage ended, whether the numbers are right, and what they say to do next."""
    lines = newest(lines)
    for stage in STAGES:
        yield f"{stage}: {ended(stage, [line for line in lines if line['stage'] == stage])}"
    yield from checks(lines)
    if latest(lines, "small"):
        yield "tiny sizes: the protocol works; its times and rates mean nothing"
    else:
        yield from speeds(lines)
    for name, how in (latest(lines, "missing_peers") or {}).items():
        yield f"{name} was not there to compare with: {how}"


def plan(arguments: argparse.Namespace) -> str:
    """The command for a bare machine, and the seconds that each stage is given."""
    results = shlex.quote(str(arguments.results)) if arguments.results != FOLDER else '"${OUT:-runs/gpu}"'
    cache = f" --cache {shlex.quote(str(arguments.cache))}" if arguments.cache else ""
    only = f" --stages {' '.join(arguments.stages)}" if arguments.stages != list(STAGES) else ""
    lines = [f"{name:12s} {STAGES[name].seconds:4.0f} s" for name in arguments.stages]
    total = sum(STAGES[name].seconds for name in arguments.stages)
    lines.append(f"{'together':12s} {total:4.0f} s of {arguments.budget_s:.0f}; what is left goes to the stage that needs it")
    if not arguments.cache:
        lines.append("kernels are compiled on the way, which compile_ahead.py FOLDER, carried along, and --cache FOLDER spare")
    run = f"python3 -u bench/gpu_protocol.py --results {results}{cache}{only} --budget-s {arguments.budget_s:.0f}"
    return "\n".join([*lines, "", f'eval "$(python3 bench/link.py /tmp/multibeta-links)" && {run}'])


def use_cache(folder: Path) -> None:
    """Let what is compiled be kept in `folder`; what Triton kept there, perhaps in another place, is found again."""
    for variable, name in CACHES.items():
        os.environ[variable] = str((folder / name).resolve())
    for path in (folder / "triton").glob("*/__grp__*.json"):  # it lists its files by where they were
        children = json.loads(path.read_text())["child_paths"]
        path.write_text(json.dumps({"child_paths": {name: str(path.resolve().parent / name) for name in children}}))


def run_one(arguments: argparse.Namespace) -> int:
    """One stage, here; 130 if it was interrupted."""
    torch.backends.cudnn.benchmark = True
    device = torch.device(arguments.device)
    run = Run(arguments.results, FILE, device, arguments.stage, arguments.until, arguments.small)
    return 0 if run_stage(run, STAGES[arguments.stage]) else 130


def main() -> int:
    parser = measure.parser(__doc__)
    parser.set_defaults(results=FOLDER)  # stages are processes, which hand over in files
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES), metavar="NAME")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds that all stages may take")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=environment.device().type)
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--cache", type=Path, help="folder that keeps what was compiled, here or by compile_ahead.py")
    parser.add_argument("--plan", action="store_true", help="print the command for a bare machine, and the seconds of each stage")
    parser.add_argument("--verdicts", action="store_true", help="print table and verdicts of what --results holds")
    parser.add_argument("--stage", choices=tuple(STAGES), help="this one, in this process, without a limit")
    parser.add_argument("--until", type=float, default=float("inf"), help="time.monotonic() at which --stage starts nothing more")
    arguments = parser.parse_args()
    if arguments.plan:
        print(plan(arguments))
        return 0
    if arguments.device == "cpu" and not (arguments.small or arguments.verdicts):
        parser.error("no CUDA device is seen, or --device cpu was given: on the CPU only --small runs, which tries the script")
    if not arguments.budget_s > 0:
        parser.error(f"--budget-s must be positive, got {arguments.budget_s}")
    try:
        arguments.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--results must be a folder: {error}")
    if arguments.cache:
        use_cache(arguments.cache)
    if arguments.stage:
        return run_one(arguments)
    code = 0
    try:
        if not arguments.verdicts:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` sends it
            supervise_all(arguments)
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept", flush=True)
        code = 130  # as of a command that Ctrl-C ended
    finally:
        lines = measure.read(arguments.results, FILE)
        print(table(newest(lines)))
        print("\n".join(verdicts(lines)))
    return code


def supervise_all(arguments: argparse.Namespace) -> None:
    """Every stage that was asked for, each in a process of its own."""
    if arguments.small:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny work waits longer for a second thread than it takes
    flags = ["--results", str(arguments.results), "--device", arguments.device, *(["--small"] if arguments.small else [])]
    command = [sys.executable, "-u", str(Path(__file__).resolve()), *flags]

    def note(stage: str, ended: str) -> None:
        print(f"  {stage}: {ended}", flush=True)
        measure.append(arguments.results, FILE, {"stage": stage, "ended": ended})

    run_stages(STAGES, arguments.stages, command, arguments.budget_s, note)


if __name__ == "__main__":
    sys.exit(main())
