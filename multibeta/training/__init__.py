"""Training, the same for every stage: an objective in, averaged weights out, resumable at every checkpoint."""

from multibeta.training.batches import Batch, Objective, batch_indices
from multibeta.training.checkpointing import check_folder
from multibeta.training.interrupts import SIGNALS, TrainingInterrupted
from multibeta.training.loop import train
from multibeta.training.metrics_log import METRICS, read_metrics
from multibeta.training.options import TrainingOptions, learning_rate_at
from multibeta.training.parallel import PARALLEL, ObjectiveModule, Parallel
from multibeta.training.posthoc import reconstruct_ema
from multibeta.training.run import TrainingStopped

__all__ = [
    "Batch",
    "METRICS",
    "Objective",
    "ObjectiveModule",
    "PARALLEL",
    "Parallel",
    "SIGNALS",
    "TrainingInterrupted",
    "TrainingOptions",
    "TrainingStopped",
    "batch_indices",
    "check_folder",
    "learning_rate_at",
    "read_metrics",
    "reconstruct_ema",
    "train",
]
