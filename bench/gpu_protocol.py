"""Everything to measure on a GPU, staged so that a few minutes on one answer the questions in order of worth.

    python bench/gpu_protocol.py --stages 0 1 2 3 4 5 --budget-s 600
    python bench/gpu_protocol.py --stages 0 6 --budget-s 600 --cache runs/inductor.bin
    python bench/gpu_protocol.py --stages 0 7 8 9 10 --budget-s 600 --cache runs/inductor.bin

Each result is appended at once to bench/results/gpu_protocol.jsonl. A stage whose estimate does not fit what is left of the
budget is skipped, one that raises is recorded and the next goes on, one that takes too long stops between two measurements. A
kernel that does not agree with the float64 reference is not timed. Clocks and power are read, never set.

    python bench/gpu_protocol.py --device cpu --small

runs every stage on tiny sizes, which proves the script and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gc
import itertools
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
from staged import Run, Stage, run_stages, table
from torch import Tensor, nn

import multibeta
from multibeta import environment, inference, ops
from multibeta.blocks import Upsample
from multibeta.multibeta_vae import MultiBetaVAE

FILE = "gpu_protocol.jsonl"
STEP_ARMS = ("reference-fp32", "reference-bf16", "diffusers-bf16", "multibeta")
COMPILED_ARMS = ("diffusers-graph", "multibeta-compile", "diffusers-compile")
COMPILE_S = 120  # of the U-Net by max-autotune; a cache makes it less


def environment_facts(run: Run) -> None:
    """Versions, fast paths, what PyTorch prefers for attention."""
    paths = {path.name: "on" if path.on else path.reason for path in environment.fast_paths()}
    facts = {"fast_paths": paths, "small": run.small, "device": str(run.device), **measure.provenance()}
    if run.cuda:
        choices = {}
        for layer in of_kind(layers.unet_layers(run.recipe), layers.Attention):
            query, key, value = op_speed.attention_call((8, layer.length, layer.heads, layer.head_dim), run.device, run.dtype)
            heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
            choices[str(layer)] = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(*heads_first)).name
        listed = getattr(torch.nn.attention, "list_flash_attention_impls", list)
        facts |= {"sdpa_choice": choices, "flash_implementations": listed()}
    run.record(**facts)


def ceilings(run: Run) -> None:
    """What this device reaches on a large product, on copies within and beyond the L2 cache, and per node of a graph."""
    run.record(gemm_tflops=run.gemm_tflops, copy_gb_s=run.copy_gb_s)
    run.row("gemm", str(run.dtype), None, run.gemm_tflops, "TF/s", run.gemm_tflops)
    for mebibytes in (4, 8, 16):  # source and target together: 8, 16 and 32
        rate = measure.copy_ceiling(run.device, mebibytes)
        run.record(copy_mib=2 * mebibytes, copy_gb_s=rate)
        run.row(f"copy within {2 * mebibytes} MiB", "copy", None, rate, "GB/s", run.copy_gb_s)
    one, nodes = torch.zeros(1, device=run.device), 1000
    chain = measure.replayed(lambda: one.add_(1), run.device, nodes)
    times = measure.interleaved({"chain": chain}, run.device, repetitions=run.repetitions)
    run.record(microseconds_a_node=times["chain"]["median_ms"] * 1e3 / nodes)
    size = 64 if run.small else 8192
    run.compare(f"product of {size}^3", 1, fp8_arms(run, size, size, size)[0], flop=2 * size**3)


def correctness(run: Run) -> None:
    """Every kernel of every op against the float64 reference: all shapes, activations and dtypes; noise; batches."""
    found = layers.unet_layers(run.recipe) + layers.decoder_layers(run.recipe)
    for op in sorted(ops.all_ops(), key=lambda op: op.name == "group_norm_act"):  # last, for it may take all the time left
        for kernel in op.kernels:
            check_kernel(run, op, kernel, run.within(agreement.cases(op, found, run.device)))
    run.record(noise=agreement.noise(run.device))


def check_kernel(run: Run, op: ops.Op, kernel: ops.Kernel, cases: Iterable[agreement.Case]) -> None:
    """Record what one kernel gets wrong."""
    errors: dict[str, tuple[float, float]] = {}
    faults: dict[str, str] = {}
    declined: Counter[str] = Counter()
    for label, args, kwargs, gradients in cases:
        if (reason := kernel.accepts(*args, **kwargs)) is not None:
            declined[reason] += 1
            continue
        try:
            error, tolerance = errors[label] = agreement.worst_error(op, kernel.function, args, kwargs, gradients=gradients)
            if not error <= tolerance:
                faults[label] = f"relative error {error:.1e}, {tolerance:.1e} is allowed"
            elif not agreement.batch_free(op, kernel.function, args, kwargs):
                faults[label] = "a sample depends on its batch"
        except Exception as error:
            faults[label] = measure.one_line(error)
    if faults:
        run.failed.add((op.name, str(kernel)))
    worst = max(errors, key=lambda label: errors[label][0] / errors[label][1], default=None)
    found = {"cases": len(errors), "worst": worst, "worst_error": errors.get(worst), "faults": faults, "declined": dict(declined)}
    run.record(op=op.name, kernel=str(kernel), **found)
    text = "; ".join([f"{label}: {fault}" for label, fault in faults.items()][:3]) or (
        "agrees" if errors else next(iter(declined), "no time left")
    )
    print(f"  {op.name} by {kernel}: {len(errors)} calls, {len(faults)} faults; {text}")


def of_kind(found: Iterable[layers.Layer], *kinds: type) -> list[layers.Layer]:
    """The layers of these kinds."""
    return [layer for layer in found if isinstance(layer, kinds)]


def convolutions(run: Run) -> None:
    """Every convolution and linear layer of the U-Nets, cuDNN's search off and on; every upsampling in its three forms."""
    for batch in run.batches[:1] if run.small else run.batches:
        spent = Counter()
        for recipe in (run.recipe,) if run.small else (run.recipe, run.other):
            found = layers.unet_layers(recipe)
            for layer in run.within(of_kind(found, layers.Conv, layers.Linear, layers.Doubling)):
                if isinstance(layer, layers.Doubling):
                    arms = upsample_arms(run, layer, batch)
                else:
                    arms = conv_arms(run, layer, batch) if isinstance(layer, layers.Conv) else linear_arms(run, layer, batch)
                times = run.compare(layer, batch, arms, flop=batch * layer.flop, recipe=recipe.name, count=found[layer])
                able = [timing["median_ms"] for timing in times.values() if "error" not in timing]
                if isinstance(layer, layers.Conv) and able and recipe is run.recipe:
                    spent += Counter(ms=found[layer] * min(able), flop=found[layer] * batch * layer.flop)
        if spent:
            rate = spent["flop"] / spent["ms"] / 1e9
            run.record(what="all convolutions of the U-Net", batch=batch, tflops=rate, of_gemm=rate / run.gemm_tflops)
            run.row(f"all convolutions B{batch}", "best", spent["ms"], rate, "TF/s", run.gemm_tflops)


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
    """Every backend of attention on every shape of the U-Nets and the decoder."""
    op = ops.find("attention")
    found = layers.unet_layers(run.recipe) + layers.unet_layers(run.other) + layers.decoder_layers(run.recipe)
    batches = run.batches[:1] if run.small else run.batches
    for batch, layer in run.within(itertools.product(batches, of_kind(found, layers.Attention))):
        shape = layer.length, layer.heads, layer.head_dim
        args, sample = (op_speed.attention_call((n, *shape), run.device, run.dtype) for n in (batch, 2))
        able, unable = run.checked(op, args, {}, sample=sample)
        run.compare(layer, batch, able, flop=batch * layer.flop, declined=unable)


