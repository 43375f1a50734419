"""Training of the two heads: MultiBeta Eq. 18 and 19."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from multibeta.checks import check_integer, check_number
from multibeta.draws import rows
from multibeta.nonlinear_diffusion.network import NonlinearDiffusion
from multibeta.nonlinear_diffusion.process import between, interval_of, table_nodes
from multibeta.schedules import spatial, step_to_beta, stratified_steps
from multibeta.training import Batch
from multibeta.variational import sample

LEAST_COUNT = 0.1  # of the second head's error on its own: where it hardly counts, it must not grow to serve the first


@dataclass(frozen=True)
class NonlinearDiffusionObjectiveOptions:
    """What `NonlinearDiffusionObjective` leaves to choose.

    Attributes:
        weight_exponent: 1 / w(t) = sigma_t^weight_exponent on the noise term, of each channel its own; 0 (w = 1) trained best.
        noise_draws: Draws of eps per encoded image: two encodings in float32 cost more than a small U-Net, so each pair
            serves several.
        nodes: f is taken at the ends of so many equal intervals of the grid and is linear between them, see `encoding_table`;
            0 takes f(x, t) and f(x, t - tau) themselves.
        uniform_share: This share of t is drawn uniformly over the grid, the rest by the turn from signal to noise, see
            `NonlinearDiffusion.step_shares`; 1 draws all of t uniformly, as MultiBeta Eq. 18.
        move_share: This share of the loss is the error of the move of `ode`, in which those of both heads add up or cancel; the
            rest are the errors of each, weighed as they count in it (`NonlinearDiffusion.turn_weights`). None weighs both by one.

    Raises:
        ValueError: A number out of its range, with the name of its field.
    """

    weight_exponent: float = 0.0
    noise_draws: int = 1
    nodes: int = 0
    uniform_share: float = 1.0
    move_share: float | None = None

    def __post_init__(self) -> None:
        check_number("weight_exponent", self.weight_exponent, least=-8, most=8)  # sigma^-8 of sigma = e^-10 is a float32
        check_integer("noise_draws", self.noise_draws, 1)
        check_integer("nodes", self.nodes, 0)
        check_number("uniform_share", self.uniform_share, least=0, most=1)
        if self.move_share is not None:
            check_number("move_share", self.move_share, least=0, most=1)
            if self.weight_exponent:
                raise ValueError(f"move_share {self.move_share:g} weighs both heads: weight_exponent must be 0")


class NonlinearDiffusionObjective:
    """Training of the two heads (MultiBeta Eq. 18 and 19), for `training.train`.

    Args:
        diffusion: The model trained; its process must be set.
        encode: (images, beta (N,)) to f(x, beta); frozen. It is called outside autocast, in float32: in bfloat16 the
            difference of two encodings is mostly rounding.
        options: What there is to choose; `fields` are those of it that differ, by name.
        table: f(x, beta) of the training images at the nodes, from `encoding_table`, where it was computed before; the images
            of validation, and all where there is none, are encoded as they come.
    """

    def __init__(
        self,
        diffusion: NonlinearDiffusion,
        encode: Callable[[Tensor, Tensor], Tensor],
        options: NonlinearDiffusionObjectiveOptions | None = None,
        *,
        table: Tensor | None = None,
        **fields: Any,
    ) -> None:
        self.module, self.encode, self.table = diffusion, encode, table
        self.options = replace(options or NonlinearDiffusionObjectiveOptions(), **fields)
        if self.options.move_share is not None and diffusion.config.parameterization != "residual":
            raise ValueError(
                f'move_share must be None but for parameterization "residual", got {self.options.move_share:g} and '
                f'"{diffusion.config.parameterization}": of others it is not known how their errors count'
            )
        self.nodes = table_nodes(diffusion.config.num_steps, self.options.nodes) if self.options.nodes else None
        if table is not None and (self.nodes is None or table.shape[1] != len(self.nodes)):
            raise ValueError(f"a table of {table.shape[1]} nodes needs nodes={table.shape[1] - 1}, got {self.options.nodes}")

    @functools.cached_property
    def step_weights(self) -> Tensor | None:
        """Probability of each grid index from 1 on, (last_step,); None where all are alike."""
        if self.options.uniform_share == 1:
            return None
        shares = self.module.step_shares(self.options.uniform_share)[: self.module.last_step]
        return shares / shares.sum()

    def encodings(self, batch: Batch, steps: Tensor) -> tuple[Tensor, Tensor]:
        """f(x, t) and f(x, t - tau) of the images of a batch at grid indices `steps` (N,) > 0, float32, (N, C, H, W)."""
        images, nodes = batch.images, self.nodes
        if nodes is None:
            return self._encode_both(images, steps, steps - 1)
        interval = interval_of(nodes, steps)[0]
        if self.table is None or batch.held_out:
            lower, upper = self._encode_both(images, nodes[interval], nodes[interval + 1])
        else:
            lower, upper = (self.table[batch.indices, end].to(images.device) for end in (interval, interval + 1))
        return between(nodes, steps, lower, upper)

    @torch.no_grad()
    def _encode_both(self, images: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """f(x, t) at two grid indices of each image, (N, C, H, W) each."""
        config = self.module.config
        betas = step_to_beta(torch.cat([first, second]), config.num_steps, config.schedule).to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            encoding, other = self.encode(images.float().repeat(2, 1, 1, 1), betas).chunk(2)
        return encoding, other

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images, draws = batch.images, self.options.noise_draws
        steps = stratified_steps(len(images), 1, self.module.last_step, generator, self.step_weights)
        encoding, previous_encoding = (each.repeat(draws, 1, 1, 1) for each in self.encodings(batch, steps))
        steps, shape = steps.to(images.device).repeat(draws), encoding.shape[1:]
        noise = rows(lambda n, source: torch.randn(draws, n, *shape, generator=source), len(images), generator, dim=1)
        noise = noise.flatten(0, 1).to(images.device)
        sigma = spatial(self.module.sigmas[steps])

        first, second = self.module.heads(sample(encoding, sigma, noise), steps)
        first_target, second_target = self.module.targets(encoding, previous_encoding, noise, steps)
        first_error, second_error = first - first_target, second - second_target
        noise_error, delta_error = first_error.square(), second_error.square()
        scalars = {"noise_error": noise_error.mean(), "delta_error": delta_error.mean()}
        share = self.options.move_share
        if share is None:
            return (sigma**self.options.weight_exponent * noise_error + delta_error).mean(), scalars
        weight, counts = self.module.turn_weights(steps)
        move_error = weight * (counts * second_error - first_error).square()
        apart = weight * (noise_error + counts.square() * delta_error) + LEAST_COUNT * delta_error
        return (share * move_error + (1 - share) * apart).mean(), scalars | {"move_error": move_error.mean()}
