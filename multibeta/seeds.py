"""What a seed is, wherever one is taken: an integer, of which 64 bits count."""

from __future__ import annotations

import contextlib
import logging
import operator
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_GLOBAL = threading.RLock()


def as_seed(seed: int) -> int:
    """`seed` modulo 2^64, as the int64 of the same bits: any integer of Python, NumPy or torch is one.

    torch takes the result everywhere, and noise of the library depends on nothing but these 64 bits.

    Raises:
        ValueError: Something that is no integer, such as 1.5, None or True.
    """
    counts = isinstance(seed, bool) or getattr(seed, "dtype", None) == torch.bool
    try:
        number = None if counts else operator.index(seed)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"a seed must be an integer (of which 64 bits count), got {seed!r}")
    return (number + 2**63) % 2**64 - 2**63


def as_short_seed(seed: int) -> int:
    """`as_seed` modulo 2^32, which is all that NumPy's `RandomState` and scikit-learn take."""
    return as_seed(seed) % 2**32


def as_seeds(seeds: Tensor | Iterable[int]) -> Tensor:
    """Seeds of samples as int64: of a tensor of integers, in its shape and on its device, or of integers one by one, (N,).

    Raises:
        ValueError: Numbers that are no integers, or something that is not one for each sample.
    """
    if isinstance(seeds, Tensor):
        if seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool:
            raise ValueError(f"seeds must be integers, got {seeds.dtype}")
        return seeds.to(torch.int64)
    try:
        each = list(seeds)
    except TypeError:
        raise ValueError(f"seeds must be integers, one for each sample, got {seeds!r}") from None
    return torch.tensor([as_seed(seed) for seed in each], dtype=torch.int64)


@contextlib.contextmanager
def global_generators() -> Iterator[None]:
    """In a `with` block this thread alone draws from torch's global generators, of those that ask; another waits and says so."""
    if not _GLOBAL.acquire(blocking=False):
        logger.warning("a training waits for that of another thread, with which it shares torch's generators: processes need not")
        _GLOBAL.acquire()
    try:
        yield
    finally:
        _GLOBAL.release()
