"""Disentanglement of any encoder on any dataset with known factors or attributes: images in, numbers out."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multibeta.data.dataset import KNOWS, AttributeDataset, Dataset, FactorDataset, Indices
from multibeta.metrics.auroc import check_thresholds, tad_from_codes
from multibeta.metrics.checks import ArrayLike, as_array, as_attributes, as_factors, as_integer
from multibeta.metrics.importance import boosted_importance, dci_summary
from multibeta.metrics.mutual_information import check_bins, information_gap
from multibeta.metrics.streaming import image_batches
from multibeta.seeds import as_short_seed

Encode = Callable[[Tensor], ArrayLike]
"""Images (n, C, H, W) in [-1, 1] to codes (n, ...)."""


def mig(
    encode: Encode,
    data: FactorDataset,
    *,
    num_images: int = 10_000,
    num_bins: int = 20,
    seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Mutual information gap of an encoder; see `mig_from_codes`.

    Images are drawn uniformly and with replacement, as published; memory holds one batch of them and all codes.

    Args:
        encode: Images (n, C, H, W) in [-1, 1] on `device` to codes (n, ...), which are flattened to (n, K). The published
            protocol takes the mean of the encoder.
        data: Gives `images(indices)`, uint8, and `factors(indices)`, integers (n, F), and has a length and `factor_names`.
        seed: Draws the images; any integer.

    Returns:
        The dictionary of `information_gap`, `factor_names`, and what the numbers depend on: `num_images`, `num_bins`, `seed`,
        `code_shape` and `resolution`.

    Raises:
        ValueError: What cannot be measured: no images, a seed or num_bins out of range, factors that are no integers or never
            change, images or codes of another shape or range, NaN. What the arguments show is said before the encoding.
    """
    num_bins, seed = check_bins(num_bins), as_short_seed(seed)
    indices = np.random.RandomState(seed).randint(_length(data, "factors"), size=_count(num_images))
    factors = as_factors(data.factors(indices), len(indices))
    codes, protocol = encode_images(encode, data, indices, batch_size, device, progress)
    result = information_gap(codes, factors, num_bins)
    return {**result, "factor_names": tuple(data.factor_names), "num_bins": num_bins, "seed": seed, **protocol}


def dci(
    encode: Encode,
    data: FactorDataset,
    *,
    num_train: int = 10_000,
    num_test: int = 5_000,
    seed: int = 0,
    num_threads: int | None = None,
    cache: str | Path | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Disentanglement, completeness and informativeness of an encoder; see `dci_from_codes` and, for the rest, `mig`.

    Training and test images are drawn with replacement from the whole of `data`, as published: in a small dataset they overlap.

    Returns:
        The dictionary of `dci_from_codes`; `importance`, (K, F); `accuracy_train` and `accuracy_test`, (F,); `factor_names`; and
        what the numbers depend on: `num_train`, `num_test`, `seed`, `code_shape`, `resolution` and `estimator`, whose version
        moves them by some thousandths.
    """
    length, num_train, num_test = _length(data, "factors"), _count(num_train, "num_train"), _count(num_test, "num_test")
    seed = as_short_seed(seed)
    indices = np.random.RandomState(seed).randint(length, size=num_train + num_test)
    factors = as_factors(data.factors(indices), len(indices), constant=True)
    train, test = slice(None, num_train), slice(num_train, None)
    as_factors(factors[train], num_train)
    codes, protocol = encode_images(encode, data, indices, batch_size, device, progress)
    fits = boosted_importance(
        codes[train], factors[train], codes[test], factors[test], seed, num_threads=num_threads, cache=cache, progress=progress
    )
    del protocol["num_images"]
    return {
        **dci_summary(*fits),
        **dict(zip(("importance", "accuracy_train", "accuracy_test"), fits, strict=True)),
        "factor_names": tuple(data.factor_names),
        "num_train": num_train,
        "num_test": num_test,
        "seed": seed,
        "estimator": f"GradientBoostingClassifier of scikit-learn {version('scikit-learn')}",
        **protocol,
    }


def tad(
    encode: Encode,
    data: AttributeDataset,
    *,
    num_images: int = 1000,
    auroc: str = "grid",
    step: float = 0.01,
    min_range: float = 0.2,
    seed: int = 30,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Total AUROC difference of an encoder; see `tad_from_codes` and, for the rest, `mig`.

    Images are drawn without replacement, as published; `data` gives `attributes(indices)`, bool (n, A), and `attribute_names`.

    Returns:
        The dictionary of `tad_from_codes` with the names of the captured attributes as `captured`; `attribute_names`; and `seed`,
        `code_shape` and `resolution`.

    Raises:
        ValueError: besides those of `tad_from_codes`, more images than `data` has.
    """
    length, num_images = _length(data, "attributes"), _count(num_images)
    seed = as_short_seed(seed)
    check_thresholds(auroc, step, min_range)
    if num_images > length:
        raise ValueError(f"num_images must be at most the {length} images of the dataset, got {num_images}")
    indices = np.random.RandomState(seed).permutation(length)[:num_images]
    attributes = as_attributes(data.attributes(indices), num_images)
    codes, protocol = encode_images(encode, data, indices, batch_size, device, progress)
    result = tad_from_codes(codes, attributes, auroc, step, min_range=min_range)
    names = tuple(data.attribute_names)
    captured = [names[index] for index in result["captured"]]
    return {**result, "captured": captured, "attribute_names": names, "seed": seed, **protocol}


@torch.no_grad()
def encode_images(
    encode: Encode,
    data: Dataset,
    indices: Indices,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Codes of the images at `indices`, one batch of images at a time.

    Returns:
        (codes, protocol): float array (N, K), float32 from half precision, and a dictionary of `num_images`, `code_shape`, the
        shape of one code before it was flattened, and `resolution`.
    """
    codes, start = np.empty((0, 0)), 0
    shape: tuple[int, ...] = ()
    resolution: tuple[int, ...] = ()
    for images in image_batches(data, indices, batch_size, device, progress, "encoding"):
        batch = as_array(encode(images), "codes")
        if batch.ndim < 2 or len(batch) != len(images) or batch.shape[1:] != (shape or batch.shape[1:]):
            raise ValueError(f"encode must return codes (n, ...) for n images, got shape {batch.shape} for {len(images)}")
        if not shape:
            shape, resolution = batch.shape[1:], tuple(images.shape[2:])
            codes = np.empty((len(indices), batch[0].size), dtype=batch.dtype)
        codes[start : start + len(batch)] = batch.reshape(len(batch), -1)
        start += len(batch)
    return codes, {"num_images": len(indices), "code_shape": shape, "resolution": resolution}


def _length(data: Dataset, needed: str) -> int:
    """Images in a dataset, at least one, which must know the factors or attributes of each."""
    if not KNOWS[needed](data):
        raise ValueError(f"{type(data).__name__} has no {needed}(indices): choose a dataset with known {needed}")
    if len(data) == 0:
        raise ValueError("the dataset has no images")
    return len(data)


def _count(num_images: int, name: str = "num_images") -> int:
    """How many images, at least one."""
    num_images = as_integer(num_images, name)
    if num_images < 1:
        raise ValueError(f"at least one image is needed, got {name}={num_images}")
    return num_images
