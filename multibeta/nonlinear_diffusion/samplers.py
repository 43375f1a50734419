"""The coefficient tables of the samplers: MultiBeta Algorithm 2, Eq. 15-17."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from multibeta.checks import check_steps, is_integer, is_single
from multibeta.ops import SamplerRow
from multibeta.schedules import SamplerRows

INVERTIBLE = ("ode", "ode2", "heun")  # of the probability-flow ODE, which is walked up as well
SAMPLERS = ("resample", "ancestral", *INVERTIBLE)


def sampler_rows(
    sigmas: Tensor,
    sampler: str,
    steps: int,
    *,
    start: int | None = None,
    stop: int = 0,
    delta_sign: int = 1,
    shares: Tensor | None = None,
) -> SamplerRows:
    """The coefficient table of a sampler of z_t = f(x, t) + sigma_t eps (MultiBeta Algorithm 2, Eq. 15-17).

    For times s < t and a scale c of fresh noise,

        z_s = z_t + (sqrt(sigma_s^2 - c^2) - sigma_t) eps_hat + delta_hat(t -> s) + c xi.

    Args:
        sigmas: sigma on the training grid, (N + 1,) or (N + 1, C), index 0 = beta 0, increasing (in every channel).
        sampler:
            "resample": c = sigma_s, all noise is fresh, MultiBeta Algorithm 2.
            "ancestral": c^2 = (sigma_t^2 - sigma_s^2) sigma_s^2 / sigma_t^2, the posterior of MultiBeta Eq. 15-17.
            "ode": c = 0, the probability-flow ODE by Euler's method.
            "ode2": the same ODE by a second-order multistep method that reuses the evaluation before (Adams-Bashforth).
            "heun": the same ODE by Heun's method, 2 steps - 1 evaluations.
        steps: 1 <= steps <= abs(start - stop).
        start, stop: Grid indices of both ends, by default N and 0. The deterministic samplers also go upwards
            (start < stop), which inverts a latent to noise.
        delta_sign: -1 subtracts delta, as MultiBeta Algorithm 2 prints; +1 follows from Eq. 17.
        shares: How much of the way each grid step is, (N,), positive: the steps take equal parts of it. None for equal steps.

    Returns:
        The rows for `sampling.sample`, with one delta per grid step scaled to the stride: coefficients (S, 7), or (S, C, 7)
        whose channel j holds the rows of sigmas[:, j].

    Raises:
        ValueError: An unknown sampler, a number of steps the grid does not have, a range outside the grid, another sign, sigmas
            of another shape, not finite, or that fall.

    Paper note: Algorithm 2 draws all noise anew around the conditional mean of f and so loses the posterior variance at
    every step: with exact predictions a mode of deviation 0.12 comes out at 0.12 / sqrt(2). It also prints the sign of
    delta against Eq. 17. "resample" keeps it for comparison; `test_sampling.py` states both facts.
    """
    return walk_rows(sigmas, sampler, grid_indices(len(sigmas) - 1, steps, start, stop, shares), delta_sign=delta_sign)


def walk_rows(sigmas: Tensor, sampler: str, indices: Sequence[int], *, delta_sign: int = 1) -> SamplerRows:
    """The coefficient table of a sampler that stands at these grid indices, falling or rising: see `sampler_rows`."""
    if sigmas.dim() not in (1, 2):
        raise ValueError(f"sigmas must be (N + 1,) or (N + 1, C), got {tuple(sigmas.shape)}")
    curves = sigmas.detach().double().cpu().movedim(0, -1).contiguous()  # (N + 1,) or (C, N + 1)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if not is_single(delta_sign) or delta_sign not in (1, -1):
        raise ValueError(f"delta_sign must be 1 or -1, got {delta_sign!r}")
    if not curves.isfinite().all() or (curves.diff() < -1e-6 * curves.abs().max()).any():  # but for rounding
        raise ValueError("sigmas must be finite and not fall from beta = 0 to 1")
    if indices[0] < indices[-1] and sampler not in INVERTIBLE:
        raise ValueError(f"sampler {sampler!r} only walks down; use ode, ode2 or heun from {indices[0]} to {indices[-1]}")

    evaluated, rows = [], []
    before = None
    for i, j in itertools.pairwise(indices):
        sigma, next_sigma = curves[..., i], curves[..., j]
        noise, delta = next_sigma - sigma, i - j
        evaluated.append(max(i, 1))  # delta is a difference to the index below: index 0 has none
        if sampler == "resample":
            rows.append(SamplerRow(latent=1, noise_prediction=-sigma, delta=delta, fresh_noise=next_sigma))
        elif sampler == "ancestral":
            fresh = ((sigma**2 - next_sigma**2) * next_sigma**2 / sigma**2).sqrt()
            rows.append(SamplerRow(latent=1, noise_prediction=next_sigma**2 / sigma - sigma, delta=delta, fresh_noise=fresh))
        elif sampler == "ode2" and before is not None:
            here, earlier = _linear_weights(curves, i, j, before)
            rows.append(_two_evaluations(here, earlier))
        else:
            rows.append(SamplerRow(latent=1, noise_prediction=noise, delta=delta))
            if sampler == "heun" and j != indices[-1]:
                (old_noise, old_delta), there = _linear_weights(curves, i, j, j)
                evaluated.append(j)
                rows.append(_two_evaluations(there, (old_noise - noise, old_delta - delta)))  # takes the first move back
        before = i
    sign = int(delta_sign)
    signed = [row._replace(delta=sign * row.delta, previous_delta=sign * row.previous_delta) for row in rows]
    return SamplerRows.of(evaluated, signed, curves.shape[:-1])


def grid_indices(last: int, steps: int, start: int | None, stop: int, shares: Tensor | None = None) -> list[int]:
    """The grid indices of a walk of `steps` steps on the grid 0 ... `last`, see `sampler_rows`: `steps` + 1, or `stop` alone."""
    start = last if start is None else start
    if not all(is_integer(index) and 0 <= index <= last for index in (start, stop)):
        raise ValueError(f"start and stop must lie on the grid 0 ... {last}, got {start} and {stop}")
    if start == stop:
        return [stop]
    check_steps(steps, abs(start - stop), f" (grid steps from {start} to {stop})")
    return spaced_indices(start, stop, steps, shares)


def spaced_indices(start: int, stop: int, steps: int, shares: Tensor | None = None) -> list[int]:
    """`steps` + 1 different grid indices from `start` to `stop`, see `sampler_rows`."""
    if shares is None:
        return torch.linspace(start, stop, steps + 1).round().long().tolist()
    low, high = min(start, stop), max(start, stop)
    way = torch.nn.functional.pad(shares[low:high].double().cumsum(0), (1, 0))
    nearest = torch.searchsorted(way, torch.linspace(0, 1, steps + 1, dtype=way.dtype) * way[-1]).clamp(max=high - low)
    positions = torch.arange(steps + 1)
    least = (nearest - positions).cummax(0).values + positions  # rising by one at least
    indices = low + torch.minimum(least, high - low - steps + positions)
    return indices.tolist() if start < stop else indices.flip(0).tolist()


def _two_evaluations(now: tuple[Tensor, float], previous: tuple[Tensor, float]) -> SamplerRow:
    """The row that adds to the latent what two evaluations say, each with the weights of its (noise, delta) predictions."""
    (noise, delta), (old_noise, old_delta) = now, previous
    return SamplerRow(1, noise, delta, previous_noise_prediction=old_noise, previous_delta=old_delta)


def _linear_weights(curves: Tensor, i: int, j: int, other: int) -> tuple[tuple[Tensor, float], tuple[Tensor, float]]:
    """Weights of the (noise, delta) predictions at i and at `other` for the move i -> j, both linear in t through the two.

    The integral of sigma'(t) eps(t) and the sum of one-step deltas are exact for such eps and delta on the training grid.

    Args:
        curves: sigma, (N + 1,) or (C, N + 1).

    Returns:
        Two pairs; the weights of the noise () or (C,), those of delta numbers.
    """
    low, high = min(i, j), max(i, j)
    middles = torch.arange(low, high, dtype=torch.float64) + 0.5 - i
    moment = (middles * curves[..., low : high + 1].diff()).sum(-1) * (1 if j > i else -1)
    stride = i - j
    noise_other = moment / (other - i)
    delta_other = -stride * (stride - 1) / 2 / (other - i)
    return (curves[..., j] - curves[..., i] - noise_other, stride - delta_other), (noise_other, delta_other)
