"""What the trainings after the two stages share: options that are also those of their training."""

from __future__ import annotations

import dataclasses
from typing import Any

from multibeta.training import TrainingOptions


def training_of(options: Any, **fixed: Any) -> TrainingOptions:
    """The options of `training.train` among those of a dataclass, and others that are `fixed`."""
    shared = {field.name for field in dataclasses.fields(TrainingOptions)} & {each.name for each in dataclasses.fields(options)}
    return TrainingOptions(**{name: getattr(options, name) for name in shared}, **fixed)


def own_fields(options: Any) -> dict[str, Any]:
    """What is chosen besides the options of the training."""
    of_training = {field.name for field in dataclasses.fields(TrainingOptions)}
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in of_training}


def options_of(kind: type, options: Any) -> Any:
    """The options of `kind`, which those of a subclass contain."""
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})
