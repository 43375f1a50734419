"""How well single latents detect binary attributes: total AUROC difference (TAD)."""

from __future__ import annotations

import math
import warnings
from numbers import Real
from typing import Any

import numpy as np

from multibeta.metrics.checks import ArrayLike, as_attributes, as_codes
from multibeta.weights import shorten

MIN_AUROC = 0.75  # an attribute is captured from here on
MAX_REDUNDANCY = 0.2  # and up to here
MIN_CELLS = 20  # between thresholds: fewer that are occupied make the grid unreliable


def tad_from_codes(
    codes: ArrayLike, attributes: ArrayLike, auroc: str = "grid", step: float = 0.01, *, min_range: float = 0.2
) -> dict[str, Any]:
    """Total AUROC difference (Yeats et al. 2022): how much better the best latent detects an attribute than the second.

    An attribute is captured when some latent detects it, in either direction, with AUROC of at least 0.75, and no other
    attribute tells more than a fifth of it. TAD sums the differences of the captured attributes, so it grows with
    their number: report both.

    Paper note: `auroc="grid"` is the published estimate from thresholds `step` of the range apart, whose rectangles count
    ties as right: one outlier can gather everybody in a few cells, and useless latents then look perfect. The published
    code has step 0.01, another in use 0.1, which lowers TAD by 17 to 30 %. `auroc="exact"` has neither flaw, see
    `test_an_outlier_deceives_the_grid_and_not_the_exact_area`.

    Args:
        codes: (N, L), real, L at least 2; 1000 images in the published protocol.
        attributes: (N, A), 0 or 1. One that is constant is left out with a warning.
        auroc: "grid" or "exact".
        step: Distance of the grid's thresholds as part of a latent's range; 1 / step is an integer.
        min_range: A latent that varies by no more is skipped: it gets 0.5. TAD thus depends on the scale of the codes.

    Returns:
        A dictionary: `tad`; `captured`, indices of the captured attributes; `difference`, (A,), between the best two latents;
        `areas`, (A, L), the AUROC; `redundancy`, (A,), the share of an attribute's entropy that the most similar other one
        tells; all NaN where an attribute is constant; `positives`, (A,), the images with each attribute, of which a score lets
        chance come near the 0.75; `skipped`, the number of latents that vary too little; and what the number depends on: `auroc`,
        `step` (None if exact), `min_range`, `num_images`, `num_latents`.

    Raises:
        ValueError: fewer than two latents, no attribute that varies, NaN, or arrays of other shapes and types.
    """
    codes = as_codes(codes)
    attributes = as_attributes(attributes, len(codes))
    if codes.shape[1] < 2:
        raise ValueError("a difference needs at least 2 latents, got 1")
    check_thresholds(auroc, step, min_range)

    varied = np.flatnonzero(attributes.any(0) & ~attributes.all(0))
    if len(varied) == 0:
        raise ValueError("every attribute is constant: there is nothing to detect")
    if len(varied) < attributes.shape[1]:
        constant = np.setdiff1d(np.arange(attributes.shape[1]), varied).tolist()
        warnings.warn(f"constant attributes are left out: {shorten(constant, 10)}", stacklevel=2)
    used = np.flatnonzero(codes.max(0) - codes.min(0) > min_range)
    if len(used) == 0:
        warnings.warn(f"no latent varies by more than {min_range}: all are skipped and TAD is 0", stacklevel=2)

    areas = np.full((attributes.shape[1], codes.shape[1]), np.nan)
    areas[varied] = 0.5
    coarse = []
    for latent in used:
        order = np.argsort(codes[:, latent], kind="stable")
        code, detected = codes[order, latent], attributes[np.ix_(order, varied)]
        if auroc == "exact":
            areas[varied, latent] = exact_auroc(code, detected)
        else:
            below = np.searchsorted(code, thresholds(code, step))
            areas[varied, latent] = grid_auroc(below, detected)
            if len(np.unique(below)) < min(MIN_CELLS, 1 / step):
                coarse.append(int(latent))
    if coarse:
        warnings.warn(
            f"latents {shorten(coarse, 10)} fall into fewer than {MIN_CELLS} of the cells between thresholds, where the grid "
            'takes ties for right: compare auroc="exact"',
            stacklevel=2,
        )

    redundancy = np.full(attributes.shape[1], np.nan)
    redundancy[varied] = attribute_redundancy(attributes[:, varied])
    second, first = np.sort(areas, axis=1)[:, -2:].T
    difference = first - second
    captured = np.flatnonzero((first >= MIN_AUROC) & (redundancy <= MAX_REDUNDANCY))  # NaN compares false
    return {
        "tad": float(difference[captured].sum()),
        "captured": captured.tolist(),
        "difference": difference,
        "areas": areas,
        "redundancy": redundancy,
        "positives": attributes.sum(0),
        "skipped": codes.shape[1] - len(used),
        "auroc": auroc,
        "step": step if auroc == "grid" else None,
        "min_range": min_range,
        "num_images": len(codes),
        "num_latents": codes.shape[1],
    }


