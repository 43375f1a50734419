"""Checks of numbers and of tensors of them, whose errors name the argument, what is possible and what was given."""

from __future__ import annotations

import math
import numbers
import operator

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
LARGEST_WEIGHT = 2**24  # next to a term of this weight float32 loses one of weight 1; and it tells no finer grid of beta
_BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def is_integer(value: object) -> bool:
    """Whether `value` is an integer of Python or NumPy; True is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether `value` is a finite real number, which a float can hold; True is none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond 1.8e308
        return False


def check_steps(steps: int, most: int, of_what: str = "") -> None:
    """Raise `ValueError` unless `steps` is an integer from 1 to `most`."""
    if not is_integer(steps):
        raise ValueError(f"steps must be an integer, got {steps!r}")
    if not 1 <= steps <= most:
        raise ValueError(f"steps must lie between 1 and {most}{of_what}, got {steps}")


def is_traced() -> bool:
    """Whether calls are recorded, by torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def check_dense(name: str, values: Tensor) -> None:
    """Raise `ValueError` unless a tensor is dense, with values: not sparse, nested or on the meta device."""
    if values.is_nested or values.layout != torch.strided:
        layout = "a nested tensor" if values.is_nested else str(values.layout)
        raise ValueError(f"{name} must be a dense tensor (torch.strided), got {layout}")
    if values.is_meta and not is_traced():
        raise ValueError(f"{name} must have values, got a tensor on the meta device")


def check_real(name: str, values: Tensor) -> None:
    """Raise `ValueError` unless a tensor is dense and of numbers that torch computes with: not complex, quantised or of 8 bits.

    Integers are, and booleans.
    """
    check_dense(name, values)
    floating = values.is_floating_point()
    if values.is_complex() or values.is_quantized or (floating and values.dtype not in FLOATS):
        raise ValueError(f"{name} must be of real numbers, got {values.dtype}: possible are integers and {FLOAT_NAMES}")


def check_floating(name: str, values: Tensor) -> None:
    """Raise `ValueError` unless a tensor is dense and of a floating point that torch computes with."""
    check_dense(name, values)
    if values.dtype not in FLOATS:
        raise ValueError(f"{name} must be of floating point, got {values.dtype}: possible are {FLOAT_NAMES}")


def is_single(value: object) -> bool:
    """Whether `value` is one, no tensor or array of several or of none."""
    return math.prod(getattr(value, "shape", ())) == 1


def check_number(name: str, value: float, **bounds: float) -> None:
    """Raise `ValueError` unless `value` is a finite number within `bounds`: `least`, `above`, `most`, `below`."""
    if not is_finite(value) or not all(_BOUNDS[side][1](value, bound) for side, bound in bounds.items()):
        words = " and ".join(f"{_BOUNDS[side][0]} {bound}" for side, bound in bounds.items())
        raise ValueError(f"{name} must be {f'finite and {words}' if words else 'a finite number'}, got {value!r}")


def check_integer(name: str, value: int, least: int, most: int = LARGEST_WEIGHT) -> None:
    """Raise `ValueError` unless `value` is an integer in [least, most]."""
    if not is_integer(value):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be at {f'least {least}' if value < least else f'most {most}'}, got {value}")


def check_weights(**weights: float) -> None:
    """Raise `ValueError` unless each is the weight of a term of a loss or of a rate: from 0 to `LARGEST_WEIGHT`."""
    for name, weight in weights.items():
        check_number(name, weight, least=0, most=LARGEST_WEIGHT)


def check_counts(config: object, *names: str) -> None:
    """Raise `ValueError` unless the fields `names` of a config are integers of at least 1, or tuples of such; None passes."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple | list) else [value] * (value is not None):
            check_integer(name, number, 1)


def check_even(config: object, name: str) -> None:
    """Raise `ValueError` unless a field of a config is even: sines and cosines share it."""
    if getattr(config, name) % 2:
        raise ValueError(f"{name} must be even, got {getattr(config, name)}")


def check_beta(beta: float | Tensor) -> None:
    """Raise `ValueError` unless `beta` is a number in [0, 1], or numbers there."""
    if isinstance(beta, numbers.Real):
        low = high = float(beta)
    else:
        try:
            values = torch.as_tensor(beta)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"beta must be a number in [0, 1], or one for each sample, got {beta!r}") from None
        check_real("beta", values)
        values = values.double()
        low, high = (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise ValueError(f"beta must lie in [0, 1], got {low if not low >= 0 else high}")
