"""What the verbs share that make images: seeds, progress, what callbacks see, paths, and the form of images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from multibeta.checks import check_real
from multibeta.data import to_uint8
from multibeta.progress import progress_bar
from multibeta.sampling import Callback
from multibeta.seeds import as_seed

OUTPUT_TYPES = ("pt", "np", "pil")

StepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


def choose_seed(seed: int, generator: torch.Generator | None) -> int:
    """`seed` modulo 2^64, or what `generator` gives in its place: one int64 drawn from it, which moves it on.

    Raises:
        ValueError, TypeError: A seed that is no integer, or next to the generator; something that is no generator, such as a
            list of them.
    """
    if generator is None:
        return as_seed(seed)
    if not isinstance(generator, torch.Generator):
        name = type(generator).__name__
        raise TypeError(f"generator must be one torch.Generator, got a {name}; images have seeds of their own already")
    if seed:
        raise ValueError(f"give a seed or a generator, not both: got seed={seed} and a generator")
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


@torch.no_grad()
def generate_each(
    make: Callable[[Tensor, Callback], Tensor],
    batches: Sequence[Tensor],
    callback: Callback | None,
    progress: dict[str, Any],
) -> Iterator[Tensor]:
    """The images of each batch, under one count of evaluations.

    Args:
        make: (seeds, what to call after each evaluation) to images; all batches take as many evaluations.
        batches: Seeds of the images.
        callback: Called with (evaluations done, evaluations in total over all batches, latent).
        progress: Options of the tqdm bar.
    """
    options: dict[str, Any] = {"desc": "generating", "unit": "evaluation"} | progress
    with progress_bar(**options) as bar:

        def advance(index: int, done: int, total: int, latent: Tensor) -> None:
            bar.total = len(batches) * total
            bar.update()
            if callback is not None:
                callback(index * total + done, len(batches) * total, latent)

        for index, seeds in enumerate(batches):
            yield make(seeds, functools.partial(advance, index))


def with_step_end(
    callback: Callback | None,
    step_end: StepEnd | None,
    model: object,
    steps: Tensor,
    *,
    takes_changes: bool,
) -> Callback | None:
    """`callback`, followed by a `callback_on_step_end` as diffusers calls it.

    That is step_end(model, index of the evaluation, its step, {"latents": latent}), which returns the dict.

    Args:
        steps: Grid index of each evaluation, (S,).
        takes_changes: Whether the loop goes on from what callbacks leave in its latent; if not, a change is a `ValueError`.
    """
    if step_end is None:
        return callback

    def both(done: int, total: int, latent: Tensor) -> None:
        if callback is not None:
            callback(done, total, latent)
        given = latent if takes_changes else latent.clone()  # the buffer of an engine is overwritten by the next step
        written = _times_written(given)
        returned = (step_end(model, done - 1, steps[done - 1], {"latents": given}) or {}).get("latents", given)
        if returned is given and _times_written(given) == written:
            return
        if not takes_changes:
            raise ValueError(
                "callback_on_step_end changed the latents, which the engine does not take: "
                'with multibeta.backend("reference") the plain loop does'
            )
        if returned.shape != latent.shape:
            raise ValueError(f"callback_on_step_end must keep the shape {tuple(latent.shape)}, got {tuple(returned.shape)}")
        latent.copy_(returned)

    return both


def _times_written(tensor: Tensor) -> int:
    """How often the tensor was written in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def along(weights: float | Sequence[float], point: Callable[[float], Tensor], finish: Callable[[Tensor], Tensor]) -> Tensor:
    """Images of a path: `finish` of what `point` gives at each weight, all as one batch.

    Returns:
        (N, C, H, W) for one weight, (N, K, C, H, W) for a sequence of K.
    """
    try:
        each = torch.as_tensor(weights)
    except (TypeError, ValueError, RuntimeError):
        each = None
    if each is not None:
        check_real("weights", each)
        each = each.double()
    if each is None or each.dim() > 1 or not each.numel() or not each.isfinite().all():
        raise ValueError(f"weights must be a finite number or a sequence of them, got {weights!r}")
    path = torch.stack([point(weight) for weight in each.view(-1).tolist()], dim=1)
    finished = finish(path.flatten(0, 1))
    return finished if each.dim() == 0 else finished.unflatten(0, path.shape[:2])


def gather(batches: Iterator[Tensor], output_type: str) -> Any:
    """Generated batches as one output: see `Pipeline.generate`."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    return convert_output(torch.cat(list(batches)), output_type)


def convert_output(images: Tensor, output_type: str) -> Any:
    """Images (N, C, H, W) in [-1, 1] as "pt", "np" or "pil": see `Pipeline.generate`."""
    if output_type == "pt":
        return images
    channels_last = images.permute(0, 2, 3, 1).cpu()
    if output_type == "np":
        return ((channels_last + 1) / 2).numpy()
    from PIL import Image

    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in to_uint8(channels_last).numpy()]
