"""`sampler_update` and `sampler_step`: one row of a sampler."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from multibeta.kernels.columns import (
    ONE_HEAD_COLUMNS,
    SAMPLER_COLUMNS,
    TWO_HEAD_COLUMNS,
    OneHeadRow,
    SamplerRow,
    TwoHeadRow,
    pack,
    pack_rows,
)
from multibeta.ops.noise import standard_normal_reference
from multibeta.ops.registry import Example, Op, add, cpp_kernel, triton_kernel
from multibeta.seeds import as_seeds


def _sampler_update_reference(
    latent: Tensor,
    noise_prediction: Tensor,
    delta: Tensor,
    row: Tensor,
    seeds: Tensor,
    step: int,
    *,
    previous: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    draws = row[..., SamplerRow._fields.index("fresh_noise")].any()
    on = SamplerRow(*(row.tolist() if row.dim() == 1 else row.to(latent)[:, :, None, None].unbind(1)))
    result = on.latent * latent + on.noise_prediction * noise_prediction + on.delta * delta + on.offset
    if draws:
        result = result + on.fresh_noise * standard_normal_reference(seeds, step, latent.shape[1:]).to(latent)
    if previous is not None:
        result = result + on.previous_noise_prediction * previous[0] + on.previous_delta * previous[1]
    return result


def _sampler_step_reference(
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
    index = int(counter)
    columns = channel_rows[index][:, None, None].unbind(-1)
    row = TwoHeadRow(*columns) if condition is None else OneHeadRow(*columns)
    first, *second = output.float().chunk(2 if condition is None else 1, dim=1)
    input_offset = row.input_offset
    if isinstance(row, TwoHeadRow):
        noise_prediction, delta = row.predictions(latent, first, second[0])
    else:
        assert condition is not None and isinstance(row.delta_limit, Tensor), "of one head"
        noise_prediction = row.noise_from_output * first + row.noise_from_latent * latent + row.noise_offset
        centre = row.delta_from_condition * condition
        denoised = row.delta_from_noise * noise_prediction + row.delta_from_latent * latent + centre
        delta = denoised.clamp(-row.delta_limit, row.delta_limit) - centre
        input_offset = input_offset + row.input_from_condition * condition
    step, previous = int(steps[index]), (history[0], history[1])
    result = _sampler_update_reference(latent, noise_prediction, delta, rows[index], seeds, step, previous=previous)
    history.copy_(torch.stack([noise_prediction, delta]))
    latent.copy_(result)
    network_input.copy_(row.input_from_latent * result + input_offset)


def _sampler_update_examples() -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    latent, noise, delta = torch.randn(3, 2, 4, 8, 8, generator=generator)
    row = pack(SamplerRow(1.0, -0.3, 5.0, 0.1, previous_noise_prediction=0.2, previous_delta=-2.0, offset=0.3), ())
    for given in (row, row * torch.tensor([[1.0], [0.0], [-0.5], [2.0]])):  # shared; per channel, one of them zero
        yield (latent, noise, delta, given, torch.tensor([3, 2**40]), 7), {"previous": (noise.flip(0), delta.flip(0))}


def _sampler_step_examples() -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    named = SamplerRow(1.0, -0.3, 5.0, 0.1), SamplerRow(1.0, -0.3, 5.0, 0.0, 0.2, -2.0, 0.3)
    shared = pack_rows(named, ()).float()
    steps, seeds = torch.tensor([7, 3]), torch.tensor([3, 2**40, -1])
    for heads in (2, 1):
        for shape, index in (((4, 8, 8), 0), ((3, 5, 5), 1)):  # fresh noise; history, a size that four does not divide
            for rows in (shared, shared[:, None] * torch.randn(shape[0], 1, generator=generator)):  # shared; per channel
                latent = torch.randn(3, *shape, generator=generator)
                history = torch.randn(2, 3, *shape, generator=generator)
                output = torch.randn(3, heads * shape[0], *shape[1:], generator=generator)
                columns = TWO_HEAD_COLUMNS if heads == 2 else ONE_HEAD_COLUMNS
                channel_rows = torch.randn(2, shape[0], columns, generator=generator)
                if heads == 1:
                    limit = channel_rows[..., OneHeadRow._fields.index("delta_limit")]  # a view
                    limit.abs_()  # limits that bite,
                    limit[:, :1] = torch.inf  # and none in the first channel
                condition = () if heads == 2 else (torch.randn(3, *shape, generator=generator),)
                tables = (rows, channel_rows, steps, torch.tensor([index]))
                yield (latent, torch.empty_like(latent), history, output, *tables, seeds, *condition), {}


SAMPLER_UPDATE, SAMPLER_STEP = (
    add(Op(name, "sampler", reference, examples, [triton_kernel("sampler_update", name), cpp_kernel(name)]))
    for name, reference, examples in (
        ("sampler_update", _sampler_update_reference, _sampler_update_examples),
        ("sampler_step", _sampler_step_reference, _sampler_step_examples),
    )
)


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
    """One row of a sampler: the sum of latent, predictions, fresh noise, previous predictions and offset that `SamplerRow` names.

    Args:
        latent, noise_prediction, delta: (N, C, H, W).
        row: A packed `SamplerRow`, (7,); or one for each channel, (C, 7).
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
    if row.shape not in ((SAMPLER_COLUMNS,), (*latent.shape[1:2], SAMPLER_COLUMNS)):
        raise ValueError(f"row must be (7,) or (C, 7) for a latent {tuple(latent.shape)}, got {tuple(row.shape)}")
    seeds = as_seeds(seeds)
    if seeds.shape != latent.shape[:1]:
        raise ValueError(f"one seed per sample is needed, got {tuple(seeds.shape)} seeds for {len(latent)} samples")
    return SAMPLER_UPDATE(latent, noise_prediction, delta, row, seeds, step, previous=previous)


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

    At evaluation k = counter, with (first, second) the two heads in `output`, row = channel_rows[k] a channel's `TwoHeadRow`:

        noise_prediction = row.noise_from_output first + row.noise_from_latent latent + row.noise_offset
        delta = row.delta_from_second second + row.delta_from_noise noise_prediction + row.delta_from_latent latent
            + row.delta_offset
        latent <- `sampler_update` of latent, noise_prediction, delta and history by rows[k]
        history <- (noise_prediction, delta)
        network_input <- row.input_from_latent latent + row.input_offset

    With `condition` the network has one head, from which both predictions come: first = output, and row is a `OneHeadRow`,

        centre = row.delta_from_condition condition
        delta = clamp(row.delta_from_noise noise_prediction + row.delta_from_latent latent + centre, ±row.delta_limit) - centre
        network_input <- row.input_from_latent latent + row.input_offset + row.input_from_condition condition

    Args:
        latent: (N, C, H, W) float32, contiguous; overwritten by the next latent.
        network_input: (N, C, H, W), any dtype and strides; overwritten by the input of the next evaluation.
        history: (2, N, C, H, W) float32, contiguous, finite; overwritten by this evaluation's predictions.
        output: Of the network, (N, 2 C, H, W), with `condition` (N, C, H, W), any float dtype and strides.
        rows: The `SamplerRow` of each evaluation, packed, (S, 7) or (S, C, 7) float32.
        channel_rows: Packed, (S, C, 9) float32, with `condition` (S, C, 10), whose `delta_limit` is not negative and may be
            infinite; the network input is that of the next evaluation (see `with_next_input`).
        steps: Grid index of each evaluation, (S,) int64; with the seed it keys the fresh noise.
        counter: The evaluation at hand, (1,) int64; left as it is.
        seeds: (N,) int64.
        condition: (N, C, H, W) float32, contiguous, finite; None for two heads.
    """
    SAMPLER_STEP(latent, network_input, history, output, rows, channel_rows, steps, counter, seeds, condition)
