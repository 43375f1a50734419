"""The base of accelerated blocks: how a block changes its class and keeps everything else, and notes of what served its calls."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, SupportsIndex, cast

from torch import nn
from torch.nn.utils import parametrize

from multibeta import ops

if TYPE_CHECKING:  # an accelerated class has its original as its other base
    _Original = nn.Module
else:
    _Original = object


class Equal(type):
    """Class of the accelerated classes: each equals the class it stands for.

    Tools that choose layers by their exact class look it up in a table, or compare it, as quantisation and fusion of torch do.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or (isinstance(other, type) and _stood_for(cls) is _stood_for(other))

    def __hash__(cls) -> int:
        return type.__hash__(_stood_for(cls))


def _stood_for(cls: type) -> type:
    """The class that an accelerated class stands for; any other itself."""
    return vars(cls).get("original_class", cls) if isinstance(cls, Equal) else cls


class Accelerated(_Original, metaclass=Equal):
    """Base of every accelerated block; `original_class` is the class it came with."""

    original_class: ClassVar[type[nn.Module]]

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: the block as it came."""
        plain = cast(nn.Module, copy.copy(self))
        plain.__class__ = self.original_class
        return plain

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        _, _, *state = super().__reduce_ex__(protocol)
        mixin, original = type(self).__bases__
        return rebuild, (mixin, original), *state


@functools.cache
def accelerated_class(mixin: type[Accelerated], original: type[nn.Module]) -> type[nn.Module]:
    """`original` with the forward of `mixin`, under its own name."""
    names = {"original_class": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return Equal(original.__name__, (mixin, original), names)


def give_back_class(block: Accelerated) -> None:
    """Undo the exchange of a block's class, under a parametrisation too, for which torch derives a class of its own."""
    if parametrize.is_parametrized(block):
        type(block).__bases__ = (block.original_class,)
    else:
        cast(nn.Module, block).__class__ = block.original_class


def rebuild(mixin: type[Accelerated], original: type[nn.Module]) -> nn.Module:
    """An accelerated block without its state, where copies and pickles begin."""
    made = accelerated_class(mixin, original)
    return made.__new__(made)


def untouched(module: nn.Module) -> bool:
    """Whether a call of `module` is its class's forward and nothing else: no hooks, no forward put on the object."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


_notes: list[str] | None = None


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Collect what serves the calls of accelerated blocks while a `with` block runs."""
    global _notes
    previous, _notes = _notes, []
    try:
        yield _notes
    finally:
        _notes = previous


def note(text: str) -> None:
    """Tell the listener, once."""
    if _notes is not None and text not in _notes:
        _notes.append(text)


def note_op(name: str, *args: object, **kwargs: object) -> None:
    """Note which backend serves a call of an op; where it is none but the reference, why."""
    if _notes is not None:
        served = ops.explain(name, *args, **kwargs)
        note(served if served.startswith(f"{name}: reference") else served.partition(" (")[0])
