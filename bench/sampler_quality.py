"""Frechet distance of samplers at any number of steps, on one model, in one run.

    python bench/sampler_quality.py scenes32 --rows ode2:20 ancestral:1000 --num-images 500 --dtype bfloat16
    python bench/sampler_quality.py scenes32 --rows ode2:20 map:1 map:2 map_noise:4 --num-images 2000 --seeds 0 1 2 3

Distances of the same noise vary together: with several --seeds each row is also compared with the first of its own seed.
Appends one JSON line to sampler_quality.jsonl in the folder that --results names.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from common import measure
from multibeta import data, evaluation, load_pretrained, recipes
from multibeta.pipelines import Pipeline


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("model", help="folder of a trained model or name of a shipped one; its recipe names the data")
    parser.add_argument("--rows", nargs="+", default=["ode2:20", "ancestral:1000"], help="sampler:steps")
    parser.add_argument("--num-images", type=int, default=500, help="images on each side of the distance")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the new images; each row is made of each")
    parser.add_argument(
        "--encoded", type=float, nargs="*", default=[], help="betas at which held-out images are encoded, and denoised"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the networks")
    parser.add_argument("--device", default="cpu", help="of the model and the classifier")
    arguments = parser.parse_args()

    model = load_pretrained(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    rows = [row.split(":") for row in dict.fromkeys(arguments.rows)]
    walks = [{"sampler": name, "steps": int(steps)} for name, steps in rows]
    evaluation.checked_samplings(model, walks)
    samplings = [walk | {"seed": seed} for seed in arguments.seeds for walk in walks]
    levels = model.levels(arguments.encoded) if arguments.encoded else ()
    train_set, test_set = recipes.open_data(recipes.from_dict(model.info["recipe"]))
    features = evaluation.classifier_features(train_set, test_set, device=arguments.device)
    train_images, real = (data.to_float(part.images(range(arguments.num_images))) for part in (train_set, test_set))

    start = time.perf_counter()
    result = evaluation.generation(model, features, train_images, real, samplings)
    result["encoded"] = [
        {"beta": beta, "samples": samples, **sampling} | likeness(model, features, real, beta, samples, sampling)
        for beta in levels
        for samples in (True, False)
        for sampling in walks
    ]
    result["summary"] = summary(result["samples"])
    facts = {
        "model": arguments.model,
        "device": arguments.device,
        "seconds": time.perf_counter() - start,
        "classifier_accuracy": features.accuracy,
    }
    measure.record(arguments.results, "sampler_quality.jsonl", {**facts, "result": result})
    print(json.dumps(result, indent=2))


def summary(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each walk its distance over the seeds, and its ratio to the first walk of the same seed: means and deviations."""
    walks: dict[tuple[Any, ...], list[float]] = {}
    for row in samples:
        if row["sampler"] is not None:
            walks.setdefault((row["latents"], row["sampler"], row["steps"]), []).append(row["frechet"])
    firsts = {latents: distances for (latents, *_), distances in reversed(walks.items())}
    return [
        {"latents": latents, "sampler": sampler, "steps": steps}
        | mean_and_deviation("frechet", distances)
        | mean_and_deviation("ratio", [own / first for own, first in zip(distances, firsts[latents], strict=True)])
        for (latents, sampler, steps), distances in walks.items()
    ]


def mean_and_deviation(name: str, values: list[float]) -> dict[str, float | None]:
    """The mean of some values, and where there are several their deviation, under `name`."""
    return {name: statistics.mean(values), f"{name}_deviation": statistics.stdev(values) if len(values) > 1 else None}


def likeness(
    model: Pipeline,
    features: evaluation.Features,
    real: Tensor,
    beta: float | None,
    samples: bool,
    sampling: dict[str, Any],
) -> dict[str, float]:
    """Distance and squared error to `real` of the same images encoded at beta, samples or means, and denoised."""
    _, denoised = evaluation.decoded_and_denoised(model, real, beta, samples=samples, **sampling)
    return {"frechet": features.distance(denoised, real), "mse": float((denoised - real).square().mean())}


if __name__ == "__main__":
    main()
