"""The few operations the library spends its time in, each with its plain PyTorch reference, which is its definition.

Modules call `group_norm_act` and `attention`, samplers `sampler_update` and `sampler_step`; which code serves a call is chosen
at call time by `backend`. Only the references have derivatives of every kind: they serve what torch.func and forward-mode
differentiation transform.
A kernel joins with `register`: it states which calls it accepts, and gives its reason when it declines.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from multibeta.kernels import attention as attention_kernels
from multibeta.kernels import cpp, derivatives, probes
from multibeta.seeds import as_seed, as_seeds

logger = logging.getLogger("multibeta")

BACKENDS = ("auto", "reference", "triton", "cpp", "sdpa", "xformers")
FAMILIES = ("group_norm", "attention", "sampler", "noise")
ACTIVATIONS = ("sigmoid", "silu", "none")
CYCLES_PER_SECOND = 2e9  # of a GPU, rounded up
MAX_SLEEP_SECONDS = 0.05

_backend = "auto"  # plain globals: torch.compile guards on them
_named: dict[str, str] = {}  # by family, in the place of `_backend`; replaced and never changed
_choices: list[tuple[weakref.ref, tuple[str | None, dict[str, str]]]] = []  # that hold, by age: whose, (name, by family)
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
    ):
        families = dict(zip(FAMILIES, (group_norm, attention, sampler, noise), strict=True))
        for label, wanted in {"backend": name, **families}.items():
            if wanted is not None and wanted not in BACKENDS:
                raise ValueError(f"{label} must be one of {', '.join(BACKENDS)}, got {wanted!r}")
        self._wanted = name, {family: wanted for family, wanted in families.items() if wanted is not None}
        self._entered, self._before = False, None
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

    def __exit__(self, *exception) -> None:
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


def _followed(first: tuple, second: tuple) -> tuple:
    """Two choices, (name or None, names by family), as the one that they make together."""
    return second[0] or first[0], ({} if second[0] else first[1]) | second[1]


def _choose() -> None:
    """Set what the choices that hold make together. Neighbours that nobody can take back any more become one."""
    global _backend, _named
    settled: list = []
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

    def __exit__(self, *exception) -> None:
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
    examples: Callable[[], Iterator[tuple[tuple, dict]]]
    kernels: list[Kernel] = field(default_factory=list)
    measured: bool = False
    pins: dict[tuple, Pin] = field(default_factory=dict)

    def pin(self, *args: Tensor) -> Pin | None:
        """What was measured for this shape, dtype and device; measures now in a `measuring` block."""
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in args)
        if _measuring and key not in self.pins and not _watched(args[0]):
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
        if self.family in _named:
            return _named[self.family]
        return _backend if self.why_not_wanted() is None else "auto"

    def why_not_wanted(self) -> str | None:
        """Why it stays on "auto" under a backend chosen for all ops, or None where it does not."""
        if self.family in _named or _backend in ("auto", "reference"):
            return None
        if any(kernel.backend == _backend for kernel in self.kernels):
            return None
        return f"auto, backend {_backend!r} has no kernel for it"

    def choose(self, *args, **kwargs) -> tuple[Callable, str, list[str]]:
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

    def kernel_for(self, *args, **kwargs) -> Kernel | None:
        """The first kernel of the present backend that accepts the call, or None."""
        if active_transform() is None:
            wanted = self.wanted()
            for kernel in self.kernels:
                if wanted in ("auto", kernel.backend) and kernel.accepts(*args, **kwargs) is None:
                    return kernel
        return None

    def __call__(self, *args, **kwargs):
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


def _surely_equal(known: tuple, key: tuple) -> bool:
    """Whether two keys of `Op.pins` are equal, no where a graph is compiled for any size: to compare would bind it to one."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(
        dtype == other_dtype
        and device == other_device
        and len(shape) == len(other_shape)
        and all(statically_known_true(size == other) for size, other in zip(shape, other_shape, strict=True))
        for (shape, dtype, device), (other_shape, other_dtype, other_device) in zip(known, key, strict=True)
    )


