"""Random numbers of a batch that is computed in pieces: those of an image do not depend on how the batch is cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class PieceGenerator(torch.Generator):
    """Generator of the images from `start` on, a piece of a batch of `total` images; on the CPU.

    Used directly it draws numbers of the piece's own. Through `whole`, which starts alike in every piece, `rows` draws what the
    batch would have drawn in one.
    """

    whole: torch.Generator
    start: int
    total: int

    @classmethod
    def of(cls, own_seed: int, seed: int, start: int, total: int) -> PieceGenerator:
        """One whose own draws follow `own_seed`, those of the whole batch `seed`."""
        generator = cls()
        generator.manual_seed(own_seed)
        generator.whole, generator.start, generator.total = torch.Generator().manual_seed(seed), start, total
        return generator


def shared(generator: torch.Generator) -> torch.Generator:
    """Where numbers come from that all images of a batch have in common: `generator`, of a piece that of the whole batch."""
    return generator.whole if isinstance(generator, PieceGenerator) else generator


def rows(draw: Callable[[int, torch.Generator], Tensor], count: int, generator: torch.Generator, dim: int = 0) -> Tensor:
    """draw(count, generator), one entry along `dim` for each image; of a piece its share of what the whole batch draws."""
    if not isinstance(generator, PieceGenerator):
        return draw(count, generator)
    return draw(generator.total, generator.whole).narrow(dim, generator.start, count)


def noise_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of the shape of `tensor` (N, ...), float32, drawn by `generator`, on the device of `tensor`."""

    def draw(count: int, source: torch.Generator) -> Tensor:
        return torch.randn(count, *tensor.shape[1:], generator=source, device=source.device)

    return rows(draw, len(tensor), generator).to(tensor.device)


_active: ContextVar[PieceDropout | None] = ContextVar("active", default=None)


def again() -> contextlib.AbstractContextManager:
    """In a `with` block, later, `F.dropout` draws the masks of a piece that it would draw now."""
    active = _active.get()
    return contextlib.nullcontext() if active is None else active.repeated()


class PieceDropout(TorchFunctionMode):
    """While it is active, `F.dropout` of a piece takes its share of the mask that the whole batch would draw.

    Maps may hold several rows for each image, all images in turn. On the CPU the masks are those of the batch in one; CUDA draws
    them in another way there, so they agree between pieces only.

    Args:
        seed: Of the masks; what the global generator would start from.
        start, count, total: The piece, and the size of the batch.
    """

    def __init__(self, seed: int, start: int, count: int, total: int):
        super().__init__()
        self.seed, self.start, self.count, self.total = seed, start, count, total
        self.generator: torch.Generator | None = None
        self._token: Token[PieceDropout | None] | None = None

    def __enter__(self) -> PieceDropout:
        self._token = _active.set(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        assert self._token is not None, "entered before"
        _active.reset(self._token)

    def repeated(self) -> PieceDropout:
        """One that draws the masks that come next."""
        other = PieceDropout(self.seed, self.start, self.count, self.total)
        other.generator = None if self.generator is None else self.generator.clone_state()
        return other

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return (self.dropout if function is F.dropout else function)(*args, **(kwargs or {}))

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """`F.dropout`; `inplace` changes nothing but memory, and is not followed."""
        repeats, rest = divmod(len(x), self.count)
        if not training or not 0 < p < 1 or rest:
            return F.dropout(x, p, training)
        if self.generator is None:
            self.generator = torch.Generator(x.device).manual_seed(self.seed)
        mask = x.new_empty(repeats * self.total, *x.shape[1:]).bernoulli_(1 - p, generator=self.generator)
        mask = mask.unflatten(0, (repeats, self.total)).narrow(1, self.start, self.count).flatten(0, 1)
        return x * (mask / (1 - p))
