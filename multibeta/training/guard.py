"""Updates that a training is better off without."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REMEMBERED = 100  # gradient norms
LEAST_REMEMBERED = 20  # before any counts as large
PATIENCE = 3  # updates in a row that were left out, after which the weights themselves are taken for the cause


@dataclass(frozen=True)
class Guarded:
    """What a checkpoint says of a `Guard`: its `Guard.state`."""

    norms: tuple[float, ...] = ()
    left_out: int = 0
    rolled_back: int = 0


class Guard:
    """Tells gradients that are far larger than before, or not finite.

    Args:
        factor: So many times the median of the last `REMEMBERED` norms is large; 0 lets everything pass.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.norms: deque[float] = deque(maxlen=REMEMBERED)
        self.left_out = 0  # in a row
        self.rolled_back = 0  # since the last update

    def refuses(self, loss: float, norm: float) -> str | None:
        """Why an update of this loss and gradient norm is not to be made; None where it is."""
        if not self.factor:
            return None
        reason = None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = f"loss {loss:g} and gradient norm {norm:g} are not finite"
        elif len(self.norms) >= LEAST_REMEMBERED and norm > self.factor * (usual := statistics.median(self.norms)):
            reason = f"the gradient norm {norm:.3g} is {norm / usual:.3g} times the median of the last {len(self.norms)}"
        if reason is None:
            self.norms.append(norm)
            self.rolled_back = 0
        self.left_out = 0 if reason is None else self.left_out + 1
        return reason

    def refuses_beside(self, loss: float, norm: float) -> str | None:
        """The same of an opponent's update on the same images, after the objective's: of its own, only what is not finite."""
        if not self.factor:
            return None
        if self.left_out:
            return "that of the objective was"
        return None if math.isfinite(loss) and math.isfinite(norm) else f"loss {loss:g} and gradient norm {norm:g} are not finite"

    @property
    def settled(self) -> bool:
        """Whether the weights are those of an update, which a checkpoint does not hold yet."""
        return not (self.left_out or self.rolled_back)

    @property
    def gives_up(self) -> bool:
        """Whether leaving out has not helped."""
        return self.left_out >= PATIENCE

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of it, JSON-ready."""
        return {"norms": list(self.norms), "left_out": self.left_out, "rolled_back": self.rolled_back}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; from nothing begin."""
        self.norms.clear()
        self.norms.extend(state.get("norms", ()))
        self.left_out, self.rolled_back = state.get("left_out", 0), state.get("rolled_back", 0)
