"""What each part of stage 2 buys on a folder of images, next to plain latent diffusion, all on one frozen VAE.

    python bench/stage_two.py FOLDER --out runs/stage-two --variants cosine ldm:1080 --seeds 0 1 2

Trains the VAE of the recipe once, then every variant with every seed, on the images without their mirror images, and appends a
JSON line for each to stage_two.jsonl in the folder that --results names: Frechet distances of new images of two seeds, and CPU
seconds of all that stage 2 did. NAME:STEPS gives a variant other steps than --steps. A picture of new images lies next to the
folder of each training.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from common import measure
from multibeta import data, evaluation, recipes
from multibeta.reproduce.latent_diffusion import SAMPLING_STEPS

Change = Callable[[recipes.MultiBetaRecipe], recipes.Recipe]


def changed(recipe: recipes.MultiBetaRecipe, diffusion: dict, objective: dict) -> recipes.MultiBetaRecipe:
    """The recipe with other fields of its network and its objective of stage 2."""
    return dataclasses.replace(
        recipe,
        diffusion=dataclasses.replace(recipe.diffusion, **diffusion),
        diffusion_objective=dataclasses.replace(recipe.diffusion_objective, **objective),
    )


PLAIN = {"parameterization": "v", "basis": "pixel", "spacing": "uniform"}
VARIANTS: dict[str, Change] = {
    "as-printed-t": lambda recipe: changed(recipe, PLAIN, {"nodes": 0, "uniform_share": 1.0, "move_share": None}),
    "table": lambda recipe: changed(recipe, PLAIN, {"uniform_share": 1.0, "move_share": None}),
    "turn": lambda recipe: changed(recipe, PLAIN | {"spacing": "turn"}, {"move_share": None}),
    "residual": lambda recipe: changed(recipe, {"basis": "pixel"}, {}),
    "cosine": lambda recipe: recipe,
    "ldm": lambda recipe: recipes.LatentDiffusionRecipe.beside(recipe, "latent diffusion"),
}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("folder", help="images, as `multibeta train` takes them, or scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/stage-two"), help="checkpoints; finished trainings are reused")
    parser.add_argument("--recipe", default="photos32")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help=f"of {', '.join(VARIANTS)}, with :STEPS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=800, help="of stage 2")
    parser.add_argument("--num-train", type=int, help="images to train on, by default all others; of scenes say how many")
    parser.add_argument("--num-test", type=int, default=757, help="images held out, and on each side of a distance")
    arguments = parser.parse_args()

    recipe = base(arguments)
    train_set, test_set = recipes.open_data(recipe)
    first = arguments.out / "first"
    vae = recipes.train_vae(recipe, train_set, test_set, first, resume=(first / "vae").exists())
    features = evaluation.usual_features(train_set, test_set)
    real = data.to_float(test_set.images(range(len(test_set))))
    for variant in arguments.variants:
        name, _, steps = variant.partition(":")
        for seed in arguments.seeds:
            training = dataclasses.replace(recipe.diffusion_training, steps=int(steps or arguments.steps), seed=seed)
            vae_training = dataclasses.replace(recipe.vae_training, seed=seed)  # which the U-Net starts from
            asked = VARIANTS[name](dataclasses.replace(recipe, vae_training=vae_training, diffusion_training=training))
            place = arguments.out / f"{variant.replace(':', '-')}-{seed}"
            began = time.process_time()
            model = recipes.train_diffusion(asked, vae, train_set, test_set, place, measures=False)
            sampler, seconds = model.usual_sampling["sampler"], time.process_time() - began
            facts = {"variant": name, "seed": seed, "steps": training.steps, "cpu_seconds": seconds, "sampler": sampler}
            distances = {}
            for number in SAMPLING_STEPS[sampler]:
                made = [model.generate(len(real), steps=number, seed=each).cpu() for each in (0, 1)]
                distances[number] = [features.distance(images, real) for images in made]
            data.save_grid(model.generate(64), place.with_suffix(".png"), columns=16)
            measure.record(arguments.results, "stage_two.jsonl", {**facts, "frechet": distances, "features": features.name})
            print(facts, distances, flush=True)


def base(arguments: argparse.Namespace) -> recipes.MultiBetaRecipe:
    """The recipe of the command line."""
    recipe = recipes.find(arguments.recipe)
    assert isinstance(recipe, recipes.MultiBetaRecipe), "of the first system"
    counts = {"num_train": arguments.num_train, "num_test": arguments.num_test}
    images = dataclasses.replace(recipe.data, source=arguments.folder, **counts, mirror=False)
    quiet = {"validate_every": 10**6, "checkpoint_every": 10**6}
    return dataclasses.replace(
        recipe,
        data=images,
        vae_training=dataclasses.replace(recipe.vae_training, steps=arguments.vae_steps),
        diffusion_training=dataclasses.replace(recipe.diffusion_training, **quiet),
    )


if __name__ == "__main__":
    main()
