"""From a folder of images to a trained model in one call: which recipe, at which resolution, with how many steps."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch

from multibeta import data, distribution, processors
from multibeta.checks import check_integer
from multibeta.pipelines import DenoisingMultiBetaVAE
from multibeta.recipes import preflight
from multibeta.recipes.fitting import resolve
from multibeta.recipes.planning import check_minutes, fit_to_time
from multibeta.recipes.presets import PHOTOS, find
from multibeta.recipes.recipe import Recipe, open_images
from multibeta.recipes.stages import run

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = "scenes32"


def choose(name: str | None = None, source: str | None = None, resolution: int | None = None) -> Recipe:
    """The preset of a name, at `resolution`.

    Without a name it is that of the built-in scenes, or for any other `source` one of `PHOTOS`: the largest that is not above
    `resolution`, made to fit it; without a resolution the first.

    Raises:
        ValueError: There is no preset of that name, or its networks cannot have that resolution.
    """
    if resolution is not None:
        check_integer("resolution", resolution, 1)
    if name is not None or source in (None, "scenes"):
        preset = find(name or DEFAULT_RECIPE)
    else:
        below = [each for each in PHOTOS if find(each).vae.resolution <= (resolution or 0)]
        preset = find(below[-1] if below else PHOTOS[0])
        if resolution is not None:  # attention at the same levels
            sides = [side * resolution // preset.vae.resolution for side in preset.diffusion.attention_resolutions]
            unet = dataclasses.replace(preset.diffusion, attention_resolutions=tuple(sides))
            preset = dataclasses.replace(preset, diffusion=unet)
    if resolution in (None, preset.vae.resolution):
        return preset
    with preflight.naming_flags("vae", type(preset.vae)):
        return dataclasses.replace(preset, vae=dataclasses.replace(preset.vae, resolution=resolution))


def default_folder(source: str | Path) -> Path:
    """Where a run on the images of a source goes, unless it is said: runs/photos for ~/photos, runs/celeba for celeba:PATH."""
    name, colon, _ = str(source).partition(":")
    return Path("runs") / (name if colon and name in data.PUBLISHED else Path(data.absolute_source(source)).name or "images")


def say_choice(preset: Recipe) -> None:
    """Log which preset was taken where none was named."""
    logger.info("no recipe was named: it is %s", preset.name)


def train(
    source: str | Path | data.Dataset | data.Foreign,
    resolution: int | None = None,
    minutes: float | None = None,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    resume: bool = False,
    progress: bool = True,
    **fields: dict[str, Any],
) -> DenoisingMultiBetaVAE:
    """A model of a folder of images, trained in the time that is given: what `multibeta train FOLDER` does.

    The recipe is `photos32`, `photos64` or `photos128`, the largest that is not above `resolution`. A tenth of the images is held
    out; the others are trained on together with their mirror images, which images of text or digits should not be:
    `data={"mirror": False}`. Where factors are known, as of the scenes, there are none.

    The device, the plan, counts and what was changed are logged by the logger `multibeta`, which Python shows after
    `logging.basicConfig(level=logging.INFO)`.

    Args:
        source: Folder of images, or what else `data.open_dataset` takes, such as "celeba:PATH"; "scenes" for the built-in ones.
            Or a dataset: a `data.Dataset` of that resolution, any map-style one, see `data.MapDataset`, or any iterable, see
            `data.StreamDataset`.
        resolution: Pixels per side, 32 if it is not said.
        minutes: For the whole training. About ten steps of each stage are measured here, and as many planned as fit. By default
            those of `recipes.MINUTES`: 40, of 64 pixels 120, of 128 pixels 360.
        out: Folder of the run, by default runs/NAME with the name of the folder of images, or the class of the dataset; the model
            is in its subfolder model.
        seed: Of the weights, the order and the noise in both stages.
        device: Where to train; by default on the GPU, where torch sees one.
        resume: Continue the run in `out`, with the steps that it began with.
        progress: Show progress bars.
        fields: Fields of parts of the recipe: `vae={"latent_channels": 8}`, `vae_training={"steps": 3000}`. Steps that are said
            are not planned.

    Returns:
        The model, as `DenoisingMultiBetaVAE.from_pretrained(out / "model")` loads it.

    Raises:
        ValueError: Something cannot be; says which flag of `multibeta train` would mend it, and so which of the `fields`.
        OSError: The images are not there; `FileExistsError` where `out` holds a run and `resume` is False.
    """
    device = distribution.local_device(device)
    dataset = None if isinstance(source, str | os.PathLike) else source
    name = str(source) if dataset is None else data.source_name(dataset)
    given = {**fields, "data": {**fields.get("data", {}), "source": name}}
    if resolution not in (None, given.get("vae", {}).get("resolution", resolution)):
        raise ValueError(f"resolution {resolution} and vae={given['vae']} say two resolutions: give one")
    preset = choose(None, name, resolution)
    values, flags = with_fields(preset, given)
    check_minutes(minutes, flags)
    folder = Path(out or (default_folder(name) if dataset is None else Path("runs") / type(dataset).__name__))
    say_choice(preset)
    with processors.fitting_threads():
        preflight.check_device(device)
        distribution.say_device(device)
        dataset = None if dataset is None else open_images(dataclasses.replace(preset, **values), dataset)  # prepared once
        recipe = resolve(preset, values, seed, flags, dataset)
        preflight.check_place(recipe, folder, resume=resume)
        recipe, plan = fit_to_time(recipe, minutes, folder, flags=flags, resume=resume, device=device, dataset=dataset)
        model = run(recipe, folder, resume=resume, device=device, progress=progress, dataset=dataset, plan=plan)
    assert isinstance(model, DenoisingMultiBetaVAE)
    return model


def with_fields(preset: Recipe, given: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], set[str]]:
    """The parts of a recipe with other fields, and the flags that say the same.

    Raises:
        ValueError: There is no such part, or it has no such field.
    """
    names = [field.name for field in dataclasses.fields(preset)]
    parts: dict[str, Any] = {name: getattr(preset, name) for name in names if dataclasses.is_dataclass(getattr(preset, name))}
    values = dict(parts)
    for name, fields in given.items():
        if name not in parts:
            raise ValueError(f"a recipe has no part {name!r}: there are {', '.join(parts)}")
        known = [field.name for field in dataclasses.fields(parts[name])]
        if not isinstance(fields, dict) or not fields.keys() <= set(known):
            raise ValueError(f"{name} must be a dict of some of {', '.join(known)}, got {fields!r}")
        with preflight.naming_flags(name, type(parts[name])):
            values[name] = dataclasses.replace(parts[name], **fields)
    return values, {preflight.flag(name, field) for name, fields in given.items() for field in fields}
