"""Whether a kernel computes what its op means: against the float64 reference, alone or in a batch, with the CPU's noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common import calls
from common.layers import Attention, Layer, Norm, Pair
from multibeta import ops

TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float32: 2e-5, torch.float16: 3e-3}
# Where the samples of a batch lie: dimension of each positional argument that has them, and of each result.
BATCH_DIMENSIONS = {
    "group_norm_act": ({0: 0}, (0, 0)),
    "group_norm_act_pair": ({0: 0, 1: 0}, (0,)),
    "sampler_update": ({0: 0, 1: 0, 2: 0, 4: 0}, (0,)),
    "sampler_step": ({0: 0, 1: 0, 2: 1, 3: 0, 8: 0, 9: 0}, (0, 0, 1)),
    "standard_normal": ({0: 0}, (0,)),
}


class Case(NamedTuple):
    """A call to check; with `gradients` its derivatives are checked as well."""

    label: str
    args: tuple
    kwargs: dict
    gradients: bool = False


def cases(
    op: ops.Op, layers: Iterable[Layer], device: torch.device, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE)
) -> Iterator[Case]:
    """Calls of an op: its examples, in float32, and the shapes of `layers`, in each dtype; norms by all activations."""
    for index, (args, kwargs) in enumerate(op.examples() if torch.float32 in dtypes else ()):
        yield Case(f"example {index}", convert(args, device=device), convert(kwargs, device=device))
    for dtype in dtypes:
        if op.name == "group_norm_act":
            norms = sorted({(n.channels, n.height, n.width, n.groups) for n in layers if isinstance(n, Norm)})
            for number, (activation, (*shape, groups)) in enumerate(itertools.product(("silu", "none", "sigmoid"), norms)):
                form = {
                    "activation": activation,
                    "shifted": activation == "silu" or number % 2 == 0,
                    "x_bias": number % 4 == 2,
                    "residual": number % 3 == 0,
                    "layout": "contiguous" if number % 4 == 3 else "channels-last",
                }
                gradients = activation == "silu" and dtype != torch.float16
                args, kwargs = calls.norm_call((2, *shape), groups, device, dtype, gradients=gradients, **form)
                yield Case(f"{shape} {dtype} {form}", args, kwargs, gradients)
        elif op.name == "group_norm_act_pair":
            for pair in sorted({p for p in layers if isinstance(p, Pair)}, key=str):
                shape, options = (2, pair.channels, pair.height, pair.width), {"activation": pair.activation}
                yield Case(f"{pair} {dtype}", *calls.pair_call(shape, pair.skip_channels, pair.groups, device, dtype, **options))
        elif op.name == "attention":
            for shape in sorted({(a.length, a.heads, a.head_dim) for a in layers if isinstance(a, Attention)}):
                yield Case(f"{shape} {dtype}", calls.attention_call((2, *shape), device, dtype), {})
        elif op.name in ("sampler_update", "sampler_step"):
            for label, args, kwargs in calls.sampler_calls(op.name, (3, 4, 32, 32), device, dtype):
                yield Case(f"{label} {dtype}", args, kwargs)


def convert(value: Any, **to: Any) -> Any:
    """The tensors within tuples and dicts moved, the floating ones cast as well; leaves that take gradients."""
    if isinstance(value, Tensor):
        to = to if value.is_floating_point() else {name: target for name, target in to.items() if name != "dtype"}
        return value.detach().to(**to, copy=True).requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        return tuple(convert(item, **to) for item in value)
    return {name: convert(item, **to) for name, item in value.items()} if isinstance(value, dict) else value


def outcome(function: Callable, args: tuple, kwargs: dict, gradients: bool = False) -> tuple[Tensor, ...]:
    """What a call returns, or what it overwrites (of `ops.sampler_step`); then the gradients of a fixed function of it."""
    args, kwargs = convert(args), convert(kwargs)
    result = function(*args, **kwargs)
    if result is None:
        return args[:3]
    results = result if isinstance(result, tuple) else (result,)
    if not gradients:
        return tuple(tensor.detach() for tensor in results)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(tensor.shape, generator=generator).bfloat16().to(tensor) for tensor in results]
    leaves = [tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor) and tensor.requires_grad]
    derivatives = torch.autograd.grad(results, leaves, cotangents)
    return (*(tensor.detach() for tensor in results), *derivatives)


def worst_error(op: ops.Op, function: Callable, args: tuple, kwargs: dict, *, gradients: bool = False) -> tuple[float, float]:
    """Relative error (in the Euclidean norm) of the result that uses most of its tolerance, and that tolerance."""
    wide: dict[str, Any] = {"dtype": torch.float64}
    if op.name in ("sampler_update", "sampler_step", "standard_normal"):  # its noise must be the CPU's
        wide["device"] = torch.device("cpu")
    expected = outcome(op.reference, convert(args, **wide), convert(kwargs, **wide), gradients)
    pairs = []
    for actual, wanted in zip(outcome(function, args, kwargs, gradients), expected, strict=True):
        difference = float((actual.to(wanted) - wanted).norm() / wanted.norm().clamp(min=1e-30))
        pairs.append((difference if difference == difference else float("inf"), TOLERANCE[actual.dtype]))
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def disagreement(op: ops.Op, function: Callable, args: tuple, kwargs: dict, *, gradients: bool = False) -> str | None:
    """What is wrong with a result, or None."""
    error, tolerance = worst_error(op, function, args, kwargs, gradients=gradients)
    return None if error <= tolerance else f"relative error {error:.1e}, {tolerance:.1e} is allowed"


def batch_free(op: ops.Op, function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a sample comes out alone as it does in its batch, bit for bit; True for ops that do not promise it."""
    if op.name not in BATCH_DIMENSIONS or len(args[0]) < 2:
        return True
    dimensions, result_dimensions = BATCH_DIMENSIONS[op.name]
    one_args = tuple(x.narrow(dimensions[i], 1, 1) if i in dimensions else x for i, x in enumerate(args))
    narrow = lambda x: tuple(y.narrow(0, 1, 1) for y in x) if isinstance(x, tuple) else x.narrow(0, 1, 1)  # noqa: E731
    batched = {name: x for name, x in kwargs.items() if isinstance(x, Tensor | tuple) and name != "x_bias"}  # which is (C,)
    one_kwargs = {name: narrow(x) if name in batched else x for name, x in kwargs.items()}
    together, alone = outcome(function, args, kwargs), outcome(function, one_args, one_kwargs)
    return all(
        torch.equal(a.narrow(dimension, 1, 1), b) for a, b, dimension in zip(together, alone, result_dimensions, strict=False)
    )


def noise(device: torch.device) -> dict[str, object]:
    """Whether Triton makes its noise of the words of the CPU, and how far the normal numbers made of them differ."""
    from common import noise as triton_noise  # Triton is an extra

    seeds, step, quads = torch.tensor([3, 2**40 + 5, -1]), 917, 4096
    expected = torch.stack(ops.philox(seeds[:, None], (torch.arange(quads)[None], step, 0, 0)), dim=1)
    same = torch.equal(triton_noise.words(seeds.to(device), step, quads).cpu(), expected)
    normals = triton_noise.normals(seeds.to(device), step, (4, 64, 64)).cpu()
    difference = normals - ops.find("standard_normal").reference(seeds, step, (4, 64, 64))
    return {"same_words": same, "largest_difference": float(difference.abs().max())}
