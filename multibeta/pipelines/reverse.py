"""The reverse process of the models that denoise: the engine that runs it, and the plain loop in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multibeta import ops
from multibeta.flow_map import MAP_SAMPLERS, FlowMap
from multibeta.inference import why_not_prepared
from multibeta.networks import UNet
from multibeta.pipelines.base import compare_parts
from multibeta.pipelines.generation import StepEnd, with_step_end
from multibeta.pipelines.protocol import Pipeline
from multibeta.sampling import Callback, Engine, EngineOptions, Predictions, sample
from multibeta.schedules import SamplerRows

if TYPE_CHECKING:
    from typing import Self


USUAL_MAP_STEPS = {"map": 2, "map_noise": 4}


class PlainLoop:
    """In the place of an `Engine`, for a network that it cannot prepare."""

    def __init__(self, network: nn.Module, options: EngineOptions | None = None):
        self.network, self.options = network, options or EngineOptions()

    def explain(self) -> str:
        """Why the loop is plain."""
        return f"plain loop: the engine prepares the UNet of multibeta, the network is a {type(self.network).__name__}"


class DenoisingPipeline(Pipeline):
    """What the models share that denoise by a `diffusion`: an engine, and one way that their reverse process runs.

    Attributes:
        flow_map: Optional, what walks of the samplers "map" and "map_noise" are made by in one to four evaluations; None without.
    """

    denoises = True
    diffusion: Any
    engine: Engine | PlainLoop
    map_engine: Engine | None = None
    _flow_map: FlowMap | None = None

    @property
    def flow_map(self) -> FlowMap | None:
        """What the samplers of `MAP_SAMPLERS` walk by; None of a model that has none."""
        return self._flow_map

    @flow_map.setter
    def flow_map(self, flow_map: FlowMap | None) -> None:
        if flow_map is not None:
            if "flow_map" not in self.optional_parts:
                raise TypeError(f"a {type(self).__name__} takes no flow map")
            self._require_parts(None, flow_map=flow_map)
            teacher, given = self.diffusion.unet, flow_map.config
            said = {"resolution": (self._side, given.resolution), "num_steps": (self.num_steps, given.num_steps)}
            if hasattr(teacher, "conv_in"):  # another network than ours need not say what it reads
                said["in_channels"] = teacher.conv_in.in_channels, given.in_channels
                said["out_channels"] = teacher.conv_out.out_channels, given.out_channels
            compare_parts(said, "diffusion and flow map")
            flow_map = flow_map.eval().requires_grad_(False).to(self.device)
        self._flow_map = flow_map
        own = tuple(name for name in self.samplers if name not in MAP_SAMPLERS)
        self.samplers = own if flow_map is None else (*own, *MAP_SAMPLERS)
        self._accelerate(self.engine.options)

    @property
    def _side(self) -> int:
        """Pixels per side of what is denoised."""
        return getattr(self.diffusion.config, "latent_resolution", None) or self.diffusion.config.resolution

    def sampling_options(self, sampler: str | None = None, steps: int | None = None, *, invert: bool = False) -> dict[str, Any]:
        if steps is None and sampler in MAP_SAMPLERS and sampler in self.samplers:
            steps = min(USUAL_MAP_STEPS[sampler], self.num_steps)
        return super().sampling_options(sampler, steps, invert=invert)

    def _check_sampler(self, sampler: str) -> None:
        """Those of a flow map need one, and a model without one says how to train it."""
        if sampler in MAP_SAMPLERS and self.optional_parts:
            self._require_flow_map()
        super()._check_sampler(sampler)

    def _require_flow_map(self) -> FlowMap:
        if self.flow_map is None:
            raise ValueError(
                f"samplers {' and '.join(MAP_SAMPLERS)} need a flow map, which this model has not: "
                "`multibeta distill MODEL --out FOLDER` trains one"
            )
        return self.flow_map

    def to(self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        super().to(device, dtype)
        self._accelerate(self.engine.options)
        return self

    def _accelerate(self, engine_options: EngineOptions | None) -> None:
        """Make what runs the networks, for the weights as they are."""
        unet = self.diffusion.unet
        self.engine = Engine(unet, engine_options, self._basis) if isinstance(unet, UNet) else PlainLoop(unet, engine_options)
        self.map_engine = None if self.flow_map is None else Engine(self.flow_map.unet, engine_options, self._basis)

    def _reverse(
        self,
        rows: SamplerRows,
        initial: Tensor,
        seeds: Tensor,
        predict: Callable[..., tuple[Tensor, Tensor]],
        times: Tensor,
        callback: Callback | None = None,
        step_end: StepEnd | None = None,
        on_predictions: Predictions | None = None,
        condition: Tensor | None = None,
        guidance_rows: Tensor | None = None,
    ) -> Tensor:
        """The reverse process from `initial` along the rows of a sampler: by the engine, or by the plain loop.

        The loop is plain under `multibeta.backend("reference")`, and where the network must be called itself. Rows of spans are
        those of the flow map.

        Args:
            predict: What the plain loop calls: see `sampling.sample`.
            times: What the network takes as time at each row, (S,), or with spans (S, 2).
            callback, on_predictions: See `sampling.sample`.
            step_end: See `generation.with_step_end`.
            condition, guidance_rows: Of `sampling.Engine.sample`; `predict` has them within.
        """
        replaced = self.map_engine is not None and self.flow_map is not None and self.map_engine.network is not self.flow_map.unet
        if self.engine.network is not self.diffusion.unet or replaced:
            self._accelerate(self.engine.options)
        engine = self._usable_engine(self.engine if rows.ends is None else self.map_engine)
        callback = with_step_end(callback, step_end, self, rows.steps, takes_changes=engine is None)
        if engine is None:
            return sample(predict, rows, initial, seeds, basis=self._basis, callback=callback, on_predictions=on_predictions)
        return engine.sample(
            rows,
            self._head_rows(rows),
            times,
            initial,
            seeds,
            condition=condition,
            guidance_rows=guidance_rows,
            callback=callback,
            on_predictions=on_predictions,
        )

    def _head_rows(self, rows: SamplerRows) -> Tensor:
        """What stands between the network and the sampler at each of `rows`."""
        return self.diffusion.head_rows(rows.steps)

    @property
    def _basis(self) -> Tensor | None:
        return getattr(self.diffusion, "cosines", None)

    def _usable_engine(self, engine: Engine | PlainLoop | None) -> Engine | None:
        """An engine; None where the plain loop takes its place: asked for, or the network must be called itself."""
        if ops.current_backend() == "reference" or not isinstance(engine, Engine):
            return None
        return engine if why_not_prepared(engine.network) is None else None
