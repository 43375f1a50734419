"""One objective in several processes: its module whole in each of them (DDP), or a part of it in each (FSDP2)."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from multibeta import distribution
from multibeta.blocks import AttentionBlock, ResBlock
from multibeta.checkpoints import digest
from multibeta.saving import unwrapped
from multibeta.training.batches import Objective

Parallel = Literal["ddp", "fsdp", "hsdp"]
PARALLEL: tuple[Parallel, ...] = ("ddp", "fsdp", "hsdp")
# Whether each forward sends buffers, which are the same everywhere; the older name warns where there is the newer one.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"


class ObjectiveModule(nn.Module):
    """An objective as a module, whose forward is its loss: what DDP, FSDP2, Accelerate and Fabric wrap.

    Its parameters are those of `objective.module`, the names of which get "module." in front.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective, self.module = objective, objective.module

    def forward(self, *arguments: Any, method: str = "__call__") -> Any:
        """(loss, scalars) of the objective for (batch, generator); or what another `method` of it gives."""
        return getattr(self.objective, method)(*arguments)


def check_parallel(parallel: str) -> None:
    """`ValueError` unless processes can share a training in this way."""
    if parallel not in PARALLEL:
        raise ValueError(f"parallel must be one of {', '.join(PARALLEL)}, got {parallel!r}")
    here = distribution.world()
    if parallel == "hsdp" and here.size % here.local_size:
        raise ValueError(
            f"hsdp needs as many processes on each machine, {here.local_size} here do not divide {here.size}: use fsdp or ddp"
        )


def is_sharded(parallel: str) -> bool:
    """Whether each process holds a part of the weights."""
    return parallel != "ddp" and distribution.world().size > 1


def objective_of(step: nn.Module) -> Objective:
    """The objective of an `ObjectiveModule`, wrapped or not."""
    return cast("ObjectiveModule", step.module if isinstance(step, DistributedDataParallel) else step).objective


def replicated(objective: Objective) -> nn.Module:
    """The `ObjectiveModule` of an objective; in several processes gradients become the mean of those of all (DDP)."""
    step = ObjectiveModule(objective)
    if distribution.world().size == 1 or not any(parameter.requires_grad for parameter in step.parameters()):
        return step
    device = next(step.parameters()).device
    options: dict[str, Any] = {"device_ids": [device] if device.type == "cuda" else None, _BUFFERS: False}
    return DistributedDataParallel(step, **options)


def sharded(objective: Objective, parallel: str) -> ObjectiveModule:
    """The `ObjectiveModule` of a copy of an objective, of whose module each process holds a part (FSDP2).

    By "fsdp" all processes share the weights, by "hsdp" those of each machine do, and machines hold the same. The module of
    `objective` itself stays whole, as whoever called holds it.

    Raises:
        ValueError: The objective has an opponent, which sees its module whole; or processes begin with different weights.
    """
    if getattr(objective, "opponent", None) is not None:
        raise ValueError(f'training against an opponent takes parallel="ddp", got "{parallel}"')
    distribution.agree("the weights that training begins with", digest(unwrapped(objective.module).state_dict()))
    here, step = distribution.world(), ObjectiveModule(_with_own_module(objective))
    device = next(step.parameters()).device.type
    if parallel == "fsdp":
        mesh = init_device_mesh(device, (here.size,), mesh_dim_names=("shard",))
    else:
        machines = here.size // here.local_size
        mesh = init_device_mesh(device, (machines, here.local_size), mesh_dim_names=("replicate", "shard"))
    for part in step.modules():
        if isinstance(part, ResBlock | AttentionBlock):
            fully_shard(part, mesh=mesh)
    return cast("ObjectiveModule", fully_shard(step, mesh=mesh))


def _with_own_module(objective: Objective) -> Objective:
    """A copy of an objective that learns a copy of its module; everything else they share."""
    places = {id(part): name for name, part in objective.module.named_modules()}
    other, module = copy.copy(objective), copy.deepcopy(objective.module)
    for name, value in vars(objective).items():
        if isinstance(value, nn.Module) and id(value) in places:
            setattr(other, name, module.get_submodule(places[id(value)]))
    return other


def exchanging(step: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """In a `with` block the forward and backward of a part of an update: gradients go to other processes with the `last`."""
    return contextlib.nullcontext() if last or not isinstance(step, DistributedDataParallel) else step.no_sync()


def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which each process holds a part, in one piece, in all of them; others as they are."""
    return {name: whole_tensor(value) for name, value in state.items()}


def whole_tensor(value: Tensor) -> Tensor:
    """A tensor of which each process holds a part, in one piece, in all of them; another as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy `value`, whole or laid out like it, into a `target` of which each process may hold a part."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
