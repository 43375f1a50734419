"""Directions of a model's latents that a person can name: principal ones, channels, attributes of the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from multibeta import data, processors
from multibeta import latents as latent_space
from multibeta.checks import check_integer
from multibeta.data.dataset import is_dataset
from multibeta.latents import NamedDirections
from multibeta.pipelines.display import Traversals

if TYPE_CHECKING:
    from multibeta.pipelines.inputs import Images
    from multibeta.pipelines.protocol import Pipeline

DIRECTION_IMAGES = 1000  # of a dataset, whose encodings give directions


def named_directions(
    model: Pipeline, kind: str, images: data.Dataset | Images, beta: float | str | None = None, most: int | None = None
) -> NamedDirections:
    """Directions of one kind, found in the mean latents of images at beta, in steps of one standard deviation.

    Args:
        kind: "principal": by falling variance, named by index and share of the variance, "0 · 31%". "channel": of a vector latent
            its dimensions, else the whole map of a channel at once; those that do not vary are left out. "attribute": from the
            images without an attribute to those with it; those that do not split the images are left out.
        images: A dataset, of which 1000 images are taken at random; or images, see `inputs.as_images`, or latents (N, c, h, w)
            at beta. Attributes are known of a dataset alone.
        beta: As of `Pipeline.manipulate`.
        most: The first so many, where there are more; by default all.

    Raises:
        ValueError: Another kind, images that know no attributes, none that splits them, latents that do not differ, or no `most`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if most is not None:
        check_integer("most", most, 1)
    level, indices, encodings = encodings_of(model, images, beta)
    found = KINDS[kind](images, indices, encodings)
    names = tuple(found)[:most]
    steps = torch.stack([found[name] for name in names])
    return NamedDirections(names, steps, level, kind, model.latent_digest(), Traversals(model, level, encodings[:1]))


def encodings_of(
    model: Pipeline, images: data.Dataset | Images, beta: float | str | None
) -> tuple[float | None, Tensor | None, Tensor]:
    """What directions are found in: the level of `beta`, which of a dataset's images, and their mean latents, (N, c, h, w).

    Raises:
        ValueError: A level that the model has not, or latents that do not differ.
    """
    asked = "auto" if beta is None and model.usual_levels else beta
    (level,) = model.levels(None if asked is None else [asked])
    if is_dataset(images):
        indices = data.choose(len(images), DIRECTION_IMAGES)
        encodings = encode_dataset(model, images, indices, level)
    else:
        indices, encodings = None, model._encode_many(cast("Images", images), level)
    if not (encodings != encodings[:1]).any():
        where = "" if level is None else f" at beta {level:g}"
        raise ValueError(f"directions need images whose latents differ, those of these {len(encodings)} do not{where}")
    return level, indices, encodings


def encode_dataset(model: Pipeline, dataset: data.Dataset, indices: Tensor, beta: float | None) -> Tensor:
    """Mean latents of the images of a dataset at `indices` (N,), (N, c, h, w): no more images at once than memory is for."""
    chunks = indices.split(processors.images_at_once(dataset.resolution, model.device))
    return torch.cat([model.encode(data.to_float(dataset.images(chunk)), beta) for chunk in chunks])


def _principal(images: object, indices: Tensor | None, encodings: Tensor) -> dict[str, Tensor]:
    return latent_space.principal_directions(encodings).named()


def _channel(images: object, indices: Tensor | None, encodings: Tensor) -> dict[str, Tensor]:
    steps = {}
    for channel, map_of in enumerate(torch.eye(encodings.shape[1]).to(encodings)):
        steps[f"channel {channel}"] = latent_space.in_deviations(map_of.view(-1, 1, 1).expand(encodings.shape[1:]), encodings)
    return {name: step for name, step in steps.items() if step.any()}


def _attribute(images: object, indices: Tensor | None, encodings: Tensor) -> dict[str, Tensor]:
    if indices is None or not data.knows_attributes(images):
        raise ValueError("directions of attributes need a dataset that knows attributes of its images, these know none")
    has = images.attributes(indices).to(encodings.device)
    steps = {}
    for name, with_it in zip(images.attribute_names, has.unbind(1), strict=True):
        if with_it.any() and not with_it.all():
            towards = encodings[with_it].mean(0) - encodings[~with_it].mean(0)
            steps[name] = latent_space.in_deviations(towards, encodings)
    if not steps:
        raise ValueError(f"no attribute splits these {len(has)} images: some must have it, and some must not")
    return steps


KINDS: dict[str, Callable[[object, Tensor | None, Tensor], dict[str, Tensor]]] = {
    "principal": _principal,
    "channel": _channel,
    "attribute": _attribute,
}
