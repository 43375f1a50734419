"""What a model records of its training, and what a result records of the model and the images."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from multibeta import data, recipes
from multibeta.pipelines import Pipeline
from multibeta.recipes.recipe import split_counts
from multibeta.weights import shorten, weights_hash

logger = logging.getLogger(__name__)


def recorded_recipe(model: Pipeline) -> dict[str, Any]:
    """The recipe that a model records, as `recipes.to_dict` writes it, or as much of it as there is; {} without one."""
    recipe = model.info.get("recipe")
    return recipe if isinstance(recipe, dict) else {} if recipe is None else {"name": recipe}


def recorded_training(model: Pipeline) -> dict[str, Any]:
    """What a model records of its training, None where it does not.

    Returns:
        "recipe", its name; "changed", what differs from the preset of that name, field to (preset, here), None if there is no
        such preset; "trained_on", the source of the images; "training_steps" of the VAE and of the diffusion model; "command".
    """
    recipe = recorded_recipe(model)
    steps = [recipe.get(stage, {}).get("steps") for stage in ("vae_training", "diffusion_training")]
    if None not in steps:
        steps[0] += recipe["vae_objective"].get("untie_steps", 0)
    return {
        "recipe": recipe.get("name"),
        "changed": recipes.recorded_changes(model.info),
        "trained_on": recipe.get("data", {}).get("source"),
        "training_steps": None if None in steps else steps,
        "command": model.info.get("command"),
    }


def described_training(facts: dict[str, Any]) -> str:
    """What `recorded_training` returns as a phrase: the recipe, what was changed of it, and the images."""
    if not facts["recipe"] and not facts["trained_on"]:
        return "no recipe recorded"
    changed = f" (changed: {shorten(list(facts['changed']))})" if facts["changed"] else ""
    images = f"trained on {facts['trained_on']}" if facts["trained_on"] else ""
    return ", ".join(filter(None, (f"recipe {facts['recipe'] or 'without a name'}{changed}", images)))


def source_of(model: Pipeline, named: str | None, flag: str) -> str:
    """The source of images that was `named` with `flag`, or else the one that the model records."""
    source = named or recorded_training(model)["trained_on"]
    if source is None:
        raise ValueError(f"the model does not record its data: name a folder or scenes with {flag}")
    return source


@contextlib.contextmanager
def of_recorded_data(source: str, named: str | None, flag: str) -> Iterator[None]:
    """Opening `source` goes on in here: where it fails and nobody `named` it, the error says that the model did, and `flag`."""
    try:
        yield
    except (OSError, ValueError) as error:
        if named is not None:
            raise
        error_class = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise error_class(
            f"the model records {source} as its data, which cannot be opened: name other images with {flag} ({error})"
        ) from error


def images_of_training(
    model: Pipeline, source: str | None, flag: str, *, upscale: bool, mirrored: bool = True
) -> tuple[data.Dataset, data.Dataset]:
    """(train, test) images: those that a model records, `mirrored` as there; or of a `source`, a tenth of them held out."""
    with of_recorded_data(source_of(model, source, flag), source, flag):
        if source is None:
            recipe = recipes.from_dict(recorded_recipe(model))
        else:
            options = recipes.DataOptions(source=source, num_test=None, upscale=upscale)
            recipe = dataclasses.replace(recipes.find("photos32"), vae=model.vae.config, data=options)  # which takes any images
        train_images, test_images = recipes.open_data(recipe)
    return data.Mirrored(train_images) if mirrored and recipe.data.mirror else train_images, test_images


def model_origin(model: Pipeline) -> dict[str, Any]:
    """Which model was measured."""
    return {
        "class": type(model).__name__,
        **recorded_training(model),
        "latent_shape": model.vae.config.latent_shape,
        "weights_hash": {name: weights_hash(getattr(model, name).state_dict()) for name in model.present_parts},
    }


def data_origin(model: Pipeline, dataset: data.Dataset) -> dict[str, Any]:
    """Which images it was measured on, and how many of them the model was trained on, None where that is not recorded."""
    named = {name: getattr(dataset, name, ()) or None for name in ("factor_names", "attribute_names", "class_names")}
    recorded = model.info.get("images") or {}
    fingerprints = {recorded.get("fingerprint"), data.fingerprint_of(dataset)}
    same = None not in fingerprints and len(fingerprints) == 1
    mirror = recorded_recipe(model).get("data", {}).get("mirror", False)
    trained = recorded["training"] // (2 if mirror else 1) if same else None
    if trained:
        logger.warning("the model was trained on %d of these %d images; --data names others", trained, len(dataset))
    size = {"num_images": len(dataset), "resolution": dataset.resolution, "trained_on": trained}
    return {"class": type(dataset).__name__, **size, **named}


def recorded_split(model: Pipeline, dataset: data.Dataset) -> tuple[Tensor, Tensor] | None:
    """Which images of a dataset a model was trained on, and which it held out, int64, (N,) and (M,).

    None where the model does not record it or held out none, and of a dataset of other images or a `Subset`.
    """
    recorded, recipe = model.info.get("images") or {}, recorded_recipe(model)
    fingerprint = data.fingerprint_of(dataset)
    if isinstance(dataset, data.Subset) or fingerprint is None or "data" not in recipe:
        return None
    if fingerprint != recorded.get("fingerprint") or not recorded["held_out"]:
        return None
    recipe = recipes.from_dict(recipe)
    counts = split_counts(recipe, len(dataset))
    if (counts[0] * (2 if recipe.data.mirror else 1), counts[1]) != (recorded["training"], recorded["held_out"]):
        return None
    return data.split_indices(len(dataset), *counts, recipe.data.seed)


def json_ready(value: Any) -> Any:
    """Lists for tuples, and None for a number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
