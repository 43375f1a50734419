"""Everything indexed by beta: the grid, the beta schedules, the learned curves sigma(beta) and s(beta); the variances of DDPM.

This is the only place that converts between beta and the grid index (the step).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multibeta.checks import check_beta, check_counts, check_integer, check_number
from multibeta.draws import rows
from multibeta.ops import SAMPLER_COLUMNS, SamplerRow, pack_rows

BETA_SCHEDULES = ("linear", "sinusoidal", "sinusoidal_squared")


def beta_schedule(fraction: Tensor, schedule: str = "linear") -> Tensor:
    """Beta as a function of training time u = step / num_steps (MultiBeta section 3.1 and Fig. 3).

    Args:
        fraction: u in [0, 1].
        schedule: "linear" u, "sinusoidal" sin(pi u / 2) (grows suddenly near 0), "sinusoidal_squared" sin^2(pi u / 2).

    Returns:
        beta in [0, 1], shaped like `fraction`.
    """
    if schedule == "linear":
        return fraction
    if schedule == "sinusoidal":
        return torch.sin(fraction * (math.pi / 2))
    if schedule == "sinusoidal_squared":
        return torch.sin(fraction * (math.pi / 2)) ** 2
    raise ValueError(f"schedule must be one of {', '.join(BETA_SCHEDULES)}, got {schedule!r}")


def step_to_beta(step: Tensor | int, num_steps: int, schedule: str = "linear") -> Tensor:
    """Beta of grid index `step`, 0 <= step <= num_steps: index 0 is beta = 0, index num_steps is beta = 1."""
    return beta_schedule(torch.as_tensor(step, dtype=torch.float64) / num_steps, schedule).float()


def beta_grid(num_steps: int, schedule: str = "linear") -> Tensor:
    """The num_steps + 1 training values of beta, (num_steps + 1,), from 0 to 1."""
    return step_to_beta(torch.arange(num_steps + 1), num_steps, schedule)


@dataclass(frozen=True)
class BetaGrid:
    """The training grid over beta that the parts of a model share, a field of each one's config.

    Attributes:
        num_steps: Steps N from beta = 0 to beta = 1.
        schedule: See `beta_schedule`.

    Raises:
        ValueError: `num_steps` is no integer of at least 1.
    """

    num_steps: int = 1000
    schedule: Literal["linear", "sinusoidal", "sinusoidal_squared"] = "linear"

    def __post_init__(self) -> None:
        check_counts(self, "num_steps")

    @property
    def grid(self) -> BetaGrid:
        """The grid alone, without what else a config says."""
        return BetaGrid(self.num_steps, self.schedule)


def beta_to_step(beta: float, num_steps: int, schedule: str = "linear") -> int:
    """The grid index whose beta is nearest to `beta`, one number."""
    check_beta(beta)
    if not isinstance(beta, numbers.Real) and torch.as_tensor(beta).numel() != 1:
        raise ValueError(f"beta must be one number for all samples here, got {tuple(torch.as_tensor(beta).shape)}")
    return int((beta_grid(num_steps, schedule) - float(beta)).abs().argmin())


def stratified_steps(count: int, low: int, high: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """`count` grid indices in [low, high], one from each of `count` equal strata, in random order, (count,) int64.

    Every index has the same probability, or that of its `weights`, (high - low + 1,) of sum 1; the strata spread one batch evenly
    over beta, also one that is computed in pieces.
    """

    def draw(count: int, generator: torch.Generator) -> Tensor:
        strata = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        if weights is not None:
            return (low + torch.searchsorted(weights.cumsum(0), strata.to(weights))).clamp(max=high)
        return (low + strata * (high - low + 1)).long().clamp(max=high)

    return rows(draw, count, generator)


def ddpm_variances(num_steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Variance of the noise each step of a DDPM adds (Ho et al. 2020), linear from `first` to `last`, (num_steps,) float64.

    Raises:
        ValueError: No variances of a chain: each step adds some noise (1e-12 or more) and keeps some signal.
    """
    check_integer("num_steps", num_steps, 1)
    for name, value in (("first_variance", first), ("last_variance", last)):
        check_number(name, value, least=1e-12, most=0.9999)
    return torch.linspace(first, last, num_steps, dtype=torch.float32).double()  # rounded as the published models were trained


def cosine_variances(num_steps: int = 1000, offset: float = 0.008) -> Tensor:
    """Variance of the noise each step of a DDPM adds, at most 0.999, for the cosine schedule of Nichol and Dhariwal 2021.

    Args:
        offset: s, which keeps the first steps from being too small to matter.

    Returns:
        (num_steps,) float64.
    """
    check_integer("num_steps", num_steps, 1)
    time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha_bars = torch.cos((time + offset) / (1 + offset) * (math.pi / 2)) ** 2
    return (1 - alpha_bars[1:] / alpha_bars[:-1]).clamp(max=0.999)


def posterior_weights(alpha_bar: float, next_alpha_bar: float) -> tuple[float, float, float]:
    """q(r_s | r_t, r_0) = N(c_1 r_0 + c_2 r_t, variance I) for s < t, from alpha_bar at t and at s: (c_1, c_2, variance)."""
    step_variance = 1 - alpha_bar / next_alpha_bar
    on_clean = step_variance * math.sqrt(next_alpha_bar) / (1 - alpha_bar)
    on_noisy = math.sqrt(1 - step_variance) * (1 - next_alpha_bar) / (1 - alpha_bar)
    return on_clean, on_noisy, step_variance * (1 - next_alpha_bar) / (1 - alpha_bar)


