"""The two-headed denoiser of MultiBeta section 4.2, and what its outputs mean."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from multibeta import ops
from multibeta.basis import cosine_matrix, transformed
from multibeta.checks import check_counts
from multibeta.networks import UNetShape
from multibeta.nonlinear_diffusion.multistep import MULTISTEP, Motion, multistep_rows
from multibeta.nonlinear_diffusion.samplers import SAMPLERS, grid_indices, sampler_rows
from multibeta.nonlinear_diffusion.spans import Spans, span_targets
from multibeta.schedules import BetaGrid, SamplerRows, spatial
from multibeta.spans import Spanned, SpanTargets
from multibeta.variational import sample

PARAMETERIZATIONS = ("v", "residual", "literal")
PROCESS_SAMPLERS = (*SAMPLERS, MULTISTEP)
SPACINGS = ("uniform", "turn")
LEAST_RESIDUAL = 1e-2  # of a velocity
LEAST_TURN = 0.1  # of the mean, where a weight is divided by it
UNIFORM_SHARE = 0.2  # of the steps of a sampler that are spaced by turns


@dataclass(frozen=True)
class DiffusionConfig(BetaGrid, UNetShape):
    """Shape of a `NonlinearDiffusion`: of its network, its latents, its grid over beta.

    Attributes:
        parameterization: "v" predicts v and the normalised velocity of the encoding; "residual" v and what of the velocity is
            not a shrinking of the encoding itself, which v tells already; "literal" the noise and the raw difference of
            MultiBeta Eq. 19.
        basis: In which m, F and the rest are kept: "pixel" for each channel, "cosine" for each coefficient of the discrete cosine
            transform of each channel. An encoder blurs its latents before it forgets them, so that details lose their signal
            earlier than outlines; coefficients each have a signal of their own.
        spacing: Where a sampler of fewer steps than the grid stands: at equal steps of the grid ("uniform"), or at even turns
            from signal to noise ("turn"), see `NonlinearDiffusion.step_shares`.
        latent_channels: Of a latent.
        sigma_per_channel: Whether the process has a sigma_t for each latent channel, or one for all.
        latent_resolution: Height and width of a latent.

    Raises:
        ValueError: A number out of its range, with the name of its field.
    """

    parameterization: Literal["v", "residual", "literal"] = "v"
    basis: Literal["pixel", "cosine"] = "pixel"
    spacing: Literal["uniform", "turn"] = "uniform"
    latent_channels: int = 4
    sigma_per_channel: bool = False
    latent_resolution: int = 32

    def __post_init__(self) -> None:
        UNetShape.__post_init__(self)
        BetaGrid.__post_init__(self)
        check_counts(self, "latent_channels")  # whether the side of a latent fits its images says who fits them


class NonlinearDiffusion(nn.Module):
    """The two-headed denoiser: eps_hat ~ E[eps | z_t] and delta_hat ~ E[f(x, t - tau) - f(x, t) | z_t] (MultiBeta Eq. 17-19).

    The network sees (z - m) / sqrt(F^2 + sigma^2) and predicts, in units of one,

        v        = (F eps - (sigma / F) (f - m)) / sqrt(F^2 + sigma^2)
        velocity = (f(x, t - tau) - f(x, t)) / (tau rms)

    with m, F the mean and deviation of f(x, t) over images and rms the size of its velocity, all per grid index and
    channel, stored with the weights. `predict` turns both heads back into eps_hat and delta_hat. With `basis="cosine"` all this
    holds for each cosine coefficient of z, f and eps, which is white noise as well; the network itself sees and returns pixels.

    Most of the way f(x, t) only shrinks, and its velocity says again what v says. `parameterization="residual"` parts it,

        f(x, t - tau) - f(x, t) = (m_{t - tau} - m_t) + kappa (f(x, t) - m_t) + residual,

    kappa being the regression of the difference on f(x, t), per grid index and channel: E[f(x, t) | z_t] comes from the first
    head, and the second predicts the residual in units of one. A process that only shrinks is then plain linear diffusion.

    Paper note: trained as MultiBeta Eq. 19 prints it, delta is a thousand times smaller than the noise and its head stays
    worse than predicting zero; `parameterization="literal"` keeps that form, and `bench/literal_paper.py` compares.

    Args:
        config: Of the network and of the process.
        unet: A network in the place of the one that `config` describes, such as `UNet2DModel` of diffusers: called with latents
            (N, C, H, W) and times (N,) on the scale of 0 ... 1000, it returns both heads, (N, 2 C, H, W), as a tensor or as the
            `sample` of what it returns.
    """

    sigmas: Tensor
    latent_mean: Tensor
    latent_deviation: Tensor
    velocity_rms: Tensor

    def __init__(self, config: DiffusionConfig, unet: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels, 2 * config.latent_channels
        made_for = getattr(unet, "config", None)
        given = getattr(made_for, "in_channels", channels[0]), getattr(made_for, "out_channels", channels[1])
        if given != channels:
            raise ValueError("the network must read {} and return {} channels, got {} and {}".format(*channels, *given))
        check_counts(config, "latent_resolution")
        self.unet = config.build_unet(*channels, config.latent_resolution) if unet is None else unet
        side = config.latent_resolution
        table = (config.num_steps + 1, config.latent_channels * (side**2 if config.basis == "cosine" else 1))
        sigmas = torch.linspace(0, 1, config.num_steps + 1)
        self.register_buffer("sigmas", sigmas[:, None].repeat(1, channels[0]) if config.sigma_per_channel else sigmas)
        self.register_buffer("latent_mean", torch.zeros(table))
        self.register_buffer("latent_deviation", torch.ones(table))
        self.register_buffer("velocity_rms", torch.ones(table))
        self._spans: tuple[Tensor, Spans] | None = None  # and the tables that they are of

    def set_process(self, sigmas: Tensor, latent_mean: Tensor, latent_deviation: Tensor, velocity_rms: Tensor) -> None:
        """Store sigma_t and the statistics m, F, rms of `process_statistics`.

        Args:
            sigmas: (num_steps + 1,), or with `sigma_per_channel` (num_steps + 1, channels).
            latent_mean, latent_deviation, velocity_rms: (num_steps + 1, channels), of the "cosine" basis (num_steps + 1, channels
                * resolution^2).
        """
        tables = {"latent_mean": latent_mean, "latent_deviation": latent_deviation, "velocity_rms": velocity_rms}
        named = {"sigmas": sigmas} | tables
        for name, table in named.items():
            wanted = tuple(getattr(self, name).shape)
            if tuple(table.shape) != wanted:
                kind = f"sigma_per_channel={self.config.sigma_per_channel}"
                raise ValueError(f"with {kind} {name} must be {wanted}, got {tuple(table.shape)}")
            if not table.isfinite().all():
                raise ValueError(f"{name} must be finite")
        for name, table in named.items():
            getattr(self, name).copy_(table)

    @property
    def last_step(self) -> int:
        """The last grid index that heads are trained at: f(x, 1) = 0 is not a shrunken encoding, but the limit of such."""
        return self.config.num_steps - (self.config.parameterization == "residual" and self.config.num_steps > 1)

    @functools.cached_property
    def cosines(self) -> Tensor | None:
        """The matrix of the cosine transform, (H, H) float32; None in the "pixel" basis."""
        return cosine_matrix(self.config.latent_resolution) if self.config.basis == "cosine" else None

    def coefficients(self, latents: Tensor) -> Tensor:
        """Latents (N, C, H, W) in the basis of the model, (N, C, H, W)."""
        return latents if self.cosines is None else transformed(latents, self.cosines.to(latents))

    def as_measured(self, encodings: Tensor) -> Tensor:
        """Encodings (..., C, H, W) as `process_statistics` takes them for this model: each coefficient a channel of one pixel."""
        return encodings if self.cosines is None else self.coefficients(encodings.float()).flatten(-3)[..., None, None]

    def pixels(self, coefficients: Tensor) -> Tensor:
        """The inverse of `coefficients`."""
        return coefficients if self.cosines is None else transformed(coefficients, self.cosines.T.to(coefficients))

    def shaped(self, rows: Tensor) -> Tensor:
        """Rows (N, ...) of a table, shaped to broadcast with coefficients (N, C, H, W)."""
        if rows.dim() == 2 and rows.shape[1] != self.config.latent_channels:
            return rows.unflatten(1, (self.config.latent_channels, *2 * (self.config.latent_resolution,)))
        return spatial(rows)

    def _rows(self, table: Tensor, steps: Tensor) -> Tensor:
        return self.shaped(table[steps])

    def tables(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """sigma, m, F, rms at grid indices `steps` (N,), shaped to broadcast with (N, C, H, W)."""
        below = steps.clamp(max=self.last_step)
        mean, deviation, rms = (self._rows(t, below) for t in (self.latent_mean, self.latent_deviation, self.velocity_rms))
        return spatial(self.sigmas[steps]), mean, deviation, rms

    def delta_tables(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Drift of the mean, kappa and the size of the rest of f(x, t - tau) - f(x, t), at grid indices `steps` (N,) > 0.

        Shaped to broadcast with (N, C, H, W). But for "residual" drift and kappa are zero, and the rest is all.
        """
        steps = steps.clamp(1, self.last_step)
        size = self._rows(self.velocity_rms, steps) / self.config.num_steps
        if self.config.parameterization != "residual":
            return torch.zeros_like(size), torch.zeros_like(size), size
        mean, before = (self._rows(self.latent_mean, at) for at in (steps, steps - 1))
        variance, variance_before = (self._rows(self.latent_deviation, at).square() for at in (steps, steps - 1))
        drift = before - mean
        moved = size.square() - drift.square()  # of the difference, its variance
        kappa = (variance_before - variance - moved) / (2 * variance)  # its covariance with f, over that of f
        rest = (moved - kappa.square() * variance).clamp(min=0).sqrt()
        return drift, kappa, rest.clamp(min=LEAST_RESIDUAL / self.config.num_steps)

    def turns(self) -> Tensor:
        """How far each grid step turns signal into noise: the rise of arctan(sigma_t / F_t), in radians, (num_steps, K) float32.

        K is that of the tables, channels or coefficients; the first turn is from index 0 to 1. Even turns are those of the cosine
        schedule of a linear process.
        """
        angles = self._angles(torch.arange(len(self.sigmas), device=self.sigmas.device))
        return angles.flatten(1).diff(dim=0).clamp(min=0)

    def step_shares(self, uniform: float = UNIFORM_SHARE) -> Tensor:
        """The share of each grid step in the way from signal to noise, (num_steps,) float64 of sum 1, on the CPU.

        A share of `uniform` is the grid step itself, the rest the mean of its `turns`.
        """
        turned = self.turns().mean(1).double().cpu()
        return uniform / len(turned) + (1 - uniform) * turned / turned.sum()

    def turn_weights(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """How errors of the outputs of `heads` of a "residual" count in the deterministic move, at grid indices `steps` (N,) > 0.

        The move over one grid step is (sigma_{t - tau} - sigma_t) eps_hat + delta_hat. In units of sqrt(F^2 + sigma^2), and of
        the turn of its own coefficient, it errs by -error of v + b * error of the other head, where that of a linear process
        has b = 0.

        Returns:
            The turn relative to the mean over all coefficients, and b; shaped to broadcast with (N, C, H, W).
        """
        sigma, _, deviation, _ = self.tables(steps)
        turned = (self._angles(steps) - self._angles(steps - 1)).clamp(min=0)
        ends = self._angles(torch.tensor([0, self.config.num_steps], device=steps.device))
        least = (ends[1] - ends[0]).mean() / self.config.num_steps * LEAST_TURN
        mean = turned.mean((1, 2, 3), keepdim=True).clamp(min=least)
        turned = turned + LEAST_TURN * mean
        size = self.delta_tables(steps)[2]
        return turned / ((1 + LEAST_TURN) * mean), size / ((deviation**2 + sigma**2).sqrt() * turned)

    def _angles(self, steps: Tensor) -> Tensor:
        """arctan(sigma / F) at grid indices `steps` (N,), shaped to broadcast with (N, C, H, W)."""
        sigma, _, deviation, _ = self.tables(steps)
        return torch.atan2(sigma.expand_as(deviation), deviation)

    def _check_channels(self, latents: Tensor) -> None:
        channels = self.config.latent_channels
        if latents.dim() != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents must have shape (N, {channels}, H, W), got {tuple(latents.shape)}")

    def heads(self, latents: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Both outputs of the network as it is trained, in the basis: latents (N, C, H, W), steps (N,), to (N, C, H, W) each."""
        self._check_channels(latents)
        if self.config.parameterization != "literal":
            sigma, mean, deviation, _ = self.tables(steps)
            latents = self.pixels((self.coefficients(latents) - mean) / (deviation**2 + sigma**2).sqrt())
        output = self.unet(latents.to(next(self.unet.parameters()).dtype), steps * (1000 / self.config.num_steps))
        first, second = getattr(output, "sample", output).float().chunk(2, dim=1)
        return self.coefficients(first), self.coefficients(second)

    def targets(self, encoding: Tensor, previous_encoding: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """What `heads` should return for z_t = f(x, t) + sigma_t eps (MultiBeta Eq. 19, normalised unless "literal").

        Args:
            encoding, previous_encoding: f(x, t) and f(x, t - tau), float32, (N, C, H, W).
            noise: eps, (N, C, H, W).
            steps: Grid index of t, (N,).
        """
        encoding, previous_encoding, noise = map(self.coefficients, (encoding, previous_encoding, noise))
        difference = previous_encoding - encoding
        if self.config.parameterization == "literal":
            return noise, difference
        sigma, mean, deviation, _ = self.tables(steps)
        total = (deviation**2 + sigma**2).sqrt()
        v = (deviation * noise - (sigma / deviation) * (encoding - mean)) / total
        drift, kappa, size = self.delta_tables(steps)
        return v, (difference - drift - kappa * (encoding - mean)) / size

    def predict(self, latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(noise_prediction, delta) at grid index `step`: delta is the difference of f over one grid step."""
        steps = torch.full((len(latents),), step, device=latents.device)
        first, second = self.heads(latents, steps)
        if self.config.parameterization == "literal":
            return self.pixels(first), self.pixels(second)
        sigma, mean, deviation, _ = self.tables(steps)
        variance, latents = deviation**2 + sigma**2, self.coefficients(latents)
        noise_prediction = (deviation * variance.sqrt() * first + sigma * (latents - mean)) / variance
        drift, kappa, size = self.delta_tables(steps)
        delta = size * second + drift + kappa * (latents - sigma * noise_prediction - mean)
        return self.pixels(noise_prediction), self.pixels(delta)

    def predict_data(self, latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(E[f(x, t) | z_t], the second of `heads`) at grid index `step`: what rows `of_data` weigh, `multistep_rows`."""
        steps = torch.full((len(latents),), step, device=latents.device)
        first, second = self.heads(latents, steps)
        sigma, mean, deviation, _ = self.tables(steps)
        variance, centred = deviation**2 + sigma**2, self.coefficients(latents) - mean
        data = mean + deviation * (deviation * centred - sigma * variance.sqrt() * first) / variance
        return self.pixels(data), self.pixels(second)

    def head_rows(self, steps: Tensor, *, of_data: bool = False) -> Tensor:
        """What stands between the network and the sampler at grid indices `steps` (S,): packed `ops.TwoHeadRow`s, (S, K, 9).

        `heads` and `predict`, or `predict_data`, as the affine maps they are, for `ops.sampler_step`: of the K channels, or of
        the K coefficients of the basis.
        """
        shape = len(steps), self.latent_mean.shape[1]
        if self.config.parameterization == "literal":
            heads = {"noise_from_output": 1, "noise_from_latent": 0, "noise_offset": 0, "delta_from_second": 1}
            return ops.pack(ops.TwoHeadRow(**heads, input_from_latent=1, input_offset=0), shape)
        steps = steps.to(self.sigmas.device)
        sigma, mean, deviation, _ = (table.double().cpu() for table in self.tables(steps))
        drift, kappa, size = (table.double().cpu() for table in self.delta_tables(steps))
        total = (deviation**2 + sigma**2).sqrt()
        noise_from_latent = sigma / total**2
        reads = {"input_from_latent": 1 / total, "input_offset": -mean / total}
        if of_data:
            data = -sigma * deviation / total, (deviation / total) ** 2, sigma * noise_from_latent * mean
            return ops.pack(ops.TwoHeadRow(*data, delta_from_second=1, **reads), mean.shape).flatten(1, 3)
        row = ops.TwoHeadRow(
            noise_from_output=deviation / total,
            noise_from_latent=noise_from_latent,
            noise_offset=-noise_from_latent * mean,
            delta_from_second=size,
            delta_from_noise=-kappa * sigma,
            delta_from_latent=kappa,
            delta_offset=drift - kappa * mean,
            **reads,
        )
        return ops.pack(row, mean.shape).flatten(1, 3)

    def check_spans(self) -> None:
        """`ValueError` unless a flow map can be learned of this process."""
        if self.config.parameterization == "literal":
            raise ValueError('a flow map needs heads in units of one, which parameterization "literal" has not')

    def spans(self) -> Spans:
        """What the heads of a flow map of this process mean over spans.

        Raises:
            ValueError: Of a "literal" parameterization, whose heads are not in units of one.
        """
        self.check_spans()
        buffers = self.sigmas, self.latent_mean, self.latent_deviation, self.velocity_rms
        tables = torch.cat([buffer.flatten() for buffer in buffers]).cpu()  # wherever the model has gone since
        if self._spans is None or not torch.equal(self._spans[0], tables):
            self._spans = tables, Spans(*self._grid_tables())
        return self._spans[1]

    def span_times(self, starts: Tensor, ends: Tensor) -> Tensor:
        """What the network of a flow map takes as time over spans between grid indices (n,): time and span, (n, 2) float32."""
        return torch.stack([starts, starts - ends], dim=1).float() * (1000 / self.config.num_steps)

    def span_targets(self, spanned: Spanned) -> SpanTargets:
        """What a flow map learns over spans of trajectories: see `spans.span_targets`. This process knows no condition."""
        return span_targets(self, spanned)

    def predict_span(
        self, network: Callable[[Tensor, Tensor], Tensor], latents: Tensor, step: int, end: int
    ) -> tuple[Tensor, Tensor]:
        """(noise_prediction, delta) of a flow map over the span from grid index `step` to `end`, delta a mean grid step of it.

        Args:
            network: (network input, `span_times`) to both heads, (N, 2 C, H, W): a `FlowMap`.
            latents: (N, C, H, W), at `step`.
        """
        self._check_channels(latents)
        starts, ends = (torch.full((len(latents),), index) for index in (step, end))
        table = self.spans().rows(starts[:1], ends[:1]).to(latents.device, torch.float32)
        row, latents = ops.TwoHeadRow(*(self.shaped(column) for column in table.unbind(-1))), self.coefficients(latents)
        output = network(self.pixels(row.input_from_latent * latents + row.input_offset), self.span_times(starts, ends))
        first, second = (self.coefficients(head) for head in output.float().chunk(2, dim=1))
        noise_prediction, delta = row.predictions(latents, first, second)
        return self.pixels(noise_prediction), self.pixels(delta)

    def _grid_tables(self) -> tuple[Tensor, ...]:
        """`tables` but the rms, and `delta_tables`, at every grid index, (N + 1, K) float64, on the CPU."""
        steps = torch.arange(len(self.sigmas), device=self.sigmas.device)
        sigma, mean, deviation, _ = self.tables(steps)
        every = sigma, mean, deviation, *self.delta_tables(steps)
        return tuple(table.expand_as(mean).flatten(1).double().cpu() for table in every)

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names of the samplers of this process: all but "dpm2m" where its encodings are not normalised."""
        return SAMPLERS if self.config.parameterization == "literal" else PROCESS_SAMPLERS

    @property
    def usual_sampler(self) -> str:
        """The sampler that is best in 20 steps: "dpm2m" where it knows how encodings shrink, of a "residual"; else "ode2"."""
        return MULTISTEP if self.config.parameterization == "residual" else "ode2"

    def sampler_rows(
        self, sampler: str, steps: int, *, start: int | None = None, stop: int = 0, delta_sign: int = 1
    ) -> SamplerRows:
        """The coefficient table of a sampler of this process: see `samplers.sampler_rows`, and of "dpm2m" `multistep_rows`.

        Steps are spaced as the config says, those of "dpm2m" equally.
        """
        if sampler not in self.samplers:
            raise ValueError(f"sampler must be one of {', '.join(self.samplers)}, got {sampler!r}")
        if sampler != MULTISTEP:
            shares = self.step_shares() if self.config.spacing == "turn" else None
            return sampler_rows(self.sigmas, sampler, steps, start=start, stop=stop, delta_sign=delta_sign, shares=shares)
        if delta_sign != 1:
            raise ValueError(f"{MULTISTEP} has no delta to subtract: delta_sign must be 1, got {delta_sign!r}")
        indices = grid_indices(self.config.num_steps, steps, start, stop)
        if indices[0] < indices[-1]:
            raise ValueError(f"{MULTISTEP} only walks down; use ode, ode2 or heun from {start} to {stop}")
        return multistep_rows(*self._motion(), indices)

    def _motion(self) -> tuple[Tensor, Motion, Tensor]:
        """The tables of `multistep_rows`, at every grid index, on the CPU."""
        sigma, mean, deviation, drift, kappa, size = self._grid_tables()
        motion = Motion(1 + kappa, drift - kappa * mean, size)
        for table, still in zip(motion, (1, 0, 0), strict=True):
            table[self.last_step + 1 :] = still  # what is predicted there is f at the last step
        return sigma, motion, torch.atan2(sigma, deviation).mean(1)

    def initial(self, noise: Tensor) -> Tensor:
        """The latent at beta = 1 from standard normal noise, (N, C, H, W), in its dtype.

        Its mean and variance are those of z_1 over images, N(m, F^2 + sigma^2); "literal" starts from N(0, I) as
        MultiBeta Algorithm 2 prints.
        """
        self._check_channels(noise)
        prior = self._prior()
        return self.pixels(sample(prior.mean, prior.stddev, self.coefficients(noise))).to(noise.dtype)

    def log_prior(self, latents: Tensor) -> Tensor:
        """The log density of latents (N, C, H, W) at beta = 1 under what `initial` gives, (N,) float64, in nats."""
        self._check_channels(latents)
        prior = self._prior()
        prior = Normal(prior.mean.double(), prior.stddev.double(), validate_args=False)
        return prior.log_prob(self.coefficients(latents.double())).flatten(1).sum(1)

    def _prior(self) -> Normal:
        """What latents at beta = 1 come from, of each coefficient, shaped to broadcast with (N, C, H, W)."""
        step = torch.full((1,), self.config.num_steps, device=self.sigmas.device)
        sigma, mean, deviation, _ = self.tables(step)
        if self.config.parameterization == "literal":
            return Normal(torch.zeros_like(mean), torch.ones_like(mean), validate_args=False)
        return Normal(mean, (deviation**2 + sigma**2).sqrt(), validate_args=False)