def norms(run: Run) -> None:
    """Every GroupNorm of the U-Net and the decoder: eager, compiled and each kernel; then the sampler's kernels."""
    op = ops.find("group_norm_act")
    unet, decoder = (of_kind(find(run.recipe), layers.Norm) for find in (layers.unet_layers, layers.decoder_layers))
    compiled = [(run.batches[0], layer) for layer in unet] + [(run.decoder_batches[0], layer) for layer in decoder]
    others = [*itertools.product(run.batches[1:], unet), *itertools.product(run.decoder_batches[1:], decoder)]
    for number, (batch, layer) in enumerate(run.within(compiled[:4] if run.small else compiled + others)):
        shape = batch, layer.channels, layer.height, layer.width
        args, kwargs = op_speed.norm_call(
            shape, layer.groups, run.device, run.dtype, activation=layer.activation, shifted=layer.shifted
        )
        able, unable = run.checked(op, args, kwargs, compiled=number < (1 if run.small else len(compiled)))
        run.compare(layer, batch, able, moved=op_speed.bytes_moved(op.name, args), declined=unable)
    for name, batch in run.within(itertools.product(("sampler_update", "sampler_step"), run.batches)):
        for label, args, kwargs in op_speed.sampler_calls(name, (batch, *run.recipe.vae.latent_shape), run.device, run.dtype):
            able, unable = run.checked(ops.find(name), args, kwargs)
            moved = 8 * args[0].numel() * args[0].element_size()  # latent, history and network output read and written
            run.compare(f"{name} {label}", batch, able, moved=moved, declined=unable)


