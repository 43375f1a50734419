"""The first system beside plain latent diffusion: two ways to learn stage 2 on one frozen VAE, at equal images and equal time."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from multibeta import checkpoints, data, evaluation, recipes
from multibeta.evaluation.images import new_images, reconstructions
from multibeta.files import read_json, write_text
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.pipelines import Pipeline, load_pretrained
from multibeta.recipes import preflight
from multibeta.reproduce.models import Study, started
from multibeta.reproduce.summary import summarise
from multibeta.training import check_folder, read_metrics

logger = logging.getLogger(__name__)

OURS, AS_MANY_IMAGES, AS_MUCH_TIME = "Denoising Multi-beta VAE", "latent diffusion, equal images", "latent diffusion, equal time"
NETWORKS = "photos32"  # the recipe where a study names none
SAMPLING_STEPS = {
    "dpm2m": (20, 10),
    "ode2": (20, 50),
    "ddim": (50, 20),
}  # of the usual sampler of either system; the picture shows the first
SHOWN = 10

Images = tuple[data.Dataset, data.Dataset]


def latent_diffusion(study: Study, folder: Path, progress: bool = True) -> dict:
    """Frechet distance of new images by the first system, and by plain latent diffusion on its VAE with a U-Net of its shape.

    The VAE is trained once, with the first seed, or is that of `study.vae`; stage 2 is trained with every seed. Latent diffusion
    takes as many steps as ours, so that both see as many images; and again as many as the CPU seconds of ours allow, by what
    both took with the first seed. Seconds are of all that a training does: statistics, encodings, steps, validation, pictures.
    What each beta keeps of images is not measured.
    """
    place = folder / "latent-diffusion"
    recipe, vae, images = prepared(study, place, progress)
    train_set, test_set = recipes.open_data(recipe)
    features = evaluation.usual_features(train_set, test_set, progress=progress)
    train_images, real, _ = evaluation.equally_many(train_set, test_set, min(1000, study.num_images))
    energy, rows, shown = evaluation.mean_energy(real), [], {"held-out images": real[:SHOWN]}
    taken, seconds = {OURS: study.diffusion_steps, AS_MANY_IMAGES: study.diffusion_steps}, {}
    floors = {"training images": train_images}
    for seed in study.seeds:
        folders = {name: place / f"seed-{seed}" / name.replace(", ", "-") for name in (OURS, AS_MANY_IMAGES, AS_MUCH_TIME)}
        for name in folders:
            if name not in taken:
                spare = (seconds[OURS] - seconds[AS_MANY_IMAGES]) / seconds_per_step(folders[AS_MANY_IMAGES] / "diffusion")
                taken[name] = max(1, study.diffusion_steps + round(spare))
            asked = seeded(recipe, seed, taken[name])
            if name != OURS:
                asked = recipes.LatentDiffusionRecipe.beside(asked, f"{recipe.name}, latent diffusion")
            model, seconds[name] = trained_stage(asked, vae, images, folders[name], progress)
            cost = {"steps": taken[name], "images": taken[name] * asked.diffusion_training.batch_size}
            sampler = model.usual_sampling["sampler"]
            for steps in dict.fromkeys(min(number, model.num_steps) for number in SAMPLING_STEPS[sampler]):
                made = new_images(model, len(real), progress=progress, sampler=sampler, steps=steps)
                quality = {"frechet": features.distance(made, real), "sharpness": evaluation.mean_energy(made) / energy}
                row = {"name": name, "sampler": f"{sampler} {steps}", "seed": seed} | quality | cost
                rows.append(row | {"cpu_seconds": seconds[name]})
                if not any(label.startswith(name) for label in shown):
                    shown[f"{name}, {sampler} {steps}"] = made[:SHOWN]
            if name == OURS:
                floors["training images, decoded at beta = 0"] = reconstructions(model, train_images, 0.0)
    distances = [{"name": name, "frechet": features.distance(made, real)} for name, made in floors.items()]
    picture = folder / "latent_diffusion.png"
    data.save_grid(torch.cat(list(shown.values())), picture, columns=len(real[:SHOWN]))
    return {
        "features": features.name,
        "num_images": len(real),
        "num_train": len(images[0]),
        "recipe": recipes.to_dict(recipe),
        "rows": rows,
        "summary": summarise(rows, ("name", "sampler"), ("frechet", "sharpness", "steps", "images", "cpu_seconds")),
        "floors": distances,
        "floors_summary": summarise(distances, ("name",), ("frechet",)),
        "picture": f"{picture}, from above: {'; '.join(shown)}. Of the first seed, not chosen.",
    }


def prepared(study: Study, folder: Path, progress: bool = True) -> tuple[recipes.MultiBetaRecipe, MultiBetaVAE, Images]:
    """The recipe of ours, its frozen VAE, trained where neither the study nor `folder` has it, and the images of training.

    Raises:
        ValueError: `study.vae` is no model of the first system, or was trained on other images than those of the study.
    """
    model = None if study.vae is None else load_pretrained(study.vae)
    recipe = fitted(study) if model is None else recipe_of(model, study)
    train_set, test_set = recipes.open_data(recipe)
    images = data.Mirrored(train_set) if recipe.data.mirror else train_set, test_set
    if model is not None:
        return recipe, model.vae, images
    vae = recipes.train_vae(recipe, *images, folder, resume=started(folder / "vae"), progress=progress)
    return recipe, cast("MultiBetaVAE", vae), images


def recipe_of(model: Pipeline, study: Study) -> recipes.MultiBetaRecipe:
    """The recipe that the model of `study.vae` records, whose split of the images is then that of the study."""
    recorded = evaluation.recorded_recipe(model)
    recipe = recipes.from_dict(recorded) if "data" in recorded else None
    if not isinstance(recipe, recipes.MultiBetaRecipe):
        held = type(model).__name__
        raise ValueError(f"vae must be a DenoisingMultiBetaVAE that records its recipe, {study.vae} holds a {held}")
    if study.networks:
        raise ValueError(f"vae brings its own networks: give {study.vae} or networks={study.networks!r}, not both")
    source = recipe.data.source
    if data.absolute_source(source) != study.source:
        raise ValueError(f"{study.vae} was trained on {source}, the source of the study is {study.source}: make it the same")
    return recipe


def fitted(study: Study) -> recipes.MultiBetaRecipe:
    """The recipe of a study: all images of a source that has fewer than it asks for, no mirror images where factors are known."""
    recipe = dataclasses.replace(study, networks=study.networks or NETWORKS).recipe(study.seeds[0], fold=True)
    images = recipes.open_images(recipe)
    kept, unmirrored = recipes.keep_factors(recipe, images)
    for word in unmirrored:
        logger.warning("%s", word)
    recipe, options, held = cast("recipes.MultiBetaRecipe", kept), kept.data, len(images)
    num_train = held - min(options.num_test or 0, held // 5)
    if num_train >= study.num_train:
        return recipe
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(options, num_train=None))
    fitting, words = preflight.fit_batches(recipe, num_train * (2 if options.mirror else 1), set())
    for word in [f"{study.source} holds {held} images: {num_train} to train on, {held - num_train} held out", *words]:
        logger.warning("%s", word)
    return cast("recipes.MultiBetaRecipe", fitting)


def seeded(recipe: recipes.MultiBetaRecipe, seed: int, steps: int) -> recipes.MultiBetaRecipe:
    """The recipe with a seed and steps of its own in stage 2; the seed of stage 1 is what the U-Net is initialised from."""
    return dataclasses.replace(
        recipe,
        vae_training=dataclasses.replace(recipe.vae_training, seed=seed),
        diffusion_training=dataclasses.replace(recipe.diffusion_training, steps=steps, seed=seed),
    )


def trained_stage(
    recipe: recipes.Recipe, vae: MultiBetaVAE, images: Images, folder: Path, progress: bool
) -> tuple[Pipeline, float]:
    """Stage 2 of a recipe on a frozen VAE, trained first where `folder` does not hold it, and the CPU seconds it took.

    Raises:
        ValueError: `folder` holds a training that was killed, so that nobody knows its seconds, or one by another recipe.
    """
    record, resume = folder / "cpu_seconds.json", started(folder / "diffusion")
    options, context = recipe.plan()["diffusion"]
    check_folder(folder / "diffusion", options, images[0], resume=True, context=context)
    if not checkpoints.exists(folder / "model"):
        if resume and not record.exists():
            raise ValueError(f"the training in {folder} was killed and left no record of its CPU seconds: remove that folder")
        before = cast("dict[str, Any]", read_json(record))["cpu_seconds"] if resume else 0.0
        record.unlink(missing_ok=True)
        began = time.process_time()
        try:
            recipes.train_diffusion(recipe, vae, *images, folder, resume=resume, progress=progress, measures=False)
        finally:
            write_text(record, json.dumps({"cpu_seconds": before + time.process_time() - began}))
    return load_pretrained(folder / "model"), cast("dict[str, Any]", read_json(record))["cpu_seconds"]


def seconds_per_step(folder: Path) -> float:
    """CPU seconds of a step of the training in `folder`, validation and pictures apart."""
    return float(np.mean([line["cpu_seconds_per_step"] for line in read_metrics(folder) if "cpu_seconds_per_step" in line]))
