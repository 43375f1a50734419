"""scikit-learn's boosted trees with the trees of a round, one per class, grown in parallel; imported by who asks for DCI."""

from __future__ import annotations

import copy
import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from sklearn.ensemble import GradientBoostingClassifier

logger = logging.getLogger("multibeta")


class ParallelBoosting(GradientBoostingClassifier):
    """`GradientBoostingClassifier` that grows the trees of a round in the threads of `pool`, equal to it bit for bit.

    The trees of a round share their gradient and write to a column each. All that ties them together is the random state,
    from which every tree draws one number in turn, so that each gets a copy of the state as it would find it. A tree is
    grown by scikit-learn's own round, for a classifier of one column.
    """

    pool: ThreadPoolExecutor | None = None
    _loss: Any

    def _fit_stage(
        self,
        i: int,
        X: np.ndarray,
        y: np.ndarray,
        raw_predictions: np.ndarray,
        sample_weight: np.ndarray,
        sample_mask: np.ndarray,
        random_state: np.random.RandomState,
        **sparse: Any,
    ) -> np.ndarray:
        if self.n_trees_per_iteration_ == 1 or self.pool is None:
            return super()._fit_stage(i, X, y, raw_predictions, sample_weight, sample_mask, random_state, **sparse)
        gradient = self._loss.gradient(y_true=y, raw_prediction=raw_predictions)
        states = []
        for _ in range(self.n_trees_per_iteration_):
            states.append(copy.deepcopy(random_state))
            random_state.randint(0, 2**31 - 1)  # what a tree draws

        def grow(label: int) -> None:
            column = slice(label, label + 1)
            single = copy.copy(self)
            single.n_trees_per_iteration_ = 1
            single.estimators_ = self.estimators_[:, column]
            single._loss = copy.copy(self._loss)
            single._loss.gradient = lambda **_: gradient[:, column]
            others = (y != label).astype(y.dtype)  # the class of the only column is number 0
            arguments = others, raw_predictions[:, column], sample_weight, sample_mask, states[label]
            GradientBoostingClassifier._fit_stage(single, i, X, *arguments, **sparse)

        list(self.pool.map(grow, range(self.n_trees_per_iteration_)))
        return raw_predictions


def boosted_trees(seed: int, pool: ThreadPoolExecutor | None = None) -> GradientBoostingClassifier:
    """An unfitted classifier with scikit-learn's defaults; with a `pool` of threads the trees of a round grow in it."""
    if pool is None:
        return GradientBoostingClassifier(random_state=seed)
    classifier = ParallelBoosting(random_state=seed)
    classifier.pool = pool
    return classifier


@functools.cache
def parallel_equals_plain() -> bool:
    """Whether the installed scikit-learn is one that `ParallelBoosting`, which rests on its private parts, agrees with.

    A small problem tells: its codes come in pairs of equals, between which only the random state decides.
    """
    rng = np.random.RandomState(0)
    codes = np.repeat(rng.normal(size=(90, 4)).round(1), 2, axis=1).astype(np.float32)
    labels = rng.randint(4, size=90)
    plain = GradientBoostingClassifier(n_estimators=5, random_state=1).fit(codes, labels)
    parallel = ParallelBoosting(n_estimators=5, random_state=1)
    try:
        with ThreadPoolExecutor(2) as parallel.pool:
            parallel.fit(codes, labels)
        equal = np.array_equal(plain.feature_importances_, parallel.feature_importances_)
        equal = equal and np.array_equal(plain.decision_function(codes), parallel.decision_function(codes))
        reason = "its trees differ"
    except Exception as error:  # private parts may change in any way
        equal, reason = False, f"{type(error).__name__}: {error}"
    if not equal:
        logger.warning("DCI fits whole factors in parallel, not single trees: this scikit-learn is another (%s)", reason)
    return equal
