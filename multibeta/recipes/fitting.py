"""A preset with what was typed, made to fit the images that were named."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from multibeta import data
from multibeta.recipes import preflight
from multibeta.recipes.recipe import Recipe, located, open_images, split_counts

logger = logging.getLogger(__name__)


def flags_of(command: str) -> set[str]:
    """The flags of a command line, as `preflight.flag` writes them: --vae.image-channels."""
    return {word.partition("=")[0].replace("_", "-") for word in shlex.split(command) if word.startswith("--")}


def resolve(
    preset: Recipe,
    values: dict[str, Any],
    seed: int | None,
    flags: Collection[str] = (),
    dataset: data.Dataset | data.Foreign | None = None,
) -> Recipe:
    """The preset with other `values` and seeds, checked before the work begins, alone and against its images.

    A folder named in place of the preset's images is used whole where it holds fewer than the preset asks for, in batches that it
    fills; numbers that were typed stay, and are refused where they cannot be. A preset that mirrors its images does not do so
    where their factors are known, unless that was typed. What was changed and what seems odd is logged, and how many images are
    held out.

    Args:
        values: Fields of the recipe, by name; those of both stages among them.
        seed: Of the weights, the order and the noise in both stages; None keeps those of `values`.
        flags: Those that were typed, as `flags_of` reads them: they tell a number that was typed from the preset's.
        dataset: In place of the images that the recipe names.

    Raises:
        ValueError: What cannot be, with the flag of `multibeta train` that mends it.
    """
    if seed is not None:
        values = values | {stage: dataclasses.replace(values[stage], seed=seed) for stage in preflight.STAGES}
    recipe = dataclasses.replace(preset, **values)
    for name, given in dataclasses.asdict(values["diffusion"]).items():
        fitted = getattr(recipe.diffusion, name)
        if given not in (fitted, getattr(preset.diffusion, name)):
            raise ValueError(f"diffusion.{name} follows from the VAE and is {fitted}, got {given}; change the vae field instead")
    preflight.check_effect(recipe, flags)
    networks = preflight.check(recipe)
    words = [*preflight.check_attention(recipe, preset), *preflight.check_norms(*networks)]
    recipe, more = fit_to_images(recipe, preset, flags, dataset)
    for word in words + more:
        logger.warning("%s", word)
    return recipe


def lacks_images(recipe: Recipe, preset: Recipe) -> bool:
    """Whether a recipe still has the folder of its preset, a name that stands for one of the user's, and there is none here."""
    source = recipe.data.source
    relative = source != data.absolute_source(source)
    return relative and source == preset.data.source and not Path(source).exists()


def keep_factors(recipe: Recipe, images: data.Dataset) -> tuple[Recipe, list[str]]:
    """A recipe that trains on no mirror images of a dataset that knows factors, and words on what was changed."""
    if not (recipe.data.mirror and data.knows_factors(images)):
        return recipe, []
    names = ", ".join(images.factor_names)
    words = [f"{recipe.data.source} knows {names} of its images, which a mirror may change: not mirrored"]
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, mirror=False)), words


def fit_to_images(
    recipe: Recipe, preset: Recipe, flags: Collection[str], dataset: data.Dataset | data.Foreign | None = None
) -> tuple[Recipe, list[str]]:
    """A recipe made to fit the number of its images where no `flags` say otherwise, and words on what was changed."""
    images, words = recipe.data, []
    own = images.source == preset.data.source
    if dataset is None and lacks_images(recipe, preset):
        return recipe, [f"there is no folder {images.source} here, the images of the recipe: name yours with --data.source"]
    try:
        opened = open_images(recipe, dataset)
    except ValueError as error:
        raise preflight.with_fitting_resolution(recipe, error) from error
    if not own:
        recipe = located(recipe, dataset)
    if images.source == "scenes" and dataset is None and Path("scenes").is_dir():
        words.append("the images are the built-in scenes: the folder of that name is ./scenes")
    held = len(opened)
    asked = preset.data.num_train
    fewer = not own and asked is not None and held < asked + (images.num_test or 0)
    if fewer and images.num_train == asked and "--data.num-train" not in flags:
        words.append(f"{images.source} holds {held} images, fewer than the recipe asks for: using all of them")
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, num_train=None))
    if preset.data.mirror and "--data.mirror" not in flags:
        recipe, unmirrored = keep_factors(recipe, opened)
        words += [f"{word} (--data.mirror does)" for word in unmirrored]
    num_train, num_test = split_counts(recipe, held)
    mirrored = ", and their mirror images" if recipe.data.mirror else ""
    logger.info("%d images: %d to train on%s, %d held out", held, num_train, mirrored, num_test)
    num_train *= 2 if recipe.data.mirror else 1
    given = {stage for stage in preflight.STAGES if preflight.flag(stage, "batch_size") in flags}
    changed = {s for s in preflight.STAGES if getattr(recipe, s).batch_size != getattr(preset, s).batch_size}
    recipe, fitted = preflight.fit_batches(recipe, num_train, given | changed)
    preflight.check_counts(recipe, num_train)
    return recipe, words + fitted
