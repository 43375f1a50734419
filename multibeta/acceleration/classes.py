"""How a block changes its class and keeps everything else: the base of accelerated blocks, and their copies and pickles."""

from __future__ import annotations

import functools
from typing import ClassVar

from torch import nn


class Accelerated:
    """Base of every accelerated block; `original_class` is the class it came with."""

    original_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        mixin, original = type(self).__bases__
        return rebuild, (mixin, original), *state


@functools.cache
def accelerated_class(mixin: type[Accelerated], original: type[nn.Module]) -> type[nn.Module]:
    """`original` with the forward of `mixin`, under its own name."""
    names = {"original_class": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), names)


def rebuild(mixin: type[Accelerated], original: type[nn.Module]) -> nn.Module:
    """An accelerated block without its state, where copies and pickles begin."""
    made = accelerated_class(mixin, original)
    return made.__new__(made)


def untouched(module: nn.Module) -> bool:
    """Whether a call of `module` is its class's forward and nothing else: no hooks, no forward put on the object."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__
