"""The samplers of the non-linear process as a scheduler, by the protocol of diffusers: for loops that are written for those."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from multibeta import checkpoints, ops
from multibeta.checks import check_steps
from multibeta.files import read_json, write_text
from multibeta.flow_map import MAP_SAMPLERS, FlowMap, FlowMapConfig
from multibeta.nonlinear_diffusion import (
    PARAMETERIZATIONS,
    SAMPLERS,
    SPACINGS,
    DiffusionConfig,
    NonlinearDiffusion,
)
from multibeta.schedules import BETA_SCHEDULES, SamplerRows, beta_to_step
from multibeta.seeds import as_seeds

if TYPE_CHECKING:
    from typing import Self

CONFIG_NAME = "scheduler_config.json"
_TABLES = ("sigmas", "latent_mean", "latent_deviation", "velocity_rms")
_FRESH_NOISE = ops.SamplerRow._fields.index("fresh_noise")


class StepOutput(NamedTuple):
    """What a step gives: the next latent, and the predictions it was made of, (N, C, H, W) each."""

    prev_sample: Tensor
    noise_prediction: Tensor
    delta: Tensor


class SchedulerConfig(dict):
    """A dict whose entries are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class NonlinearDiffusionScheduler:
    """A sampler of `nonlinear_diffusion` for a loop of diffusers around a network with two heads, a `NonlinearDiffusion.unet`.

        scheduler = NonlinearDiffusionScheduler.from_model(model.diffusion, "ode2")
        scheduler.set_timesteps(20)
        latent = scheduler.initial(noise)  # or noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(latent, timestep), timestep)
            latent = scheduler.step(output, timestep, latent).prev_sample
        images = model.decode(latent)

    The rows are those of `sampler_rows`. A step knows the one before it: one trajectory at a time goes through a scheduler.

    Args:
        sigmas, latent_mean, latent_deviation, velocity_rms: As of `NonlinearDiffusion.set_process`, tensors or nested lists.
        sampler, delta_sign: See `sampler_rows`; or "map" or "map_noise", for the network of a flow map: then each of `timesteps`
            is a pair, time and span, for `unet(latent, timestep.expand(len(latent), 2))`.
        parameterization, schedule, spacing: See `DiffusionConfig`. The basis is "pixel".
        paths, noise_paths: Of a flow map, see `FlowMapConfig`.

    Attributes:
        config: The arguments, as JSON has them, and `num_train_timesteps`.
        timesteps: What the network takes as time at each evaluation, (S,) or (S, 2) float32, on the scale of 0 ... 1000.
        seeds: One integer per sample, (N,), for samplers that draw noise; None for 0, 1, 2 ... A step with a `generator`
            draws from that instead.
    """

    def __init__(
        self,
        sigmas: Tensor | Sequence,
        latent_mean: Tensor | Sequence,
        latent_deviation: Tensor | Sequence,
        velocity_rms: Tensor | Sequence,
        sampler: str = "ode2",
        parameterization: Literal["v", "residual", "literal"] = "v",
        schedule: Literal["linear", "sinusoidal", "sinusoidal_squared"] = "linear",
        delta_sign: int = 1,
        spacing: Literal["uniform", "turn"] = "uniform",
        paths: Sequence[Sequence[int]] = (),
        noise_paths: Sequence[Sequence[int]] = (),
    ) -> None:
        for name, value, known in (
            ("sampler", sampler, (*SAMPLERS, *MAP_SAMPLERS)),
            ("parameterization", parameterization, PARAMETERIZATIONS),
            ("schedule", schedule, BETA_SCHEDULES),
            ("spacing", spacing, SPACINGS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        named = zip(_TABLES, (sigmas, latent_mean, latent_deviation, velocity_rms), strict=True)
        tables = {name: torch.as_tensor(table, dtype=torch.float32).detach().cpu() for name, table in named}
        sigmas, mean = tables["sigmas"], tables["latent_mean"]
        process = DiffusionConfig(
            parameterization=parameterization,
            spacing=spacing,
            latent_channels=mean.shape[-1],
            sigma_per_channel=sigmas.dim() == 2,
            num_steps=len(sigmas) - 1,
            schedule=schedule,
        )
        self._process = NonlinearDiffusion(process, unet=nn.Identity())
        self._process.set_process(**tables)
        self._head_rows = self._process.head_rows(torch.arange(len(sigmas))).float()
        even, lifted = (tuple(map(tuple, each)) for each in (paths, noise_paths))
        self._flow_map = FlowMapConfig(num_steps=process.num_steps, paths=even, noise_paths=lifted)
        if sampler in MAP_SAMPLERS:
            self._process.check_spans()
            if delta_sign != 1:
                raise ValueError(f"a flow map has no delta to subtract: delta_sign must be 1, got {delta_sign!r}")
        self.config = SchedulerConfig(
            _class_name=type(self).__name__,
            num_train_timesteps=process.num_steps,
            sampler=sampler,
            parameterization=parameterization,
            schedule=schedule,
            delta_sign=delta_sign,
            spacing=spacing,
            paths=[list(path) for path in even],
            noise_paths=[list(path) for path in lifted],
            **{name: table.tolist() for name, table in tables.items()},
        )
        self.seeds: Tensor | None = None
        self.set_timesteps(min(50, process.num_steps))

    @classmethod
    def from_model(
        cls, diffusion: NonlinearDiffusion, sampler: str = "ode2", delta_sign: int = 1, flow_map: FlowMap | None = None
    ) -> Self:
        """The scheduler of a trained model's process, and of the paths of its `flow_map`.

        Raises:
            ValueError: The process is of another basis than "pixel", which no factors of channels describe.
        """
        if diffusion.config.basis != "pixel":
            raise ValueError(
                f"a scheduler works in pixels, this process in the {diffusion.config.basis} basis: sample by the model itself"
            )
        tables = {name: diffusion.get_buffer(name) for name in _TABLES}
        config = diffusion.config
        return cls(
            **tables,
            sampler=sampler,
            parameterization=config.parameterization,
            schedule=config.schedule,
            delta_sign=delta_sign,
            spacing=config.spacing,
            paths=() if flow_map is None else flow_map.config.paths,
            noise_paths=() if flow_map is None else flow_map.config.noise_paths,
        )

    @classmethod
    def from_config(cls, config: dict[str, Any], **changes: Any) -> Self:
        """A scheduler of the `config` of another, with `changes` such as `sampler="heun"`."""
        if not isinstance(config, dict):
            raise TypeError(f"config must be a dict, got a {type(config).__name__}")
        named = config.get("_class_name", cls.__name__)
        if named != cls.__name__:
            raise ValueError(f"the config is of a {named}, not of a {cls.__name__}")
        known = inspect.signature(cls).parameters
        return cls(**{name: value for name, value in config.items() if name in known} | changes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config` to scheduler_config.json in `folder`."""
        write_text(Path(folder) / CONFIG_NAME, json.dumps(self.config) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> Self:
        """The scheduler that `save_pretrained` wrote to `folder`, or to `subfolder` of it."""
        path = Path(folder, subfolder or "", CONFIG_NAME)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: name the folder that save_pretrained wrote")
        with checkpoints.naming(path.parent, f"a {cls.__name__}", path.name):
            return cls.from_config(cast(dict[str, Any], read_json(path)))  # which checks that it is one

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sampler={self.config.sampler!r}, num_train_timesteps={len(self)})"

    @property
    def order(self) -> int:
        """Evaluations a step."""
        return 2 if self.config.sampler == "heun" else 1

    @property
    def init_noise_sigma(self) -> Tensor:
        """Deviation of the latent at beta = 1, (C, 1, 1), for standard normal noise.

        Raises:
            ValueError: Its mean is not zero, as it is where f(x, 1) = 0: noise must pass through `initial`.
        """
        ones = torch.ones(1, self._head_rows.shape[1], 1, 1)
        if self.initial(torch.zeros_like(ones)).any():
            raise ValueError("latents at beta = 1 have a mean that is not zero: start from scheduler.initial(noise)")
        return self.initial(ones)[0]

    def initial(self, noise: Tensor) -> Tensor:
        """The latent at beta = 1 from standard normal noise, (N, C, H, W): see `NonlinearDiffusion.initial`."""
        self._check_sample(noise)
        return self._process.initial(noise.to(self._device))

    @property
    def _device(self) -> torch.device:
        return self._process.get_buffer("sigmas").device

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None, *, beta: float = 1.0) -> None:
        """Begin a trajectory of `num_inference_steps` steps from `beta` to 0.

        Raises:
            ValueError: More steps than the grid has, a beta outside [0, 1].
        """
        start = beta_to_step(beta, len(self), self.config.schedule)
        rows = self._sampler_rows(num_inference_steps, start)
        device = self._device if device is None else device
        self._process.to(device)
        self._head_rows = self._head_rows.to(device)
        coefficients = rows.coefficients.to(device) if rows.coefficients.dim() == 3 else rows.coefficients
        self._rows = dataclasses.replace(rows, coefficients=coefficients)
        self.num_inference_steps = num_inference_steps
        times = rows.steps * (1000 / len(self)) if rows.ends is None else self._process.span_times(rows.steps, rows.ends)
        self.timesteps = times.to(device, torch.float32)
        self._index, self._previous = 0, None

    def _sampler_rows(self, steps: int, start: int) -> SamplerRows:
        sampler = self.config.sampler
        if sampler not in MAP_SAMPLERS:
            return self._process.sampler_rows(sampler, steps, start=start, delta_sign=self.config.delta_sign)
        check_steps(steps, max(start, 1), f" (grid steps from {start} to 0)")
        return self._process.spans().sampler_rows(self._flow_map.path(sampler, steps, start) if start else [])

    def _head_row(self, timestep: Tensor | float) -> ops.TwoHeadRow:
        """The row of `NonlinearDiffusion.head_rows`, or of `Spans.rows`, at a timestep, (C, 1, 1) each."""
        step = self._grid_index(timestep)
        if self._rows.ends is None:
            row = self._head_rows[step]
        else:
            span = round(float(torch.as_tensor(timestep).flatten()[1]) * len(self) / 1000)
            row = self._process.spans().rows(torch.tensor([step]), torch.tensor([step - span]))[0].to(self._head_rows)
        return ops.TwoHeadRow(*row[:, None, None].unbind(-1))

    def _grid_index(self, timestep: Tensor | float) -> int:
        """That of a timestep, of a pair that of its time."""
        return round(float(torch.as_tensor(timestep).flatten()[0]) * len(self) / 1000)

    def _check_sample(self, sample: Tensor) -> None:
        channels = self._head_rows.shape[1]
        if sample.dim() != 4 or sample.shape[1] != channels:
            raise ValueError(f"latents must have shape (N, {channels}, H, W), got {tuple(sample.shape)}")
        if not sample.is_floating_point():
            raise ValueError(f"latents must be of floating point, got {sample.dtype}")

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """What the network reads of the latent at `timestep`, (N, C, H, W)."""
        self._check_sample(sample)
        row = self._head_row(timestep)
        return (row.input_from_latent * sample + row.input_offset).to(sample.dtype)

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor]:
        """The latent after one evaluation of the network.

        Args:
            model_output: Both heads at `timestep`, (N, 2 C, H, W).
            timestep: The next of `timesteps`.
            sample: The latent, (N, C, H, W).
            generator: Gives the noise of samplers that draw some, in place of `seeds`: it then depends on the batch.
            return_dict: False for the tuple (next latent,).

        Raises:
            ValueError: A latent or an output of another shape, a timestep out of turn, not one seed per sample.
        """
        self._check_sample(sample)
        wanted = (len(sample), 2 * self._head_rows.shape[1], *sample.shape[2:])
        if tuple(model_output.shape) != wanted:
            raise ValueError(f"model_output must hold both heads, {wanted}, got {tuple(model_output.shape)}")
        step = self._next_step(timestep)
        head = self._head_row(timestep)
        latent, (first, second) = sample.float(), model_output.float().chunk(2, dim=1)
        noise_prediction, delta = head.predictions(latent, first, second)
        row = self._rows.coefficients[self._index]
        fresh = None
        if generator is not None:
            fresh, row = row[..., _FRESH_NOISE].to(latent), row.clone()
            row[..., _FRESH_NOISE] = 0
        seeds = torch.arange(len(sample)) if self.seeds is None else as_seeds(self.seeds)
        if seeds.shape != (len(sample),):
            raise ValueError(f"one seed per sample is needed, got {tuple(seeds.shape)} for {len(sample)} samples")
        latent = ops.sampler_update(latent, noise_prediction, delta, row, seeds.to(sample.device), step, previous=self._previous)
        if generator is not None and fresh is not None and fresh.any():
            noise = torch.randn(latent.shape, generator=generator, device=generator.device).to(latent)
            latent = latent + fresh[..., None, None] * noise
        self._previous, self._index = (noise_prediction, delta), self._index + 1
        result = StepOutput(latent.to(sample.dtype), noise_prediction, delta)
        return result if return_dict else (result.prev_sample,)

    def _next_step(self, timestep: Tensor | float) -> int:
        """The grid index of `timestep`, which must be the next of the trajectory."""
        if self._index == len(self._rows):
            raise ValueError("the walk is over: set_timesteps begins another")
        step, expected = self._grid_index(timestep), int(self._rows.steps[self._index])
        if step != expected:
            wanted, given = (torch.as_tensor(each).tolist() for each in (self.timesteps[self._index], timestep))
            raise ValueError(f"the next timestep is {_shown(wanted)}, got {_shown(given)}: set_timesteps begins another walk")
        return step

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Not defined: z_t = f(x, t) + sigma_t eps is a function of the image, not of its latent at beta = 0."""
        raise NotImplementedError(
            "latents at beta are encoded from images, not made from latents at 0: use model.encode(images, beta, seeds=...)"
        )


def _shown(timestep: float | list[float]) -> str:
    """A timestep, or the pair of a flow map, as it is read."""
    return f"{timestep:g}" if isinstance(timestep, float | int) else ", ".join(f"{part:g}" for part in timestep)
