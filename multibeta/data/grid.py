"""Image grids as PNG files."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from multibeta.data.images import to_uint8
from multibeta.files import write_atomically

LABEL_LETTERS, LABEL_GAP = 14, 6  # letters in a line of a label, pixels around it


def image_grid(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] side by side, row by row: uint8 (rows * H, columns * W, 3) with white gaps."""
    height, width = images.shape[-2:]
    rows = -(-len(images) // columns)
    canvas = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    pixels = to_uint8(images).cpu().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def save_grid(images: Tensor, path: str | Path, columns: int = 8, *, labels: Sequence[str] | None = None) -> None:
    """Write an image grid as PNG, small images enlarged to at least 64 pixels; atomic, parent folders are made.

    Args:
        images: (N, C, H, W) in [-1, 1].
        columns: Images in a row.
        labels: What stands to the left of each row, one for each; their line ends are kept, long lines are broken.
    """
    rows = -(-len(images) // columns)
    if labels is not None and len(labels) != rows:
        raise ValueError(f"labels must be one for each of {rows} rows, got {len(labels)}")
    picture = grid_picture(images, columns)
    if labels is not None:
        picture = _labelled(picture, labels)
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


def grid_picture(images: Tensor, columns: int) -> Image.Image:
    """The picture of `image_grid`, small images enlarged to at least 64 pixels."""
    scale = max(1, 64 // images.shape[-1])
    picture = Image.fromarray(image_grid(images, columns).numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _labelled(picture: Image.Image, labels: Sequence[str]) -> Image.Image:
    """A picture of as many rows as labels, with these on a white margin to its left."""
    font = ImageFont.load_default()
    measure = ImageDraw.Draw(picture)
    texts = ["\n".join(part for line in label.splitlines() for part in textwrap.wrap(line, LABEL_LETTERS)) for label in labels]
    margin = round(max(measure.multiline_textbbox((0, 0), text, font=font)[2] for text in texts)) + 2 * LABEL_GAP
    canvas = Image.new("RGB", (margin + picture.width, picture.height), "white")
    canvas.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(texts):
        _, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font)
        middle = (row + 0.5) * picture.height / len(texts)
        place = margin - LABEL_GAP - right, middle - (top + bottom) / 2
        draw.multiline_text(place, text, fill="black", font=font, align="right")
    return canvas
