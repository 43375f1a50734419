"""Images of a dataset or a generator, one batch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from multibeta.data.dataset import Dataset, Indices, is_dataset
from multibeta.data.images import to_float
from multibeta.metrics.checks import as_image_tensor, as_integer, value_range, warn_of_range
from multibeta.progress import progress_bar

Images = Dataset | Tensor | np.ndarray | Iterable[Tensor | np.ndarray]
"""Where images come from: see `image_batches`."""


def image_batches(
    source: Images,
    indices: Indices | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
    label: str = "images",
    least: int = 1,
) -> Iterator[Tensor]:
    """Images from wherever they come, as float32 (n, C, H, W) in [-1, 1] on `device`, at most `batch_size` at a time.

    Args:
        source: A dataset, which gives `images(indices)`, uint8, and has a length; or tensors or arrays (n, C, H, W), uint8 or
            floats in [-1, 1], one or a generator, a loader or a list of them.
        indices: Images of the dataset to take, in this order; by default all.
        label: What the progress bar says.
        least: Images that there must be, 1 or 0.

    Raises:
        ValueError: Too few images, indices without a dataset, batches of other types or of several resolutions, NaN, infinity, or
            floats far outside [-1, 1].

    Floats of which none is negative are worth a warning, once all were seen: they may be in [0, 1].
    """
    batch_size = as_integer(batch_size, "batch_size", 1)
    total = None
    if is_dataset(source):
        chosen = torch.arange(len(source)) if indices is None else indices
        total = len(chosen)
        batches = (source.images(chosen[start : start + batch_size]) for start in range(0, total, batch_size))
    elif indices is not None:
        raise ValueError(f"indices need a dataset with images(indices), got {type(source).__name__}")
    elif isinstance(source, Tensor | np.ndarray):
        batches = [source]
    elif isinstance(source, Iterable):
        batches = source
    else:
        raise ValueError(f"images come from a dataset with images(indices), or as tensors, got {type(source).__name__}")
    shape, count, low, high = None, 0, math.inf, -math.inf
    with progress_bar(total=total, desc=label, unit="image", disable=not progress) as bar:
        for batch in batches:
            batch = as_image_tensor(batch)
            if batch.dtype != torch.uint8 and not batch.is_floating_point():
                raise ValueError(f"images must be uint8 or floating point in [-1, 1], got {batch.dtype}")
            shape = shape or batch.shape[1:]
            if batch.shape[1:] != shape:
                raise ValueError(f"images must share a shape, got {tuple(shape)} and {tuple(batch.shape[1:])}")
            for start in range(0, len(batch), batch_size):
                images = batch[start : start + batch_size].to(device)
                if images.dtype == torch.uint8:
                    low, images = -1.0, to_float(images)
                else:
                    lowest, highest = value_range(images)
                    low, high, images = min(low, lowest), max(high, highest), images.float()
                yield images
                count += len(images)
                bar.update(len(images))
    if count < least:
        raise ValueError("at least one image is needed, got none")
    warn_of_range(low, high)
