"""Mean and covariance of features: gathered batch by batch, checked, and read from the files of the field."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from multibeta.metrics.checks import ArrayLike, as_array

ASYMMETRY = 1e-5  # of the largest entry: what covariances that were kept in float32 may have
NEGATIVE = 1e-3  # of the largest eigenvalue, likewise


class FeatureStatistics:
    """Mean and covariance of features that come in batches: memory holds d x d numbers, however many samples there are.

    The update of Chan, Golub and LeVeque (1983) in float64: batches are centred before they are squared, so that a mean far
    from zero costs no digits. `np.savez(path, mu=statistics.mean, sigma=statistics.covariance)` makes a file for
    `load_statistics` and for other tools.

    Attributes:
        count: Samples seen so far.
        origin: What the features depend on, a dictionary to store with results; empty unless `extract_statistics` knew.
    """

    def __init__(self):
        self.count = 0
        self.origin: dict[str, Any] = {}
        self._mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None

    def update(self, features: ArrayLike) -> None:
        """Add features, an array or tensor (n, d) of real numbers, n >= 0 and d as in the calls before.

        Raises:
            ValueError: Another shape or width, NaN or infinity; the statistics stay as they were.
        """
        batch = as_features(features)
        width: int = batch.shape[1]
        if self._mean is None or self._scatter is None:
            self._mean, self._scatter = np.zeros(width), np.zeros((width, width))
        if width != len(self._mean):
            raise ValueError(f"features must be equally wide, got {len(self._mean)} and {width}")
        if len(batch) == 0:
            return
        total = self.count + len(batch)
        mean = batch.mean(0)
        step = mean - self._mean
        # The distance between the means is one row more of the batch's scatter.
        rows = np.concatenate([batch - mean, np.sqrt(self.count / total * len(batch)) * step[None]])
        self._scatter += rows.T @ rows
        self._mean += len(batch) / total * step
        self.count = total

    @property
    def mean(self) -> np.ndarray:
        """(d,) float64; at least one sample is needed."""
        return self._moments(1)[0].copy()

    @property
    def covariance(self) -> np.ndarray:
        """(d, d) float64 with N - 1; at least two samples are needed."""
        return self._moments(2)[1] / (self.count - 1)

    def _moments(self, minimum: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and scatter of the samples, if there are at least `minimum`."""
        if self._mean is None or self._scatter is None or self.count < minimum:
            raise ValueError(f"at least {minimum} samples are needed, got {self.count}")
        return self._mean, self._scatter


def feature_statistics(features: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d), with N - 1, of features (N, d), N >= 2, in float64.

    Raises:
        ValueError: Another shape, fewer than two samples, NaN or infinity.
    """
    statistics = FeatureStatistics()
    statistics.update(features)
    return statistics.mean, statistics.covariance


def load_statistics(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance that others computed, from a `.npz` file with `mu` and `sigma`.

    TTUR, pytorch-fid, EDM and guided-diffusion publish such files. What network and preprocessing they belong to is not in
    the file: a distance means something only if they are yours, too.

    Returns:
        (mean, covariance), (d,) and (d, d), float64, for `frechet_distance_from_statistics`.

    Raises:
        FileNotFoundError: No file is there.
        ValueError: The file is a pickle, which could execute code, is damaged or of another format, or holds no such statistics.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: name statistics that are on this machine, nothing is downloaded")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(16)
        if start.startswith(b"\x80") or path.suffix in (".pkl", ".pickle"):
            raise ValueError(
                f"{path} is a pickle, which could execute code and was not read: where you trust it, open it yourself and "
                "save its mean and covariance with `np.savez(path, mu=mean, sigma=covariance)`"
            )
        raise ValueError(f"{path} is truncated or no .npz file, it begins with {start!r}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("mu", "sigma") if name in stored.files}
            names = ", ".join(stored.files[:5])
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged or holds more than numbers ({error}): get the original file") from error
    if len(arrays) < 2:
        raise ValueError(f"{path} must hold mu and sigma, got {names or 'nothing'}")
    return checked_statistics(arrays["mu"], arrays["sigma"], f"{path}: ")


def as_features(features: ArrayLike) -> np.ndarray:
    """Finite features as float64, (N, d), d at least 1, or a ValueError that says what is wrong."""
    array = as_array(features, "features")
    if array.ndim != 2:
        raise ValueError(f"features must be (samples, channels), got shape {array.shape}")
    if array.shape[1] == 0:
        raise ValueError("features must have at least one channel, got none")
    if array.dtype.kind not in "fiub":
        raise ValueError(f"features must be real numbers, got {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError("features must be finite, got NaN or infinity")
    return array.astype(np.float64, copy=False)


def checked_statistics(mean: ArrayLike, covariance: ArrayLike, where: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d) in float64, symmetric to the last bit, or a ValueError that says what is wrong."""
    mean, covariance = as_array(mean, f"{where}mean"), as_array(covariance, f"{where}covariance")
    if mean.ndim != 1 or mean.size == 0 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{where}mean and covariance must be (d,) and (d, d), got {mean.shape} and {covariance.shape}")
    for name, array in (("mean", mean), ("covariance", covariance)):
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{where}{name} must be real numbers, got {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"{where}{name} must be finite, got NaN or infinity")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    difference = np.abs(covariance - covariance.T).max()
    if difference > ASYMMETRY * np.abs(covariance).max():
        raise ValueError(f"{where}covariance must be symmetric, got entries that differ by {difference:g}")
    return mean, (covariance + covariance.T) / 2


def covariance_root(covariance: np.ndarray) -> np.ndarray:
    """R with R^T R a checked covariance, (rank, d).

    Raises:
        ValueError: An eigenvalue that is negative beyond rounding.
    """
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -NEGATIVE * np.abs(values).max():
        raise ValueError(f"covariance must have no negative eigenvalues, got {values[0]:g}")
    # What rounding leaves of a zero would weigh as its square root.
    used = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return np.sqrt(values[used])[:, None] * vectors[:, used].T
