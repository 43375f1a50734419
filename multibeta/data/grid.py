"""Image grids as PNG files."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from multibeta.data.images import to_uint8
from multibeta.files import write_atomically


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


def save_grid(images: Tensor, path: str | Path, columns: int = 8) -> None:
    """Write an image grid as PNG, small images enlarged to at least 64 pixels; atomic, parent folders are made."""
    scale = max(1, 64 // images.shape[-1])
    picture = Image.fromarray(image_grid(images, columns).numpy())
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    write_atomically(path, lambda file: picture.save(file, format="PNG"))
