"""What an objective sees of a dataset, step by step, and what it gives."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from multibeta.data import Dataset, knows_order

Scalars = Mapping[str, Tensor | float]
Order = Callable[[int, int, int], Tensor]


class Objective(Protocol):
    """What `train` minimises; see there for what an objective may have besides."""

    @property
    def module(self) -> nn.Module:
        """What learns."""
        ...

    def __call__(self, batch: Batch, generator: torch.Generator, /) -> tuple[Tensor, Scalars]:
        """(loss, scalars to log): the loss, with gradients, is a mean over the images of the batch."""
        ...


@dataclass(frozen=True)
class Batch:
    """What an objective sees: images (N, C, H, W) in [-1, 1] on its device, their dataset indices (N,) on the CPU.

    `held_out` tells images of validation, whose indices are of another dataset, from those of training.
    Of an update in pieces (`accumulate`) it is the piece that begins at image `start`; `update` is then what `gather` of the
    objective gave of all its images. `before` images were trained on before the first of them.
    """

    images: Tensor
    indices: Tensor
    step: int
    progress: float
    start: int = 0
    update: dict[str, Tensor] | None = None
    held_out: bool = False
    before: int = 0

    def complete(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `gather` gives, of all images of the update, name to (M, ...): those of this piece are `own`, with gradients."""
        if self.update is None:
            return own
        end = self.start + len(self.images)
        return {name: torch.cat([rows[: self.start], own[name].to(rows.dtype), rows[end:]]) for name, rows in self.update.items()}

    def share(self, loss: Tensor) -> Tensor:
        """The part of a piece in a loss of the whole update: its value, and gradients that add up to its own over the pieces."""
        if self.update is None:
            return loss
        weight = len(self.images) / len(next(iter(self.update.values())))  # what the piece's loss is multiplied by
        return loss.detach() + (loss - loss.detach()) / weight

    def __repr__(self) -> str:
        return f"Batch(images {tuple(self.images.shape)}, step={self.step}, progress={self.progress:g})"


def batch_indices(step: int, dataset_size: int, batch_size: int, seed: int, order: Order | None = None) -> Tensor:
    """Dataset indices of a step, (batch_size,): consecutive pieces of one order per epoch, as `order_of` the dataset gives it.

    Batches run across the end of an epoch, so each epoch holds every image exactly once, whatever the batch size. Without an
    `order` it is a seeded permutation.
    """
    start, end = step * batch_size, (step + 1) * batch_size
    order = order or permutation
    pieces = [
        order(dataset_size, seed, epoch)[max(0, start - epoch * dataset_size) : end - epoch * dataset_size]
        for epoch in range(start // dataset_size, (end - 1) // dataset_size + 1)
    ]
    return torch.cat(pieces)


def order_of(dataset: Dataset) -> Order:
    """The order of each epoch of a dataset, by (size, seed, epoch): its own, or where it has none a permutation of all images."""
    if not knows_order(dataset):
        return permutation
    return functools.lru_cache(maxsize=2)(lambda size, seed, epoch: dataset.order(generator_of("order", seed, epoch)))


@functools.lru_cache(maxsize=4)
def permutation(size: int, *key: int | str) -> Tensor:
    """All integers below `size` in the order that belongs to a key, int64, (size,)."""
    return torch.randperm(size, generator=generator_of("order", *key))


def generator_of(*key: int | str) -> torch.Generator:
    """A generator on the CPU that a key starts."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """A seed of 63 bits: another for every key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
