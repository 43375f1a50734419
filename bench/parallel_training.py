"""Steps and memory of a training that several processes share: whole in each of them (ddp), or in parts (fsdp).

    torchrun --nproc-per-node=2 bench/parallel_training.py --recipe celeba64 --stage 2 --batch 4 --parallel fsdp

A step is the one that `multibeta train` makes, of a batch that all processes share. Memory is what a process needs at its peak
over what it had before there was a model, in steps alone and with a checkpoint: on a GPU of that, on a CPU resident. Started
without torchrun it measures one process. Appends a JSON line to parallel_training.jsonl in the folder that --results names.
"""

from __future__ import annotations

import dataclasses
import resource
import tempfile
from pathlib import Path

import torch
from train_throughput import Noise, build_objective

from common import measure
from multibeta import distribution, recipes, training
from multibeta.training.run import Run

MIB = 2**20


def peak_memory(device: torch.device) -> float:
    """MiB that this process has held at most, on its device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--recipe", choices=tuple(recipes.RECIPES), default="celeba64")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2)
    parser.add_argument("--batch", type=int, help="images a step, of all processes; by default the recipe's")
    parser.add_argument("--accumulate", type=int, default=1, help="pieces of a step")
    parser.add_argument("--recompute", action="store_true", help="keep the inputs of blocks alone")
    parser.add_argument("--parallel", choices=training.PARALLEL, default="ddp")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=distribution.local_device(None).type)
    parser.add_argument("--repetitions", type=int, default=10)
    arguments = parser.parse_args()
    with distribution.joined() as here, tempfile.TemporaryDirectory() as folder:
        place = distribution.by_first(lambda: folder)
        device, recipe = distribution.local_device(arguments.device), recipes.find(arguments.recipe)
        options = recipe.vae_training if arguments.stage == 1 else recipe.diffusion_training
        changes = {"batch_size": arguments.batch or options.batch_size, "accumulate": arguments.accumulate}
        options = dataclasses.replace(options, **changes, recompute=arguments.recompute)
        images = Noise(2 * options.batch_size, recipe.vae.resolution)
        before = peak_memory(device)
        objective = build_objective(recipe, arguments.stage, device, compiled=False)
        run = Run(objective, images, options, Path(place), None, arguments.parallel)
        run.module.train()
        times = measure.interleaved({"step": run.advance}, device, repetitions=arguments.repetitions)["step"]
        stepping = max(distribution.gather(peak_memory(device) - before))
        run.end()
        saving = max(distribution.gather(peak_memory(device) - before))
        parameters = sum(parameter.numel() for parameter in run.own.shown.parameters())
        result = {"recipe": recipe.name, "stage": arguments.stage, "batch": options.batch_size, "device": str(device)}
        result |= {"processes": here.size, "parallel": arguments.parallel, "parameters": parameters}
        result |= {"accumulate": options.accumulate, "recompute": options.recompute}
        result |= {
            **times,
            "images_per_second": 1e3 * options.batch_size / times["median_ms"],
            "peak_mib": stepping,
            "saving_peak_mib": saving,
        }
        if here.first:
            measure.record(arguments.results, "parallel_training.jsonl", result)
            print("{recipe}, stage {stage}, {parameters} parameters, batch {batch}, {processes} x {parallel}".format(**result))
            print("  {median_ms:.0f} ms a step ({p10_ms:.0f}-{p90_ms:.0f}), {images_per_second:.2f} images/s".format(**result))
            print("  {peak_mib:.0f} MiB a process in steps, {saving_peak_mib:.0f} MiB with a checkpoint".format(**result))


if __name__ == "__main__":
    main()