def _knot_positions(count: int) -> Tensor:
    """beta of each knot: dense at both ends, where log sigma bends, (count,) from 0 to 1."""
    return (1 - torch.cos(torch.arange(count, dtype=torch.float64) * (math.pi / (count - 1)))) / 2


def _interpolate_knots(knots: Tensor, beta: Tensor) -> Tensor:
    """Piecewise linear in beta (N,) through `knots` (..., K) at `_knot_positions`, (..., N)."""
    positions = _knot_positions(knots.shape[-1]).to(knots)
    beta = beta.to(knots)
    right = torch.searchsorted(positions, beta.contiguous()).clamp(1, len(positions) - 1)
    weight = (beta - positions[right - 1]) / (positions[right] - positions[right - 1])
    return torch.lerp(knots[..., right - 1], knots[..., right], weight)


def spatial(values: Tensor) -> Tensor:
    """Values per sample (N,), or per sample and channel (N, C), shaped to broadcast with (N, C, H, W)."""
    return values[:, None, None, None] if values.dim() == 1 else values[:, :, None, None]


class SigmaCurve(nn.Module):
    """The encoder's deviation sigma(beta) of MultiBeta Eq. 3: a monotone learned curve, pinned to sigma(1) = 1.

    log sigma is piecewise linear between `num_knots` knots with softplus increments, so sigma rises strictly and every
    sigma_{t|t-tau}^2 = sigma_t^2 - sigma_{t-tau}^2 is positive, which a free table does not give.

    Args:
        num_knots: Knots over beta in [0, 1], dense at both ends: sigma falls steeply as beta goes to 0.
        log_sigma_zero: log sigma(0) at initialisation.
        num_channels: One curve per latent channel; None for the one curve of MultiBeta Eq. 3.
    """

    def __init__(self, num_knots: int = 24, log_sigma_zero: float = -4.0, num_channels: int | None = None) -> None:
        super().__init__()
        check_integer("num_knots", num_knots, 2)
        check_number("log_sigma_zero", log_sigma_zero, least=-80, most=-1e-6)  # sigma(0) is a float32 between 0 and 1
        shape = (num_knots - 1,) if num_channels is None else (num_channels, num_knots - 1)
        increment = -log_sigma_zero / (num_knots - 1)
        self.raw_increments = nn.Parameter(torch.full(shape, math.log(math.expm1(increment))))

    def forward(self, beta: Tensor) -> Tensor:
        """sigma at `beta` (N,) in [0, 1]: (N,), or (N, num_channels)."""
        increments = F.softplus(self.raw_increments.float())
        below_one = -increments.flip(-1).cumsum(-1).flip(-1)
        return _interpolate_knots(F.pad(below_one, (0, 1)), beta).exp().movedim(-1, 0)


class DecoderSigmaCurve(nn.Module):
    """The decoder's deviation s(beta) of MultiBeta Eq. 2: log s piecewise linear, with a floor s^2 >= `floor`.

    The floor keeps the likelihood bounded where the reconstruction becomes exact.
    """

    def __init__(self, num_knots: int = 24, floor: float = 0.0001) -> None:
        super().__init__()
        self.floor = floor
        self.log_s = nn.Parameter(torch.full((num_knots,), -1.0))

    def forward(self, beta: Tensor) -> Tensor:
        """s at `beta` (N,) in [0, 1], shaped like it."""
        return (_interpolate_knots(self.log_s.float(), beta).mul(2).exp() + self.floor).sqrt()


@dataclass(frozen=True)
class SamplerRows:
    """A sampler as a table: one `ops.SamplerRow` for each evaluation of the network.

    Attributes:
        steps: Grid index the network is evaluated at, (S,) int64.
        coefficients: The rows as `ops.pack` lays them out, (S, 7) float64; (S, C, 7) where they differ by latent channel. What
            delta is, the method says.
        of_data: Whether they weigh what `NonlinearDiffusion.predict_data` gives, in the place of noise and delta.
        ends: Of a flow map: the grid index at which the span of each evaluation ends, (S,) int64.
    """

    steps: Tensor
    coefficients: Tensor
    of_data: bool = False
    ends: Tensor | None = None

    @classmethod
    def of(
        cls,
        steps: Sequence[int],
        rows: Sequence[SamplerRow],
        shape: tuple[int, ...] = (),
        ends: Sequence[int] | None = None,
    ) -> SamplerRows:
        """The table of named rows, whose coefficients are numbers or tensors of `shape`, () or (C,)."""
        of_spans = None if ends is None else torch.tensor(ends, dtype=torch.int64)
        return cls(torch.tensor(steps, dtype=torch.int64), pack_rows(rows, shape), ends=of_spans)

    @property
    def named(self) -> SamplerRow:
        """The coefficients by name, views of (S,) or (S, C) each."""
        return SamplerRow(*self.coefficients.unbind(-1))

    def __len__(self) -> int:
        return len(self.steps)

    def of_latent(self, channels: int, basis: Tensor | None = None) -> Tensor:
        """The rows for a latent of `channels`, (S, 7) or (S, C, 7); in a basis (H, H) for its coefficients, then (S, C H H, 7).

        Raises:
            ValueError: They are of another number of channels.
        """
        parts = 1 if basis is None else basis.numel()
        shapes = [(len(self), *own, SAMPLER_COLUMNS) for own in dict.fromkeys([(), (channels,), (channels * parts,)])]
        given = tuple(self.coefficients.shape)
        if given not in shapes:
            raise ValueError(f"rows for {channels} channels must be {' or '.join(map(str, shapes))}, got {given}")
        return self.coefficients.repeat_interleave(parts, dim=1) if given == shapes[1] else self.coefficients

    def __repr__(self) -> str:
        return f"SamplerRows({len(self)} evaluations, coefficients {tuple(self.coefficients.shape)})"
