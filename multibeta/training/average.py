"""The moving average of the weights, which is what a training gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Exponential moving average of the trainable parameters; everything else follows the module."""

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = module, decay
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.weights: list[Tensor] = list(trainable.values())
        self.averages = [self.state[name] for name in trainable]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- d average + (1 - d) weights, with d = min(decay, (1 + step) / (10 + step))."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self.averages, self.weights, step)
        for name, buffer in self.module.named_buffers():
            if name in self.state:
                self.state[name].copy_(buffer)

    @contextlib.contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """`module`, which may wrap ours, holds the average, in evaluation mode; afterwards its own weights, in training mode."""
        self.exchange()
        module.eval()
        try:
            yield
        finally:
            self.exchange()
            module.train()

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the average and the values of the module."""
        for name, live in self.module.state_dict().items():
            kept = live.clone()
            live.copy_(self.state[name])
            self.state[name].copy_(kept)
