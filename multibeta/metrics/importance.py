"""How much every code matters for predicting every factor: disentanglement, completeness, informativeness."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from multibeta.files import expanded, read_arrays, say_once, write_atomically
from multibeta.metrics.checks import ArrayLike, as_array, as_codes, as_factors, as_integer
from multibeta.progress import progress_bar
from multibeta.seeds import as_short_seed

Fit = tuple[np.ndarray, npt.ArrayLike, npt.ArrayLike]  # importance of each code, (K,), accuracy in training and in the test

ROUNDS = 100  # of boosting, scikit-learn's default
FLOOR = 1e-11  # added to importances under the logarithm, as published


def dci_from_importance(importance: ArrayLike) -> tuple[float, float]:
    """Disentanglement and completeness (Eastwood and Williams 2018) with the weights of Locatello et al. 2019.

    Disentanglement is high where a code matters for one factor only, completeness where a factor needs one code only.
    Rows and columns count as much as they matter; if nothing matters, both are 0. Under the logarithm 1e-11 is added, as
    published, so that importances should not be as small.

    Args:
        importance: (K, F), not negative, at least two codes and two factors.

    Returns:
        (disentanglement, completeness), in [0, 1] up to 1e-9.

    Raises:
        ValueError: a single code or factor (the entropy has base 1), negative values or NaN.
    """
    importance = as_array(importance, "importance")
    if importance.dtype.kind not in "fiub":
        raise ValueError(f"importance must be real numbers, got {importance.dtype}")
    importance = importance.astype(np.float64)
    if importance.ndim != 2 or min(importance.shape) < 2:
        raise ValueError(f"importance must be (codes, factors), at least two of each, got shape {importance.shape}")
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise ValueError("importance must be finite and not negative")
    return _concentration(importance), _concentration(importance.T)


def dci_from_codes(
    train_codes: ArrayLike,
    train_factors: ArrayLike,
    test_codes: ArrayLike,
    test_factors: ArrayLike,
    seed: int = 0,
    *,
    num_threads: int | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """DCI (Eastwood and Williams 2018) by gradient boosted trees, as Locatello et al. 2019 compute it.

    One `GradientBoostingClassifier` of scikit-learn with its defaults per factor gives the importance of the codes. "DCI" in
    one number, as in MultiBeta Table 2, is the disentanglement.

    Args:
        train_codes, test_codes: (N, K) and (M, K), real, K at least 2: 10,000 and 5,000 in the published protocol.
        train_factors, test_factors: (N, F) and (M, F), integers, F at least 2.
        seed: Breaks the ties between equally good splits, which is all that is random; any integer.
        num_threads: Trees grown at a time, of several classes and factors; by default as many as torch has threads. The result
            does not depend on it.
        cache: Folder that keeps the trees' verdict per factor, so that a repeated or interrupted call goes on from there.
        progress: Show a bar over the boosting rounds.

    Returns:
        A dictionary: `disentanglement`, `completeness`, and `informativeness_train` and `informativeness_test`, the
        accuracies averaged over factors.

    Raises:
        ValueError: a single code or factor, a factor that is constant in training, NaN, shapes that do not belong together, or a
            seed that is none.
    """
    arrays = (train_codes, train_factors, test_codes, test_factors)
    return dci_summary(*boosted_importance(*arrays, seed, num_threads=num_threads, cache=cache, progress=progress))


def dci_summary(importance: np.ndarray, train_accuracy: np.ndarray, test_accuracy: np.ndarray) -> dict[str, float]:
    """The four numbers of `dci_from_codes` from what `boosted_importance` returns."""
    disentanglement, completeness = dci_from_importance(importance)
    return {
        "disentanglement": disentanglement,
        "completeness": completeness,
        "informativeness_train": float(train_accuracy.mean()),
        "informativeness_test": float(test_accuracy.mean()),
    }


def boosted_importance(
    train_codes: ArrayLike,
    train_factors: ArrayLike,
    test_codes: ArrayLike,
    test_factors: ArrayLike,
    seed: int = 0,
    *,
    num_threads: int | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Importance of every code for every factor by gradient boosted trees; arguments as of `dci_from_codes`.

    Returns:
        (importance, train_accuracy, test_accuracy): (K, F), columns that sum to 1 unless no split helps, (F,) and (F,).
    """
    from multibeta.metrics.boosting import parallel_equals_plain  # imports scikit-learn: only who asks for DCI waits for it

    seed = as_short_seed(seed)
    num_threads = torch.get_num_threads() if num_threads is None else as_integer(num_threads, "num_threads", 1)
    train_codes, test_codes = as_codes(train_codes), as_codes(test_codes)
    train_factors = as_factors(train_factors, len(train_codes))
    test_factors = as_factors(test_factors, len(test_codes), constant=True)
    for what, train, test in (("codes", train_codes, test_codes), ("factors", train_factors, test_factors)):
        if train.shape[1] != test.shape[1]:
            raise ValueError(f"training and test need the same {what}, got {train.shape[1]} and {test.shape[1]}")
        if train.shape[1] < 2:
            raise ValueError(f"DCI needs at least 2 {what}, got 1")
    # The trees split float32, and round to it themselves otherwise.
    train_codes, test_codes = train_codes.astype(np.float32), test_codes.astype(np.float32)

    stop = threading.Event()
    num_factors = train_factors.shape[1]
    columns = list(zip(train_factors.T, test_factors.T, strict=True))
    trees = [_trees_per_round(column) for column in train_factors.T]
    # Longest first, so that no thread begins the factor of 183 values when the others are done.
    order = sorted(range(num_factors), key=lambda factor: -trees[factor])
    # Factors wait for their trees in threads of their own: in the trees' threads they could take all and wait forever.
    with (
        progress_bar(total=ROUNDS * sum(trees), desc="boosting", unit="tree", disable=not progress) as bar,
        ThreadPoolExecutor(num_threads) as tree_pool,
        ThreadPoolExecutor(min(num_factors, num_threads)) as factor_pool,
    ):
        settings = seed, bar, stop, tree_pool if num_threads > 1 and parallel_equals_plain() else None
        tasks = {
            factor: factor_pool.submit(_cached_fit, cache, train_codes, test_codes, *columns[factor], trees[factor], *settings)
            for factor in order
        }
        try:
            fits = [tasks[factor].result() for factor in range(num_factors)]
        except BaseException:  # Ctrl-C as well: without it the pools would wait for every fit
            stop.set()
            for pool in (factor_pool, tree_pool):
                pool.shutdown(wait=False, cancel_futures=True)
            raise
    importances, train_accuracies, test_accuracies = zip(*fits, strict=True)
    return np.stack(importances, 1), np.array(train_accuracies), np.array(test_accuracies)


