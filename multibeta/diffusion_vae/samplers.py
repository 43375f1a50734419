"""The coefficient tables of the samplers of the second stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from multibeta.checks import check_number, check_steps, is_integer
from multibeta.ops import SamplerRow
from multibeta.schedules import SamplerRows, posterior_weights

SAMPLERS = ("ddpm", "ddim")
SPACINGS = ("uniform", "quad")
VARIANCES = ("fixedsmall", "fixedlarge")


def spaced_indices(num_steps: int, steps: int, spacing: str = "uniform") -> list[int]:
    """The indices out of 0 ... num_steps - 1 a sampler visits, largest first, as published.

    Args:
        spacing: "uniform" has one stride: the first index is a multiple of it (990 for 100 of 1000 steps), and not every
            number of steps has one. "quad" is int(linspace(0, sqrt(0.8 num_steps), steps)^2), dense at the end, from 0.8
            num_steps; indices that coincide count once, so 100 steps of 1000 visit 96. The trajectory starts from the prior at
            either first index.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    check_steps(steps, num_steps)
    if spacing == "quad":
        points = np.linspace(0, np.sqrt(0.8 * num_steps), steps) ** 2
        return sorted({int(point) for point in points}, reverse=True)
    stride = math.ceil(num_steps / steps)
    indices = range(0, num_steps, stride)
    if len(indices) != steps:
        raise ValueError(
            f"no stride takes {steps} uniform steps out of {num_steps}: a stride of {stride} takes {len(indices)}, "
            f"of {stride - 1} {len(range(0, num_steps, stride - 1))}"
        )
    return list(reversed(indices))


def sampler_rows(
    alpha_bars: Tensor,
    sampler: str,
    steps: int,
    *,
    spacing: str = "uniform",
    variance: str = "fixedsmall",
    eta: float = 0.0,
    start: int | None = None,
) -> SamplerRows:
    """The coefficient table of a sampler of r_t = sqrt(alpha_bar_t) r_0 + sqrt(1 - alpha_bar_t) eps, for every form.

    The latent is r_t; the prediction of r_0 comes from `ConditionalDiffusion.predictor` in the place of delta. The last row adds
    no noise.

    Args:
        alpha_bars: (T,), of a `ForwardProcess`.
        sampler: "ddpm" is the posterior of Ho et al. 2020, "ddim" the sampler of Song et al. 2021.
        steps: As many as the chain has take it whole; fewer take a spaced chain, of variances 1 - alpha_bar_t / alpha_bar_s.
        spacing: See `spaced_indices`.
        variance: Of "ddpm": that of the posterior ("fixedsmall", published for CelebAMask-HQ) or that of the step ("fixedlarge").
        eta: Of "ddim", in [0, 1]: 0 is deterministic; 1 is "ddpm" with "fixedsmall" where nothing is clipped.
        start: Last index of the chain, T - 1 by default. A smaller one truncates it: the initial latent is then r at the first
            index of the rows, such as `process.diffuse` of what is to be refined.

    Raises:
        ValueError: An unknown sampler, spacing or variance; eta, steps or start out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    check_number("eta", eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    last = len(alpha_bars) - 1
    start = last if start is None else start
    if not (is_integer(start) and 0 <= start <= last):
        raise ValueError(f"start must lie between 0 and {last}, got {start}")

    return walk_rows(alpha_bars, sampler, spaced_indices(start + 1, steps, spacing), variance=variance, eta=eta)


def walk_rows(
    alpha_bars: Tensor, sampler: str, indices: Sequence[int], *, variance: str = "fixedsmall", eta: float = 0.0
) -> SamplerRows:
    """The coefficient table of a sampler at these falling indices of the chain, and then at r_0: see `sampler_rows`."""
    rows = []
    for alpha_bar, next_alpha_bar in itertools.pairwise([*alpha_bars[list(indices)].tolist(), 1.0]):
        on_clean, on_noisy, posterior_variance = posterior_weights(alpha_bar, next_alpha_bar)
        if sampler == "ddim":
            fresh = eta**2 * posterior_variance
            noise, clean = math.sqrt(1 - next_alpha_bar - fresh), math.sqrt(next_alpha_bar)
            rows.append(SamplerRow(latent=0, noise_prediction=noise, delta=clean, fresh_noise=math.sqrt(fresh)))
        else:
            large = variance == "fixedlarge" and next_alpha_bar < 1
            fresh = 1 - alpha_bar / next_alpha_bar if large else posterior_variance
            rows.append(SamplerRow(latent=on_noisy, noise_prediction=0, delta=on_clean, fresh_noise=math.sqrt(fresh)))
    return SamplerRows.of(indices, rows)
