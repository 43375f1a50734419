"""The one reverse loop, over the coefficient rows of any sampler: plain for any prediction, and as an engine for a U-Net."""

from multibeta.inference import Step, capture_cuda_graph
from multibeta.sampling.engine import Engine, EngineOptions
from multibeta.sampling.loop import Callback, Predictions, check_latents, check_start, sample
from multibeta.sampling.volume import sample_with_volume

__all__ = [
    "sample",
    "sample_with_volume",
    "check_latents",
    "check_start",
    "Callback",
    "Predictions",
    "Engine",
    "EngineOptions",
    "capture_cuda_graph",
    "Step",
]
