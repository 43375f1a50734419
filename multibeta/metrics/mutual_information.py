"""What single codes tell about known factors, in nats, and the mutual information gap."""

from __future__ import annotations

from typing import Any, SupportsIndex

import numpy as np

from multibeta.metrics.checks import ArrayLike, as_array, as_codes, as_factors, as_integer


def mutual_information(codes: ArrayLike, factors: ArrayLike, num_bins: int = 20) -> np.ndarray:
    """Mutual information of every factor with every binned code, the plug-in estimate.

    Each code is cut into `num_bins` equal bins between its extremes, edges in its own precision, half-open but for the
    last. A code that is constant, or varies too little for its precision to tell the bins apart, is one bin: it tells
    nothing.

    Args:
        codes: (N, K), real.
        factors: (N, F), integers.
        num_bins: Bins per code, at least 2.

    Returns:
        (F, K) float64 in nats; row j lies in [0, min(H_j, ln num_bins)].

    Raises:
        ValueError: NaN codes, a constant factor, unequal lengths, or shapes and types other than these.
    """
    codes = as_codes(codes)
    factors = as_factors(factors, len(codes))
    num_bins = check_bins(num_bins)
    num_codes = codes.shape[1]
    cells = np.stack([_bins(code, num_bins) for code in codes.T], 1) + num_bins * np.arange(num_codes)
    return np.stack([_information(factor, cells, num_codes, num_bins) for factor in factors.T])


def check_bins(num_bins: SupportsIndex) -> int:
    """`num_bins` as int; `ValueError` unless it is an integer of at least 2."""
    return as_integer(num_bins, "num_bins", 2)


def factor_entropy(factors: ArrayLike) -> np.ndarray:
    """Empirical entropy of every factor, (F,) float64 in nats, of integers (N, F)."""
    factors = as_array(factors, "factors")
    factors = as_factors(factors, len(factors) if factors.ndim else 0)
    counts = [np.unique(factor, return_counts=True)[1] for factor in factors.T]
    return np.log(len(factors)) - np.array([_sum_n_log_n(count) for count in counts]) / len(factors)


def information_gap(codes: ArrayLike, factors: ArrayLike, num_bins: int = 20) -> dict[str, Any]:
    """The mutual information gap with what it is made of; see `mig_from_codes` and `mutual_information`.

    Returns:
        A dictionary: `mig`; `gaps`, (F,); `mutual_information`, (F, K), its maximum over codes the curves of MultiBeta
        Fig. 4; `entropy`, (F,); and `ceiling`, the highest MIG that `num_bins` bins allow: 1 unless a factor has more values.
    """
    information, entropy = mutual_information(codes, factors, num_bins), factor_entropy(factors)
    if information.shape[1] < 2:
        raise ValueError("a gap needs at least 2 codes, got 1")
    second, first = np.sort(information, axis=1)[:, -2:].T
    gaps = (first - second) / entropy
    return {
        "mig": float(gaps.mean()),
        "gaps": gaps,
        "mutual_information": information,
        "entropy": entropy,
        "ceiling": float(np.minimum(1, np.log(num_bins) / entropy).mean()),
    }


def mig_from_codes(codes: ArrayLike, factors: ArrayLike, num_bins: int = 20) -> float:
    """Mutual information gap (Chen et al. 2018) of binned codes, as Locatello et al. 2019 compute it.

    The two codes that tell most about a factor differ by its gap, in units of its entropy; MIG is the mean over factors.
    It lies in [0, 1]. A factor of more than `num_bins` values cannot reach 1: on Cars3D MIG ends at 0.839.

    Args:
        codes: (N, K), real, K at least 2: means, not samples, in the published protocol.
        factors: (N, F), integers.
        num_bins: Bins per code.

    Raises:
        ValueError: as `mutual_information`, and for a single code.
    """
    return information_gap(codes, factors, num_bins)["mig"]


def _bins(code: np.ndarray, num_bins: int) -> np.ndarray:
    """Bin of every value of a code, (N,) integers in [0, num_bins)."""
    edges = np.linspace(code.min(), code.max(), num_bins + 1, dtype=code.dtype)
    if (edges[1:] <= edges[:-1]).any():
        return np.zeros(len(code), dtype=np.int64)
    return np.digitize(code, edges[:-1]) - 1


def _information(factor: np.ndarray, cells: np.ndarray, num_codes: int, num_bins: int) -> np.ndarray:
    """Mutual information of one factor, (N,), with every code, (K,); `cells` (N, K) numbers the bins of all codes."""
    values, rows = np.unique(factor, return_inverse=True)
    joint = np.bincount((rows[:, None] * (num_codes * num_bins) + cells).ravel(), minlength=len(values) * num_codes * num_bins)
    joint = joint.reshape(len(values), num_codes, num_bins)
    sums = _sum_n_log_n(joint, (0, 2)) - _sum_n_log_n(joint.sum(2), 0) - _sum_n_log_n(joint.sum(0), 1)
    return np.maximum(np.log(len(factor)) + sums / len(factor), 0)


def _sum_n_log_n(counts: np.ndarray, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    return (counts * np.log(np.maximum(counts, 1))).sum(axis)
