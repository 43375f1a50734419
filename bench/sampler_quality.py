"""Frechet distance of samplers at any number of steps, on one model, in one run.

    python bench/sampler_quality.py scenes32 --rows ode2:20 ancestral:1000 --num-images 500 --dtype bfloat16

Appends one JSON line to bench/results/sampler_quality.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

from multibeta import DenoisingMultiBetaVAE, data, evaluation, recipes

RESULTS = Path(__file__).parent / "results" / "sampler_quality.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a trained model or name of a shipped one; its recipe names the data")
    parser.add_argument("--rows", nargs="+", default=["ode2:20", "ancestral:1000"], help="sampler:steps")
    parser.add_argument("--num-images", type=int, default=500, help="images on each side of the distance")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the networks")
    arguments = parser.parse_args()

    model = DenoisingMultiBetaVAE.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    train_set, test_set = recipes.open_data(recipes.from_dict(model.info["recipe"]))
    features = evaluation.classifier_features(train_set, test_set)
    train_images, real = (data.to_float(part.images(range(arguments.num_images))) for part in (train_set, test_set))
    samplers = [(name, int(steps), 1) for name, steps in (row.split(":") for row in arguments.rows)]

    start = time.perf_counter()
    result = evaluation.generation(model, features, train_images, real, samplers)
    line = {
        "command": " ".join(["python", *sys.argv]),
        "seconds": time.perf_counter() - start,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "classifier_accuracy": features.accuracy,
        "result": result,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
