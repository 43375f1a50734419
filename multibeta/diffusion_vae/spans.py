"""What the head of a flow map means over a span of the chain r_t."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multibeta import ops
from multibeta.schedules import SamplerRows
from multibeta.spans import Spanned, SpanTargets

if TYPE_CHECKING:
    from multibeta.diffusion_vae.refiner import ConditionalDiffusion

BLEND = 0.2  # how far an error of the noise may move r_s, in units of tot_s, until the head is v


class ConditionalSpans:
    """The head of a flow map of r_t = signal_t r_0 + deviation_t eps over spans (t -> s), s <= t.

    Seen along its turn from noise to signal, phi = arctan(deviation / (signal F)) with F the deviation of r_0, the walk of the
    deterministic sampler is

        r_s / tot_s = r_t / tot_t + (phi_s - phi_t) v,     tot = sqrt(signal^2 F^2 + deviation^2),

    v its mean velocity, for Gaussian r_0 zero. In the form of "ddim" that is a noise prediction e = a v + b r_t in

        r_s = signal_s (r_t - deviation_t e) / signal_t + deviation_s e.

    The teacher predicts noise, so that the head is e where there is no span, and v over all but short ones, where an error of e
    would grow: with w = |deviation_s - signal_s deviation_t / signal_t| / tot_s in units of `BLEND`, at most 1, and V the root
    mean square of the velocity between t and s (1 where t = s), the head is
    (e - w b r_t) / sqrt(a^2 V^2 + (1 - w)^2 b^2 tot_t^2).

    Grid indices are those of the chain and one: 0 is r_0.

    Args:
        diffusion: The teacher.
        deviation: F, of r_0.
        guidance: Of the teacher, see `ConditionalDiffusion.predictor`; the map has it within.
        velocities: Root mean squares of the velocity at indices that stand evenly between 0 and the last; none for 1 everywhere.
    """

    def __init__(
        self,
        diffusion: ConditionalDiffusion,
        deviation: float = 1.0,
        guidance: float = 0.0,
        velocities: Sequence[float] = (),
    ) -> None:
        self.diffusion, self.deviation, self.guidance = diffusion, deviation, guidance
        alpha_bars = F.pad(diffusion.process.alpha_bars.double().cpu(), (1, 0), value=1.0)
        self.signal, self.noise = alpha_bars.sqrt(), (1 - alpha_bars).sqrt()
        self.total = (self.signal**2 * deviation**2 + self.noise**2).sqrt()
        self.turn = torch.atan2(self.noise, self.signal * deviation)
        known = torch.tensor(velocities or (1.0,), dtype=torch.float64).log().view(1, 1, -1)
        squares = F.interpolate(known, len(self.turn), mode="linear", align_corners=True).exp().square().flatten()
        self.energy = F.pad((self.turn.diff() * (squares[1:] + squares[:-1]) / 2).cumsum(0), (1, 0))

    def velocities(self, steps: Tensor, latents: Tensor, knots: int) -> tuple[float, ...]:
        """Root mean squares of the velocity on trajectories, at `knots` indices that stand evenly between 0 and the last.

        Args:
            steps: Falling grid indices, (K + 1,).
            latents: r at each, (K + 1, n, C, H, W).
        """
        moves = (latents.double().cpu().flatten(1) / self.total[steps, None]).diff(dim=0)
        rms = moves.square().mean(1).sqrt() / self.turn[steps].diff().abs()
        middles = (steps[1:] + steps[:-1]) / 2
        at = np.linspace(0, len(self.turn) - 1, knots)
        return tuple(np.exp(np.interp(at, middles.flip(0).numpy(), rms.flip(0).log().numpy())).tolist())

    def factors(self, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """What the head and the latent are multiplied by in e, (n,) float64 each."""
        turned, total = self.turn[ends] - self.turn[starts], self.total[starts]
        kept = self.signal[ends] / self.signal[starts]
        by_noise = self.noise[ends] - kept * self.noise[starts]
        here = self.noise[starts] / total**2, self.signal[starts] * self.deviation / total  # b and a of no span
        still = starts == ends
        divisor = by_noise.masked_fill(still, 1)
        b = torch.where(still, here[0], (self.total[ends] / total - kept) / divisor)
        a = torch.where(still, here[1], self.total[ends] * turned / divisor)
        size = torch.where(still, 1.0, (self.energy[starts] - self.energy[ends]) / turned.masked_fill(still, 1).abs()).sqrt()
        blend = (by_noise.abs() / (BLEND * self.total[ends])).clamp(max=1)
        return ((a * size) ** 2 + ((1 - blend) * b * total) ** 2).sqrt(), blend * b

    def rows(self, starts: Tensor, ends: Tensor) -> Tensor:
        """What stands between the network and the sampler: packed `ops.OneHeadRow`s, (n, C, 10) float64.

        x_0 is clipped to [-1, 1] where a span ends there; on the way what delta stands for is no image.

        Args:
            starts, ends: Grid indices of t and s <= t, (n,).
        """
        from_output, from_latent = self.factors(starts, ends)
        row = ops.OneHeadRow(
            noise_from_output=from_output,
            noise_from_latent=from_latent,
            noise_offset=0,
            delta_from_noise=-self.noise[starts] / self.signal[starts],
            delta_from_latent=1 / self.signal[starts],
            delta_from_condition=self.diffusion.process.offset,
            delta_limit=torch.where(ends == 0, 1.0, math.inf),
            input_from_latent=1,
            input_offset=0,
            input_from_condition=self.diffusion.process.shift,
        )
        return ops.pack(row, (len(starts),))[:, None].expand(-1, self.diffusion.config.image_channels, -1)

    def sampler_rows(self, path: Sequence[tuple[int, int, int]]) -> SamplerRows:
        """The coefficient table of a flow map along spans (from, low, to), see `FlowMap.path`.

        The map goes to `low`, and the chain takes the latent up to `to`: r_s = (signal_s / signal_low) r_low + c xi.
        """
        rows = []
        for _, low, to in path:
            kept = float(self.signal[to] / self.signal[low])
            fresh = float((self.noise[to] ** 2 - (kept * self.noise[low]) ** 2).clamp(min=0).sqrt())
            noise, clean = kept * float(self.noise[low]), kept * float(self.signal[low])
            rows.append(ops.SamplerRow(latent=0, noise_prediction=noise, delta=clean, fresh_noise=fresh))
        starts, ends = [start - 1 for start, _, _ in path], [low - 1 for _, low, _ in path]
        return SamplerRows.of(starts, rows, ends=ends)

    def coefficients(self, latents: Tensor) -> Tensor:
        """The latents themselves: pixels are the basis of this process."""
        return latents

    def span_times(self, starts: Tensor, ends: Tensor) -> Tensor:
        """What the network of a flow map takes as time over spans (n,): index of the chain and span, (n, 2) float32."""
        return torch.stack([starts - 1, starts - ends], dim=1).float()

    def span_targets(self, spanned: Spanned) -> SpanTargets:
        """What a flow map learns over spans of trajectories, of no span the noise that the teacher predicts."""
        starts, ends, latents, condition = spanned.starts, spanned.ends, spanned.latents, spanned.condition
        assert condition is not None, "a sketch, or zeros"
        kept = self.signal[ends] / self.signal[starts]
        by_noise = self.noise[ends] - kept * self.noise[starts]
        columns = kept, by_noise, *self.factors(starts, ends)
        kept, by_noise, from_output, from_latent = (column.float().to(latents.device).view(-1, 1, 1, 1) for column in columns)
        noise_prediction = (spanned.later - kept * latents) / by_noise
        still = starts == ends
        if still.any():
            here, steps = still.to(latents.device), (starts[still] - 1).to(latents.device)
            noise_prediction[here] = self.diffusion.guided(latents[here], steps, condition[here], self.guidance)
        head = (noise_prediction - from_latent * latents) / from_output
        return SpanTargets(self.diffusion.network_input(latents, condition), (head,), (torch.ones_like(from_output),))

    def predictor(
        self, network: Callable[[Tensor, Tensor], Tensor], reconstruction: Tensor
    ) -> Callable[[Tensor, int, int], tuple[Tensor, Tensor]]:
        """What `sampling.sample` calls for rows of `sampler_rows`: (r_t, step, end) to (noise prediction, r_0 prediction).

        Args:
            network: (network input, `span_times`) to its output: a `FlowMap`.
            reconstruction: x_hat in [-1, 1], (N, C, H, W), of the samples.
        """

        def predict(residual: Tensor, step: int, end: int) -> tuple[Tensor, Tensor]:
            starts, ends = (torch.full((len(residual),), index + 1) for index in (step, end))
            output = network(self.diffusion.network_input(residual, reconstruction), self.span_times(starts, ends))
            row = ops.OneHeadRow(*self.rows(starts[:1], ends[:1])[0, 0].tolist())
            noise_prediction = row.noise_from_output * output + row.noise_from_latent * residual
            centre = row.delta_from_condition * reconstruction
            denoised = row.delta_from_noise * noise_prediction + row.delta_from_latent * residual + centre
            limit = float(row.delta_limit)
            return noise_prediction, denoised.clamp(-limit, limit) - centre

        return predict
