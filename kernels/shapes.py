"""What the kernels of an op ask of the shapes of its tensors, whatever the backend."""

from __future__ import annotations


def sampler_step_reason(latent, network_input, history, output, rows, channel_rows, condition) -> str | None:
    """Why these tensors of a call of `multibeta.ops.sampler_step` do not belong to one latent (N, C, H, W), or None."""
    if latent.ndim != 4 or latent.numel() == 0:
        return f"latent must be (N, C, H, W) and not empty, got {tuple(latent.shape)}"
    n, channels, height, width = latent.shape
    if rows.shape[1:] not in ((6,), (channels, 6)):
        return f"rows must be (S, 6) or (S, C, 6), got {tuple(rows.shape)}"
    heads, columns, given = (2, 6, "without") if condition is None else (1, 10, "with")
    if channel_rows.shape[1:] != (channels, columns):
        return f"channel_rows must be (S, C, {columns}) {given} a condition, got {tuple(channel_rows.shape)}"
    if output.shape != (n, heads * channels, height, width):
        return f"output must have {heads} C channels {given} a condition and be as large as latent, got {tuple(output.shape)}"
    if network_input.shape != latent.shape or history.shape != (2, *latent.shape):
        return "network_input and each half of history must have the shape of latent"
    if condition is not None and condition.shape != latent.shape:
        return f"condition must have the shape of latent, got {tuple(condition.shape)}"
    return None
