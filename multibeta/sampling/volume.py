"""What a walk does to volume: the log-determinant of the flow that the rows of a deterministic sampler follow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from multibeta import ops
from multibeta.basis import transformed
from multibeta.checks import check_integer
from multibeta.ops import SamplerRow
from multibeta.sampling.loop import check_start, sample
from multibeta.schedules import SamplerRows, spatial

PROBE_STREAM = 4


def sample_with_volume(
    predict: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    rows: SamplerRows,
    initial: Tensor,
    seeds: Tensor,
    *,
    num_probes: int | None = 1,
    basis: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take `initial` through the rows of a deterministic sampler, and say how much the flow around it has grown.

    Along dz/dt = v(z, t) a density changes by d log p / dt = -tr dv/dz (Chen et al. 2018, Eq. 8), so that p(z_0) is
    p(z_1) exp(log_volume) for a walk from z_0 to z_1. The trace is integrated as z is, by the same weights of the same
    evaluations: the order in the steps is that of the sampler. It is estimated by E[u . J u] over u of +1 and -1 (Hutchinson's
    trace, in Grathwohl et al. 2019), drawn anew at every evaluation.

    Args:
        predict: As of `sample`, where derivatives flow from what it returns to the latent: not an engine.
        rows: Of "ode", "ode2" or "heun", in any direction: see `nonlinear_diffusion.sampler_rows`.
        initial, basis: As of `sample`.
        seeds: (n,), one integer per sample, to which its u belong.
        num_probes: How many u each evaluation takes, a backward pass each; None for the trace itself, in as many backward passes
            as a sample has numbers.

    Returns:
        The latent after the last row, as of `sample`, and log_volume, (n,) float64, in nats: log |det d latent / d initial| of
        the flow, as near as the steps are fine. Its mean over u is that of the trace itself.

    Raises:
        ValueError: As of `sample`; rows of another sampler, no positive number of probes.
    """
    if num_probes is not None:
        check_integer("num_probes", num_probes, 1)
    seeds = check_start(initial, seeds, basis)
    columns = dict(zip(SamplerRow._fields, rows.of_latent(initial.shape[1], basis).unbind(-1), strict=True))
    if rows.of_data or rows.ends is not None or (columns["latent"] != 1).any() or columns["fresh_noise"].any():
        raise ValueError("how a volume grows is known of samplers that follow an ODE: ode, ode2 and heun")
    shape, dtype = initial.shape[1:], torch.promote_types(initial.dtype, torch.float32)
    on_noise, on_delta = (_weights(columns, of, shape).to(initial.device, dtype) for of in ("noise_prediction", "delta"))
    evaluations, traces = itertools.count(), []

    def pixels(coefficients: Tensor) -> Tensor:
        return coefficients if basis is None else transformed(coefficients, basis.T.to(coefficients))

    def traced(latent: Tensor, step: int) -> tuple[Tensor, Tensor]:
        index = next(evaluations)
        with torch.inference_mode(False), torch.enable_grad():
            latent = latent.detach().clone().requires_grad_()
            noise_prediction, delta = predict(latent, step)
            for probe in _probes(seeds, index, shape, num_probes).to(latent):
                moved = noise_prediction * pixels(on_noise[index] * probe) + delta * pixels(on_delta[index] * probe)
                (product,) = torch.autograd.grad(moved.sum(), latent, retain_graph=True)
                traces.append((product * pixels(probe)).double().flatten(1).sum(1))
        return noise_prediction.detach(), delta.detach()

    latent = sample(traced, rows, initial, seeds, basis=basis)
    log_volume = sum(traces, torch.zeros(len(initial), dtype=torch.float64, device=initial.device))
    return latent, log_volume / (num_probes or 1)


def _weights(columns: Mapping[str, Tensor], of: str, shape: tuple[int, ...]) -> Tensor:
    """How much of a prediction of each evaluation a walk adds, by its own row and the next, to broadcast with (S, *shape)."""
    now, previous = columns[of], columns[f"previous_{of}"]
    total = now + torch.cat([previous[1:], torch.zeros_like(previous[:1])])
    return total.unflatten(1, shape) if total.dim() == 2 and total.shape[1] != shape[0] else spatial(total)


def _probes(seeds: Tensor, index: int, shape: tuple[int, ...], count: int | None) -> Tensor:
    """The u of one evaluation, (count, n, *shape), which belong to the seeds; of None every unit vector, (K, 1, *shape)."""
    if count is None:
        return torch.eye(math.prod(shape)).view(-1, 1, *shape)
    normal = ops.standard_normal(seeds, index, (count, *shape), stream=PROBE_STREAM)
    return torch.where(normal < 0, -1.0, 1.0).movedim(1, 0)