def _concentration(importance: np.ndarray) -> float:
    """One minus the entropy of every row in units of its maximum, averaged with the rows' sums as weights."""
    shares = importance + FLOOR
    shares = shares / shares.sum(1, keepdims=True)
    entropy = -(shares * np.log(shares)).sum(1) / np.log(importance.shape[1])
    weights = importance.sum(1) if importance.any() else np.ones(len(importance))
    return float((weights / weights.sum()) @ (1 - entropy))


def _trees_per_round(factor: np.ndarray) -> int:
    num_values = len(np.unique(factor))
    return 1 if num_values == 2 else num_values


def _cached_fit(
    cache: str | Path | None,
    train_codes: np.ndarray,
    test_codes: np.ndarray,
    train_factor: np.ndarray,
    test_factor: np.ndarray,
    trees: int,
    seed: int,
    bar: tqdm,
    stop: threading.Event,
    tree_pool: ThreadPoolExecutor | None,
) -> Fit:
    """`_fit` of one factor, read from the folder `cache` where it is known."""
    path = cache and expanded(cache) / f"dci-{_digest(train_codes, train_factor, test_codes, test_factor, seed)}.npz"
    if path and path.is_file():
        with contextlib.suppress(ValueError, KeyError):  # a damaged file is measured and written anew
            stored = read_arrays(path)
            fit = stored["importance"], stored["train_accuracy"], stored["test_accuracy"]
            bar.update(ROUNDS * trees)
            return fit
    fit = _fit(train_codes, test_codes, train_factor, test_factor, trees, seed, bar, stop, tree_pool)
    if path and not stop.is_set():
        arrays = {"importance": fit[0], "train_accuracy": fit[1], "test_accuracy": fit[2]}
        try:
            write_atomically(path, lambda file: np.savez(file, **arrays))
        except OSError as error:
            say_once(f"fits of DCI are not kept in {path.parent}: {error}")
    return fit


def _fit(
    train_codes: np.ndarray,
    test_codes: np.ndarray,
    train_factor: np.ndarray,
    test_factor: np.ndarray,
    trees: int,
    seed: int,
    bar: tqdm,
    stop: threading.Event,
    tree_pool: ThreadPoolExecutor | None,
) -> Fit:
    """Importance of the codes for one factor, (K,), and the accuracy on both sets."""
    from multibeta.metrics.boosting import boosted_trees

    def after_round(*_: object) -> bool:
        bar.update(trees)
        return stop.is_set()

    classifier = boosted_trees(seed, tree_pool).fit(train_codes, train_factor, monitor=after_round)
    accuracies = [
        np.mean(classifier.predict(codes) == factor) for codes, factor in ((train_codes, train_factor), (test_codes, test_factor))
    ]
    return np.abs(classifier.feature_importances_), *accuracies


def _digest(*parts: npt.ArrayLike) -> str:
    """Name of a fit: whatever it depends on, scikit-learn included."""
    import sklearn

    digest = hashlib.sha256(f"{sklearn.__version__} {ROUNDS}".encode())
    for part in parts:
        array = np.ascontiguousarray(part)
        digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()[:24]
