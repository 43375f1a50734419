"""What the heads of a flow map mean over a span of the process, from cumulative tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from multibeta import ops
from multibeta.ops import SamplerRow
from multibeta.schedules import SamplerRows
from multibeta.spans import Spanned, SpanTargets

if TYPE_CHECKING:
    from multibeta.nonlinear_diffusion.network import NonlinearDiffusion


class Spans:
    """The heads v and u of a flow map of z_t = f(x, t) + sigma_t eps over spans (t -> s), s <= t.

    The walk of the probability-flow ODE from t to s is a function,

        X(z, t, s) = z + (sigma_s - sigma_t) e(z, t, s) + d(z, t, s),

    e the mean of the noise predictions on the way, weighed by how sigma moves, and d the sum of those of delta. With m, F and
    tot = sqrt(F^2 + sigma^2) of the process, and what `NonlinearDiffusion` parts the move of f into (drift, kappa, size),

        e = a v + b (z - m_t),                   a^2 = mean of (F / tot)^2,          b = mean of (sigma / tot) / tot_t,
        d = drift + g u + h v + k (z - m_t),     g^2 = (t - s) * sum of size^2,      h = -sum of kappa sigma F / tot,
                                                                                     k = sum of (kappa F^2 / tot) / tot_t,

    means over sigma and sums over the grid steps of the span. A Gaussian process that only shrinks has v = u = 0, and X is exact
    but for the error of the grid. At s = t these are the teacher's: a = F / tot, b = sigma / tot^2, and
    `NonlinearDiffusion.predict` over one grid step.

    Args:
        sigma, mean, deviation: sigma, m, F at every grid index, (N + 1, K) float64, of K channels or coefficients.
        drift, kappa, size: Of the move from each grid index to the one below, (N + 1, K) float64; row 0 is not used.
    """

    def __init__(self, sigma: Tensor, mean: Tensor, deviation: Tensor, drift: Tensor, kappa: Tensor, size: Tensor) -> None:
        self.sigma, self.mean, self.deviation = sigma, mean, deviation
        self.total = (deviation**2 + sigma**2).sqrt()
        signal, noise = deviation / self.total, sigma / self.total
        over_sigma = torch.stack([signal**2, noise], dim=-1)
        of_steps = torch.stack([drift, size**2, -kappa * noise * deviation, kappa * signal * deviation], dim=-1)
        self.at = torch.cat([over_sigma, of_steps], dim=-1)  # a^2, b tot_t, drift, g^2, h, k tot_t of no span, (N + 1, K, 6)
        moved = sigma.diff(dim=0)[..., None] * (over_sigma[1:] + over_sigma[:-1]) / 2
        self.sums = F.pad(torch.cat([moved, of_steps[1:]], dim=-1).cumsum(0), (0, 0, 0, 0, 1, 0))  # from index 0 up to each

    def rows(self, starts: Tensor, ends: Tensor) -> Tensor:
        """What stands between the network and the sampler: packed `ops.TwoHeadRow`s, (n, K, 9) float64.

        delta is the mean of d over the grid steps of the span, so that rows of a sampler carry the stride.

        Args:
            starts, ends: Grid indices of t and s <= t, (n,).
        """
        stride, moved = (starts - ends)[:, None], self.sigma[starts] - self.sigma[ends]
        at, sums = self.at[starts], self.sums[starts] - self.sums[ends]
        means = torch.where((moved > 0)[..., None], sums[..., :2] / moved[..., None], at[..., :2])
        squared, noise = means.unbind(-1)
        drift, sizes, h, k = torch.where((stride > 0)[..., None], sums[..., 2:], at[..., 2:]).unbind(-1)
        mean, total, a, steps = self.mean[starts], self.total[starts], squared.sqrt(), stride.clamp(min=1)
        b = noise / total
        from_latent = k / total - h * b / a
        row = ops.TwoHeadRow(
            noise_from_output=a,
            noise_from_latent=b,
            noise_offset=-b * mean,
            delta_from_second=(sizes / steps).sqrt(),
            delta_from_noise=h / a / steps,
            delta_from_latent=from_latent / steps,
            delta_offset=(drift - from_latent * mean) / steps,
            input_from_latent=1 / total,
            input_offset=-mean / total,
        )
        return ops.pack(row, tuple(mean.shape))

    def sampler_rows(self, path: Sequence[tuple[int, int, int]]) -> SamplerRows:
        """The coefficient table of a flow map along spans (from, low, to), grid indices, low <= to <= from.

        The map goes to `low`, where it leaves f at s = `to`, and fresh noise takes the latent up there:

            z_s = z_t + (sigma_low - sigma_t) e + (t - s) / (t - low) d + c xi,    c^2 = sigma_s^2 - sigma_low^2.

        f lies between those at both ends, as it would exactly for an encoding that moves evenly over the span.

        Args:
            path: Of `FlowMap.path`.

        Returns:
            The rows, (S, K, 7).
        """
        rows = []
        for here, low, to in path:
            fresh = (self.sigma[to] ** 2 - self.sigma[low] ** 2).clamp(min=0).sqrt()
            rows.append(
                SamplerRow(
                    latent=1,
                    noise_prediction=self.sigma[low] - self.sigma[here],
                    delta=here - to,
                    fresh_noise=fresh,
                )
            )
        starts, lows = [here for here, _, _ in path], [low for _, low, _ in path]
        return SamplerRows.of(starts, rows, tuple(self.mean.shape[1:]), ends=lows)


def span_targets(diffusion: NonlinearDiffusion, spanned: Spanned) -> SpanTargets:
    """The targets of v and u over spans of trajectories of `diffusion`, of no span those of the teacher itself."""
    starts, ends, latents = spanned.starts, spanned.ends, spanned.latents
    assert spanned.noise_moved is not None, "of two heads"
    spans, device = diffusion.spans(), latents.device
    table = spans.rows(starts, ends)
    row = ops.TwoHeadRow(*map(diffusion.shaped, table.float().to(device).unbind(-1)))
    moved = diffusion.shaped((spans.sigma[ends] - spans.sigma[starts]).float().to(device))
    stride = (starts - ends).float().to(device).view(-1, 1, 1, 1)
    read = row.input_from_latent * diffusion.coefficients(latents) + row.input_offset
    z, z_later, by_noise = map(diffusion.coefficients, (latents, spanned.later, spanned.noise_moved))
    noise_prediction, delta = by_noise / moved, (z_later - z - by_noise) / stride
    v = (noise_prediction - row.noise_from_latent * z - row.noise_offset) / row.noise_from_output
    of_first = row.delta_from_noise * noise_prediction + row.delta_from_latent * z + row.delta_offset
    u = (delta - of_first) / row.delta_from_second
    still = starts == ends
    if still.any():
        here = still.to(device)
        v[here], u[here] = diffusion.heads(latents[here], starts[still].to(device))
    from_v = (moved + stride * row.delta_from_noise) * row.noise_from_output
    from_u = stride * row.delta_from_second
    length = (from_v**2 + from_u**2).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return SpanTargets(diffusion.pixels(read), (v, u), (from_v / length, from_u / length))
