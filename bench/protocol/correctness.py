"""Is what was timed right? The tests of the kernels, their noise, every kernel against float64, the drift of a sampling."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from common import agreement, layers, measure, sampling
from common.stages import Run
from multibeta import ops

ROOT = Path(__file__).resolve().parents[2]


def parity(run: Run) -> None:
    """The tests of the Triton kernels, which run interpreted elsewhere, on the device."""
    if importlib.util.find_spec("triton") is None:
        run.record(what="parity", error="triton is not installed")
        return
    files = ["sampler_update"] if run.small else sorted(path.stem for path in (ROOT / "tests" / "interpreted").glob("*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["-p", "common.parity_log", *(["-k", "philox"] if run.small else [])]
    if importlib.util.find_spec("xdist") is not None and not run.small:
        command += ["-n", "8"]
    path = os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    told = {"PYTHONPATH": path, "PARITY_LOG": str(run.folder.resolve() / run.file)}
    interpreted = {} if run.cuda else {"TRITON_INTERPRET": "1"}
    tests = [f"interpreted/{name}.py" for name in files]
    subprocess.run([*command, *tests], cwd=ROOT / "tests", env=os.environ | told | interpreted, stdout=subprocess.DEVNULL)
    outcomes = Counter(line["outcome"] for line in run.lines() if "test" in line)
    run.record(what="parity", **outcomes)


def words(run: Run) -> None:
    """The noise of the Triton kernels and that of the CPU."""
    if run.cuda:
        run.record(noise=agreement.noise(run.device))


def all_kernels(run: Run) -> None:
    """Every kernel of every op against the float64 reference: bfloat16 first; all shapes and activations; batches."""
    networks = layers.unet_layers(run.recipe) + layers.decoder_layers(run.recipe)
    every = sorted(ops.all_ops(), key=lambda op: op.name == "group_norm_act")  # last, for it takes longest
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    for dtype, op in run.within(itertools.product(dtypes[:1] if run.small else dtypes, every)):
        for kernel in op.kernels:
            check_kernel(run, op, kernel, run.within(agreement.cases(op, networks, run.device, (dtype,))))


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


def drift(run: Run) -> None:
    """How far the final latents of 20 steps lie from those of eager float32, and what the rest of a batch changes."""
    torch.backends.cudnn.allow_tf32 = False  # drift is counted from true float32
    run.record(precision=measure.precision())
    config, batch, steps = run.recipe.diffusion, run.batches[1], 3 if run.small else 20
    initial, seeds = sampling.start(config, batch, run.device)
    expected = run.build_arm("reference-fp32")(initial, seeds, steps)
    for name in ("multibeta", "reference-bf16"):
        arm = run.build_arm(name)
        error = float((arm(initial, seeds, steps) - expected).norm() / expected.norm())
        run.record(what=f"drift of {steps} steps B{batch}", arm=name, relative_error=error)
        if name == "multibeta":
            initial, seeds = sampling.start(config, 3, run.device)
            together, alone = (arm(initial[:n], seeds[:n], 5)[:1] for n in (3, 1))
            run.record(what="one sample alone and among 3", difference=float((together - alone).norm() / alone.norm()))
            initial, seeds = sampling.start(config, batch, run.device)