def unet_step(run: Run) -> None:
    """One step of the U-Net by everything a user could pick; compilation, the dearest, as often as the time allows."""
    for batch in run.within(run.batches):
        config = run.recipe.diffusion
        arms, needs, failed, skipped = {}, {}, {}, {}
        for name in STEP_ARMS + COMPILED_ARMS:
            need = COMPILE_S if name in COMPILED_ARMS else 10
            if run.late(need) or (run.small and name.endswith("compile")):
                skipped[name] = f"takes about {need} s"
                continue
            built = sample_throughput.build_arms([name], config, batch, run.device)
            for found, more in zip((arms, needs, failed), built, strict=True):
                found |= more
        evaluations = 2 if run.small else {1: 40, 8: 20}.get(batch, 4)
        rows = sample_throughput.time_arms(
            arms, config, batch, run.device, evaluations=evaluations, repetitions=3 if run.small else 7
        )
        for row in rows:
            run.record(what="U-Net step", batch=batch, **row, **needs[row["arm"]])
            run.row(f"U-Net step B{batch}", row["arm"], row["median_ms"], row["tflops"], "TF/s", run.gemm_tflops)
        engines = {name: walk.engine.explain().splitlines() for name, walk in arms.items() if hasattr(walk, "engine")}
        run.record(what="U-Net step", batch=batch, failed=failed, skipped=skipped, engines=engines)
        arms.clear()
        gc.collect()
        if run.cuda:
            torch.cuda.empty_cache()


def whole_sampling(run: Run) -> None:
    """Whole samplings: seconds, drift of the final latents from eager float32, and what the rest of a batch changes."""
    config, short, long = run.recipe.diffusion, 5 if run.small else 20, 10 if run.small else 1000
    arms, _, failed = sample_throughput.build_arms(("reference-fp32", "reference-bf16", "multibeta"), config, 1, run.device)
    run.record(what="arms of whole samplings", failed=failed)
    for batch, steps in run.within(itertools.product(sorted(run.batches)[:3], (short, long))):
        initial, seeds = sample_throughput.start(config, batch, run.device)
        for name in ("multibeta", "reference-bf16"):
            if name in arms and (name == "multibeta" or batch * steps <= 20_000):
                arms[name](initial, seeds, 1)
                seconds = measure.seconds(partial(arms[name], initial, seeds, steps), run.device)
                run.record(what="whole sampling", arm=name, batch=batch, steps=steps, seconds=seconds)
                run.row(f"{steps} steps B{batch}", name, 1e3 * seconds, batch / seconds, "img/s", None)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):  # drift is counted from true float32
        for steps in run.within((short, long)):
            errors = sample_throughput.relative_errors(arms, config, run.batches[1], run.device, steps)
            run.record(what="drift", batch=run.batches[1], steps=steps, errors=errors)
    initial, seeds = sample_throughput.start(config, 3, run.device)
    together, alone = (arms["multibeta"](initial[:n], seeds[:n], 5)[:1] for n in (3, 1))
    run.record(what="one sample alone and among 3", difference=float((together - alone).norm() / alone.norm()))


def vae_decoder(run: Run) -> None:
    """The VAE decoder: eager, with the fused kernels, prepared for inference, compiled."""
    with torch.device(run.device):
        torch.manual_seed(0)
        reference = MultiBetaVAE(run.recipe.vae).decoder.eval().requires_grad_(False)
    found = layers.decoder_layers(run.recipe)
    flop = sum(layer.flop * found[layer] for layer in of_kind(found, layers.Conv, layers.Linear, layers.Attention))
    fused = copy.deepcopy(reference).to(run.dtype).to(memory_format=torch.channels_last)
    for batch in run.within(run.decoder_batches):
        latent, beta = torch.randn(batch, *run.recipe.vae.latent_shape, device=run.device), torch.zeros(batch, device=run.device)
        prepared = inference.Prepared(reference, run.dtype, pack=inference.packs(run.device))
        half = latent.to(run.dtype, memory_format=torch.channels_last)

        def decode(backend: str, network: nn.Module, x: Tensor, beta: Tensor = beta) -> Tensor:
            with multibeta.backend(backend), torch.no_grad():
                return network(x, beta)

        arms = {
            "eager fp32": partial(decode, "reference", reference, latent),
            "eager": partial(decode, "reference", fused, half),
            "fused": partial(decode, "auto", fused, half),
            "prepared": partial(decode, "auto", prepared, half),
        }
        if not run.small and not run.late(90):
            measure.allow_many_compilations()
            compiled = torch.compile(fused, mode="max-autotune-no-cudagraphs", dynamic=False)
            arms["compiled eager"] = partial(decode, "reference", compiled, half)
        run.compare("VAE decoder", batch, arms, flop=batch * flop)
        expected = arms["eager fp32"]().float()
        errors = {name: float((arm().float() - expected).norm() / expected.norm()) for name, arm in arms.items()}
        run.record(what="VAE decoder", batch=batch, relative_errors=errors, upsampling=prepared.report)


