"""What pages of both systems are made of: how similar images are, how far new ones, edits in rows, paths in columns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from multibeta import latents
from multibeta.evaluation import batched
from multibeta.evaluation.images import at_once
from multibeta.markup import signed
from multibeta.pipelines import Pipeline
from multibeta.report.page import number, pictures, table, words
from multibeta.report.sliders import images_that_fit, slider, spaced

DIRECTIONS = 8  # the first principal ones
ACCURACY = """Under each factor, how often a classifier, trained on real images, reads the input's value: blur alone costs what is
    decoded at once; what a denoised image lost was not in the latent, or was painted over."""


def measured_in(generated: dict) -> str:
    """What the distances of a page are measured in, and over."""
    return f"in {escape(generated['features'])} over {generated['num_images']:,} images"


def similarity_table(rows: Mapping[str, dict], numbers: dict, caption: str) -> str:
    """Rows of `evaluation.similarity` by their names, which are HTML; with the classifier's accuracy where factors are known."""
    known = numbers["factor_names"] if numbers["classifier_accuracy"] else None
    header, lines = ["", "Fréchet<br>distance", "sharpness", "squared<br>error"], []
    for name, row in rows.items():
        cells = [number(row[key]) for key in ("frechet", "sharpness", "mse")]
        lines.append([name, *cells, *(f"{accuracy:.2f}" for accuracy in row.get("accuracy", ()))])
    if known:
        header += [words(name).replace(" ", "<br>") for name in known]
        real, chance = accuracy_bounds(numbers)
        lines = [["real images", "", "", "", *real], *lines, ["chance", "", "", "", *chance]]
    accuracy = ACCURACY if known else "No factors of these images are known."
    return table(header, lines, caption.format(measured=measured_in(numbers["generation"]), accuracy=accuracy))


def accuracy_bounds(numbers: dict) -> tuple[list[str], list[str]]:
    """Accuracy of the factor classifier on real images, and of guesses, a cell for each factor."""
    real = [f"{numbers['classifier_accuracy'][name]:.2f}" for name in numbers["factor_names"]]
    return real, [f"{1 / size:.2f}" for size in numbers["data"]["factor_sizes"]]


def generation_table(
    generated: dict, header: Sequence[str], describe: Callable[[dict], Sequence[str]], floors: Mapping[str, str], caption: str
) -> str:
    """Distance and sharpness of new images, a row for each of `evaluation.generation`, and the floors.

    Args:
        header, describe: Of the cells that say how a row was made, and these for a row.
        floors: What was made of training images by its key in `generated`, with its name.
    """
    rows: list[Sequence[str]] = [
        (*describe(row), number(row["frechet"]), number(row["sharpness"])) for row in generated["samples"]
    ]
    empty = [""] * (len(header) - 1)
    for key, name in floors.items():
        measured = (number(generated[f"{key}_{measure}"]) for measure in ("floor", "sharpness"))
        rows.append((f"floor: training images, {name}", *empty, *measured))
    rows.append(("floor: training images", *empty, number(generated["real_floor"]), ""))
    return table((*header, "Fréchet distance", "sharpness"), rows, caption)


def edit_pictures(
    model: Pipeline,
    images: Tensor,
    directions: Mapping[str, Tensor],
    strengths: Sequence[float],
    beta: float | None = None,
    *,
    with_input: bool = False,
    width: int,
    **sampling: Any,
) -> str:
    """A block for each image: its mean latent at beta moved along each direction, a row each, and denoised.

    Args:
        directions: What strength 1 adds, (c, h, w) each, by their labels, which are HTML.
        with_input: Whether the image stands first in its rows.
        sampling: Arguments of the model's `denoise`.
    """
    above, left, blocks = [signed(strength) for strength in strengths], list(directions), []
    for index, latent in enumerate(model.encode(images, beta), 1):
        pairs = itertools.product(directions.values(), strengths)
        moved = [latents.manipulate(latent[None], direction, strength) for direction, strength in pairs]
        made = model.render(torch.cat(moved), beta, denoise=True, **sampling).cpu()
        if with_input:
            image = images[index - 1 : index].cpu()
            made = torch.cat([torch.cat([image, row]) for row in made.split(len(strengths))])
        shown = ["input", *above] if with_input else above
        blocks.append(pictures(made, len(shown), f"Image {index}", above=shown, left=left, width=width))
        left = []  # the same rows in the next block
    return f'<div class="blocks">{"".join(blocks)}</div>'


def path_pictures(rows: Mapping[str, Tensor], title: str, above: Sequence[str] = ()) -> str:
    """A block for each path, of K images in every row.

    Args:
        rows: Label to the images of all paths, (num_paths, K, C, H, W).
    """
    blocks = []
    for index, path in enumerate(zip(*rows.values(), strict=True), 1):
        images = torch.cat([row.cpu() for row in path])
        blocks.append(pictures(images, len(path[0]), f"{title} {index}", above=above, left=list(rows), width=800))
    return f'<div class="stack">{"".join(blocks)}</div>'


def principal_steps(principal: latents.PrincipalDirections) -> tuple[dict[str, Tensor], list[float]]:
    """The first of `PrincipalDirections.named`, and their shares of the variance."""
    return dict(itertools.islice(principal.named().items(), DIRECTIONS)), principal.shares[:DIRECTIONS].tolist()


def edit_slider(
    model: Pipeline,
    images: Tensor,
    choice: str,
    directions: Mapping[str, Tensor],
    reach: int,
    rendered: Mapping[str, bool],
    beta: float | None = None,
    *,
    quick: bool,
    **sampling: Any,
) -> str:
    """Images over what becomes of their mean latents at beta on the way along a direction, one of `directions` at a time.

    Args:
        images: (N, C, H, W); fewer of them are shown where they are large.
        choice: What the directions are.
        directions: What strength 1 adds, (c, h, w) each, by their labels, which are text.
        reach: The largest strength, a whole number; steps are of a half, and the first that is shown is one less.
        rendered: Name of a row, HTML, to whether it is denoised.
        sampling: Arguments of the model's `denoise`; image i is denoised from the noise of seed i, whatever moves it.
    """
    resolution = images.shape[-1]
    strengths = spaced(-reach, reach, 4 * reach, resolution, quick)
    frames = len(directions) * len(strengths)
    images = images[: images_that_fit(frames, 1 + len(rendered), resolution, len(images))]
    encoded, pairs = model.encode(images, beta), itertools.product(directions.values(), strengths)
    moved = torch.cat([latents.manipulate(encoded, direction, strength) for direction, strength in pairs])
    rows = [images.cpu().repeat(frames, 1, 1, 1)]
    for denoise in rendered.values():

        def render(index: Tensor, denoise: bool = denoise) -> Tensor:
            options = {"seeds": index % len(images), **sampling} if denoise else {}
            return model.render(moved[index], beta, denoise=denoise, **options)

        rows.append(batched(render, torch.arange(len(moved)), at_once(model)))
    shape = len(rows), len(directions), len(strengths), len(images)
    sheet = torch.stack(rows).view(*shape, *images.shape[1:]).permute(1, 2, 0, 3, 4, 5, 6)
    title = f"{len(images)} held-out images" if len(images) > 1 else "A held-out image"
    options = {"choice": choice, "choices": list(directions), "left": ("input", *rendered)}
    shown = [signed(strength) for strength in strengths]
    return slider(sheet, title, "strength", shown, strengths.index(reach - 1), **options)
