"""How blocks compute while they learn: compiled, or keeping their input alone, from which the backward pass computes the rest."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from multibeta import draws
from multibeta.blocks import AttentionBlock, ResBlock
from multibeta.networks.autoencoder import ConditionedConv
from multibeta.networks.block_autoencoder import BottleneckBlock
from multibeta.training import operations

BLOCKS = (ResBlock, AttentionBlock, ConditionedConv, BottleneckBlock)
MOST_VERSIONS = 1024  # that torch.compile keeps of a forward: every shape of block has its own. Past them it runs eagerly


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The `BLOCKS` of a module."""
    return [part for part in module.modules() if isinstance(part, BLOCKS)]


def set_forwards(module: nn.Module, *, compiled: bool, recomputed: bool) -> None:
    """Let the blocks of a module compute in another way where gradients are asked for, until `reset_forwards`.

    Parameters, names and what is learned stay. Random numbers are those that a plain forward draws, so recomputed gradients are
    the same bitwise; a compiled forward rounds in other places.

    Args:
        module: FSDP may have sharded it: parameters are gathered around the forward of a block.
        compiled: `torch.compile` of each block for each shape, when it first comes. What it cannot compile raises.
        recomputed: Activation checkpointing of each block (`torch.utils.checkpoint`).

    Raises:
        ValueError: It is asked for, and there are no blocks.
    """
    reset_forwards(module)
    if not (compiled or recomputed):
        return
    blocks = blocks_of(module)
    if not blocks:
        names = ", ".join(block.__name__ for block in BLOCKS)
        raise ValueError(f"compile and recompute must be False: a {type(module).__name__} has no blocks ({names})")
    if compiled:
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            setattr(torch._dynamo.config, limit, max(MOST_VERSIONS, getattr(torch._dynamo.config, limit)))
    for block in blocks:
        plain = learning = block.forward
        if compiled:  # with the masks that eager dropout draws
            learning = torch.compile(learning, dynamic=False, options={"fallback_random": True})
        if recomputed:
            learning = functools.partial(checkpoint, learning, use_reentrant=False, context_fn=_contexts)
        block.forward = functools.partial(_forward, plain, learning)


def reset_forwards(module: nn.Module) -> None:
    """Undo `set_forwards`."""
    for block in blocks_of(module):
        vars(block).pop("forward", None)


def _forward(plain: Callable[..., Any], learning: Callable[..., Any], *arguments: Any) -> Any:
    return (learning if torch.is_grad_enabled() else plain)(*arguments)


def _contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Those of a forward and of its recomputation."""
    return contextlib.nullcontext(), _again(draws.again(), operations.uncounted())


@contextlib.contextmanager
def _again(*contexts: contextlib.AbstractContextManager) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
