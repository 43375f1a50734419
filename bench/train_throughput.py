"""Training throughput of both stages of a recipe: the plain code, the fused kernels, activations that are computed
again, and torch.compile, in turn in one run.

    python bench/train_throughput.py --recipe scenes32 --batch 32
    python bench/train_throughput.py --recipe celebahq256 --batch 48 --device cuda

A step is the one `multibeta train` makes: objective, gradients, clipping, AdamW, average of the weights. Images lie in memory.
Appends one JSON line for each stage to train_throughput.jsonl in the folder that --results names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import multibeta
from common import measure
from multibeta import data, distribution, recipes
from multibeta.recipes.planning import with_encodings
from multibeta.training import Objective
from multibeta.training.run import Run

# name: backend of the ops, precision, which of `compile` and `recompute`; "networks" compiles them whole, not block by block,
# "encoded" has the encodings of all images at the nodes at hand in stage 2
ARMS = {
    "reference-fp32": ("reference", "fp32", ()),
    "reference-bf16": ("reference", "bf16", ()),
    "fused-fp32": ("auto", "fp32", ()),
    "fused-bf16": ("auto", "bf16", ()),
    "fused-bf16-encoded": ("auto", "bf16", ("encoded",)),
    "fused-bf16-recompute": ("auto", "bf16", ("recompute",)),
    "fused-bf16-compile": ("auto", "bf16", ("compile",)),
    "fused-bf16-compile-recompute": ("auto", "bf16", ("compile", "recompute")),
    "fused-bf16-compile-networks": ("auto", "bf16", ("networks",)),
}


class Noise:
    """A dataset of random images."""

    channels = 3

    def __init__(self, count: int, resolution: int) -> None:
        self.resolution = resolution
        self.pixels = torch.randint(256, (count, 3, resolution, resolution), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: data.Indices) -> Tensor:
        """uint8 (N, 3, resolution, resolution)."""
        return self.pixels[indices]


def build_objective(recipe: recipes.Recipe, stage: int, device: torch.device, compiled: bool, encoded: int = 0) -> Objective:
    """The objective of a stage, its networks compiled where asked; in stage 2 perhaps of so many images `encoded` before."""
    vae, diffusion = (network.to(device) for network in recipes.build(recipe))
    if compiled:
        measure.allow_many_compilations()
        for network in (vae.get_submodule("encoder"), vae.get_submodule("decoder"), diffusion.get_submodule("unet")):
            network.compile(dynamic=False)
    if stage == 1:
        return recipe.first_objective(vae)
    vae.eval().requires_grad_(False)
    return with_encodings(recipe, vae, diffusion, encoded) if encoded else recipe.second_objective(vae, diffusion)


def build_arm(name: str, recipe: recipes.Recipe, stage: int, batch: int, device: torch.device) -> Callable[[], float]:
    """One of `ARMS`: a function that makes a training step and returns its loss."""
    backend, precision, ways = ARMS[name]
    options = recipe.vae_training if stage == 1 else recipe.diffusion_training
    options = dataclasses.replace(options, batch_size=batch, precision=precision)
    options = dataclasses.replace(options, **{way: True for way in ways if way in ("compile", "recompute")})
    images = Noise(2 * batch, recipe.vae.resolution)
    objective = build_objective(recipe, stage, device, "networks" in ways, len(images) if "encoded" in ways else 0)
    run = Run(objective, images, options, Path("never written"), None)
    run.module.train()

    def step() -> float:
        with multibeta.backend(backend):
            return run.advance()

    return step


def compare(recipe: recipes.Recipe, stage: int, names: list[str], batch: int, device: torch.device, repetitions: int) -> dict:
    """Milliseconds of a step and images per second of each arm, and what it took to build it and make the first step."""
    arms, needs, failed = {}, {}, {}

    def build(name: str) -> None:
        step = build_arm(name, recipe, stage, batch, device)
        for _ in range(2):  # the first counts operations, the second may compile
            step()
        arms[name] = step

    for name in names:
        try:
            needs[name] = measure.first_call(lambda: build(name), device)  # noqa: B023
        except Exception as error:  # one arm that cannot run must not cost the others
            failed[name] = measure.one_line(error)
    with measure.Monitor(device) as monitor:
        times = measure.interleaved(arms, device, repetitions=repetitions)
    rows = {name: {**t, "images_per_second": 1e3 * batch / t["median_ms"], **needs[name]} for name, t in times.items()}
    facts = {"recipe": recipe.name, "stage": stage, "batch": batch, "device": str(device)}
    return {**facts, "arms": rows, "failed": failed, "clocks": monitor.summary()}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--recipe", choices=tuple(recipes.RECIPES), help="by default celebahq256 on CUDA, scenes32 elsewhere")
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=(1, 2))
    parser.add_argument("--batch", type=int, help="images a step, by default the recipe's")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default=distribution.local_device().type)
    parser.add_argument("--repetitions", type=int, default=10)
    arguments = parser.parse_args()
    recipe = recipes.find(arguments.recipe or ("celebahq256" if arguments.device == "cuda" else "scenes32"))
    torch.backends.cudnn.benchmark = True  # for all arms alike: cuDNN keeps the first algorithm chosen for a shape
    for stage in arguments.stages:
        batch = arguments.batch or (recipe.vae_training if stage == 1 else recipe.diffusion_training).batch_size
        result = compare(recipe, stage, arguments.arms, batch, torch.device(arguments.device), arguments.repetitions)
        measure.record(arguments.results, "train_throughput.jsonl", result)
        report(result)


def report(result: dict) -> None:
    """The table."""
    print(f"{result['recipe']}, stage {result['stage']}, batch {result['batch']}")
    base = next((row["median_ms"] for row in result["arms"].values()), 0)
    for name, row in result["arms"].items():
        memory = "" if row["peak_memory_mib"] is None else f", {row['peak_memory_mib']:.0f} MiB"
        spread = f"{row['median_ms']:.1f} ms ({row['p10_ms']:.1f}-{row['p90_ms']:.1f})"
        print(f"  {name:28s} {spread}, {row['images_per_second']:.1f} images/s, {base / row['median_ms']:.2f}x{memory}")
    for name, reason in result["failed"].items():
        print(f"  {name:28s} {reason}")


if __name__ == "__main__":
    main()
