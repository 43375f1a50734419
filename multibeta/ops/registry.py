"""Which code serves an op, chosen at call time: `Op`, its `Kernel`s, the switch `backend`, and what was measured for a shape.

Only the references have derivatives of every kind: they serve what torch.func and forward-mode differentiation transform. A
kernel joins with `register`: it states which calls it accepts, and gives its reason when it declines.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from multibeta.kernels import cpp, probes
from multibeta.ops.timing import is_watched, measure, measured_lines

logger = logging.getLogger("multibeta")

BACKENDS = ("auto", "reference", "triton", "cpp", "sdpa", "xformers")
FAMILIES = ("group_norm", "attention", "sampler", "noise")

Choice = tuple[str | None, dict[str, str]]  # a name for all ops or None, and names by family
Name = TypeVar("Name", str, str | None)
Key = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]  # of the tensors of a call
Example = tuple[tuple[Any, ...], dict[str, Any]]  # arguments and keyword arguments of a call

_backend = "auto"  # plain globals: torch.compile guards on them
_named: dict[str, str] = {}  # by family, in the place of `_backend`; replaced and never changed
_choices: list[tuple[weakref.ref, Choice]] = []  # that hold, by age, and whose they are
_measuring = False
_measuring_blocks = 0
_choosing = threading.RLock()  # for those who change what stands above
_interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")  # Triton's interpreter takes tensors anywhere


class backend(AbstractContextManager):
    """Choose what serves the ops, from here on or for a `with` block.

        with multibeta.backend("triton", attention="sdpa"): ...

    The choice is of the process, not of the thread: the last one made holds in all of them. A block that ends takes back its own
    choice, and switches made since without a block; blocks entered after it hold on. After the last of them all is as before.

    Args:
        name: "auto" (the first kernel that accepts the call, or the one pinned by measurement, else the reference),
            "reference", "triton", "cpp", "sdpa" or "xformers", for all ops; those that have no kernel of that name stay on
            "auto", which the log and `explain` say. None leaves all as they are but what is named below.
        group_norm: One of the same names for `group_norm_act` and `group_norm_act_pair` alone.
        attention: For `attention`.
        sampler: For `sampler_update` and `sampler_step`.
        noise: For `standard_normal`.

    A chosen kernel backend that cannot serve a call, or that was chosen for one op and has no kernel for it, raises
    `RuntimeError` with its reason when the op is called.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        group_norm: str | None = None,
        attention: str | None = None,
        sampler: str | None = None,
        noise: str | None = None,
    ) -> None:
        families = dict(zip(FAMILIES, (group_norm, attention, sampler, noise), strict=True))
        for label, wanted in {"backend": name, **families}.items():
            if wanted is not None and wanted not in BACKENDS:
                raise ValueError(f"{label} must be one of {', '.join(BACKENDS)}, got {wanted!r}")
        self._wanted = name, {family: wanted for family, wanted in families.items() if wanted is not None}
        self._entered = False
        self._before: tuple[str, dict[str, str]] | None = None
        self._hold()
        if name and (left := [op.name for op in _ops.values() if op.why_not_wanted() is not None]):
            logger.warning("backend %r has no kernel for %s: left on auto", name, ", ".join(left))

    def _hold(self) -> None:
        global _backend, _named
        if torch.compiler.is_compiling():  # which traces no lock; blocks of one traced function nest
            self._before = _backend, _named
            _backend, _named = _followed((_backend, _named), self._wanted)
            return
        with _choosing:
            _choices.append((weakref.ref(self), self._wanted))
            _choose()

    def __enter__(self) -> backend:
        if self._entered:  # one object for several blocks
            self._hold()
        self._entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        global _backend, _named
        if self._before is not None:
            _backend, _named = self._before
            return
        with _choosing:
            own = [index for index, (owner, _) in enumerate(_choices) if owner() is self]
            if own:
                later = _choices[own[-1] + 1 :]
                if self._entered:  # the switches made since, which nobody holds, go with the block; other blocks hold on
                    later = [choice for choice in later if choice[0]() is not None]
                _choices[own[-1] :] = later
            _choose()


def _followed(first: tuple[Name, dict[str, str]], second: Choice) -> tuple[Name, dict[str, str]]:
    """Two choices as the one that they make together."""
    return second[0] or first[0], ({} if second[0] else first[1]) | second[1]


def _choose() -> None:
    """Set what the choices that hold make together. Neighbours that nobody can take back any more become one."""
    global _backend, _named
    settled: list[tuple[weakref.ref, Choice]] = []
    for owner, wanted in _choices:
        if settled and owner() is None and settled[-1][0]() is None:
            settled[-1] = owner, _followed(settled[-1][1], wanted)
        else:
            settled.append((owner, wanted))
    _choices[:] = settled
    _backend, _named = functools.reduce(_followed, (wanted for _, wanted in settled), ("auto", {}))


