"""Spans of a walk from t to s, as a flow map learns them: what a training hands to a process, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spanned:
    """Spans of trajectories: from grid indices `starts` to `ends` (n,), from `latents` to `later`, (n, C, H, W) each.

    `noise_moved` is what noise predictions moved between them, the sum of (sigma_{t - tau} - sigma_t) eps_hat, None of a process
    with one head; and `condition` what the network reads besides, or None.
    """

    starts: Tensor
    ends: Tensor
    latents: Tensor
    later: Tensor
    noise_moved: Tensor | None = None
    condition: Tensor | None = None

    def to(self, device: torch.device) -> Spanned:
        """The same with its latents elsewhere; grid indices stay on the CPU."""

        def moved(latents: Tensor | None) -> Tensor | None:
            return None if latents is None else latents.to(device)

        between = self.latents.to(device), self.later.to(device)
        return Spanned(self.starts, self.ends, *between, moved(self.noise_moved), moved(self.condition))


class SpanTargets(NamedTuple):
    """What the network of a flow map reads over spans and should return, (n, C, H, W) each.

    `outputs` are in the basis of the process, and `counts` how the error of each counts in that of X, of unit length together.
    """

    network_input: Tensor
    outputs: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]


class SpanTeacher(Protocol):
    """What a flow map is learned of: `NonlinearDiffusion`, or of a `ConditionalDiffusion` its `ConditionalSpans`."""

    def span_times(self, starts: Tensor, ends: Tensor, /) -> Tensor:
        """What the network takes as time over spans between grid indices (n,): (n, 2) float32."""
        ...

    def span_targets(self, spanned: Spanned, /) -> SpanTargets:
        """What it learns over spans of trajectories."""
        ...

    def coefficients(self, latents: Tensor, /) -> Tensor:
        """Latents (n, C, H, W) in the basis of the process."""
        ...
