"""What a report is of: the model, its recipe, the images, the machine."""

from __future__ import annotations

import dataclasses
import platform
import time

import torch

from multibeta import data, recipes
from multibeta.environment import processor, version
from multibeta.evaluation import recorded_recipe, recorded_training
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, Pipeline
from multibeta.report import diffusion_vae, multi_beta
from multibeta.report.system import System

SYSTEMS: dict[type[Pipeline], System] = {DenoisingMultiBetaVAE: multi_beta.SYSTEM, DiffusionVAE: diffusion_vae.SYSTEM}


def system_of(model: Pipeline) -> System:
    """The system of a model; `ValueError` where there is no report of its class."""
    if type(model) not in SYSTEMS:
        classes = " or a ".join(known.__name__ for known in SYSTEMS)
        raise ValueError(f"a report is of a {classes}, got a {type(model).__name__}: `multibeta evaluate` measures that")
    return SYSTEMS[type(model)]


def chosen_recipe(model: Pipeline, source: str | None) -> recipes.Recipe:
    """The model's own recipe, or that of the small scenes around its VAE; `source` replaces the images."""
    if "data" in (recorded := recorded_recipe(model)):
        recipe = recipes.from_dict(recorded)
    else:
        recipe = dataclasses.replace(recipes.find(system_of(model).preset), vae=model.vae.config)
    if source is None or source == recipe.data.source:
        return recipe
    images = dataclasses.replace(recipe.data, source=source, num_train=8000 if source == "scenes" else None)
    return dataclasses.replace(recipe, data=images)


def model_facts(model: Pipeline) -> dict:
    """Where the model comes from, how large it is, and what its class has to say."""
    config = model.vae.config
    return {
        "class": type(model).__name__,
        **recorded_training(model),
        **{f"{name}_parameters": sum(map(torch.numel, getattr(model, name).parameters())) for name in model.present_parts},
        "resolution": config.resolution,
        "latent_shape": list(config.latent_shape),
        "num_steps": model.num_steps,
        **(SYSTEMS[type(model)].facts(model) if type(model) in SYSTEMS else {}),
    }


def data_facts(model: Pipeline, recipe: recipes.Recipe, train_set: data.Subset, test_set: data.Subset) -> dict:
    """The images, and whether they are those the model was trained with, split as they were."""
    return {
        "source": recipe.data.source,
        "own_split": is_own(model, recipe, train_set),
        "train_images": len(train_set),
        "held_out_images": len(test_set),
        "factor_sizes": list(test_set.factor_sizes) if data.knows_factors(test_set) else None,
    }


def is_own(model: Pipeline, recipe: recipes.Recipe, train_set: data.Subset) -> bool:
    """Whether the model was trained with the split of images of a recipe, and these are still the same images."""
    if "data" not in (recorded := recorded_recipe(model)):
        return False
    trained = recipes.from_dict(recorded).data
    fingerprints = model.info.get("images", {}).get("fingerprint"), data.fingerprint_of(train_set)
    same = None in fingerprints or len(set(fingerprints)) == 1
    return same and dataclasses.replace(trained, mirror=recipe.data.mirror) == recipe.data


def environment(model: Pipeline, started: float) -> dict:
    """What the numbers were computed with, and how long it took."""
    return {
        "multibeta": version("multibeta") or "not installed",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        "seconds": round(time.perf_counter() - started, 1),
    }
