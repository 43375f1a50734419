"""The experiments of the papers: every method trained on one backbone, measured, set next to the printed numbers."""

from multibeta.reproduce.experiments import EXPERIMENTS, reproduce
from multibeta.reproduce.models import Study

__all__ = ["EXPERIMENTS", "Study", "reproduce"]
