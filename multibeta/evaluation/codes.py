"""What the codes of a model tell of known factors and attributes: MIG, DCI, TAD, and over beta."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from multibeta import data, metrics
from multibeta.evaluation.features import batched
from multibeta.metrics import information_gap, mig_from_codes
from multibeta.metrics.auroc import check_auroc
from multibeta.pipelines import Pipeline

TAD_IMAGES = 1000  # as published
NEEDS = {"mig": "factors", "dci": "factors", "tad": "attributes"}
ROTATIONS = 5  # random ones: with few channels MIG differs by half between them

Encode = Callable[[Tensor], Tensor]
Level = TypeVar("Level", bound="float | None")


def code_measures(
    dataset: data.Dataset, num_images: int, *, dci: bool, auroc: str, cache: str | Path | None, **common: Any
) -> dict[str, Callable[[Encode], dict[str, Any]] | None]:
    """MIG, DCI if asked for, and TAD, name to function of an encoder; None where the dataset does not know what it takes."""

    factors, attributes = cast("data.FactorDataset", dataset), cast("data.AttributeDataset", dataset)  # where it is known

    def mig(encode: Encode) -> dict[str, Any]:
        result = metrics.mig(encode, factors, num_images=num_images, **common)
        return keyed(result | {"max_information": result["mutual_information"].max(1)}, "factor_names")

    def dci_of_trees(encode: Encode) -> dict[str, Any]:
        images = {"num_train": num_images, "num_test": max(num_images // 2, 1)}
        return keyed(metrics.dci(encode, factors, cache=cache, **images, **common), "factor_names")

    def tad(encode: Encode) -> dict[str, Any]:
        count = min(num_images, len(dataset), TAD_IMAGES)
        result = metrics.tad(encode, attributes, num_images=count, auroc=auroc, **common)
        return keyed(result | {"best_area": result["areas"].max(1)}, "attribute_names")

    check_auroc(auroc)
    if dci and not data.knows_factors(dataset):
        raise ValueError(f"DCI needs known factors, {type(dataset).__name__} has none: leave it out")
    measures = {"mig": mig} | ({"dci": dci_of_trees} if dci else {}) | {"tad": tad}
    return {name: measure if data.KNOWS[NEEDS[name]](dataset) else None for name, measure in measures.items()}


def keyed(result: dict[str, Any], names: str) -> dict[str, Any]:
    """A metric's dictionary with its vectors by name; matrices, a number for every code, are left out."""
    result = dict(result)
    labels = result.pop(names)
    vectors = {key: value for key, value in result.items() if isinstance(value, np.ndarray)}
    named = {key: dict(zip(labels, value.tolist(), strict=True)) for key, value in vectors.items() if value.ndim == 1}
    return {key: value for key, value in result.items() if key not in vectors} | named


def encodings(model: Pipeline, images: Tensor, betas: Sequence[Level]) -> dict[Level, Tensor]:
    """Mean latents of images (N, C, H, W) at each of the `levels` of a model, (N, c, h, w) on the CPU."""
    return {beta: batched(lambda x, b=beta: model.encode(x, b), images) for beta in betas}


def disentanglement(means: Mapping[Level, Tensor], factors: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """What single codes tell of known factors at each beta (MultiBeta Fig. 4), and MIG next to that of randomly rotated codes.

    The rotations are of the channels: a network can take these into its weights at every position, and noise of one sigma is
    blind to them.

    Args:
        means: `encodings`, (N, c, h, w) for each beta.
        factors: Of the same images, (N, F), integers. A factor that never changes is left out.
        names: Of the factors.

    Returns:
        One row for each beta, none where there is a single code or no factor changes: "beta"; "mig"; "mig_random_rotation", the
        mean over rotations; "information", by factor the highest mutual information with any code as a share of the factor's
        entropy; "information_by_chance", the mean over factors of the same for shuffled images, which tells how far the
        estimate is above zero for want of images.
    """
    names = [name for name, column in zip(names, factors.T, strict=True) if (column != column[0]).any()]
    factors = factors[:, (factors != factors[0]).any(0)]
    shape = next(iter(means.values())).shape[1:]
    if not names or shape.numel() < 2:
        return []
    generator = torch.Generator().manual_seed(0)
    shuffled = factors[torch.randperm(len(factors), generator=generator)]
    rotations = torch.linalg.qr(torch.randn(ROTATIONS, shape[0], shape[0], generator=generator)).Q
    rows = []
    for beta, mean in means.items():
        gap, chance = (information_gap(mean.flatten(1), known) for known in (factors, shuffled))
        shares, by_chance = (each["mutual_information"].max(1) / each["entropy"] for each in (gap, chance))
        rotated = (torch.einsum("cd,nchw->ndhw", rotation, mean).flatten(1) for rotation in rotations)
        rows.append(
            {
                "beta": beta,
                "mig": gap["mig"],
                "mig_random_rotation": sum(mig_from_codes(codes, factors) for codes in rotated) / ROTATIONS,
                "information": dict(zip(names, shares.tolist(), strict=True)),
                "information_by_chance": float(by_chance.mean()),
            }
        )
    return rows
