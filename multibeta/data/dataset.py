"""What a dataset is: numbered images of one size, and what is known of each; the library's own and those that users bring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor

Indices = Tensor | np.ndarray | Sequence[int]
"""One-dimensional integers, such as a tensor, an array, a list or a range."""


class Dataset(Protocol):
    """Numbered images of one size: all that training, encoding and sampling ask of a dataset.

    Any object with these members is one. One that knows factors, attributes or classes of its images is a `FactorDataset`, an
    `AttributeDataset` or a `LabelledDataset`, which `knows_factors`, `knows_attributes` and `knows_classes` tell.
    """

    @property
    def resolution(self) -> int:
        """Pixels per side."""
        ...

    @property
    def channels(self) -> int:
        """1 for grey or 3 for RGB."""
        ...

    def __len__(self) -> int: ...

    def images(self, indices: Indices, /) -> Tensor:
        """Images at `indices`, uint8, (N, C, H, W)."""
        ...


class FactorDataset(Dataset, Protocol):
    """A dataset whose images come with the values of the factors that made them."""

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Names of the F factors."""
        ...

    @property
    def factor_sizes(self) -> tuple[int, ...]:
        """How many values each factor has, F integers."""
        ...

    def factors(self, indices: Indices, /) -> Tensor:
        """Factor values at `indices`, int64, (N, F), column i in [0, factor_sizes[i])."""
        ...


class AttributeDataset(Dataset, Protocol):
    """A dataset whose images come with a yes or no to each attribute."""

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the A attributes."""
        ...

    def attributes(self, indices: Indices, /) -> Tensor:
        """Attributes at `indices`, bool, (N, A)."""
        ...


class LabelledDataset(Dataset, Protocol):
    """A dataset whose images are of one class each."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    def labels(self, indices: Indices, /) -> Tensor:
        """Class of each image at `indices`, int64, (N,), a position in `class_names`."""
        ...


class OrderedDataset(Dataset, Protocol):
    """A dataset that says in which order an epoch reads its images, such as those of one archive near each other."""

    @property
    def order(self) -> Callable[[torch.Generator], Tensor]:
        """`order(generator)`: every index once, int64, (N,), in an order that depends on the generator alone."""
        ...


def is_dataset(source: Any) -> TypeGuard[Dataset]:
    """Whether images are read from an object by their numbers, other than from a tensor or a list of them."""
    return callable(getattr(source, "images", None))


def require_dataset(dataset: Any) -> None:
    """`TypeError` unless something is a `Dataset`."""
    if missing := [name for name in ("resolution", "channels", "__len__", "images") if not hasattr(dataset, name)]:
        raise TypeError(
            f"a dataset of numbered images is needed, got a {type(dataset).__name__}, which has no {', '.join(missing)}: "
            "multibeta.data.as_dataset makes one of a list of pictures, or of a dataset of torch"
        )


def read_images(dataset: Dataset, indices: Indices) -> Tensor:
    """`dataset.images(indices)`, and that they are what it promises: uint8, (N, C, H, W), of its channels and resolution.

    Raises:
        TypeError: They are no tensor of uint8, or it is no dataset.
        ValueError: They are more, fewer or of another size.
    """
    require_dataset(dataset)
    images = dataset.images(indices)
    shape = (len(indices), dataset.channels, dataset.resolution, dataset.resolution)
    typed = isinstance(images, Tensor) and images.dtype == torch.uint8
    if not typed or images.shape != shape:
        given = f"a {type(images).__name__}"
        if hasattr(images, "dtype") and hasattr(images, "shape"):
            given += f" of {str(images.dtype).removeprefix('torch.')} and shape {tuple(images.shape)}"
        raise (ValueError if typed else TypeError)(
            f"images(indices) of {type(dataset).__name__} must give a Tensor of uint8 and shape {shape} for {shape[0]} indices, "
            f"got {given}"
        )
    return images


def knows_factors(dataset: Any) -> TypeGuard[FactorDataset]:
    """Whether the factors of each image of a dataset are known: it has `factors(indices)`, and `factor_names` that are not empty.

    Raises:
        ValueError: It has `factors` and no `factor_names` at all, by which every number would be called.
    """
    return _knows(dataset, "factors", "factor_names")


def knows_attributes(dataset: Any) -> TypeGuard[AttributeDataset]:
    """Whether the attributes of each image of a dataset are known, by `attributes` and `attribute_names`: as `knows_factors`."""
    return _knows(dataset, "attributes", "attribute_names")


def knows_classes(dataset: Any) -> TypeGuard[LabelledDataset]:
    """Whether the class of each image of a dataset is known: it has `labels(indices)`, and `class_names` that are not empty.

    Both are needed: labels without names of classes may be anything.
    """
    return callable(getattr(dataset, "labels", None)) and len(getattr(dataset, "class_names", ())) > 0


def _knows(dataset: Any, labels: str, names: str) -> bool:
    if not hasattr(dataset, labels):
        return False
    if not hasattr(dataset, names):
        raise ValueError(f"{type(dataset).__name__} has {labels}(indices) and no {names}: name each column, or name none by ()")
    return len(getattr(dataset, names)) > 0


def knows_order(dataset: Any) -> TypeGuard[OrderedDataset]:
    """Whether a dataset has an order of its own for an epoch; others are read in any."""
    return callable(getattr(dataset, "order", None))


KNOWS: dict[str, Callable[[Any], bool]] = {"factors": knows_factors, "attributes": knows_attributes}


def fingerprint_of(dataset: Any) -> str | None:
    """What changes with the images of a dataset and their order; None where the dataset has no `fingerprint`."""
    return getattr(dataset, "fingerprint", None)
