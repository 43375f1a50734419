"""What was done to a model, and whether it is right: a row for each block, compared with its original."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multibeta import ops
from multibeta.acceleration.base import Accelerated, listening
from multibeta.acceleration.swap import accelerate, match, restore

# How far a block may lie from its original, as a fraction of the largest output. bfloat16: about eight roundings, each of half
# an eps, are sqrt(8) / 2 = 1.4 eps when independent, and three times that when unlucky. float32: sums of up to 10^4 products in
# another order are sqrt(10^4) eps, and ten times that.
TOLERANCES = {torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps, torch.float32: 1024 * torch.finfo(torch.float32).eps}


@dataclass(frozen=True)
class Row:
    """One block of an accelerated model.

    Attributes:
        name, type: Where it is in the model, and the class it came with.
        accelerated: Whether it runs on the ops.
        reason: Why it does not.
        path: What served its calls, by `ops.explain`; measured by `check`, as all below.
        error: Largest difference from the original forward, as a fraction of the original's largest output.
        before_ms, after_ms: Milliseconds of a call, on CUDA those of the device alone.
    """

    name: str
    type: str
    accelerated: bool
    reason: str = ""
    path: str = ""
    error: float | None = None
    before_ms: float | None = None
    after_ms: float | None = None


def report(module: nn.Module) -> list[Row]:
    """What became of the blocks of `module`: each that is accelerated, without its parts, and each left alone with the reason."""
    rows = []
    for name, block in _outermost(module, lambda block: isinstance(block, Accelerated)):
        if isinstance(block, Accelerated):
            rows.append(Row(name, type(block).__name__, True))
        elif isinstance(mixin := match(block), str):
            rows.append(Row(name, type(block).__name__, False, mixin))
        elif mixin is not None:
            rows.append(Row(name, type(block).__name__, False, "accelerate was not called on it"))
    return rows


def _outermost(module: nn.Module, ends: Callable[[nn.Module], bool], name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module by name, down to those at which the descent `ends`."""
    yield name, module
    if not ends(module):
        for part, child in module.named_children():
            yield from _outermost(child, ends, f"{name}.{part}" if name else part)


@torch.no_grad()
def check(module: nn.Module, *inputs: object, repetitions: int = 3, **options: object) -> list[Row]:
    """Accelerate `module`, comparing each block with its original on the inputs it meets; a block that differs is put back.

    The original runs once on `inputs` and `options`, in evaluation mode; each block runs in both forms on what it is given there.
    A later `accelerate` knows nothing of this and takes in again what was put back.

    Args:
        inputs, options: Arguments of `module`, such as `random_inputs` makes them.
        repetitions: Calls of each form that are timed, 1 or more.

    Returns:
        A row for each block: see `report`. `TOLERANCES` says how far a block may lie from its original.

    Raises:
        ValueError: Fewer repetitions than 1.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}")
    rows = report(accelerate(restore(module)))
    blocks = {row.name: module.get_submodule(row.name) for row in rows if row.accelerated}
    measured: dict[str, Row] = {}
    restore(module)
    training = {part: part.training for part in module.modules()}
    hooks = [
        block.register_forward_hook(_comparison(name, measured, repetitions), with_kwargs=True) for name, block in blocks.items()
    ]
    try:
        module.eval()(*inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in training.items():
            part.training = mode
    accelerate(module)
    for name, row in measured.items():
        if not row.accelerated:
            restore(blocks[name])
    unmet = {name: Row(name, type(block).__name__, True, path="not run by these inputs") for name, block in blocks.items()}
    checked = unmet | measured
    return [checked.get(row.name, row) for row in rows]


def _comparison(name: str, measured: dict[str, Row], repetitions: int) -> Callable[[nn.Module, tuple, dict, object], None]:
    """A forward hook that runs the accelerated form of a block and its original, on the first call."""

    def compare(block: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if name in measured:
            return

        def run() -> Tensor:  # without the hooks of others, which stay as they are
            return block.forward(*args, **kwargs)

        before, after, error, reason, path = None, None, None, "", ""
        try:
            expected = run()
            before = ops.latency_ms(run, expected.device, repetitions)
            accelerate(block)
            with listening() as notes:
                error = _relative_error(run(), expected)
            path = "; ".join(notes)
            after = ops.latency_ms(run, expected.device, repetitions)
            tolerance = TOLERANCES.get(expected.dtype, 1e-2)
            if not error <= tolerance:  # nan as well
                reason = f"differs from the original by {error:.1e}, {tolerance:.1e} is allowed"
        except Exception as failure:  # of many types: a class may have the name and the parts, and mean something else
            reason = (str(failure).splitlines() or [type(failure).__name__])[0]
        finally:
            restore(block)
        measured[name] = Row(name, type(block).__name__, not reason, reason, path, error, before, after)

    return compare


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest expected value; `ValueError` for another shape."""
    if actual.shape != expected.shape:
        raise ValueError(f"gives {tuple(actual.shape)}, the original {tuple(expected.shape)}")
    largest = expected.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual.float() - expected.float()).abs().max() / largest)


def table(rows: list[Row]) -> str:
    """Rows of `report` or `check` as text: a line each, and what was gained over all."""
    lines = []
    for row in rows:
        parts = [f"{row.name or '(model)'} {row.type}"]
        if row.error is not None and row.after_ms is not None:
            parts.append(f"{row.before_ms:.2f} -> {row.after_ms:.2f} ms, error {row.error:.1e}")
        if not row.accelerated:
            parts.append(f"left as it is, {row.reason}")
        lines.append(": ".join([*parts, row.path] if row.path else parts))
    timed = [row for row in rows if row.accelerated and row.after_ms is not None]
    if timed:
        before, after = (sum(getattr(row, name) for row in timed) for name in ("before_ms", "after_ms"))
        lines.append(f"{len(timed)} blocks: {before:.1f} -> {after:.1f} ms, {before / after:.1f}x")
    return "\n".join(lines)
