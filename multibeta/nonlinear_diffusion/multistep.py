"""The coefficient table of "dpm2m": DPM-Solver++(2M) of Lu et al. 2022, for a process whose encoding moves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multibeta.ops import SamplerRow
from multibeta.schedules import SamplerRows

MULTISTEP = "dpm2m"
FURTHEST = 2.0  # turns of the step before, that a prediction is extrapolated by at most


class Motion(NamedTuple):
    """How the encoding of an image moves by one grid step, given what is left u of its velocity: shrink f + shift + growth u.

    Tables (N + 1, K) float64, of the move from each grid index to the one below; those of index 0 are not used. Or the same of a
    move over several grid steps, (K,).
    """

    shrink: Tensor
    shift: Tensor
    growth: Tensor

    def between(self, start: int, stop: int) -> Motion:
        """The move from grid index `start` down to `stop`, u being the same on the way."""
        moved = Motion(torch.ones_like(self.shrink[0]), *torch.zeros_like(self.shrink[:2]))
        for shrink, shift, growth in zip(*(table[stop + 1 : start + 1].flip(0) for table in self), strict=True):
            moved = Motion(shrink * moved.shrink, shrink * moved.shift + shift, shrink * moved.growth + growth)
        return moved


def multistep_rows(sigmas: Tensor, motion: Motion, turned: Tensor, indices: Sequence[int]) -> SamplerRows:
    """The coefficient table of a second-order sampler of z_t = f(x, t) + sigma_t eps whose rows are `of_data`.

    Its unknown is the image. While that stays the same, its noise does, and f(x, t) moves by what `motion` knows: the move

        z_s = f(x, s) + (sigma_s / sigma_t) (z_t - f(x, t))

    is exact over any stride. For second order the predictions of f(x, t) and u are those half way, extrapolated through the
    evaluation before, whose f follows its motion to t. A linear process has u = 0, and the sampler is DPM-Solver++(2M).

    Args:
        sigmas: (N + 1, K) float64, not falling.
        motion: Of one grid step.
        turned: How far the process has turned from signal to noise at each grid index, (N + 1,): what extrapolation is linear in.
        indices: Grid indices of the walk, falling.

    Returns:
        The rows, (S, K, 7), of the predictions of `NonlinearDiffusion.predict_data`.
    """
    rows: list[SamplerRow] = []
    before, way = 0.0, None  # turn and motion of the step before
    for here, there in itertools.pairwise(indices):
        kept = sigmas[there] / sigmas[here].clamp(min=torch.finfo(sigmas.dtype).tiny)  # of the noise
        turn, move = float(turned[here] - turned[there]), motion.between(here, there)
        onward = 0.0 if way is None else min(max(turn / before, 0.0), FURTHEST) / 2 if before > 0 else 0.5
        on_data = move.shrink - kept
        row = SamplerRow(
            latent=kept, noise_prediction=(1 + onward) * on_data, delta=(1 + onward) * move.growth, offset=move.shift
        )
        if way is not None:
            row = row._replace(
                previous_noise_prediction=-onward * on_data * way.shrink,
                previous_delta=-onward * (on_data * way.growth + move.growth),
                offset=move.shift - onward * on_data * way.shift,
            )
        rows.append(row)
        before, way = turn, move
    table = SamplerRows.of([max(index, 1) for index in indices[:-1]], rows, sigmas.shape[1:])
    return SamplerRows(table.steps, table.coefficients, of_data=True)
