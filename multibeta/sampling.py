"""The one reverse loop, over the coefficient rows of any sampler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from multibeta import ops
from multibeta.schedules import SamplerRows


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    rows: SamplerRows,
    initial: Tensor,
    seeds: Tensor,
    *,
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Walk `initial` along the rows of a sampler.

    Args:
        predict: (latent, step) to (noise_prediction, delta), each (n, C, H, W). step is the grid index the latent stands at;
            delta is the difference over one grid step, f(x, t - tau) - f(x, t): the rows carry the stride.
        rows: See `nonlinear_diffusion.sampler_rows`.
        initial: (n, C, H, W), the latent at the first row's step.
        seeds: (n,) int64, one seed per sample; its noise depends on nothing else.
        callback: Called after each evaluation with (evaluations done, evaluations in total, latent); raise to cancel.

    Returns:
        The latent after the last row, (n, C, H, W), in the dtype of `initial`.
    """
    if len(seeds) != len(initial):
        raise ValueError(f"one seed per sample is needed, got {len(seeds)} seeds for {len(initial)} samples")
    latent, previous = initial, None
    for index, step in enumerate(rows.steps.tolist()):
        noise_prediction, delta = predict(latent, step)
        row = rows.coefficients[index]
        latent = ops.sampler_update(latent, noise_prediction, delta, row, seeds, step, previous=previous)
        previous = noise_prediction, delta
        if callback is not None:
            callback(index + 1, len(rows), latent)
    return latent