def current_backend(op_name: str | None = None) -> str:
    """The name last given to `backend` that holds; of an op, the one that holds for it."""
    return _backend if op_name is None else find(op_name).wanted()


class measuring(AbstractContextManager):
    """In a `with` block, ops served by several equals time them on the first call of each shape and pin the fastest.

    The pin holds for calls of that shape, dtype and device under the "auto" backend; `explain` shows the times, and which failed.
    Nothing is measured within a trace, a CUDA graph or a FakeTensorMode. As with `backend`, a block is the process's.
    """

    def __enter__(self) -> None:
        self._count(1)

    def __exit__(self, *exception: object) -> None:
        self._count(-1)

    @staticmethod
    def _count(blocks: int) -> None:
        global _measuring, _measuring_blocks
        if not torch.compiler.is_compiling():
            with _choosing:
                _measuring_blocks += blocks
                _measuring = _measuring_blocks > 0


@dataclass(frozen=True)
class Kernel:
    """One fast implementation of an op: `accepts` returns None when it can serve the call, else the reason it declines.

    `name` tells kernels of one backend apart.
    """

    backend: str
    function: Callable
    accepts: Callable[..., str | None]
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.backend


@dataclass(frozen=True)
class Pin:
    """The kernel that was fastest for one shape, None where all failed.

    Attributes:
        report: A line for each kernel: its median milliseconds, or why it failed.
        failures: Why each failed that did, by name.
    """

    kernel: Kernel | None
    report: list[str]
    failures: dict[str, str]


@dataclass
class Op:
    """An op: its reference (the definition), its kernels by preference, and example calls for tests and benchmarks.

    `family` is the name by which `backend` chooses for it. `measured` says that no order of preference is right for all shapes:
    see `measuring`.
    """

    name: str
    family: str
    reference: Callable
    examples: Callable[[], Iterator[Example]]
    kernels: list[Kernel] = field(default_factory=list)
    measured: bool = False
    pins: dict[Key, Pin] = field(default_factory=dict)

    def pin(self, *args: Tensor) -> Pin | None:
        """What was measured for this shape, dtype and device; measures now in a `measuring` block."""
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in args)
        if _measuring and key not in self.pins and not is_watched(args[0]):
            self.pins[key] = self.measure(*args)
            logger.debug("%s %s: %s", self.name, tuple(args[0].shape), explain(self.name, *args))
        if not torch.compiler.is_compiling():
            return self.pins.get(key)
        return next((pin for known, pin in self.pins.items() if _surely_equal(known, key)), None)

    def measure(self, *args: Tensor) -> Pin:
        """Time every kernel that accepts the call; one that raises is passed over from then on."""
        able = [kernel for kernel in self.kernels if kernel.accepts(*args) is None]
        calls = {str(kernel): functools.partial(kernel.function, *args) for kernel in able}
        times, failures = measure(calls, args[0].device)
        named = {str(kernel): kernel for kernel in able}
        return Pin(named[min(times, key=times.__getitem__)] if times else None, measured_lines(times, failures), failures)

    def wanted(self) -> str:
        """The name given to `backend` that holds for it."""
        if name := _named.get(self.family):  # looked up once: other threads choose at any time
            return name
        return _backend if self.why_not_wanted() is None else "auto"

    def why_not_wanted(self) -> str | None:
        """Why it stays on "auto" under a backend chosen for all ops, or None where it does not."""
        if self.family in _named or _backend in ("auto", "reference"):
            return None
        if any(kernel.backend == _backend for kernel in self.kernels):
            return None
        return f"auto, backend {_backend!r} has no kernel for it"

    def choose(self, *args: Any, **kwargs: Any) -> tuple[Callable, str, list[str]]:
        """The function that serves this call, the name of its backend, and why each kernel passed over was."""
        wanted, reasons, failures = self.wanted(), [], {}
        if (transform := active_transform()) is not None:
            if wanted in ("auto", "reference"):
                return self.reference, "reference", [transform]
            raise RuntimeError(f"backend {wanted!r} cannot run {self.name}: {transform}")
        # what was measured for one shape and machine says nothing to an exported program, which is for any
        measured = self.measured and wanted == "auto" and (_measuring or self.pins) and not _exporting()
        if measured and (pin := self.pin(*args)) is not None:
            if pin.kernel is not None and pin.kernel.accepts(*args) is None:  # it was measured without gradients
                return pin.kernel.function, str(pin.kernel), pin.report
            failures = pin.failures
        for kernel in self.kernels:
            if wanted not in ("auto", kernel.backend):
                reason = f"backend {wanted!r} was asked for"
            elif failures and str(kernel) in failures:
                reason = failures[str(kernel)]
            elif (reason := kernel.accepts(*args, **kwargs)) is None:
                return kernel.function, str(kernel), reasons
            reasons.append(f"{kernel}: {reason}")
        if wanted in ("auto", "reference"):
            return self.reference, "reference", reasons
        own = [reason for kernel, reason in zip(self.kernels, reasons, strict=True) if kernel.backend == wanted]
        detail = "; ".join(own) or f"no {wanted} kernel is registered for it"
        raise RuntimeError(f"backend {wanted!r} cannot run {self.name}: {detail}")

    def kernel_for(self, *args: Any, **kwargs: Any) -> Kernel | None:
        """The first kernel of the present backend that accepts the call, or None."""
        if active_transform() is None:
            wanted = self.wanted()
            for kernel in self.kernels:
                if wanted in ("auto", kernel.backend) and kernel.accepts(*args, **kwargs) is None:
                    return kernel
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.choose(*args, **kwargs)[0](*args, **kwargs)


