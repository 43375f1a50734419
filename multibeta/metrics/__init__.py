"""Measures of what a model learned: functions of arrays, beneath functions of any encoder."""

from __future__ import annotations

from multibeta.metrics.auroc import tad_from_codes
from multibeta.metrics.disentanglement import dci, mig, tad
from multibeta.metrics.factor_classifier import FactorClassifier, FactorClassifierObjective
from multibeta.metrics.features import FeatureNetwork, extract_features, extract_statistics, load_features
from multibeta.metrics.fidelity import frechet_distance, frechet_distance_from_statistics, gradient_energy, precision_recall
from multibeta.metrics.importance import dci_from_codes, dci_from_importance
from multibeta.metrics.lpips import LPIPS, load_lpips
from multibeta.metrics.mutual_information import information_gap, mig_from_codes, mutual_information
from multibeta.metrics.probe import linear_probe, nearest_neighbours
from multibeta.metrics.statistics import FeatureStatistics, feature_statistics, load_statistics

__all__ = [
    "FactorClassifier",
    "FactorClassifierObjective",
    "FeatureNetwork",
    "FeatureStatistics",
    "LPIPS",
    "dci",
    "dci_from_codes",
    "dci_from_importance",
    "extract_features",
    "extract_statistics",
    "feature_statistics",
    "frechet_distance",
    "frechet_distance_from_statistics",
    "gradient_energy",
    "information_gap",
    "linear_probe",
    "load_features",
    "load_lpips",
    "load_statistics",
    "mig",
    "mig_from_codes",
    "mutual_information",
    "nearest_neighbours",
    "precision_recall",
    "tad",
    "tad_from_codes",
]
