"""How close generated images are to real ones: functions of features, whatever network made them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from multibeta.metrics.checks import ArrayLike, as_images, as_integer
from multibeta.metrics.statistics import as_features, checked_statistics, covariance_root

LEAST_ENERGY = 1e-12  # of images in [-1, 1]: less is none
PAIRS_AT_ONCE = 2**24  # 128 MiB of float64 distances


def frechet_distance(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, Eq. 6).

    With Inception features this is FID. It is biased upwards in small sets: state their sizes with it.

    Args:
        features_a, features_b: (N, d) arrays or tensors, N >= 2 each and not necessarily equal; N < d is allowed.

    Returns:
        |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), covariances with N - 1, all in float64.

    Raises:
        ValueError: Different widths, fewer than two samples, or values that are not finite.
    """
    features_a, features_b = _checked(features_a, features_b, minimum=2)
    mean_a, mean_b = features_a.mean(0), features_b.mean(0)
    return _frechet(mean_a, _scatter_root(features_a - mean_a), mean_b, _scatter_root(features_b - mean_b))


def frechet_distance_from_statistics(
    mean_a: ArrayLike, covariance_a: ArrayLike, mean_b: ArrayLike, covariance_b: ArrayLike
) -> float:
    """Fréchet distance of two Gaussians, as `frechet_distance` of features with these statistics.

    For sets too large to keep (`FeatureStatistics`) and for published reference statistics (`load_statistics`).

    Args:
        mean_a, mean_b: (d,).
        covariance_a, covariance_b: (d, d), symmetric and positive semidefinite up to float32 rounding; singular is allowed.

    Raises:
        ValueError: Shapes that do not fit, values that are not finite, or matrices that are no covariances.
    """
    mean_a, covariance_a = checked_statistics(mean_a, covariance_a)
    mean_b, covariance_b = checked_statistics(mean_b, covariance_b)
    if len(mean_a) != len(mean_b):
        raise ValueError(f"statistics must be equally wide, got {len(mean_a)} and {len(mean_b)}")
    return _frechet(mean_a, covariance_root(covariance_a), mean_b, covariance_root(covariance_b))


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3, *, device: str | torch.device = "cpu") -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, Eq. 1 and 2).

    A sample counts when it lies within the distance from some sample of the other set to that one's k-th neighbour in
    its own set, borders included. Both measures lie in [0, 1] and grow with k; compare them at equal k and set sizes.

    Args:
        real, fake: Features, (N, d) and (M, d), with N, M > k.
        k: Neighbour that sets the radius of a sample's ball, at least 1.
        device: Where the distances are computed, in float64 and a block of pairs at a time.

    Returns:
        (precision, recall): the share of `fake` in a ball of `real`, and of `real` in a ball of `fake`.

    Raises:
        ValueError: Different widths, no more than k samples, or values that are not finite.
    """
    k = as_integer(k, "k", 1)
    real, fake = _checked(real, fake, minimum=k + 1)
    # Distances do not change, but far from the origin they would be small differences of large products.
    center = np.concatenate([real, fake]).mean(0)
    real, fake = (torch.from_numpy(features - center).to(device) for features in (real, fake))
    real_radii, fake_radii = _squared_radii(real, k), _squared_radii(fake, k)
    recalled, precise = [], torch.zeros(len(fake), dtype=torch.bool, device=device)
    chunks = zip(_squared_distances(real, fake), real_radii.split(_rows_at_once(fake)), strict=True)
    for (squared, slack), radii in chunks:
        recalled.append((squared <= fake_radii + slack).any(1))
        precise |= (squared <= radii[:, None] + slack).any(0)
    return precise.double().mean().item(), torch.cat(recalled).double().mean().item()


def gradient_energy(images: Tensor | np.ndarray) -> Tensor:
    """Mean squared difference between neighbouring pixels, horizontal plus vertical: falls as images blur.

    Args:
        images: Tensor or array (N, C, H, W), floating point of any range, H and W at least 2. The energy grows with the square of
            the range: compare images of one.

    Returns:
        Tensor (N,) of the same dtype. The ratio of two means, generated over real, is 1 for images equally sharp.

    Raises:
        ValueError: Bytes or other integers, no images, another shape, NaN or infinity.
    """
    images = as_images(images, least=2, largest=math.inf)
    horizontal = images.diff(dim=3).square().mean((1, 2, 3))
    vertical = images.diff(dim=2).square().mean((1, 2, 3))
    return horizontal + vertical


def mean_energy(images: Tensor) -> float:
    """Mean `gradient_energy` of images, above zero, so that those of one colour have one too: see `sharpness`."""
    return max(float(gradient_energy(images).mean()), LEAST_ENERGY)


def sharpness(energy: float, real_energy: float) -> float:
    """Of images with this `mean_energy`, relative to real ones; NaN where these are of one colour each."""
    return energy / real_energy if real_energy > LEAST_ENERGY else math.nan


def _checked(first: ArrayLike, second: ArrayLike, minimum: int) -> tuple[np.ndarray, np.ndarray]:
    """Both sets of features as float64 (N, d) arrays, or a ValueError that says what is wrong."""
    arrays = [as_features(features) for features in (first, second)]
    for array in arrays:
        if len(array) < minimum:
            raise ValueError(f"at least {minimum} samples are needed, got {len(array)}")
    if arrays[0].shape[1] != arrays[1].shape[1]:
        raise ValueError(f"features must be equally wide, got {arrays[0].shape[1]} and {arrays[1].shape[1]}")
    return arrays[0], arrays[1]


def _frechet(mean_a: np.ndarray, root_a: np.ndarray, mean_b: np.ndarray, root_b: np.ndarray) -> float:
    """The distance from means and from roots R with R^T R = cov."""
    # The trace of the square root of the product is the nuclear norm of R_a R_b^T: no complex numbers, and singular values
    # keep the digits that square roots of the eigenvalues of its square would lose.
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * cross
    return max(float(distance), 0.0)  # equal Gaussians may round below zero


def _scatter_root(centered: np.ndarray) -> np.ndarray:
    """R with R^T R the covariance of centred (N, d) features, (min(N, d), d)."""
    scaled = centered / np.sqrt(len(centered) - 1)
    return scaled if len(scaled) <= scaled.shape[1] else np.asarray(np.linalg.qr(scaled, mode="r"))


def _squared_radii(samples: Tensor, k: int) -> Tensor:
    """Squared distance of every sample to its k-th neighbour, (N,)."""
    # The sample itself is its own zeroth neighbour.
    nearest = [squared.topk(k + 1, largest=False, sorted=False).values for squared, _ in _squared_distances(samples, samples)]
    return torch.cat(nearest).amax(1)


def _squared_distances(rows: Tensor, columns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Squared distances and a bound on their rounding error, in chunks of rows, each (n, len(columns)).

    The bound keeps borders inclusive: duplicates and exact ties count although the products round differently.
    """
    column_norms = columns.square().sum(1)
    for chunk in rows.split(_rows_at_once(columns)):
        norms = chunk.square().sum(1, keepdim=True) + column_norms
        yield torch.addmm(norms, chunk, columns.T, alpha=-2).clamp_(min=0), 1e-12 * norms


def _rows_at_once(columns: Tensor) -> int:
    return max(1, PAIRS_AT_ONCE // len(columns))
