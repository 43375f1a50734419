"""What every measure asks of what it is given: the right shape and range, finite values, rows that belong together, seeds."""

from __future__ import annotations

import math
import operator
import warnings
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multibeta.weights import shorten

ArrayLike = Tensor | npt.ArrayLike
"""What becomes an array of numbers: a tensor of any device, an array, or nested sequences."""

OVERSHOOT = 1.5  # what decoders may leave [-1, 1] by; bytes, [0, 1] scaled twice and images normalised by ImageNet go farther


def as_array(values: ArrayLike, name: str = "values") -> np.ndarray:
    """A tensor of any device or an array-like as numpy; half precisions, which numpy handles badly, become float32.

    Raises:
        ValueError: rows of several lengths.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype in (torch.float16, torch.bfloat16) else values).numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must be an array, got rows of several lengths ({error})") from None
    return array.astype(np.float32) if array.dtype == np.float16 else array


def as_integer(value: SupportsIndex, name: str, least: int | None = None, most: int | None = None) -> int:
    """A whole number of Python, NumPy or torch as int.

    Raises:
        ValueError: another type of value, such as 2.0 or None, or one outside [least, most].
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if least is not None and most is not None and not least <= number <= most:
        raise ValueError(f"{name} must lie between {least} and {most}, got {number}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def as_images(
    images: Tensor | np.ndarray,
    name: str = "images",
    *,
    channels: int | None = None,
    least: int = 1,
    largest: float = OVERSHOOT,
    warn: bool = True,
) -> Tensor:
    """Images as a floating point tensor (N, C, H, W), where they are and with their gradient.

    Args:
        images: Tensor or array in [-1, 1].
        channels: The C that is needed; by default any.
        least: Pixels that each side needs.
        largest: Magnitude up to which values are taken for images; infinity for a measure that knows no range.
        warn: Warn where no pixel is negative, as if the images were in [0, 1].

    Raises:
        ValueError: another shape, no images, bytes or other integers, NaN or infinity, values far outside [-1, 1].
    """
    images = as_image_tensor(images, name)
    if channels is not None and images.shape[1] != channels:
        shown = f"(N, {channels}, H, W), got {tuple(images.shape)}"
        raise ValueError(f"{name} must have shape {shown}; repeat a single channel three times")
    if min(images.shape[2:]) < least:
        raise ValueError(f"{name} need {least} pixels a side, got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"{name} must be floating point in [-1, 1], got {images.dtype}; multibeta.data.to_float converts bytes")
    if not images.numel():
        raise ValueError(f"at least one image is needed, got {name} of shape {tuple(images.shape)}")
    low, high = value_range(images, name, largest)
    if warn and largest < math.inf:
        warn_of_range(low, high, name)
    return images


def as_image_tensor(images: Tensor | np.ndarray, name: str = "images") -> Tensor:
    """A tensor as it is, an array as a tensor of its own dtype: `ValueError` unless it has the shape (N, C, H, W) of images."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "fiub":
        images = torch.from_numpy(np.array(images))
    if not isinstance(images, Tensor) or images.dim() != 4 or 0 in images.shape[1:]:
        given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name} must come as arrays or tensors (n, C, H, W), got {given}")
    if images.shape[1] > 4 and images.shape[3] in (1, 3):
        raise ValueError(f"{name} must have shape (n, C, H, W), got {tuple(images.shape)}: bring the channels to the front")
    return images


def value_range(images: Tensor, name: str = "images", largest: float = OVERSHOOT) -> tuple[float, float]:
    """(lowest, highest) value of images that are not empty; `ValueError` for NaN, infinity or what is far outside [-1, 1]."""
    low, high = (float(value) for value in images.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    if max(-low, high) > largest:
        farthest = f"up to {high:g}" if high > largest else f"down to {low:g}"
        raise ValueError(f"{name} must lie in [-1, 1], got values {farthest}; multibeta.data.to_float converts bytes")
    return low, high


def warn_of_range(low: float, high: float, name: str = "images") -> None:
    """Warn where images, whose values lie between `low` and `high`, seem to be in [0, 1]; one grey says nothing of its range."""
    if 0 <= low < high:
        warnings.warn(
            f"{name} should lie in [-1, 1], and have no negative pixel: values from {low:g} to {high:g}. "
            "Where they are in [0, 1], 2 * images - 1 is what is needed",
            stacklevel=4,
        )


def as_codes(codes: ArrayLike) -> np.ndarray:
    """Finite codes, (N, K), in their own precision.

    Raises:
        ValueError: another shape, no samples or codes, NaN or infinity, or values that are not real numbers.
    """
    codes = as_array(codes, "codes")
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(f"codes must be (samples, codes) with at least one of each, got shape {codes.shape}")
    if codes.dtype.kind not in "fiub":
        raise ValueError(f"codes must be real numbers, got {codes.dtype}")
    if codes.dtype.kind != "f":
        return codes.astype(np.float64)
    if not np.isfinite(codes).all():
        wrong = np.flatnonzero(~np.isfinite(codes).all(0)).tolist()
        raise ValueError(f"codes must be finite, got NaN or infinity in columns {shorten(wrong, 10)}")
    return codes


def as_factors(factors: ArrayLike, num_samples: int, constant: bool = False) -> np.ndarray:
    """Integer factors, (N, F), one row for each of the codes; `constant` allows factors that never change.

    Raises:
        ValueError: another shape or length, values that are not integers, or a factor that never changes.
    """
    factors = _rows(as_array(factors, "factors"), num_samples, "factors")
    if factors.dtype.kind not in "iub":
        raise ValueError(f"factors must be integers, got {factors.dtype}")
    stuck = np.flatnonzero((factors == factors[0]).all(0)).tolist()
    if stuck and not constant:
        raise ValueError(f"every factor must take two values or more, constant are columns {shorten(stuck, 10)}")
    return factors.astype(np.int64)


def as_attributes(attributes: ArrayLike, num_samples: int) -> np.ndarray:
    """Binary attributes as bool, (N, A), one row for each of the codes.

    Raises:
        ValueError: another shape or length, or values other than 0 and 1.
    """
    attributes = _rows(as_array(attributes, "attributes"), num_samples, "attributes")
    if attributes.dtype.kind not in "fiub":
        raise ValueError(f"attributes must be 0 or 1, got {attributes.dtype}")
    if attributes.dtype != bool and not np.isin(attributes, (0, 1)).all():
        raise ValueError(f"attributes must be 0 or 1, got values from {attributes.min()} to {attributes.max()}")
    return attributes.astype(bool)


def _rows(array: np.ndarray, num_samples: int, name: str) -> np.ndarray:
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be (samples, {name}) with at least one of each, got shape {array.shape}")
    if len(array) != num_samples:
        raise ValueError(f"{name} must have one row per code vector, got {len(array)} rows for {num_samples} codes")
    return array
