"""Training of a flow map on the trajectories of its teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from multibeta.checks import check_number
from multibeta.draws import rows
from multibeta.flow_map.network import FlowMap
from multibeta.flow_map.trajectories import Starts
from multibeta.spans import Spanned, SpanTeacher
from multibeta.training import Batch


@dataclass(frozen=True)
class FlowMapObjectiveOptions:
    """What `FlowMapObjective` leaves to choose.

    Attributes:
        shares: Of spans from noise to data, from anywhere to data, from noise to anywhere, and of any others; few evaluations are
            mostly of the first three. What is left to one are no spans: there the map learns the teacher itself.
        head_weight: Of the errors of the heads beside that of X, which is what few evaluations show: how a walk parts into noise
            and encoding depends on where its steps are, X hardly.
        huber: Of the loss, sqrt(error^2 + huber^2) - huber of each sample, the pseudo-Huber loss; 0 for the squared error.
    """

    shares: tuple[float, ...] = (0.25, 0.2, 0.2, 0.3)
    head_weight: float = 0.3
    huber: float = 0.07

    def __post_init__(self) -> None:
        whole = len(self.shares) == 4 and sum(self.shares) <= 1 + 1e-9
        for share in self.shares:
            check_number("shares", share, least=0, most=1)
        if not whole:
            raise ValueError(f"shares must be four numbers of at most 1 in all, got {self.shares}")
        check_number("head_weight", self.head_weight, least=0)
        check_number("huber", self.huber, least=0)


class FlowMapObjective:
    """Training of a flow map on spans of its teacher's trajectories, for `training.train`: plain regression, in units of one.

        |X - X*|^2 + w (|v - v*|^2 + |u - u*|^2)

    with the error of X in units of what comes from both heads, and w the `head_weight`.

    Args:
        flow_map: The map trained.
        teacher: The process, whose network is frozen.
        starts: Where trajectories come from: the dataset that is trained on. That of validation is another of its kind.
        options: What there is to choose; `fields` are those of it that differ, by name.
    """

    def __init__(
        self,
        flow_map: FlowMap,
        teacher: SpanTeacher,
        starts: Starts,
        held_out: Starts,
        options: FlowMapObjectiveOptions | None = None,
        **fields: Any,
    ) -> None:
        self.module, self.teacher, self.starts, self.held_out = flow_map, teacher, starts, held_out
        self.options = replace(options or FlowMapObjectiveOptions(), **fields)

    def spanned(self, batch: Batch, generator: torch.Generator) -> Spanned:
        """A span of a trajectory for each entry of a batch."""
        if not batch.held_out:
            self.starts.keep_filled((batch.before - batch.start) // len(self.starts))  # where the whole batch begins
        count, source = len(batch.images), self.held_out if batch.held_out else self.starts
        kind, first, second = rows(lambda n, of: torch.rand(n, 3, generator=of), count, generator).unbind(1)
        bounds = torch.tensor(self.options.shares).cumsum(0)
        kinds = torch.searchsorted(bounds, kind.contiguous(), right=True)
        whole_start, whole_end = (kinds == 0) | (kinds == 2), kinds <= 1
        first = first.masked_fill(whole_start, 0)
        second = second.masked_fill(whole_end, 1).masked_fill(kinds == len(bounds), 0)
        return source.spans(batch.indices, first, second, batch.before)

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        spanned = self.spanned(batch, generator).to(batch.images.device)
        with torch.no_grad(), torch.autocast(batch.images.device.type, enabled=False):
            targets = self.teacher.span_targets(spanned)
        output = self.module(targets.network_input, self.teacher.span_times(spanned.starts, spanned.ends))
        with torch.autocast(batch.images.device.type, enabled=False):
            heads = map(self.teacher.coefficients, output.float().chunk(len(targets.outputs), dim=1))
            errors = [head - target for head, target in zip(heads, targets.outputs, strict=True)]
            of_map = torch.stack([count * error for count, error in zip(targets.counts, errors, strict=True)]).sum(0)
        of_heads, of_map = (torch.stack([error.square().flatten(1).mean(1) for error in each]) for each in (errors, [of_map]))
        total = of_map.sum(0) + self.options.head_weight * of_heads.sum(0)
        huber = self.options.huber
        loss = (total + huber**2).sqrt() - huber if huber else total
        return loss.mean(), {"map_error": of_map.mean(), "head_error": of_heads.mean()}
