"""What the trainings of a run wrote down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multibeta import checkpoints
from multibeta.checkpoints import naming, typed
from multibeta.recipes import FLOW_MAP, Recipe
from multibeta.training import METRICS, TrainingOptions, read_metrics

ERRORS = ("mse", "reconstruction", "noise_error", "map_error")  # positive; the loss may be the logarithm of a density


@dataclass(frozen=True)
class Log:
    """The records of one training.

    Attributes:
        name: Folder of the training in that of the run.
        records: Lines of its metrics.jsonl; what was not finite is None.
        options: None where neither a checkpoint nor a recipe says them.
        comparable_from: Losses at a smaller share of the steps mean something else.
        followed: Folders of the trainings that were begun on what this one made.
        checkpoint: The step of its last checkpoint; None without one.
    """

    name: str
    records: list[dict[str, Any]]
    options: TrainingOptions | None = None
    comparable_from: float = 0.0
    followed: tuple[str, ...] = ()
    checkpoint: int | None = None

    def series(self, name: str, *, comparable: bool = False) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(steps, values) of a scalar, float64, (N,) each, where it is a finite number; of `comparable` steps alone."""
        first = self.comparable_from * self.last_step if comparable else 0
        found = [(each["step"], each[name]) for each in self.records if each.get(name) is not None and each["step"] >= first]
        steps, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
        return steps, values

    def errors(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(steps, values) of the first of ERRORS that the training logs; of none empty."""
        name = next((name for name in ERRORS if any(name in each for each in self.records)), ERRORS[0])
        return self.series(name)

    @property
    def last_step(self) -> int:
        """Steps of the training where that is known, else those that were logged."""
        return self.options.steps if self.options else self.logged_step

    @property
    def logged_step(self) -> int:
        """The last step that was logged."""
        return max((each["step"] for each in self.records), default=0)

    @property
    def finished(self) -> bool:
        """Whether it has all its steps, as far as they are known."""
        return (self.logged_step if self.checkpoint is None else self.checkpoint) >= self.last_step


def read_log(folder: Path, name: str, options: TrainingOptions | None = None, **fields: Any) -> Log | None:
    """The log of the training in `folder`, None without one; `options` are those of its checkpoint where there is one.

    Raises:
        ValueError: A line of it is damaged.
    """
    records = read_metrics(folder)
    if not records:
        return None
    if checkpoints.exists(folder / "checkpoint"):
        config = checkpoints.load_config(folder / "checkpoint")
        with naming(folder / "checkpoint", "a training"):
            options = TrainingOptions(**typed(TrainingOptions, config.get("options", {})))
        fields["checkpoint"] = config.get("step")
    return Log(name, records, options, **fields)


def read_logs(run: Path, recipe: Recipe | None) -> list[Log]:
    """The logs in the folder of a run, in the order of its trainings, and one of a training that lies in that folder itself."""
    planned = {} if recipe is None else {name: options for name, (options, _) in recipe.plan().items()}
    if recipe is not None and recipe.flow_map.steps:
        planned[FLOW_MAP] = recipe.flow_map.training()
    there = [path.parent.name for path in sorted(run.glob(f"*/{METRICS}"))]
    names = [*planned, *(name for name in there if name not in planned)]
    anneals = getattr(recipe and recipe.vae_objective, "comparable_from", 0.0)
    logs = []
    for index, name in enumerate(names):
        later = names[index + 1 :] if name.startswith("vae") else []
        followed = tuple(each for each in later if (run / each / METRICS).exists())
        fields = {"comparable_from": anneals if name == "vae" else 0.0, "followed": followed}
        logs.append(read_log(run / name, name, planned.get(name), **fields))
    return [log for log in (*logs, read_log(run, run.name)) if log is not None]
