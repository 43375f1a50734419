"""What of a module is saved: the tensors of the plain module, which a fresh one of its config takes back, and their dtypes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from multibeta.weights import shorten, state_problems

logger = logging.getLogger("multibeta")

# What changes the names of tensors, by a part of such names, and how to get the plain layer back
_CHANGES = {
    "parametrizations.": "parametrised layers: torch.nn.utils.parametrize.remove_parametrizations(layer, name) leaves the weight",
    "weight_g": "weight_norm: torch.nn.utils.remove_weight_norm(layer) leaves the weight",
    "_orig": "pruned layers: torch.nn.utils.prune.remove(layer, name), or remove_spectral_norm(layer), leaves the weight",
    "_packed_params": "quantised layers: save the model before it is quantised, and quantise what was loaded",
    "lora_": "adapters: merge them into the layers first",
    "base_layer.": "wrapped layers: merge what wraps them into the layers first, or put the layers back",
}


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper that only passes calls on holds; None for any other module."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        return module.module
    return getattr(module, "_orig_mod", None)  # of torch.compile


def unwrapped(module: nn.Module) -> nn.Module:
    """`module` without the wrappers of torch.compile, parallel training and `AveragedModel`, outside and inside.

    Itself where there are none inside; else a copy, which shares its tensors.
    """
    while (inner := _wrapped(module)) is not None:
        module = inner
    children = {name: unwrapped(child) for name, child in module._modules.items() if child is not None}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    plain = copy.copy(module)
    plain._modules = module._modules | children
    return plain


def plain_state(module: nn.Module, fresh: nn.Module, title: str) -> dict[str, Tensor]:
    """The state dict of a module as it may be saved: `fresh` could take it, and would then compute the same.

    Args:
        module: What is saved; wrappers are left out (see `unwrapped`).
        fresh: A module as it will be built to be filled, which may lie on the meta device.
        title: Name of `module` in messages.

    Raises:
        ValueError: Names, shapes or layers differ, or `require_plain` refuses the values: what it is, and what to do.
    """
    module = unwrapped(module)
    state, wanted = module.state_dict(), fresh.state_dict()
    problems = state_problems(state, wanted) | {
        "of another kind of number": [
            f"{name} {state[name].dtype} instead of {wanted[name].dtype}"
            for name in wanted
            if isinstance(state.get(name), Tensor) and state[name].is_floating_point() != wanted[name].is_floating_point()
        ],
    }
    described = [f"{len(names)} {problem}: {shorten(names)}" for problem, names in problems.items() if names]
    described = described or list(_other_layers(module, fresh))[:1]
    if described:
        reasons = "; ".join([*described, *advice(problems["unexpected"])])
        raise ValueError(f"{title} cannot be saved, a {type(fresh).__name__} of its config would not take it back: {reasons}")
    require_plain(state, title)
    return state


def advice(names: Iterable[str]) -> list[str]:
    """What tensors of these names tell about the layers that hold them, and how to get plain layers back."""
    names = list(names)
    return [hint for mark, hint in _CHANGES.items() if any(mark in name for name in names)]


def require_plain(state: Mapping[str, Any], title: str) -> None:
    """`ValueError` unless all entries are dense tensors of torch's own class, with values; a warning where one is not finite."""
    for name, value in state.items():
        if type(value) not in (Tensor, nn.Parameter):
            hint = advice([name]) or ["save the model before it is changed so"]
            reason = f"a {type(value).__name__}, which no file of tensors gives back: {hint[0]}"
        elif value.is_meta:
            reason = "on the meta device, without values: load them first"
        elif value.is_quantized or value.layout != torch.strided:
            reason = f"a tensor of {value.dtype}, {value.layout}, not a dense one: save the model before it is changed so"
        else:
            continue
        raise ValueError(f"{title} cannot be saved: {name} is {reason}")
    if wrong := [name for name, value in state.items() if value.is_floating_point() and not _finite(value)]:
        logger.warning("%s is saved with values that are not finite, in %s", title, shorten(wrong))


def _finite(value: Tensor) -> bool:
    value = value.float() if value.element_size() == 1 else value  # torch asks no float8
    return bool(value.isfinite().all())


def _other_layers(module: nn.Module, fresh: nn.Module) -> Iterator[str]:
    """Layers whose class is not that of a fresh module and computes something else, or may do so."""
    layers = dict(module.named_modules(remove_duplicate=False))
    for name, plain in fresh.named_modules():
        wanted, mine = type(plain), getattr(layers.get(name), "original_class", type(layers.get(name)))
        if not issubclass(mine, wanted):
            yield f"{name} is a {mine.__name__}, there it is a {wanted.__name__}"
            continue
        more = mine.__mro__[: mine.__mro__.index(wanted)]
        computing = {"forward", *dir(wanted)} - (set(dir(nn.Module)) - {"forward"})
        if changed := sorted(computing & {method for base in more for method in vars(base)}):
            yield f"{name or 'it'} is a {mine.__name__} with {', '.join(changed)} of its own, there it is a {wanted.__name__}"


def take_dtypes(module: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Give the parameters and buffers of `module` the dtypes of their floating namesakes in `state`, called `prefix` + name."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        stored = state.get(prefix + name)
        if stored is not None and stored.is_floating_point() and tensor.is_floating_point():
            tensor.data = tensor.data.to(stored.dtype)
