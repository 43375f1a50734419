"""A decoder before and after it is tuned against a discriminator: distances, sharpness, and a picture.

    python bench/decoder_tuning.py runs/scenes64/model --out runs/tuning --steps 2000 --seeds 0 1
    python bench/decoder_tuning.py runs/photos --data FOLDER --out runs/tuning --steps 2000

Measures the model as it is, then tunes its decoder with every seed and measures again, all on the same held-out images and noise,
and appends a JSON line for each to decoder_tuning.jsonl in the folder that --results names: Frechet distance and sharpness
(gradient energy relative to real images) of held-out images encoded and decoded at beta = 0, of new images, and of samples of
latents decoded directly at other betas, whose decoder was not trained there. Pictures lie next to the folders of the trainings.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import measure
from multibeta import data, evaluation, load_pretrained, recipes
from multibeta.evaluation.records import images_of_training
from multibeta.metrics.fidelity import mean_energy
from multibeta.pipelines import DenoisingMultiBetaVAE, LatentDiffusion

SHOWN = 10
FLAGS = {  # of the tuning, with the fields that they set
    "--steps": "steps",
    "--batch-size": "batch_size",
    "--learning-rate": "learning_rate",
    "--largest-beta": "largest_beta",
    "--weight": "weight",
    "--start": "start",
    "--penalty": "penalty",
    "--vgg": "vgg",
    "--heads": "heads",
    "--perceptual-weight": "perceptual_weight",
    "--discriminator-rate": "discriminator_rate",
    "--discriminator-channels": "discriminator_channels",
    "--discriminator-layers": "discriminator_layers",
    "--validate-every": "validate_every",
    "--checkpoint-every": "checkpoint_every",
}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("model", help="folder of a trained model, or name of a shipped one; its recipe names the data")
    parser.add_argument("--data", help="images in the place of those that the model was trained on")
    parser.add_argument("--out", type=Path, default=Path("runs/decoder-tuning"), help="of the trainings, and pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num-images", type=int, default=1000, help="on each side of a distance")
    parser.add_argument("--betas", type=float, nargs="*", default=[0.3, 0.5, 0.8], help="decoded directly")
    chosen = recipes.DecoderTuningOptions(steps=2000)
    for flag, name in FLAGS.items():
        default = getattr(chosen, name)
        parser.add_argument(flag, type=str if default is None else type(default), default=default)
    arguments = parser.parse_args()

    model = load_pretrained(arguments.model)
    assert isinstance(model, DenoisingMultiBetaVAE | LatentDiffusion), "whose decoder can be tuned"
    train_set, test_set = images_of_training(model, arguments.data, "--data", upscale=False)
    features = evaluation.usual_features(train_set, test_set)
    count = min(arguments.num_images, len(test_set))
    real = data.to_float(test_set.images(range(count)))
    facts = {"model": arguments.model, "data": arguments.data, "num_images": count, "features": features.name}

    def report(seed: int | None, asked: dict[str, Any], seconds: float, of: Any) -> None:
        row = facts | {"seed": seed, "options": asked, "cpu_seconds": seconds} | quality(of, features, real, arguments.betas)
        measure.record(arguments.results, "decoder_tuning.jsonl", row)
        print(json.dumps(row, indent=2))

    report(None, {}, 0.0, model)
    for seed in arguments.seeds:
        options = recipes.DecoderTuningOptions(seed=seed, **{name: getattr(arguments, name) for name in FLAGS.values()})
        tuned, folder, began = copy.deepcopy(model), arguments.out / f"seed-{seed}", time.process_time()
        recipes.tune_decoder(tuned, train_set, test_set, folder, options)
        report(seed, dataclasses.asdict(options), time.process_time() - began, tuned)
        tuned.save_pretrained(folder / "model")
        picture(model, tuned, real[:SHOWN], folder.with_suffix(".png"))


def quality(model: Any, features: evaluation.Features, real: Tensor, betas: list[float]) -> dict[str, Any]:
    """Distances and sharpness of what a model makes of real images, and of new ones."""
    energy = mean_energy(real)

    def of(images: Tensor) -> dict[str, float]:
        return {"frechet": features.distance(images, real), "sharpness": mean_energy(images) / energy}

    def decoded(beta: float) -> Tensor:
        seeds = torch.arange(len(real))
        return evaluation.batched(lambda index: model.decode(model.encode(real[index], beta, seeds=index), beta), seeds)

    rows = {}
    for beta in (0.0, *betas):
        images = decoded(beta)
        rows[f"{beta:g}"] = of(images) | {"mse": float((images - real).square().mean())}
    return {"decoded": rows, "new": [of(model.generate(len(real), seed=seed).cpu()) for seed in (0, 1)]}


def picture(before: Any, after: Any, images: Tensor, path: Path) -> None:
    """Held-out images, decoded by both decoders, and new images by both, of the same noise."""
    latents = before.encode(images, 0.0)
    rows = {"input": images, "before": before.decode(latents), "tuned": after.decode(latents)}
    rows |= {f"new, {name}": model.generate(len(images)) for name, model in (("before", before), ("tuned", after))}
    data.save_grid(torch.cat([each.cpu() for each in rows.values()]), path, columns=len(images), labels=list(rows))


if __name__ == "__main__":
    main()
