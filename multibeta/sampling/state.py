"""Fixed addresses for a captured step: the tables of a trajectory, and the buffers of one batch size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multibeta import ops
from multibeta.inference import Step


class Schedule:
    """The tables of a trajectory at fixed addresses, and the evaluation at hand, which counts on the device.

    Args:
        capacity: Evaluations that fit.
        row, head_row: Shapes of a row of both tables.
        shift: Channels of all blocks together.
        device, dtype: Of the network; only the shifts are of `dtype`.
    """

    def __init__(
        self,
        capacity: int,
        row: tuple[int, ...],
        head_row: tuple[int, ...],
        shift: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.rows = torch.zeros(capacity, *row, device=device)
        self.head_rows = torch.zeros(capacity, *head_row, device=device)
        self.steps = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.shifts = torch.zeros(capacity, shift, dtype=dtype, device=device)
        self.guidance = torch.zeros(capacity, len(ops.GuidanceRow._fields), device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """All but the counter."""
        return self.rows, self.head_rows, self.steps, self.shifts, self.guidance

    def fits(self, *tables: Tensor) -> bool:
        """Whether these tables can be written here."""
        pairs = zip(self.tables, tables, strict=True)
        return all(mine.shape[1:] == given.shape[1:] and len(mine) >= len(given) for mine, given in pairs)

    def write(self, *tables: Tensor) -> None:
        """Take these tables, in place."""
        for mine, given in zip(self.tables, tables, strict=True):
            mine[: len(given)] = given.to(mine)


class State:
    """Buffers of one batch size, at fixed addresses, and the step over them.

    Where the latent is `parted` into its coefficients in a basis, each is a channel of one pixel, and the step writes the next
    input in them to `next_input`; the network reads pixels.
    """

    replay: Step  # which the engine makes

    def __init__(
        self,
        count: int,
        shape: tuple[int, ...],
        in_channels: int,
        dtype: torch.dtype,
        schedule: Schedule,
        *,
        conditioned: bool,
        guided: bool,
        parted: bool,
    ) -> None:
        (channels, *size), device = shape, schedule.rows.device
        walked = (math.prod(shape), 1, 1) if parted else shape
        self.schedule = schedule
        self.latent = torch.zeros(count, *walked, device=device)
        self.history = torch.zeros(2, count, *walked, device=device)
        self.seeds = torch.zeros(count, dtype=torch.int64, device=device)
        self.condition = torch.zeros(count, *shape, device=device) if conditioned else None
        padded = torch.zeros((1 + guided) * count, in_channels, *size, device=device, dtype=dtype)
        self.padded_input = padded.to(memory_format=torch.channels_last)
        self.network_input = self.padded_input[:count, :channels]
        self.next_input = torch.zeros_like(self.latent) if parted else self.network_input
        self.condition_input = self.padded_input[:count, channels : 2 * channels]
        self.free_input = self.padded_input[count:, :channels]  # next to it the condition stays zero
        self.guided = guided
