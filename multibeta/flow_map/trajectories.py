"""The trajectories that a flow map learns from: walks of its teacher, drawn as a training needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from multibeta import distribution
from multibeta.data import Indices
from multibeta.progress import progress_bar
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

    def to(self, device: torch.device | str) -> Trajectories:
        """These with latents, and what belongs to them, on a device."""
        moves, condition = (None if each is None else each.to(device) for each in (self.noise_moves, self.condition))
        return Trajectories(self.steps, self.latents.to(device), moves, condition)


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
    alone. Of several processes, see `distribution`, each makes some chunks whole, and has those of the others from them.

    Args:
        walk: (seeds (n,), generator) to `Trajectories`.
        count: Places, a multiple of `chunk`.
        chunk: Trajectories that are made together.
        uses: Epochs until they are made anew; None for never.
        key: What the seeds of the trajectories depend on.
        device: Where trajectories of other processes are kept, as those of `walk` are.
    """

    resolution, channels = 1, 0

    def __init__(
        self, walk: Walk, count: int, chunk: int, uses: int | None, *key: int | str, device: torch.device | str = "cpu"
    ) -> None:
        self.walk, self.count, self.chunk, self.uses, self.key, self.device = walk, count, chunk, uses, key, device
        self._made: dict[int, tuple[int, Trajectories]] = {}
        self._filled: int | None = None  # the epoch that processes made together

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
            self._made.pop(number, None)  # its memory is free before more is taken
            self._made[number] = generation, self._walked(number, generation)
        return self._made[number][1]

    def _walked(self, number: int, generation: int) -> Trajectories:
        generator = generator_of("trajectories", *self.key, number, generation)
        seeds = torch.randint(2**62, (min(self.chunk, self.count - number * self.chunk),), generator=generator)
        return self.walk(seeds, generator)

    def fill(self, epoch: int, *, progress: bool = True) -> None:
        """Make all trajectories of an epoch, which otherwise are made when they are asked for; all processes come together."""
        numbers = list(range(-(-self.count // self.chunk)))
        with progress_bar(total=self.count, desc="trajectories", unit="trajectory", disable=not progress) as bar:
            if distribution.world().size == 1:
                for number in numbers:
                    bar.update(self.trajectories(number, epoch).latents.shape[1])
                return
            if self._filled is not None:  # which chunks are of before is the same in all processes
                numbers = [n for n in numbers if self.generation(n, epoch) != self.generation(n, self._filled)]
            own = ((n, self._walked(n, self.generation(n, epoch)).to("cpu")) for n in distribution.world().turns(numbers))
            for number, walk in distribution.in_turn(own):
                self._made[number] = self.generation(number, epoch), walk.to(self.device)
                bar.update(walk.latents.shape[1])
        self._filled = epoch

    def keep_filled(self, epoch: int) -> None:
        """Of several processes, which come here together, let each make its chunks where another epoch begins."""
        if distribution.world().size > 1 and epoch != self._filled:
            self.fill(epoch, progress=False)

    def spans(self, indices: Tensor, first: Tensor, second: Tensor, before: int = 0) -> Spanned:
        """A span of the trajectory at each of `indices` (n,), as a training sees it after `before` others.

        Args:
            first, second: In [0, 1]: where on the trajectory a span begins, and how far it goes of what is left; a second of 0 is
                no span.
        """
        epochs = (before + torch.arange(len(indices))) // self.count
        keys, of = torch.stack([indices // self.chunk, epochs], dim=1).unique(dim=0, return_inverse=True)
        walks = [self.trajectories(number, epoch) for number, epoch in keys.tolist()]
        steps = pad_sequence([walk.steps for walk in walks], batch_first=True)
        last = torch.tensor([len(walk.steps) - 1 for walk in walks])[of]
        i = (first * last).long().minimum(last - 1)
        j = (i + 1 + (second * (last - i)).long()).minimum(last).where(second > 0, i)
        # a batch is of many chunks: where to look goes to the device at once, and each chunk is looked into once
        order, counts, place = of.argsort(), of.bincount().tolist(), indices % self.chunk
        width = torch.tensor([walk.latents.shape[1] for walk in walks])[of]
        places = torch.stack([i * width + place, j * width + place, place])[:, order]
        places = torch.cat([places, order.argsort()[None]]).to(walks[0].latents.device)
        ends, own, back = places[:2].split(counts, dim=1), places[2].split(counts), places[3]

        def at_ends(maps: list[Tensor]) -> Tensor:
            """(2, n, C, H, W) of maps (K + 1, m, C, H, W) of each walk."""
            return torch.cat([each.flatten(0, 1)[rows] for each, rows in zip(maps, ends, strict=True)], dim=1)[:, back]

        latents, later = at_ends([walk.latents for walk in walks])
        moves = [walk.noise_moves for walk in walks if walk.noise_moves is not None]
        conditions = [walk.condition[rows] for walk, rows in zip(walks, own, strict=True) if walk.condition is not None]
        moved = at_ends(moves).diff(dim=0)[0] if moves else None
        return Spanned(steps[of, i], steps[of, j], latents, later, moved, torch.cat(conditions)[back] if conditions else None)
