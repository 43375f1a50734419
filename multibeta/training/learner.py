"""What an objective teaches, and the optimiser that moves it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from multibeta import checkpoints
from multibeta.saving import unwrapped
from multibeta.training.batches import Objective
from multibeta.training.options import TrainingOptions


class Learner:
    """The module of an objective with the optimiser of its parameters.

    Attributes:
        plain: The module as it is saved, `saving.unwrapped`.
        file: What the module is called in a checkpoint.
        prefix: Of the optimiser in a checkpoint, and of loss and gradient norm where they are logged.
        names: The parameters that learn, with their names in `plain`, in the order of the optimiser.
    """

    def __init__(self, objective: Objective, options: TrainingOptions, role: str = ""):
        self.objective = objective
        self.module, self.plain = objective.module, unwrapped(objective.module)
        self.file, self.prefix = role or "module", f"{role}_" if role else ""
        checkpoints.separate(self.plain.state_dict(), self.file)  # tied weights show now, not at the first save
        self.optimizer, self.names = _optimizer(objective, self.plain, options)

    def set_rate(self, rate: float) -> None:
        """Let the next update move by this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["learning_rate_scale"]

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """In a `with` block its parameters are constants."""
        learning = [parameter for parameter in self.names if parameter.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def slots(self) -> dict[str, Any]:
        """What the optimiser keeps, by names of parameters, as a checkpoint holds it."""
        return checkpoints.flatten({self.names[parameter]: slot for parameter, slot in self.optimizer.state.items()})

    def take_slots(self, tensors: dict[str, Any]) -> None:
        """Go on from what `slots` gave."""
        slots = checkpoints.unflatten(tensors)
        state = {
            index: {key: _laid_out_like(parameter, value) for key, value in slots[name].items()}
            for index, (parameter, name) in enumerate(self.names.items())
            if name in slots
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _laid_out_like(parameter: Tensor, slot: Tensor) -> Tensor:
    """What the optimiser keeps of a parameter, in its memory format: a fused update goes through both as they lie."""
    return torch.empty_like(parameter, dtype=slot.dtype).copy_(slot) if slot.shape == parameter.shape else slot


def _optimizer(objective: Objective, plain: nn.Module, options: TrainingOptions) -> tuple[torch.optim.AdamW, dict[Tensor, str]]:
    """AdamW over the groups of the objective, and its parameters with their names in the `plain` module, in its order."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in plain.named_parameters()}
    default = [{"params": [parameter for parameter in names if parameter.requires_grad]}]
    own_groups = getattr(objective, "parameter_groups", None)
    groups = default if own_groups is None else own_groups()
    groups = [{"learning_rate_scale": 1.0, **group, "params": list(group["params"])} for group in groups]
    ordered = [parameter for group in groups for parameter in group["params"]]
    if not all(parameter in names for parameter in ordered):
        raise ValueError("parameter_groups() holds parameters outside objective.module, which no checkpoint would hold")
    rates = {"lr": options.learning_rate, "betas": options.adam_betas, "weight_decay": options.weight_decay}
    return torch.optim.AdamW(groups, **rates, fused=True), {parameter: names[parameter] for parameter in ordered}