def kernel_sums(run: Run) -> None:
    """Time of each kernel in one step of the engine, as CSV beside the record."""
    config, batch = run.recipe.diffusion, run.batches[0]
    measure.RESULTS.mkdir(parents=True, exist_ok=True)
    arms, _, failed = sample_throughput.build_arms(("multibeta", "reference-bf16"), config, batch, run.device)
    initial, seeds = sample_throughput.start(config, batch, run.device)
    for name, walk in arms.items():
        walk(initial, seeds, 2)
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * run.cuda
        with torch.profiler.profile(activities=activities) as profiler:
            walk(initial, seeds, 10)
            measure.synchronize(run.device)
        wanted = torch.autograd.DeviceType.CUDA if run.cuda else torch.autograd.DeviceType.CPU  # kernels, not their launches
        own_time = "self_device_time_total" if run.cuda else "self_cpu_time_total"
        events = [event for event in profiler.key_averages() if event.device_type == wanted]
        sums = sorted(((getattr(event, own_time) / 10, event.count / 10, event.key) for event in events), reverse=True)
        path = measure.RESULTS / f"gpu_protocol_{name}_B{batch}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("microseconds_a_step", "calls_a_step", "kernel"), *sums])
        run.record(what="profile", arm=name, batch=batch, file=path.name, top=sums[:10])
    run.record(what="profile", failed=failed)


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
    for batch in run.batches[:2]:
        saved = 0.0
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
            saved += found[layer] * max(0.0, wide - low) if wide and low else 0.0
        run.record(what="fp8 linears", batch=batch, saved_ms_a_step=saved)
        print(f"  fp8 would save {saved:.3f} ms a step at batch {batch}")


STAGES = {
    0: Stage(environment_facts, 15),
    1: Stage(ceilings, 45),
    2: Stage(correctness, 60),
    3: Stage(convolutions, 150),
    4: Stage(attention, 75),
    5: Stage(norms, 120),
    6: Stage(unet_step, 420),
    7: Stage(whole_sampling, 150),
    8: Stage(vae_decoder, 100),
    9: Stage(kernel_sums, 100),
    10: Stage(fp8, 60),
}


def verdicts(run: Run) -> Iterator[str]:
    """What the numbers say to do next."""
    best = {(what, arm): (ms, fraction) for _, what, arm, ms, _, _, fraction in run.rows}
    if (found := best.get(("all convolutions B64", "best"))) is not None:
        advice = "convolutions first" if found[1] < 0.65 else "folding and attention only" if found[1] > 0.85 else "no clear case"
        yield f"convolutions reach {found[1]:.0%} of a large product at batch 64: {advice}"
    fractions = [
        f for _, what, arm, _, _, _, f in run.rows if what.startswith("norm ") and what.endswith(" B64") and arm == "triton"
    ]
    if fractions:
        advice = "tune it before anything else" if min(fractions) < 0.7 else "good enough"
        yield f"group_norm_act by triton reaches {min(fractions):.0%} or more of a copy at batch 64: {advice}"
    for batch in (1, 8, 64, 256):
        ours, theirs = (best.get((f"U-Net step B{batch}", arm)) for arm in ("multibeta", "diffusers-graph"))
        if ours and theirs:
            gain = theirs[0] / ours[0]
            yield f"batch {batch}: {gain:.2f}x over max-autotune and one graph" + (": no speed to claim" if gain < 1.05 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", choices=tuple(STAGES), default=list(STAGES), metavar="N")
    parser.add_argument("--budget-s", type=float, default=600, help="seconds that all stages may take")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=environment.device().type)
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of the record")
    parser.add_argument("--cache", type=Path, help="file that keeps what torch.compile made from one run to the next")
    arguments = parser.parse_args()
    measure.RESULTS = arguments.results
    if arguments.cache and arguments.cache.exists():
        torch.compiler.load_cache_artifacts(arguments.cache.read_bytes())
    torch.backends.cudnn.benchmark = True  # for all arms alike: cuDNN keeps the first algorithm chosen for a shape
    run = Run(FILE, torch.device(arguments.device), arguments.budget_s, arguments.small)
    try:
        run_stages(run, STAGES, arguments.stages)
    finally:
        if arguments.cache and (artifacts := torch.compiler.save_cache_artifacts()) is not None:
            arguments.cache.parent.mkdir(parents=True, exist_ok=True)
            arguments.cache.write_bytes(artifacts[0])
        print(table(run))
        for verdict in verdicts(run):
            print(verdict)


if __name__ == "__main__":
    main()
