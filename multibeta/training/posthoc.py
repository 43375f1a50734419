"""Averages of the weights whose length is chosen after the training: the post-hoc EMA of EDM2 (Karras et al. 2024, section 3).

Tracked are averages of the weights theta(s) by a power function of time, which forget in proportion to how long the training is,

    p(s; t) = (g + 1) s^g / t^(g + 1),  0 <= s <= t,    of relative width sigma_rel = sqrt((g + 1) / (g + 3)) / (g + 2).

What is written down of them on the way combines to the average of nearly any other width, by least squares of the profiles.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from multibeta import checkpoints, distribution
from multibeta.checks import check_number
from multibeta.training.options import LARGEST_WIDTH
from multibeta.training.parallel import assign, whole

logger = logging.getLogger(__name__)

SNAPSHOTS = "snapshots"  # in the folder of a training
REST = "rest"  # of a snapshot: what is not averaged, such as statistics of batches
POOR = 0.05  # of a profile's error, from which on it is worth a word

Array = NDArray[np.float64]


def exponent_of(sigma_rel: float) -> float:
    """g of the profile of relative width `sigma_rel`, in (0, 0.28]: EDM2 Algorithm 2.

    It is the largest root of g^3 + 7 g^2 + (16 - 1 / sigma_rel^2) g + 12 - 1 / sigma_rel^2.
    """
    check_number("sigma_rel", sigma_rel, above=0, most=LARGEST_WIDTH)
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def products(times: Array, exponents: Array, other_times: Array, other_exponents: Array) -> Array:
    """Inner products of profiles (N,) with others (M,), (N, M) float64: the integral of p p' up to the earlier of their times."""
    time, other = times[:, None], other_times[None]
    g, h = exponents[:, None], other_exponents[None]
    earlier, later, of_later = np.minimum(time, other), np.maximum(time, other), np.where(time < other, h, g)
    return (g + 1) * (h + 1) / (g + h + 1) * (earlier / later) ** of_later / later


def combination(times: Sequence[float], widths: Sequence[float], time: float, sigma_rel: float) -> tuple[Array, float]:
    """Weights (N,) that combine averages at `times` of `widths` to one at `time` of width `sigma_rel`: EDM2 Algorithm 3.

    Returns:
        (weights, error): float64; the error is the L2 distance of the profiles as a share of the wanted one's size.
    """
    at, exponents = np.array(times, dtype=np.float64), np.array([exponent_of(width) for width in widths])
    wanted = np.array([time], dtype=np.float64), np.array([exponent_of(sigma_rel)])
    onto = products(at, exponents, *wanted)[:, 0]
    size = float(products(*wanted, *wanted)[0, 0])
    scale = np.sqrt(np.diagonal(gram := products(at, exponents, at, exponents)))  # profiles of early averages are narrow and high
    weights = np.linalg.lstsq(gram / np.outer(scale, scale), onto / scale, rcond=None)[0] / scale
    missed = size - 2 * float(weights @ onto) + float(weights @ gram @ weights)
    return weights, float(np.sqrt(max(missed, 0.0) / size))


