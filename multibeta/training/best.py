"""The averaged weights that did best on held-out images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Validated:
    """A validation that counts: after how many steps, and the loss there; None where there was none, or it was not finite."""

    step: int = 0
    loss: float | None = None

    @classmethod
    def of(cls, step: int, loss: float | None) -> Validated:
        """The validation after a step, as JSON can hold it."""
        return cls(step, loss if loss is not None and math.isfinite(loss) else None)


@dataclass
class Best:
    """The average of the lowest validation loss so far, on the CPU; where each process holds a part of it where the parts are.

    Attributes:
        comparable_from: Losses at a smaller progress, a fraction of the training, mean something else and do not count.
    """

    comparable_from: float
    at: Validated | None = None
    state: dict[str, Tensor] | None = None

    def offer(self, candidate: Validated, progress: float, state: dict[str, Tensor]) -> None:
        """Keep a copy of `state` where its loss is as low as any before; of equal ones the last."""
        if candidate.loss is None or progress < self.comparable_from:
            return
        if self.at is None or self.at.loss is None or candidate.loss <= self.at.loss:
            self.at, self.state = candidate, {name: _kept(value) for name, value in state.items()}

    def restore(self, at: dict[str, Any], steps: int, state: dict[str, Tensor]) -> None:
        """Take what a checkpoint says, unless a training that became longer has not come so far any more."""
        if at["step"] / steps >= self.comparable_from:
            self.at, self.state = Validated(**at), state


def _kept(value: Tensor) -> Tensor:
    return value.detach().clone() if isinstance(value, DTensor) else value.detach().to("cpu", copy=True)
