"""Non-linear diffusion over beta with a noise head and a delta head: MultiBeta section 4.2, Eq. 13-19.

The process is z_t = f(x, t) + sigma_t eps. `encode` and `sigmas` come in as arguments; this module knows no VAE.

sigma_t may be one number or one for each latent channel. Given x the dimensions of z_t are independent, so every equation of the
section holds for each of them with its own sigma_t, unchanged and exact.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multibeta import ops
from multibeta.checks import check_counts, check_integer, check_number, check_steps, is_integer, is_single
from multibeta.draws import rows
from multibeta.encoding_table import between, interval_of, table_nodes
from multibeta.networks import UNetShape
from multibeta.ops import SamplerRow
from multibeta.schedules import BetaGrid, SamplerRows, spatial, step_to_beta, stratified_steps
from multibeta.training import Batch
from multibeta.variational import sample

PARAMETERIZATIONS = ("v", "residual", "literal")
LEAST_RESIDUAL = 1e-2  # of a velocity
SAMPLERS = ("resample", "ancestral", "ode", "ode2", "heun")


@dataclass(frozen=True)
class DiffusionConfig(BetaGrid, UNetShape):
    """Shape of a `NonlinearDiffusion`: of its network, its latents, its grid over beta.

    Attributes:
        parameterization: "v" predicts v and the normalised velocity of the encoding; "residual" v and what of the velocity is
            not a shrinking of the encoding itself, which v tells already; "literal" the noise and the raw difference of
            MultiBeta Eq. 19.
        latent_channels: Of a latent.
        sigma_per_channel: Whether the process has a sigma_t for each latent channel, or one for all.
        latent_resolution: Height and width of a latent.

    Raises:
        ValueError: A number out of its range, with the name of its field.
    """

    parameterization: Literal["v", "residual", "literal"] = "v"
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
    channel, stored with the weights. `predict` turns both heads back into eps_hat and delta_hat.

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
        self.unet = config.build_unet(*channels, config.latent_resolution) if unet is None else unet
        table = (config.num_steps + 1, config.latent_channels)
        sigmas = torch.linspace(0, 1, config.num_steps + 1)
        self.register_buffer("sigmas", sigmas[:, None].repeat(1, table[1]) if config.sigma_per_channel else sigmas)
        self.register_buffer("latent_mean", torch.zeros(table))
        self.register_buffer("latent_deviation", torch.ones(table))
        self.register_buffer("velocity_rms", torch.ones(table))

    def set_process(self, sigmas: Tensor, latent_mean: Tensor, latent_deviation: Tensor, velocity_rms: Tensor) -> None:
        """Store sigma_t and the statistics m, F, rms of `process_statistics`.

        Args:
            sigmas: (num_steps + 1,), or with `sigma_per_channel` (num_steps + 1, channels).
            latent_mean, latent_deviation, velocity_rms: (num_steps + 1, channels).
        """
        tables = {"latent_mean": latent_mean, "latent_deviation": latent_deviation, "velocity_rms": velocity_rms}
        named = {"sigmas": sigmas} | tables
        for name, table in named.items():
            wanted = tuple(getattr(self, name).shape)
            if tuple(table.shape) != wanted:
                raise ValueError(
                    f"with sigma_per_channel={self.config.sigma_per_channel} {name} must be {wanted}, got {tuple(table.shape)}"
                )
            if not table.isfinite().all():
                raise ValueError(f"{name} must be finite")
        for name, table in named.items():
            getattr(self, name).copy_(table)

    @property
    def last_step(self) -> int:
        """The last grid index that heads are trained at: f(x, 1) = 0 is not a shrunken encoding, but the limit of such."""
        return self.config.num_steps - (self.config.parameterization == "residual" and self.config.num_steps > 1)

    def tables(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """sigma, m, F, rms at grid indices `steps` (N,), shaped to broadcast with (N, C, H, W)."""
        below = steps.clamp(max=self.last_step)
        sigma, *others = (self.sigmas, self.latent_mean, self.latent_deviation, self.velocity_rms)
        mean, deviation, rms = (spatial(table)[below] for table in others)
        return spatial(sigma)[steps], mean, deviation, rms

    def delta_tables(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Drift of the mean, kappa and the size of the rest of f(x, t - tau) - f(x, t), at grid indices `steps` (N,) > 0.

        Shaped to broadcast with (N, C, H, W). But for "residual" drift and kappa are zero, and the rest is all.
        """
        steps = steps.clamp(1, self.last_step)
        size = spatial(self.velocity_rms)[steps] / self.config.num_steps
        if self.config.parameterization != "residual":
            return torch.zeros_like(size), torch.zeros_like(size), size
        mean, variance = spatial(self.latent_mean), spatial(self.latent_deviation).square()
        drift = mean[steps - 1] - mean[steps]
        moved = size.square() - drift.square()  # of the difference, its variance
        kappa = (variance[steps - 1] - variance[steps] - moved) / (2 * variance[steps])  # its covariance with f, over that of f
        rest = (moved - kappa.square() * variance[steps]).clamp(min=0).sqrt()
        return drift, kappa, rest.clamp(min=LEAST_RESIDUAL / self.config.num_steps)

    def angle_shares(self) -> Tensor:
        """How much of the turn from signal to noise each grid step makes, (num_steps,), of sum 1; the first is from index 0 to 1.

        The angle is arctan(sigma_t / F_t), of their root mean squares over channels. Equal steps in it are those of the cosine
        schedule of a linear process.
        """
        sigma, deviation = (spatial(table).flatten(1).square().mean(1).sqrt() for table in (self.sigmas, self.latent_deviation))
        turned = torch.atan2(sigma, deviation).double().cpu().diff().clamp(min=0)
        return turned / turned.sum()

    def _check_channels(self, latents: Tensor) -> None:
        channels = self.config.latent_channels
        if latents.dim() != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents must have shape (N, {channels}, H, W), got {tuple(latents.shape)}")

    def heads(self, latents: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """The two outputs of the network as it is trained: latents (N, C, H, W), steps (N,), to two (N, C, H, W)."""
        self._check_channels(latents)
        if self.config.parameterization != "literal":
            sigma, mean, deviation, _ = self.tables(steps)
            latents = (latents - mean) / (deviation**2 + sigma**2).sqrt()
        output = self.unet(latents.to(next(self.unet.parameters()).dtype), steps * (1000 / self.config.num_steps))
        return getattr(output, "sample", output).float().chunk(2, dim=1)

    def targets(self, encoding: Tensor, previous_encoding: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """What `heads` should return for z_t = f(x, t) + sigma_t eps (MultiBeta Eq. 19, normalised unless "literal").

        Args:
            encoding, previous_encoding: f(x, t) and f(x, t - tau), float32, (N, C, H, W).
            noise: eps, (N, C, H, W).
            steps: Grid index of t, (N,).
        """
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
            return first, second
        sigma, mean, deviation, _ = self.tables(steps)
        variance = deviation**2 + sigma**2
        noise_prediction = (deviation * variance.sqrt() * first + sigma * (latents - mean)) / variance
        drift, kappa, size = self.delta_tables(steps)
        return noise_prediction, size * second + drift + kappa * (latents - sigma * noise_prediction - mean)

    def head_rows(self, steps: Tensor) -> Tensor:
        """What stands between the network and the sampler at grid indices `steps` (S,): packed `ops.TwoHeadRow`s, (S, C, 9).

        `heads` and `predict` as the affine maps they are, for `ops.sampler_step`.
        """
        shape = len(steps), self.config.latent_channels
        if self.config.parameterization == "literal":
            heads = {"noise_from_output": 1, "noise_from_latent": 0, "noise_offset": 0, "delta_from_second": 1}
            return ops.pack(ops.TwoHeadRow(**heads, input_from_latent=1, input_offset=0), shape)
        steps = steps.to(self.sigmas.device)
        sigma, mean, deviation, _ = (table.flatten(1).double().cpu() for table in self.tables(steps))
        drift, kappa, size = (table.flatten(1).double().cpu() for table in self.delta_tables(steps))
        total = (deviation**2 + sigma**2).sqrt()
        noise_from_latent = sigma / total**2
        row = ops.TwoHeadRow(
            noise_from_output=deviation / total,
            noise_from_latent=noise_from_latent,
            noise_offset=-noise_from_latent * mean,
            delta_from_second=size,
            delta_from_noise=-kappa * sigma,
            delta_from_latent=kappa,
            delta_offset=drift - kappa * mean,
            input_from_latent=1 / total,
            input_offset=-mean / total,
        )
        return ops.pack(row, shape)

    def initial(self, noise: Tensor) -> Tensor:
        """The latent at beta = 1 from standard normal noise, (N, C, H, W), in its dtype.

        Its mean and variance are those of z_1 over images, N(m, F^2 + sigma^2); "literal" starts from N(0, I) as
        MultiBeta Algorithm 2 prints.
        """
        self._check_channels(noise)
        if self.config.parameterization == "literal":
            return noise
        sigma, mean, deviation, _ = self.tables(torch.full((1,), self.config.num_steps, device=noise.device))
        return sample(mean, (deviation**2 + sigma**2).sqrt(), noise).to(noise.dtype)


@torch.no_grad()
def process_statistics(
    encode: Callable[[Tensor, float], Tensor],
    images: Tensor,
    num_steps: int,
    schedule: str = "linear",
    *,
    nodes: int = 32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation and velocity rms of f(x, t) over images, per grid index and channel.

    Measured at `nodes` + 1 values of t and interpolated linearly between them.

    Args:
        encode: (images, beta) to encodings (N, C, H, W), float32.
        images: A few hundred training images or more.

    Returns:
        Three tensors (num_steps + 1, C): m, F, and the rms of (f(x, t - tau) - f(x, t)) / tau.
    """
    grid = torch.linspace(0, num_steps, min(nodes, num_steps) + 1).round().long().unique()
    rows = []
    for step in grid.tolist():
        late = max(step, 1)
        beta, previous_beta = (float(step_to_beta(s, num_steps, schedule)) for s in (late, late - 1))
        encoding, previous = (encode(images, each).transpose(0, 1).flatten(1) for each in (beta, previous_beta))
        velocity, here = (previous - encoding) * num_steps, encoding if step else previous
        rows.append(torch.stack([here.mean(1), here.std(1, correction=0), velocity.square().mean(1).sqrt()]))
    nodes_table = torch.stack(rows)  # (nodes, 3, C)
    steps = torch.arange(num_steps + 1)
    right = torch.searchsorted(grid, steps).clamp(1, len(grid) - 1)
    weight = (steps - grid[right - 1]) / (grid[right] - grid[right - 1])
    table = torch.lerp(nodes_table[right - 1], nodes_table[right], weight[:, None, None].to(nodes_table))
    return table[:, 0], table[:, 1].clamp(min=1e-4), table[:, 2].clamp(min=1e-4)


@dataclass(frozen=True)
class NonlinearDiffusionObjectiveOptions:
    """What `NonlinearDiffusionObjective` leaves to choose.

    Attributes:
        weight_exponent: 1 / w(t) = sigma_t^weight_exponent on the noise term, of each channel its own; 0 (w = 1) trained best.
        noise_draws: Draws of eps per encoded image: two encodings in float32 cost more than a small U-Net, so each pair
            serves several.
        nodes: f is taken at the ends of so many equal intervals of the grid and is linear between them, see `encoding_table`;
            0 takes f(x, t) and f(x, t - tau) themselves.
        uniform_share: This share of t is drawn uniformly over the grid, the rest uniformly over the angle arctan(sigma_t / F_t),
            in which signal turns into noise at an even rate; 1 draws all of t uniformly, as MultiBeta Eq. 18.

    Raises:
        ValueError: A number out of its range, with the name of its field.
    """

    weight_exponent: float = 0.0
    noise_draws: int = 1
    nodes: int = 0
    uniform_share: float = 1.0

    def __post_init__(self) -> None:
        check_number("weight_exponent", self.weight_exponent, least=-8, most=8)  # sigma^-8 of sigma = e^-10 is a float32
        check_integer("noise_draws", self.noise_draws, 1)
        check_integer("nodes", self.nodes, 0)
        check_number("uniform_share", self.uniform_share, least=0, most=1)


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
        self.nodes = table_nodes(diffusion.config.num_steps, self.options.nodes) if self.options.nodes else None
        if table is not None and (self.nodes is None or table.shape[1] != len(self.nodes)):
            raise ValueError(f"a table of {table.shape[1]} nodes needs nodes={table.shape[1] - 1}, got {self.options.nodes}")

    @functools.cached_property
    def step_weights(self) -> Tensor | None:
        """Probability of each grid index from 1 on, (last_step,); None where all are alike."""
        share, last = self.options.uniform_share, self.module.last_step
        if share == 1:
            return None
        turned = self.module.angle_shares()[:last]
        return share / last + (1 - share) * turned / turned.sum()

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
        noise_error, delta_error = (first - first_target).square(), (second - second_target).square()
        loss = (sigma**self.options.weight_exponent * noise_error + delta_error).mean()
        return loss, {"noise_error": noise_error.mean(), "delta_error": delta_error.mean()}


def sampler_rows(
    sigmas: Tensor,
    sampler: str,
    steps: int,
    *,
    start: int | None = None,
    stop: int = 0,
    delta_sign: int = 1,
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

    Returns:
        The rows for `sampling.sample`, with one delta per grid step scaled to the stride: coefficients (S, 6), or (S, C, 6)
        whose channel j holds the rows of sigmas[:, j].

    Raises:
        ValueError: An unknown sampler, a number of steps the grid does not have, a range outside the grid, another sign, sigmas
            of another shape, not finite, or that fall.

    Paper note: Algorithm 2 draws all noise anew around the conditional mean of f and so loses the posterior variance at
    every step: with exact predictions a mode of deviation 0.12 comes out at 0.12 / sqrt(2). It also prints the sign of
    delta against Eq. 17. "resample" keeps it for comparison; `test_sampling.py` states both facts.
    """
    if sigmas.dim() not in (1, 2):
        raise ValueError(f"sigmas must be (N + 1,) or (N + 1, C), got {tuple(sigmas.shape)}")
    curves = sigmas.detach().double().cpu().movedim(0, -1).contiguous()  # (N + 1,) or (C, N + 1)
    last = len(sigmas) - 1
    start = last if start is None else start
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if not all(is_integer(index) and 0 <= index <= last for index in (start, stop)):
        raise ValueError(f"start and stop must lie on the grid 0 ... {last}, got {start} and {stop}")
    if not is_single(delta_sign) or delta_sign not in (1, -1):
        raise ValueError(f"delta_sign must be 1 or -1, got {delta_sign!r}")
    if not curves.isfinite().all() or (curves.diff() < -1e-6 * curves.abs().max()).any():  # but for rounding
        raise ValueError("sigmas must be finite and not fall from beta = 0 to 1")
    if start == stop:
        return SamplerRows.of([], [], curves.shape[:-1])
    check_steps(steps, abs(start - stop), f" (grid steps from {start} to {stop})")
    if start < stop and sampler in ("resample", "ancestral"):
        raise ValueError(f"sampler {sampler!r} only walks down; use ode, ode2 or heun from {start} to {stop}")

    indices = torch.linspace(start, stop, steps + 1).round().long().tolist()
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
