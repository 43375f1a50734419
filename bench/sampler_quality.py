"""Frechet distance of samplers at any number of steps, on one model, in one run.

    python bench/sampler_quality.py scenes32 --rows ode2:20 ancestral:1000 --num-images 500 --dtype bfloat16

Appends one JSON line to sampler_quality.jsonl in the folder that --results names.
"""

from __future__ import annotations

import json
import time

import torch

from common import measure
from multibeta import DenoisingMultiBetaVAE, data, evaluation, recipes


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("model", help="folder of a trained model or name of a shipped one; its recipe names the data")
    parser.add_argument("--rows", nargs="+", default=["ode2:20", "ancestral:1000"], help="sampler:steps")
    parser.add_argument("--num-images", type=int, default=500, help="images on each side of the distance")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the networks")
    arguments = parser.parse_args()

    model = DenoisingMultiBetaVAE.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    rows = [row.split(":") for row in arguments.rows]
    samplings = [{"sampler": name, "steps": int(steps), "delta_sign": 1} for name, steps in rows]
    evaluation.checked_samplings(model, samplings)
    train_set, test_set = recipes.open_data(recipes.from_dict(model.info["recipe"]))
    features = evaluation.classifier_features(train_set, test_set)
    train_images, real = (data.to_float(part.images(range(arguments.num_images))) for part in (train_set, test_set))

    start = time.perf_counter()
    result = evaluation.generation(model, features, train_images, real, samplings)
    facts = {"seconds": time.perf_counter() - start, "classifier_accuracy": features.accuracy}
    measure.record(arguments.results, "sampler_quality.jsonl", {**facts, "result": result})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
