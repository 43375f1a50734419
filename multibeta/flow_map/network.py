"""The network of a flow map, and the walks that it takes in place of a sampler's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from multibeta.checks import check_counts, check_number, is_integer
from multibeta.networks import UNet, UNetShape

MAP_SAMPLERS = ("map", "map_noise")
LIFT = 0.1  # of the way: how far noise takes a latent back up where no path was chosen


@dataclass(frozen=True)
class FlowMapConfig(UNetShape):
    """Shape of a `FlowMap`: that of its teacher's network, and of what embeds spans.

    Attributes:
        in_channels, out_channels, resolution: See `UNetConfig`.
        num_steps: Of the teacher's grid.
        span_channels: See `UNetConfig`.
        deviation, guidance, velocities: Of a DiffusionVAE, see `diffusion_vae.ConditionalSpans`.
        paths: Where "map" stands between its evaluations: falling grid indices, for 2 evaluations, for 3 and so on; see `path`.
        noise_paths: Where "map_noise" does: pairs (low, to) of them, flat; the map goes to `low`, and noise takes the latent back
            up to `to`.
    """

    in_channels: int = 4
    out_channels: int = 8
    resolution: int = 32
    num_steps: int = 1000
    span_channels: int = 256
    deviation: float = 1.0
    guidance: float = 0.0
    velocities: tuple[float, ...] = ()
    paths: tuple[tuple[int, ...], ...] = ()
    noise_paths: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "in_channels", "out_channels", "resolution", "num_steps", "span_channels")
        check_number("deviation", self.deviation, above=0)
        check_number("guidance", self.guidance)
        for velocity in self.velocities:
            check_number("velocities", velocity, above=0)
        for name, width in (("paths", 1), ("noise_paths", 2)):
            for count, path in enumerate(getattr(self, name), start=2):
                if len(path) != width * (count - 1) or not all(map(is_integer, path)) or not _falls(path, width, self.num_steps):
                    raise ValueError(
                        f"{name} must hold grid indices, {width * (count - 1)} for {count} evaluations, "
                        f"{'pairs (low, to), low <= to and to ' * (width == 2)}falling from {self.num_steps}, got {path}"
                    )

    def path(self, sampler: str, steps: int, start: int) -> list[tuple[int, int, int]]:
        """Where a sampler of `steps` evaluations goes from grid index `start`: (from, low, to) of each, the last (from, 0, 0).

        The paths are those that were chosen, shrunk where they start below beta = 1; those of more evaluations have the shape of
        the last one that was chosen. Where none was, or the grid is too short for it, equal steps, of "map_noise" `LIFT` of the
        way lifted.
        """
        noisy = sampler == "map_noise"
        chosen, width = (self.noise_paths, 2) if noisy else (self.paths, 1)
        power, lift = _shape(chosen[-1], width, self.num_steps) if chosen else (1.0, LIFT)
        if 2 <= steps < len(chosen) + 2:
            path = tuple(round(index * start / self.num_steps) for index in chosen[steps - 2])
        else:
            path = flat_path(sampler, start, steps, power, lift)
        if not _falls(path, width, start):
            path = flat_path(sampler, start, steps, lift=LIFT)
        lows, tos = path[::width], path[width - 1 :: width]
        return list(zip((start, *tos), (*lows, 0), (*tos, 0), strict=True))


def flat_path(sampler: str, last: int, evaluations: int, power: float = 1.0, lift: float = 0.0) -> tuple[int, ...]:
    """`spread` as `FlowMapConfig` keeps it: of "map" what it goes to, of "map_noise" pairs (low, to), flat."""
    path = spread(last, evaluations, power, lift)
    return tuple(itertools.chain(*path)) if sampler == "map_noise" else tuple(to for _, to in path)


def _shape(path: Sequence[int], width: int, last: int) -> tuple[float, float]:
    """The power and the lift of `spread` by which a path goes from `last` to 0, the power as a mean over where it stands."""
    lows, tos = path[::width], path[width - 1 :: width]
    done = [math.log(1 - to / last) / math.log(k / (len(tos) + 1)) for k, to in enumerate(tos, start=1)]
    return sum(done) / len(done), max(to - low for low, to in zip(lows, tos, strict=True)) / last


def _falls(path: Sequence[int], width: int, last: int) -> bool:
    """Whether a latent that stands at each of `path`, or goes to (low, to) of its pairs, falls on its way from `last` to 0."""
    lows, tos = path[::width], path[width - 1 :: width]
    stands = itertools.pairwise([last, *tos, 0])
    return all(0 <= low <= to for low, to in zip(lows, tos, strict=True)) and all(here > there for here, there in stands)


def spread(last: int, evaluations: int, power: float = 1.0, lift: float = 0.0) -> tuple[tuple[int, int], ...]:
    """A path from grid index `last` to 0: pairs (low, to) between the evaluations, low = to where nothing is lifted.

    Args:
        power: After k of n evaluations a fraction (k / n)^power of the way is done: above 1 it stays longer where there is noise.
        lift: How far noise takes the latent back up, a fraction of the grid; less where 0 is nearer.
    """
    tos = [round(last * (1 - (k / evaluations) ** power)) for k in range(1, evaluations)]
    return tuple((max(to - round(lift * last), 0), to) for to in tos)


class FlowMap(nn.Module):
    """One function for any number of steps: the walk of a teacher's ODE from t to s <= t, X(z, t, s).

    Its network is that of the teacher with the span t - s beside the time; what its heads mean over a span the process says, see
    `nonlinear_diffusion.Spans` and `diffusion_vae.ConditionalSpans`. At s = t they are the teacher's. As built, from the weights
    of the teacher, a span changes nothing that the network returns.

    Args:
        config: See `FlowMapConfig`.
    """

    def __init__(self, config: FlowMapConfig) -> None:
        super().__init__()
        self.config = config
        self.unet: UNet = config.build_unet(
            config.in_channels, config.out_channels, config.resolution, span_channels=config.span_channels
        )

    @classmethod
    def of(cls, teacher: nn.Module, shape: UNetShape, num_steps: int, **others: Any) -> FlowMap:
        """The map that starts from a teacher's `UNet` of this shape; `others` are further fields of its config.

        It has no dropout: what it learns is a function.
        """
        assert isinstance(teacher, UNet), "no other network has a place for spans"
        reads, predicts = teacher.conv_in.in_channels, teacher.conv_out.out_channels
        values = {field.name: getattr(shape, field.name) for field in fields(UNetShape)} | {"dropout": 0.0}
        side = getattr(shape, "latent_resolution", getattr(shape, "resolution", None))
        ends = {"in_channels": reads, "out_channels": predicts, "resolution": side, "num_steps": num_steps}
        flow_map = cls(FlowMapConfig(**values, **ends, **others))
        missing, unexpected = flow_map.unet.load_state_dict(teacher.state_dict(), strict=False)
        assert not unexpected and all(name.startswith("span_layers.") for name in missing), "a U-Net of this shape"
        return flow_map

    def forward(self, network_input: Tensor, times: Tensor) -> Tensor:
        """The output of the network, float32, (n, out_channels, R, R), at times and spans (n, 2), `span_times` of the process."""
        return self.unet(network_input.to(next(self.unet.parameters()).dtype), times.to(network_input.device)).float()

    def path(self, sampler: str, steps: int, start: int) -> list[tuple[int, int, int]]:
        """Where a sampler of `steps` evaluations goes from grid index `start`: see `FlowMapConfig.path`."""
        return self.config.path(sampler, steps, start)