def _watched(tensor: Tensor) -> bool:
    """Whether calls on `tensor` are recorded or only pretended, so that to time them would be wrong."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    if type(tensor) not in (Tensor, torch.nn.Parameter):  # fake tensors
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def latency_ms(function: Callable[[], object], device: torch.device, repetitions: int = 10) -> float:
    """Median time of a call in milliseconds, after two to warm up; on CUDA that of the device alone."""
    for _ in range(2):
        function()
    times = _cuda_times_ms if device.type == "cuda" else _host_times_ms
    return statistics.median(times(function, device, repetitions))


def _host_times_ms(function: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _cuda_times_ms(function: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        sleep = min(2 * (time.perf_counter() - start), MAX_SLEEP_SECONDS)
        for first, last in events:
            # while the device sleeps the host queues: between the events lies work of the device, and no wait for Python
            torch.cuda._sleep(int(sleep * CYCLES_PER_SECOND))
            first.record()
            function()
            last.record()
        torch.cuda.synchronize()
    return [first.elapsed_time(last) for first, last in events]


def measure(
    candidates: dict[str, Callable[[], object]], device: torch.device, repetitions: int = 10
) -> tuple[dict[str, float], dict[str, str]]:
    """`latency_ms` of each candidate by name, and why those failed that raise, whatever they raise: another serves."""
    times, failures = {}, {}
    for name, function in candidates.items():
        try:
            times[name] = latency_ms(function, device, repetitions)
        except Exception as error:
            failures[name] = f"failed on this shape, {probes.first_line(error)}"
    return times, failures


def measured_lines(times: dict[str, float], failures: dict[str, str]) -> list[str]:
    """What `measure` found, a line for each candidate."""
    lines = [f"{name}: {milliseconds:.3f} ms" for name, milliseconds in times.items()]
    return lines + [f"{name}: {reason}" for name, reason in failures.items()]


def register(op_name: str, kernel: Kernel) -> None:
    """Append `kernel` to the implementations of `op_name`, after those already there."""
    find(op_name).kernels.append(kernel)


def all_ops() -> tuple[Op, ...]:
    """Every op."""
    return tuple(_ops.values())


def find(op_name: str) -> Op:
    """The op called `op_name`; `KeyError` names those that exist."""
    if op_name not in _ops:
        raise KeyError(f"no op called {op_name!r}; there are {', '.join(sorted(_ops))}")
    return _ops[op_name]


def explain(op_name: str, *args, **kwargs) -> str:
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


def _total(x, x_bias, residual):
    total = x if x_bias is None else x + x_bias.view(-1, 1, 1).to(x.dtype)
    return total if residual is None else total + residual


def _group_norm_act_reference(
    x, weight, bias, num_groups, eps=1e-6, *, shift=None, x_bias=None, residual=None, activation="sigmoid"
):
    total = _total(x, x_bias, residual)
    h = total if shift is None else total + shift[:, :, None, None].to(x.dtype)
    norm = F.group_norm if active_transform() is None else derivatives.group_norm
    h = norm(h, num_groups, weight, bias, eps)
    if activation == "sigmoid":
        h = torch.sigmoid(h)
    elif activation == "silu":
        h = F.silu(h)
    return h if x_bias is None and residual is None else (h, total)


def _group_norm_act_pair_reference(
    x, beside, weight, bias, num_groups, eps=1e-6, *, shift=None, x_bias=None, residual=None, activation="sigmoid"
):
    total = _total(x, x_bias, residual)
    both = torch.cat([total, beside], dim=1)
    h = _group_norm_act_reference(both, weight, bias, num_groups, eps, shift=shift, activation=activation)
    return h if x_bias is None and residual is None else (h, total)


def _attention_reference(query, key, value):
    scores = torch.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(query.shape[-1])
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return torch.einsum("nhqk,nkhd->nqhd", weights, value)


def _sampler_update_reference(latent, noise_prediction, delta, row, seeds, step, *, previous=None):
    coefficients = row.tolist() if row.dim() == 1 else row.to(latent)[:, :, None, None].unbind(1)
    on_latent, on_noise, on_delta, on_fresh, on_previous_noise, on_previous_delta = coefficients
    result = on_latent * latent + on_noise * noise_prediction + on_delta * delta
    if row[..., 3].any():
        result = result + on_fresh * _standard_normal_reference(seeds, step, latent.shape[1:]).to(latent)
    if previous is not None:
        result = result + on_previous_noise * previous[0] + on_previous_delta * previous[1]
    return result


def _sampler_step_reference(latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition=None):
    index = int(counter)
    columns = channel_rows[index][:, :, None, None].unbind(1)
    on_first, on_latent, offset, on_second, input_scale, input_offset = columns[:6]
    if condition is None:
        first, second = output.float().chunk(2, dim=1)
        noise_prediction = on_first * first + on_latent * latent + offset
        delta = on_second * second
    else:
        delta_on_latent, on_condition, limit, input_on_condition = columns[6:]
        noise_prediction = on_first * output.float() + on_latent * latent + offset
        centre = on_condition * condition
        delta = (on_second * noise_prediction + delta_on_latent * latent + centre).clamp(-limit, limit) - centre
        input_offset = input_offset + input_on_condition * condition
    step, previous = int(steps[index]), tuple(history)
    result = _sampler_update_reference(latent, noise_prediction, delta, rows[index], seeds, step, previous=previous)
    history.copy_(torch.stack([noise_prediction, delta]))
    latent.copy_(result)
    network_input.copy_(input_scale * result + input_offset)


def _group_norm_act_examples():
    generator = torch.Generator().manual_seed(0)
    for shape, groups in (((2, 64, 16, 16), 32), ((3, 24, 5, 7), 1), ((1, 48, 1, 1), 8)):  # usual; one group, odd; 1x1
        x, shift = torch.randn(shape, generator=generator), torch.randn(shape[:2], generator=generator)
        affine = torch.randn(2, shape[1], generator=generator)
        yield (x, affine[0], affine[1], groups), {"shift": shift, "activation": "silu"}


def _group_norm_act_pair_examples():
    generator = torch.Generator().manual_seed(0)
    for channels, beside, groups in ((64, 32, 12), (6, 3, 3)):  # usual; groups of three channels
        parts = [torch.randn(2, c, 5, 6, generator=generator).to(memory_format=torch.channels_last) for c in (channels, beside)]
        affine = torch.randn(2, channels + beside, generator=generator)
        yield (*parts, affine[0], affine[1], groups), {"activation": "silu"}


def _attention_examples():
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 64, 4, 32), (1, 17, 1, 8)):  # usual; odd length, one head
        yield tuple(torch.randn(3, *shape, generator=generator)), {}


def _standard_normal_examples():
    for count, shape in ((3, (4, 8, 8)), (1, (3, 5, 5))):  # usual; a size that four does not divide
        yield (torch.arange(count) - 1, 7, shape), {"stream": 1}


def _sampler_update_examples():
    generator = torch.Generator().manual_seed(0)
    latent, noise, delta = torch.randn(3, 2, 4, 8, 8, generator=generator)
    row = torch.tensor([1.0, -0.3, 5.0, 0.1, 0.2, -2.0], dtype=torch.float64)
    for given in (row, row * torch.tensor([[1.0], [0.0], [-0.5], [2.0]])):  # shared; per channel, one of them zero
        yield (latent, noise, delta, given, torch.tensor([3, 2**40]), 7), {"previous": (noise.flip(0), delta.flip(0))}


def _sampler_step_examples():
    generator = torch.Generator().manual_seed(0)
    shared = torch.tensor([[1.0, -0.3, 5.0, 0.1, 0.0, 0.0], [1.0, -0.3, 5.0, 0.0, 0.2, -2.0]])
    steps, seeds = torch.tensor([7, 3]), torch.tensor([3, 2**40, -1])
    for heads in (2, 1):
        for shape, index in (((4, 8, 8), 0), ((3, 5, 5), 1)):  # fresh noise; history, a size that four does not divide
            for rows in (shared, shared[:, None] * torch.randn(shape[0], 1, generator=generator)):  # shared; per channel
                latent = torch.randn(3, *shape, generator=generator)
                history = torch.randn(2, 3, *shape, generator=generator)
                output = torch.randn(3, heads * shape[0], *shape[1:], generator=generator)
                channel_rows = torch.randn(2, shape[0], 6 if heads == 2 else 10, generator=generator)
                channel_rows[:, 1:, 8:] = channel_rows[:, 1:, 8:].abs()  # limits that bite,
                channel_rows[:, :1, 8:9] = torch.inf  # and none in the first channel
                condition = () if heads == 2 else (torch.randn(3, *shape, generator=generator),)
                tables = (rows, channel_rows, steps, torch.tensor([index]))
                yield (latent, torch.empty_like(latent), history, output, *tables, seeds, *condition), {}


_ops["group_norm_act"] = Op("group_norm_act", "group_norm", _group_norm_act_reference, _group_norm_act_examples)
_ops["group_norm_act_pair"] = Op(
    "group_norm_act_pair", "group_norm", _group_norm_act_pair_reference, _group_norm_act_pair_examples
)
_ops["attention"] = Op("attention", "attention", _attention_reference, _attention_examples, measured=True)
_ops["sampler_update"] = Op("sampler_update", "sampler", _sampler_update_reference, _sampler_update_examples)
_ops["sampler_step"] = Op("sampler_step", "sampler", _sampler_step_reference, _sampler_step_examples)


def group_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "sigmoid",
) -> Tensor | tuple[Tensor, Tensor]:
    """activation(GroupNorm(x + shift)): normalisation, non-linearity and time embedding of one half of a ResNet block.

    With `x_bias` or `residual`, what a convolution left to its reader, the norm is that of total + shift, total = x + x_bias +
    residual, and the total is returned as well.

    Args:
        x: (N, C, H, W).
        weight, bias: Affine parameters, (C,).
        num_groups: Groups; must divide C.
        shift: Projected time embedding added before the norm, (N, C), or None.
        x_bias: Bias of the convolution that made x without it, (C,), or None.
        residual: (N, C, H, W) that x is to be added to, in the dtype of x, or None.
        activation: "sigmoid" (as MultiBeta prints), "silu" (as the code it extends) or "none".

    Returns:
        (N, C, H, W), in the dtype and memory format of `x`; with `x_bias` or `residual` the pair (result, total).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.shape[1] % num_groups:
        raise ValueError(f"channels must divide into groups, got {x.shape[1]} channels and {num_groups} groups")
    op = _ops["group_norm_act"]
    return op(x, weight, bias, num_groups, eps, shift=shift, x_bias=x_bias, residual=residual, activation=activation)


