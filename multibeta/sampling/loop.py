"""The one reverse loop, over the coefficient rows of any sampler and for any prediction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from multibeta import ops
from multibeta.basis import from_coefficients, to_coefficients
from multibeta.checks import check_floating, is_traced
from multibeta.schedules import SamplerRows
from multibeta.seeds import as_seeds

Callback = Callable[[int, int, Tensor], None]
Predictions = Callable[[Tensor, Tensor], None]


def check_latents(latents: Tensor, shape: tuple[int, ...] | None = None, name: str = "latents") -> None:
    """Raise unless `latents` are finite numbers in floating point, (N, C, H, W), or (N, *shape).

    Raises:
        TypeError: No tensor.
        ValueError: Anything else. Whether numbers are finite is not asked while they are transformed or traced.
    """
    wanted = "(N, C, H, W)" if shape is None else f"(N, *{shape})"
    if not isinstance(latents, Tensor):
        raise TypeError(f"{name} must be a tensor {wanted}, got {type(latents).__name__}")
    check_floating(name, latents)
    if latents.dim() != 4 or (shape is not None and tuple(latents.shape[1:]) != shape):
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(latents.shape)}")
    watched = is_traced() or ops.active_transform() is not None
    if not watched and not latents.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~latents.isfinite()).sum())} numbers that are not")


def check_start(initial: Tensor, seeds: Tensor, basis: Tensor | None = None) -> Tensor:
    """The seeds as int64; ValueError or TypeError unless `initial` are latents, of the size of `basis`, with a seed for each."""
    check_latents(initial)
    if basis is not None and initial.shape[2:] != basis.shape:
        raise ValueError(f"latents must have the size of the basis, {tuple(basis.shape)}, got {tuple(initial.shape[2:])}")
    seeds = as_seeds(seeds)
    if seeds.shape != initial.shape[:1]:
        raise ValueError(f"one seed per sample is needed, got {tuple(seeds.shape)} seeds for {len(initial)} samples")
    return seeds.to(initial.device)


@torch.no_grad()
def sample(
    predict: Callable[..., tuple[Tensor, Tensor]],
    rows: SamplerRows,
    initial: Tensor,
    seeds: Tensor,
    *,
    basis: Tensor | None = None,
    callback: Callback | None = None,
    on_predictions: Predictions | None = None,
) -> Tensor:
    """Take `initial` through the rows of a sampler.

    Args:
        predict: (latent, step) to (noise_prediction, delta), each (n, C, H, W). step is the grid index the latent stands at;
            delta is the difference over one grid step, f(x, t - tau) - f(x, t): the rows carry the stride. Rows `of_data` weigh
            another pair, and rows of a flow map call (latent, step, end of the span).
        rows: See `nonlinear_diffusion.sampler_rows`; (S, 7), or (S, C, 7) with coefficients of each channel's own.
        initial: (n, C, H, W), the latent at the first row's step.
        seeds: (n,), one integer per sample; its noise depends on nothing else.
        basis: An orthonormal matrix (H, H), by which maps are transformed in both directions: the rows are then of the C H W
            coefficients of a latent, and so is its noise.
        callback: Called after each evaluation with (evaluations done, evaluations in total, latent); raise to cancel.
        on_predictions: Called after each evaluation, before `callback`, with the pair that was predicted.

    Returns:
        The latent after the last row, (n, C, H, W), in the dtype of `initial`. On the way, as `predict` and callbacks see it, it
        is float32 at least.

    Raises:
        ValueError: See `check_latents`; rows for other channels, not one seed per sample, predictions of another shape.
    """
    seeds = check_start(initial, seeds, basis)
    latent, previous = initial.to(torch.promote_types(initial.dtype, torch.float32)), None
    coefficients, matrix = rows.of_latent(initial.shape[1], basis), None if basis is None else basis.to(latent)
    if coefficients.dim() == 3:  # kernels take a shared row by value, but read rows per channel where the latent lies
        coefficients = coefficients.to(initial.device)
    ends = [()] * len(rows) if rows.ends is None else [(end,) for end in rows.ends.tolist()]
    for index, step in enumerate(rows.steps.tolist()):
        (noise_prediction, delta), row = predict(latent, step, *ends[index]), coefficients[index]
        if on_predictions is not None:
            on_predictions(noise_prediction, delta)
        if matrix is not None:
            latent, noise_prediction, delta = (
                to_coefficients(maps.to(latent), matrix) for maps in (latent, noise_prediction, delta)
            )
        latent = ops.sampler_update(latent, noise_prediction, delta, row, seeds, step, previous=previous)
        previous = noise_prediction, delta
        if matrix is not None:
            latent = from_coefficients(latent, matrix)
        if callback is not None:
            callback(index + 1, len(rows), latent)
    return latent.to(initial.dtype)
