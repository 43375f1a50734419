"""f(x, beta) of many images: the statistics of a process, and the process that is linear between a few nodes in beta.

A process that is linear between nodes is as legitimate as any other (MultiBeta Eq. 13-19 ask of f only that f(x, 0) is what is
decoded). Its encodings are computed once instead of at every step, and its differences are those of whole intervals: in bfloat16
that of one grid step is mostly rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from multibeta import distribution
from multibeta.data import Dataset, read_images, to_float
from multibeta.progress import progress_bar
from multibeta.schedules import BetaGrid, step_to_beta


@torch.no_grad()
def process_statistics(
    encode: Callable[[Tensor, float], Tensor],
    images: Tensor,
    num_steps: int,
    schedule: str = "linear",
    *,
    nodes: int = 32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation and velocity rms of f(x, t) over images, per grid index and channel.

    Measured at `nodes` + 1 values of t and interpolated linearly between them.

    Args:
        encode: (images, beta) to encodings (N, C, H, W), float32.
        images: A few hundred training images or more.

    Returns:
        Three tensors (num_steps + 1, C): m, F, and the rms of (f(x, t - tau) - f(x, t)) / tau.
    """
    grid = torch.linspace(0, num_steps, min(nodes, num_steps) + 1).round().long().unique()
    rows = []
    for step in grid.tolist():
        late = max(step, 1)
        beta, previous_beta = (float(step_to_beta(s, num_steps, schedule)) for s in (late, late - 1))
        encoding, previous = (encode(images, each).transpose(0, 1).flatten(1) for each in (beta, previous_beta))
        velocity, here = (previous - encoding) * num_steps, encoding if step else previous
        rows.append(torch.stack([here.mean(1), here.std(1, correction=0), velocity.square().mean(1).sqrt()]))
    nodes_table = torch.stack(rows)  # (nodes, 3, C)
    steps = torch.arange(num_steps + 1)
    right = torch.searchsorted(grid, steps).clamp(1, len(grid) - 1)
    weight = (steps - grid[right - 1]) / (grid[right] - grid[right - 1])
    table = torch.lerp(nodes_table[right - 1], nodes_table[right], weight[:, None, None].to(nodes_table))
    return table[:, 0], table[:, 1].clamp(min=1e-4), table[:, 2].clamp(min=1e-4)


def table_nodes(num_steps: int, intervals: int) -> Tensor:
    """Grid indices of the nodes, from 0 to num_steps, of at most `intervals` equal intervals, (K + 1,) int64."""
    return torch.linspace(0, num_steps, min(intervals, num_steps) + 1, dtype=torch.float64).round().long()


@torch.no_grad()
def encoding_table(
    encode: Callable[[Tensor, float], Tensor],
    dataset: Dataset,
    nodes: Tensor,
    grid: BetaGrid,
    *,
    at_once: int = 256,
    progress: bool = True,
) -> Tensor:
    """f(x, beta) of all images of a dataset at the `nodes`, (N, K + 1, C, H, W) float16, on the CPU.

    Several processes each encode their turns of the images, `at_once` of them together, and all get the table of one process.

    Args:
        encode: (images (n, C, H, W) in [-1, 1], beta) to encodings (n, C, H, W), on any device.
        nodes: Grid indices, (K + 1,).
        at_once: Images that `encode` gets together.
    """
    betas = step_to_beta(nodes, grid.num_steps, grid.schedule).tolist()
    chunks = torch.arange(len(dataset)).split(at_once)
    own = distribution.world().turns(chunks)

    def encoded() -> Iterator[Tensor]:
        total = sum(map(len, own))
        with progress_bar(
            total=total, desc="measuring the latents of the training images", unit="image", disable=not progress
        ) as bar:
            for indices in own:
                images = to_float(read_images(dataset, indices))
                yield torch.stack([encode(images, beta).to("cpu", torch.float16) for beta in betas], dim=1)
                bar.update(len(indices))

    table = torch.empty(0)
    for indices, rows in zip(chunks, distribution.in_turn(encoded()), strict=True):
        if len(table) == 0:
            table = torch.empty(len(dataset), *rows.shape[1:], dtype=torch.float16)
        table[indices] = rows
    return table


def interval_of(nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The interval in which each of `steps` (N,) lies, at a node the lower one: its number, and how far in it in [0, 1], (N,)."""
    right = torch.searchsorted(nodes, steps).clamp(1, len(nodes) - 1)
    return right - 1, (steps - nodes[right - 1]) / (nodes[right] - nodes[right - 1])


def between(nodes: Tensor, steps: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """f(x, t) and f(x, t - tau), float32, (N, C, H, W) each.

    Args:
        steps: Grid indices of t, (N,), above 0.
        lower, upper: f at both ends of the interval of each, (N, C, H, W).
    """
    interval, weight = interval_of(nodes, steps)
    shape = (-1, 1, 1, 1)
    lower, upper = lower.float(), upper.float()
    encoding = torch.lerp(lower, upper, weight.view(shape).to(lower))
    return encoding, encoding - (upper - lower) / nodes.diff()[interval].view(shape).to(lower)


def table_statistics(table: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation and velocity rms of a process that is linear between the nodes, exact, per grid index and channel.

    Args:
        table: f(x, beta) at the nodes of a few hundred images or more, (N, K + 1, C, H, W).

    Returns:
        As of `nonlinear_diffusion.process_statistics`, three tensors (num_steps + 1, C).
    """
    at_nodes = [table[:, k].float().transpose(0, 1).flatten(1) for k in range(len(nodes))]  # (C, N H W) each
    mean = torch.stack([values.mean(1) for values in at_nodes])
    centred = [values - values.mean(1, keepdim=True) for values in at_nodes]
    variance = torch.stack([values.square().mean(1) for values in centred])
    covariance = torch.stack([(left * right).mean(1) for left, right in itertools.pairwise(centred)])
    rise = torch.stack([(right - left).square().mean(1).sqrt() for left, right in itertools.pairwise(at_nodes)])

    num_steps = int(nodes[-1])
    interval, weight = interval_of(nodes, torch.arange(num_steps + 1))
    weight = weight[:, None].float()
    deviation = (
        (1 - weight) ** 2 * variance[interval]
        + weight**2 * variance[interval + 1]
        + 2 * weight * (1 - weight) * covariance[interval]
    ).clamp(min=0)
    rms = rise[interval] * num_steps / nodes.diff()[interval, None]
    return torch.lerp(mean[interval], mean[interval + 1], weight), deviation.sqrt().clamp(min=1e-4), rms.clamp(min=1e-4)
