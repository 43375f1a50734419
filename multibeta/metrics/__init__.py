"""Measures of what a model learned: functions of arrays, beneath functions of any encoder."""

from multibeta.metrics.factor_classifier import FactorClassifier, FactorClassifierObjective
from multibeta.metrics.fidelity import frechet_distance, gradient_energy, precision_recall

__all__ = [
    "FactorClassifier",
    "FactorClassifierObjective",
    "frechet_distance",
    "gradient_energy",
    "precision_recall",
]
