"""Whether a preset of any size trains from end to end on this machine: both stages for a few steps of one image, and its memory.

    python bench/toy_length.py --recipe celebahq256

The networks are the preset's own; steps, images, grid of beta and pictures are as few as can be. Images are built-in scenes, read
from PNG files. Appends a JSON line to toy_length.jsonl in the folder that --results names.
"""

from __future__ import annotations

import dataclasses
import logging
import resource
import tempfile
import time
from pathlib import Path
from unittest import mock

from PIL import Image

from common import measure
from multibeta import data, recipes
from multibeta.pipelines import Pipeline
from multibeta.recipes import pictures, stages

IMAGES = 12


def write_images(folder: Path, resolution: int) -> None:
    """A folder of scenes."""
    folder.mkdir()
    for number, image in enumerate(data.Scenes(resolution).images(range(0, 480_000, 480_000 // IMAGES))):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:02d}.png")


def shortened(recipe: recipes.MultiBetaRecipe, folder: Path, steps: int, recompute: bool) -> recipes.MultiBetaRecipe:
    """The recipe at toy length, on the images of a folder."""
    fields = {"steps": steps, "batch_size": 1, "accumulate": 1, "recompute": recompute}
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, source=str(folder), num_train=IMAGES, num_test=0),
        vae=dataclasses.replace(recipe.vae, num_steps=4),
        vae_training=dataclasses.replace(recipe.vae_training, **fields),
        diffusion_objective=dataclasses.replace(recipe.diffusion_objective, statistics_images=2),
        diffusion_training=dataclasses.replace(recipe.diffusion_training, **fields),
    )


def save_one(model: Pipeline, path: Path) -> None:
    """A picture of one new image in the place of 32."""
    data.save_grid(model.generate(1), path, columns=1)


def peak_gib() -> float:
    """What this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    names = tuple(name for name, recipe in recipes.RECIPES.items() if isinstance(recipe, recipes.MultiBetaRecipe))
    parser = measure.parser(__doc__)
    parser.add_argument("--recipe", choices=names, default="celebahq256")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--recompute", action="store_true", help="keep the inputs of blocks alone")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    preset = recipes.find(arguments.recipe)
    assert isinstance(preset, recipes.MultiBetaRecipe)
    with tempfile.TemporaryDirectory() as place, mock.patch.object(pictures, "save_samples", save_one):
        folder, run = Path(place) / "images", Path(place) / "run"
        write_images(folder, preset.vae.resolution)
        recipe = shortened(preset, folder, arguments.steps, arguments.recompute)
        train_images, _ = recipes.open_data(recipe)
        images = train_images, data.Subset(train_images, [])
        with mock.patch.object(pictures, "shown_images", lambda *images: data.to_float(train_images.images([0]))):
            began = time.perf_counter()
            vae = stages.train_vae(recipe, *images, run)
            first = {"vae_seconds": time.perf_counter() - began, "vae_peak_gib": peak_gib()}
            model = stages.train_diffusion(recipe, vae, *images, run, measures=False)
        sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in (vae, model.diffusion)]
        loaded = type(model).from_pretrained(run / "model").generate(1, seed=0)
        result = {"recipe": recipe.name, "steps": arguments.steps, "recompute": arguments.recompute, "parameters": sizes, **first}
        result |= {"seconds": time.perf_counter() - began, "peak_gib": peak_gib(), "image": list(loaded.shape)}
        measure.record(arguments.results, "toy_length.jsonl", result)
    print("{recipe}, {parameters} parameters: {vae_peak_gib:.1f} GiB in stage 1, {peak_gib:.1f} GiB in all".format(**result))
    print("  {vae_seconds:.0f} s stage 1, {seconds:.0f} s in all, saved, loaded, and an image generated".format(**result))


if __name__ == "__main__":
    main()