def group_norm_act_pair(
    x: Tensor,
    beside: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "sigmoid",
) -> Tensor | tuple[Tensor, Tensor]:
    """`group_norm_act` of x and `beside` side by side in channels, whose concatenation is made only where no kernel accepts them.

    Args:
        x, beside: (N, C1, H, W) and (N, C2, H, W).
        weight, bias, num_groups, eps, shift, activation: As for `group_norm_act`, of C1 + C2 channels.
        x_bias, residual: As for `group_norm_act`, of x alone.

    Returns:
        (N, C1 + C2, H, W); with `x_bias` or `residual` the pair (result, total), of which the total has C1 channels.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    options, sums = {"shift": shift, "activation": activation}, {"x_bias": x_bias, "residual": residual}
    kernel = _ops["group_norm_act_pair"].kernel_for(x, beside, weight, bias, num_groups, eps, **options, **sums)
    if kernel is not None:
        return kernel.function(x, beside, weight, bias, num_groups, eps, **options, **sums)
    total = _total(x, x_bias, residual)
    y = group_norm_act(torch.cat([total, beside], dim=1), weight, bias, num_groups, eps, **options)
    return y if x_bias is None and residual is None else (y, total)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(head_dim)) value.

    Gradients of gradients (create_graph=True) need `backend("reference")`: torch has none for its fused kernels, and says so.

    Args:
        query, key, value: (N, L, heads, head_dim).

    Returns:
        (N, L, heads, head_dim).
    """
    return _ops["attention"](query, key, value)


