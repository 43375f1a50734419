"""Pictures in any form that Python knows, prepared as `ImageFolder` prepares files: paths, images of Pillow, arrays, tensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multibeta.checks import FLOAT_NAMES, FLOATS, check_dense
from multibeta.data import decoding
from multibeta.data.folder import ImageFolder
from multibeta.data.images import check_resolution, to_float, to_uint8
from multibeta.files import expanded

Picture = str | Path | Image.Image | np.ndarray | Tensor
"""One picture: a file, an image of Pillow, an array (H, W, C) or (H, W), or a tensor (C, H, W) with the ranges of `as_float`."""

OVERSHOOT = 1e-3  # of a range that has the width 2: what rounding may leave it by


def load_images(
    images: Picture | Iterable[Picture],
    resolution: int,
    *,
    channels: int = 3,
    background: str = "white",
    white_level: int = decoding.WHITE_LEVEL,
    upscale: bool = True,
) -> Tensor:
    """Pictures in any form, prepared as `ImageFolder` prepares files, float (N, C, H, W) in [-1, 1].

    Args:
        images: One picture or several: files, folders, images of Pillow; arrays (H, W, C) or (H, W), or a batch of them
            (N, H, W, C), uint8 or floats in [0, 1]; tensors (C, H, W) or (N, C, H, W), uint8 or floats in [-1, 1].
        resolution, channels, background, white_level: See `ImageFolder`.
        upscale: Take pictures whose shorter side is below `resolution`, enlarged. Without it they are an error, and those of a
            folder are skipped, with a word in the log.

    Raises:
        FileNotFoundError, OSError: There is no such file or folder.
        ValueError: No pictures; what cannot be read, or has another range or shape. Of several, says which.
        TypeError: Something that is no picture.
    """
    decoding.require_pixel_options(channels, background, white_level)
    check_resolution(resolution)
    pictures: Iterable[Picture]
    if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim != 4):
        pictures = [images]
    elif isinstance(images, Iterable):
        pictures = images
    else:
        raise TypeError(f"images must be files, folders, images of Pillow, arrays or tensors, got {type(images).__name__}")
    options: dict[str, Any] = {"channels": channels, "background": background, "white_level": white_level, "upscale": upscale}
    squares = []
    for index, picture in enumerate(pictures):
        if isinstance(picture, str | Path) and (folder := expanded(picture)).is_dir():
            dataset = ImageFolder(folder, resolution, **options, minimum=1)
            squares.append(dataset.images(range(len(dataset))))
        else:
            square = to_square(picture, resolution, **options, name=f"image {index}" if pictures is images else "the image")
            squares.append(torch.tensor(square)[None])
    if not squares:
        raise ValueError("give at least one image: a file, a folder, an image of Pillow, an array or a tensor")
    return to_float(torch.cat(squares))


def to_square(
    picture: Picture,
    resolution: int,
    channels: int = 3,
    *,
    background: str = "white",
    white_level: int = decoding.WHITE_LEVEL,
    upscale: bool = True,
    name: str = "the image",
) -> np.ndarray:
    """One picture as an upright square, uint8 (channels, resolution, resolution): see `decoding.load_square`.

    Args:
        upscale: Take a picture whose shorter side is below `resolution`, enlarged.
        name: What errors call it, unless it is a file.
    """
    options: dict[str, Any] = {"background": background, "white_level": white_level, "upscale": upscale}
    if isinstance(picture, str | Path):
        return decoding.load_square(expanded(picture), resolution, channels, **options)
    image = as_pillow(picture, name)
    if decoding.is_large(image):
        image = image.copy()  # a large one is shrunk in place while it is decoded
    try:
        return decoding.square(image, resolution, channels, **options)
    except Exception as error:  # decoders raise whatever a broken file provokes
        raise ValueError(f"{name} cannot be read: {decoding.reason_of(error)}") from error


def as_pillow(picture: Image.Image | np.ndarray | Tensor, name: str = "the image") -> Image.Image:
    """An image of Pillow as it is, an array (H, W, C) or (H, W) or a tensor (C, H, W) as one of 8 bits."""
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, np.ndarray | Tensor):
        given = type(picture).__name__
        raise TypeError(f"{name} must be a file, an image of Pillow, an array (H, W, C) or a tensor (C, H, W), got {given}")
    if isinstance(picture, Tensor):
        check_dense(name, picture)
    else:
        picture = np.asarray(picture)  # a np.matrix never has three dimensions
        picture = picture[:, :, None] if picture.ndim == 2 else picture
    shape, is_array = tuple(picture.shape), isinstance(picture, np.ndarray)
    if len(shape) != 3 or shape[2 if is_array else 0] not in (1, 2, 3, 4) or 0 in shape:
        wanted = "(H, W, C) or (H, W), as an array" if is_array else "(C, H, W), as a tensor"
        raise ValueError(f"{name} must have shape {wanted}, with 1 to 4 channels, got {shape}")
    pixels = to_uint8(as_float(picture, name)).cpu()
    pixels = (pixels if is_array else pixels.movedim(0, -1)).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


def as_float(pixels: np.ndarray | Tensor, name: str = "images") -> Tensor:
    """Pixels as the networks take them: a float tensor in [-1, 1], of the same shape.

    Args:
        pixels: uint8, from 0 to 255; or floats, of an array in [0, 1], which become float32, of a tensor in [-1, 1], which are
            returned as they are.
        name: What errors call them.

    Raises:
        ValueError: Numbers of another type or outside that range.
    """
    if isinstance(pixels, np.ndarray):
        if pixels.dtype == np.uint8:
            return to_float(torch.from_numpy(np.array(pixels)))
        wanted, others = f"{name} as an array must be floats in [0, 1]", "a tensor holds floats in [-1, 1]"
        known = pixels.dtype.kind == "f"
    else:
        if pixels.dtype == torch.uint8:
            return to_float(pixels)
        wanted, others = f"{name} must be floats in [-1, 1]", "a NumPy array holds floats in [0, 1]"
        known = pixels.dtype in FLOATS
    if not known:
        raise ValueError(f"{wanted}, got {pixels.dtype} (possible are uint8, from 0 to 255, and {FLOAT_NAMES})")
    floats = torch.from_numpy(pixels.astype(np.float32)) * 2 - 1 if isinstance(pixels, np.ndarray) else pixels
    if floats.numel() and not (floats.abs() <= 1 + OVERSHOOT).all():
        found = f"{pixels.dtype} from {pixels.min():.3g} to {pixels.max():.3g}"
        raise ValueError(f"{wanted}, got {found}; bytes from 0 to 255 are taken as uint8, and {others}")
    return floats
