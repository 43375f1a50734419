"""The images that a verb is given, in any of their forms, as a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from PIL import Image
from torch import Tensor

from multibeta.checks import check_dense
from multibeta.data.decoding import WHITE_LEVEL
from multibeta.data.loading import as_float, load_images

if TYPE_CHECKING:
    from multibeta.pipelines.base import Pretrained

Images = Tensor | np.ndarray | Image.Image | Sequence[Image.Image]
"""What the verbs take as images: see `as_images`."""


def image_options(model: Pretrained) -> dict[str, Any]:
    """What a model sees of an image: resolution, channels, and the white level of 16-bit grey that it was trained with."""
    config, recipe = model.vae.config, model.info.get("recipe")
    level = recipe.get("data", {}).get("white_level") if isinstance(recipe, dict) else None
    return {"resolution": config.resolution, "channels": config.image_channels, "white_level": level or WHITE_LEVEL}


def as_images(images: Images, model: Pretrained) -> Tensor:
    """Images in any form as a model takes them, floats (N, C, H, W) in [-1, 1].

    Args:
        images: A tensor (N, C, H, W) of the model's size, floats in [-1, 1], which is returned as it is, or uint8 from 0 to 255;
            a NumPy array (N, H, W, C) of that size, floats in [0, 1] as `generate` gives by output_type="np", or uint8; one image
            of Pillow or a list of them, of any size, prepared by `data.load_images`.

    Raises:
        TypeError: Something else.
        ValueError: Another shape, numbers of another type or outside their range.
    """
    options = image_options(model)
    channels, side = options["channels"], options["resolution"]
    if are_pictures(images):
        return load_images(images, **options)
    if not isinstance(images, Tensor | np.ndarray):
        given = type(images).__name__
        if isinstance(images, list | tuple):
            given = f"a {given} of {', '.join(sorted({type(image).__name__ for image in images})) or 'nothing'}"
        raise TypeError(
            f"images must be a tensor (N, {channels}, {side}, {side}), a NumPy array (N, {side}, {side}, {channels}), or images "
            f"of Pillow, got {given}; multibeta.data.load_images reads files and more"
        )
    if isinstance(images, Tensor):
        check_dense("images", images)
    wanted = (side, side, channels) if isinstance(images, np.ndarray) else (channels, side, side)
    if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
        kind = " as a NumPy array" if isinstance(images, np.ndarray) else ""
        raise ValueError(
            f"images must have shape (N, {', '.join(map(str, wanted))}){kind}, got {tuple(images.shape)}; "
            "multibeta.data.load_images brings others to it"
        )
    floats = as_float(images)
    return floats.movedim(3, 1).contiguous() if isinstance(images, np.ndarray) else floats


def are_pictures(images: object) -> TypeGuard[Image.Image | Sequence[Image.Image]]:
    """Whether `images` are one image of Pillow or a list of them."""
    if isinstance(images, list | tuple):
        return len(images) > 0 and all(isinstance(image, Image.Image) for image in images)
    return isinstance(images, Image.Image)
