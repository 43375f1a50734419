"""What codes know of classes: what a linear probe, and their nearest neighbours, tell of them on other images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from multibeta.metrics.checks import ArrayLike, as_array, as_codes, as_integer
from multibeta.seeds import as_short_seed

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse strength of the penalty, C of scikit-learn
VALIDATION = 5  # one image in so many of each class chooses it
ITERATIONS = 500  # of L-BFGS, at most
NEIGHBOURS = (1, 5)


def linear_probe(
    train_codes: ArrayLike, train_labels: ArrayLike, test_codes: ArrayLike, test_labels: ArrayLike, seed: int = 0
) -> dict[str, float]:
    """How well a linear classifier of codes tells classes (Alain and Bengio 2016).

    Multinomial logistic regression with an L2 penalty on codes standardised by the training codes: `LogisticRegression` of
    scikit-learn, at most 500 iterations. A fifth of the training codes of each class, rounded down but at least one of two or
    more, chooses its C among 0.0001, 0.001 ... 10, the smallest of equally good ones; then it learns from all of them.

    Args:
        train_codes, test_codes: (N, K) and (M, K), real.
        train_labels, test_labels: (N,) and (M,), integers; two classes or more in training, one of two codes or more.
        seed: Chooses the fifth; any integer.

    Returns:
        A dictionary: `accuracy`; `balanced_accuracy`, its mean over the classes of the test; `strength`, the C chosen.

    Raises:
        ValueError: NaN, shapes that do not belong together, labels that are no integers, too few classes or codes.
    """
    train_codes, train_labels, test_codes, test_labels = check_labelled(train_codes, train_labels, test_codes, test_labels)
    chosen_by = _validation(train_labels, np.random.RandomState(as_short_seed(seed)))
    if not chosen_by.any():
        raise ValueError("a linear probe needs a class of at least 2 training codes, by which its penalty is chosen")
    held_out, labels = train_codes[chosen_by], train_labels[chosen_by]
    learning = train_codes[~chosen_by], train_labels[~chosen_by]
    found = [np.mean(_fitted(*learning, strength).predict(held_out) == labels) for strength in STRENGTHS]
    strength = STRENGTHS[int(np.argmax(found))]
    predicted = _fitted(train_codes, train_labels, strength).predict(test_codes)
    return {**accuracies(predicted, test_labels), "strength": strength}


def nearest_neighbours(
    train_codes: ArrayLike,
    train_labels: ArrayLike,
    test_codes: ArrayLike,
    test_labels: ArrayLike,
    neighbours: Sequence[int] = NEIGHBOURS,
) -> dict[int, float]:
    """How often the nearest training codes are of a code's own class: accuracy of k-nearest-neighbour classification.

    Distances are Euclidean, between codes as they are: no code is scaled. Each neighbour has one vote, and the smallest of the
    labels with most votes wins: `KNeighborsClassifier` of scikit-learn.

    Args:
        train_codes, train_labels, test_codes, test_labels: As of `linear_probe`.
        neighbours: Numbers k of neighbours that vote, each at most N.

    Returns:
        Accuracy for each k.

    Raises:
        ValueError: As `linear_probe`, and for a k that there are not so many training codes for.
    """
    from sklearn.neighbors import KNeighborsClassifier

    train_codes, train_labels, test_codes, test_labels = check_labelled(train_codes, train_labels, test_codes, test_labels)
    neighbours = [as_integer(k, "neighbours", 1, len(train_codes)) for k in neighbours]
    classifier = KNeighborsClassifier(algorithm="brute").fit(train_codes, train_labels)
    return {k: float(classifier.set_params(n_neighbors=k).score(test_codes, test_labels)) for k in neighbours}


def check_labelled(
    train_codes: ArrayLike, train_labels: ArrayLike, test_codes: ArrayLike, test_labels: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The arguments of `linear_probe` as arrays; the `ValueError` that it raises where they are none."""
    train_codes, test_codes = as_codes(train_codes), as_codes(test_codes)
    if train_codes.shape[1] != test_codes.shape[1]:
        raise ValueError(f"training and test need the same codes, got {train_codes.shape[1]} and {test_codes.shape[1]}")
    train_labels, test_labels = as_labels(train_labels, len(train_codes)), as_labels(test_labels, len(test_codes))
    if len(np.unique(train_labels)) < 2:
        raise ValueError(f"at least two classes are needed in training, got the label {train_labels[0]} alone")
    return train_codes, train_labels, test_codes, test_labels


def as_labels(labels: ArrayLike, num_samples: int) -> np.ndarray:
    """Integer labels, (N,) int64, one for each of the codes; `ValueError` for another shape, length or type."""
    labels = as_array(labels, "labels")
    if labels.shape != (num_samples,):
        raise ValueError(f"labels must be one for each of {num_samples} codes, got shape {labels.shape}")
    if labels.dtype.kind not in "iub":
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    return labels.astype(np.int64)


def accuracies(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`accuracy` of predicted labels (N,), and `balanced_accuracy`, the mean over the classes that `labels` have."""
    right = predicted == labels
    of_classes = [right[labels == label].mean() for label in np.unique(labels)]
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(np.mean(of_classes))}


def _validation(labels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Which codes choose the penalty, bool (N,): of each class that has two or more a fifth, rounded down, at least one."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        chosen[rows[: max(len(rows) // VALIDATION, 1) if len(rows) > 1 else 0]] = True
    return chosen


def _fitted(codes: np.ndarray, labels: np.ndarray, strength: float) -> Pipeline:
    """The probe that learned from these codes."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that was stopped early is one of a stronger penalty
        return probe.fit(codes, labels)
