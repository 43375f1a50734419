"""The images that a command was given, prepared as its model sees them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from multibeta import data
from multibeta.evaluation import of_recorded_data, source_of
from multibeta.pipelines import Pipeline
from multibeta.pipelines.inputs import image_options


def open_for(model: Pipeline, source: str, *, upscale: bool) -> data.Dataset:
    """The dataset of a source, as `data.open_dataset` takes it, as a model saw its own."""
    return data.open_dataset(source, **image_options(model), upscale=upscale)


def load_images(names: Sequence[str], model: Pipeline) -> Tensor:
    """Images named by file, folder or scenes:INDEX, prepared as `ImageFolder` does for a model, (N, C, H, W) in [-1, 1]."""
    images, options = [], image_options(model)
    for name in names:
        source, _, index = name.partition(":")
        if source == "scenes" and index.isdecimal():
            images.append(data.to_float(data.open_dataset(source, **options).images([int(index)])))
        else:
            images.append(data.load_images(name, **options))
    if not images:
        raise ValueError("name at least one image: a file, a folder, or scenes:INDEX")
    return torch.cat(images)


def labels_of(dataset: data.Dataset, indices: Tensor, attribute: str) -> Tensor:
    """Which of the images at `indices` have an attribute, bool, (N,); `ValueError` unless some do and some do not."""
    if not data.knows_attributes(dataset) or attribute not in dataset.attribute_names:
        names = dataset.attribute_names if data.knows_attributes(dataset) else ()
        raise ValueError(f"the images have no attribute {attribute!r}; they have {', '.join(names) or 'none'}")
    has = dataset.attributes(indices)[:, dataset.attribute_names.index(attribute)]
    if has.all() or not has.any():
        raise ValueError(f"{int(has.sum())} of {len(has)} images have {attribute}: some must, and some must not")
    return has


def open_source(model: Pipeline, named: str | None, flag: str, *, upscale: bool) -> tuple[data.Dataset, str]:
    """The images that were `named` with `flag`, or else those that the model records, and their source."""
    source = source_of(model, named, flag)
    with of_recorded_data(source, named, flag):
        return open_for(model, source, upscale=upscale), source
