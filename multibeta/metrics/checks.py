"""What every measure asks of its arrays: the right shape, finite values, rows that belong together."""

import numpy as np
import torch


def as_array(values):
    """A tensor of any device or an array-like as numpy; half precisions, which numpy handles badly, become float32."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype in (torch.float16, torch.bfloat16) else values).numpy()
    array = np.asarray(values)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def as_codes(codes):
    """Finite codes, (N, K), in their own precision.

    Raises:
        ValueError: another shape, no samples or codes, NaN or infinity, or values that are not real numbers.
    """
    codes = as_array(codes)
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(f"codes must be (samples, codes) with at least one of each, got shape {codes.shape}")
    if codes.dtype.kind not in "fiub":
        raise ValueError(f"codes must be real numbers, got {codes.dtype}")
    if codes.dtype.kind != "f":
        return codes.astype(np.float64)
    if not np.isfinite(codes).all():
        wrong = np.flatnonzero(~np.isfinite(codes).all(0)).tolist()
        raise ValueError(f"codes must be finite, got NaN or infinity in columns {some(wrong)}")
    return codes


def as_factors(factors, num_samples, constant=False):
    """Integer factors, (N, F), one row for each of the codes; `constant` allows factors that never change.

    Raises:
        ValueError: another shape or length, values that are not integers, or a factor that never changes.
    """
    factors = _rows(as_array(factors), num_samples, "factors")
    if factors.dtype.kind not in "iub":
        raise ValueError(f"factors must be integers, got {factors.dtype}")
    stuck = np.flatnonzero((factors == factors[0]).all(0)).tolist()
    if stuck and not constant:
        raise ValueError(f"every factor must take two values or more, constant are columns {some(stuck)}")
    return factors.astype(np.int64)


def as_attributes(attributes, num_samples):
    """Binary attributes as bool, (N, A), one row for each of the codes.

    Raises:
        ValueError: another shape or length, or values other than 0 and 1.
    """
    attributes = _rows(as_array(attributes), num_samples, "attributes")
    if attributes.dtype != bool and not np.isin(attributes, (0, 1)).all():
        raise ValueError(f"attributes must be 0 or 1, got values from {attributes.min()} to {attributes.max()}")
    return attributes.astype(bool)


def some(values, limit=10):
    """The first few of a list, for a message."""
    return ", ".join(map(str, values[:limit])) + (f" and {len(values) - limit} more" if len(values) > limit else "")


def _rows(array, num_samples, name):
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be (samples, {name}) with at least one of each, got shape {array.shape}")
    if len(array) != num_samples:
        raise ValueError(f"{name} must have one row per code vector, got {len(array)} rows for {num_samples} codes")
    return array
