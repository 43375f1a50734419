"""The trajectories that a flow map learns from: walks of its teacher, drawn as a training needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from multibeta.data import Indices
from multibeta.spans import Spanned
from multibeta.training.batches import generator_of


@dataclass(frozen=True)
class Trajectories:
    """Walks of a teacher from noise to data that stand at the same grid indices.

    Attributes:
        steps: Falling grid indices from the last to 0, (K + 1,) int64.
        latents: z at each, (K + 1, n, C, H, W).
        noise_moves: What the noise predictions moved since the first index, sum of (sigma_s - sigma_t) eps_hat, (K + 1, n, C, H,
            W); None of a process with one head, whose latents say it.
        condition: What the network reads next to the latent, (n, C, H, W), or None.
    """

    steps: Tensor
    latents: Tensor
    noise_moves: Tensor | None = None
    condition: Tensor | None = None


Walk = Callable[[Tensor, torch.Generator], Trajectories]


def drawn_indices(num_steps: int, count: int, generator: torch.Generator, shares: Tensor | None = None) -> list[int]:
    """Falling grid indices from `num_steps` to 0 of `count` steps, denser at both ends, jittered by half a step.

    Args:
        shares: How much of the way each grid step is, (num_steps,), see `nonlinear_diffusion.sampler_rows`.
    """
    jitter = torch.rand(count - 1, generator=generator, dtype=torch.float64) - 0.5
    even = (torch.arange(1, count) + jitter) / count
    place = (even + (1 - torch.cos(torch.pi * even)) / 2) / 2  # half evenly, half as a cosine
    way = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    if shares is not None:
        way = torch.nn.functional.pad(shares.double().cumsum(0), (1, 0))
        way = way / way[-1]
    inner = torch.searchsorted(way, place).clamp(1, num_steps - 1).unique()
    return [num_steps, *inner.flip(0).tolist(), 0]


class Starts:
    """Numbered places for trajectories, as a dataset: its images are empty.

    A training goes through all of them in an epoch. Chunks of `chunk` places get new trajectories after every `uses` epochs, in
    turn, so that each trajectory serves so many spans, and which one a step of the training sees depends on the key and the step
    alone.

    Args:
        walk: (seeds (n,), generator) to `Trajectories`.
        count: Places, a multiple of `chunk`.
        chunk: Trajectories that are made together.
        uses: Epochs until they are made anew; None for never.
        key: What the seeds of the trajectories depend on.
    """

    resolution, channels = 1, 1

    def __init__(self, walk: Walk, count: int, chunk: int, uses: int | None, *key: int | str) -> None:
        self.walk, self.count, self.chunk, self.uses, self.key = walk, count, chunk, uses, key
        self._made: dict[int, tuple[int, Trajectories]] = {}

    def __len__(self) -> int:
        return self.count

    def images(self, indices: Indices, /) -> Tensor:
        """No pixels for each of `indices`, uint8, (N, 0, 1, 1)."""
        return torch.empty(len(indices), 0, 1, 1, dtype=torch.uint8)

    @property
    def fingerprint(self) -> str:
        """What trajectories depend on, for a training that is resumed."""
        return repr((self.count, self.chunk, self.uses, *self.key))

    def generation(self, number: int, epoch: int) -> int:
        """How often chunk `number` was made anew before an epoch."""
        return 0 if self.uses is None else (epoch + number % self.uses) // self.uses

    def trajectories(self, number: int, epoch: int = 0) -> Trajectories:
        """Those of chunk `number` in an epoch."""
        generation = self.generation(number, epoch)
        if number not in self._made or self._made[number][0] != generation:
            generator = generator_of("trajectories", *self.key, number, generation)
            seeds = torch.randint(2**62, (min(self.chunk, self.count - number * self.chunk),), generator=generator)
            self._made.pop(number, None)  # its memory is free before more is taken
            self._made[number] = generation, self.walk(seeds, generator)
        return self._made[number][1]

    def fill(self, epoch: int, *, progress: bool = True) -> None:
        """Make all trajectories of an epoch, which otherwise are made when they are asked for."""
        with tqdm(total=self.count, desc="trajectories", unit="trajectory", disable=not progress) as bar:
            for number in range(-(-self.count // self.chunk)):
                bar.update(self.trajectories(number, epoch).latents.shape[1])

    def spans(self, indices: Tensor, first: Tensor, second: Tensor, before: int = 0) -> Spanned:
        """A span of the trajectory at each of `indices` (n,), as a training sees it after `before` others.

        Args:
            first, second: In [0, 1]: where on the trajectory a span begins, and how far it goes of what is left; a second of 0 is
                no span.
        """
        epochs = (before + torch.arange(len(indices))) // self.count
        keys = torch.stack([indices // self.chunk, epochs], dim=1)
        found: list[tuple[Tensor, ...]] = []
        order: list[Tensor] = []
        for number, epoch in keys.unique(dim=0).tolist():
            mine = ((keys[:, 0] == number) & (keys[:, 1] == epoch)).nonzero()[:, 0]
            walk, place = self.trajectories(number, epoch), indices[mine] % self.chunk
            last = len(walk.steps) - 1
            i = (first[mine] * last).long().clamp(max=last - 1)
            j = (i + 1 + (second[mine] * (last - i)).long()).clamp(max=last).where(second[mine] > 0, i)
            parts = [walk.steps[i], walk.steps[j], walk.latents[i, place], walk.latents[j, place]]
            if walk.noise_moves is not None:
                parts.append(walk.noise_moves[j, place] - walk.noise_moves[i, place])
            if walk.condition is not None:
                parts.append(walk.condition[place])
            found.append(tuple(parts))
            order.append(mine)
        back = torch.cat(order).argsort()
        starts, ends, latents, later, *others = (torch.cat(each)[back] for each in zip(*found, strict=True))
        moved = others.pop(0) if walk.noise_moves is not None else None
        return Spanned(starts, ends, latents, later, moved, *others)
