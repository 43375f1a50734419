"""The reverse process of the models that denoise: the engine that runs it, and the plain loop in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multibeta import ops
from multibeta.inference import why_not_prepared
from multibeta.networks import UNet
from multibeta.pipelines.generation import StepEnd, with_step_end
from multibeta.pipelines.protocol import Pipeline
from multibeta.sampling import Callback, Engine, EngineOptions, sample
from multibeta.schedules import SamplerRows

if TYPE_CHECKING:
    from typing import Self


class PlainLoop:
    """In the place of an `Engine`, for a network that it cannot prepare."""

    def __init__(self, network: nn.Module, options: EngineOptions | None = None):
        self.network, self.options = network, options or EngineOptions()

    def explain(self) -> str:
        """Why the loop is plain."""
        return f"plain loop: the engine prepares the UNet of multibeta, the network is a {type(self.network).__name__}"


class DenoisingPipeline(Pipeline):
    """What the models share that denoise by a `diffusion`: an engine, and one way that their reverse process runs."""

    denoises = True
    diffusion: Any
    engine: Engine | PlainLoop

    def to(self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        super().to(device, dtype)
        self._accelerate(self.engine.options)
        return self

    def _accelerate(self, engine_options: EngineOptions | None) -> None:
        """Make what runs the networks, for the weights as they are."""
        unet = self.diffusion.unet
        self.engine = Engine(unet, engine_options, self._basis) if isinstance(unet, UNet) else PlainLoop(unet, engine_options)

    def _reverse(
        self,
        rows: SamplerRows,
        initial: Tensor,
        seeds: Tensor,
        predict: Callable[[Tensor, int], tuple[Tensor, Tensor]],
        times: Tensor,
        callback: Callback | None = None,
        step_end: StepEnd | None = None,
        **conditioning: Tensor | None,
    ) -> Tensor:
        """The reverse process from `initial` along the rows of a sampler: by the engine, or by the plain loop.

        The loop is plain under `multibeta.backend("reference")`, and where the network must be called itself.

        Args:
            predict: What the plain loop calls: see `sampling.sample`.
            times: What the network takes as time at each row, (S,).
            callback: See `sampling.sample`.
            step_end: See `generation.with_step_end`.
            conditioning: `condition` and `guidance_rows` of `sampling.Engine.sample`; `predict` has them within.
        """
        if self.engine.network is not self.diffusion.unet:
            self._accelerate(self.engine.options)
        engine = self._usable_engine()
        callback = with_step_end(callback, step_end, self, rows.steps, takes_changes=engine is None)
        if engine is None:
            return sample(predict, rows, initial, seeds, basis=self._basis, callback=callback)
        return engine.sample(rows, self._head_rows(rows), times, initial, seeds, callback=callback, **conditioning)

    def _head_rows(self, rows: SamplerRows) -> Tensor:
        """What stands between the network and the sampler at each of `rows`."""
        return self.diffusion.head_rows(rows.steps)

    @property
    def _basis(self) -> Tensor | None:
        return getattr(self.diffusion, "cosines", None)

    def _usable_engine(self) -> Engine | None:
        """What runs the reverse process; None where that is the plain loop: asked for, or the network must be called itself."""
        if ops.current_backend() == "reference" or isinstance(self.engine, PlainLoop):
            return None
        return self.engine if why_not_prepared(self.diffusion.unet) is None else None