class PostHocAverages:
    """Averages of the trainable parameters by power functions, and snapshots of them in the folder of a training.

    Args:
        module: Whose parameters learn.
        widths: sigma_rel of each average; of none nothing is done.
        folder: Of the training; receives snapshots/, whole float32 tensors: rounding to 16 bits would be multiplied where weights
            of `combination` are large and cancel, as they are for averages shorter than those that are kept.

    Attributes:
        state: The averages, by name of the parameter and width.
    """

    def __init__(self, module: nn.Module, widths: Sequence[float], folder: Path):
        self.module, self.folder = module, folder / SNAPSHOTS
        self.exponents = {str(float(width)): exponent_of(width) for width in widths}
        self.weights = {name: value for name, value in module.named_parameters() if value.requires_grad}
        slots = {name: {key: value.detach().clone() for key in self.exponents} for name, value in self.weights.items()}
        self.state: dict[str, Tensor] = checkpoints.flatten(slots)
        self.time = 0  # steps that they hold

    def update(self, step: int) -> None:
        """After the update that follows `step` finished ones: average <- d average + (1 - d) weights, d = (time / t)^(g + 1).

        t = step + 1, and time is t - 1 but after steps that were left out. The weights count for all of (time, t], exactly.
        """
        time, self.time = self.time, step + 1
        for key, exponent in self.exponents.items():
            averages = [self.state[f"{name}/{key}"] for name in self.weights]
            get_ema_multi_avg_fn((time / self.time) ** (exponent + 1))(averages, list(self.weights.values()), step)

    def save(self, step: int) -> None:
        """Write the snapshot after `step` updates."""
        if not self.exponents:
            return
        weights = {key: whole({name: self.state[f"{name}/{key}"] for name in self.weights}) for key in self.exponents}
        weights[REST] = whole({name: value for name, value in self.module.state_dict().items() if name not in self.weights})
        config = {"step": self.time, "widths": [float(key) for key in self.exponents]}
        distribution.by_first(lambda: checkpoints.save_folder(self.folder / f"{step:09d}", weights, config))

    def restore(self, step: int, state: Mapping[str, Tensor] | None = None, time: int | None = None) -> None:
        """Begin, or go on after `step` steps with the `state` and `time` that were saved there; later snapshots go."""
        self.time = step if time is None else time
        for name, value in (state or {}).items():
            assign(self.state[name], value)
        if self.exponents:
            distribution.by_first(lambda: forget(self.folder, step))


def forget(folder: Path, step: int) -> None:
    """Remove the snapshots after a step, whose updates are made again."""
    for path in snapshots(folder):
        if int(path.name) > step:
            shutil.rmtree(path)


def snapshots(folder: Path) -> list[Path]:
    """The folders of whole snapshots, the earliest first."""
    return sorted(path for path in folder.glob("*") if path.name.isdecimal() and checkpoints.exists(path))


def kept_snapshots(folder: Path) -> list[Path]:
    """The snapshots of a training, the earliest first; `FileNotFoundError` where it has none."""
    if not (found := snapshots(folder / SNAPSHOTS)):
        raise FileNotFoundError(f"{folder / SNAPSHOTS} holds no snapshots: train with posthoc_ema, such as (0.05, 0.1)")
    return found


def reconstruct_ema(folder: str | Path, sigma_rel: float) -> dict[str, Tensor]:
    """The state dict of the module of a training with an average of any width, as it would be had that been tracked.

    Widths between those that were tracked are met best, wider ones well: the log says where the profile is not. It is the average
    at the last snapshot, whatever `keep_best` took.

    Args:
        folder: Of a training with `TrainingOptions.posthoc_ema`.
        sigma_rel: Relative width, in (0, 0.28]: the average reaches back over about this share of the training.

    Returns:
        Name to tensor, on the CPU.

    Raises:
        FileNotFoundError: There are no snapshots.
        ValueError: One is damaged, or the width is out of range.
    """
    exponent_of(sigma_rel)
    found = kept_snapshots(Path(folder))
    configs = {path: checkpoints.load_config(path) for path in found}
    for path, config in configs.items():
        checkpoints.require_entries(path, {}, config, (), {"step": int, "widths": list})
    kept = [(path, float(width)) for path in found for width in configs[path]["widths"]]
    last = configs[found[-1]]["step"]
    weights, error = combination([configs[path]["step"] for path, _ in kept], [width for _, width in kept], last, sigma_rel)
    if error > POOR:
        logger.warning(
            "the profile of width %g is met with an error of %.0f%% by %d snapshots of widths %s: nearer to these it is smaller",
            *(sigma_rel, 100 * error, len(found), configs[found[-1]]["widths"]),
        )
    share = dict(zip(kept, weights.tolist(), strict=True))
    total: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    for path in found:
        state, _ = checkpoints.load_folder(path)
        for width in configs[path]["widths"]:
            for name, value in state[str(width)].items():
                total[name] = total.get(name, 0.0) + share[path, width] * value.double()
    averaged = state[str(configs[found[-1]]["widths"][0])]
    return {**state[REST], **{name: total[name].to(averaged[name].dtype) for name in averaged}}