def check_auroc(auroc: str) -> None:
    """`ValueError` unless this is a way to the area that `tad_from_codes` has."""
    if auroc not in ("grid", "exact"):
        raise ValueError(f'auroc must be "grid" or "exact", got {auroc!r}')


def check_thresholds(auroc: str, step: float, min_range: float) -> None:
    """`ValueError` unless these are options of `tad_from_codes`."""
    check_auroc(auroc)
    if not (isinstance(step, Real) and 0 < step <= 0.5) or abs(1 / step - round(1 / step)) > 1e-6:
        raise ValueError(f"step must divide 1 into at least 2 equal parts, got {step}")
    if not (isinstance(min_range, Real) and 0 <= min_range < math.inf):
        raise ValueError(f"min_range must be a finite number that is not negative, got {min_range}")


def attribute_redundancy(attributes: np.ndarray) -> np.ndarray:
    """Share of every attribute's entropy that the most similar other attribute tells, (A,), for bool (N, A) that vary."""
    yes = attributes.astype(np.float64)
    no = 1 - yes
    joint = np.stack([first.T @ second for first in (yes, no) for second in (yes, no)]) / len(yes)
    marginal = np.stack([yes.mean(0), no.mean(0)])
    independent = np.stack([np.outer(first, second) for first in marginal for second in marginal])
    information = (joint * np.log(np.where(joint > 0, joint / independent, 1))).sum(0)
    entropy = information.diagonal().copy()
    np.fill_diagonal(information, 0)
    return 1 - (entropy - information.max(1)) / entropy


def thresholds(code: np.ndarray, step: float) -> np.ndarray:
    """Thresholds over the range of a sorted latent, both ends included, in its own precision."""
    fractions = np.linspace(0, 1, round(1 / step) + 1).astype(code.dtype)
    return fractions * (code[-1] - code[0]) + code[0]


def grid_auroc(below: np.ndarray, attributes: np.ndarray) -> np.ndarray:
    """Area under the curve through the thresholds, by rectangles under its right ends, the better direction, (A,).

    Args:
        below: (T,), how many of the sorted samples lie below each ascending threshold; the detector says yes to the others.
        attributes: bool (N, A) in the samples' order.
    """
    positives = np.concatenate([np.zeros((1, attributes.shape[1]), dtype=np.int64), np.cumsum(attributes, axis=0)])
    missed = positives[below]
    hits = 1 - missed / positives[-1]
    alarms = 1 - (below[:, None] - missed) / (len(attributes) - positives[-1])
    widths = alarms[:-1] - alarms[1:]
    above_is_yes = (hits[:-1] * widths).sum(0)
    below_is_yes = ((1 - hits[1:]) * widths).sum(0)
    return np.maximum(above_is_yes, below_is_yes)


def exact_auroc(code: np.ndarray, attributes: np.ndarray) -> np.ndarray:
    """Probability that a positive sample lies above a negative one, ties by half, the better direction, (A,).

    Args:
        code: (N,), sorted.
        attributes: bool (N, A) in its order.
    """
    ranks = (np.searchsorted(code, code, "left") + np.searchsorted(code, code, "right") + 1) / 2
    positives = attributes.sum(0)
    pairs = ranks @ attributes - positives * (positives + 1) / 2
    area = pairs / (positives * (len(code) - positives))
    return np.maximum(area, 1 - area)