def sampler_update(
    latent: Tensor,
    noise_prediction: Tensor,
    delta: Tensor,
    row: Tensor,
    seeds: Tensor,
    step: int,
    *,
    previous: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One row of a sampler: row . (latent, noise_prediction, delta, fresh noise, previous noise_prediction, previous delta).

    Args:
        latent, noise_prediction, delta: (N, C, H, W).
        row: Six coefficients, in the order above, (6,); or six for each channel, (C, 6).
        seeds: One 64-bit seed per sample, (N,) int64.
        step: Grid index the latent stands at; with the seed it keys the fresh noise.
        previous: Predictions of the evaluation before this one, for multistep rows.

    Returns:
        The next latent, (N, C, H, W).

    Raises:
        ValueError: Predictions of another shape than the latent's, a row for other channels, seeds that are no integers, or not
            one for each sample.
    """
    for prediction in (noise_prediction, delta, *(previous or ())):
        if prediction.shape != latent.shape:
            raise ValueError(f"predictions must have the latent's shape {tuple(latent.shape)}, got {tuple(prediction.shape)}")
    if row.shape not in ((6,), (*latent.shape[1:2], 6)):
        raise ValueError(f"row must be (6,) or (C, 6) for a latent {tuple(latent.shape)}, got {tuple(row.shape)}")
    seeds = as_seeds(seeds)
    if seeds.shape != latent.shape[:1]:
        raise ValueError(f"one seed per sample is needed, got {tuple(seeds.shape)} seeds for {len(latent)} samples")
    return _ops["sampler_update"](latent, noise_prediction, delta, row, seeds, step, previous=previous)


def sampler_step(
    latent: Tensor,
    network_input: Tensor,
    history: Tensor,
    output: Tensor,
    rows: Tensor,
    channel_rows: Tensor,
    steps: Tensor,
    counter: Tensor,
    seeds: Tensor,
    condition: Tensor | None = None,
) -> None:
    """`sampler_update` as one step of a captured loop: everything it needs lies on the device, everything it writes is in place.

    At evaluation k = counter, with (first, second) the two heads in `output` and, per channel,
    (a, b, o, d, s, i) = channel_rows[k]:

        noise_prediction = a first + b latent + o,    delta = d second,
        latent <- rows[k] . (latent, noise_prediction, delta, fresh noise, *history),
        history <- (noise_prediction, delta),    network_input <- s latent + i.

    With `condition` the network has one head, from which both predictions come: first = output and, per channel,
    (a, b, o, d, s, i, e, g, l, j) = channel_rows[k],

        delta = clamp(d noise_prediction + e latent + g condition, -l, l) - g condition,
        network_input <- s latent + i + j condition.

    Args:
        latent: (N, C, H, W) float32, contiguous; overwritten by the next latent.
        network_input: (N, C, H, W), any dtype and strides; overwritten by the input of the next evaluation.
        history: (2, N, C, H, W) float32, contiguous, finite; overwritten by this evaluation's predictions.
        output: Of the network, (N, 2 C, H, W), with `condition` (N, C, H, W), any float dtype and strides.
        rows: Coefficients of each evaluation, (S, 6) or (S, C, 6) float32, as in `sampler_update`.
        channel_rows: (S, C, 6) float32, with `condition` (S, C, 10), whose l is not negative and may be infinite.
        steps: Grid index of each evaluation, (S,) int64; with the seed it keys the fresh noise.
        counter: The evaluation at hand, (1,) int64; left as it is.
        seeds: (N,) int64.
        condition: (N, C, H, W) float32, contiguous, finite; None for two heads.
    """
    _ops["sampler_step"](latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition)


_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def _multiply_high_low(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    # int64 holds a 32 x 32 bit product only in halves of 16 bits
    low_part = multiplier * (x & 0xFFFF)
    high = (multiplier * (x >> 16) + (low_part >> 16)) >> 16
    return high & _MASK32, (multiplier * x) & _MASK32


def philox(key: Tensor, counter: tuple[Tensor | int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words for a 64-bit key and a 128-bit counter.

    Args:
        key: int64, any shape; its 64 bits are the key.
        counter: Four 32-bit words, low first, ints or int64 tensors that broadcast with `key`.

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    key_low, key_high = key & _MASK32, (key >> 32) & _MASK32
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, device=key.device) + 0 * key for c in counter))
    for _ in range(10):
        high0, low0 = _multiply_high_low(_PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key_low, low1, high0 ^ c3 ^ key_high, low0
        key_low, key_high = (key_low + _PHILOX_WEYL[0]) & _MASK32, (key_high + _PHILOX_WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def standard_normal(seeds: Tensor, step: int, shape: tuple[int, ...], *, stream: int = 0) -> Tensor:
    """Standard normal noise that belongs to the sample: a function of (seed, step, position) alone.

    Four consecutive positions of the flattened sample share one Philox block, Box-Muller turns its words into normals.

    Args:
        seeds: One 64-bit seed per sample, (N,) int64.
        step: Grid index, 0 <= step < 2^32.
        shape: Shape of one sample.
        stream: Separates uses of one seed: 0 is the sampler's fresh noise, 1 the initial latent, 2 the encoder's noise, 3 the
            component of a mixture.

    Returns:
        (N, *shape), float32. Every backend makes it of the same Philox words; their logarithms, sines and cosines round apart in
        the last places, by less than 1e-6 of a normal.

    Raises:
        ValueError: Seeds that are no integers, or no row of them.
    """
    seeds = as_seeds(seeds)
    if seeds.dim() != 1:
        raise ValueError(f"one seed per sample is needed, (N,), got {tuple(seeds.shape)}")
    return _ops["standard_normal"](seeds, step, shape, stream=stream)


def _standard_normal_reference(seeds, step, shape, *, stream=0):
    size = math.prod(shape)
    quad = torch.arange((size + 3) // 4, device=seeds.device)
    words = philox(seeds[:, None], (quad[None], step, stream, 0))
    uniform = [(word >> 8).float() for word in words]
    normals = []
    for first, second in ((uniform[0], uniform[1]), (uniform[2], uniform[3])):
        radius = torch.sqrt(-2 * torch.log((first + 1) * 2**-24))  # (0, 1]: the logarithm is finite
        angle = second * (2 * math.pi * 2**-24)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1).flatten(1)[:, :size].reshape(-1, *shape)


_ops["standard_normal"] = Op("standard_normal", "noise", _standard_normal_reference, _standard_normal_examples)


def sample_seeds(seed: int, indices: Tensor) -> Tensor:
    """A 64-bit seed per sample from one user seed and the sample's index.

    Args:
        seed: Any integer, modulo 2^64: see `seeds.as_seed`.
        indices: Integers, (N,), non-negative.

    Returns:
        (N,) int64.
    """
    indices = as_seeds(indices)
    key = torch.full_like(indices, as_seed(seed))
    low, high, _, _ = philox(key, (indices & _MASK32, (indices >> 32) & _MASK32, 0, 0xFFFFFFFF))
    return low | (high << 32)


class _Triton:
    """A Triton kernel and its `accepts`, from a module of `multibeta.kernels` that is imported when a CUDA tensor asks for it."""

    def __init__(self, module: str, function: str, accepts: str):
        self.module, self.names = f"multibeta.kernels.{module}", (function, accepts)
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

    def function(self, *args, **kwargs) -> Tensor | tuple[Tensor, Tensor] | None:
        if self.outcome is not None and (reason := self.load()) is not None:  # called without being asked first
            raise RuntimeError(reason)
        return self._function(*args, **kwargs)

    def accepts(self, *args, **kwargs) -> str | None:
        if not args[0].is_cuda and not _interpreted:
            return f"tensors are on {args[0].device.type}, Triton needs CUDA"
        reason = self.load()
        return self._accepts(*args, **kwargs) if reason is None else reason


def _register_kernels() -> None:
    for op_name, module in (
        ("group_norm_act", "group_norm_act"),
        ("group_norm_act_pair", "group_norm_act"),
        ("sampler_update", "sampler_update"),
        ("sampler_step", "sampler_update"),
    ):
        triton = _Triton(module, op_name, f"accepts_{op_name}")
        register(op_name, Kernel("triton", triton.function, triton.accepts))
    names = "group_norm_act group_norm_act_pair attention sampler_update sampler_step standard_normal"
    for op_name in names.split():
        register(op_name, Kernel("cpp", getattr(cpp, op_name), getattr(cpp, f"accepts_{op_name}")))
    for name in attention_kernels.SDPA_BACKENDS:
        register("attention", Kernel("sdpa", *attention_kernels.pinned_sdpa(name), name=name))
    register("attention", Kernel("xformers", attention_kernels.xformers, attention_kernels.accepts_xformers))
    register("attention", Kernel("sdpa", attention_kernels.sdpa, attention_kernels.accepts_sdpa))


_register_kernels()