_ops: dict[str, Op] = {}


@probes.constant  # traced, it is true in any compilation of torch 2.11
def _exporting() -> bool:
    return torch.compiler.is_exporting()


@probes.constant  # torch.compile guards on it by itself
def _torch_func_is_active() -> bool:
    return torch._C._are_functorch_transforms_active()


def active_transform() -> str | None:
    """The transform that is active, which no kernel follows, or None."""
    if _torch_func_is_active():
        return "a transform of torch.func is active, which the reference alone follows"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on, which the reference alone follows"
    return None


def _surely_equal(known: Key, key: Key) -> bool:
    """Whether two keys of `Op.pins` are equal, no where a graph is compiled for any size: to compare would bind it to one."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(
        dtype == other_dtype
        and device == other_device
        and len(shape) == len(other_shape)
        and all(statically_known_true(size == other) for size, other in zip(shape, other_shape, strict=True))
        for (shape, dtype, device), (other_shape, other_dtype, other_device) in zip(known, key, strict=True)
    )


def add(op: Op) -> Op:
    """Make `op` known by its name, among the others of its family; returns it."""
    _ops[op.name] = op
    by_family = sorted(_ops.values(), key=lambda op: FAMILIES.index(op.family))
    _ops.clear()
    _ops.update((op.name, op) for op in by_family)
    return op


def register(op_name: str, kernel: Kernel) -> None:
    """Append `kernel` to the implementations of `op_name`, after those already there."""
    find(op_name).kernels.append(kernel)


def all_ops() -> tuple[Op, ...]:
    """Every op, in the order of `FAMILIES`."""
    return tuple(_ops.values())


def find(op_name: str) -> Op:
    """The op called `op_name`; `KeyError` names those that exist."""
    if op_name not in _ops:
        raise KeyError(f"no op called {op_name!r}; there are {', '.join(sorted(_ops))}")
    return _ops[op_name]


def explain(op_name: str, *args: Any, **kwargs: Any) -> str:
    """Which backend would serve this call, and why the others would not, in one line."""
    op = find(op_name)
    try:
        _, chosen, reasons = op.choose(*args, **kwargs)
    except RuntimeError as error:
        return str(error)
    if not op.kernels:
        reasons = ["no kernel is registered"]
    if (left := op.why_not_wanted()) is not None:
        reasons = [left, *reasons]
    return f"{op_name}: {chosen}" + (f" ({'; '.join(reasons)})" if reasons else "")


class TritonFunctions:
    """A Triton kernel and its `accepts`, from a module of `multibeta.kernels` that is imported when a CUDA tensor asks for it.

    Args:
        module: Of `multibeta.kernels`.
        op_name: What its function is called there, and `accepts_` before it the question whether it serves a call.
    """

    def __init__(self, module: str, op_name: str) -> None:
        self.module, self.names = f"multibeta.kernels.{module}", (op_name, f"accepts_{op_name}")
        self.outcome: str | None = "not tried"  # None once the module is imported, else the reason it is not

    @probes.constant
    def load(self) -> str | None:
        """None when the module is imported; else the reason, remembered."""
        if self.outcome == "not tried":
            try:
                module = importlib.import_module(self.module)
                self._function, self._accepts = (getattr(module, name) for name in self.names)
                self.outcome = None
            except ImportError as error:
                self.outcome = f"triton cannot be imported: {error}"
        return self.outcome

    def function(self, *args: Any, **kwargs: Any) -> Any:
        if self.outcome is not None and (reason := self.load()) is not None:  # called without being asked first
            raise RuntimeError(reason)
        return self._function(*args, **kwargs)

    def accepts(self, *args: Any, **kwargs: Any) -> str | None:
        if not args[0].is_cuda and not _interpreted:
            return f"tensors are on {args[0].device.type}, Triton needs CUDA"
        reason = self.load()
        return self._accepts(*args, **kwargs) if reason is None else reason


def triton_kernel(module: str, op_name: str) -> Kernel:
    """The kernel of an op from a module of `multibeta.kernels` written in Triton, which is imported when it is needed."""
    functions = TritonFunctions(module, op_name)
    return Kernel("triton", functions.function, functions.accepts)


def cpp_kernel(op_name: str) -> Kernel:
    """The C++ kernel of an op."""
    return Kernel("cpp", getattr(cpp, op_name), getattr(cpp, f"accepts_{op_name}"))
