"""What an objective teaches, and the optimiser that moves it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multibeta import checkpoints
from multibeta.saving import unwrapped
from multibeta.training import parallel
from multibeta.training.batches import Objective
from multibeta.training.blockwise import reset_forwards, set_forwards
from multibeta.training.options import TrainingOptions


class Learner:
    """The module of an objective with the optimiser of its parameters.

    Attributes:
        objective: What it minimises; where each process holds a part of the module a copy of the one that was given.
        step: Its `ObjectiveModule`, wrapped where several processes learn together.
        shown: The module that was given, whole.
        plain: The module as it is saved, `saving.unwrapped`.
        file: What the module is called in a checkpoint.
        prefix: Of the optimiser in a checkpoint, and of loss and gradient norm where they are logged.
        names: The parameters that learn, with their names in `plain`, in the order of the optimiser.
    """

    def __init__(self, objective: Objective, options: TrainingOptions, role: str = "", *, way: parallel.Parallel = "ddp"):
        self.file, self.prefix = role or "module", f"{role}_" if role else ""
        self.shown = objective.module
        checkpoints.separate(unwrapped(self.shown).state_dict(), self.file)  # tied weights show now, not at the first save
        self.step = parallel.sharded(objective, way) if parallel.is_sharded(way) else parallel.replicated(objective)
        self.objective = parallel.objective_of(self.step)
        self.module, self.plain = self.objective.module, unwrapped(self.objective.module)
        self.optimizer, self.names = _optimizer(self.objective, self.plain, options)
        if not role:  # an opponent has no such blocks
            set_forwards(self.module, compiled=options.compile, recomputed=options.recompute)

    def close(self) -> None:
        """Leave the module as it was given."""
        reset_forwards(self.module)

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

    def show(self) -> None:
        """Give the module that was given the weights of now, where it is another."""
        if self.shown is not self.module:
            state = unwrapped(self.shown).state_dict()
            for name, value in self.plain.state_dict().items():
                state[name].copy_(parallel.whole_tensor(value))
            self.shown.eval()

    def layouts(self) -> dict[str, dict[str, Tensor]]:
        """Tensors laid out over the processes like those of a checkpoint, by file and name."""
        moments = {f"{name}/{slot}": parameter for parameter, name in self.names.items() for slot in ("exp_avg", "exp_avg_sq")}
        return {self.file: self.plain.state_dict(), f"{self.prefix}optimizer": moments}

    def take(self, state: Mapping[str, Tensor], source: Path) -> None:
        """The weights of a checkpoint, whole or in parts; `ValueError` where they are of another recipe."""
        checkpoints.compare_state(self.plain, dict(state), source)
        for name, value in self.plain.state_dict().items():
            parallel.assign(value, state[name])

    def slots(self) -> dict[str, Any]:
        """What the optimiser keeps, by names of parameters, as a checkpoint holds it."""
        return checkpoints.flatten({self.names[parameter]: slot for parameter, slot in self.optimizer.state.items()})

    def take_slots(self, tensors: dict[str, Any]) -> None:
        """Go on from what `slots` gave, whole or in parts."""
        slots = checkpoints.unflatten(tensors)
        state = {
            index: {key: _laid_out_like(parameter, value) for key, value in slots[name].items()}
            for index, (parameter, name) in enumerate(self.names.items())
            if name in slots
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _laid_out_like(parameter: Tensor, slot: Tensor) -> Tensor:
    """What the optimiser keeps of a parameter, in its memory format: a fused update goes through both as they lie."""
    if slot.shape != parameter.shape:
        return slot
    laid_out = torch.empty_like(parameter, dtype=slot.dtype, requires_grad=False)
    parallel.assign(laid_out, slot)
    return laid_out


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
