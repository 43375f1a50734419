"""The coefficients of a sampler by name, and the columns of a table in which the kernels find them.

The fields of a class, in their order, are the columns of its table: `pack` writes them, `row(*table.unbind(-1))` reads them. This
is the one home of the layout; the enums of csrc/sampler_update.cpp repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Coefficient = Tensor | float


class SamplerRow(NamedTuple):
    """One row of a sampler: the next latent is the sum of these, each times what its name says.

    `fresh_noise` is standard normal and belongs to the sample, `previous_*` are the predictions of the evaluation before, what
    `offset` multiplies is one.
    """

    latent: Coefficient
    noise_prediction: Coefficient
    delta: Coefficient
    fresh_noise: Coefficient = 0.0
    previous_noise_prediction: Coefficient = 0.0
    previous_delta: Coefficient = 0.0
    offset: Coefficient = 0.0


class TwoHeadRow(NamedTuple):
    """What stands between a network with two heads, (first, second), and the sampler.

    noise_prediction = noise_from_output first + noise_from_latent latent + noise_offset
    delta = delta_from_second second + delta_from_noise noise_prediction + delta_from_latent latent + delta_offset
    network input = input_from_latent latent + input_offset
    """

    noise_from_output: Coefficient
    noise_from_latent: Coefficient
    noise_offset: Coefficient
    delta_from_second: Coefficient
    input_from_latent: Coefficient
    input_offset: Coefficient
    delta_from_noise: Coefficient = 0.0
    delta_from_latent: Coefficient = 0.0
    delta_offset: Coefficient = 0.0

    def predictions(self, latent: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """(noise_prediction, delta) of both outputs at a latent, like them."""
        noise = self.noise_from_output * first + self.noise_from_latent * latent + self.noise_offset
        of_first = self.delta_from_noise * noise + self.delta_from_latent * latent + self.delta_offset
        return noise, self.delta_from_second * second + of_first


class OneHeadRow(NamedTuple):
    """What stands between a network with one output and a condition, and the sampler.

    noise_prediction = noise_from_output output + noise_from_latent latent + noise_offset
    centre = delta_from_condition condition
    delta = clamp(delta_from_noise noise_prediction + delta_from_latent latent + centre, -delta_limit, delta_limit) - centre
    network input = input_from_latent latent + input_offset + input_from_condition condition
    """

    noise_from_output: Coefficient
    noise_from_latent: Coefficient
    noise_offset: Coefficient
    delta_from_condition: Coefficient
    input_from_latent: Coefficient
    input_offset: Coefficient
    delta_from_noise: Coefficient
    delta_from_latent: Coefficient
    delta_limit: Coefficient
    input_from_condition: Coefficient


class GuidanceRow(NamedTuple):
    """Classifier-free guidance: (1 + weight) output - weight free_output.

    The free output is that of the network at latent + latent_from_condition condition, next to a condition of zeros.
    """

    weight: Coefficient
    latent_from_condition: Coefficient


NamedRow = SamplerRow | TwoHeadRow | OneHeadRow | GuidanceRow
SAMPLER_COLUMNS, TWO_HEAD_COLUMNS, ONE_HEAD_COLUMNS = (len(row._fields) for row in (SamplerRow, TwoHeadRow, OneHeadRow))


def pack(row: NamedRow, shape: tuple[int, ...]) -> Tensor:
    """The table of named coefficients that broadcast to `shape`: (*shape, columns), float64."""
    return torch.stack([torch.as_tensor(value, dtype=torch.float64).expand(shape) for value in row], dim=-1)


def pack_rows(rows: Sequence[SamplerRow], shape: tuple[int, ...]) -> Tensor:
    """The table of named rows, whose coefficients broadcast to `shape`: (S, *shape, 7), float64."""

    def stacked(values: list[Coefficient]) -> Tensor:
        if any(isinstance(value, Tensor) for value in values):
            return torch.stack([torch.as_tensor(value, dtype=torch.float64).expand(shape) for value in values])
        numbers = torch.tensor(values, dtype=torch.float64)  # at once: a tensor of each takes a hundred times as long
        return numbers.reshape(len(rows), *(1 for _ in shape)).expand(len(rows), *shape)

    return torch.stack([stacked([row[column] for row in rows]) for column in range(SAMPLER_COLUMNS)], dim=-1)


def head_row(table: Tensor) -> TwoHeadRow | OneHeadRow:
    """The named columns of a table (..., 9) of two heads or (..., 10) of one."""
    row = OneHeadRow if table.shape[-1] == ONE_HEAD_COLUMNS else TwoHeadRow
    return row(*table.unbind(-1))


def with_next_input(head_rows: Tensor) -> Tensor:
    """Rows (S, C, 9 or 10) whose network input is that of their own evaluation, as those of steps that write the next input."""
    named = zip(head_row(head_rows)._fields, head_rows.unbind(-1), strict=True)
    return torch.stack([column.roll(-1, dims=0) if name.startswith("input_") else column for name, column in named], dim=-1)
