"""The paper as printed and this library, same data, same budget: what each correction buys.

    python bench/literal_paper.py --out runs/literal

Trains the VAE with Eq. 4 as printed and with the balance of the recipe, on each a diffusion model with the heads of Eq. 19 as
printed or normalised, samples each by Algorithm 2 as printed and by the mended samplers, and appends one JSON line per row to
literal_paper.jsonl in the folder that --results names.
"""

from __future__ import annotations

import dataclasses
import operator
import shutil
import time
from pathlib import Path
from typing import cast

from common import measure
from multibeta import DenoisingMultiBetaVAE, data, evaluation, recipes

SAMPLINGS = (
    {"sampler": "resample", "steps": 50, "delta_sign": -1},
    {"sampler": "resample", "steps": 50, "delta_sign": 1},
    {"sampler": "ancestral", "steps": 50, "delta_sign": 1},
    {"sampler": "ode2", "steps": 20, "delta_sign": 1},
)


def variants(base: recipes.MultiBetaRecipe) -> dict[str, recipes.MultiBetaRecipe]:
    """Recipes that add one correction after the other, by what they print."""
    printed = recipes.literal(base)
    balanced = dataclasses.replace(base, diffusion=printed.diffusion)
    return {"Eq. 4, Eq. 19": printed, "balanced, Eq. 19": balanced, "balanced, normalised heads": base}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/literal"), help="checkpoints; finished stages are reused")
    parser.add_argument("--recipe", default="scenes32-small", help="a recipe on data with known factors")
    parser.add_argument("--steps", type=int, help="training steps of each stage, instead of the recipe's")
    parser.add_argument("--num-images", type=int, default=500, help="images on each side of a Frechet distance")
    arguments = parser.parse_args()

    base = recipes.find(arguments.recipe)
    if not isinstance(base, recipes.MultiBetaRecipe):
        parser.error(f"--recipe names one of MultiBeta, {base.name} is none")
    if arguments.steps:
        stages = {stage: getattr(base, stage) for stage in ("vae_training", "diffusion_training")}
        base = dataclasses.replace(base, **{k: dataclasses.replace(v, steps=arguments.steps) for k, v in stages.items()})
    train_set, test_set = recipes.open_data(base)
    train_images, real = (data.to_float(part.images(range(arguments.num_images))) for part in (train_set, test_set))
    features = evaluation.classifier_features(train_set, test_set)
    print("classifier accuracy", features.accuracy)
    trained: dict[Path, recipes.Recipe] = {}
    for label, recipe in variants(base).items():
        start = time.perf_counter()
        folder = arguments.out / label.replace(" ", "-").replace(",", "").replace(".", "").lower()
        share_first_stage(recipe, folder, trained)
        model = cast(DenoisingMultiBetaVAE, recipes.run(recipe, folder, resume=True))
        seconds = time.perf_counter() - start
        result = {
            "facts": evaluation.facts(model, real),
            "heads": evaluation.head_fit(model, real),
            "generation": evaluation.generation(model, features, train_images, real, SAMPLINGS),
        }
        facts = {"variant": label, "recipe": recipes.to_dict(recipe), "seconds": seconds}
        measure.record(arguments.results, "literal_paper.jsonl", {**facts, "result": result})
        report(label, result)


def share_first_stage(recipe: recipes.Recipe, folder: Path, trained: dict[Path, recipes.Recipe]) -> None:
    """Start `folder` from the VAE of a folder trained before with the same first stage; note `folder` as trained."""
    stage = operator.attrgetter("data", "vae", "vae_objective", "vae_training")
    same = [other for other, done in trained.items() if stage(done) == stage(recipe)]
    if same and not (folder / "vae").exists():
        shutil.copytree(same[0] / "vae", folder / "vae")
    trained[folder] = recipe


def report(label: str, result: dict) -> None:
    """The rows of one model, as text."""
    generation = result["generation"]
    values = {fact["name"]: fact["value"] for fact in result["facts"]}
    deviation = next(value for name, value in values.items() if name.startswith("deviation of f(x, 1)"))
    print(f"\n{label}: std f(x, 1) {deviation:.3f}; Frechet distance, floor {generation['autoencoder_floor']:.2f}")
    for row in generation["samples"]:
        sign = " as printed" if row["delta_sign"] < 0 else ""
        print(f"  {row['sampler'] + sign:22s} {row['steps']:5d} steps  {row['frechet']:8.2f}  sharpness {row['sharpness']:.2f}")


if __name__ == "__main__":
    main()
